"""Is hetero on the CPU at least as fast as transformers, and does it know how fast it will be?

Prefill of 512 tokens and decode of 128, at batch 1 and 8, of one Qwen3-MoE-shaped model of about
1 B parameters in bfloat16 with random weights, which both load from one folder. Runs alternate
(ours, theirs, ours, ...), each in a process of its own, and medians are compared. transformers is
the faster of its eager and grouped_mm experts in each row, and has the number of threads that
hetero measured to be best here. What would change our mind: a ratio below 1.0 in any row, or tokens
that differ under --check.

    python bench/bench_vs_transformers.py [--quick] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hetero.measure.store import default_cache_dir, load_or_measure

# 16 layers of 64 experts: 1.03 B parameters, 0.27 B active with 8 experts a token.
FULL_SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 288,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
QUICK_SHAPE = {**FULL_SHAPE, "num_hidden_layers": 4}
BATCHES = (1, 8)
# Both sides run each prompt and this many more steps before anything is timed: the first large
# prefill of a process mostly waits for the system to hand out memory.
NUM_WARM_UP_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 layers, 128 + 16 tokens, 3 runs")
    parser.add_argument("--check", action="store_true", help="also compare tokens in float32")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--engine", choices=("hetero", "transformers", "check"))
    parser.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="keep the model here, or use the one there")
    parser.add_argument("--make-only", action="store_true", help="make the model and stop")
    args = parser.parse_args()
    prompt_len, output_len = (128, 17) if args.quick else (512, 129)
    if args.engine is not None:
        run = {"hetero": run_hetero, "transformers": run_transformers, "check": check}[args.engine]
        if args.threads:
            import torch

            torch.set_num_threads(args.threads)
        print(json.dumps(run(args.folder, prompt_len, output_len)))
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="hetero-bench-"))
    try:
        if not (folder / "config.json").exists():
            num_params = make_model(folder, QUICK_SHAPE if args.quick else FULL_SHAPE)
            say(f"made a model of {num_params / 1e9:.2f} B parameters")
        if args.make_only:
            return
        report(args, folder, prompt_len, output_len)
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


def report(args: argparse.Namespace, folder: Path, prompt_len: int, output_len: int) -> None:
    """Alternate the engines, print the table on stderr and the document on stdout."""
    # Measured once here, so that no run of hetero measures within its time.
    profile, _ = load_or_measure(default_cache_dir(os.environ), progress=say)
    args.threads = profile.cpu.num_threads
    say(f"{args.threads} threads; {'; '.join(profile.notes)}")
    repetitions = 3 if args.quick else args.repetitions
    runs: dict[str, list[dict[str, Any]]] = {"hetero": [], "transformers": []}
    for repetition in range(repetitions):
        for engine in runs:
            begin = time.perf_counter()
            runs[engine].append(spawn(args, folder, engine))
            took = time.perf_counter() - begin
            say(f"run {repetition + 1}/{repetitions} {engine}: {took:.0f} s")
    rows = []
    for batch in BATCHES:
        for phase in ("prefill", "decode"):
            key = f"{phase}_{batch}"
            ours = statistics.median(run[key] for run in runs["hetero"])
            theirs = statistics.median(run[key] for run in runs["transformers"])
            predicted = statistics.median(run[f"predicted_{key}_s"] for run in runs["hetero"])
            measured = statistics.median(run[f"measured_{key}_s"] for run in runs["hetero"])
            rows.append(
                {
                    "phase": phase,
                    "batch": batch,
                    "hetero_tokens_per_s": ours,
                    "transformers_tokens_per_s": theirs,
                    "ratio": ours / theirs,
                    "predicted_s": predicted,
                    "measured_s": measured,
                    "predicted_over_measured": predicted / measured,
                }
            )
    say(
        f"{'phase':8} {'batch':>5} {'hetero':>9} {'transf.':>9} {'ratio':>6}   predicted / measured"
    )
    for row in rows:
        name = "TTFT" if row["phase"] == "prefill" else "TPOT"
        say(
            f"{row['phase']:8} {row['batch']:5} {row['hetero_tokens_per_s']:7.1f}/s "
            f"{row['transformers_tokens_per_s']:7.1f}/s {row['ratio']:6.2f}   "
            f"{name} {1e3 * row['predicted_s']:.0f} / {1e3 * row['measured_s']:.0f} ms "
            f"= {row['predicted_over_measured']:.2f}"
        )
    document = {
        "question": __doc__.partition("\n")[0],
        "environment": environment(),
        "threads": args.threads,
        "command": [Path(sys.executable).name, *sys.argv],
        "workload": {"prompt_len": prompt_len, "output_len": output_len, "runs": repetitions},
        "rows": rows,
    }
    if args.check:
        document["check"] = spawn(args, folder, "check")
        say(f"check: {document['check']}")
    print(json.dumps(document, indent=2))


def spawn(args: argparse.Namespace, folder: Path, engine: str) -> dict[str, Any]:
    """Run one engine in a process of its own."""
    command = [sys.executable, __file__, "--engine", engine, "--folder", str(folder)]
    command += ["--threads", str(args.threads), *(["--quick"] if args.quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def prompts(batch: int, prompt_len: int) -> list[list[int]]:
    """Token ids that differ between sequences and positions."""
    return [
        [(7919 * row + 31 * at) % 31990 + 3 for at in range(prompt_len)] for row in range(batch)
    ]


def run_hetero(folder: Path, prompt_len: int, output_len: int) -> dict[str, Any]:
    """Tokens per second of each phase and batch, and what the plan said."""
    from hetero import LLM, SamplingParams
    from planner.cost_model import CostModel
    from planner.estimate import estimate
    from planner.workload import Workload

    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    warm_up = SamplingParams(max_tokens=1 + NUM_WARM_UP_STEPS, temperature=0.0, ignore_eos=True)
    result: dict[str, Any] = {}
    workload = Workload(prompt_len=prompt_len, output_len=output_len, num_seqs=max(BATCHES))
    with LLM(folder, accelerator="none", workload=workload, progress=say) as llm:
        costs = CostModel(llm.hardware)
        for batch in BATCHES:
            wanted: Any = [{"prompt_token_ids": ids} for ids in prompts(batch, prompt_len)]
            llm.generate(wanted, warm_up)
            llm.generate(wanted, params)
            measured = llm.measured
            assert measured is not None
            shape = Workload(prompt_len=prompt_len, output_len=output_len, num_seqs=batch)
            predicted = estimate(llm.spec, llm.plan.placement, costs, shape)
            result |= {
                f"prefill_{batch}": measured.prefill_tokens_per_s,
                f"decode_{batch}": measured.decode_tokens_per_s,
                f"measured_prefill_{batch}_s": measured.ttft_s,
                f"measured_decode_{batch}_s": measured.tpot_s,
                f"predicted_prefill_{batch}_s": predicted.ttft_s,
                f"predicted_decode_{batch}_s": predicted.tpot_s,
            }
    return result


def run_transformers(folder: Path, prompt_len: int, output_len: int) -> dict[str, Any]:
    """Tokens per second of each phase and batch, by the faster of its two expert kernels.

    Greedy steps with the KV cache and sdpa attention; the loop is transformers' own minus its
    per-token bookkeeping.
    """
    found: dict[str, float] = {}
    for experts in ("eager", "grouped_mm"):
        for key, rate in time_transformers(folder, prompt_len, output_len, experts).items():
            found[key] = max(rate, found.get(key, 0.0))
    return found


def time_transformers(
    folder: Path, prompt_len: int, output_len: int, experts: str
) -> dict[str, float]:
    """Tokens per second of each phase and batch with one expert kernel."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="sdpa", experts_implementation=experts
    )
    result = {}
    with torch.inference_mode():
        for batch in BATCHES:
            ids = torch.tensor(prompts(batch, prompt_len))
            out = model(ids, use_cache=True, logits_to_keep=1)
            for _ in range(NUM_WARM_UP_STEPS):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            begin = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(output_len - 1):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            end = time.perf_counter()
            result[f"prefill_{batch}"] = batch * prompt_len / (first - begin)
            result[f"decode_{batch}"] = batch * (output_len - 1) / (end - first)
    return result


def check(folder: Path, prompt_len: int, output_len: int) -> dict[str, Any]:
    """Greedy tokens of both in float32, where rounding does not decide."""
    import torch
    from transformers import AutoModelForCausalLM

    from hetero import LLM, SamplingParams

    wanted = prompts(2, 40)
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    with LLM(folder, accelerator="none", dtype="float32", max_model_len=128) as llm:
        requests: Any = [{"prompt_token_ids": ids} for ids in wanted]
        ours = [list(out.outputs[0].token_ids) for out in llm.generate(requests, params)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor(wanted), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
    theirs = out[:, len(wanted[0]) :].tolist()
    return {"tokens_equal": ours == theirs, "num_tokens": sum(map(len, ours))}


def make_model(folder: Path, shape: dict[str, Any]) -> int:
    """Random weights, seeded; router rows large enough that tokens spread over the experts."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**shape, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def environment() -> dict[str, Any]:
    """Where the numbers are from."""
    from importlib.metadata import version

    from hetero.measure.fingerprint import cpu_model

    return {
        "cpu": cpu_model(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numba", "hetero")},
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

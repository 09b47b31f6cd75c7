"""How close does decode of a whole model come to reading its active weights at the speed of memory?

Two shapes with random weights: an MoE like Qwen3's (16 layers, hidden 2048, 64 experts, 8 a token,
768 wide) and a Llama-like one of 1.1 B; bfloat16, int8, int4; 1, 4, 8, 16 sequences of 512 tokens.
The ceiling is a plain read of memory, measured in the same process before and after. What would
change our mind: less than 80 % of it for one sequence, or a prefill below 60 % of the rate of the
best product of the machine.

    python bench/bench_decode.py [--quick] [--models moe dense] [--formats bf16 int8 int4]
                                 [--output FILE] [--folder DIR] [--llama-bench PATH]
                                 [--llama-batched-bench PATH] [--ik-llama-bench PATH]

The last three run llama.cpp's programs, and ik_llama.cpp's, on GGUF files of the same shapes beside
ours: DIR/moe-bf16.gguf, DIR/moe-q8_0.gguf, DIR/moe-q4_0.gguf, and so on. The first and the last
give the rows of one sequence theirs: prefill of 512 tokens, and decode of 32 from an empty context,
which flatters them a little. The second gives those of more sequences theirs, of 512 tokens each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu_kernels.threads import available_cores
from hetero.measure.fingerprint import cpu_model

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
}
COMMON = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {"moe": {**MOE, **COMMON}, "dense": {**DENSE, **COMMON}}
FORMATS = {"bf16": None, "int8": "int8", "int4": "int4"}
GGUF = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
BATCHES = (1, 4, 8, 16)
CONTEXT = 512
# Tokens that their programs decode; one more of ours comes from the prompt.
NUM_STEPS = 32
CEILING_BYTES = 1 << 30
# llama.cpp's for one sequence and for several, and ik_llama.cpp's for one.
PROGRAMS = ("llama-bench", "llama-batched-bench", "ik-llama-bench")
MAKE_MODEL = Path(__file__).with_name("make_model.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 layers, one run, fewer steps")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the models here, or use those there")
    parser.add_argument("--output", type=Path, help="keep the rows so far here, too")
    for option in PROGRAMS:
        parser.add_argument(f"--{option}", type=Path, metavar="PATH", help="run it beside ours")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(run_one(args.folder, *args.one, quick=args.quick)))
        return
    check_files(parser, args)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="hetero-bench-"))
    try:
        print(json.dumps(report(args, folder), indent=2))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse at once what would end the run hours later."""
    programs = {option: path for option, path in programs_of(args).items() if path is not None}
    for option, path in programs.items():
        if not path.is_file() or not os.access(path, os.X_OK):
            parser.error(f"--{option}: {path} is not there, or is no program")
    if programs and args.folder is None:
        parser.error(f"--{next(iter(programs))} needs --folder with the GGUF files")
    names = [f"{model}-{GGUF[name]}.gguf" for model in args.models for name in args.formats]
    missing = [name for name in names if programs and not (args.folder / name).is_file()]
    if missing:
        parser.error(
            f"{args.folder} has no {', '.join(missing)}; make them from its models with "
            f"llama.cpp's convert_hf_to_gguf.py and llama-quantize, or leave them out with "
            f"--models and --formats"
        )
    for model in args.models if programs and args.quick else ():
        if not (args.folder / model / "config.json").is_file():
            parser.error(
                f"--quick would make a {model} of 4 layers, which is no match for the GGUF files "
                f"of {SHAPES[model]['num_hidden_layers']}; make it without --quick first"
            )
    if args.output is not None and not args.output.absolute().parent.is_dir():
        parser.error(f"--output: the folder of {args.output} is not there")


def programs_of(args: argparse.Namespace) -> dict[str, Path | None]:
    return {option: getattr(args, option.replace("-", "_")) for option in PROGRAMS}


def report(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every (model, format) in a process of its own, theirs beside ours in turn; medians."""
    say(f"{'model':6} {'format':6} {'batch':>5} {'decode t/s':>10} {'ceiling':>8} {'share':>6} "
        f"{'prefill t/s':>11} {'GFLOP/s':>8}  times theirs: decode, prefill")  # fmt: skip
    document: dict[str, Any] = {
        "question": __doc__.partition("\n")[0],
        "environment": {"cpu": cpu_model(), "cores": available_cores()},
        "command": ["python", "bench/bench_decode.py", *without_folders(sys.argv[1:])],
        "rows": [],
    }
    for model in args.models:
        make_model(folder / model, model, quick=args.quick)
        for name in args.formats:
            runs, others = [], []
            for _ in range(1 if args.quick else args.repetitions):
                runs.append(spawn(args, folder / model, model, name))
                others.append(run_theirs(args, folder / f"{model}-{GGUF[name]}.gguf"))
            for batch in BATCHES:
                document["rows"].append(row(model, name, batch, runs, others))
            if args.output is not None:
                part = args.output.with_name(f"{args.output.name}.part")
                part.write_text(json.dumps(document, indent=2) + "\n")
                part.replace(args.output)
    return document


def without_folders(argv: Sequence[str]) -> list[str]:
    """The command with names only: where files lie on this machine is nobody's business."""
    parts = []
    for argument in argv:
        option, equals, value = argument.partition("=")
        parts.append(f"{option}={Path(value).name}" if equals else Path(argument).name)
    return parts


def run_theirs(args: argparse.Namespace, model: Path) -> dict[str, float]:
    """Tokens per second of every program that was asked for, by the field of a row's batch."""
    programs = programs_of(args)
    found = {}
    if (program := programs["llama-bench"]) is not None:
        for key, rate in llama(program, model).items():
            found[f"llama_{key}_1"] = rate
    if (program := programs["llama-batched-bench"]) is not None:
        for batch, rate in llama_batched(program, model).items():
            found[f"llama_decode_{batch}"] = rate
    if (program := programs["ik-llama-bench"]) is not None:
        # Weights repacked when they are loaded, as ours are; without flash attention it is faster.
        for key, rate in llama(program, model, "-rtr", "1", "-fa", "0").items():
            found[f"ik_{key}_1"] = rate
    return found


def row(
    model: str, name: str, batch: int, runs: list[dict[str, Any]], others: list[dict[str, float]]
) -> dict[str, Any]:
    """The medians of one line."""

    def median(key: str) -> float:
        return float(statistics.median(run[key] for run in runs))

    found: dict[str, Any] = {
        "model": model,
        "format": name,
        "batch": batch,
        "context": CONTEXT,
        "decode_tokens_per_s": median(f"decode_{batch}"),
        "prefill_tokens_per_s": median("prefill"),
        "share_of_ceiling": median(f"share_{batch}"),
        "ceiling_gb_per_s": median("ceiling") / 1e9,
        "prefill_gflop_per_s": median("prefill_flops") / 1e9,
        "predicted_tpot_s": median(f"predicted_{batch}"),
    }
    theirs = ""
    for side in ("llama", "ik"):
        for key in ("decode", "prefill"):
            rates = [
                run[f"{side}_{key}_{batch}"] for run in others if f"{side}_{key}_{batch}" in run
            ]
            if not rates:
                continue
            found[f"{side}_{key}_tokens_per_s"] = statistics.median(rates)
            found[f"{key}_over_{side}"] = (
                found[f"{key}_tokens_per_s"] / found[f"{side}_{key}_tokens_per_s"]
            )
            theirs += f" {side} {found[f'{key}_over_{side}']:.2f}"
    say(
        f"{model:6} {name:6} {batch:5} {found['decode_tokens_per_s']:10.1f} "
        f"{found['ceiling_gb_per_s']:8.1f} {found['share_of_ceiling']:6.2f} "
        f"{found['prefill_tokens_per_s']:11.1f} {found['prefill_gflop_per_s']:8.0f} {theirs}"
    )
    return found


def run_one(folder: Path, model: str, name: str, *, quick: bool) -> dict[str, float]:
    """Tokens per second of one model in one format, and the share of the ceiling they are."""
    import numpy as np

    from cpu_kernels.memory_read import read_memory
    from hetero import LLM, SamplingParams
    from planner.cost_model import CostModel
    from planner.estimate import estimate
    from planner.popularity import Popularity
    from planner.workload import Workload

    buffer = np.ones(CEILING_BYTES, np.uint8)

    def ceiling(num_threads: int) -> float:
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            read_memory(buffer, num_threads=num_threads)
            seconds.append(time.perf_counter() - begin)
        return CEILING_BYTES / statistics.median(seconds)

    num_steps = 8 if quick else NUM_STEPS
    workload = Workload(prompt_len=CONTEXT, output_len=num_steps + 1, num_seqs=max(BATCHES))
    params = SamplingParams(max_tokens=num_steps + 1, temperature=0.0, ignore_eos=True)
    quantization: Any = FORMATS[name]
    found: dict[str, float] = {}
    with LLM(
        folder,
        accelerator="none",
        quantization=quantization,
        workload=workload,
        max_num_seqs=max(BATCHES),
        max_model_len=1024,
    ) as llm:
        spec, num_threads = llm.spec, llm.hardware.cpu.num_threads
        costs = CostModel(llm.hardware)
        outside = spec.weight_bytes("head") + sum(
            spec.weight_bytes(module, index)
            for index, layer in enumerate(spec.layers)
            for module in layer.modules
            if module != "experts"
        )
        rates = [ceiling(num_threads)]
        for batch in BATCHES:
            prompts: Any = [
                {"prompt_token_ids": [(7919 * row + 31 * at) % 31990 + 3 for at in range(CONTEXT)]}
                for row in range(batch)
            ]
            if batch == 1:
                llm.generate(prompts, params)
            llm.generate(prompts, params)
            measured = llm.measured
            assert measured is not None
            found[f"decode_{batch}"] = measured.decode_tokens_per_s
            if batch == 1:
                found["prefill"] = measured.prefill_tokens_per_s
            rates.append(ceiling(num_threads))
            active = outside + sum(
                Popularity.even(layer.num_experts, layer.num_experts_per_token).distinct_experts(
                    0, batch
                )
                * spec.expert_bytes(index)
                for index, layer in enumerate(spec.layers)
                if layer.is_moe
            )
            steps_per_s = measured.decode_tokens_per_s / batch
            found[f"share_{batch}"] = active * steps_per_s / statistics.median(rates[-2:])
            shape = Workload(prompt_len=CONTEXT, output_len=num_steps + 1, num_seqs=batch)
            predicted = estimate(spec, llm.plan.placement, costs, shape)
            found[f"predicted_{batch}"] = predicted.tpot_s
        found["ceiling"] = statistics.median(rates)
        flops = sum(
            spec.flops(module, CONTEXT, index)
            for index, layer in enumerate(spec.layers)
            for module in layer.modules
        )
        found["prefill_flops"] = flops * found["prefill"] / CONTEXT
    return found


def spawn(args: argparse.Namespace, folder: Path, model: str, name: str) -> dict[str, Any]:
    """Run one format in a process of its own: memory is given back, nothing is warm."""
    command = [sys.executable, __file__, "--one", model, name, "--folder", str(folder)]
    command += ["--quick"] if args.quick else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def llama(program: Path, model: Path, *options: str) -> dict[str, float]:
    """Tokens per second of one sequence: prefill of 512, decode of 32 from an empty context."""
    command = [str(program), "-m", str(model), "-t", str(available_cores()), "-r", "2"]
    command += ["-p", str(CONTEXT), "-n", str(NUM_STEPS), "-o", "json", *options]
    found = {}
    for test in json.loads(output_of(command)):
        if test["n_gen"] == 0:
            found["prefill"] = float(test["avg_ts"])
        elif test["n_prompt"] == 0:
            found["decode"] = float(test["avg_ts"])
    return found


def llama_batched(program: Path, model: Path) -> dict[int, float]:
    """Decoded tokens per second of several sequences of 512 tokens each, by how many they are.

    They are given one prompt, which is read once; each has a copy of its keys and values (no
    unified cache) and goes on with random tokens of its own.
    """
    batches = BATCHES[1:]
    command = [str(program), "-m", str(model), "-t", str(available_cores()), "-pps", "-no-kvu"]
    command += ["-c", str(max(batches) * (CONTEXT + NUM_STEPS)), "--output-format", "jsonl"]
    command += ["-npp", str(CONTEXT), "-ntg", str(NUM_STEPS), "-npl", ",".join(map(str, batches))]
    lines = [json.loads(line) for line in output_of(command).splitlines() if line.startswith("{")]
    found = {int(line["pl"]): float(line["speed_tg"]) for line in lines}
    if sorted(found) != sorted(batches):
        sys.exit(f"{program.name} gave rates of {sorted(found)} sequences, not of {batches}")
    return found


def output_of(command: list[str]) -> str:
    """What a program prints; its last words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-5:])
        sys.exit(f"{Path(command[0]).name} ended with {done.returncode}:\n{last}")
    return done.stdout


def make_model(folder: Path, model: str, *, quick: bool) -> None:
    """Random weights in the shapes of a model, in a process of its own; kept if they are there."""
    config = {**SHAPES[model], **({"num_hidden_layers": 4} if quick else {})}
    command = [sys.executable, str(MAKE_MODEL), str(folder)]
    subprocess.run(command, input=json.dumps(config), check=True, text=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""What does each strategy reach with 25, 50 and 100% of the model on the GPU, and was it foreseen?

Every strategy at every budget, and the plan that search picks, on CUDA where there is one and else
on the emulated accelerator (labelled: its speeds are a CPU core's). Predicted stands beside
measured; all-CPU is the baseline. What would change our mind: a searched plan slower than a named
strategy that fits, predictions off by more than a factor of two on CUDA, or tokens that differ
from all-CPU under --check.

    python bench/bench_strategies.py [--model FOLDER] [--accelerator NAME] [--quick] [--check]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from hetero import LLM, SamplingParams
from hetero.errors import HeteroError
from hetero.measure.machine import measure_machine
from hetero.model_lookup import find_model, read_model_spec
from planner.hardware import AcceleratorName, HardwareProfile
from planner.workload import Workload

STRATEGIES = ("gpu", "offload", "split", "experts-on-cpu", None)
SHARES = (0.25, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model folder (default: the demo model)")
    parser.add_argument(
        "--accelerator", choices=("cuda", "emulated"), help="default: cuda where there is one"
    )
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="64 + 16 tokens, one repetition")
    parser.add_argument("--check", action="store_true", help="tokens equal to all-CPU, in float32")
    args = parser.parse_args()
    if args.quick:
        args.prompt_len, args.output_len, args.repetitions = 64, 16, 1
    accelerator: AcceleratorName = args.accelerator or (
        "cuda" if torch.cuda.is_available() else "emulated"
    )
    say("measuring the machine")
    profile = measure_machine(quick=True, accelerator=accelerator)
    spec = read_model_spec(find_model(args.model))
    workload = Workload(prompt_len=args.prompt_len, output_len=args.output_len)
    rows = [run(args, profile, "none", "cpu", None, workload)]
    for share in SHARES:
        budget_gb = share * spec.total_weight_bytes() / 1e9 + headroom_gb(accelerator)
        for strategy in STRATEGIES:
            rows.append(run(args, profile, accelerator, strategy, budget_gb, workload, share))
    document: dict[str, Any] = {
        "question": __doc__.partition("\n")[0],
        "environment": {
            "profile": profile.name,
            "accelerator": accelerator,
            "gpu": None if profile.gpu is None else profile.gpu.name,
            "torch": torch.__version__,
        },
        "command": [Path(sys.executable).name, *sys.argv],
        "workload": {"prompt_len": args.prompt_len, "output_len": args.output_len},
        "rows": rows,
    }
    if args.check:
        document["check"] = check(args, profile, accelerator, rows)
    print(json.dumps(document, indent=2))


def headroom_gb(accelerator: str) -> float:
    """Beside the weights: cache, activations and staging; the share is of the weights only."""
    return 0.3 if accelerator == "cuda" else 0.01


def run(
    args: argparse.Namespace,
    profile: HardwareProfile,
    accelerator: AcceleratorName,
    strategy: str | None,
    budget_gb: float | None,
    workload: Workload,
    share: float | None = None,
    dtype: Any = "auto",
) -> dict[str, Any]:
    """One row: a strategy (None: the searched plan) under a budget."""
    row: dict[str, Any] = {"strategy": strategy or "searched", "gpu_share": share}
    params = SamplingParams(max_tokens=workload.output_len, temperature=0.0, ignore_eos=True)
    prompt: Any = {"prompt_token_ids": [(31 * at) % 90 + 5 for at in range(workload.prompt_len)]}
    try:
        with LLM(
            args.model,
            profile=profile,
            accelerator=accelerator,
            strategy=strategy,
            gpu_mem_gb=budget_gb,
            workload=workload,
            dtype=dtype,
        ) as llm:
            llm.generate(prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
            runs = []
            for _ in range(args.repetitions):
                (out,) = llm.generate(prompt, params)
                assert llm.measured is not None
                runs.append(llm.measured)
            timeline, predicted = llm.timeline, llm.predicted
            assert timeline is not None and predicted is not None
            row |= {
                "placement": llm.plan.placement.name,
                "cut": {
                    "prefill": llm.plan.placement.prefill.cut,
                    "decode": llm.plan.placement.decode.cut,
                },
                "ttft_s": statistics.median(each.ttft_s for each in runs),
                "tpot_s": statistics.median(each.tpot_s for each in runs),
                "decode_tokens_per_s": statistics.median(e.decode_tokens_per_s for e in runs),
                "prefill_tokens_per_s": statistics.median(e.prefill_tokens_per_s for e in runs),
                "predicted_ttft_s": predicted.ttft_s,
                "predicted_tpot_s": predicted.tpot_s,
                "gpu_bytes": llm.device_bytes().get("gpu", 0),
                "last_step_busy_s": timeline.busy_s(),
                "last_step_overlap": timeline.overlap(),
                "token_ids": list(out.outputs[0].token_ids),
            }
    except HeteroError as error:
        row["refused"] = str(error)
    tell(row)
    return row


def check(
    args: argparse.Namespace,
    profile: HardwareProfile,
    accelerator: AcceleratorName,
    rows: list[dict[str, Any]],
) -> dict[str, bool]:
    """Greedy tokens of every strategy in float32, with room for everything, against all-CPU."""
    workload = Workload(prompt_len=args.prompt_len, output_len=args.output_len)
    expected = run(args, profile, "none", "cpu", None, workload, dtype="float32")["token_ids"]
    equal = {}
    for strategy in {row["placement"] for row in rows if "placement" in row} & set(STRATEGIES):
        row = run(args, profile, accelerator, strategy, None, workload, dtype="float32")
        equal[strategy] = row.get("token_ids") == expected
    return equal


def tell(row: dict[str, Any]) -> None:
    share = "" if row["gpu_share"] is None else f"{row['gpu_share']:.0%}"
    if "refused" in row:
        say(f"{row['strategy']:15} {share:>5}  does not fit: {row['refused'][:90]}")
        return
    say(
        f"{row['strategy']:15} {share:>5}  TTFT {1e3 * row['ttft_s']:8.1f} ms "
        f"(predicted {1e3 * row['predicted_ttft_s']:8.1f})  TPOT {1e3 * row['tpot_s']:7.2f} ms "
        f"(predicted {1e3 * row['predicted_tpot_s']:7.2f})  {row['placement']} {row['cut']}"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

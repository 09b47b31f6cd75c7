"""How much faster are hetero's plans than the placements that other engines would choose?

All placements are priced by the same simulator, so the question is what to put where, not whose
kernels are better; nothing is measured. Two tables: ten models on reference machines against every
rival of planner/rivals.py, and the setting of FlexInfer (MLSys'25: OPT-66B, Llama-2-70B and
Llama-3-70B on an A100 with Ice Lake and an H100 with Sapphire Rapids) against FlexGen's placement,
where the paper reports end-to-end times 75 % and 76 % below FlexGen's. What would change our mind:
any rival that is faster than the plan.

    python bench/bench_rivals.py [--models A,B] [--machines A,B] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hetero.measure.store import find_profile
from hetero.model_lookup import find_model, read_model_spec
from planner.question import Question
from planner.rivals import RIVALS, RivalName, compare_rivals
from planner.workload import Workload

MODELS = (
    "mistral-7b",
    "llama-2-13b",
    "qwen3-32b",
    "llama-3.1-70b",
    "olmoe-1b-7b",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "glm-4.5-air",
    "gpt-oss-120b",
    "qwen3-235b-a22b",
)
MACHINES = (
    "a100-icelake",
    "h100-sapphire-rapids",
    "t4-cloud",
    "a10g-cloud",
    "l4-cloud",
    "a5000-workstation",
    "a6000-workstation",
    "desktop-rtx3060",
    "desktop-rtx3090",
    "desktop-rtx4090",
    "desktop-rtx5090",
    "rtx4090-2xeon-amx",
    "rtx4090-epyc9354",
    "server-a100-80gb",
    "workstation-h100-pcie",
    "laptop-rtx4060",
)
WORKLOADS = (
    Workload(prompt_len=512, output_len=128),
    Workload(prompt_len=512, output_len=128, num_seqs=16),
)
FLEXINFER_MODELS = ("opt-66b", "llama-2-70b", "llama-3.1-70b")
FLEXINFER_MACHINES = {"a100-icelake": 0.75, "h100-sapphire-rapids": 0.76}
FLEXINFER_WORKLOADS = tuple(
    Workload(prompt_len=prompt_len, output_len=output_len, num_seqs=num_seqs)
    for prompt_len, output_len in ((128, 128), (512, 128), (512, 512), (1024, 1024))
    for num_seqs in (1, 8, 32)
)
# What rounding may take off a time.
ROUNDING = 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=names, default=MODELS, metavar="A,B")
    parser.add_argument("--machines", type=names, default=MACHINES, metavar="A,B")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = list(compared(args.models, args.machines, WORKLOADS, RIVALS))
    paper = list(
        compared(FLEXINFER_MODELS, FLEXINFER_MACHINES, FLEXINFER_WORKLOADS, ("flexgen", "cpu"))
    )
    document = {
        "question": __doc__.partition("\n")[0],
        "command": ["python", "bench/bench_rivals.py", *sys.argv[1:]],
        "by_rival": {name: gains(rows, name) for name in RIVALS},
        "flexinfer": {
            machine: {
                "published_reduction": published,
                "predicted_reduction": reduction(paper, machine),
            }
            for machine, published in FLEXINFER_MACHINES.items()
        },
        "rows": rows,
        "flexinfer_rows": paper,
    }
    if args.output is not None:
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: document[key] for key in ("by_rival", "flexinfer")}, indent=2))
    ratios = [row["ratio"] for row in (*rows, *paper) if row["ratio"] is not None]
    is_beaten = any(ratio < 1 - ROUNDING for ratio in ratios)
    sys.exit(int(is_beaten))


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def compared(
    models: Iterable[str],
    machines: Iterable[str],
    workloads: Iterable[Workload],
    rivals: Iterable[RivalName],
) -> Iterable[dict[str, Any]]:
    """A row for each rival that has a placement beside a plan that fits."""
    rivals, workloads, machines = tuple(rivals), tuple(workloads), tuple(machines)
    for model in models:
        spec = read_model_spec(find_model(model))
        for machine in machines:
            hardware = find_profile(machine)
            for workload in workloads:
                question = Question(
                    spec=spec, hardware=hardware, workload=workload, prefers_simple=False
                )
                plan = question.plan()
                if not plan.feasible:
                    continue
                print(f"{model} on {machine}: {plan.placement.name}", file=sys.stderr, flush=True)
                for times in compare_rivals(plan, question, rivals):
                    yield {
                        "model": model,
                        "machine": machine,
                        "workload": [workload.prompt_len, workload.output_len, workload.num_seqs],
                        "rival": times.name,
                        "plan_e2e_s": plan.estimate.e2e_s,
                        "rival_e2e_s": times.e2e_s,
                        "ratio": times.ratio,
                        "reason": times.reason,
                    }


def gains(rows: Iterable[dict[str, Any]], name: RivalName) -> dict[str, Any]:
    """The rival's time over the plan's."""
    ratios = [row["ratio"] for row in rows if row["rival"] == name and row["ratio"] is not None]
    missing = sum(row["rival"] == name and row["ratio"] is None for row in rows)
    if not ratios:
        return {"n": 0, "does_not_fit": missing}
    return {
        "n": len(ratios),
        "does_not_fit": missing,
        "median": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def reduction(rows: Iterable[dict[str, Any]], machine: str) -> dict[str, float]:
    """By how much less time than FlexGen's placement: median, least and most of the workloads."""
    found = sorted(
        1 - 1 / row["ratio"]
        for row in rows
        if row["machine"] == machine and row["rival"] == "flexgen" and row["ratio"] is not None
    )
    if not found:
        return {}
    return {"median": statistics.median(found), "least": found[0], "most": found[-1]}


if __name__ == "__main__":
    main()

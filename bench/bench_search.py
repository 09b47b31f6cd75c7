"""How near to the fastest placement is the one that the search finds, and how long does it take?

Small: random machines and models of up to four layers and six experts, against an exact search
(tests/planner/exact_search.py) that looks at every state of every layer. Medium: the shapes of
models with 48 and more layers on machines with random rates and memories, against the bound that
every plan carries. Large: the time of a search of the largest models. What would change our mind: a
small case more than 1 % from the optimum, a gap that is below the true one, a medium gap above 2 %,
or a search of more than two seconds.

    python bench/bench_search.py [--small N] [--medium N] [--seed S]

Prints JSON to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from cpu_kernels.threads import available_cores
from hetero.measure.fingerprint import cpu_model
from hetero.model_lookup import find_model, read_model_spec
from planner import search
from planner.hardware import HardwareProfile
from planner.model_spec import ModelSpec
from planner.plan import Plan
from planner.workload import Workload

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.planner.exact_search import CHUNK_TOKENS, fastest, random_case

MACHINES = Path(__file__).parents[1] / "profiles" / "machines"
MEDIUM = ("qwen3-30b-a3b", "qwen3-235b-a22b", "llama-3.1-70b", "mixtral-8x22b", "glm-4.5-air")
MEDIUM_MACHINES = ("desktop-rtx4090", "rtx4090-epyc9354", "a100-icelake", "desktop-rtx3090")
LARGE = (
    ("qwen3-30b-a3b", "desktop-rtx4090"),
    ("deepseek-v3", "h200-emerald-rapids"),
    ("kimi-k2", "h200-emerald-rapids"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", type=int, default=300)
    parser.add_argument("--medium", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    document = {
        "question": __doc__.partition("\n")[0],
        "environment": {"cpu": cpu_model(), "cores": available_cores()},
        "command": ["python", "bench/bench_search.py", *sys.argv[1:]],
        "small": small_cases(args.small, args.seed),
        "medium": medium_cases(args.medium, args.seed),
        "large": [large_case(model, machine) for model, machine in LARGE],
    }
    print(json.dumps(document, indent=2))


def small_cases(count: int, seed: int) -> dict[str, Any]:
    """Ratios to the optimum of the cases that fit and that the exact search looked at wholly."""
    ratios, wrong_gaps, num_cut_off, num_infeasible = list[float](), 0, 0, 0
    for index in range(count):
        case = random_case(Random(f"{seed}/{index}"))
        plan = search(
            case.spec, case.machine, case.workload, chunk_tokens=CHUNK_TOKENS, prefers_simple=False
        )
        exact = fastest(case, plan.estimate.e2e_s if plan.feasible else float("inf"))
        if not plan.feasible:
            num_infeasible += 1
            if exact.seconds < float("inf"):
                ratios.append(float("inf"))
            continue
        num_cut_off += not exact.is_complete
        ratios.append(plan.estimate.e2e_s / exact.seconds)
        bound_s = plan.estimate.e2e_s * (1 - plan.optimality_gap)
        wrong_gaps += bound_s > exact.seconds * (1 + 1e-9)
        if ratios[-1] > 1.01:
            say(f"small {index}: {ratios[-1]:.3f} times the optimum ({case.spec.name})")
    return {
        "n": len(ratios),
        "share_within_1_percent": sum(ratio <= 1.01 for ratio in ratios) / len(ratios),
        "max_ratio": max(ratios),
        "wrong_gaps": wrong_gaps,
        "exact_search_cut_off": num_cut_off,
        "nothing_fits": num_infeasible,
    }


def medium_cases(count: int, seed: int) -> dict[str, Any]:
    """Gaps of models of 46 to 94 layers on machines of random proportions."""
    draw, rows = Random(seed), list[dict[str, Any]]()
    while len(rows) < count:
        model = draw.choice(MEDIUM)
        machine = scaled(
            HardwareProfile.load(MACHINES / f"{draw.choice(MEDIUM_MACHINES)}.json"), draw
        )
        workload = Workload(
            prompt_len=draw.choice((128, 512, 2048)),
            output_len=draw.choice((32, 128, 512)),
            num_seqs=draw.choice((1, 4, 16)),
        )
        plan, seconds = timed_search(spec_of(model), machine, workload)
        if plan.feasible:
            rows.append(row_of(plan, seconds))
            say(f"medium {len(rows)}: {model} gap {plan.optimality_gap:.1%} in {seconds:.2f} s")
    gaps = [row["gap"] for row in rows]
    return {
        "median_gap": statistics.median(gaps),
        "share_within_2_percent": sum(gap <= 0.02 for gap in gaps) / len(gaps),
        "max_gap": max(gaps),
        "max_seconds": max(row["seconds"] for row in rows),
        "rows": rows,
    }


def scaled(machine: HardwareProfile, draw: Random) -> HardwareProfile:
    """A machine with another GPU memory, and host memory that holds any of the models."""
    assert machine.gpu is not None
    share = draw.choice((0.25, 0.5, 1.0))
    return machine.with_memory(cpu_bytes=10**12, gpu_bytes=int(share * machine.gpu.memory_bytes))


def large_case(model: str, machine: str) -> dict[str, Any]:
    """Median of three searches, with host memory that holds the model."""
    hardware = HardwareProfile.load(MACHINES / f"{machine}.json")
    assert hardware.gpu is not None
    hardware = hardware.with_memory(
        cpu_bytes=max(hardware.cpu.memory_bytes, 3 * 10**12),
        gpu_bytes=hardware.gpu.memory_bytes,
    )
    runs = [timed_search(spec_of(model), hardware, Workload()) for _ in range(3)]
    plan = runs[0][0]
    found = row_of(plan, statistics.median(seconds for _, seconds in runs))
    say(f"large: {model} in {found['seconds']:.2f} s, gap {plan.optimality_gap:.1%}")
    return found


def spec_of(model: str) -> ModelSpec:
    return read_model_spec(find_model(model))


def timed_search(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload
) -> tuple[Plan, float]:
    begin_s = time.perf_counter()
    plan = search(spec, machine, workload, prefers_simple=False)
    return plan, time.perf_counter() - begin_s


def row_of(plan: Plan, seconds: float) -> dict[str, Any]:
    return {
        "model": plan.model,
        "machine": plan.profile,
        "workload": [plan.workload.prompt_len, plan.workload.output_len, plan.workload.num_seqs],
        "placement": plan.placement.name,
        "feasible": plan.feasible,
        "e2e_s": plan.estimate.e2e_s,
        "gap": plan.optimality_gap,
        "seconds": seconds,
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

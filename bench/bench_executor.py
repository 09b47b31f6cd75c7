"""How long does the executor take for a step whose ops do nothing: what does Python add to a step?

Decode graphs of real plans on the lanes that the emulated accelerator has (a thread for each lane,
the CPU's ops in the submitting thread), every op empty, the median of many steps. What would change
our mind about submitting from Python: more than 5 % of the seconds that the same plan is predicted
to take for a step.

    python bench/bench_executor.py [--repetitions 300]

Prints JSON to stdout, a table to stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from cpu_kernels.threads import available_cores
from hetero.measure.fingerprint import cpu_model
from hetero.model_lookup import find_model, read_model_spec
from hetero.runtime.devices import EmulatedAccelerator
from hetero.runtime.executor import Executor
from hetero.runtime.lanes import InlineEvent
from hetero.runtime.step_run import timeline_of
from planner import search
from planner.hardware import HardwareProfile
from planner.step_graph import Op, StepGraph, build
from planner.workload import Workload

MACHINES = Path(__file__).parents[1] / "profiles" / "machines"
# Model, machine, GB of its GPU, strategy (None: what the search finds).
CASES: tuple[tuple[str, str, float, str | None], ...] = (
    ("llama-3.1-8b", "desktop-rtx4090", 24, "gpu"),
    ("llama-3.1-8b", "desktop-rtx4090", 24, "cpu"),
    ("llama-3.1-8b", "desktop-rtx4090", 14, "offload"),
    ("llama-3.1-8b", "desktop-rtx4090", 14, "split"),
    ("llama-3.1-8b", "desktop-rtx4090", 14, None),
    ("qwen3-30b-a3b", "desktop-rtx4090", 24, "experts-on-cpu"),
    ("qwen3-30b-a3b", "desktop-rtx4090", 24, None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=300)
    args = parser.parse_args()
    document = {
        "question": __doc__.partition("\n")[0],
        "environment": {"cpu": cpu_model(), "cores": available_cores()},
        "command": ["python", "bench/bench_executor.py", *sys.argv[1:]],
        "rows": [row for case in CASES for row in rows_of(*case, args.repetitions)],
    }
    print(json.dumps(document, indent=2))


def rows_of(
    model: str, machine: str, gpu_gb: float, strategy: str | None, repetitions: int
) -> list[dict[str, Any]]:
    """The same graph with lanes at once and one op at a time."""
    spec = read_model_spec(find_model(model))
    hardware = HardwareProfile.load(MACHINES / f"{machine}.json")
    hardware = hardware.with_memory(cpu_bytes=10**12, gpu_bytes=int(gpu_gb * 1e9))
    plan = search(spec, hardware, Workload(), strategy=strategy, prefers_simple=False)
    graph = build(spec, plan.placement.decode)
    rows = []
    for overlap in (True, False):
        seconds = step_s(graph, overlap=overlap, repetitions=repetitions)
        rows.append(
            {
                "model": model,
                "placement": plan.placement.name,
                "overlap": overlap,
                "ops": len(graph.ops),
                "crossings": crossings(graph),
                "step_us": 1e6 * seconds,
                "op_us": 1e6 * seconds / len(graph.ops),
                "record_us": 1e6 * record_s(graph, repetitions),
                "share_of_predicted_step": seconds / plan.estimate.tpot_s,
            }
        )
        say(rows[-1])
    return rows


def step_s(graph: StepGraph, *, overlap: bool, repetitions: int) -> float:
    """Median seconds of a step of empty ops."""
    accelerator = EmulatedAccelerator(budget_bytes=1, link_bytes_per_s=1e9, latency_s=0.0)
    try:
        executor = Executor(accelerator.lanes, overlap=overlap)
        found = []
        for _ in range(repetitions):
            begin_s = time.perf_counter()
            executor.run(graph, do_nothing, do_all)
            found.append(time.perf_counter() - begin_s)
    finally:
        accelerator.close()
    return statistics.median(found)


def record_s(graph: StepGraph, repetitions: int) -> float:
    """Median seconds of a step's measured Timeline: a clock read at both ends of each op, its span.

    Ops on other lanes are dated by those lanes; here all in turn.
    """
    found = []
    for _ in range(repetitions):
        begin_s = time.perf_counter()
        events = [InlineEvent(time.perf_counter(), time.perf_counter()) for _ in graph.ops]
        timeline_of(graph, events, begin_s)
        found.append(time.perf_counter() - begin_s)
    return statistics.median(found)


def do_nothing(op: Op) -> None:
    """An op that takes no time."""


def do_all(ops: tuple[Op, ...]) -> list[float]:
    """Neighbours on the CPU that take no time."""
    return [time.perf_counter()] * len(ops)


def crossings(graph: StepGraph) -> int:
    """Dependencies between lanes: how often one has to wait for another."""
    return sum(graph.ops[dep].lane != op.lane for op in graph.ops for dep in op.deps)


def say(row: dict[str, Any]) -> None:
    print(
        f"{row['model']} {row['placement']} {'at once' if row['overlap'] else 'in turn'}: "
        f"{row['ops']} ops, {row['crossings']} crossings, {row['step_us']:.0f} us a step, "
        f"{row['op_us']:.1f} us an op, {row['share_of_predicted_step']:.1%} of a predicted step, "
        f"of which recording {row['record_us']:.0f} us",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()

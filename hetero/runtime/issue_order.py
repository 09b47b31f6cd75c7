"""In which order one thread hands out the ops of a StepGraph, and which of them together."""

from __future__ import annotations

from collections import deque

from planner.step_graph import Lane, Op, StepGraph


def issue_order(graph: StepGraph) -> tuple[Op, ...]:
    """Order in which one thread submits the ops.

    Work of the `cpu` lane runs in the submitting thread, so everything that other lanes could
    already have is submitted first. Each lane keeps the order of the graph.
    """
    queues = {lane: deque(graph.lane(lane)) for lane in graph.lanes}
    issued: set[int] = set()
    order: list[Op] = []

    def issue(lane: Lane) -> bool:
        queue = queues.get(lane)
        if not queue or not issued.issuperset(queue[0].deps):
            return False
        op = queue.popleft()
        issued.add(op.index)
        order.append(op)
        return True

    while len(order) < len(graph.ops):
        before = len(order)
        progress = True
        while progress:
            progress = any([issue("h2d"), issue("gpu"), issue("d2h")])
        issue("cpu")
        assert len(order) > before, "the graph is not in a topological order"
    return tuple(order)


def lane_runs(order: tuple[Op, ...]) -> tuple[tuple[Op, ...], ...]:
    """Cut an order of submission into ops that may be handed over together.

    Those are neighbours on the `cpu` lane, of one sub-batch, of which only the first waits for
    other lanes: nothing could be submitted between them, and none starts later than alone.
    """
    runs: list[list[Op]] = []
    on_cpu = {op.index for op in order if op.lane == "cpu"}
    for op in order:
        follows = bool(runs) and runs[-1][-1].lane == op.lane == "cpu"
        follows = follows and runs[-1][-1].sub_batch == op.sub_batch
        if follows and on_cpu.issuperset(op.deps):
            runs[-1].append(op)
        else:
            runs.append([op])
    return tuple(tuple(run) for run in runs)


def num_ahead(runs: tuple[tuple[Op, ...], ...]) -> int:
    """How many of these have to be handed out before the `cpu` lane alone is left."""
    others = [at for at, ops in enumerate(runs) if ops[0].lane != "cpu"]
    return others[-1] + 1 if others else 0


def runs_by_itself(graph: StepGraph) -> bool:
    """Do other lanes go on by themselves, but for looking up embeddings and what comes after them?

    Then the calling thread may do something else meanwhile.
    """
    runs = lane_runs(issue_order(graph))
    ahead = (op for ops in runs[: num_ahead(runs)] for op in ops)
    return all(op.lane != "cpu" or op.kind == "embed" for op in ahead)

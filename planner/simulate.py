"""Simulate a StepGraph: op seconds in, predicted Timeline out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from planner.step_graph import LANES, Lane, Op, OpKind, StepGraph
from planner.timeline import Span, Timeline

# How many times as long an op of the first lane takes while the second works.
Slowdowns = Mapping[tuple[Lane, Lane], float]

# Work that is short does not slow copies, nor is slowed by them, where there is no other.
LONG_KINDS: frozenset[OpKind] = frozenset({"attention", "attend", "experts", "dense"})


def op_times(
    graph: StepGraph, seconds: Callable[[Op], float], slowdowns: Slowdowns | None = None
) -> list[tuple[float, float]]:
    """Start and end of every op: each lane does one op at a time, in graph order.

    An op begins when its lane is free and its dependencies have ended. Lanes never reorder, as the
    executor's do not, and a graph is in topological order, so one pass over it is exact where
    lanes do not slow each other down.

    Parameters
    ----------
    slowdowns : mapping, optional
        What lanes that share a memory or a core cost each other; a graph in which no two such
        lanes have work that takes long is simulated without.
    """
    if slowdowns and _has_neighbours(graph, slowdowns):
        return _shared_times(graph, seconds, slowdowns)
    free_s = dict.fromkeys(LANES, 0.0)
    times: list[tuple[float, float]] = []
    for op in graph.ops:
        start_s = free_s[op.lane]
        for dep in op.deps:
            end_s = times[dep][1]
            if end_s > start_s:
                start_s = end_s
        end_s = free_s[op.lane] = start_s + seconds(op)
        times.append((start_s, end_s))
    return times


def _has_neighbours(graph: StepGraph, slowdowns: Slowdowns) -> bool:
    """Do two lanes that slow each other down both have work that takes long?"""
    lanes = {op.lane for op in graph.ops if op.payload == "weights" or op.kind in LONG_KINDS}
    return any(one in lanes and other in lanes for one, other in slowdowns)


def _shared_times(
    graph: StepGraph, seconds: Callable[[Op], float], slowdowns: Slowdowns
) -> list[tuple[float, float]]:
    """The same where lanes slow each other down: from event to event at constant speeds."""
    lanes = graph.lanes
    factors = [[slowdowns.get((lane, other), 1.0) for other in lanes] for lane in lanes]
    queues = [graph.lane(lane) for lane in lanes]
    heads = [0] * len(lanes)
    left_s: dict[int, float] = {}  # of what each lane works on, at full speed
    starts, ends = [0.0] * len(graph.ops), [-1.0] * len(graph.ops)
    clock, num_ended = 0.0, 0
    while num_ended < len(graph.ops):
        for lane, queue in enumerate(queues):
            if lane in left_s or heads[lane] == len(queue):
                continue
            op = queue[heads[lane]]
            for dep in op.deps:
                if ends[dep] < 0.0:
                    break
            else:
                starts[op.index] = clock
                left_s[lane] = seconds(op)
        slowed = {lane: max([factors[lane][other] for other in left_s]) for lane in left_s}
        passed_s = min([left_s[lane] * slowed[lane] for lane in left_s])
        clock += passed_s
        for lane in list(left_s):
            left_s[lane] -= passed_s / slowed[lane]
            # what rounding leaves of an op that ends now
            if left_s[lane] <= 1e-12 * (1 + clock):
                ends[queues[lane][heads[lane]].index] = clock
                heads[lane] += 1
                num_ended += 1
                del left_s[lane]
    return list(zip(starts, ends, strict=True))


def makespan_s(
    graph: StepGraph, seconds: Callable[[Op], float], slowdowns: Slowdowns | None = None
) -> float:
    """Seconds of the whole step: `simulate(...).makespan_s` without the Timeline."""
    return max((end_s for _, end_s in op_times(graph, seconds, slowdowns)), default=0.0)


def simulate(
    graph: StepGraph, seconds: Callable[[Op], float], slowdowns: Slowdowns | None = None
) -> Timeline:
    """Run the graph on ideal lanes.

    Parameters
    ----------
    graph : StepGraph
        Ops in a topological order.
    seconds : callable
        Predicted seconds of an op.
    slowdowns : mapping, optional
        What lanes cost each other while both work.

    Examples
    --------
    >>> from planner.step_graph import Op, StepGraph
    >>> copy = Op(index=0, kind="copy", lane="h2d", payload="hidden")
    >>> work = Op(index=1, kind="dense", lane="gpu", deps=(0,))
    >>> graph = StepGraph(phase="decode", ops=(copy, work))
    >>> simulate(graph, lambda op: 2.0 if op.kind == "copy" else 3.0).makespan_s
    5.0
    """
    times = op_times(graph, seconds, slowdowns)
    return Timeline(
        spans=tuple(
            Span(op=op, start_s=start_s, end_s=end_s)
            for op, (start_s, end_s) in zip(graph.ops, times, strict=True)
        )
    )

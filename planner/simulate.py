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
    queues = [iter(graph.lane(lane)) for lane in lanes]
    # of each lane the op that is next or at work; lanes at work, and what is left at full speed
    heads = [next(queue, None) for queue in queues]
    idle, working, left_s = list(range(len(lanes))), list[int](), [0.0] * len(lanes)
    starts, ends = [0.0] * len(graph.ops), [-1.0] * len(graph.ops)
    clock = 0.0
    while True:
        waiting = []
        for lane in idle:
            op = heads[lane]
            if op is None:
                continue
            for dep in op.deps:
                if ends[dep] < 0.0:
                    waiting.append(lane)
                    break
            else:
                starts[op.index] = clock
                left_s[lane] = seconds(op)
                working.append(lane)
        if not working:
            assert min(ends, default=0.0) >= 0.0, "the graph is not in a topological order"
            return list(zip(starts, ends, strict=True))
        slowed = [(lane, max([factors[lane][other] for other in working])) for lane in working]
        passed_s = min([left_s[lane] * factor for lane, factor in slowed])
        clock += passed_s
        idle = waiting
        for lane, factor in slowed:
            left_s[lane] -= passed_s / factor
            # what rounding leaves of an op that ends now
            if left_s[lane] <= 1e-12 * (1 + clock):
                op = heads[lane]
                assert op is not None
                ends[op.index] = clock
                heads[lane] = next(queues[lane], None)
                working.remove(lane)
                idle.append(lane)


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

"""Simulate a StepGraph: op seconds in, predicted Timeline out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from planner.step_graph import LANES, Lane, Op, OpKind, StepGraph
from planner.timeline import Span, Timeline

# How many times as long an op of the first lane takes while the second works.
Slowdowns = Mapping[tuple[Lane, Lane], float]

# Work that is short does not slow copies, nor is slowed by them, where there is no other.
LONG_KINDS: frozenset[OpKind] = frozenset({"attention", "attend", "experts", "dense"})


def work_until_called_s(done_s: float, whole_s: float, chunk_s: float) -> float:
    """Seconds of work that an op does which gives way, called after `done_s` of them.

    It looks up between its chunks, so that it ends the chunk that it has begun. Called before it
    has begun, it does nothing.

    Examples
    --------
    >>> work_until_called_s(4.0, 9.0, 3.0), work_until_called_s(6.0, 9.0, 3.0)
    (6.0, 6.0)
    """
    if chunk_s <= 0.0:
        return min(done_s, whole_s)
    # what rounding adds to whole chunks begins no other
    num_chunks = math.ceil(done_s / chunk_s - 1e-9)
    return min(whole_s, max(done_s, num_chunks * chunk_s))


def op_times(
    graph: StepGraph, seconds: Callable[[Op], float], slowdowns: Slowdowns | None = None
) -> list[tuple[float, float]]:
    """Start and end of every op: each lane does one op at a time, in graph order.

    An op begins when its lane is free and its dependencies have ended. Lanes never reorder, as the
    executor's do not, and a graph is in topological order, so one pass over it is exact where
    lanes do not slow each other down. An op that gives way is over when it has done its work, or
    with a chunk of it once the next op of its lane could begin (`work_until_called_s`); nothing but
    that one may depend on it.

    Parameters
    ----------
    seconds : callable
        Predicted seconds of an op; asked for one with `num_chunks` too, if it gives way.
    slowdowns : mapping, optional
        What lanes that share a memory or a core cost each other; a graph in which no two such
        lanes have work that takes long is simulated without.
    """
    if slowdowns and _has_neighbours(graph, slowdowns):
        return _shared_times(graph, seconds, slowdowns)
    free_s = dict.fromkeys(LANES, 0.0)
    times: list[tuple[float, float]] = []
    # of each lane an op that gives way to the next, with its seconds and those of a chunk
    giving_way: dict[Lane, tuple[Op, float, float]] = {}
    for op in graph.ops:
        start_s = free_s[op.lane]
        for dep in op.deps:
            end_s = times[dep][1]
            if end_s > start_s:
                start_s = end_s
        if op.lane in giving_way:
            earlier, whole_s, chunk_s = giving_way.pop(op.lane)
            began_s = times[earlier.index][0]
            end_s = began_s + work_until_called_s(start_s - began_s, whole_s, chunk_s)
            times[earlier.index] = (began_s, end_s)
            start_s = max(start_s, end_s)
        op_s = seconds(op)
        end_s = start_s + op_s
        times.append((start_s, end_s))
        if op.part == "prefetched" and op.gives_way:
            giving_way[op.lane] = (op, op_s, seconds(replace(op, num_chunks=1)))
            end_s = start_s  # the lane is free when it is called
        free_s[op.lane] = end_s
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
    # of an op that gives way the one that calls it; its seconds and those of a chunk
    callers: dict[int, Op | None] = {}
    pieces: dict[int, tuple[float, float]] = {}
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
                if op.part == "prefetched" and op.gives_way:
                    callers[lane] = next(queues[lane], None)
                    pieces[lane] = (left_s[lane], seconds(replace(op, num_chunks=1)))
        for lane, caller in callers.items():
            if caller is not None and all(ends[dep] >= 0.0 for dep in caller.deps):
                whole_s, chunk_s = pieces[lane]
                done_s = whole_s - left_s[lane]
                left_s[lane] = work_until_called_s(done_s, whole_s, chunk_s) - done_s
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
                heads[lane] = callers.pop(lane) if lane in callers else next(queues[lane], None)
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

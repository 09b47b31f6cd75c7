"""Simulate a StepGraph: op seconds in, predicted Timeline out."""

from __future__ import annotations

from collections.abc import Callable

from planner.step_graph import LANES, Op, StepGraph
from planner.timeline import Span, Timeline


def op_times(graph: StepGraph, seconds: Callable[[Op], float]) -> list[tuple[float, float]]:
    """Start and end of every op on ideal lanes: each does one op at a time, in graph order.

    An op begins when its lane is free and its dependencies have ended. Lanes never reorder, as the
    executor's do not, and a graph is in topological order, so one pass over it is exact.
    """
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


def makespan_s(graph: StepGraph, seconds: Callable[[Op], float]) -> float:
    """Seconds of the whole step: `simulate(graph, seconds).makespan_s` without the Timeline."""
    return max((end_s for _, end_s in op_times(graph, seconds)), default=0.0)


def simulate(graph: StepGraph, seconds: Callable[[Op], float]) -> Timeline:
    """Run the graph on ideal lanes.

    Parameters
    ----------
    graph : StepGraph
        Ops in a topological order.
    seconds : callable
        Predicted seconds of an op.

    Examples
    --------
    >>> from planner.step_graph import Op, StepGraph
    >>> copy = Op(index=0, kind="copy", lane="h2d", payload="hidden")
    >>> work = Op(index=1, kind="dense", lane="gpu", deps=(0,))
    >>> graph = StepGraph(phase="decode", ops=(copy, work))
    >>> simulate(graph, lambda op: 2.0 if op.kind == "copy" else 3.0).makespan_s
    5.0
    """
    times = op_times(graph, seconds)
    return Timeline(
        spans=tuple(
            Span(op=op, start_s=start_s, end_s=end_s)
            for op, (start_s, end_s) in zip(graph.ops, times, strict=True)
        )
    )

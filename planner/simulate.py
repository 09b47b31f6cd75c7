"""Simulate a StepGraph: op seconds in, predicted Timeline out."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from planner.step_graph import Lane, Op, StepGraph
from planner.timeline import Span, Timeline


def simulate(graph: StepGraph, seconds: Callable[[Op], float]) -> Timeline:
    """Run the graph on ideal lanes: each lane does one op at a time, in graph order.

    An event-driven simulation. An op begins when its lane is free and its dependencies have ended;
    lanes never reorder, as the executor's do not.

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
    queues: dict[Lane, deque[Op]] = {lane: deque(graph.lane(lane)) for lane in graph.lanes}
    missing = {op.index: len(op.deps) for op in graph.ops}
    waiting: dict[int, list[Op]] = {}
    for op in graph.ops:
        for dep in op.deps:
            waiting.setdefault(dep, []).append(op)
    running: list[tuple[float, int]] = []
    idle: set[Lane] = set(graph.lanes)
    starts: dict[int, float] = {}
    spans: dict[int, Span] = {}

    def start_what_can(now: float) -> None:
        for lane in sorted(idle):
            queue = queues[lane]
            if queue and missing[queue[0].index] == 0:
                op = queue.popleft()
                starts[op.index] = now
                heapq.heappush(running, (now + seconds(op), op.index))
                idle.discard(lane)

    start_what_can(0.0)
    while running:
        now, index = heapq.heappop(running)
        ended = [index]
        while running and running[0][0] == now:
            ended.append(heapq.heappop(running)[1])
        for done in ended:
            op = graph.ops[done]
            spans[done] = Span(op=op, start_s=starts[done], end_s=now)
            idle.add(op.lane)
            for later in waiting.get(done, ()):
                missing[later.index] -= 1
        start_what_can(now)
    assert len(spans) == len(graph.ops), "the graph has a cycle or is not in lane order"
    return Timeline(spans=tuple(spans[op.index] for op in graph.ops))

"""Executor: runs a StepGraph on real lanes and returns the measured Timeline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from hetero.runtime.lanes import InlineEvent, LaneEvent, LaneRunner
from planner.step_graph import Lane, Op, StepGraph
from planner.timeline import Span, Timeline


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


class Executor:
    """Runs graphs on lanes.

    Parameters
    ----------
    lanes : mapping
        A runner for each lane that the graphs use.
    overlap : bool
        False waits for each op before the next is submitted: the reference for the overlapped run.
    """

    def __init__(self, lanes: Mapping[Lane, LaneRunner], *, overlap: bool = True) -> None:
        self._lanes = lanes
        self._overlap = overlap
        # By identity: hashing a graph of hundreds of ops would cost more than a small one's step.
        self._runs: dict[int, tuple[StepGraph, tuple[tuple[Op, ...], ...]]] = {}

    def run(
        self,
        graph: StepGraph,
        perform: Callable[[Op], None],
        perform_run: Callable[[tuple[Op, ...]], Sequence[float]] | None = None,
    ) -> Timeline:
        """Perform every op on its lane after its dependencies.

        Parameters
        ----------
        graph
            What to perform.
        perform
            Does one op.
        perform_run
            Does several of the `cpu` lane (`lane_runs`), the same tuple in every step, and returns
            when each ended (`time.perf_counter`). None: they are performed one by one.

        Raises
        ------
        Exception
            What an op raised; ops that depend on it were not performed.
        """
        if id(graph) not in self._runs:
            self._runs[id(graph)] = (graph, lane_runs(issue_order(graph)))
        _, runs = self._runs[id(graph)]
        for lane in graph.lanes:
            self._lanes[lane].begin_step()
        events: dict[int, LaneEvent] = {}
        origin_s = time.perf_counter()
        try:
            for ops in runs:
                if len(ops) > 1 and perform_run is not None:
                    events.update(_perform_run(ops, perform_run, events))
                    continue
                for op in ops:
                    after = [events[dep] for dep in op.deps]
                    event = self._lanes[op.lane].submit(partial(perform, op), after)
                    events[op.index] = event
                    if not self._overlap:
                        event.wait()
        finally:
            # An error leaves other lanes with work in flight that reads this step's tensors.
            errors = _drain(events)
        if errors:
            raise errors[0]
        spans = []
        for op in graph.ops:
            start_s, end_s = events[op.index].span_s(origin_s)
            spans.append(Span(op=op, start_s=start_s, end_s=end_s))
        return Timeline(spans=tuple(spans))


def _perform_run(
    ops: tuple[Op, ...],
    perform_run: Callable[[tuple[Op, ...]], Sequence[float]],
    events: Mapping[int, LaneEvent],
) -> dict[int, LaneEvent]:
    """Do neighbours of the `cpu` lane in this thread; their events."""
    for dep in ops[0].deps:
        events[dep].wait()
    starts = [time.perf_counter()]
    ends = perform_run(ops)
    starts += ends[:-1]
    return {
        op.index: InlineEvent(start_s, end_s)
        for op, start_s, end_s in zip(ops, starts, ends, strict=True)
    }


def _drain(events: Mapping[int, LaneEvent]) -> list[BaseException]:
    """Wait for everything that was submitted; the errors in order of submission."""
    errors: list[BaseException] = []
    for event in events.values():
        try:
            event.wait()
        except BaseException as error:  # an interrupt too: other lanes still read this step
            errors.append(error)
    return errors

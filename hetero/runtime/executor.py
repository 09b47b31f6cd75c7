"""Executor: runs a StepGraph on real lanes and returns the measured Timeline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from hetero.runtime.host_event import HostEvent, HostEvents
from hetero.runtime.lanes import InlineEvent, LaneEvent, LaneRunner, LaneWork, ThreadLane
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


@dataclass(frozen=True, slots=True, eq=False)
class _CpuWork:
    """Neighbours on the `cpu` lane: their events, what the first needs, what the next ones will."""

    ops: tuple[Op, ...]
    events: tuple[HostEvent, ...]
    after: tuple[HostEvent, ...]
    following: tuple[HostEvent, ...]


class _Program:
    """A graph as lanes with threads of their own run it: to each its part, the rest to the caller.

    Mutable: its events happen anew in every step. Without overlap every op waits for the one that
    was submitted before it.
    """

    def __init__(self, graph: StepGraph, *, overlap: bool) -> None:
        self.events = HostEvents(len(graph.ops))
        self.of_cpu: list[_CpuWork] = []
        self.of_lane: dict[Lane, list[LaneWork]] = {}
        runs = lane_runs(issue_order(graph))
        following: dict[Lane, tuple[HostEvent, ...]] = {}
        # From the last to the first: what a lane waits for next is known then.
        for at, ops in reversed(list(enumerate(runs))):
            needs = set(ops[0].deps)
            if at and not overlap:
                needs.add(runs[at - 1][-1].index)
            lane, events = ops[0].lane, self.events.all
            after = tuple(events[each] for each in sorted(needs) if graph.ops[each].lane != lane)
            for event in after:
                event.is_awaited = True
            next_after, following[lane] = following.get(lane, ()), after
            if lane == "cpu":
                mine = tuple(events[op.index] for op in ops)
                self.of_cpu.append(_CpuWork(ops, mine, after, next_after))
            else:
                work = LaneWork(ops[0], events[ops[0].index], after, next_after)
                self.of_lane.setdefault(lane, []).append(work)
        self.of_cpu.reverse()
        for works in self.of_lane.values():
            works.reverse()


class Executor:
    """Runs graphs on lanes.

    Lanes with threads of their own (the emulated accelerator's) get their part of a graph when a
    step begins and wait for each other by themselves. What CUDA's streams are to do is submitted by
    the calling thread as it becomes known. Either way that thread does the `cpu` lane's work.

    Parameters
    ----------
    lanes : mapping
        A runner for each lane that the graphs use, but `cpu`.
    overlap : bool
        False does one op at a time: the reference for the overlapped run.
    """

    def __init__(self, lanes: Mapping[Lane, LaneRunner], *, overlap: bool = True) -> None:
        self._lanes = lanes
        self._overlap = overlap
        self._threads = {name: lane for name, lane in lanes.items() if isinstance(lane, ThreadLane)}
        # By identity: hashing a graph of hundreds of ops would cost more than a small one's step.
        self._programs: dict[int, tuple[StepGraph, _Program]] = {}
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
        for name in graph.lanes:
            if name != "cpu":
                self._lanes[name].begin_step()
        run = self._submit if self._uses_streams(graph) else self._run_program
        origin_s = time.perf_counter()
        events = run(graph, perform, perform_run)
        spans = []
        for op in graph.ops:
            start_s, end_s = events[op.index].span_s(origin_s)
            spans.append(Span(op=op, start_s=start_s, end_s=end_s))
        return Timeline(spans=tuple(spans))

    def _uses_streams(self, graph: StepGraph) -> bool:
        return any(lane != "cpu" and lane not in self._threads for lane in graph.lanes)

    def _run_program(
        self,
        graph: StepGraph,
        perform: Callable[[Op], None],
        perform_run: Callable[[tuple[Op, ...]], Sequence[float]] | None,
    ) -> Sequence[LaneEvent]:
        if id(graph) not in self._programs:
            self._programs[id(graph)] = (graph, _Program(graph, overlap=self._overlap))
        _, program = self._programs[id(graph)]
        program.events.clear()
        for lane, works in program.of_lane.items():
            self._threads[lane].start(works, perform)
        try:
            for work in program.of_cpu:
                for event in work.after:
                    event.wait()
                starts, ends = _do_neighbours(work.ops, perform, perform_run)
                *others, last = zip(work.events, starts, ends, strict=True)
                for event, start_s, end_s in others:
                    event.end(start_s, end_s)
                last[0].end(last[1], last[2], work.following)
        except BaseException as error:
            # Other lanes wait for what this thread will not do, and still read this step's tensors.
            for work in program.of_cpu:
                for event in work.events:
                    if not event.is_done:
                        event.fail(error)
            _drain(program.events.all)
            raise
        errors = _drain(program.events.all)
        if errors:
            raise errors[0]
        return program.events.all

    def _submit(
        self,
        graph: StepGraph,
        perform: Callable[[Op], None],
        perform_run: Callable[[tuple[Op, ...]], Sequence[float]] | None,
    ) -> Mapping[int, LaneEvent]:
        if id(graph) not in self._runs:
            self._runs[id(graph)] = (graph, lane_runs(issue_order(graph)))
        _, runs = self._runs[id(graph)]
        events: dict[int, LaneEvent] = {}
        try:
            for ops in runs:
                if ops[0].lane == "cpu":
                    for dep in ops[0].deps:
                        events[dep].wait()
                    starts, ends = _do_neighbours(ops, perform, perform_run)
                    for op, start_s, end_s in zip(ops, starts, ends, strict=True):
                        events[op.index] = InlineEvent(start_s, end_s)
                    continue
                (op,) = ops
                after = [events[dep] for dep in op.deps]
                event = events[op.index] = self._lanes[op.lane].submit(partial(perform, op), after)
                if not self._overlap:
                    event.wait()
        finally:
            # An error leaves other lanes with work in flight that reads this step's tensors.
            errors = _drain(events.values())
        if errors:
            raise errors[0]
        return events


def _do_neighbours(
    ops: tuple[Op, ...],
    perform: Callable[[Op], None],
    perform_run: Callable[[tuple[Op, ...]], Sequence[float]] | None,
) -> tuple[Sequence[float], Sequence[float]]:
    """Do neighbours of the `cpu` lane in this thread; when each began and ended."""
    times = [time.perf_counter()]
    if len(ops) > 1 and perform_run is not None:
        times += perform_run(ops)
    else:
        for op in ops:
            perform(op)
            times.append(time.perf_counter())
    return times[:-1], times[1:]


def _drain(events: Iterable[LaneEvent]) -> list[BaseException]:
    """Wait for everything that was submitted; the errors in order of submission."""
    errors: list[BaseException] = []
    for event in events:
        try:
            event.wait()
        except BaseException as error:  # an interrupt too: other lanes still read this step
            errors.append(error)
    return errors

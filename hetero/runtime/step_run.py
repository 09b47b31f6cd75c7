"""StepRun: a step that has begun; other lanes work on it while its thread may do something else."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from hetero.runtime.host_event import HostEvent, HostEvents
from hetero.runtime.issue_order import issue_order, lane_runs, num_ahead
from hetero.runtime.lanes import (
    CudaLane,
    InlineEvent,
    LaneEvent,
    LaneRunner,
    LaneWork,
    PerformUntil,
    ThreadLane,
)
from planner.step_graph import Lane, Op, StepGraph
from planner.timeline import Span, Timeline


@dataclass(frozen=True, slots=True, eq=False)
class Performer:
    """What does the ops of a step.

    Attributes
    ----------
    perform : callable
        Does one op.
    perform_run : callable or None
        Does several of the `cpu` lane (`issue_order.lane_runs`), the same tuple in every step, and
        returns when each ended (`time.perf_counter`). None: they are performed one by one.
    perform_until : callable or None
        Does an op that gives way (`Op.gives_way`), and is told how to ask whether the next op of
        its lane is ready. None: such an op is performed as a whole.
    """

    perform: Callable[[Op], None]
    perform_run: Callable[[tuple[Op, ...]], Sequence[float]] | None = None
    perform_until: PerformUntil | None = None

    def neighbours(self, ops: tuple[Op, ...]) -> list[tuple[float, float]]:
        """Do neighbours of the `cpu` lane in this thread; when each began and ended."""
        times = [time.perf_counter()]
        if len(ops) > 1 and self.perform_run is not None:
            times += self.perform_run(ops)
        else:
            for op in ops:
                self.perform(op)
                times.append(time.perf_counter())
        return list(itertools.pairwise(times))


class AbandonedError(Exception):
    """An op was not performed, because nobody wants its step any more."""


class StepRun(Protocol):
    """A step that has begun: what is left to the calling thread is the end of its own lane."""

    is_over: bool

    def begin(self) -> None:
        """Give the other lanes their part, and do what they wait for."""

    def abandon(self) -> None:
        """See to it that no lane works on the step any more; nothing where it is over."""

    @property
    def is_ready(self) -> bool:
        """Have the other lanes ended all that they were given?"""

    def finish(self) -> Timeline:
        """Do what is left to the calling thread, and wait for all lanes.

        Raises
        ------
        Exception
            What an op raised; ops that depend on it were not performed.
        """


@dataclass(frozen=True, slots=True, eq=False)
class _CpuWork:
    """Neighbours on the `cpu` lane: their events, what the first needs, what the next ones will."""

    ops: tuple[Op, ...]
    events: tuple[HostEvent, ...]
    after: tuple[HostEvent, ...]
    following: tuple[HostEvent, ...]


class Program:
    """A graph as lanes with threads of their own run it: to each its part, the rest to the caller.

    `num_ahead` of the caller's works come before all that the others do is done. Mutable: its
    events happen anew in every step. Without overlap every op waits for the one that was submitted
    before it.
    """

    def __init__(self, graph: StepGraph, *, overlap: bool) -> None:
        self.graph = graph
        self.events = HostEvents(len(graph.ops))
        self.of_cpu: list[_CpuWork] = []
        self.of_lane: dict[Lane, list[LaneWork]] = {}
        runs = lane_runs(issue_order(graph))
        self.num_ahead = sum(ops[0].lane == "cpu" for ops in runs[: num_ahead(runs)])
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
            is_last = lane not in following
            next_after, following[lane] = following.get(lane, ()), after
            if lane == "cpu":
                mine = tuple(events[op.index] for op in ops)
                self.of_cpu.append(_CpuWork(ops, mine, after, next_after))
            else:
                work = LaneWork(ops[0], events[ops[0].index], after, next_after, is_last)
                self.of_lane.setdefault(lane, []).append(work)
        self.of_cpu.reverse()
        for works in self.of_lane.values():
            works.reverse()


class ProgramRun:
    """A step of lanes with threads of their own. Mutable: its end is to come."""

    def __init__(
        self, program: Program, lanes: Mapping[Lane, ThreadLane], performer: Performer
    ) -> None:
        self.is_over = False
        self._program = program
        self._lanes = lanes
        self._performer = performer
        self._num_done = 0
        self._is_abandoned = False
        self._origin_s = time.perf_counter()

    def begin(self) -> None:
        program = self._program
        program.events.clear()
        for lane, works in program.of_lane.items():
            self._lanes[lane].start(works, self._perform, self._performer.perform_until)
        self._work(program.num_ahead)

    def abandon(self) -> None:
        if self.is_over:
            return
        self._give_up()
        error = AbandonedError("the step was abandoned")
        self._fail_rest(error)
        # An interrupt may have come before a lane was given its part. Each ends its own events.
        for lane, works in self._program.of_lane.items():
            self._lanes[lane].give_up(works, error).wait()
        self.is_over = True

    @property
    def is_ready(self) -> bool:
        works = self._program.of_lane.values()
        return all(work.event.is_done for each in works for work in each)

    def finish(self) -> Timeline:
        self._work(len(self._program.of_cpu))
        events = self._program.events.all
        errors = drain(events, self._give_up)
        self.is_over = True
        if errors:
            raise errors[0]
        return timeline_of(self._program.graph, events, self._origin_s)

    def _perform(self, op: Op) -> None:
        """Do an op of another lane; none once the step is abandoned."""
        if self._is_abandoned:
            raise AbandonedError("the step was abandoned")
        self._performer.perform(op)

    def _give_up(self) -> None:
        self._is_abandoned = True

    def _fail_rest(self, error: BaseException) -> None:
        """Other lanes wait for what this thread will not do."""
        for work in self._program.of_cpu[self._num_done :]:
            for event in work.events:
                if not event.is_done:
                    event.fail(error)

    def _work(self, num_works: int) -> None:
        """Go on with the `cpu` lane until so much of it is done."""
        works = self._program.of_cpu
        try:
            while self._num_done < num_works:
                self._do(works[self._num_done])
                self._num_done += 1
        except BaseException as error:
            self._give_up()
            self._fail_rest(error)
            # They still read this step's tensors.
            drain(self._program.events.all)
            self.is_over = True
            raise

    def _do(self, work: _CpuWork) -> None:
        for event in work.after:
            event.wait()
        spans = self._performer.neighbours(work.ops)
        for event, (start_s, end_s) in zip(work.events[:-1], spans[:-1], strict=True):
            event.end(start_s, end_s)
        work.events[-1].end(*spans[-1], work.following)


class StreamRun:
    """A step of CUDA streams, which are handed each op by this thread. Mutable.

    Without overlap it waits for every op before it hands out the next.
    """

    def __init__(
        self,
        graph: StepGraph,
        runs: tuple[tuple[Op, ...], ...],
        lanes: Mapping[Lane, LaneRunner],
        performer: Performer,
        *,
        overlap: bool,
    ) -> None:
        self.is_over = False
        self._graph = graph
        self._lanes = lanes
        self._performer = performer
        self._overlap = overlap
        self._events: dict[int, LaneEvent] = {}
        self._origin_s = time.perf_counter()
        self._runs = runs
        self._left = runs[num_ahead(runs) :]

    def begin(self) -> None:
        self._hand_out(self._runs[: num_ahead(self._runs)])

    def abandon(self) -> None:
        if not self.is_over:
            drain(self._events.values())
            self.is_over = True

    @property
    def is_ready(self) -> bool:
        return all(event.is_done for event in self._events.values())

    def finish(self) -> Timeline:
        self._hand_out(self._left)
        errors = drain(self._events.values())
        self.is_over = True
        if errors:
            raise errors[0]
        return timeline_of(self._graph, self._events, self._origin_s)

    def _hand_out(self, runs: Iterable[tuple[Op, ...]]) -> None:
        events = self._events
        try:
            for ops in runs:
                if ops[0].lane == "cpu":
                    for dep in ops[0].deps:
                        events[dep].wait()
                    for op, span in zip(ops, self._performer.neighbours(ops), strict=True):
                        events[op.index] = InlineEvent(*span)
                    continue
                (op,) = ops
                after = [events[dep] for dep in op.deps]
                events[op.index] = self._submit(op, after)
                if not self._overlap:
                    events[op.index].wait()
        except BaseException:
            # Lanes with work in flight read this step's tensors.
            drain(events.values())
            self.is_over = True
            raise

    def _submit(self, op: Op, after: Sequence[LaneEvent]) -> LaneEvent:
        lane, performer = self._lanes[op.lane], self._performer
        if op.gives_way and performer.perform_until is not None and isinstance(lane, CudaLane):
            return lane.submit_until(partial(performer.perform_until, op), after)
        return lane.submit(partial(performer.perform, op), after)


def timeline_of(
    graph: StepGraph, events: Sequence[LaneEvent] | Mapping[int, LaneEvent], origin_s: float
) -> Timeline:
    """When the ops of a graph ran, by their events."""
    spans = []
    for op in graph.ops:
        start_s, end_s = events[op.index].span_s(origin_s)
        spans.append(Span(op=op, start_s=start_s, end_s=end_s))
    return Timeline(spans=tuple(spans), origin_s=origin_s)


def drain(
    events: Iterable[LaneEvent], give_up: Callable[[], None] | None = None
) -> list[BaseException]:
    """Wait for everything that was submitted; the errors in order of submission.

    `give_up` is called where the wait itself is interrupted.
    """
    errors: list[BaseException] = []
    for event in events:
        while True:
            try:
                event.wait()
            except BaseException as error:
                errors.append(error)
                # An interrupt of the wait itself: other lanes still read this step.
                if not event.is_done:
                    if give_up is not None:
                        give_up()
                    continue
            break
    return errors

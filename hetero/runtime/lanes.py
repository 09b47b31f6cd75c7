"""Lanes: things that do one piece of work at a time, in the order it was submitted."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from cpu_kernels.threads import pin_current_thread, sleep_precisely
from hetero.runtime.host_event import HostEvent, HostEvents
from planner.step_graph import Op

Work = Callable[[], None]
# Work that gives way: it asks now and then whether something urgent is ready.
IsCalled = Callable[[], bool]
WorkUntil = Callable[[IsCalled], None]
# An op that gives way, with how to ask.
PerformUntil = Callable[[Op, IsCalled], None]


class LaneEvent(Protocol):
    """The end of a piece of work."""

    @property
    def is_done(self) -> bool: ...

    def wait(self) -> None:
        """Block the calling thread until the work has ended; raise what the work raised."""

    def span_s(self, origin_s: float) -> tuple[float, float]:
        """Start and end in seconds after `origin_s` of `time.perf_counter`; the work has ended."""


class LaneRunner(Protocol):
    """Runs submitted work in order, each piece after the events that it names."""

    def begin_step(self) -> None:
        """Nothing is in flight: a good moment to set clocks."""

    def submit(self, work: Work, after: Sequence[LaneEvent]) -> LaneEvent: ...

    def close(self) -> None: ...


class InlineEvent:
    """End of work that the submitting thread has done itself: there is nothing to wait for."""

    __slots__ = ("end_s", "start_s")

    is_done = True

    def __init__(self, start_s: float, end_s: float) -> None:
        self.start_s = start_s
        self.end_s = end_s

    def wait(self) -> None:
        pass

    def span_s(self, origin_s: float) -> tuple[float, float]:
        return self.start_s - origin_s, self.end_s - origin_s


@dataclass(frozen=True, slots=True, eq=False)
class LaneWork:
    """One op of a lane's part of a graph.

    Attributes
    ----------
    event : HostEvent
        Its end.
    after : tuple of HostEvent
        Ends on other lanes that it has to wait for.
    following : tuple of HostEvent
        Those that the lane's next op will look for.
    is_last : bool
        There is no next op.
    """

    op: Op
    event: HostEvent
    after: tuple[HostEvent, ...]
    following: tuple[HostEvent, ...]
    is_last: bool

    def is_called(self) -> bool:
        """Could the lane's next op begin, but for this one?"""
        return not self.is_last and all(event.is_done for event in self.following)


class ThreadLane:
    """A lane with a thread of its own: the emulated accelerator's compute and copies.

    It is given its whole part of a graph at once and then waits for other lanes by itself.

    Parameters
    ----------
    name : str
        Name of the thread.
    cores : collection of int, optional
        Cores that the thread is pinned to.
    """

    def __init__(self, name: str, cores: Collection[int] = ()) -> None:
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._cores = tuple(cores)
        self._thread = threading.Thread(target=self._serve, name=f"hetero-{name}", daemon=True)
        self._thread.start()

    def begin_step(self) -> None:
        pass

    def start(
        self,
        works: Sequence[LaneWork],
        perform: Callable[[Op], None],
        perform_until: PerformUntil | None = None,
    ) -> None:
        """Do all of these in order, each after the events that it waits for, up to an error."""
        self._queue.put(partial(_do_all, works, perform, perform_until))

    def give_up(self, works: Sequence[LaneWork], error: BaseException) -> LaneEvent:
        """End those of a part that have not ended, whether it was begun or not."""
        return self.submit(partial(_fail_all, works, error))

    def submit(self, work: Work, after: Sequence[LaneEvent] = ()) -> LaneEvent:
        (event,) = HostEvents(1).all
        earlier = [each for each in after if isinstance(each, HostEvent)]
        assert len(earlier) == len(after), "a thread waits for other threads only"
        self._queue.put(partial(_do, event, earlier, work))
        return event

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        if self._cores:
            pin_current_thread(self._cores)
        sleep_precisely()
        # torch keeps a thread count per thread only once the thread has asked for it.
        torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.inference_mode():
            while (job := self._queue.get()) is not None:
                job()


def _do_all(
    works: Sequence[LaneWork],
    perform: Callable[[Op], None],
    perform_until: PerformUntil | None,
) -> None:
    for at, work in enumerate(works):
        do = partial(perform, work.op)
        if work.op.gives_way and perform_until is not None:
            do = partial(perform_until, work.op, work.is_called)
        _do(work.event, work.after, do, work.following)
        error = work.event.error
        if error is not None:
            for left in works[at + 1 :]:
                left.event.fail(error)
            return


def _fail_all(works: Sequence[LaneWork], error: BaseException) -> None:
    for work in works:
        if not work.event.is_done:
            work.event.fail(error)


def _do(
    event: HostEvent,
    after: Sequence[HostEvent],
    work: Work,
    following: Sequence[HostEvent] = (),
) -> None:
    """Wait, work, and mark the end; an error is kept for whoever waits."""
    try:
        for earlier in after:
            earlier.wait()
        event.start_s = time.perf_counter()
        work()
    except BaseException as error:
        event.fail(error)
    else:
        event.end(event.start_s, time.perf_counter(), following)


class CudaEvent:
    """End of work on a CUDA stream; `origin` ties the device clock to the host clock."""

    def __init__(self, origin: CudaClock) -> None:
        self._origin = origin
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    @property
    def is_done(self) -> bool:
        return bool(self.end.query())

    def wait(self) -> None:
        self.end.synchronize()

    def span_s(self, origin_s: float) -> tuple[float, float]:
        return (
            self._origin.seconds(self.start) - origin_s,
            self._origin.seconds(self.end) - origin_s,
        )


class CudaClock:
    """One device event at a known host time, from which the events of a step are dated.

    CUDA gives the time between two events as a float32 of milliseconds, which after an hour has
    steps of a quarter of one: the clock is set anew for every step.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._event = torch.cuda.Event(enable_timing=True)
        self.set()

    def set(self) -> None:
        """Date the present moment; nothing is in flight on the stream."""
        self._event.record(self._stream)
        self._event.synchronize()
        self._host_s = time.perf_counter()

    def seconds(self, event: torch.cuda.Event) -> float:
        """Host time (`time.perf_counter`) at which an event of the device happened."""
        elapsed_ms: float = self._event.elapsed_time(event)
        return self._host_s + elapsed_ms / 1e3


class CudaLane:
    """A CUDA stream: work is enqueued, events of other streams are waited for on the device."""

    def __init__(
        self, stream: torch.cuda.Stream, clock: CudaClock, *, sets_clock: bool = False
    ) -> None:
        self.stream = stream
        self._clock = clock
        self._sets_clock = sets_clock
        # Work that gives way is done by a thread, on a stream of its own.
        self._helper: ThreadLane | None = None
        self._giving_way: tuple[threading.Event, LaneEvent] | None = None

    def begin_step(self) -> None:
        if self._sets_clock:
            self._clock.set()

    def submit(self, work: Work, after: Sequence[LaneEvent]) -> LaneEvent:
        self._call()
        event = CudaEvent(self._clock)
        for earlier in after:
            if isinstance(earlier, CudaEvent):
                self.stream.wait_event(earlier.end)
            else:
                earlier.wait()
        with torch.cuda.stream(self.stream):
            event.start.record(self.stream)
            work()
            event.end.record(self.stream)
        return event

    def submit_until(self, work: WorkUntil, after: Sequence[LaneEvent]) -> LaneEvent:
        """Work that gives way to what is submitted next, which waits for a chunk of it at most.

        It waits on the host for each chunk, before it asks.
        """
        self._call()
        if self._helper is None:
            self._helper = ThreadLane("gives-way")
        stream, called = torch.cuda.Stream(self.stream.device), threading.Event()

        def on_stream() -> None:
            for earlier in after:
                earlier.wait()
            with torch.cuda.stream(stream):
                work(called.is_set)

        event = self._helper.submit(on_stream)
        self._giving_way = (called, event)
        return event

    def _call(self) -> None:
        """End the work that gives way; an error of it is for whoever waits for its own event."""
        if self._giving_way is not None:
            called, event = self._giving_way
            self._giving_way = None
            called.set()
            with contextlib.suppress(Exception):
                event.wait()

    def close(self) -> None:
        if self._helper is not None:
            self._helper.close()
        self.stream.synchronize()


def last_core() -> tuple[int, ...]:
    """The core that the emulated accelerator owns; none on a machine with a single core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return tuple(cores[-1:]) if len(cores) > 1 else ()

"""HostEvent: the end of work done by a host thread, for which others look before they sleep."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence

from cpu_kernels.waiting import WORD_BYTES, spin, words

# About what sleeping and waking cost. Longer looks take the core from threads that have work: with
# 5 ms, graphs of empty ops took twice as long, and real steps no less.
_LOOK_S = 100e-6
# As long as it takes another thread to see a word and to take the interpreter's lock.
_LULL_S = 2e-6


class HostEvent:
    """End of a piece of work of some host thread. Mutable; `HostEvents` makes them.

    Whoever waits looks at a word for a while, or sleeps; whoever ends it writes the word and wakes
    those that sleep. `is_awaited` says whether other threads wait for it as a rule.
    """

    __slots__ = (
        "_address",
        "_at",
        "_flags",
        "_is_ending",
        "_lull",
        "_sleepers",
        "end_s",
        "error",
        "is_awaited",
        "start_s",
    )

    def __init__(self, flags: ctypes.Array[ctypes.c_int64], at: int) -> None:
        self._flags = flags
        self._at = at
        self._address = ctypes.addressof(flags) + WORD_BYTES * at
        self._lull = ctypes.addressof(flags) + WORD_BYTES * (len(flags) - 1)
        self._sleepers: list[threading.Lock] = []
        self._is_ending = False
        self.is_awaited = False
        self.error: BaseException | None = None
        self.start_s = 0.0
        self.end_s = 0.0

    @property
    def is_done(self) -> bool:
        return self._flags[self._at] != 0

    def wait(self) -> None:
        """Return once the work has ended; raise what it raised. Look first, then sleep."""
        if not self._flags[self._at]:
            spin(self._address, seconds=_LOOK_S)
            while not self._flags[self._at]:
                self._sleep()
        if self.error is not None:
            raise self.error

    def end(
        self,
        start_s: float,
        end_s: float,
        following: Sequence[HostEvent] = (),
    ) -> None:
        """Say that the work has ended, and when it began and ended (`time.perf_counter`).

        `following` are events that this thread looks for next: it tells the end of its own work as
        it begins to look, when the interpreter's lock is free for those that wait for it.
        """
        self.start_s, self.end_s = start_s, end_s
        self._is_ending = True
        if self._sleepers or not self.is_awaited:
            self._flags[self._at] = 1
            while self._sleepers:
                self._sleepers.pop().release()
            return
        awaited = next((event for event in following if not event.is_done), None)
        if awaited is not None:
            spin(awaited._address, self._address, seconds=_LOOK_S)
        else:
            spin(self._lull, self._address, seconds=_LULL_S)

    def fail(self, error: BaseException) -> None:
        """Say that the work has ended with an error, which whoever waits will raise."""
        self.error = error
        now_s = time.perf_counter()
        self.end(now_s, now_s)

    def span_s(self, origin_s: float) -> tuple[float, float]:
        """Start and end in seconds after `origin_s`; the work has ended."""
        return self.start_s - origin_s, self.end_s - origin_s

    def _sleep(self) -> None:
        lock = threading.Lock()
        lock.acquire()
        self._sleepers.append(lock)
        # Who ends it has seen the lock, or says here that the word is being written.
        if self._is_ending:
            spin(self._address, seconds=_LOOK_S)
        else:
            lock.acquire()


class HostEvents:
    """Events of one graph, used again in every step. Mutable: `clear` takes all of them back."""

    def __init__(self, count: int) -> None:
        self._flags = words(count + 1)  # the last one stays 0
        self.all = tuple(HostEvent(self._flags, at) for at in range(count))

    def clear(self) -> None:
        """None has happened; nobody waits for one."""
        ctypes.memset(self._flags, 0, ctypes.sizeof(self._flags))
        for event in self.all:
            event.error, event._is_ending = None, False

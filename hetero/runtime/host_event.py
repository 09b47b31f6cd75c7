"""HostEvent: the end of work done by a host thread, for which others look before they sleep."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence

from cpu_kernels.waiting import WORD_BYTES, spin, words


class HostEvent:
    """End of a piece of work of some host thread. Mutable; `HostEvents` makes them.

    Whoever waits looks at a word for a while and then sleeps; whoever ends it writes the word first
    and then wakes those that sleep, so that none of them misses it.
    """

    __slots__ = ("_address", "_at", "_flags", "_sleepers", "end_s", "error", "start_s")

    def __init__(self, flags: ctypes.Array[ctypes.c_int64], at: int) -> None:
        self._flags = flags
        self._at = at
        self._address = ctypes.addressof(flags) + WORD_BYTES * at
        self._sleepers: list[threading.Lock] = []
        self.error: BaseException | None = None
        self.start_s = 0.0
        self.end_s = 0.0

    @property
    def is_done(self) -> bool:
        return self._flags[self._at] != 0

    def wait(self) -> None:
        """Return once the work has ended; raise what it raised."""
        if not self._flags[self._at]:
            spin(self._address)
            if not self._flags[self._at]:
                self._sleep()
        if self.error is not None:
            raise self.error

    def end(self, start_s: float, end_s: float, following: Sequence[HostEvent] = ()) -> None:
        """Say that the work has ended, and when it began and ended (`time.perf_counter`).

        `following` are events that this thread waits for next: it tells the end of its own work as
        it begins to look for theirs, when the interpreter's lock is free.
        """
        self.start_s, self.end_s = start_s, end_s
        for event in following:
            if not event.is_done:
                spin(event._address, self._address)
                break
        else:
            self._flags[self._at] = 1
        # Whoever adds a lock to the list looks at the word once more before sleeping on it.
        while self._sleepers:
            self._sleepers.pop().release()

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
        if not self._flags[self._at]:
            lock.acquire()


class HostEvents:
    """Events of one graph, used again in every step. Mutable: `clear` takes all of them back."""

    def __init__(self, count: int) -> None:
        self._flags = words(count)
        self.all = tuple(HostEvent(self._flags, at) for at in range(count))

    def clear(self) -> None:
        """None has happened; nobody waits for one."""
        ctypes.memset(self._flags, 0, ctypes.sizeof(self._flags))
        for event in self.all:
            event.error = None

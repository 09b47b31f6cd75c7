"""The threads that kernels run on: one pool for the process, awake between neighbouring calls.

A chain is offered to the workers and run by the calling thread at once. A worker that is awake
joins within a microsecond; one that sleeps is woken and joins when it can; one that has no core,
because another process holds it, misses the chain and holds up nobody. (OpenMP, which ran the
kernels before, waits at the end for every thread: next to one busy process each chain of a
millisecond took the 8 ms of a time slice.) Workers that find nothing to do for `SPIN_S` sleep, so
that they do not take cores from torch, whose operations come in between in prefill.

A process that forks has none of the workers: the child starts its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from cpu_kernels.compiling import code_address
from cpu_kernels.threads import pin_current_thread, placement

# Between two chains of a decode step there are 10 to 50 us of Python.
SPIN_S = 200e-6

LINE_WORDS = 8  # a cache line each: a word that is written slows down readers of its neighbours
# The number of the chain that is offered, 0 for none; workers inside it; whether the pool is taken;
# the chain's address; chains so far; workers that sleep.
OFFERED, INSIDE, TAKEN, CHAIN, NUMBER, ASLEEP = (LINE_WORDS * line for line in range(6))
_NUM_WORDS = 6 * LINE_WORDS


class Pool:
    """Threads that wait for chains. One for a process: `pool()`."""

    def __init__(self) -> None:
        self._words = (ctypes.c_int64 * _NUM_WORDS)()
        self.address = ctypes.addressof(self._words)
        self._locks: list[Any] = []
        self._growing = threading.Lock()

    @property
    def num_workers(self) -> int:
        """Threads beside the calling one."""
        return len(self._locks)

    def grow(self, num_workers: int) -> None:
        """Start threads until there are so many."""
        work, num_spins = _WORK(code_address("chain_kernels", "make_work")), _spins(SPIN_S)
        with self._growing:
            cores = placement(num_workers + 1)
            while len(self._locks) < num_workers:
                lock = threading.Lock()
                lock.acquire()
                number = len(self._locks) + 1
                threading.Thread(
                    target=self._work,
                    args=(work, num_spins, lock, cores[number]),
                    name=f"cpu_kernels-{number}",
                    daemon=True,
                ).start()
                self._locks.append(lock)

    def wake(self) -> None:
        """Wake the workers that sleep; a chain follows."""
        if self._words[ASLEEP] == 0:
            return
        for lock in self._locks:
            if lock.locked():
                try:
                    lock.release()
                except RuntimeError:  # another thread has woken it just now
                    continue

    def _work(
        self,
        work: Callable[[int, int, int], None],
        num_spins: int,
        lock: Any,
        cores: frozenset[int],
    ) -> None:
        with contextlib.suppress(OSError):  # the allowed cores may have changed since
            pin_current_thread(cores)
        has_slept = 0
        while True:
            work(self.address, num_spins, has_slept)  # returns when nothing was to do for long
            lock.acquire()
            has_slept = 1


def pool() -> Pool:
    """The pool of this process."""
    return _pool


@cache
def _spins(seconds: float) -> int:
    """How often a worker looks in so long: a `pause` takes 10 to 140 cycles, by processor."""
    work, words = _WORK(code_address("chain_kernels", "make_work")), (ctypes.c_int64 * _NUM_WORDS)()
    num_spins, best = 1000, float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        work(ctypes.addressof(words), num_spins, 0)
        best = min(best, time.perf_counter() - begin)
    return max(100, int(num_spins * seconds / best))


_pool = Pool()


def _start_anew() -> None:
    global _pool
    _pool = Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)

# ctypes lets go of the GIL during the call
_WORK = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)

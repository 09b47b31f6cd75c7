"""What a compiled body is told, and chains of bodies that run one after the other.

A *call* is a C structure: counters, the number of work items, then addresses and sizes. A *body*
does one item: `void body(address of the call, item, worker)`. A *link* is a body with its call; a
*chain* runs links in order on the threads of the pool: they claim items of a link until none is
left, wait until those in other hands are done, and go on. Nothing runs in Python between links, so
a layer's dozen steps cost one call.

Threads claim items with one atomic addition each, so a thread that lost its core holds up nobody
but the item in its hands, and any number of threads is right. An item may wait for items of its own
link with lower numbers (a *phase*): all of these are claimed already, by threads that wait for
lower ones only, so no wait is circular.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.compiling import code_address
from cpu_kernels.pool import pool

CACHE_LINE_BYTES = 64
# A cache line each: threads that add to one counter do not slow down readers of the others.
COUNTER_WORDS = CACHE_LINE_BYTES // 8
NEXT_ITEM, NEXT_WORKER, FIRST_PHASE = 0, 1, 2
DONE = 3  # the phase of all items; 0..2 are a body's own
NUM_ITEMS_WORD = COUNTER_WORDS * (FIRST_PHASE + DONE + 1)  # where `num_items` lies
# The next item, the next worker, and how many items of each phase are finished.
Counters = ctypes.c_int64 * NUM_ITEMS_WORD


def call_fields(*names: str) -> list[tuple[str, Any]]:
    """Return the fields of a call: counters, `num_items`, and an int64 for each name."""
    return [("counters", Counters), ("num_items", ctypes.c_int64)] + [
        (name, ctypes.c_int64) for name in names
    ]


class ChainCall(ctypes.Structure):
    """What the threads of a chain see."""

    _fields_ = call_fields("links", "num_links", "num_threads", "times")


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """One body with its call. Its call may be changed between runs, by one thread at a time.

    Parameters
    ----------
    body
        Address of `void body(int64 call, int64 item, int64 worker)`; workers are numbered from 0.
    call
        A structure that begins as `call_fields` says.
    keeps
        What must live as long: the arrays whose addresses are in the call.
    """

    body: int
    call: ctypes.Structure
    keeps: tuple[object, ...]


class Chain:
    """Links that run in order. Mutable as its links are; one run at a time.

    Examples
    --------
    >>> Chain((), num_threads=1).run()
    """

    __slots__ = ("_address", "_call", "_num_threads", "_times", "_words", "links")

    def __init__(self, links: Sequence[Link], *, num_threads: int) -> None:
        self.links = tuple(links)
        words = [word for link in links for word in (link.body, ctypes.addressof(link.call))]
        self._words = (ctypes.c_int64 * len(words))(*words)
        self._times = (ctypes.c_int64 * (len(links) + 1))()
        self._num_threads = num_threads
        self._call = ChainCall(
            links=ctypes.addressof(self._words),
            num_links=len(links),
            num_threads=num_threads,
            times=ctypes.addressof(self._times),
        )
        self._address = ctypes.addressof(self._call)

    def run(self) -> None:
        """Run every link on up to `num_threads` threads."""
        if self._num_threads == 1:
            _enter()(self._address, 0)
        else:
            threads = pool()
            if threads.num_workers < self._num_threads - 1:
                threads.grow(self._num_threads - 1)
            threads.wake()
            _enter()(self._address, threads.address)

    def shares(self, num_links: NDArray[np.intp]) -> list[float]:
        """The part of the last run's time that had gone when so many links were done, 0 to 1.

        On a processor whose clock is not known every link counts the same.

        Parameters
        ----------
        num_links
            Ascending counts of links, from the first on.
        """
        times = np.ctypeslib.as_array(self._times)
        gone = times - times[0]
        if gone[-1] <= 0:  # no clock
            gone = np.arange(len(gone))
        # a thread that lost its core may have written late: no link ends after the next one
        gone = np.minimum.accumulate(gone[::-1])[::-1]
        shares: list[float] = (gone[num_links] / gone[-1]).clip(0.0, 1.0).tolist()
        return shares


def run_link(link: Link, *, num_threads: int) -> None:
    """Run one link on up to `num_threads` threads."""
    Chain((link,), num_threads=num_threads).run()


def _enter() -> Callable[[int, int], None]:
    global _entry
    if _entry is None:
        _entry = _ENTRY(code_address("chain_kernels", "make_enter_chain"))
    return _entry


# ctypes lets go of the GIL during the call
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
_entry: Callable[[int, int], None] | None = None

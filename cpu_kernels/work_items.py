"""Work items that threads claim in order, and phases that wait for the one before.

Items are numbered through all phases of a call and claimed with one atomic addition each, so a
thread that lost its core holds up nobody but the item in its hands, and any number of threads is
right, whatever the OpenMP runtime gives. A claimed item may wait for an earlier phase: all its
items are claimed already, by threads that wait only for phases before theirs, so no wait is
circular. One such call takes one fork and join, where a join for each phase costs 3 us (threads.py)
and more while another process holds a core.
"""

from __future__ import annotations

import ctypes

import numba
import numpy as np

from cpu_kernels.panel_ops import load_atomically, relax, yield_core
from cpu_kernels.simd import CACHE_LINE_BYTES, fetch_add, pointer_at

# A cache line each: threads that add to one counter do not slow down readers of the others.
_COUNTER_WORDS = CACHE_LINE_BYTES // 8
_NEXT_ITEM, _NEXT_WORKER, _FIRST_PHASE = 0, 1, 2
_NUM_COUNTERS = _FIRST_PHASE + 4
_SPINS_BEFORE_YIELD = 4000

# The next item, the next worker, and how many items of each of four phases are finished: the first
# field of a call, zeros at its start.
Counters = ctypes.c_int64 * (_NUM_COUNTERS * _COUNTER_WORDS)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def claim_item(counters: int) -> int:
    """Return the number of the next item; `counters` is an address."""
    return fetch_add(pointer_at(counters, np.int64), _COUNTER_WORDS * _NEXT_ITEM, 1)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def claim_worker(counters: int) -> int:
    """Return the number of the calling thread, from 0."""
    return fetch_add(pointer_at(counters, np.int64), _COUNTER_WORDS * _NEXT_WORKER, 1)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def finish_item(counters: int, phase: int) -> None:
    """Say that an item of a phase is done, and show what it wrote."""
    fetch_add(pointer_at(counters, np.int64), _COUNTER_WORDS * (_FIRST_PHASE + phase), 1)


@numba.njit(nogil=True, error_model="numpy")
def wait_for(counters: int, phase: int, num_items: int) -> None:
    """Wait until so many items of a phase are done, and see what they wrote."""
    at = counters + 8 * _COUNTER_WORDS * (_FIRST_PHASE + phase)
    spins = 0
    while load_atomically(at) < num_items:
        relax()
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            yield_core()

"""The counters of a call in compiled code: items claimed, items done, and phases waited for."""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.calls import COUNTER_WORDS, FIRST_PHASE, NEXT_ITEM, NEXT_WORKER
from cpu_kernels.panel_ops import load_atomically, relax, yield_core
from cpu_kernels.simd import fetch_add, pointer_at

_SPINS_BEFORE_YIELD = 4000


@numba.njit(nogil=True, error_model="numpy", inline="always")
def claim_item(call: int) -> int:
    """Return the number of a call's next item; `call` is its address, as in all of these."""
    return fetch_add(pointer_at(call, np.int64), COUNTER_WORDS * NEXT_ITEM, 1)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def claim_worker(call: int) -> int:
    """Return the number of the calling thread, from 0."""
    return fetch_add(pointer_at(call, np.int64), COUNTER_WORDS * NEXT_WORKER, 1)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def finish_item(call: int, phase: int) -> None:
    """Say that an item of a phase is done, and show what it wrote."""
    fetch_add(pointer_at(call, np.int64), COUNTER_WORDS * (FIRST_PHASE + phase), 1)


@numba.njit(nogil=True, error_model="numpy")
def wait_for(call: int, phase: int, num_items: int) -> None:
    """Wait until so many items of a phase are done, and see what they wrote."""
    at = call + 8 * COUNTER_WORDS * (FIRST_PHASE + phase)
    spins = 0
    while load_atomically(at) < num_items:
        relax()
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            yield_core()

"""The compiled loops of `calls.py`: claim items of a link until none is left, then of the next."""

from __future__ import annotations

import numba
import numpy as np

from cpu_kernels.calls import (
    COUNTER_WORDS,
    DONE,
    NUM_ITEMS_WORD,
    ChainCall,
)
from cpu_kernels.compiling import Source
from cpu_kernels.panel_ops import call_body, clock, load_atomically, relax, yield_core
from cpu_kernels.pool import ASLEEP, CHAIN, INSIDE, NUMBER, OFFERED, TAKEN
from cpu_kernels.simd import call_at, fetch_add, pointer_at
from cpu_kernels.work_items import claim_item, claim_worker, finish_item, wait_for

_CHAIN = np.dtype(ChainCall)
_SPINS_A_YIELD = 64
_SPINS_BEFORE_YIELD = 4000


def make_enter_chain() -> Source:
    """`void enter_chain(ChainCall *, pool)`: run a chain, with the workers of a pool if not 0."""

    def enter_chain(address: int, pool: int) -> None:
        chain = call_at(address, _CHAIN)
        links = pointer_at(chain.links, np.int64)
        _clear(address)
        for index in range(chain.num_links):
            _clear(links[2 * index + 1])
        pointer_at(chain.times, np.int64)[0] = clock()
        if pool == 0:
            _run_chain(address)
            return
        words = pointer_at(pool, np.int64)
        if fetch_add(words, TAKEN, 1) != 0:  # by another thread's chain
            _run_chain(address)
        else:
            number = words[NUMBER] + 1
            words[NUMBER] = number
            words[CHAIN] = address
            fetch_add(words, OFFERED, number)
            _run_chain(address)
            fetch_add(words, OFFERED, -number)
            _wait_until(pool + 8 * INSIDE, 0)
        fetch_add(words, TAKEN, -1)

    return Source(enter_chain, num_arguments=2)


def make_work() -> Source:
    """`void work(pool, num_spins, has_slept)`: take part in chains until none came for long."""

    def work(pool: int, num_spins: int, has_slept: int) -> None:
        words = pointer_at(pool, np.int64)
        fetch_add(words, ASLEEP, -has_slept)
        done, spins = 0, 0
        while spins < num_spins:
            number = load_atomically(pool + 8 * OFFERED)
            if number != 0 and number != done:
                # Whoever is inside before the offer ends is waited for: both sides write first and
                # then read.
                fetch_add(words, INSIDE, 1)
                if load_atomically(pool + 8 * OFFERED) == number:
                    _run_chain(words[CHAIN])
                    done = number
                fetch_add(words, INSIDE, -1)
                spins = 0
            relax()
            spins += 1
            if spins % _SPINS_A_YIELD == 0:
                yield_core()
        fetch_add(words, ASLEEP, 1)

    return Source(work, num_arguments=3)


@numba.njit(nogil=True, error_model="numpy")
def _run_chain(address: int) -> None:
    chain = call_at(address, _CHAIN)
    links, times = pointer_at(chain.links, np.int64), pointer_at(chain.times, np.int64)
    worker = claim_worker(address)
    if worker >= chain.num_threads:
        return
    for index in range(chain.num_links):
        body, call = links[2 * index], links[2 * index + 1]
        # an earlier link may have set it: read once that is done
        num_items = pointer_at(call, np.int64)[NUM_ITEMS_WORD]
        item = claim_item(call)
        while item < num_items:
            call_body(body, call, item, worker)
            finish_item(call, DONE)
            item = claim_item(call)
        if index + 1 < chain.num_links:
            wait_for(call, DONE, num_items)
        times[index + 1] = clock()  # all threads write about the same


@numba.njit(nogil=True, error_model="numpy")
def _wait_until(at: int, value: int) -> None:
    spins = 0
    while load_atomically(at) != value:
        relax()
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            yield_core()


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _clear(call: int) -> None:
    words = pointer_at(call, np.int64)
    for counter in range(0, NUM_ITEMS_WORD, COUNTER_WORDS):
        words[counter] = 0

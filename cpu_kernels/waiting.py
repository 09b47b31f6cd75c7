"""Waiting for another thread without going to sleep: words that are looked at again and again.

A thread that sleeps takes its core with it, and waking both takes 50 to 100 us on a virtual
machine: as long as many a kernel. A thread that looks is there within a microsecond. It looks from
compiled code, without the interpreter's lock, and offers its core to others all the time.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache

from cpu_kernels.compiling import code_address
from cpu_kernels.threads import available_cores

WORD_BYTES = 8


def words(count: int) -> ctypes.Array[ctypes.c_int64]:
    """Return so many words, all 0: what `spin` looks at.

    Examples
    --------
    >>> list(words(2))
    [0, 0]
    """
    return (ctypes.c_int64 * count)()


def spin(address: int, told: int = 0, *, seconds: float) -> None:
    """Look at a word until it is not 0, or for so long; the interpreter's lock is free.

    Where the process has a single core, whoever writes the word needs it: there is no looking.

    Parameters
    ----------
    address
        Address of an int64 in memory that lives as long as the call.
    told
        Address of a word that becomes 1 first, and 0 for none. Who waits for that one finds the
        interpreter's lock free, which it would else have to sleep for.
    seconds
        How long, at most.

    Examples
    --------
    >>> flags = words(1)
    >>> flags[0] = 1
    >>> spin(ctypes.addressof(flags), seconds=1.0)
    """
    _spin()(address, _num_spins(seconds), told)


@cache
def _spin() -> Callable[[int, int, int], None]:
    # ctypes lets go of the interpreter's lock during the call
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)
    function: Callable[[int, int, int], None] = kind(code_address("waiting_kernels", "make_spin"))
    return function


@cache
def _num_spins(seconds: float) -> int:
    """How often a thread looks in so long: by processor a look takes 10 to 200 ns."""
    if available_cores() == 1:
        return 0
    flags, num_spins, best_s = words(1), 1000, float("inf")
    for _ in range(3):
        begin_s = time.perf_counter()
        _spin()(ctypes.addressof(flags), num_spins, 0)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return max(1, int(num_spins * seconds / best_s))

"""The compiled loop of `waiting.py`."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compiling import Source
from cpu_kernels.panel_ops import load_atomically, relax, yield_core
from cpu_kernels.simd import fetch_add, pointer_at

# Another thread of this process may want the core: it is asked as often as that costs nothing.
_SPINS_A_YIELD = 16


def make_spin() -> Source:
    """`void spin(word, num_spins, told)`: tell others, then look for a word of theirs.

    Add 1 to the word at `told`, if that is not 0; return once the other is not 0, or after so many
    looks.
    """

    def spin(word: int, num_spins: int, told: int) -> None:
        if told != 0:
            fetch_add(pointer_at(told, np.int64), 0, 1)
        spins = 0
        while spins < num_spins and load_atomically(word) == 0:
            relax()
            spins += 1
            if spins % _SPINS_A_YIELD == 0:
                yield_core()

    return Source(spin, num_arguments=3)

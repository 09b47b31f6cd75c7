"""The read of memory reads all of it, once, on any number of threads."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.calls import Chain, run_link
from cpu_kernels.memory_read import read_link, read_memory
from cpu_kernels.panel_ops import xor_of_words


@numba.njit
def _xor(address: Any, count: Any) -> Any:
    return xor_of_words(address, count)


def words_of(num_bytes: int) -> NDArray[np.uint8]:
    return np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8)


@pytest.mark.parametrize("count", [0, 1, 2, 33])
def test_the_number_is_made_of_every_word(count: int) -> None:
    """It is the exclusive or of all 32-bit words, none left out."""
    words = words_of(256 * count + 256)

    expected = np.bitwise_xor.reduce(words[: 256 * count].view(np.int32), initial=0)

    assert _xor(words.ctypes.data, count) == expected


def numbers_of(words: NDArray[np.uint8]) -> int:
    """The sum of the items' numbers; an item is a megabyte."""
    items = [words[at : at + (1 << 20)] for at in range(0, len(words), 1 << 20)]
    whole = [item[: len(item) // 256 * 256].view(np.int32) for item in items]
    return sum(int(np.bitwise_xor.reduce(item, initial=0)) for item in whole)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_bytes", [0, 255, 256, 5000, (1 << 20) - 1, (3 << 20) + 777])
def test_every_whole_256_bytes_are_read_once(num_bytes: int, num_threads: int) -> None:
    """The sum of the items' numbers shows it."""
    words = words_of(num_bytes)
    link = read_link(words)

    run_link(link, num_threads=num_threads)

    assert link.call.sink == numbers_of(words)


def test_a_link_reads_again_and_reads_another_buffer() -> None:
    """Twice in one chain run twice, then what its call was set to."""
    words, others = words_of(5000), words_of(5001)[:5000]
    link, other = read_link(words), read_link(others)
    chain = Chain((link, other), num_threads=2)
    chain.run()
    chain.run()

    assert link.call.sink == 2 * numbers_of(words)
    assert other.call.sink == 2 * numbers_of(others)

    link.call.start, link.call.sink = others.ctypes.data, 0
    chain.run()

    assert link.call.sink == numbers_of(others)


def test_more_threads_than_items_end_too() -> None:
    """Three threads, one megabyte; and a buffer that may not be written."""
    words = words_of(1 << 20)
    words.flags.writeable = False

    read_memory(words, num_threads=3)


def test_what_is_no_plain_buffer_is_refused() -> None:
    """Other elements and gaps are named."""
    with pytest.raises(ValueError, match="float32 with strides"):
        read_memory(np.zeros(8, np.float32), num_threads=1)
    with pytest.raises(ValueError, match=r"strides \(2,\)"):
        read_memory(np.zeros(8, np.uint8)[::2], num_threads=1)
    with pytest.raises(ValueError, match="num_threads is 0"):
        read_memory(np.zeros(8, np.uint8), num_threads=0)


_RUN = """
import sys
import numpy as np
from cpu_kernels.memory_read import read_memory
read_memory(np.zeros(4096, np.uint8), num_threads=2)
print("numba" in sys.modules)
"""


def test_compiled_once_numba_is_not_loaded() -> None:
    """A second process takes the object code from the folder."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", _RUN], capture_output=True, text=True, check=True
        )

    assert done.stdout == "False\n"

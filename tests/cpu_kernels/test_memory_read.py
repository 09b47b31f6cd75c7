"""The read of memory reads all of it, once, on any number of threads."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels import memory_read
from cpu_kernels.memory_read import read_memory
from cpu_kernels.panel_ops import xor_of_words
from cpu_kernels.threads import fork_join


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


@pytest.mark.parametrize("num_bytes", [0, 255, 256, 5000, (1 << 20) - 1, (3 << 20) + 777])
def test_every_whole_256_bytes_are_read_once(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    """On one thread the sum of the items' numbers shows it; an item is a megabyte."""
    words = words_of(num_bytes)
    sinks: list[int] = []

    def run(body: int, call: int, num_threads: int) -> None:
        fork_join(body, call, num_threads)
        sinks.append(memory_read._ReadCall.from_address(call).sink)

    monkeypatch.setattr(memory_read, "fork_join", run)

    read_memory(words, num_threads=1)

    whole = [words[at : at + (1 << 20)] for at in range(0, num_bytes, 1 << 20)]
    pieces = [item[: len(item) // 256 * 256].view(np.int32) for item in whole]
    numbers = [int(np.bitwise_xor.reduce(piece, initial=0)) for piece in pieces]
    assert sinks == [sum(numbers)]


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

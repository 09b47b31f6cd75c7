"""Read memory and do nothing else: the ceiling of every kernel whose weights come from memory."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.calls import Link, call_fields, run_link
from cpu_kernels.compiling import code_address

ITEM_BYTES = 1 << 20


class ReadCall(ctypes.Structure):
    """What is read, and `sink`, to which a number made of every item is added."""

    _fields_ = call_fields("start", "num_bytes", "sink")


def read_memory(words: NDArray[np.uint8], *, num_threads: int) -> None:
    """Read every whole 256 bytes of a buffer once, a megabyte a thread at a time.

    Parameters
    ----------
    words
        Contiguous bytes.
    num_threads
        Threads to use at most, of the pool that the kernels use.

    Raises
    ------
    ValueError
        If the buffer is not contiguous bytes, or `num_threads` is below 1.

    Examples
    --------
    >>> read_memory(np.zeros(4096, np.uint8), num_threads=1)
    """
    link = read_link(words)
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads} but must be at least 1")
    run_link(link, num_threads=num_threads)


def read_link(words: NDArray[np.uint8]) -> Link:
    """Return what `read_memory` would run.

    `call.start` may be set to the address of another buffer of the same size.

    Raises
    ------
    ValueError
        If the buffer is not contiguous bytes.
    """
    if words.dtype != np.uint8 or not words.flags.c_contiguous:
        raise ValueError(
            f"the buffer is {words.dtype} with strides {words.strides} but must be contiguous uint8"
        )
    call = ReadCall(
        num_items=-(-words.size // ITEM_BYTES), start=words.ctypes.data, num_bytes=words.size
    )
    return Link(code_address("memory_read_kernels", "make_read"), call, (words,))

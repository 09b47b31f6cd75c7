"""Read memory and do nothing else: the ceiling of every kernel whose weights come from memory."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from cpu_kernels.compiling import compile_body, compiled_address, source_stamp
from cpu_kernels.panel_ops import xor_of_words
from cpu_kernels.threads import fork_join
from cpu_kernels.work_items import Counters, claim_item

_ITEM_BYTES = 1 << 20


class _ReadCall(ctypes.Structure):
    _fields_ = (
        ("counters", Counters),
        ("counters_at", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("num_bytes", ctypes.c_int64),
        ("sink", ctypes.c_int64),
    )


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
    if words.dtype != np.uint8 or not words.flags.c_contiguous:
        raise ValueError(
            f"the buffer is {words.dtype} with strides {words.strides} but must be contiguous uint8"
        )
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads} but must be at least 1")
    call = _ReadCall(start=words.ctypes.data, num_bytes=words.size)
    call.counters_at = ctypes.addressof(call)
    address = compiled_address(_compiled)
    fork_join(address, call.counters_at, num_threads)


@cache
def _compiled() -> Any:
    stamp = source_stamp()

    @compile_body(_ReadCall)
    def body(call_pointer: Any) -> None:
        _ = stamp
        call = numba.carray(call_pointer, 1)[0]  # type: ignore[attr-defined]
        total = 0
        first = claim_item(call.counters_at) * _ITEM_BYTES
        while first < call.num_bytes:
            num_bytes = min(_ITEM_BYTES, call.num_bytes - first)
            total += xor_of_words(call.start + first, num_bytes // 256)
            first = claim_item(call.counters_at) * _ITEM_BYTES
        call.sink = total  # so that nothing is left out as unused

    return body

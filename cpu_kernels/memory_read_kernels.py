"""The compiled loop of `memory_read.py`."""

from __future__ import annotations

import numpy as np

from cpu_kernels.compiling import Source
from cpu_kernels.memory_read import ITEM_BYTES, ReadCall
from cpu_kernels.panel_ops import xor_of_words
from cpu_kernels.simd import call_at, fetch_add, pointer_at

_CALL = np.dtype(ReadCall)
_SINK_AT = ReadCall.sink.offset


def make_read() -> Source:
    """The body of a `ReadCall`."""

    def read(address: int, item: int, worker: int) -> None:
        call = call_at(address, _CALL)
        first = item * ITEM_BYTES
        num_bytes = min(ITEM_BYTES, call.num_bytes - first)
        total = xor_of_words(call.start + first, num_bytes // 256)
        # so that nothing is left out as unused
        fetch_add(pointer_at(address + _SINK_AT, np.int64), 0, total)

    return Source(read, num_arguments=3)

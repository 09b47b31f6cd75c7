"""y = x W^T on the CPU, for a packed W of any format and any number of tokens."""

# T tokens, K columns (the summed dimension), N rows

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.formats import PANEL_ROWS, WeightFormat, check_blob, num_panels
from cpu_kernels.linear_kernels import LinearCall, linear_address
from cpu_kernels.microkernels import Compute, block_tokens, computes, kernel_address
from cpu_kernels.scratch import Scratch
from cpu_kernels.threads import fork_join
from cpu_kernels.token_blocks import COMPUTE_NUMBERS, token_bytes, token_scale_bytes

# An item long enough that claiming it costs nothing, short enough that all threads end together.
_ITEM_BYTES = 1 << 17
_ITEMS_PER_THREAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """A weight matrix as the kernels read it.

    Parameters
    ----------
    blob
        Its bytes, of `weight_format.packed_bytes(num_rows, num_columns)`; formats.py says how.
    weight_format
        How they are stored.
    num_rows, num_columns
        N and K.

    Raises
    ------
    ValueError
        If the blob has another size, or is not contiguous bytes.
    """

    blob: NDArray[np.uint8]
    weight_format: WeightFormat
    num_rows: int
    num_columns: int

    def __post_init__(self) -> None:
        check_blob(self.blob, self.weight_format, self.num_rows, self.num_columns)


def linear(
    x: NDArray[Any],
    weight: PackedMatrix,
    *,
    compute: Compute,
    num_threads: int,
    scratch: Scratch,
    out: NDArray[np.float32],
) -> None:
    """Write x W^T.

    Sums are float32 (int32 within a group for int8), in an order that depends on neither the number
    of threads nor the other tokens: on one machine the same x gives the same bits. A non-finite x
    gives what numpy gives, but with `compute="int8"` it makes its token's whole row NaN.

    Parameters
    ----------
    x
        (T, K) float32, or uint16 (the bits of bfloat16). Rows may lie apart, columns may not.
    weight
        N rows of K columns.
    compute
        One of `computes(weight.weight_format)`: "float" rounds nothing, "bfloat16" rounds a
        float32 x to bfloat16, "int8" rounds x to int8 with a scale for every token and group.
    num_threads
        Threads to use at most.
    scratch
        Memory of the caller; one call at a time.
    out
        (T, N), written entirely. Rows may lie apart, columns may not.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together.

    Examples
    --------
    >>> from cpu_kernels.formats import pack
    >>> bfloat16 = WeightFormat(kind="bfloat16")
    >>> blob = pack(np.eye(3, 2, dtype=np.float32), bfloat16)
    >>> weight = PackedMatrix(blob=blob, weight_format=bfloat16, num_rows=3, num_columns=2)
    >>> out = np.empty((1, 3), np.float32)
    >>> x = np.array([[2, 5]], np.float32)
    >>> linear(x, weight, compute="float", num_threads=1, scratch=Scratch(), out=out)
    >>> out
    array([[2., 5., 0.]], dtype=float32)
    """
    _check(x, weight, compute, num_threads, out)
    num_tokens = x.shape[0]
    if num_tokens == 0:
        return
    shape = _shape(weight.weight_format, weight.num_rows, weight.num_columns, compute, num_threads)
    blocks, num_blocks = _blocks(weight.weight_format, compute, num_tokens)
    call = LinearCall.from_buffer_copy(shape.template)
    tail_bytes = PANEL_ROWS * 4 * blocks[1]
    x_bytes = num_tokens * shape.token_bytes
    address = scratch.address(x_bytes + num_tokens * shape.token_scale_bytes + tail_bytes)
    start = _address(weight.blob)
    call.panels = start
    call.scales = start + shape.scales_at
    call.zeros = start + shape.zeros_at
    call.counters_at = ctypes.addressof(call)
    call.x = _address(x)
    call.x_stride = x.strides[0] // x.itemsize
    call.out = _address(out)
    call.out_stride = out.strides[0] // 4
    call.blocks = ctypes.addressof(blocks)
    call.num_blocks = num_blocks
    call.num_tokens = num_tokens
    call.x_blocks = address
    call.x_scales = address + x_bytes
    call.tail = address + x_bytes + num_tokens * shape.token_scale_bytes
    num_workers = min(num_threads, shape.num_items)
    fork_join(linear_address(x.dtype == np.uint16), call.counters_at, num_workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What every call with matrices of one shape and format has in common."""

    template: bytes
    num_items: int
    token_bytes: int
    token_scale_bytes: int
    scales_at: int
    zeros_at: int


@lru_cache(maxsize=4096)
def _shape(
    weight_format: WeightFormat, num_rows: int, num_columns: int, compute: Compute, num_threads: int
) -> _Shape:
    panel_bytes = weight_format.panel_bytes(num_columns)
    panels = num_panels(num_rows)
    num_groups = weight_format.num_groups(num_columns)
    at_most = max(1, panels // (num_threads * _ITEMS_PER_THREAD))
    panels_per_item = min(at_most, max(1, _ITEM_BYTES // panel_bytes))
    call = LinearCall(
        panel_bytes=panel_bytes,
        group_size=weight_format.group_size or 0,
        num_groups=num_groups,
        num_rows=num_rows,
        num_columns=num_columns,
        compute=COMPUTE_NUMBERS[compute],
        token_bytes=token_bytes(compute, num_columns),
        panels_per_item=panels_per_item,
    )
    return _Shape(
        template=bytes(call),
        num_items=-(-panels // panels_per_item),
        token_bytes=call.token_bytes,
        token_scale_bytes=token_scale_bytes(compute, num_groups),
        scales_at=weight_format.scales_at(num_rows, num_columns),
        zeros_at=weight_format.zeros_at(num_rows, num_columns),
    )


@lru_cache(maxsize=1024)
def _blocks(weight_format: WeightFormat, compute: Compute, num_tokens: int) -> tuple[Any, int]:
    """(first token, tokens, kernel) of every block, the largest first."""
    fields: list[int] = []
    first = 0
    for size in block_tokens(compute):
        while num_tokens - first >= size:
            fields += [first, size, kernel_address(weight_format, compute, size)]
            first += size
    return (ctypes.c_int64 * len(fields))(*fields), len(fields) // 3


def _check(
    x: NDArray[Any],
    weight: PackedMatrix,
    compute: Compute,
    num_threads: int,
    out: NDArray[np.float32],
) -> None:
    if x.ndim != 2 or x.shape[1] != weight.num_columns or x.dtype.name not in ("float32", "uint16"):
        raise ValueError(
            f"x is {x.dtype} {x.shape} but must be float32 or uint16 (the bits of bfloat16), "
            f"(T, {weight.num_columns})"
        )
    out_shape = (x.shape[0], weight.num_rows)
    if out.shape != out_shape or out.dtype != np.float32:
        raise ValueError(f"out is {out.dtype} {out.shape} but must be float32 {out_shape}")
    for name, array in (("x", x), ("out", out)):
        if array.strides[1] != array.itemsize or array.strides[0] < 0:
            raise ValueError(
                f"{name} has strides {array.strides} bytes but its columns must be neighbours, "
                f"{array.itemsize} bytes apart"
            )
    if compute not in computes(weight.weight_format):
        raise ValueError(
            f"compute is {compute!r} but {weight.weight_format.kind} weights can have "
            f"{computes(weight.weight_format)} on this machine"
        )
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads} but must be at least 1")


def _address(array: NDArray[Any]) -> int:
    if array.flags.writeable and array.flags.c_contiguous:
        return ctypes.addressof(_START.from_buffer(array))  # type: ignore[arg-type]
    return int(array.ctypes.data)


_START = ctypes.c_char * 0

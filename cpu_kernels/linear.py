"""y = x W^T on the CPU, for a packed W of any format and any number of tokens."""

# T tokens, K columns (the summed dimension), N rows

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.calls import Link, call_fields, run_link
from cpu_kernels.compiling import code_address
from cpu_kernels.formats import PANEL_ROWS, WeightFormat, check_blob, num_panels
from cpu_kernels.microkernels import (
    COMPUTE_NUMBERS,
    MAX_BLOCK_TOKENS,
    Compute,
    block_tokens,
    computes,
    kernel_address,
    token_bytes,
    token_scale_bytes,
)
from cpu_kernels.scratch import Scratch

# An item long enough that claiming it costs nothing, short enough that all threads end together;
# a multiple of the panels that a kernel walks at once.
_ITEM_BYTES = 1 << 18
_ITEMS_PER_THREAD = 4
_PANELS_AT_ONCE = 4


# A block of tokens: its first token, how many, and the address of the kernel for as many.
BLOCK_FIELDS = 3


class LinearCall(ctypes.Structure):
    """A product as its threads see it: addresses, sizes, and where parts of scratch begin."""

    _fields_ = call_fields(
        "panels",
        "scales",
        "zeros",
        "panel_bytes",
        "group_size",
        "num_groups",
        "num_rows",
        "num_columns",
        "compute",
        "token_bytes",
        "panels_per_item",
        "x",
        "x_stride",
        "out",
        "out_stride",
        "blocks",
        "num_blocks",
        "x_blocks",
        "x_scales",
        "tail",
    )


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

    Sums are float32 (int32 within a group for int8). The same bits come out for any number of
    threads; for "int8" also whatever the other tokens are, while for the others the order of sums
    depends on the size of the block of tokens that a token falls in. A non-finite x gives what
    numpy gives, but with `compute="int8"` it makes its token's whole row NaN.

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
    link = linear_link(
        x, weight, compute=compute, num_threads=num_threads, scratch=scratch, out=out
    )
    run_link(link, num_threads=min(num_threads, max(1, link.call.num_items)))


def linear_link(
    x: NDArray[Any],
    weight: PackedMatrix,
    *,
    compute: Compute,
    num_threads: int,
    scratch: Scratch,
    out: NDArray[np.float32],
) -> Link:
    """Return what `linear` would run, for a chain of up to `num_threads` threads.

    `call.x` and `call.out` may be set to other arrays of the same shapes and strides.

    Raises
    ------
    ValueError
        As `linear`.
    """
    _check(x, weight, compute, num_threads, out)
    shape = _shape(weight.weight_format, weight.num_rows, weight.num_columns, compute, num_threads)
    num_tokens = len(x)
    blocks = _blocks(weight.weight_format, compute, num_tokens)
    memory = scratch.take(num_tokens * shape.bytes_per_token + _TAIL_BYTES)
    call = LinearCall.from_buffer_copy(shape.template)
    call.num_items = 0 if num_tokens == 0 else len(blocks) + shape.num_items
    call.panels = panels = weight.blob.ctypes.data
    call.scales = panels + shape.scales_at
    call.zeros = panels + shape.zeros_at
    call.x, call.x_stride = x.ctypes.data, x.strides[0] // x.itemsize
    call.out, call.out_stride = out.ctypes.data, out.strides[0] // 4
    call.blocks, call.num_blocks = blocks.ctypes.data, len(blocks)
    call.x_blocks = start = memory.ctypes.data
    call.x_scales = start + num_tokens * call.token_bytes
    call.tail = start + num_tokens * shape.bytes_per_token
    body = code_address("linear_kernels", "make_linear", x.dtype == _UINT16)
    return Link(body, call, (weight, x, out, blocks, memory))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What every call with matrices of one shape and format has in common."""

    template: LinearCall
    num_items: int  # but for the blocks of tokens
    bytes_per_token: int
    scales_at: int
    zeros_at: int


@lru_cache(maxsize=4096)
def _shape(
    weight_format: WeightFormat, num_rows: int, num_columns: int, compute: Compute, num_threads: int
) -> _Shape:
    panel_bytes = weight_format.panel_bytes(num_columns)
    panels = num_panels(num_rows)
    num_groups = weight_format.num_groups(num_columns)
    at_most = panels // (num_threads * _ITEMS_PER_THREAD)
    panels_per_item = min(at_most, _ITEM_BYTES // panel_bytes) // _PANELS_AT_ONCE * _PANELS_AT_ONCE
    panels_per_item = max(_PANELS_AT_ONCE, panels_per_item)
    bytes_of_token = token_bytes(compute, num_columns)
    template = LinearCall(
        panel_bytes=panel_bytes,
        group_size=weight_format.group_size or 0,
        num_groups=num_groups,
        num_rows=num_rows,
        num_columns=num_columns,
        compute=COMPUTE_NUMBERS[compute],
        token_bytes=bytes_of_token,
        panels_per_item=panels_per_item,
    )
    return _Shape(
        template=template,
        num_items=-(-panels // panels_per_item),
        bytes_per_token=bytes_of_token + token_scale_bytes(compute, num_groups),
        scales_at=weight_format.scales_at(num_rows, num_columns),
        zeros_at=weight_format.zeros_at(num_rows, num_columns),
    )


@lru_cache(maxsize=1024)
def _blocks(weight_format: WeightFormat, compute: Compute, num_tokens: int) -> NDArray[np.int64]:
    """(first token, tokens, kernel) of every block, the largest first."""
    blocks = []
    first = 0
    for size in block_tokens(compute):
        while num_tokens - first >= size:
            blocks.append((first, size, kernel_address(weight_format, compute, size)))
            first += size
    return np.array(blocks, np.int64)


def _check(
    x: NDArray[Any],
    weight: PackedMatrix,
    compute: Compute,
    num_threads: int,
    out: NDArray[np.float32],
) -> None:
    """Refuse what does not fit; the common case is found in few steps."""
    is_plain = x.dtype in _X_DTYPES and x.ndim == 2 and out.dtype == _FLOAT32 and out.ndim == 2
    is_plain = is_plain and out.flags.writeable and x.shape[1] == weight.num_columns
    is_plain = is_plain and out.shape == (x.shape[0], weight.num_rows)
    for array in (x, out):
        if is_plain and array.size > 0:  # numpy gives an empty array strides of 0
            rows_apart, columns_apart = array.strides
            is_plain = columns_apart == array.itemsize
            is_plain = is_plain and rows_apart >= 0 and rows_apart % array.itemsize == 0
    if is_plain and num_threads >= 1 and compute in computes(weight.weight_format):
        return
    if x.ndim != 2 or x.shape[1] != weight.num_columns or x.dtype.name not in ("float32", "uint16"):
        raise ValueError(
            f"x is {x.dtype} {x.shape} but must be float32 or uint16 (the bits of bfloat16), "
            f"(T, {weight.num_columns})"
        )
    out_shape = (x.shape[0], weight.num_rows)
    if out.shape != out_shape or out.dtype != np.float32:
        raise ValueError(f"out is {out.dtype} {out.shape} but must be float32 {out_shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    for name, array in (("x", x), ("out", out)):
        is_odd = array.strides[0] < 0 or array.strides[0] % array.itemsize != 0
        if array.size > 0 and (array.strides[1] != array.itemsize or is_odd):
            raise ValueError(
                f"{name} has strides {array.strides} bytes but its columns must be neighbours, "
                f"{array.itemsize} bytes apart"
            )
    if compute not in computes(weight.weight_format):
        raise ValueError(
            f"compute is {compute!r} but {weight.weight_format.kind} weights can have "
            f"{computes(weight.weight_format)} on this machine"
        )
    raise ValueError(f"num_threads is {num_threads} but must be at least 1")


_FLOAT32, _UINT16 = np.dtype(np.float32), np.dtype(np.uint16)
_X_DTYPES = (_FLOAT32, _UINT16)
# Products of one block of tokens with a last panel, some of whose rows are padding.
_TAIL_BYTES = 4 * PANEL_ROWS * MAX_BLOCK_TOKENS

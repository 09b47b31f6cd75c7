"""y = x W^T on the CPU, for a packed W of any format and any number of tokens."""

# T tokens, K columns (the summed dimension), N rows

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.formats import PANEL_ROWS, WeightFormat, check_blob, num_panels
from cpu_kernels.linear_kernels import CALL_DTYPE, enter_linear, linear_address
from cpu_kernels.microkernels import (
    MAX_BLOCK_TOKENS,
    Compute,
    block_tokens,
    computes,
    kernel_address,
)
from cpu_kernels.scratch import Scratch
from cpu_kernels.threads import fork_join, openmp_address
from cpu_kernels.token_blocks import COMPUTE_NUMBERS, token_bytes, token_scale_bytes

# An item long enough that claiming it costs nothing, short enough that all threads end together;
# a multiple of the panels that a kernel walks at once.
_ITEM_BYTES = 1 << 18
_ITEMS_PER_THREAD = 4
_PANELS_AT_ONCE = 4


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
    num_tokens = len(x)
    is_plain = x.dtype in _X_DTYPES and x.ndim == 2 and out.dtype == _FLOAT32 and out.ndim == 2
    is_plain = is_plain and out.flags.writeable and x.shape[1] == weight.num_columns
    is_plain = is_plain and out.shape == (num_tokens, weight.num_rows)
    if not is_plain or num_threads < 1 or compute not in computes(weight.weight_format):
        _refuse(x, weight, compute, num_threads, out)
    if num_tokens == 0:
        return
    shape = _shape(weight.weight_format, weight.num_rows, weight.num_columns, compute, num_threads)
    calls = shape.template.copy()
    num_workers = min(num_threads, shape.num_items)
    body, parallel = linear_address(x.dtype == _UINT16), openmp_address()
    blocks = _blocks(weight.weight_format, compute, num_tokens)  # held until the call has ended
    if not enter_linear(
        calls,
        weight.blob,
        x,
        out,
        blocks,
        scratch.address(num_tokens * shape.bytes_per_token + _TAIL_BYTES),
        body,
        parallel,
        num_workers,
    ):
        _refuse(x, weight, compute, num_threads, out)
    if parallel == 0 and num_workers > 1:
        fork_join(body, calls.ctypes.data, num_workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What every call with matrices of one shape and format has in common."""

    template: NDArray[Any]  # one record of linear_kernels.CALL_DTYPE
    num_items: int
    bytes_per_token: int


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
    template = np.zeros(1, CALL_DTYPE)
    values = {
        "panel_bytes": panel_bytes,
        "group_size": weight_format.group_size or 0,
        "num_groups": num_groups,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "compute": COMPUTE_NUMBERS[compute],
        "token_bytes": token_bytes(compute, num_columns),
        "token_scale_bytes": token_scale_bytes(compute, num_groups),
        "panels_per_item": panels_per_item,
        "scales_at": weight_format.scales_at(num_rows, num_columns),
        "zeros_at": weight_format.zeros_at(num_rows, num_columns),
    }
    for name, value in values.items():
        template[name] = value
    return _Shape(
        template=template,
        num_items=-(-panels // panels_per_item),
        bytes_per_token=values["token_bytes"] + values["token_scale_bytes"],
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


def _refuse(
    x: NDArray[Any],
    weight: PackedMatrix,
    compute: Compute,
    num_threads: int,
    out: NDArray[np.float32],
) -> NoReturn:
    """Say what does not fit."""
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
        if array.strides[1] != array.itemsize or is_odd:
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

"""Packs matrices into the layout of `formats.py` and back, on several threads, panel by panel.

A work item is a panel of 16 rows, taken by whichever thread is free. Nothing larger than 256
columns of it exists in any other form on the way, so a model packs in the memory of its parts.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.calls import Link, call_fields, run_link
from cpu_kernels.compiling import code_address
from cpu_kernels.formats import (
    PANEL_ROWS,
    WeightFormat,
    cannot_quantise,
    check_blob,
    num_panels,
)
from cpu_kernels.scratch import aligned_bytes

# The whole groups of every group size; 16 rows of 256 words are 16 KB, which the first-level cache
# holds.
CHUNK_COLUMNS = 256
# Scratch of one thread: a row of the chunk as float32 and one value more, its codes, its words.
CODES_AT = 4 * (CHUNK_COLUMNS + PANEL_ROWS)
WORDS_AT = CODES_AT + CHUNK_COLUMNS
SCRATCH_BYTES = WORDS_AT + PANEL_ROWS * CHUNK_COLUMNS * 4

FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, INT4_ZERO = range(6)  # kinds of elements
_MATRIX_KINDS = {
    np.dtype(np.float32): FLOAT32,
    np.dtype(np.uint16): BFLOAT16,
    np.dtype(np.float16): FLOAT16,
}
_WEIGHT_KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8, "int4": INT4}


class PackingCall(ctypes.Structure):
    """One call as its threads see it: addresses and sizes; `matrix` is the one in rows.

    `num_bad` counts the weights that cannot be quantised: every run adds to it.
    """

    _fields_ = call_fields(
        "matrix",
        "panels",
        "scales",
        "zeros",
        "scratch",
        "num_rows",
        "num_columns",
        "group_size",
        "num_groups",
        "matrix_kind",
        "weight_kind",
        "columns_per_step",
        "zero_code",
        "scale_steps",
        "num_bad",
    )


def pack_into(
    source: NDArray[Any], format: WeightFormat, out: NDArray[np.uint8], *, num_threads: int
) -> None:
    """Pack a matrix into a blob, bit for bit as `formats.pack` does with its values as float32.

    A NaN stays a NaN in a float format, perhaps another one. May be called from several threads at
    once. The first call compiles (a few seconds, then kept on disk).

    Parameters
    ----------
    source
        (R, K) contiguous float32, float16, or uint16 (the bits of bfloat16).
    format
        How to store it. On a GPU, `blob[:scales_at].view(panels, -1, 16, 4).permute(0, 2, 1, 3)` is
        every row's bytes in order.
    out
        The blob, contiguous, `format.packed_bytes(R, K)` long; written entirely. Fastest if it
        starts at a multiple of 64 bytes.
    num_threads
        Threads to use at most.

    Raises
    ------
    ValueError
        If shapes, types or memory layouts do not fit together, or weights cannot be quantised; then
        `out` holds nothing of use.

    Examples
    --------
    >>> weight = np.ones((4, 100), np.float16)
    >>> format = WeightFormat(kind="int8", group_size=64)
    >>> blob = np.empty(format.packed_bytes(4, 100), np.uint8)
    >>> pack_into(weight, format, blob, num_threads=1)
    >>> out = np.empty((4, 100), np.float32)
    >>> unpack_into(blob, format, out, num_threads=1)
    >>> bool(abs(out - 1).max() < 0.004)
    True
    """
    _check_matrix("source", source, (np.float32, np.float16, np.uint16))
    rows, columns = source.shape
    check_blob(out, format, rows, columns)
    _check_writeable(out)
    scales_at, zeros_at = format.scales_at(rows, columns), format.zeros_at(rows, columns)
    scale_bytes = num_panels(rows) * format.num_groups(columns) * PANEL_ROWS * 2
    out[scales_at + scale_bytes : zeros_at] = 0
    out[zeros_at + scale_bytes // 2 :] = 0
    num_bad = _run("make_pack", source, out, format, num_threads)
    if num_bad:
        raise cannot_quantise(num_bad)


def unpack_into(
    blob: NDArray[np.uint8], format: WeightFormat, out: NDArray[Any], *, num_threads: int
) -> None:
    """Write the matrix that a blob stands for, as `formats.unpack` returns it, in rows.

    Parameters
    ----------
    blob
        What `pack_into` wrote for the same format and sizes.
    format
        How it is stored.
    out
        (R, K) contiguous float32, or uint16 for the bits of bfloat16 (rounded to nearest, ties to
        even), written entirely.
    num_threads
        Threads to use at most.

    Raises
    ------
    ValueError
        If shapes, types or memory layouts do not fit together.

    Examples
    --------
    >>> float32 = WeightFormat(kind="float32")
    >>> out = np.empty((16, 2), np.float32)
    >>> unpack_into(np.arange(32, dtype=np.float32).view(np.uint8), float32, out, num_threads=1)
    >>> out[1]
    array([ 1., 17.], dtype=float32)
    """
    _check_matrix("out", out, (np.float32, np.uint16))
    check_blob(blob, format, *out.shape)
    _check_writeable(out)
    _run("make_unpack", out, blob, format, num_threads)


def _check_matrix(name: str, matrix: NDArray[Any], dtypes: tuple[type, ...]) -> None:
    if matrix.dtype not in dtypes or matrix.ndim != 2 or not matrix.flags.c_contiguous:
        raise ValueError(
            f"{name} is {matrix.dtype} {matrix.shape} but must be a contiguous matrix of one of "
            f"{', '.join(dtype.__name__ for dtype in dtypes)}"
        )


def _check_writeable(out: NDArray[Any]) -> None:
    if not out.flags.writeable:
        raise ValueError("out is read-only")


def _run(
    maker: str,
    matrix: NDArray[Any],
    blob: NDArray[np.uint8],
    format: WeightFormat,
    num_threads: int,
) -> int:
    """Do it, panel by panel, and return how many weights cannot be quantised."""
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads} but must be at least 1")
    rows, columns = matrix.shape
    num_items = num_panels(rows)
    num_workers = min(num_threads, num_items)
    scratch = aligned_bytes(num_workers * SCRATCH_BYTES)
    blob_start = blob.ctypes.data
    call = PackingCall(
        num_items=num_items,
        matrix=matrix.ctypes.data,
        panels=blob_start,
        scales=blob_start + format.scales_at(rows, columns),
        zeros=blob_start + format.zeros_at(rows, columns),
        scratch=scratch.ctypes.data,
        num_rows=rows,
        num_columns=columns,
        group_size=format.group_size or 0,
        num_groups=format.num_groups(columns),
        matrix_kind=_MATRIX_KINDS[matrix.dtype],
        weight_kind=INT4_ZERO if format.has_zero_point else _WEIGHT_KINDS[format.kind],
        columns_per_step=format.columns_per_step,
        zero_code=format.zero_code,
        scale_steps=format.scale_steps,
    )
    body = code_address("packing_kernels", maker)
    run_link(Link(body, call, (matrix, blob, scratch)), num_threads=num_workers)
    num_bad: int = call.num_bad
    return num_bad

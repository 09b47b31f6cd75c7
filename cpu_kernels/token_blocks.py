"""A block of tokens as microkernels read it: interleaved by token, and rounded where they ask.

microkernels.py says how a block of M tokens lies in memory for each compute, on vectors and on
tiles. Columns are padded with zeros, so that a kernel may read whole steps.
"""

# M tokens of a block, K columns

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from cpu_kernels.amx import UNIT_BYTES
from cpu_kernels.microkernels import (
    BFLOAT16,
    BFLOAT16_TILES,
    COLUMN_PADDING,
    FLOAT,
    INT8_TILES,
    MIN_TILE_TOKENS,
)
from cpu_kernels.panel_ops import (
    absolute,
    nearest_integers,
    scatter_bfloat16_pairs,
    scatter_bytes,
    scatter_floats,
)
from cpu_kernels.simd import (
    LANES,
    add,
    lane_max,
    lane_sum,
    load,
    load_first,
    maximum,
    multiply,
    pointer_at,
    splat,
    store,
)

_INT8_MAX = np.float32(127.0)
# A group whose largest value is smaller rounds to zeros: 127 over it would be infinite.
_SMALLEST = np.float32(1e-30)
_INT8_UNIT = UNIT_BYTES
_BFLOAT16_UNIT = UNIT_BYTES // 2


@numba.njit(nogil=True, error_model="numpy")
def write_columns(
    rows: Any,
    row_at: int,
    num_columns: int,
    first_column: int,
    token: int,
    tokens: int,
    compute: int,
    group_size: int,
    block: int,
    scales: int,
    sums: int,
) -> None:
    """Write neighbouring columns of one token's x into its block.

    `rows[row_at]` is the first of them and column `first_column` of x. All parts of a row but the
    last are whole units of tiles, 64 columns, and whole groups. `compute` is a `compute_number`;
    `block`, `scales` and `sums` are addresses.
    """
    on_tiles = tokens >= MIN_TILE_TOKENS and compute in (BFLOAT16_TILES, INT8_TILES)
    end = (first_column + num_columns + COLUMN_PADDING - 1) // COLUMN_PADDING * COLUMN_PADDING
    if compute == FLOAT:
        for k in range(0, num_columns, LANES):
            x = _load_row(rows, row_at + k, num_columns - k)
            scatter_floats(block + 4 * ((first_column + k) * tokens + token), 4 * tokens, x)
    elif compute == BFLOAT16_TILES and on_tiles:
        for k in range(0, num_columns, LANES):
            x = _load_row(rows, row_at + k, num_columns - k)
            place = _place_in_unit(first_column + k, end, token, tokens, _BFLOAT16_UNIT)
            store(pointer_at(block + 2 * place, np.uint16), 0, x)
    elif compute in (BFLOAT16, BFLOAT16_TILES):
        for k in range(0, num_columns, LANES):
            x = _load_row(rows, row_at + k, num_columns - k)
            at = block + 4 * ((first_column + k) // 2 * tokens + token)
            scatter_bfloat16_pairs(at, 4 * tokens, x)
    else:
        for first in range(0, num_columns, group_size):
            column, count = first_column + first, min(group_size, num_columns - first)
            group = 4 * (column // group_size * tokens + token)
            inverse = _scale_group(rows, row_at + first, count, scales + group)
            total = splat(np.float32(0))
            factor = splat(inverse)
            if on_tiles:
                for k in range(0, count, LANES):
                    x = _load_row(rows, row_at + first + k, count - k)
                    rounded = nearest_integers(multiply(x, factor))
                    place = _place_in_unit(column + k, end, token, tokens, _INT8_UNIT)
                    scatter_bytes(block + place, 4, rounded)
                    total = add(total, rounded)
            else:
                at, stride = block + column * tokens + 4 * token, 4 * tokens
                whole_vectors = count - count % LANES
                for k in range(0, whole_vectors, LANES):
                    rounded = nearest_integers(multiply(load(rows, row_at + first + k), factor))
                    scatter_bytes(at + k * tokens, stride, rounded)
                    total = add(total, rounded)
                if whole_vectors < count:
                    x = load_first(rows, row_at + first + whole_vectors, count - whole_vectors)
                    rounded = nearest_integers(multiply(x, factor))
                    scatter_bytes(at + whole_vectors * tokens, stride, rounded)
                    total = add(total, rounded)
            # Sums of at most 128 integers of at most 127 are exact in float32.
            whole = np.int32(lane_sum(total)) if inverse > 0 else np.int32(0)
            pointer_at(sums + group, np.int32)[0] = whole


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _place_in_unit(column: int, end: int, token: int, tokens: int, unit: int) -> int:
    """Columns and tokens before this one where x lies in units of columns; x is padded to `end`."""
    first = column // unit * unit
    return first * tokens + token * min(unit, end - first) + column - first


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _load_row(rows: Any, at: int, count: int) -> Any:
    return load(rows, at) if count >= LANES else load_first(rows, at, count)


@numba.njit(nogil=True, error_model="numpy")
def _scale_group(rows: Any, row_at: int, count: int, scale_at: int) -> Any:
    """Write a group's scale, by its largest value, and return what to multiply with.

    A value that is not finite makes the scale NaN, and the factor 0.
    """
    largest, poison = splat(np.float32(0)), splat(np.float32(0))
    whole_vectors = count - count % LANES
    for k in range(0, whole_vectors, LANES):
        x = load(rows, row_at + k)
        largest = maximum(largest, absolute(x))
        poison = add(poison, multiply(x, splat(np.float32(0))))
    if whole_vectors < count:
        x = load_first(rows, row_at + whole_vectors, count - whole_vectors)
        largest = maximum(largest, absolute(x))
        poison = add(poison, multiply(x, splat(np.float32(0))))
    most = lane_max(largest) + lane_sum(poison)
    inverse = np.float32(0)
    if most > _SMALLEST:
        inverse = _INT8_MAX / most
    elif most <= _SMALLEST:  # not where it is NaN
        most = np.float32(0)
    pointer_at(scale_at, np.float32)[0] = most / _INT8_MAX
    return inverse

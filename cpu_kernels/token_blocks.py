"""A block of tokens as microkernels read it: interleaved by token, and rounded where they ask.

microkernels.py says how a block of M tokens lies in memory for each compute. Columns are padded
with zeros to `COLUMN_PADDING`, so that a kernel may read whole steps.
"""

# M tokens of a block, K columns

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from cpu_kernels.microkernels import Compute
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
)

COLUMN_PADDING = 16
_INT8_MAX = np.float32(127.0)
# A group whose largest value is smaller rounds to zeros: 127 over it would be infinite.
_SMALLEST = np.float32(1e-30)
_ELEMENT_BYTES: dict[Compute, int] = {"float": 4, "bfloat16": 2, "int8": 1}

# `compute` inside compiled code
FLOAT, BFLOAT16, INT8 = 0, 1, 2
COMPUTE_NUMBERS: dict[Compute, int] = {"float": FLOAT, "bfloat16": BFLOAT16, "int8": INT8}


def token_bytes(compute: Compute, num_columns: int) -> int:
    """Bytes of one token's share of a block."""
    return -(-num_columns // COLUMN_PADDING) * COLUMN_PADDING * _ELEMENT_BYTES[compute]


def token_scale_bytes(compute: Compute, num_groups: int) -> int:
    """Bytes of one token's share of a block's scales and sums."""
    return 8 * num_groups if compute == "int8" else 0


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

    `rows[row_at]` is the first of them and column `first_column` of x: a multiple of 16, and of
    the group size for int8. `block`, `scales` and `sums` are addresses.
    """
    if compute == FLOAT:
        for k in range(0, num_columns, LANES):
            x = _load_row(rows, row_at + k, num_columns - k)
            scatter_floats(block + 4 * ((first_column + k) * tokens + token), 4 * tokens, x)
    elif compute == BFLOAT16:
        for k in range(0, num_columns, LANES):
            x = _load_row(rows, row_at + k, num_columns - k)
            at = block + 4 * ((first_column + k) // 2 * tokens + token)
            scatter_bfloat16_pairs(at, 4 * tokens, x)
    else:
        for first in range(0, num_columns, group_size):
            count = min(group_size, num_columns - first)
            at = block + (first_column + first) * tokens + 4 * token
            place = 4 * ((first_column + first) // group_size * tokens + token)
            _write_group(rows, row_at + first, count, 4 * tokens, at, scales + place, sums + place)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _load_row(rows: Any, at: int, count: int) -> Any:
    return load(rows, at) if count >= LANES else load_first(rows, at, count)


@numba.njit(nogil=True, error_model="numpy")
def _write_group(
    rows: Any, row_at: int, count: int, stride: int, block: int, scale_at: int, sum_at: int
) -> None:
    """Round a group to int8 by its largest value; one that is not finite makes the scale NaN."""
    largest, poison = splat(np.float32(0)), splat(np.float32(0))
    for k in range(0, count, LANES):
        x = _load_row(rows, row_at + k, count - k)
        largest = maximum(largest, absolute(x))
        poison = add(poison, multiply(x, splat(np.float32(0))))
    most = lane_max(largest) + lane_sum(poison)
    inverse = np.float32(0)
    if most > _SMALLEST:
        inverse = _INT8_MAX / most
    elif most <= _SMALLEST:  # not where it is NaN
        most = np.float32(0)
    total = splat(np.float32(0))
    for k in range(0, count, LANES):
        x = _load_row(rows, row_at + k, count - k)
        rounded = nearest_integers(multiply(x, splat(inverse)))
        scatter_bytes(block + k // 4 * stride, stride, rounded)
        total = add(total, rounded)
    pointer_at(scale_at, np.float32)[0] = most / _INT8_MAX
    # Sums of at most 128 integers of at most 127 are exact in float32.
    pointer_at(sum_at, np.int32)[0] = np.int32(lane_sum(total)) if inverse > 0 else np.int32(0)

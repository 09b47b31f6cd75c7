"""Blocks of tokens lie in memory as the kernels read them."""

# M tokens of a block, K columns

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.formats import to_bfloat16_bits
from cpu_kernels.microkernels import (
    BFLOAT16,
    BFLOAT16_TILES,
    COLUMN_PADDING,
    FLOAT,
    INT8,
    INT8_TILES,
    MIN_TILE_TOKENS,
    Compute,
    token_bytes,
    token_scale_bytes,
)
from cpu_kernels.token_blocks import write_columns

COLUMNS = [1, 2, 15, 16, 17, 70, 200]
# The most columns of a step: all that a kernel may read beyond the last.
STEP_COLUMNS = 8
COMPUTES: dict[int, Compute] = {
    FLOAT: "float",
    BFLOAT16: "bfloat16",
    BFLOAT16_TILES: "bfloat16",
    INT8: "int8",
    INT8_TILES: "int8",
}
UNTOUCHED = 0xAA


def write(
    x: NDArray[Any], compute: int, group_size: int, *, parts: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]:
    """The block, scales and sums of all rows; `parts`: in pieces of so many columns."""
    num_tokens, num_columns = x.shape
    num_groups = -(-num_columns // group_size)
    num_bytes = num_tokens * token_bytes(COMPUTES[compute], num_columns)
    block = np.full(num_bytes, UNTOUCHED, np.uint8)
    scales = np.full((num_groups, num_tokens), np.nan, np.float32)
    sums = np.full((num_groups, num_tokens), -1, np.int32)
    piece = parts or num_columns
    for token in range(num_tokens):
        for first in range(0, num_columns, piece):
            write_columns(
                x.ravel(),
                token * num_columns + first,
                min(piece, num_columns - first),
                first,
                token,
                num_tokens,
                compute,
                group_size,
                block.ctypes.data,
                scales.ctypes.data,
                sums.ctypes.data,
            )
    return block, scales, sums


def random_x(num_tokens: int, num_columns: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([num_tokens, num_columns])
    return rng.standard_normal((num_tokens, num_columns)).astype(np.float32)


def padded(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Zeros up to whole steps, the most that a kernel reads."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % STEP_COLUMNS)))


@pytest.mark.parametrize("num_tokens", [1, 4, 24])
@pytest.mark.parametrize("num_columns", COLUMNS)
def test_float_blocks_are_columns_of_tokens(num_columns: int, num_tokens: int) -> None:
    """(K, M) float32, zeros in the columns that fill the last step."""
    x = random_x(num_tokens, num_columns)
    expected = padded(x).T

    block, _, _ = write(x, FLOAT, num_columns)

    columns = block.view(np.float32).reshape(-1, num_tokens)
    np.testing.assert_array_equal(columns[: len(expected)], expected)


def pairs_of_columns(block: NDArray[np.uint8], num_tokens: int) -> NDArray[np.uint16]:
    """(K / 2, M, 2) as rows of tokens."""
    pairs = block.view(np.uint16).reshape(-1, num_tokens, 2)
    return pairs.transpose(1, 0, 2).reshape(num_tokens, -1)


def fours_of_columns(block: NDArray[np.uint8], num_tokens: int) -> NDArray[np.int8]:
    """(K / 4, M, 4) as rows of tokens."""
    fours = block.view(np.int8).reshape(-1, num_tokens, 4)
    return fours.transpose(1, 0, 2).reshape(num_tokens, -1)


def units_of_columns(block: NDArray[np.uint8], num_tokens: int) -> NDArray[np.uint8]:
    """Units of 64 bytes, each with all tokens, the last shorter: as rows of tokens."""
    row_bytes = len(block) // num_tokens
    units, start = [], 0
    for first in range(0, row_bytes, 64):
        width = min(64, row_bytes - first)
        units.append(block[start : start + num_tokens * width].reshape(num_tokens, width))
        start += num_tokens * width
    return np.concatenate(units, axis=1)


@pytest.mark.parametrize("compute", [BFLOAT16, BFLOAT16_TILES])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 24, 32])
@pytest.mark.parametrize("num_columns", COLUMNS)
@pytest.mark.parametrize("x_format", ["float32", "bfloat16"])
def test_bfloat16_blocks_are_pairs_of_columns_or_units(
    x_format: str, num_columns: int, num_tokens: int, compute: int
) -> None:
    """(K / 2, M, 2), or as tiles read it; rounded to nearest, an x in bfloat16 stays what it is."""
    x = random_x(num_tokens, num_columns)
    bits = to_bfloat16_bits(x)
    expected = to_bfloat16_bits(padded(x))

    block, _, _ = write(bits if x_format == "bfloat16" else x, compute, num_columns)

    if compute == BFLOAT16_TILES and num_tokens >= MIN_TILE_TOKENS:
        written = units_of_columns(block, num_tokens).view(np.uint16)
    else:
        written = pairs_of_columns(block, num_tokens)
    np.testing.assert_array_equal(written[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("compute", [INT8, INT8_TILES])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 12, 32])
@pytest.mark.parametrize("num_columns", COLUMNS)
def test_int8_blocks_are_fours_of_columns_or_units_with_a_scale_and_sum_a_group(
    num_columns: int, num_tokens: int, group_size: int, compute: int
) -> None:
    """(K / 4, M, 4), or as tiles read it: to nearest even of x * (127 / largest)."""
    x = random_x(num_tokens, num_columns)
    x[0, :32] = 0
    full = padded(x)
    codes = np.zeros_like(full)
    starts = range(0, num_columns, group_size)
    scales = np.zeros((len(starts), num_tokens), np.float32)
    for group, first in enumerate(starts):
        values = full[:, first : first + group_size]
        most = np.abs(values).max(axis=1)
        inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
        codes[:, first : first + group_size] = np.rint(values * inverse[:, None])
        scales[group] = most / np.float32(127)

    block, actual_scales, actual_sums = write(x, compute, group_size)

    if compute == INT8_TILES and num_tokens >= MIN_TILE_TOKENS:
        written = units_of_columns(block, num_tokens).view(np.int8)
    else:
        written = fours_of_columns(block, num_tokens)
    np.testing.assert_array_equal(written[:, : full.shape[1]], codes.astype(np.int8))
    np.testing.assert_array_equal(actual_scales, scales)
    sums = [codes[:, first : first + group_size].sum(axis=1) for first in starts]
    np.testing.assert_array_equal(actual_sums, np.array(sums))


@pytest.mark.parametrize("num_columns", [130, 180, 200])
@pytest.mark.parametrize("compute", COMPUTES)
def test_pieces_of_a_row_make_the_block_of_the_whole(compute: int, num_columns: int) -> None:
    """As the rows of gate and up that an item of work has done."""
    x = random_x(4, num_columns)

    whole, pieces = write(x, compute, 32), write(x, compute, 32, parts=64)

    for actual, expected in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("compute", [INT8, INT8_TILES])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_group_that_is_not_finite_has_a_scale_of_nan(value: float, compute: int) -> None:
    """Its sum is a number, so that nothing but the scale decides."""
    x = random_x(4, 70)
    x[1, 40] = value

    _, scales, sums = write(x, compute, 32)

    assert np.argwhere(np.isnan(scales)).tolist() == [[1, 1]]
    assert abs(sums).max() <= 32 * 127
    assert sums[1, 1] == 0


def test_sizes_are_of_whole_paddings() -> None:
    """17 columns are 32; scales and sums are 4 bytes each."""
    assert COLUMN_PADDING == 16
    assert [token_bytes(compute, 17) for compute in ("float", "bfloat16", "int8")] == [128, 64, 32]
    assert [token_scale_bytes(compute, 3) for compute in ("float", "bfloat16", "int8")] == [
        0,
        0,
        24,
    ]

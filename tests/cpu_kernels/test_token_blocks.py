"""Blocks of tokens lie in memory as the kernels read them."""

# M tokens of a block, K columns

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.formats import to_bfloat16_bits
from cpu_kernels.token_blocks import (
    COLUMN_PADDING,
    COMPUTE_NUMBERS,
    token_bytes,
    token_scale_bytes,
    write_columns,
)

COLUMNS = [1, 2, 15, 16, 17, 70, 200]
# The most columns of a step: all that a kernel may read beyond the last.
STEP_COLUMNS = 8


def write(
    x: NDArray[Any], compute: Any, group_size: int, *, parts: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]:
    """The block, scales and sums of all rows; `parts`: in pieces of so many columns."""
    num_tokens, num_columns = x.shape
    num_groups = -(-num_columns // group_size)
    block = np.full(num_tokens * token_bytes(compute, num_columns), 0xAA, np.uint8)
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
                COMPUTE_NUMBERS[compute],
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

    block, _, _ = write(x, "float", num_columns)

    columns = block.view(np.float32).reshape(-1, num_tokens)
    np.testing.assert_array_equal(columns[: len(expected)], expected)


@pytest.mark.parametrize("num_tokens", [1, 4, 24])
@pytest.mark.parametrize("num_columns", COLUMNS)
@pytest.mark.parametrize("x_format", ["float32", "bfloat16"])
def test_bfloat16_blocks_are_pairs_of_columns(
    x_format: str, num_columns: int, num_tokens: int
) -> None:
    """(K / 2, M, 2), rounded to nearest; an x in bfloat16 stays what it is."""
    x = random_x(num_tokens, num_columns)
    bits = to_bfloat16_bits(x)
    expected = to_bfloat16_bits(padded(x)).reshape(num_tokens, -1, 2).transpose(1, 0, 2)

    block, _, _ = write(bits if x_format == "bfloat16" else x, "bfloat16", num_columns)

    pairs = block.view(np.uint16).reshape(-1, num_tokens, 2)
    np.testing.assert_array_equal(pairs[: len(expected)], expected)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("num_tokens", [1, 4, 12])
@pytest.mark.parametrize("num_columns", COLUMNS)
def test_int8_blocks_are_fours_of_columns_with_a_scale_and_sum_a_group(
    num_columns: int, num_tokens: int, group_size: int
) -> None:
    """(K / 4, M, 4) codes to nearest even of x * (127 / largest), scales largest / 127."""
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
    fours = codes.astype(np.int8).reshape(num_tokens, -1, 4).transpose(1, 0, 2)

    block, actual_scales, actual_sums = write(x, "int8", group_size)

    written = block.view(np.int8).reshape(-1, num_tokens, 4)
    np.testing.assert_array_equal(written[: len(fours)], fours)
    np.testing.assert_array_equal(actual_scales, scales)
    sums = [codes[:, first : first + group_size].sum(axis=1) for first in starts]
    np.testing.assert_array_equal(actual_sums, np.array(sums))


@pytest.mark.parametrize("compute", ["float", "bfloat16", "int8"])
def test_pieces_of_a_row_make_the_block_of_the_whole(compute: Any) -> None:
    """As the rows of gate and up that an item of work has done."""
    x = random_x(4, 200)

    whole, pieces = write(x, compute, 32), write(x, compute, 32, parts=64)

    for actual, expected in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_group_that_is_not_finite_has_a_scale_of_nan(value: float) -> None:
    """Its sum is a number, so that nothing but the scale decides."""
    x = random_x(2, 70)
    x[1, 40] = value

    _, scales, sums = write(x, "int8", 32)

    assert np.isnan(scales).tolist() == [[False, False], [False, True], [False, False]]
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

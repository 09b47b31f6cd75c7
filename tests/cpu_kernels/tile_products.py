"""Products on emulated tiles; test_amx.py runs this file in a process that emulates them.

`HETERO_AMX_EMULATED=1 pytest tests/cpu_kernels/tile_products.py` does it alone. Such a process
calls tile kernels wherever one with AMX would, so test_amx.py runs the other tests of products in
one too.
"""

# M tokens, K columns, N rows

from __future__ import annotations

import ctypes
import mmap
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels.amx import tile_kernel_address, tiles
from cpu_kernels.formats import WeightFormat, from_bfloat16_bits, to_bfloat16_bits
from cpu_kernels.isa import isa
from cpu_kernels.linear import PackedMatrix
from cpu_kernels.microkernels import (
    COMPUTE_NUMBERS,
    MIN_TILE_TOKENS,
    Compute,
    block_tokens,
    token_bytes,
    token_scale_bytes,
)
from cpu_kernels.token_blocks import write_columns
from tests.cpu_kernels.exact_products import (
    KINDS,
    Matrix,
    assert_within,
    case_name,
    cases,
    exact,
    matrix_of,
    product,
    random_matrix,
    stored,
)
from tests.cpu_kernels.test_linear import run

Case = tuple[WeightFormat, Compute]
CASES = [case for case in cases() if case[1] != "float"]
KIND_CASES = [case for case in cases(KINDS) if case[1] != "float"]
# One column, around a step and a tile (32 and 64 columns), around groups, several tiles and a rest.
COLUMNS = [1, 2, 7, 31, 32, 33, 48, 64, 65, 127, 128, 130, 250, 320]
TILE_TOKENS = [size for size in block_tokens("int8") if size >= MIN_TILE_TOKENS]
needs_bfloat16 = pytest.mark.skipif(
    not isa().has("avx512-bf16"), reason="needs AVX512_BF16 for the smallest blocks"
)


def test_tiles_are_emulated() -> None:
    """Or nothing here tests what it says."""
    assert tiles() == "emulated"
    assert TILE_TOKENS == [32, 16, 8, 4]


@pytest.mark.parametrize("num_tokens", range(1, 41))
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_any_number_of_tokens(case: Case, num_tokens: int) -> None:
    """Blocks on tiles and on vectors in one call, x of either format."""
    format, compute = case
    num_columns, num_rows = COLUMNS[num_tokens % len(COLUMNS)], (num_tokens * 23) % 150 + 1
    rng = np.random.default_rng([num_tokens, num_columns])
    matrix = random_matrix(rng, num_rows, num_columns, format)
    x = rng.standard_normal((num_tokens, num_columns)).astype(np.float32)
    x_of_format = stored(x, "bfloat16" if num_tokens % 2 else "float32")

    actual = run(x_of_format, matrix, compute, num_threads=2)

    assert_within(actual, product(exact(x_of_format), matrix.weight_NK, format, compute))


@pytest.mark.parametrize("num_tokens", [4, 21, 32])
@pytest.mark.parametrize("num_columns", COLUMNS)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_any_number_of_columns(case: Case, num_columns: int, num_tokens: int) -> None:
    """Around steps, tiles, units of x and groups."""
    format, compute = case
    rng = np.random.default_rng(num_columns)
    matrix = random_matrix(rng, 37, num_columns, format)
    x = rng.standard_normal((num_tokens, num_columns)).astype(np.float32)

    actual = run(x, matrix, compute)

    assert_within(actual, product(exact(x), matrix.weight_NK, format, compute))


def bfloat16_error(x: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """The bound in amx_kernels.py for x and weights in bfloat16."""
    sizes, weights = np.abs(x), np.abs(weight)
    num_columns = x.shape[1]
    of_size = sizes.sum(axis=1)[:, None] + weights.sum(axis=1)
    error: NDArray[np.float64] = (num_columns + 5) * 2.0**-24 * (sizes @ weights.T)
    error += 2.0**-126 * (of_size + num_columns + 1)
    return error


@needs_bfloat16
@pytest.mark.parametrize("num_columns", COLUMNS)
@pytest.mark.parametrize("exponent", [-39, -38, -20, 0, 15])
def test_bfloat16_is_within_its_bound(num_columns: int, exponent: int) -> None:
    """Of large and small x, denormals too, which count as zero."""
    rng = np.random.default_rng([num_columns, exponent + 100])
    bits = to_bfloat16_bits(
        (rng.standard_normal((20, num_columns)) * 10.0**exponent).astype(np.float32)
    )
    matrix = random_matrix(rng, 37, num_columns, WeightFormat(kind="bfloat16"))
    x = from_bfloat16_bits(bits).astype(np.float64)

    actual = run(bits, matrix, "bfloat16")

    distance = np.abs(actual - x @ matrix.weight_NK.T)
    assert (distance <= bfloat16_error(x, matrix.weight_NK)).all()


@needs_bfloat16
def test_denormals_count_as_zero() -> None:
    """In x, in the weights, and made by a product; the smallest normal number counts."""
    smallest = 2.0**-126
    x = np.full((4, 4), smallest, np.float32)
    x[:, 1] = x[:, 3] = smallest / 2
    x[:, 2] = 0.5
    weight = np.zeros((4, 4), np.float32)
    weight[0, 1] = 1  # a denormal x
    weight[1, 2] = smallest / 2  # a denormal weight
    weight[2, 0] = 0.5  # a denormal product
    weight[3, 0] = 1
    matrix = matrix_of(weight, WeightFormat(kind="bfloat16"))

    actual = run(x, matrix, "bfloat16")

    np.testing.assert_array_equal(actual, np.tile([0, 0, 0, np.float32(smallest)], (4, 1)))


class Guarded(NamedTuple):
    """Bytes that end where reading or writing one more ends the process."""

    memory: mmap.mmap
    bytes: NDArray[np.uint8]


def guarded(contents: NDArray[np.uint8]) -> Guarded:
    """The same bytes before a page that may not be touched."""
    page = mmap.PAGESIZE
    size = -(-max(1, len(contents)) // page) * page
    memory = mmap.mmap(-1, size + page)
    whole = np.frombuffer(memory, np.uint8)
    found = whole[size - len(contents) : size]
    found[:] = contents
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(whole.ctypes.data + size, page, 0) == 0
    return Guarded(memory, found)


_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)


def x_block(
    x: NDArray[np.float32], packed: PackedMatrix, compute: Compute
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A block of tokens, and its scales and sums."""
    num_tokens, num_columns = x.shape
    num_groups = packed.weight_format.num_groups(num_columns)
    block = np.zeros(num_tokens * token_bytes(compute, num_columns), np.uint8)
    scales = np.zeros(num_tokens * token_scale_bytes(compute, num_groups), np.uint8)
    start = scales.ctypes.data
    for token in range(num_tokens):
        write_columns(
            x.ravel(),
            token * num_columns,
            num_columns,
            0,
            token,
            num_tokens,
            COMPUTE_NUMBERS[compute],
            packed.weight_format.group_size or 0,
            block.ctypes.data,
            start,
            start + 4 * num_groups * num_tokens,
        )
    return block, scales


@pytest.mark.parametrize("num_tokens", TILE_TOKENS)
@pytest.mark.parametrize("case", KIND_CASES, ids=case_name)
def test_a_kernel_touches_nothing_outside_its_arrays(case: Case, num_tokens: int) -> None:
    """Whatever the rest of columns, tiles and panels; it also writes all of y and nothing more."""
    format, compute = case
    for num_columns in COLUMNS:
        for num_panels in (1, 2, 3, 4, 5, 7):
            rng = np.random.default_rng([num_columns, num_panels])
            matrix: Matrix = random_matrix(rng, 16 * num_panels, num_columns, format)
            x = rng.standard_normal((num_tokens, num_columns)).astype(np.float32)
            num_rows = 16 * num_panels
            blob = matrix.packed.blob
            scales_at = format.scales_at(num_rows, num_columns)
            zeros_at = format.zeros_at(num_rows, num_columns)
            num_scales = num_rows * format.num_groups(num_columns)
            y_stride = num_rows + 3
            y = np.full((num_tokens, y_stride), np.nan, np.float32)
            # the last row ends with the last panel
            end = y.size - 3
            parts = (
                blob[:scales_at],
                blob[scales_at:][: 2 * num_scales],
                blob[zeros_at:][: num_scales if format.has_zero_point else 0],
                *x_block(x, matrix.packed, compute),
                y.reshape(-1)[:end].view(np.uint8),
            )
            places = [guarded(part) for part in parts]

            _KERNEL(tile_kernel_address(format.kind, format.has_zero_point, num_tokens))(
                *(place.bytes.ctypes.data for place in places),
                y_stride,
                num_columns,
                format.group_size or 0,
                num_panels,
            )

            y.reshape(-1)[:end] = places[-1].bytes.view(np.float32)
            expected = product(exact(x), matrix.weight_NK, format, compute)
            assert_within(y[:, :num_rows], expected)
            assert np.isnan(y[:, num_rows:]).all()


@pytest.mark.parametrize("num_tokens", TILE_TOKENS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_largest_codes_do_not_overflow(kind: Any, num_tokens: int) -> None:
    """Groups of 128 columns of the largest bytes are summed and centred exactly."""
    format = WeightFormat(kind=kind, group_size=128)
    largest = {"int8": 127, "int4": 7}[format.kind]
    matrix = matrix_of(np.full((33, 256), largest, np.float32), format)
    x = np.full((num_tokens, 256), -127, np.float32)

    actual = run(x, matrix, "int8")

    assert set(actual.ravel().tolist()) == {-127.0 * largest * 256}

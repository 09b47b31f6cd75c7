"""Products with packed weights equal float64 ones, for any format, arithmetic and shape."""

# T tokens, K columns, N rows

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.formats import WeightFormat, pack
from cpu_kernels.linear import PackedMatrix, linear
from cpu_kernels.microkernels import Compute
from cpu_kernels.scratch import Scratch
from tests.cpu_kernels.exact_products import (
    FORMATS,
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

every_case = pytest.mark.parametrize("case", cases(), ids=case_name)
every_kind = pytest.mark.parametrize("case", cases(KINDS), ids=case_name)
Case = tuple[WeightFormat, Compute]


def run(
    x: NDArray[Any],
    matrix: Matrix,
    compute: Compute,
    *,
    num_threads: int = 1,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """x W^T in an array that was full of NaN."""
    if out is None:
        out = np.empty((len(x), matrix.packed.num_rows), np.float32)
    out[:] = np.nan
    linear(x, matrix.packed, compute=compute, num_threads=num_threads, scratch=Scratch(), out=out)
    return out


def integers(num_tokens: int, num_rows: int, num_columns: int, format: WeightFormat) -> Any:
    """x and a matrix of whole numbers that nothing rounds: every group reaches its last code."""
    rng = np.random.default_rng([num_tokens, num_rows, num_columns])
    low, high = {"int8": (-127, 127), "int4": (-7, 7)}.get(format.kind, (-99, 99))
    if format.has_zero_point:
        low, high = -5, 10
    weight = rng.integers(low, high + 1, (num_rows, num_columns)).astype(np.float32)
    x = rng.integers(-127, 128, (num_tokens, num_columns)).astype(np.float32)
    for start in range(0, num_columns, format.group_size or num_columns):
        x[:, start] = 127
        weight[:, start] = high
        # with a zero point the range must be 15 for a scale of 1
        weight[:, start + 1 : start + 2] = low
        if start + 1 == num_columns and format.has_zero_point:
            weight[:, start] = 15
    return x, matrix_of(weight, format), x.astype(np.int64) @ weight.astype(np.int64).T


@given(
    num_tokens=st.integers(0, 60),
    num_rows=st.one_of(st.integers(1, 50), st.integers(60, 140)),
    num_columns=st.one_of(st.integers(1, 70), st.integers(120, 300)),
    case=st.sampled_from(cases()),
    x_format=st.sampled_from(["float32", "bfloat16"]),
    num_threads=st.integers(1, 3),
)
@settings(max_examples=400, deadline=None)
def test_products_of_whole_numbers_are_exact(
    num_tokens: int, num_rows: int, num_columns: int, case: Case, x_format: str, num_threads: int
) -> None:
    """No sum reaches 2**24, so that no order of additions and no rounding of x can be seen."""
    format, compute = case
    x, matrix, expected = integers(num_tokens, num_rows, num_columns, format)

    actual = run(stored(x, x_format), matrix, compute, num_threads=num_threads)

    np.testing.assert_array_equal(actual, expected)


@given(
    num_tokens=st.integers(1, 60),
    num_rows=st.integers(1, 100),
    num_columns=st.one_of(st.integers(1, 70), st.integers(120, 300)),
    case=st.sampled_from(cases()),
    x_format=st.sampled_from(["float32", "bfloat16"]),
    exponent=st.sampled_from([-25, 0, 25]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_products_are_within_the_rounding_of_their_arithmetic(
    num_tokens: int,
    num_rows: int,
    num_columns: int,
    case: Case,
    x_format: str,
    exponent: int,
    seed: int,
) -> None:
    """Any weights and x, large and small."""
    format, compute = case
    rng = np.random.default_rng(seed)
    matrix = random_matrix(rng, num_rows, num_columns, format)
    values = rng.standard_normal((num_tokens, num_columns)) * 10.0**exponent
    x = stored(values.astype(np.float32), x_format)

    actual = run(x, matrix, compute)

    assert_within(actual, product(exact(x), matrix.weight_NK, format, compute))


@every_kind
@pytest.mark.parametrize("num_columns", [1, 2, 31, 33, 127, 129, 2048, 2049])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 64, 65])
def test_shapes_around_steps_groups_panels_and_what_is_walked_at_once(
    num_rows: int, num_columns: int, case: Case
) -> None:
    """One less, one more; long rows too, in which whole numbers of 9 bits stay exact."""
    format, compute = case
    x, matrix, _ = integers(5, num_rows, num_columns, format)

    assert_within(run(x, matrix, compute), product(exact(x), matrix.weight_NK, format, compute))


@every_case
def test_any_number_of_threads_gives_the_same_bits(case: Case) -> None:
    """Many items, some of a few panels, and the last panel with two rows."""
    format, compute = case
    rng = np.random.default_rng(3)
    matrix = random_matrix(rng, 1010, 200, format)
    for num_tokens in (1, 3, 24, 41):
        x = rng.standard_normal((num_tokens, 200)).astype(np.float32)

        first = run(x, matrix, compute)

        for num_threads in (2, 3):
            np.testing.assert_array_equal(run(x, matrix, compute, num_threads=num_threads), first)


@pytest.mark.parametrize("case", [case for case in cases() if case[1] == "int8"], ids=case_name)
def test_a_token_has_the_same_bits_alone_and_among_others(case: Case) -> None:
    """At any place of a block of any size, where sums are integers."""
    format, compute = case
    rng = np.random.default_rng(4)
    matrix = random_matrix(rng, 100, 200, format)
    x = rng.standard_normal((60, 200)).astype(np.float32)
    alone = np.concatenate([run(x[t : t + 1], matrix, compute) for t in range(len(x))])

    for num_tokens in (2, 3, 4, 7, 8, 12, 16, 24, 60):
        np.testing.assert_array_equal(run(x[:num_tokens], matrix, compute), alone[:num_tokens])


@every_kind
def test_rows_may_lie_apart(case: Case) -> None:
    """Columns of wider arrays, a row that is read again and again; nothing beside out's rows."""
    format, compute = case
    x, matrix, expected = integers(9, 37, 50, format)
    wide_x = np.full((9, 80), np.nan, np.float32)
    wide_x[:, 7:57] = x
    wide_out = np.full((9, 90), 5, np.float32)

    run(wide_x[:, 7:57], matrix, compute, out=wide_out[:, 11:48])
    repeated = run(np.broadcast_to(x[0], (9, 50)), matrix, compute)

    np.testing.assert_array_equal(wide_out[:, 11:48], expected)
    assert (wide_out[:, :11] == 5).all() and (wide_out[:, 48:] == 5).all()
    np.testing.assert_array_equal(repeated, np.broadcast_to(expected[0], (9, 37)))


@every_kind
def test_read_only_arrays_are_read(case: Case) -> None:
    """As views of a mapped file are."""
    format, compute = case
    x, matrix, expected = integers(2, 20, 40, format)
    x.flags.writeable = matrix.packed.blob.flags.writeable = False

    np.testing.assert_array_equal(run(x, matrix, compute), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_tokens", [1, 5])
@every_kind
def test_an_x_that_is_not_finite_makes_its_own_token_so(
    case: Case, num_tokens: int, value: float
) -> None:
    """As in numpy, or with int8 NaN in the whole row; the other tokens are what they were."""
    format, compute = case
    x, matrix, expected = integers(num_tokens, 37, 70, format)
    x[-1, 66] = value
    with np.errstate(invalid="ignore"):
        spoiled = x.astype(np.float64) @ matrix.weight_NK.T

    actual = run(x, matrix, compute)

    np.testing.assert_array_equal(actual[:-1], expected[:-1])
    if compute == "int8":
        spoiled = np.full_like(spoiled, np.nan)
    np.testing.assert_array_equal(actual[-1], spoiled[-1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", cases(KINDS[:2]), ids=case_name)
def test_a_weight_that_is_not_finite_makes_its_own_row_so(case: Case, value: float) -> None:
    """As in numpy, in a row beside padding; an x of zero makes NaN of infinity."""
    format, compute = case
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((37, 71)).astype(np.float32)
    weight[36, 70] = weight[3, 0] = value
    x = rng.standard_normal((5, 71)).astype(np.float32)
    x[2, 0] = 0
    matrix = matrix_of(weight, format)
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ matrix.weight_NK.T

    actual = run(x, matrix, compute)

    finite = np.isfinite(expected)
    assert finite.sum() == 5 * 35
    np.testing.assert_array_equal(actual[~finite], expected[~finite].astype(np.float32))
    assert np.isfinite(actual[finite]).all()


@pytest.mark.parametrize("case", cases(FORMATS[2:]), ids=case_name)
def test_zeros_and_values_too_small_to_scale_give_zeros(case: Case) -> None:
    """127 over a group's largest value would be infinite: such groups count as zeros."""
    format, compute = case
    matrix = random_matrix(np.random.default_rng(6), 20, 300, format)
    x = np.zeros((3, 300), np.float32)
    x[1] = 1e-32
    x[2] = 1e-42

    actual = run(x, matrix, compute)

    np.testing.assert_array_equal(actual[0], 0)
    assert np.abs(actual).max() < 1e-28


def test_calls_of_one_scratch_do_not_see_each_other() -> None:
    """Larger and smaller ones in turn."""
    scratch = Scratch()
    for format, compute in cases(KINDS):
        for num_tokens, num_columns in ((30, 200), (1, 3), (7, 90)):
            x, matrix, expected = integers(num_tokens, 33, num_columns, format)
            out = np.full(expected.shape, np.nan, np.float32)

            linear(x, matrix.packed, compute=compute, num_threads=2, scratch=scratch, out=out)

            np.testing.assert_array_equal(out, expected)


def refused(message: str, **changes: Any) -> None:
    """A product that would be right but for `changes` is refused."""
    weight = pack(np.ones((3, 8), np.float32), KINDS[0])
    matrix = PackedMatrix(blob=weight, weight_format=KINDS[0], num_rows=3, num_columns=8)
    given: dict[str, Any] = {
        "x": np.ones((2, 8), np.float32),
        "weight": matrix,
        "compute": "float",
        "num_threads": 1,
        "scratch": Scratch(),
        "out": np.empty((2, 3), np.float32),
    }
    with pytest.raises(ValueError, match=message):
        linear(**{**given, **changes})


def test_arguments_that_do_not_fit_are_named() -> None:
    """Type, shape and layout of x and out, the arithmetic, the number of threads."""
    refused(r"x is float64 \(2, 8\)", x=np.ones((2, 8)))
    refused(r"x is float32 \(8,\)", x=np.ones(8, np.float32))
    refused(r"x is float32 \(2, 7\).*\(T, 8\)", x=np.ones((2, 7), np.float32))
    refused(r"x has strides \(64, 8\)", x=np.ones((2, 16), np.float32)[:, ::2])
    refused(r"x has strides \(4, 8\)", x=np.ones((8, 2), np.float32).T)
    refused(r"x has strides \(-32, 4\)", x=np.ones((2, 8), np.float32)[::-1])
    refused(r"out is float64 \(2, 3\)", out=np.empty((2, 3)))
    refused(r"out is float32 \(1, 3\).*\(2, 3\)", out=np.empty((1, 3), np.float32))
    refused(r"out has strides \(24, 8\)", out=np.empty((2, 6), np.float32)[:, ::2])
    refused(r"compute is 'int8' but float32 weights.*'float'", compute="int8")
    refused("compute is 'quick'", compute="quick")
    refused("num_threads is 0", num_threads=0)


def test_no_tokens_are_checked_like_some() -> None:
    """An empty batch of another width is a mistake too."""
    out = np.empty((0, 3), np.float32)
    refused(r"x is float32 \(0, 7\)", x=np.ones((0, 7), np.float32), out=out)


def test_an_output_that_is_read_only_is_refused() -> None:
    """And not written."""
    out = np.zeros((2, 3), np.float32)
    out.flags.writeable = False
    refused("read-only", out=out)


def test_a_blob_of_another_size_is_refused() -> None:
    """Before a kernel could read past its end."""
    format = WeightFormat(kind="int4", group_size=32)
    blob = pack(np.ones((16, 64), np.float32), format)
    with pytest.raises(ValueError, match=r"blob is uint8 \(512,\).*\(576,\)"):
        PackedMatrix(blob=blob[:-64], weight_format=format, num_rows=16, num_columns=64)
    with pytest.raises(ValueError, match="17 x 64"):
        PackedMatrix(blob=blob, weight_format=format, num_rows=17, num_columns=64)
    with pytest.raises(ValueError, match="contiguous"):
        strided = np.zeros(2 * len(blob), np.uint8)[::2]
        PackedMatrix(blob=strided, weight_format=format, num_rows=16, num_columns=64)

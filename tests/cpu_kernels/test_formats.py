"""Formats keep the values they promise to keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.formats import (
    GROUP_SIZES,
    WeightFormat,
    error_bound,
    from_bfloat16_bits,
    pack,
    to_bfloat16_bits,
    unpack,
)

Matrix = NDArray[np.float32]


def bits(*patterns: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(patterns, np.uint32).view(np.float32)


def test_a_tie_rounds_to_the_even_bfloat16() -> None:
    """Half of the last place goes down from an even and up from an odd last bit."""
    ties = bits(0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF)

    assert to_bfloat16_bits(ties).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F81]


def test_special_values_survive_bfloat16() -> None:
    """Infinities and signed zeros are kept, and a too large number becomes infinity."""
    special = bits(0x7F800000, 0xFF800000, 0x00000000, 0x80000000, 0x7F7FFFFF)

    assert to_bfloat16_bits(special).tolist() == [0x7F80, 0xFF80, 0x0000, 0x8000, 0x7F80]


def test_nan_stays_nan_in_bfloat16() -> None:
    """NaNs whose payload rounding would carry into infinity or lose stay NaN, with their sign."""
    nans = to_bfloat16_bits(bits(0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001))

    assert np.isnan(from_bfloat16_bits(nans)).all()
    assert [int(pattern) >> 15 for pattern in nans] == [0, 1, 0, 1]


def test_denormals_round_like_other_values() -> None:
    """The smallest bfloat16 denormal is kept and half of it is a tie that goes to zero."""
    denormals = bits(0x00010000, 0x00008000, 0x00008001, 0x00018000)

    assert to_bfloat16_bits(denormals).tolist() == [1, 0, 1, 2]


def test_every_bfloat16_returns_to_itself() -> None:
    """All 65536 patterns but the signalling NaNs survive widening and rounding."""
    every = np.arange(65536, dtype=np.uint16)
    every = every[~np.isnan(from_bfloat16_bits(every)) | (every & 0x40 != 0)]

    assert np.array_equal(to_bfloat16_bits(from_bfloat16_bits(every)), every)


def test_bfloat16_keeps_the_shape_of_a_strided_array() -> None:
    """A transposed view is converted element by element."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T

    assert np.array_equal(from_bfloat16_bits(to_bfloat16_bits(values)), values)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=200, deadline=None)
def test_no_bfloat16_is_nearer(value: float) -> None:
    """The neighbours of the rounded value are not nearer to the original."""
    rounded = int(to_bfloat16_bits(np.array([value], np.float32))[0])
    magnitude = rounded & 0x7FFF
    if magnitude == 0x7F80:  # rounded to infinity
        assert abs(value) >= 3.3961e38
        return

    def distance(pattern: int) -> float:
        widened = from_bfloat16_bits(np.array([pattern | rounded & 0x8000], np.uint16))
        return abs(float(widened[0]) - value)

    assert distance(magnitude) <= distance(max(magnitude - 1, 0))
    assert distance(magnitude) <= distance(magnitude + 1)


_FORMATS = [
    WeightFormat(kind="float32"),
    WeightFormat(kind="bfloat16"),
    *(WeightFormat(kind="int8", group_size=size) for size in GROUP_SIZES),
    *(WeightFormat(kind="int4", group_size=size) for size in GROUP_SIZES),
    *(WeightFormat(kind="int4", group_size=size, has_zero_point=True) for size in GROUP_SIZES),
]
_QUANTISED = _FORMATS[2:]
_INT8 = WeightFormat(kind="int8", group_size=32)
_INT4 = WeightFormat(kind="int4", group_size=32)
_INT4_ZERO = WeightFormat(kind="int4", group_size=32, has_zero_point=True)


@st.composite
def _matrices(draw: st.DrawFn) -> NDArray[np.float32]:
    """Draw a matrix whose rows differ in size and sign, zeros, denormals and outliers among it."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.standard_normal((rows, columns)) + draw(st.sampled_from([0.0, 1.0, -5.0]))
    exponents = draw(st.sampled_from([(-3, 3), (-140, -120), (-150, 120)]))
    weight *= 2.0 ** rng.uniform(*exponents, (rows, 1))
    if draw(st.booleans()):  # few different values: many ties and many exact codes
        weight = np.rint(weight * 4) / 2
    weight[rng.random(weight.shape) < draw(st.sampled_from([0.0, 0.5]))] = -0.0
    weight[rng.random(rows) < 0.1] = 0.0
    return weight.astype(np.float32)


@given(_matrices(), st.sampled_from(_FORMATS))
@settings(max_examples=300, deadline=None)
def test_every_weight_is_within_its_bound(weight: Matrix, format: WeightFormat) -> None:
    """No element of any matrix comes back farther away than error_bound says."""
    blob = pack(weight, format)

    error = np.abs(weight.astype(np.float64) - unpack(blob, format, *weight.shape))

    assert blob.shape == (format.packed_bytes(*weight.shape),)
    assert (error <= error_bound(weight, format)).all()


@given(_matrices(), st.sampled_from(_QUANTISED))
@settings(max_examples=200, deadline=None)
def test_a_scale_is_the_smallest_that_reaches_every_weight(
    weight: Matrix, format: WeightFormat
) -> None:
    """The next smaller bfloat16 times the largest code is below what a group spans."""
    rows, columns = weight.shape
    blob = pack(weight, format)
    at, end = format.scales_at(rows, columns), format.zeros_at(rows, columns)
    num_groups = format.num_groups(columns)
    count = -(-rows // 16) * num_groups * 16
    stored = blob[at:end].view(np.uint16)[:count].reshape(-1, num_groups, 16)
    for row in range(rows):
        for group in range(num_groups):
            part = weight[row, group * (format.group_size or 0) :][: format.group_size]
            span = float(np.abs(part).max())
            if format.has_zero_point:  # in float32, as the difference is rounded
                span = float(max(part.max(), np.float32(0)) - min(part.min(), np.float32(0)))
            bits = int(stored[row // 16, group, row % 16])
            scale, smaller = from_bfloat16_bits(np.array([bits, max(bits - 1, 0)], np.uint16))
            assert float(scale) * format.scale_steps >= span
            assert bits == 0 or float(smaller) * format.scale_steps < span


def test_float32_has_a_column_a_step() -> None:
    """Word l of step s is row l of column s; row 16 starts the second panel."""
    weight = np.arange(17 * 3, dtype=np.float32).reshape(17, 3)

    words = pack(weight, _FORMATS[0]).view(np.float32).reshape(2, 3, 16)

    assert words[0, 2].tolist() == weight[:16, 2].tolist()
    assert words[1, 2].tolist() == [weight[16, 2]] + [0.0] * 15


def test_bfloat16_has_two_columns_a_step() -> None:
    """The last of an odd number of columns has a zero beside it."""
    weight = np.arange(48, dtype=np.float32).reshape(16, 3)

    stored = from_bfloat16_bits(pack(weight, _FORMATS[1]).view(np.uint16)).reshape(2, 16, 2)

    assert stored[0, 5].tolist() == [15.0, 16.0]
    assert stored[1, 5].tolist() == [17.0, 0.0]


def test_int8_layout_by_hand() -> None:
    """Weights -127..3 of scale 1 are the bytes 1..131, the columns after the last 128."""
    weight = np.array([[-127, 0, 1, 2, 3]], np.float32)

    blob = pack(weight, _INT8)

    # 2 steps, 16 scales of 2 bytes, padded to 64
    assert len(blob) == 2 * 64 + 64
    assert blob[:4].tolist() == [1, 128, 129, 130]
    assert blob[64:68].tolist() == [131, 128, 128, 128]
    assert blob[4:8].tolist() == [128] * 4  # a row that is not there
    assert blob[128:192].view(np.uint16).tolist() == [0x3F80] + [0] * 31


def test_int4_layout_by_hand() -> None:
    """Codes 1 9 8 8 10 8 15 8 8 fill the low and then the high halves of a step."""
    weight = np.array([[-7, 1, 0, 0, 2, 0, 7, 0, 0]], np.float32)

    blob = pack(weight, _INT4)

    assert len(blob) == 2 * 64 + 64
    assert blob[:4].tolist() == [0xA1, 0x89, 0xF8, 0x88]
    assert blob[64:68].tolist() == [0x88] * 4
    assert blob[128:192].view(np.uint16).tolist() == [0x3F80] + [0] * 31


def test_zero_point_layout_by_hand() -> None:
    """Weights -4..11 of scale 1 are the codes 0..15 with zero point 4, whole numbers exact."""
    weight = np.arange(-4, 12, dtype=np.float32)[None]

    blob = pack(weight, _INT4_ZERO)

    assert len(blob) == 2 * 64 + 64 + 64
    assert blob[:4].tolist() == [0x40, 0x51, 0x62, 0x73]
    assert blob[64:68].tolist() == [0xC8, 0xD9, 0xEA, 0xFB]
    assert blob[128:192].view(np.uint16).tolist() == [0x3F80] + [0] * 31
    assert blob[192:].tolist() == [4] + [0] * 63
    assert unpack(blob, _INT4_ZERO, 1, 16).tolist() == weight.tolist()


def test_a_zero_point_takes_the_clipped_code() -> None:
    """Weights -7.5 and 7.5 of scale 1: the zero point is 8 and 8 + 8 becomes 15: 0.5 off."""
    weight = np.array([[-7.5, 7.5]], np.float32)

    assert unpack(pack(weight, _INT4_ZERO), _INT4_ZERO, 1, 2).tolist() == [[-8.0, 7.0]]


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (_FORMATS[0], (2 * 16 * 100 * 4, 0, 0)),
        (_FORMATS[1], (2 * 16 * 100 * 2, 0, 0)),
        # 4 groups of 32 in 100 columns: 2 * 4 * 16 scales
        (_INT8, (2 * 16 * 100, 256, 0)),
        (_INT4, (2 * 16 * 104 // 2, 256, 0)),  # 100 columns are 13 steps of 8
        (_INT4_ZERO, (2 * 16 * 104 // 2, 256, 128)),
    ],
)
def test_sizes_of_32_rows_and_100_columns(
    format: WeightFormat, expected: tuple[int, int, int]
) -> None:
    """Panels, scales and zero points follow one another."""
    scales_at, zeros_at = format.scales_at(32, 100), format.zeros_at(32, 100)

    parts = (scales_at, zeros_at - scales_at, format.packed_bytes(32, 100) - zeros_at)

    assert parts == expected
    assert 2 * format.panel_bytes(100) == scales_at


@pytest.mark.parametrize("format", _FORMATS)
def test_zeros_stay_zero(format: WeightFormat) -> None:
    """A group without a largest weight divides by nothing, negative zeros included."""
    weight = np.zeros((17, 70), np.float32)
    weight[3] = -0.0

    blob = pack(weight, format)

    assert not unpack(blob, format, 17, 70).any()
    assert not blob[format.scales_at(17, 70) :].any()


@pytest.mark.parametrize("format", _QUANTISED)
def test_the_smallest_denormal_has_a_scale(format: WeightFormat) -> None:
    """A quotient that rounds to zero still gets the smallest bfloat16 above it."""
    weight = np.full((1, 32), 2.0**-149, np.float32)

    blob = pack(weight, format)

    assert blob[format.scales_at(1, 32) :].view(np.uint16)[0] == 1


@pytest.mark.parametrize("format", _QUANTISED)
def test_weights_that_cannot_be_quantised_are_counted(format: WeightFormat) -> None:
    """NaN, infinities and 2**126 are four; the number below is packed."""
    weight = np.zeros((3, 80), np.float32)
    weight[0, 0], weight[1, 33], weight[2, 79], weight[2, 78] = np.nan, -np.inf, np.inf, 2.0**126

    with pytest.raises(ValueError, match=r"^4 weights"):
        pack(weight, format)

    largest = np.nextafter(np.float32(2.0**126), np.float32(0))
    weight = np.array([[largest, -largest]], np.float32)
    unpacked = unpack(pack(weight, format), format, 1, 2)
    error = np.abs(weight.astype(np.float64) - unpacked)
    assert (error <= error_bound(weight, format)).all()


@pytest.mark.parametrize("format", _FORMATS[:2])
def test_float_formats_keep_what_is_not_finite(format: WeightFormat) -> None:
    """NaN and the infinities come back."""
    weight = np.array([[np.nan, np.inf, -np.inf]], np.float32)

    np.testing.assert_array_equal(unpack(pack(weight, format), format, 1, 3), weight)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "float16"}, "float16"),
        ({"kind": "int8"}, "None"),
        ({"kind": "int8", "group_size": 16}, "16"),
        ({"kind": "int4", "group_size": 256}, "256"),
        ({"kind": "float32", "group_size": 32}, "32"),
        ({"kind": "bfloat16", "group_size": 64}, "64"),
        ({"kind": "int8", "group_size": 32, "has_zero_point": True}, "zero point"),
        ({"kind": "bfloat16", "has_zero_point": True}, "zero point"),
    ],
)
def test_a_format_refuses_what_does_not_go_together(arguments: Any, named: str) -> None:
    """The error names what is wrong."""
    with pytest.raises(ValueError, match=named):
        WeightFormat(**arguments)


def test_sizes_that_do_not_fit_are_refused() -> None:
    """An empty matrix, and a blob of another size or type, are errors that name both."""
    with pytest.raises(ValueError, match="0 x 4"):
        pack(np.zeros((0, 4), np.float32), _INT8)
    with pytest.raises(ValueError, match=r"\(127,\).*\(128,\)"):
        unpack(np.zeros(127, np.uint8), _FORMATS[1], 1, 4)
    with pytest.raises(ValueError, match="int8"):
        unpack(np.zeros(128, np.int8), _FORMATS[1], 1, 4)

"""Formats keep the values they promise to keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.formats import from_bfloat16_bits, pack_int8, to_bfloat16_bits, unpack_int8


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


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int8_is_within_half_a_scale(group_size: int) -> None:
    """Every weight comes back within half its group's scale and 3 units in the last place."""
    weight = np.random.default_rng(0).standard_normal((5, 384)).astype(np.float32)
    weight *= np.float32(10) ** np.arange(-2, 3, dtype=np.float32)[:, None]

    packed = pack_int8(weight, group_size)

    scales = np.repeat(packed.scales, group_size, axis=1).astype(np.float64)
    bound = scales / 2 + 3 * 2.0**-24 * 127 * scales
    assert packed.group_size == group_size
    assert packed.scales.shape == (5, 384 // group_size)
    assert (np.abs(weight.astype(np.float64) - unpack_int8(packed)) <= bound).all()


def test_int8_scale_is_the_largest_weight_over_127() -> None:
    """A group of 32 with largest weight -254 has scale 2 and that weight is exact."""
    weight = np.ones((1, 32), np.float32)
    weight[0, 7] = -254.0

    packed = pack_int8(weight, 32)

    assert packed.scales.tolist() == [[2.0]]
    assert packed.values[0, 7] == -127
    assert unpack_int8(packed)[0, 7] == -254.0


def test_int8_zeros_stay_zero() -> None:
    """A group without a largest weight divides by nothing."""
    assert not unpack_int8(pack_int8(np.zeros((2, 64), np.float32), 64)).any()


def test_int8_refuses_what_it_cannot_pack() -> None:
    """A wrong group size, a ragged row and an infinite weight are errors that name the number."""
    with pytest.raises(ValueError, match="16"):
        pack_int8(np.zeros((1, 64), np.float32), 16)
    with pytest.raises(ValueError, match="96 columns"):
        pack_int8(np.zeros((1, 96), np.float32), 64)
    with pytest.raises(ValueError, match="1 weights"):
        pack_int8(np.array([[np.inf] + [0.0] * 31], np.float32), 32)

"""Packing on threads writes the bytes of the numpy reference."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels.formats import (
    GROUP_SIZES,
    WeightFormat,
    from_bfloat16_bits,
    pack,
    to_bfloat16_bits,
    unpack,
)
from cpu_kernels.packing import pack_into, unpack_into

_FORMATS = [
    WeightFormat(kind="float32"),
    WeightFormat(kind="bfloat16"),
    *(WeightFormat(kind="int8", group_size=size) for size in GROUP_SIZES),
    *(WeightFormat(kind="int4", group_size=size) for size in GROUP_SIZES),
    *(WeightFormat(kind="int4", group_size=size, has_zero_point=True) for size in GROUP_SIZES),
]
_SOURCES = ["float32", "float16", "bfloat16"]


def _stored(values: NDArray[np.float32], source: str) -> NDArray[Any]:
    return to_bfloat16_bits(values) if source == "bfloat16" else values.astype(source)


def _widened(stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype == np.uint16:
        return from_bfloat16_bits(stored)
    return stored.astype(np.float32)


def _blob(format: WeightFormat, rows: int, columns: int, *, offset: int = 0) -> NDArray[np.uint8]:
    """Bytes of rubbish that start `offset` bytes after a multiple of 64."""
    size = format.packed_bytes(rows, columns)
    spare = np.full(size + 128, 0xAA, np.uint8)
    start = -spare.ctypes.data % 64 + offset
    return spare[start : start + size]


def _weight(rows: int, columns: int, *, seed: int = 0, exponent: int = 3) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)) * 2.0 ** rng.uniform(-exponent, 3, (rows, 1))
    weight[rng.random(rows) < 0.1] = 0.0
    weight[rng.random(weight.shape) < 0.1] = -0.0
    return weight.astype(np.float32)


@given(
    rows=st.integers(1, 70),
    columns=st.one_of(st.integers(1, 300), st.integers(500, 800)),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.sampled_from([3, 20, 145]),
    format=st.sampled_from(_FORMATS),
    source=st.sampled_from(_SOURCES),
    num_threads=st.sampled_from([1, 2]),
    offset=st.sampled_from([0, 4]),
)
@settings(max_examples=400, deadline=None)
def test_packing_is_the_reference_to_the_bit(
    rows: int,
    columns: int,
    seed: int,
    exponent: int,
    format: WeightFormat,
    source: str,
    num_threads: int,
    offset: int,
) -> None:
    """Any shape, source, format, thread count and alignment, denormals and zero rows included."""
    matrix = _stored(_weight(rows, columns, seed=seed, exponent=exponent), source)
    blob = _blob(format, rows, columns, offset=offset)

    pack_into(matrix, format, blob, num_threads=num_threads)

    np.testing.assert_array_equal(blob, pack(_widened(matrix), format))


@given(
    rows=st.integers(1, 70),
    columns=st.one_of(st.integers(1, 300), st.integers(500, 800)),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.sampled_from([3, 145]),
    format=st.sampled_from(_FORMATS),
    num_threads=st.sampled_from([1, 2]),
)
@settings(max_examples=200, deadline=None)
def test_unpacking_is_the_reference_to_the_bit(
    rows: int, columns: int, seed: int, exponent: int, format: WeightFormat, num_threads: int
) -> None:
    """Both kinds of rows; bfloat16 ones are the float32 ones rounded."""
    blob = pack(_weight(rows, columns, seed=seed, exponent=exponent), format)
    floats = np.full((rows, columns), np.nan, np.float32)
    halves = np.full((rows, columns), 0xAAAA, np.uint16)

    unpack_into(blob, format, floats, num_threads=num_threads)
    unpack_into(blob, format, halves, num_threads=num_threads)

    expected = unpack(blob, format, rows, columns)
    np.testing.assert_array_equal(floats, expected)
    np.testing.assert_array_equal(halves, to_bfloat16_bits(expected))


def test_nothing_around_the_outputs_is_written() -> None:
    """Bytes before and after a blob, and elements around unpacked rows, keep their values."""
    format = _FORMATS[-1]
    size = format.packed_bytes(17, 33)
    around = np.full(size + 128, 0x55, np.uint8)
    pack_into(_weight(17, 33), format, around[64:-64], num_threads=2)
    rows = np.full(17 * 33 + 64, 0x5555, np.uint16)
    unpack_into(around[64:-64], format, rows[32:-32].reshape(17, 33), num_threads=2)

    assert (around[:64] == 0x55).all() and (around[-64:] == 0x55).all()
    assert (rows[:32] == 0x5555).all() and (rows[-32:] == 0x5555).all()


@pytest.mark.parametrize("source", _SOURCES)
@pytest.mark.parametrize("format", _FORMATS[:2])
def test_float_formats_pass_on_what_is_not_finite(format: WeightFormat, source: str) -> None:
    """NaN and infinities of every source are in the blob, and come back as rows."""
    weight = np.ones((18, 70), np.float32)
    weight[0, :3] = weight[17, 67:] = np.nan, np.inf, -np.inf
    blob = _blob(format, 18, 70)
    floats, halves = np.empty((18, 70), np.float32), np.empty((18, 70), np.uint16)

    pack_into(_stored(weight, source), format, blob, num_threads=1)
    unpack_into(blob, format, floats, num_threads=1)
    unpack_into(blob, format, halves, num_threads=1)

    np.testing.assert_array_equal(unpack(blob, format, 18, 70), weight)
    np.testing.assert_array_equal(floats, weight)
    np.testing.assert_array_equal(from_bfloat16_bits(halves), weight)


def test_every_float16_is_widened_exactly() -> None:
    """All 65536 patterns: denormals, both zeros with their sign, infinities, NaN as some NaN."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    blob = _blob(_FORMATS[0], 64, 1024)

    pack_into(every, _FORMATS[0], blob, num_threads=1)

    widened = unpack(blob, _FORMATS[0], 64, 1024)
    np.testing.assert_array_equal(widened, every.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(widened), np.signbit(every))


@pytest.mark.parametrize("source", _SOURCES)
@pytest.mark.parametrize("format", _FORMATS[2:])
def test_weights_that_cannot_be_quantised_are_counted(format: WeightFormat, source: str) -> None:
    """Two NaN and two infinities in any rows and groups are four, and zeros none."""
    weight = np.zeros((40, 300), np.float32)
    weight[0, 0], weight[39, 299], weight[16, 40], weight[16, 41] = np.nan, -np.nan, np.inf, -np.inf

    with pytest.raises(ValueError, match=r"^4 weights"):
        pack_into(_stored(weight, source), format, _blob(format, 40, 300), num_threads=2)


@pytest.mark.parametrize("format", _FORMATS[2:])
def test_the_range_ends_where_the_reference_says(format: WeightFormat) -> None:
    """2**126 is too large; the float32 below it, of both signs, gives the reference's bytes."""
    weight = np.zeros((1, 40), np.float32)
    weight[0, 0] = -(2.0**126)
    blob = _blob(format, 1, 40)
    with pytest.raises(ValueError, match=r"^1 weights"):
        pack_into(weight, format, blob, num_threads=1)

    weight[0, :2] = np.nextafter(np.float32(2.0**126), np.float32(0)) * np.array(
        [1, -1], np.float32
    )
    pack_into(weight, format, blob, num_threads=1)

    np.testing.assert_array_equal(blob, pack(weight, format))


def test_ties_round_as_in_the_reference() -> None:
    """Halves of a scale go to the even code, with every zero point."""
    format = WeightFormat(kind="int4", group_size=32, has_zero_point=True)
    lowest = np.arange(-30, 1, dtype=np.float32) / 2
    weight = (lowest[:, None] + np.arange(31) / 2).astype(np.float32)
    blob = _blob(format, *weight.shape)

    pack_into(weight, format, blob, num_threads=1)

    np.testing.assert_array_equal(blob, pack(weight, format))


def test_arguments_that_do_not_fit_are_refused() -> None:
    """Type, layout, length and thread count are checked before anything is written."""
    format = _FORMATS[1]
    weight = np.ones((2, 8), np.float32)
    blob = _blob(format, 2, 8)

    with pytest.raises(ValueError, match="float64"):
        pack_into(weight.astype(np.float64), format, blob, num_threads=1)
    with pytest.raises(ValueError, match="contiguous"):
        pack_into(weight[:, ::2], format, blob, num_threads=1)
    with pytest.raises(ValueError, match=r"\(8,\)"):
        pack_into(weight[0], format, blob, num_threads=1)
    with pytest.raises(ValueError, match=r"\(255,\).*\(256,\)"):
        pack_into(weight, format, blob[:-1], num_threads=1)
    with pytest.raises(ValueError, match="num_threads is 0"):
        pack_into(weight, format, blob, num_threads=0)
    with pytest.raises(ValueError, match="float16"):
        unpack_into(blob, format, weight.astype(np.float16), num_threads=1)
    with pytest.raises(ValueError, match=">f4"):
        pack_into(weight.astype(">f4"), format, blob, num_threads=1)
    weight.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        unpack_into(blob, format, weight, num_threads=1)
    with pytest.raises(ValueError, match="0 x 8"):
        unpack_into(blob, format, weight[:0], num_threads=1)


_RUN = """
import sys
import numpy as np
from cpu_kernels.formats import WeightFormat
from cpu_kernels.packing import pack_into, unpack_into
format = WeightFormat(kind="float32")
blob, out = np.empty(16 * 4, np.uint8), np.empty((1, 1), np.float32)
pack_into(np.full((1, 1), 7, np.float32), format, blob, num_threads=2)
unpack_into(blob, format, out, num_threads=2)
print(out[0, 0], "numba" in sys.modules)
"""


def test_compiled_once_numba_is_not_loaded() -> None:
    """A second process takes the object code from the folder."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", _RUN], capture_output=True, text=True, check=True
        )

    assert done.stdout == "7.0 False\n"

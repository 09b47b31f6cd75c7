"""Every compiled operation equals its Python twin."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels import simd
from cpu_kernels.simd import LANES, TILE


@numba.njit
def _use_all(stored: Any, x: Any, y: Any, count: int) -> None:
    # two vectors of x, then one result after the other in y
    a = simd.load(x, 0)
    b = simd.load(x, LANES)
    simd.store(y, 0, simd.add(a, b))
    simd.store(y, LANES, simd.subtract(a, b))
    simd.store(y, 2 * LANES, simd.multiply(a, b))
    simd.store(y, 3 * LANES, simd.maximum(a, b))
    simd.store(y, 4 * LANES, simd.exp2(b))
    simd.store(y, 5 * LANES, simd.load(stored, 1))
    simd.store(y, 6 * LANES, simd.load_first(stored, 2, count))
    simd.store_first(y, 7 * LANES, count, simd.splat(x[0]))
    simd.store(y, 8 * LANES, simd.splat(simd.lane_sum(a)))
    simd.store(y, 9 * LANES, simd.splat(simd.lane_max(a)))
    simd.prefetch(stored, 0)
    tile = simd.zero_tile()
    c, d = simd.subtract(a, b), simd.add(a, b)
    tile = simd.add_outer(tile, a, b, c, d, d, c, b, a)
    simd.store_tile(y, 10 * LANES, TILE * LANES, tile)
    loaded = simd.load_tile(y, 10 * LANES, TILE * LANES)
    simd.store_lane_sums(y, 26 * LANES, TILE, loaded)


def _stored(dtype: Any) -> Any:
    values = np.random.default_rng(1).standard_normal(4 * LANES).astype(np.float32)
    if dtype == np.int16:
        return values.astype(np.float16).view(np.int16)
    return values if dtype == np.float32 else (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int16])
def test_compiled_operations_equal_their_twins(dtype: Any) -> None:
    """One function over all operations gives the same array compiled and in Python."""
    x = np.random.default_rng(0).standard_normal(2 * LANES).astype(np.float32)
    x[LANES:] = -np.abs(x[LANES:]) * 20
    x[LANES : LANES + 3] = [-np.inf, np.nan, -200.0]  # for exp2
    compiled = np.full(32 * LANES, np.float32(7))
    python = compiled.copy()

    _use_all(_stored(dtype), x, compiled, LANES - 3)
    with np.errstate(invalid="ignore"):
        _use_all.py_func(_stored(dtype), x, python, LANES - 3)

    # 4e-6: lane sums in another order
    np.testing.assert_allclose(compiled, python, rtol=4e-6, atol=1e-4)


def test_exp2_is_zero_below_the_range_and_keeps_nan() -> None:
    """2**-inf and 2**-200 are zero and NaN does not vanish."""

    @numba.njit
    def apply(x: Any, y: Any) -> None:
        simd.store(y, 0, simd.exp2(simd.load(x, 0)))

    x = np.linspace(-30, 0, LANES, dtype=np.float32)
    x[:3] = [-np.inf, -200.0, np.nan]
    y = np.empty(LANES, np.float32)
    apply(x, y)

    assert y[:2].tolist() == [0.0, 0.0]
    assert np.isnan(y[2])
    np.testing.assert_allclose(y[3:], np.exp2(x[3:].astype(np.float64)), rtol=3e-7)


def test_fetch_add_returns_what_was_there() -> None:
    """The compiled and the Python form both return the old value and leave the sum."""

    @numba.njit
    def twice(counter: Any) -> int:
        return simd.fetch_add(counter, 1, 5) + simd.fetch_add(counter, 1, 2)

    compiled, python = np.array([0, 10]), np.array([0, 10])

    assert (twice(compiled), twice.py_func(python)) == (25, 25)
    assert compiled.tolist() == python.tolist() == [0, 17]


def convert_float16(stored: NDArray[np.int16], values: NDArray[np.float32]) -> Any:
    """Widen all of `stored` and round all of `values`, compiled anew."""

    @numba.njit
    def convert(stored: Any, widened: Any, values: Any, rounded: Any) -> None:
        for i in range(0, len(stored), LANES):
            simd.store(widened, i, simd.load(stored, i))
        for i in range(0, len(values), LANES):
            simd.store(rounded, i, simd.load(values, i))

    widened = np.empty(len(stored), np.float32)
    rounded = np.empty(len(values), np.int16)
    convert(stored, widened, values, rounded)
    return widened, rounded


@pytest.mark.parametrize("has_float16", [True, False], ids=["instructions", "integers"])
def test_float16_is_widened_and_rounded_as_numpy_does(
    monkeypatch: pytest.MonkeyPatch, has_float16: bool
) -> None:
    """All bit patterns; every float16, the middle of every two, and their neighbours."""
    monkeypatch.setattr(simd, "_HAS_FLOAT16", has_float16 and simd._HAS_FLOAT16)
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    floats = every.astype(np.float32)
    finite = floats[np.isfinite(floats)]
    with np.errstate(over="ignore"):
        above = np.nextafter(every, np.float16(np.inf)).astype(np.float32)[np.isfinite(floats)]
    above[np.isinf(above)] = 65536
    middle = (finite + above) / 2
    places = np.concatenate([finite, middle, [65520.0, 1e30, -1e30, 1e-30, 1e-45, -1e-45]])
    places = places.astype(np.float32)
    around = [np.nextafter(places, np.float32(sign * np.inf)) for sign in (-1, 1)]
    special = np.array([np.nan, -np.nan, np.inf, -np.inf] * 4 * LANES, np.float32)
    values = np.concatenate([places, *around, special])
    values = values[: len(values) // LANES * LANES]

    widened, rounded = convert_float16(every.view(np.int16), values)

    np.testing.assert_array_equal(widened, floats)
    np.testing.assert_array_equal(np.signbit(widened), np.signbit(floats))
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(rounded.view(np.float16), expected)
    np.testing.assert_array_equal(rounded < 0, np.signbit(expected))


def test_a_nan_of_few_bits_stays_one_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits that float16 lacks may be all it has: it does not become infinity."""
    monkeypatch.setattr(simd, "_HAS_FLOAT16", False)
    few = np.full(LANES, 0x7F800001, np.uint32).view(np.float32)

    _, rounded = convert_float16(np.zeros(LANES, np.int16), few)

    assert rounded.tolist() == [0x7E00] * LANES

"""The small steps equal float64 and the torch functions of the model, for any shape and format."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels import elementwise, elementwise_kernels, simd
from cpu_kernels.calls import Chain, Link, run_link
from cpu_kernels.compiling import Source
from cpu_kernels.elementwise import (
    add_residual,
    add_residual_link,
    prepare_qkv,
    prepare_qkv_link,
    rms_norm,
    rms_norm_link,
    rotary_tables,
    route,
    route_link,
    silu_multiply,
    silu_multiply_link,
)
from cpu_kernels.formats import WeightFormat, from_bfloat16_bits, pack, to_bfloat16_bits
from cpu_kernels.linear import PackedMatrix, linear, linear_link
from cpu_kernels.scratch import Scratch
from cpu_kernels.simd import LANES
from hetero.model import norm, rotary
from hetero.model.mlp import gated

Format = Literal["float32", "bfloat16", "float16"]
QkNorm = Literal["none", "head", "full"]
_HIDDEN: tuple[Format, ...] = ("float32", "bfloat16")

_widths = st.integers(1, 3 * LANES + 2)
_tokens = st.integers(0, 3)
_seeds = st.integers(0, 1000)
_hidden = st.sampled_from(_HIDDEN)


def _random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _stored(values: NDArray[Any], number_format: str) -> NDArray[Any]:
    values = np.asarray(values, np.float32)
    return to_bfloat16_bits(values) if number_format == "bfloat16" else values.astype(number_format)


def _widened(stored: NDArray[Any]) -> NDArray[np.float32]:
    return from_bfloat16_bits(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)


def _nan(number_format: str, *shape: int) -> NDArray[Any]:
    return _stored(np.full(shape, np.nan, np.float32), number_format)


def _tensor(stored: NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if stored.dtype == np.uint16 else tensor


def _bits(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = (
        tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    ).numpy()
    return array


def _assert_near(actual: NDArray[Any], expected: NDArray[Any], tolerance: float = 2e-6) -> None:
    """Within the tolerance, beside the rounding to the stored format."""
    relative = {"float32": 0.0, "uint16": 2.0**-8, "float16": 2.0**-11}[actual.dtype.name]
    np.testing.assert_allclose(
        _widened(actual), expected, rtol=relative + tolerance, atol=tolerance
    )


def _assert_within_one_step(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal bfloat16, or neighbours."""
    assert actual.dtype == expected.dtype == np.uint16
    steps = np.abs(actual.astype(np.int32) - expected.astype(np.int32))
    is_tiny = np.maximum(_widened(actual), _widened(expected)) < 1e-30  # -0 and 0 are no neighbours
    assert (steps[~is_tiny] <= 1).all()


class TestRmsNorm:
    """rms_norm."""

    @given(_tokens, _widths, _hidden, _hidden, _hidden, _seeds)
    @settings(max_examples=60, deadline=None)
    def test_it_equals_float64(
        self, tokens: int, width: int, x_format: str, weight_format: str, out_format: str, seed: int
    ) -> None:
        """Odd widths, no tokens, every mix of formats; x is rounded once more than float64 is."""
        x = _stored(_random(seed, tokens, width), x_format)
        weight = _stored(_random(seed + 1, width), weight_format)
        out = _nan(out_format, tokens, width)
        rms_norm(x, weight, 1e-5, out)

        exact = _widened(x).astype(np.float64)
        normed = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5)
        expected = normed * _widened(weight)
        _assert_near(out, expected, 2e-6 if x_format == "float32" else 2.0**-7)

    def test_it_equals_the_model(self) -> None:
        """float32 within 1e-6, bfloat16 to a step."""
        x, weight = _random(0, 5, 2048), _random(1, 2048)
        out = np.full_like(x, np.nan)
        rms_norm(x, weight, 1e-6, out)
        expected = norm.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-6)
        np.testing.assert_allclose(out, expected.numpy(), rtol=1e-6, atol=1e-6)

        short, short_weight = to_bfloat16_bits(x), to_bfloat16_bits(weight)
        short_out = np.full_like(short, 0x7FC0)
        rms_norm(short, short_weight, 1e-6, short_out)
        _assert_within_one_step(
            short_out, _bits(norm.rms_norm(_tensor(short), _tensor(short_weight), 1e-6))
        )

    def test_nan_spreads_over_its_row_only(self) -> None:
        """Infinity over infinity is NaN too; the other elements become 0 as in numpy."""
        x = np.ones((3, 20), np.float32)
        x[0, 3], x[1, 4] = np.nan, np.inf
        out = np.zeros_like(x)
        rms_norm(x, np.ones(20, np.float32), 0.0, out)

        assert np.isnan(out[0]).all()
        assert np.isnan(out[1, 4]) and (np.delete(out[1], 4) == 0).all()
        assert (out[2] == 1).all()

    def test_it_may_write_over_x(self) -> None:
        """The same array in and out."""
        x = _random(0, 3, 50)
        out = np.empty_like(x)
        rms_norm(x, x[0].copy(), 1e-6, out)
        rms_norm(x, x[0].copy(), 1e-6, x)

        assert np.array_equal(x, out)


class TestSiluMultiply:
    """silu_multiply."""

    @given(_tokens, _widths, _hidden, _hidden, _seeds)
    @settings(max_examples=40, deadline=None)
    def test_it_equals_float64(
        self, tokens: int, width: int, in_format: str, out_format: str, seed: int
    ) -> None:
        """Gates up to 40, where the sigmoid is 0 or 1."""
        gate_up = _stored(_random(seed, tokens, 2 * width) * 10, in_format)
        out = _nan(out_format, tokens, width)
        silu_multiply(gate_up, out)

        gate, up = np.split(_widened(gate_up).astype(np.float64), 2, axis=1)
        expected = gate / (1 + np.exp(-gate)) * up
        _assert_near(out, expected, 4e-6 if in_format == "float32" else 2.0**-8)

    def test_it_equals_the_model(self) -> None:
        """float32 within 1e-6, bfloat16 to a step."""
        gate_up = _random(0, 6, 2 * 768) * 3
        out = np.full((6, 768), np.nan, np.float32)
        silu_multiply(gate_up, out)
        expected = gated(torch.from_numpy(gate_up)).numpy()
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)

        short, short_out = to_bfloat16_bits(gate_up), np.full((6, 768), 0x7FC0, np.uint16)
        silu_multiply(short, short_out)
        _assert_within_one_step(short_out, _bits(gated(_tensor(short))))

    @given(_tokens, _widths, _hidden, _seeds)
    @settings(max_examples=40, deadline=None)
    def test_a_bias_is_added_first(
        self, tokens: int, width: int, out_format: str, seed: int
    ) -> None:
        """The same bits as of numpy's sum in float32."""
        gate_up, bias = _random(seed, tokens, 2 * width) * 5, _random(seed + 1, 2 * width) * 5
        out, expected = _nan(out_format, tokens, width), _nan(out_format, tokens, width)
        silu_multiply(gate_up, out, bias=bias)
        silu_multiply(gate_up + bias, expected)

        np.testing.assert_array_equal(out, expected)

    def test_a_bias_that_does_not_fit_is_refused(self) -> None:
        """One of another width or format, and any with bfloat16, which is rounded already."""
        gate_up, out = np.ones((2, 6), np.float32), np.full((2, 3), 7, np.float32)
        with pytest.raises(ValueError, match=r"bias is float32 \(3,\).* must be .*float32 \(6\)"):
            silu_multiply(gate_up, out, bias=gate_up[0, :3].copy())
        with pytest.raises(ValueError, match=r"bias is float64 \(6,\).* must be .*float32 \(6\)"):
            silu_multiply(gate_up, out, bias=np.ones(6))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"gate_up is uint16 \(2, 6\) but must be float32"):
            silu_multiply(to_bfloat16_bits(gate_up), out, bias=gate_up[0])

        assert (out == 7).all()

    def test_extremes_are_those_of_torch(self) -> None:
        """Infinities, NaN, huge gates and zeros."""
        gate = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30, 0.0, 89.0, -80.0], np.float32)
        gate_up = np.concatenate([gate, np.ones(8, np.float32)])[None]
        out = np.zeros((1, 8), np.float32)
        silu_multiply(gate_up, out)

        expected = gated(torch.from_numpy(gate_up)).numpy()
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-30)


class TestAddResidual:
    """add_residual."""

    @given(_tokens, _widths, _hidden, st.booleans(), _seeds)
    @settings(max_examples=40, deadline=None)
    def test_it_equals_float64(
        self, tokens: int, width: int, x_format: str, has_bias: bool, seed: int
    ) -> None:
        """With and without bias, into a new array and over x."""
        x = _stored(_random(seed, tokens, width), x_format)
        y, bias = _random(seed + 1, tokens, width), _random(seed + 2, width)
        expected = _widened(x).astype(np.float64) + y + (bias if has_bias else 0)
        out = _nan(x_format, tokens, width)
        add_residual(x, y, bias if has_bias else None, out)
        _assert_near(out, expected)

        add_residual(x, y, bias if has_bias else None, x)
        assert np.array_equal(x, out)

    def test_it_equals_the_model(self) -> None:
        """The same bits as torch's sum where y is a bfloat16 too."""
        x, y = to_bfloat16_bits(_random(0, 4, 100)), to_bfloat16_bits(_random(1, 4, 100))
        out = np.zeros_like(x)
        add_residual(x, _widened(y), None, out)

        assert np.array_equal(out, _bits(_tensor(x) + _tensor(y)))

    def test_special_values_are_those_of_numpy(self) -> None:
        """Infinities, their difference and NaN, in both formats."""
        x = np.array([[np.inf, np.inf, np.nan, 1.0, 3e38]], np.float32)
        y = np.array([[1.0, -np.inf, 1.0, np.nan, 3e38]], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = x + y
        for number_format in _HIDDEN:
            out = _stored(np.zeros_like(x), number_format)
            add_residual(_stored(x, number_format), y, None, out)
            np.testing.assert_array_equal(_widened(out), expected)


class TestRoute:
    """route."""

    @given(st.data(), _tokens, st.integers(1, 70), st.booleans(), _seeds)
    @settings(max_examples=60, deadline=None)
    def test_it_equals_a_stable_sort_of_float64(
        self, data: st.DataObject, tokens: int, experts: int, is_normed: bool, seed: int
    ) -> None:
        """Any k up to all experts, one expert, and ties: logits are rounded to quarters."""
        top_k = data.draw(st.integers(1, experts))
        logits = (_random(seed, tokens, experts) * 12).round() / np.float32(4)
        ids = np.full((tokens, top_k), -1)
        weights = np.full((tokens, top_k), np.nan, np.float32)
        route(logits, top_k, is_normed, ids, weights)

        expected_ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
        probabilities = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        expected = np.take_along_axis(probabilities, expected_ids, axis=1)
        if is_normed:
            expected /= expected.sum(axis=1, keepdims=True)
        assert np.array_equal(ids, expected_ids)
        np.testing.assert_allclose(weights, expected, rtol=4e-6)

    @pytest.mark.parametrize("is_normed", [False, True])
    def test_it_equals_the_model(self, is_normed: bool) -> None:
        """torch's softmax and topk, within 1e-6."""
        logits = _random(0, 9, 64)
        ids, weights = np.empty((9, 8), np.int64), np.empty((9, 8), np.float32)
        route(logits, 8, is_normed, ids, weights)

        probabilities = torch.from_numpy(logits).softmax(dim=-1, dtype=torch.float32)
        expected, expected_ids = probabilities.topk(8, dim=-1)
        if is_normed:
            expected /= expected.sum(dim=-1, keepdim=True)
        assert np.array_equal(ids, expected_ids.numpy())
        np.testing.assert_allclose(weights, expected.numpy(), rtol=1e-6, atol=1e-6)

    @given(st.integers(1, 40), st.sets(st.integers(0, 39), min_size=1), st.data())
    @settings(max_examples=40, deadline=None)
    def test_nan_reaches_the_weights_and_never_the_ids(
        self, experts: int, bad: set[int], data: st.DataObject
    ) -> None:
        """NaN, infinity, or nothing but -infinity: weights NaN, experts different and in range."""
        top_k = data.draw(st.integers(1, experts))
        value = data.draw(st.sampled_from([np.nan, np.inf]))
        logits = _random(0, 3, experts)
        logits[0, sorted({place % experts for place in bad})] = value
        logits[2] = -np.inf
        ids, weights = np.full((3, top_k), -1), np.zeros((3, top_k), np.float32)
        route(logits, top_k, True, ids, weights)

        assert np.isnan(weights[[0, 2]]).all()
        assert np.isfinite(weights[1]).all()
        for row in ids:
            assert len(set(row)) == top_k
            assert row.min() >= 0 and row.max() < experts

    def test_experts_at_minus_infinity_weigh_nothing(self) -> None:
        """Masked experts are chosen last, with weight 0."""
        logits = np.full((1, 20), -np.inf, np.float32)
        logits[0, [7, 19]] = 0.0
        ids, weights = np.empty((1, 3), np.int64), np.empty((1, 3), np.float32)
        route(logits, 3, True, ids, weights)

        assert ids[0].tolist() == [7, 19, 0]
        assert weights[0].tolist() == [0.5, 0.5, 0.0]

    def test_top_k_beyond_the_experts_is_refused(self) -> None:
        """More experts than there are, and none."""
        for top_k in (0, 5):
            ids, weights = np.empty((1, top_k), np.int64), np.empty((1, top_k), np.float32)
            with pytest.raises(ValueError, match=f"top_k is {top_k} but must be 1 to 4"):
                route(np.zeros((1, 4), np.float32), top_k, True, ids, weights)


class QkvCase:
    """Random projections, norms and slots, and NaN where prepare_qkv is to write."""

    def __init__(
        self,
        tokens: int,
        heads: int,
        kv_heads: int,
        width: int,
        *,
        qk_norm: QkNorm = "none",
        clip: float | None = None,
        weight_format: str = "float32",
        cache_format: str = "float32",
        has_bias: bool = False,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.qk_norm: QkNorm = qk_norm
        self.clip, self.cache_format = clip, cache_format
        self.qkv = _random(seed, tokens, (heads + 2 * kv_heads) * width)
        self.bias = _random(seed + 3, self.qkv.shape[1]) if has_bias else None
        self.block_size, self.num_blocks = 5, tokens + 1
        self.slots = rng.permutation(self.block_size * self.num_blocks)[:tokens]
        sizes = {"none": (0, 0), "head": (width, width)}.get(
            qk_norm, (heads * width, kv_heads * width)
        )
        self.norms: list[NDArray[Any] | None] = [
            None if qk_norm == "none" else _stored(_random(seed + 1 + i, size), weight_format)
            for i, size in enumerate(sizes)
        ]
        self.positions = rng.integers(0, 5000, tokens)
        self.inv_freq = (1e4 ** -np.linspace(0, 1, width // 2)).astype(np.float32)
        self.cos = np.full((tokens, width // 2), np.nan, np.float32)
        self.sin = np.full((tokens, width // 2), np.nan, np.float32)
        rotary_tables(self.positions, self.inv_freq, self.cos, self.sin)
        self.q_out = np.full((tokens, heads, width), np.nan, np.float32)
        shape = (self.num_blocks, kv_heads, self.block_size, width)
        self.caches = [_nan(cache_format, *shape) for _ in range(2)]

    def prepare(self, num_threads: int = 1) -> None:
        """Run the kernel."""
        prepare_qkv(*self.step(), **self.keywords(), num_threads=num_threads)

    def link(self) -> Link:
        """What `prepare` runs."""
        return prepare_qkv_link(*self.step(), **self.keywords())

    def step(self) -> tuple[NDArray[Any], ...]:
        """The arguments that differ between steps."""
        return self.qkv, self.cos, self.sin, self.slots

    def keywords(self) -> dict[str, Any]:
        """The others."""
        return {
            "qk_norm": self.qk_norm,
            "q_norm": self.norms[0],
            "k_norm": self.norms[1],
            "norm_eps": 1e-5,
            "clip": self.clip,
            "q_out": self.q_out,
            "key_cache": self.caches[0],
            "value_cache": self.caches[1],
            "bias": self.bias,
        }

    def expected(self) -> list[NDArray[np.float64]]:
        """Queries, keys and values by token, in float64."""
        biased = self.qkv.astype(np.float64) + (0 if self.bias is None else self.bias)
        heads = biased.reshape(*self.q_out.shape[:1], self.heads + 2 * self.kv_heads, self.width)
        parts = np.split(heads, [self.heads, self.heads + self.kv_heads], axis=1)
        limit = np.inf if self.clip is None else self.clip
        for i, weight in enumerate(self.norms):
            if self.qk_norm == "full" and weight is not None:
                parts[i] = self._normed(parts[i], (1, 2)) * _widened(weight).reshape(-1, self.width)
        parts = [part.clip(-limit, limit) for part in parts]
        for i, weight in enumerate(self.norms):
            if self.qk_norm == "head" and weight is not None:
                parts[i] = self._normed(parts[i], (2,)) * _widened(weight)
        angles = (self.positions.astype(np.float32)[:, None] * self.inv_freq).astype(np.float64)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        for i in range(2):
            a, b = np.split(parts[i], 2, axis=2)
            parts[i] = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
        return parts

    @staticmethod
    def _normed(x: NDArray[np.float64], axes: tuple[int, ...]) -> NDArray[np.float64]:
        normed: NDArray[np.float64] = x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + 1e-5)
        return normed

    def rows(self) -> list[NDArray[Any]]:
        """The cache's keys and values of each token."""
        blocks, places = self.slots // self.block_size, self.slots % self.block_size
        return [cache[blocks, :, places] for cache in self.caches]

    def assert_right(self) -> None:
        """Compare with float64; nothing but the slots may be written."""
        self.prepare()
        for actual, expected in zip([self.q_out, *self.rows()], self.expected(), strict=True):
            _assert_near(actual, expected, 1e-5)
        untouched = np.ones((self.num_blocks, self.block_size), bool)
        untouched.ravel()[self.slots] = False
        for cache in self.caches:
            assert np.isnan(_widened(cache).swapaxes(1, 2)[untouched]).all()


class TestPrepareQkv:
    """prepare_qkv and rotary_tables."""

    @given(
        _tokens,
        st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]),
        st.integers(1, LANES + 2),
        st.sampled_from(["none", "head", "full"]),
        st.sampled_from([None, 0.8]),
        _hidden,
        st.sampled_from(["float32", "bfloat16", "float16"]),
        st.booleans(),
        _seeds,
    )
    @example(2, (32, 4), 64, "head", None, "bfloat16", "bfloat16", True, 0)
    @example(2, (32, 4), 64, "full", 0.8, "bfloat16", "bfloat16", True, 0)
    @settings(max_examples=60, deadline=None)
    def test_it_equals_float64(
        self,
        tokens: int,
        heads: tuple[int, int],
        half: int,
        qk_norm: QkNorm,
        clip: float | None,
        weight_format: str,
        cache_format: str,
        has_bias: bool,
        seed: int,
    ) -> None:
        """Every norm, with and without clip and bias, odd half widths, every cache format."""
        QkvCase(
            tokens,
            *heads,
            2 * half,
            qk_norm=qk_norm,
            clip=clip,
            weight_format=weight_format,
            cache_format=cache_format,
            has_bias=has_bias,
            seed=seed,
        ).assert_right()

    @pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
    def test_a_bias_is_added_first(self, qk_norm: QkNorm) -> None:
        """The same bits as of numpy's sum in float32, and qkv stays as it was."""
        case = QkvCase(3, 4, 2, 2 * LANES + 6, qk_norm=qk_norm, clip=0.7, has_bias=True)
        other = QkvCase(3, 4, 2, 2 * LANES + 6, qk_norm=qk_norm, clip=0.7)
        before = case.qkv.copy()
        case.prepare()
        other.qkv += np.asarray(case.bias)
        other.prepare()

        assert np.array_equal(case.qkv, before)
        for actual, expected in zip(
            [case.q_out, *case.rows()], [other.q_out, *other.rows()], strict=True
        ):
            assert np.array_equal(actual, expected)

    def test_a_link_checks_its_slots_when_it_is_built(self) -> None:
        """A link of slots outside the cache is not made; slots of later steps are its user's."""
        case = QkvCase(2, 1, 1, 4)
        link = case.link()
        case.slots[:] = [14, 0]
        run_link(link, num_threads=1)
        assert np.isfinite(case.caches[0][[2, 0], 0, [4, 0]]).all()

        case.slots[1] = 15
        with pytest.raises(ValueError, match="slots are 14 to 15 but must be 0 to 14"):
            case.link()

    def test_it_equals_the_model(self) -> None:
        """The model's norm of heads and rotary in float32, within 1e-6 of values up to 6."""
        case = QkvCase(3, 8, 2, 128, qk_norm="head")
        case.prepare()

        heads = torch.from_numpy(case.qkv).view(3, -1, 128)
        normed = [
            norm.rms_norm(part, _tensor(np.asarray(weight)), 1e-5)
            for part, weight in zip((heads[:, :8], heads[:, 8:10]), case.norms, strict=True)
        ]
        positions, inv_freq = torch.from_numpy(case.positions), torch.from_numpy(case.inv_freq)
        cos, sin = rotary.rotary_rows(positions, inv_freq, torch.float32)
        rotated = rotary.apply_rotary(torch.cat(normed, dim=1), cos, sin).numpy()
        np.testing.assert_allclose(case.q_out, rotated[:, :8], rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(case.rows()[0], rotated[:, 8:], rtol=1e-6, atol=2e-6)
        assert np.array_equal(case.rows()[1], heads[:, 10:].numpy())

    def test_nan_and_infinity_are_kept(self) -> None:
        """A clip bounds infinities and keeps NaN; a NaN stays in its head."""
        case = QkvCase(1, 2, 2, 4, clip=3.0)
        case.qkv[0, 0], case.qkv[0, 4], case.qkv[0, -1] = np.nan, np.inf, np.nan
        case.prepare()

        keys, values = case.rows()
        assert np.isnan(case.q_out[0, 0, [0, 2]]).all()
        assert np.isfinite(case.q_out[0, 1]).all() and np.isfinite(keys).all()
        assert np.isnan(values[0, 1, 3]) and np.isfinite(values[0, 0]).all()

    @pytest.mark.parametrize("slot", [-1, 15, 1 << 40])
    def test_a_slot_outside_the_cache_is_refused(self, slot: int) -> None:
        """Nothing is written, not even the other tokens."""
        case = QkvCase(2, 1, 1, 4)
        case.slots = np.array([3, slot])
        with pytest.raises(ValueError, match=rf"{slot}.* must be 0 to 14: 3 blocks of 5 tokens"):
            case.prepare()

        assert np.isnan(case.q_out).all() and np.isnan(case.caches[0]).all()

    def test_arguments_that_do_not_fit_are_named(self) -> None:
        """Each array in turn."""
        case = QkvCase(2, 4, 2, 8, qk_norm="full")
        case.norms[1] = case.norms[0]
        with pytest.raises(ValueError, match=r"k_norm is float32 \(32,\).* must be .*\(16\)"):
            case.prepare()
        case = QkvCase(2, 4, 2, 8, qk_norm="head")
        case.norms[0] = None
        with pytest.raises(ValueError, match=r"q_norm is float32 \(0,\).* must be .*\(8\)"):
            case.prepare()
        case = QkvCase(2, 4, 2, 8)
        case.caches[0] = np.asfortranarray(case.caches[0])
        with pytest.raises(ValueError, match=r"key_cache is .* strides \(4, 12, 24, 120\)"):
            case.prepare()
        case = QkvCase(2, 4, 2, 8)
        case.caches[1] = case.caches[1].astype(np.float16)
        with pytest.raises(ValueError, match=r"value_cache is float16 .* must be .* float32"):
            case.prepare()
        case = QkvCase(2, 4, 2, 8)
        case.slots = case.slots.astype(np.int32)
        with pytest.raises(ValueError, match="slots is int32"):
            case.prepare()
        case = QkvCase(2, 4, 2, 8)
        case.qkv = case.qkv[:, :-1].copy()
        with pytest.raises(ValueError, match=r"qkv is float32 \(2, 63\).* \(2, 64\)"):
            case.prepare()
        case = QkvCase(2, 4, 2, 8)
        case.sin = case.sin[:1]
        with pytest.raises(ValueError, match=r"sin is float32 \(1, 4\)"):
            case.prepare()
        case = QkvCase(2, 4, 2, 8, has_bias=True)
        case.bias = np.asarray(case.bias)[:-1]
        with pytest.raises(ValueError, match=r"bias is float32 \(63,\).* must be .*float32 \(64\)"):
            case.prepare()
        case.bias = _stored(np.ones(64), "bfloat16")
        with pytest.raises(ValueError, match=r"bias is uint16 \(64,\).* must be .*float32 \(64\)"):
            case.prepare()
        case = QkvCase(2, 2, 2, 4)
        case.q_out = np.empty((2, 2, 3), np.float32)
        case.caches = [np.zeros((1, 2, 5, 3), np.float32) for _ in range(2)]
        with pytest.raises(ValueError, match="heads are 3 wide"):
            case.prepare()


@dataclass(frozen=True, slots=True)
class Step:
    """A link with its arrays by the names that its call has for them."""

    link: Link
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]

    def run(self) -> list[NDArray[Any]]:
        """What a run writes into outputs of ones."""
        for array in self.outputs.values():
            array.fill(1)
        run_link(self.link, num_threads=2)
        return [array.copy() for array in self.outputs.values()]


def _rms_norm_step(seed: int) -> Step:
    x, weight = to_bfloat16_bits(_random(seed, 5, 50)), _random(seed + 1, 50)
    out = np.empty((5, 50), np.float32)
    link = rms_norm_link(x, weight, 1e-6, out)
    return Step(link, {"x": x, "weight": weight}, {"out": out})


def _silu_multiply_step(seed: int) -> Step:
    gate_up, bias = _random(seed, 5, 100), _random(seed + 1, 100)
    out = np.empty((5, 50), np.uint16)
    link = silu_multiply_link(gate_up, out, bias=bias)
    return Step(link, {"gate_up": gate_up, "bias": bias}, {"out": out})


def _add_residual_step(seed: int) -> Step:
    x, y, bias = to_bfloat16_bits(_random(seed, 5, 50)), _random(seed, 5, 50), _random(seed, 50)
    out = np.empty((5, 50), np.uint16)
    return Step(add_residual_link(x, y, bias, out), {"x": x, "y": y, "bias": bias}, {"out": out})


def _route_step(seed: int) -> Step:
    logits = _random(seed, 5, 50)
    ids, weights = np.empty((5, 4), np.int64), np.empty((5, 4), np.float32)
    link = route_link(logits, 4, True, ids, weights)
    return Step(link, {"logits": logits}, {"ids": ids, "weights": weights})


def _prepare_qkv_step(seed: int) -> Step:
    case = QkvCase(5, 4, 2, 22, qk_norm="full", cache_format="float16", has_bias=True, seed=seed)
    inputs = dict(zip(("qkv", "cos", "sin", "slots"), case.step(), strict=True))
    names = ("q_norm", "k_norm", "bias")
    inputs |= {name: np.asarray(case.keywords()[name]) for name in names}
    outputs = {name: case.keywords()[name] for name in ("q_out", "key_cache", "value_cache")}
    return Step(case.link(), inputs, outputs)


every_step = pytest.mark.parametrize(
    "make_step",
    [_rms_norm_step, _silu_multiply_step, _add_residual_step, _route_step, _prepare_qkv_step],
)


class TestLinks:
    """Links of all steps."""

    @every_step
    def test_a_link_can_run_many_times(self, make_step: Callable[[int], Step]) -> None:
        """The same bits each time, and those of new numbers in the same arrays."""
        step, other = make_step(0), make_step(1)
        first, second = step.run(), step.run()
        for name, array in step.inputs.items():
            array[:] = other.inputs[name]
        third = step.run()

        for actual, expected in zip([*second, *third], [*first, *other.run()], strict=True):
            assert np.array_equal(actual, expected)

    @every_step
    def test_addresses_can_be_exchanged(self, make_step: Callable[[int], Step]) -> None:
        """The other arrays are read and written, those of before are not."""
        step, other = make_step(0), make_step(1)
        before, expected = step.run(), other.run()
        for name, array in (other.inputs | other.outputs).items():
            setattr(step.link.call, name, array.ctypes.data)
            if name in other.outputs:
                array.fill(1)
        run_link(step.link, num_threads=1)

        assert all(map(np.array_equal, other.outputs.values(), expected))
        assert all(map(np.array_equal, step.outputs.values(), before))
        assert not all(map(np.array_equal, before, expected))

    @pytest.mark.parametrize("make_step", [_silu_multiply_step, _add_residual_step])
    def test_a_bias_of_0_is_none(self, make_step: Callable[[int], Step]) -> None:
        """As a bias of zeros gives."""
        step = make_step(0)
        step.link.call.bias = 0
        actual = step.run()
        step.inputs["bias"].fill(0)
        step.link.call.bias = step.inputs["bias"].ctypes.data

        assert all(map(np.array_equal, actual, step.run()))

    @pytest.mark.parametrize("num_threads", [1, 2, 3])
    def test_a_chain_is_the_calls_one_after_the_other(
        self, num_threads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Norm, product, activation, product, sum, routing; items of two tokens; run twice."""
        monkeypatch.setattr(elementwise, "ITEM_ELEMENTS", 1)
        monkeypatch.setattr(elementwise, "FEW_TOKENS", 2)
        weight_format = WeightFormat(kind="bfloat16")
        matrices = [
            PackedMatrix(
                blob=pack(_random(rows, rows, columns), weight_format),
                weight_format=weight_format,
                num_rows=rows,
                num_columns=columns,
            )
            for rows, columns in ((60, 40), (40, 30))
        ]
        x, weight, bias = to_bfloat16_bits(_random(0, 9, 40)), _random(1, 40), _random(2, 60)

        def arrays() -> list[NDArray[Any]]:
            shapes = [(9, 40), (9, 60), (9, 30), (9, 40), (9, 40), (9, 3), (9, 3)]
            types = [np.uint16, *[np.float32] * 3, np.uint16, np.int64, np.float32]
            return [np.zeros(s, t) for s, t in zip(shapes, types, strict=True)]

        normed, gate_up, h, y, total, ids, shares = expected = arrays()
        how: Any = {"compute": "float", "num_threads": num_threads}
        rms_norm(x, weight, 1e-6, normed)
        linear(normed, matrices[0], **how, scratch=Scratch(), out=gate_up)
        silu_multiply(gate_up, h, bias=bias)
        linear(h, matrices[1], **how, scratch=Scratch(), out=y)
        add_residual(x, y, None, total)
        route(y, 3, True, ids, shares)

        normed, gate_up, h, y, total, ids, shares = actual = arrays()
        links = [
            rms_norm_link(x, weight, 1e-6, normed),
            linear_link(normed, matrices[0], **how, scratch=Scratch(), out=gate_up),
            silu_multiply_link(gate_up, h, bias=bias),
            linear_link(h, matrices[1], **how, scratch=Scratch(), out=y),
            add_residual_link(x, y, None, total),
            route_link(y, 3, True, ids, shares),
        ]
        chain = Chain(links, num_threads=num_threads)
        for _ in range(2):
            for array in actual:
                array.fill(0)
            chain.run()
            assert all(map(np.array_equal, actual, expected))

    def test_a_small_step_is_one_item_and_a_prefill_is_many(self) -> None:
        """4 tokens of any width, 16 of 2048 elements; 512 of them are 32 items of 16."""
        weight = np.ones(2048, np.float32)
        counts = []
        for tokens in (0, 1, 16, 17, 512):
            x = np.zeros((tokens, 2048), np.float32)
            counts.append(rms_norm_link(x, weight, 0.0, x).call.num_items)
        assert counts == [0, 1, 1, 2, 32]

        gate_up, out = np.zeros((5, 80000), np.float32), np.zeros((5, 40000), np.float32)
        few, more = silu_multiply_link(gate_up[:4], out[:4]), silu_multiply_link(gate_up, out)
        assert few.call.num_items == 1
        assert more.call.num_items == 2

    def test_they_need_no_numba_once_compiled(self) -> None:
        """The second process finds all code on disk."""
        script = """
import sys
import numpy as np
from cpu_kernels.elementwise import *
x, y = np.ones((2, 8), np.float32), np.ones((2, 4), np.float32)
cache, line = np.zeros((1, 1, 2, 2), np.float32), np.ones((2, 1), np.float32)
rms_norm(x, x[0], 0.0, x)
silu_multiply(x, y, bias=x[0])
add_residual(x, x, None, x, num_threads=2)
route(y, 2, True, np.empty((2, 2), np.int64), np.empty((2, 2), np.float32))
prepare_qkv(
    x, line, line, np.array([0, 1]), qk_norm="none", q_norm=None, k_norm=None, norm_eps=0.0,
    clip=None, q_out=np.empty((2, 2, 2), np.float32), key_cache=cache, value_cache=cache.copy(),
)
print("numba" in sys.modules, float(x.sum()))
"""
        for _ in range(2):
            result = subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=True
            )
        assert result.stdout == "False 32.0\n"


def test_strides_formats_and_sizes_that_do_not_fit_are_named() -> None:
    """Every function says which array, its dtype, shape and strides."""
    x, weight = np.ones((4, 6), np.float32), np.ones(6, np.float32)
    with pytest.raises(ValueError, match=r"x is float32 \(4, 3\) with strides \(24, 8\)"):
        rms_norm(x[:, ::2], weight[:3], 0.0, np.empty((4, 3), np.float32))
    with pytest.raises(ValueError, match=r"weight is float32 \(6,\) with strides \(-4,\)"):
        rms_norm(x, weight[::-1], 0.0, x)
    with pytest.raises(ValueError, match=r"x is float64 \(4, 6\)"):
        rms_norm(x.astype(np.float64), weight, 0.0, x)
    with pytest.raises(ValueError, match=r"x is float32 \(6,\)"):
        rms_norm(weight, weight, 0.0, weight)
    with pytest.raises(ValueError, match=r"out is float32 \(3, 6\)"):
        rms_norm(x, weight, 0.0, x[:3])
    with pytest.raises(ValueError, match=r"gate_up is float32 \(4, 5\)"):
        silu_multiply(x[:, :5].copy(), np.empty((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"out is float32 \(4, 2\).*\(4, 3\)"):
        silu_multiply(x, np.empty((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"y is uint16"):
        add_residual(x, x.astype(np.uint16), None, x)
    with pytest.raises(ValueError, match=r"bias is float32 \(5,\)"):
        add_residual(x, x, weight[:5], x)
    with pytest.raises(ValueError, match=r"bias is float32 \(0,\)"):
        add_residual(x, x, weight[:0], x)
    with pytest.raises(ValueError, match=r"out is uint16"):
        add_residual(x, x, None, x.astype(np.uint16))
    with pytest.raises(ValueError, match=r"ids_out is int32"):
        route(x, 1, True, np.empty((4, 1), np.int32), np.empty((4, 1), np.float32))
    with pytest.raises(ValueError, match=r"weights_out is float32 \(4, 2\).*\(4, 1\)"):
        route(x, 1, True, np.empty((4, 1), np.int64), np.empty((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"cos_out is float32 \(4, 6\).*\(24, 6\)"):
        rotary_tables(np.arange(24), weight, x, x)


def test_read_only_arrays_are_read_and_not_written() -> None:
    """A mapped weight file is read-only; an output that is so is refused."""
    x, weight = _random(0, 2, 20), _random(1, 20)
    expected, out = np.empty_like(x), np.empty_like(x)
    rms_norm(x, weight, 1e-6, expected)
    weight.flags.writeable = False
    rms_norm(x, weight, 1e-6, out)

    assert np.array_equal(out, expected)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out is .* read-only but must be .* writeable"):
        rms_norm(x, weight, 1e-6, out)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_results_do_not_depend_on_threads(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each function has the same bits when its tokens are split over threads."""
    monkeypatch.setattr(elementwise, "ITEM_ELEMENTS", 1)
    monkeypatch.setattr(elementwise, "FEW_TOKENS", 1)
    x, y, weight = to_bfloat16_bits(_random(0, 37, 96)), _random(1, 37, 96), _random(2, 96)

    def run(num_threads: int) -> list[NDArray[Any]]:
        out = [np.full((37, 96), np.nan, np.float32), np.full((37, 48), np.nan, np.float32)]
        total, ids = np.zeros_like(x), np.full((37, 4), -1)
        shares = np.full((37, 4), np.nan, np.float32)
        rms_norm(x, weight, 1e-6, out[0], num_threads=num_threads)
        silu_multiply(x, out[1], num_threads=num_threads)
        add_residual(x, y, None, total, num_threads=num_threads)
        route(y, 4, True, ids, shares, num_threads=num_threads)
        case = QkvCase(37, 4, 2, 8, qk_norm="head", cache_format="bfloat16")
        case.prepare(num_threads)
        return [*out, total, ids, shares, case.q_out, *case.rows()]

    for actual, expected in zip(run(num_threads), run(1), strict=True):
        assert np.array_equal(actual, expected)


def test_threads_below_one_are_refused() -> None:
    """And mistakes in shapes are found with threads as well."""
    x = np.ones((4, 6), np.float32)
    with pytest.raises(ValueError, match="num_threads is 0"):
        add_residual(x, x, None, x, num_threads=0)
    with pytest.raises(ValueError, match=r"y is float32 \(3, 6\)"):
        add_residual(x, x[:3], None, x, num_threads=2)


@numba.njit
def _store_all(x: Any, whole: Any, part: Any, rounded: Any, size: int) -> None:
    for i in range(0, size, LANES):
        value = simd.load(x, i)
        simd.store(whole, i, value)
        simd.store_first(part, i, LANES - 1, value)
        simd.store(rounded, i, simd.round_as(whole, value))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_vectors_are_stored_rounded_to_nearest_even(dtype: Any) -> None:
    """Random bits, ties, denormals, infinities and NaN; the Python twins store the same."""
    size = 256 * LANES
    bits = np.random.default_rng(0).integers(0, 1 << 32, size, dtype=np.uint64).astype(np.uint32)
    bits[::3] = bits[::3] & 0xFFFF8000 | 0x8000  # ties of bfloat16
    x = bits.view(np.float32)
    x[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-41]
    if dtype == np.int16:
        # as many powers of two as float16 has, denormals and overflow included
        x[6:] = np.ldexp(_random(0, size - 6), np.arange(6, size) % 45 - 26)
        with np.errstate(over="ignore"):
            x = x.astype(np.float16).astype(np.float32)
        x = (x * np.float32(1 + 2**-11)).astype(np.float32)  # ties of float16
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16).view(np.int16) if dtype == np.int16 else to_bfloat16_bits(x)
    results = []
    for store_all in (_store_all, _store_all.py_func):
        whole, part = np.full(size, 7, dtype), np.full(size, 7, dtype)
        rounded = np.empty(size, np.float32)
        with np.errstate(over="ignore"):
            store_all(x, whole, part, rounded, size)
        results.append((whole, part, rounded))

    is_nan = np.isnan(x)
    for whole, part, rounded in results:
        assert np.array_equal(whole[~is_nan], expected[~is_nan])
        is_last = np.arange(size) % LANES == LANES - 1
        assert (part[is_last] == 7).all()
        assert np.array_equal(part[~is_last], whole[~is_last])
        assert np.array_equal(np.isnan(rounded), is_nan)
    np.testing.assert_array_equal(results[0][2], results[1][2])


def _memory_at(address: int, dtype: Any, count: int = 1 << 20) -> Any:
    """Elements from an address on, also behind what is there: a pointer knows no end."""
    size = np.dtype(dtype).itemsize * count if address else 0
    memory: Any = (ctypes.c_char * size).from_address(int(address)) if address else b""
    return np.frombuffer(memory, dtype).view(np.recarray if count == 1 else np.ndarray)


def test_the_loops_are_right_in_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same functions, not compiled, over the Python twins of the vector operations."""
    names = [name for name, value in vars(elementwise_kernels).items() if hasattr(value, "py_func")]
    for name in names:
        function = getattr(elementwise_kernels, name).py_func
        monkeypatch.setattr(elementwise_kernels, name, function)
    sources: list[Source] = []

    def body(module: str, maker: str, *arguments: Any) -> int:
        sources.append(getattr(elementwise_kernels, maker)(*arguments))
        return len(sources) - 1

    def run(link: Link, *, num_threads: int) -> None:
        for item in range(link.call.num_items):
            sources[link.body].function(ctypes.addressof(link.call), item, 0)

    monkeypatch.setattr(elementwise, "code_address", body)
    monkeypatch.setattr(elementwise, "run_link", run)
    monkeypatch.setattr(elementwise_kernels, "pointer_at", _memory_at)
    monkeypatch.setattr(
        elementwise_kernels, "call_at", lambda address, dtype: _memory_at(address, dtype, 1)[0]
    )

    assert len(names) >= 15
    TestRmsNorm().test_it_equals_the_model()
    with np.errstate(invalid="ignore"):  # -inf * 0, as in the compiled form
        TestSiluMultiply().test_extremes_are_those_of_torch()
    TestAddResidual().test_it_equals_the_model()
    TestRoute().test_it_equals_the_model(True)
    TestSiluMultiply().test_it_equals_the_model()
    for qk_norm in ("none", "head", "full"):
        for has_bias in (False, True):
            form: Any = {"clip": 1.0, "cache_format": "bfloat16", "has_bias": has_bias}
            QkvCase(2, 4, 2, 6, qk_norm=qk_norm, **form).assert_right()
    assert len(sources) >= 9


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names an x86-64 CPU")
def test_the_loops_need_no_particular_x86_cpu() -> None:
    """Compiled for a CPU with SSE2 only, the results are the same within rounding."""
    script = (
        "from tests.cpu_kernels.test_elementwise import *\n"
        "TestRmsNorm().test_it_equals_the_model(); TestRoute().test_it_equals_the_model(True)\n"
        "QkvCase(2, 4, 2, 40, qk_norm='head', cache_format='bfloat16').assert_right()"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )

    assert result.stderr == ""
    assert result.returncode == 0

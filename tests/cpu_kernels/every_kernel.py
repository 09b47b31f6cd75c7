"""One small check of every kind of kernel: `python -m tests.cpu_kernels.every_kernel`.

What test_isa.py runs in a process of its own for every rung of the ladder. Tests of the single
kernels have the shapes; here are few, so that all kernels compile in seconds.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.elementwise import add_residual, rms_norm, route, silu_multiply
from cpu_kernels.formats import pack
from cpu_kernels.isa import isa
from cpu_kernels.packing import pack_into
from cpu_kernels.simd import LANES
from tests.cpu_kernels.exact_products import KINDS, assert_within, cases, exact, product, stored
from tests.cpu_kernels.test_attention import Case
from tests.cpu_kernels.test_elementwise import QkvCase
from tests.cpu_kernels.test_experts import Layer
from tests.cpu_kernels.test_linear import integers, run
from tests.cpu_kernels.test_simd import convert_float16

# Blocks of 2 and of 1 tokens, and on every rung a last panel that is not full.
_NUM_TOKENS = 3


def check_products() -> None:
    """Whole numbers exactly, others within the rounding of their arithmetic."""
    rng = np.random.default_rng(0)
    for format, compute in cases(KINDS):
        x, matrix, expected = integers(_NUM_TOKENS, 85, 77, format)
        actual = run(stored(x, "bfloat16"), matrix, compute, num_threads=2)
        np.testing.assert_array_equal(actual, expected)
        x = stored(rng.standard_normal(x.shape).astype(np.float32), "bfloat16")
        assert_within(run(x, matrix, compute), product(exact(x), matrix.weight_NK, format, compute))


def check_experts() -> None:
    """Experts of two and of one token, float and int8."""
    for case in (cases(KINDS)[0], cases(KINDS)[-1]):
        layer = Layer(case, num_tokens=_NUM_TOKENS, num_experts=3)
        layer.ids[:] = [[0, 1], [1, 2], [1, 0]]
        layer.assert_right(num_threads=2)


def check_packing() -> None:
    """float16 to each kind."""
    weight = np.random.default_rng(1).standard_normal((21, 77)).astype(np.float16)
    for format in KINDS:
        expected = pack(weight.astype(np.float32), format)
        blob = np.empty_like(expected)
        pack_into(weight, format, blob, num_threads=2)
        np.testing.assert_array_equal(blob, expected)


def check_attention() -> None:
    """A float16 cache, which needs instructions or arithmetic in their place."""
    Case([5, 40], key_width=20, value_width=18, cache_format="float16").assert_right()


def check_elementwise() -> None:
    """Each loop once, rows longer than a vector and not a multiple of one."""
    x = np.random.default_rng(2).standard_normal((2, 38)).astype(np.float32)
    out = np.empty_like(x)
    rms_norm(x, np.ones(38, np.float32), 1e-5, out)
    exact_x = x.astype(np.float64)
    mean = (exact_x**2).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out, exact_x / np.sqrt(mean + 1e-5), rtol=1e-6)
    half = np.empty((2, 19), np.float32)
    silu_multiply(x, half)
    gate, up = exact_x[:, :19], exact_x[:, 19:]
    np.testing.assert_allclose(half, gate / (1 + np.exp(-gate)) * up, rtol=2e-6, atol=1e-7)
    add_residual(x, out, None, out)
    np.testing.assert_allclose(out, exact_x + exact_x / np.sqrt(mean + 1e-5), rtol=1e-6)
    ids, weights = np.empty((2, 3), np.int64), np.empty((2, 3), np.float32)
    route(x, 3, True, ids, weights)
    np.testing.assert_array_equal(ids, np.argsort(-x, axis=1)[:, :3])
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    QkvCase(2, 4, 2, 40, qk_norm="head", cache_format="float16").assert_right()


def check_float16() -> None:
    """All 65536 patterns there and back."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    floats = every.astype(np.float32)
    widened, rounded = convert_float16(every.view(np.int16), floats)
    np.testing.assert_array_equal(widened, floats)
    np.testing.assert_array_equal(rounded.view(np.float16), every)


def main() -> None:
    """Check everything and say for which instructions."""
    check_products()
    check_experts()
    check_packing()
    check_attention()
    check_elementwise()
    check_float16()
    print(f"OK {isa().level} {LANES}")


if __name__ == "__main__":
    main()

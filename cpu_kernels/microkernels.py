"""Products of a few tokens with panels of 16 weight rows: one compiled function for each kind.

    kernel(panels, scales, zeros, x, x_scales, y, y_stride, num_columns, group_size, num_panels)

All are addresses or counts (`y_stride` in floats); y[t * y_stride + 16 p + l] is written for every
token t, panel p and lane l. Drivers (linear.py, experts.py) call kernels through their addresses,
so each is compiled once for all of them. formats.py says how panels lie in memory.

How weights and x meet is the *compute*:

- `float`: weights widened to float32 in registers, x float32 `[K][M]`. Exact but for the order of
  the sums; on any machine.
- `bfloat16`: pairs of bfloat16, x `[K/2][M][2]`, on machines with AVX512_BF16. Faster than `float`
  where a dot product costs what a float32 FMA does (Zen 4), slower where it costs four (Sapphire
  Rapids: 83 GFLOP/s a core against 160): measured, not assumed.
- `int8`: x rounded to int8, one scale a token and group (`x_scales`: float32 `[G][M]`, then the
  sums of the rounded x, int32 `[G][M]`), x `[K/4][M][4]`; products exact in int32.
"""

# M tokens of a block, K columns, G groups

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numba
import numpy as np
from numba import types

from cpu_kernels.formats import WeightFormat
from cpu_kernels.isa import isa
from cpu_kernels.panel_ops import (
    add_bfloat16_pairs,
    add_byte_products,
    add_column,
    as_column,
    bfloat16_column,
    code_column,
    fold_group,
    high_nibbles,
    load_scales,
    load_words,
    load_zeros,
    low_nibbles,
    offset_of_zeros,
    same_words,
    start_int_sums,
    store_sums,
    zero_sums,
)
from cpu_kernels.source_stamp import source_stamp

Compute = Literal["float", "bfloat16", "int8"]

_SIGNATURE = types.void(*[types.intp] * 10)
_INT8_ZERO = 128
_INT4_ZERO = 8

# functools.cache lets two threads both compile and then drops one result, whose code is in use
_COMPILING = threading.Lock()


def computes(weight_format: WeightFormat) -> tuple[Compute, ...]:
    """The kinds of arithmetic that this machine has for a format, the exact one first."""
    if weight_format.kind == "bfloat16" and isa().has("avx512-bf16"):
        return ("float", "bfloat16")
    return ("float", "int8") if weight_format.group_size is not None else ("float",)


def block_tokens(compute: Compute) -> tuple[int, ...]:
    """The numbers of tokens that kernels exist for, largest first.

    As many as the sums of fit the registers: 32 of 16 lanes with AVX-512, else 16 of 8 lanes; int8
    needs two for each token.
    """
    if not isa().has("avx512"):
        return (4, 2, 1)
    return (12, 8, 4, 2, 1) if compute == "int8" else (24, 16, 8, 4, 2, 1)


@cache
def fastest_compute(weight_format: WeightFormat) -> Compute:
    """The kind of arithmetic that this machine does a format's products fastest with.

    Quantised weights take "int8", which rounds x too: four to eight times the rate of "float" on
    every machine. Of the others, "bfloat16" must win by a seventh in a product of 24 tokens with a
    panel in the cache, so that noise never changes the choice; measured once, in 2 ms.
    """
    if weight_format.is_quantised:
        return "int8"
    found = computes(weight_format)
    if "bfloat16" not in found:
        return "float"
    seconds = {compute: _probe_seconds(weight_format, compute) for compute in found}
    return "bfloat16" if seconds["bfloat16"] * 7 < seconds["float"] * 6 else "float"


def _probe_seconds(weight_format: WeightFormat, compute: Compute) -> float:
    """Seconds of a block of tokens with four panels of 512 columns, the best of nine."""
    num_tokens, num_columns, num_panels = block_tokens(compute)[0], 512, 4
    panels = np.zeros(num_panels * weight_format.panel_bytes(num_columns), np.uint8)
    x = np.zeros(num_columns * num_tokens, np.float32)
    y = np.zeros(16 * num_panels * num_tokens, np.float32)
    kernel = _KERNEL(kernel_address(weight_format, compute, num_tokens))
    addresses = (panels.ctypes.data, 0, 0, x.ctypes.data, 0, y.ctypes.data)
    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        kernel(*addresses, 16 * num_panels, num_columns, 0, num_panels)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)


def kernel_address(weight_format: WeightFormat, compute: Compute, num_tokens: int) -> int:
    """Return the address of the kernel for blocks of `num_tokens`; the first call compiles it."""
    kind, has_zeros = weight_format.kind, weight_format.has_zero_point
    with _COMPILING:
        return int(_compiled(kind, has_zeros, compute, num_tokens).address)


@cache
def _compiled(kind: str, has_zeros: bool, compute: Compute, num_tokens: int) -> Any:
    # Chains of additions beside each other hide the latency of one where tokens are few.
    ways = 4 if num_tokens <= 2 and compute != "int8" else 2 if num_tokens <= 4 else 1
    stamp = source_stamp()
    kernels: dict[tuple[str, Compute], Callable[..., Any]] = {
        ("float32", "float"): _float32_kernel,
        ("bfloat16", "float"): _bfloat16_kernel,
        ("bfloat16", "bfloat16"): _bfloat16_pairs_kernel,
        ("int8", "float"): _int8_as_float_kernel,
        ("int8", "int8"): _int8_kernel,
        ("int4", "float"): _int4_as_float_kernel,
        ("int4", "int8"): _int4_kernel,
    }
    return kernels[kind, compute](num_tokens, ways, has_zeros, stamp)


def _compile(body: Any) -> Any:
    return numba.cfunc(_SIGNATURE, cache=True, nogil=True, error_model="numpy")(body)


def _float32_kernel(tokens: int, ways: int, has_zeros: bool, stamp: int) -> Any:
    x_column = 4 * tokens

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        _ = stamp
        at = panels
        for panel in range(num_panels):
            sums = zero_sums(tokens, ways)
            x_at = x
            for _pair in range(num_columns // 2):
                sums = add_column(sums, 0, as_column(load_words(at)), x_at)
                sums = add_column(sums, 1, as_column(load_words(at + 64)), x_at + x_column)
                at += 128
                x_at += 2 * x_column
            if num_columns % 2:
                sums = add_column(sums, 0, as_column(load_words(at)), x_at)
                at += 64
            store_sums(y + 64 * panel, 4 * y_stride, sums)

    return _compile(kernel)


def _bfloat16_kernel(tokens: int, ways: int, has_zeros: bool, stamp: int) -> Any:
    x_column = 4 * tokens

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        _ = stamp
        at = panels
        steps = (num_columns + 1) // 2
        for panel in range(num_panels):
            sums = zero_sums(tokens, ways)
            x_at = x
            for _pair in range(steps // 2):
                words = load_words(at)
                sums = add_column(sums, 0, bfloat16_column(words, 0), x_at)
                sums = add_column(sums, 1, bfloat16_column(words, 1), x_at + x_column)
                words = load_words(at + 64)
                sums = add_column(sums, 2, bfloat16_column(words, 0), x_at + 2 * x_column)
                sums = add_column(sums, 3, bfloat16_column(words, 1), x_at + 3 * x_column)
                at += 128
                x_at += 4 * x_column
            if steps % 2:
                words = load_words(at)
                sums = add_column(sums, 0, bfloat16_column(words, 0), x_at)
                sums = add_column(sums, 1, bfloat16_column(words, 1), x_at + x_column)
                at += 64
            store_sums(y + 64 * panel, 4 * y_stride, sums)

    return _compile(kernel)


def _bfloat16_pairs_kernel(tokens: int, ways: int, has_zeros: bool, stamp: int) -> Any:
    x_pair = 4 * tokens

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        _ = stamp
        at = panels
        steps = (num_columns + 1) // 2
        for panel in range(num_panels):
            sums = zero_sums(tokens, ways)
            x_at = x
            for _four in range(steps // 4):
                sums = add_bfloat16_pairs(sums, 0, load_words(at), x_at)
                sums = add_bfloat16_pairs(sums, 1, load_words(at + 64), x_at + x_pair)
                sums = add_bfloat16_pairs(sums, 2, load_words(at + 128), x_at + 2 * x_pair)
                sums = add_bfloat16_pairs(sums, 3, load_words(at + 192), x_at + 3 * x_pair)
                at += 256
                x_at += 4 * x_pair
            for _one in range(steps % 4):
                sums = add_bfloat16_pairs(sums, 0, load_words(at), x_at)
                at += 64
                x_at += x_pair
            store_sums(y + 64 * panel, 4 * y_stride, sums)

    return _compile(kernel)


def _int8_as_float_kernel(tokens: int, ways: int, has_zeros: bool, stamp: int) -> Any:
    x_column = 4 * tokens

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        _ = stamp
        at, scale_at = panels, scales
        for panel in range(num_panels):
            sums = zero_sums(tokens, ways)
            x_at = x
            for first in range(0, num_columns, group_size):
                scale = load_scales(scale_at)
                offset = offset_of_zeros(same_words(_INT8_ZERO), scale)
                for _step in range((min(group_size, num_columns - first) + 3) // 4):
                    words = load_words(at)
                    column = code_column(words, 0, 8, scale, offset)
                    sums = add_column(sums, 0, column, x_at)
                    column = code_column(words, 8, 8, scale, offset)
                    sums = add_column(sums, 1, column, x_at + x_column)
                    column = code_column(words, 16, 8, scale, offset)
                    sums = add_column(sums, 2, column, x_at + 2 * x_column)
                    column = code_column(words, 24, 8, scale, offset)
                    sums = add_column(sums, 3, column, x_at + 3 * x_column)
                    at += 64
                    x_at += 4 * x_column
                scale_at += 32
            store_sums(y + 64 * panel, 4 * y_stride, sums)

    return _compile(kernel)


def _int4_as_float_kernel(tokens: int, ways: int, has_zeros: bool, stamp: int) -> Any:
    x_column = 4 * tokens

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        _ = stamp
        at, scale_at, zero_at = panels, scales, zeros
        for panel in range(num_panels):
            sums = zero_sums(tokens, ways)
            x_at = x
            for first in range(0, num_columns, group_size):
                scale = load_scales(scale_at)
                if has_zeros:
                    offset = offset_of_zeros(load_zeros(zero_at), scale)
                else:
                    offset = offset_of_zeros(same_words(_INT4_ZERO), scale)
                for _step in range((min(group_size, num_columns - first) + 7) // 8):
                    words = load_words(at)
                    column = code_column(words, 0, 4, scale, offset)
                    sums = add_column(sums, 0, column, x_at)
                    column = code_column(words, 8, 4, scale, offset)
                    sums = add_column(sums, 1, column, x_at + x_column)
                    column = code_column(words, 16, 4, scale, offset)
                    sums = add_column(sums, 2, column, x_at + 2 * x_column)
                    column = code_column(words, 24, 4, scale, offset)
                    sums = add_column(sums, 3, column, x_at + 3 * x_column)
                    column = code_column(words, 4, 4, scale, offset)
                    sums = add_column(sums, 0, column, x_at + 4 * x_column)
                    column = code_column(words, 12, 4, scale, offset)
                    sums = add_column(sums, 1, column, x_at + 5 * x_column)
                    column = code_column(words, 20, 4, scale, offset)
                    sums = add_column(sums, 2, column, x_at + 6 * x_column)
                    column = code_column(words, 28, 4, scale, offset)
                    sums = add_column(sums, 3, column, x_at + 7 * x_column)
                    at += 64
                    x_at += 8 * x_column
                scale_at += 32
                zero_at += 16
            store_sums(y + 64 * panel, 4 * y_stride, sums)

    return _compile(kernel)


def _int8_kernel(tokens: int, ways: int, has_zeros: bool, stamp: int) -> Any:
    x_step = 4 * tokens

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        _ = stamp
        at, scale_at = panels, scales
        x_sums = x_scales + (num_columns + group_size - 1) // group_size * x_step
        for panel in range(num_panels):
            totals = zero_sums(tokens, 1)
            x_at, group_at = x, 0
            for first in range(0, num_columns, group_size):
                steps = (min(group_size, num_columns - first) + 3) // 4
                sums = start_int_sums(tokens, ways, same_words(_INT8_ZERO), x_sums + group_at)
                for _pair in range(steps // 2):
                    sums = add_byte_products(sums, 0, load_words(at), x_at)
                    sums = add_byte_products(sums, 1, load_words(at + 64), x_at + x_step)
                    at += 128
                    x_at += 2 * x_step
                if steps % 2:
                    sums = add_byte_products(sums, 0, load_words(at), x_at)
                    at += 64
                    x_at += x_step
                totals = fold_group(totals, sums, load_scales(scale_at), x_scales + group_at)
                scale_at += 32
                group_at += x_step
            store_sums(y + 64 * panel, 4 * y_stride, totals)

    return _compile(kernel)


def _int4_kernel(tokens: int, ways: int, has_zeros: bool, stamp: int) -> Any:
    x_step = 4 * tokens

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        _ = stamp
        at, scale_at, zero_at = panels, scales, zeros
        x_sums = x_scales + (num_columns + group_size - 1) // group_size * x_step
        for panel in range(num_panels):
            totals = zero_sums(tokens, 1)
            x_at, group_at = x, 0
            for first in range(0, num_columns, group_size):
                zero = load_zeros(zero_at) if has_zeros else same_words(_INT4_ZERO)
                sums = start_int_sums(tokens, ways, zero, x_sums + group_at)
                for _step in range((min(group_size, num_columns - first) + 7) // 8):
                    words = load_words(at)
                    sums = add_byte_products(sums, 0, low_nibbles(words), x_at)
                    sums = add_byte_products(sums, 1, high_nibbles(words), x_at + x_step)
                    at += 64
                    x_at += 2 * x_step
                totals = fold_group(totals, sums, load_scales(scale_at), x_scales + group_at)
                scale_at += 32
                zero_at += 16
                group_at += x_step
            store_sums(y + 64 * panel, 4 * y_stride, totals)

    return _compile(kernel)

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
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numba
import numpy as np
from numba import types

from cpu_kernels.compiling import compiled_address, source_stamp
from cpu_kernels.formats import WeightFormat
from cpu_kernels.isa import isa
from cpu_kernels.panel_ops import (
    BFLOAT16,
    BFLOAT16_PAIRS,
    FLOAT32,
    INT4,
    INT8,
    add_byte_steps,
    add_scaled_step,
    add_steps,
    fold_group,
    start_int_sums,
    store_sums,
    zero_sums,
)

Compute = Literal["float", "bfloat16", "int8"]
MAX_BLOCK_TOKENS = 24

_SIGNATURE = types.void(*[types.intp] * 10)
_STEP_KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8, "int4": INT4}
_ZERO_CODES = {"int8": 128, "int4": 8}
# x that belongs to a step, in words of 4 bytes a token: float32 values, or pairs of bfloat16
_X_WORDS = {FLOAT32: 1, BFLOAT16: 2, BFLOAT16_PAIRS: 1, INT8: 4, INT4: 8}


@cache
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
    return (12, 8, 4, 2, 1) if compute == "int8" else (MAX_BLOCK_TOKENS, 16, 8, 4, 2, 1)


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
    return compiled_address(_compiled, kind, has_zeros, compute, num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocking:
    """How a kernel walks the panels.

    Parameters
    ----------
    panels
        Panels at once: streams of memory.
    ahead
        Bytes between a read and the prefetch of what is read later; 0 for none.
    ways
        Sums kept beside each other for a lone panel, which hide the latency of an addition.
    """

    panels: int
    ahead: int
    ways: int


def blocking(compute: Compute, num_tokens: int) -> Blocking:
    """Choose it: as much as the registers hold, and as the processor's prefetcher likes.

    Intel (Sapphire Rapids, two hyperthreads of a core): one stream reads 15-16 GB/s of a ceiling of
    26, four streams that ask for lines 2 KB ahead 23-25. AMD (Zen 4) is the other way round: one
    stream reads at the ceiling, four at two thirds of it, and a prefetch costs a tenth.
    """
    ways = 4 if num_tokens <= 2 and compute != "int8" else 2 if num_tokens <= 4 else 1
    if not isa().has("avx512"):
        return Blocking(panels=1, ahead=0, ways=ways if num_tokens <= 2 else 1)
    if isa().vendor != "intel":
        return Blocking(panels=1, ahead=0, ways=ways)
    # int8 has an int32 and a float32 sum for every token and panel
    most = 8 if compute == "int8" else 16
    panels = max(count for count in (1, 2, 4) if count == 1 or count * num_tokens <= most)
    return Blocking(panels=panels, ahead=2048 if panels > 1 else 0, ways=ways)


@cache
def _compiled(kind: str, has_zeros: bool, compute: Compute, num_tokens: int) -> Any:
    walk = blocking(compute, num_tokens)
    if compute == "int8":
        zero_code = 0 if has_zeros else _ZERO_CODES[kind]
        return _byte_kernel(_STEP_KINDS[kind], zero_code, num_tokens, walk, source_stamp())
    if kind in _ZERO_CODES:
        zero_code = 0 if has_zeros else _ZERO_CODES[kind]
        return _scaled_kernel(_STEP_KINDS[kind], zero_code, num_tokens, walk, source_stamp())
    step_kind = BFLOAT16_PAIRS if compute == "bfloat16" else _STEP_KINDS[kind]
    return _plain_kernel(step_kind, num_tokens, walk, source_stamp())


def _compile(body: Any, name: str) -> Any:
    # numba's disk cache names its files by this: one name for all kernels would make processes
    # that start together write to one index
    body.__qualname__ = f"{name}_{isa().level}"
    return numba.cfunc(_SIGNATURE, cache=True, nogil=True, error_model="numpy")(body)


def _plain_kernel(kind: int, tokens: int, walk: Blocking, stamp: int) -> Any:
    """A format without scales."""
    at_once, ahead, ways = walk.panels, walk.ahead, walk.ways
    columns = 1 if kind == FLOAT32 else 2
    x_step = 4 * tokens * _X_WORDS[kind]
    unroll = max(1, ways // _X_WORDS[kind])

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
        steps = (num_columns + columns - 1) // columns
        panel_bytes = 64 * steps
        panel = 0
        while at_once > 1 and num_panels - panel >= at_once:
            sums = zero_sums(tokens, at_once, 1)
            at, x_at = panels + panel * panel_bytes, x
            for _step in range(steps):
                sums = add_steps(sums, kind, 1, at, panel_bytes, ahead, x_at)
                at += 64
                x_at += x_step
            store_sums(y + 64 * panel, 4 * y_stride, sums)
            panel += at_once
        while panel < num_panels:
            rest = zero_sums(tokens, 1, ways)
            at, x_at = panels + panel * panel_bytes, x
            for _steps in range(steps // unroll):
                rest = add_steps(rest, kind, unroll, at, panel_bytes, 0, x_at)
                at += 64 * unroll
                x_at += x_step * unroll
            for _step in range(steps % unroll):
                rest = add_steps(rest, kind, 1, at, panel_bytes, 0, x_at)
                at += 64
                x_at += x_step
            store_sums(y + 64 * panel, 4 * y_stride, rest)
            panel += 1

    return _compile(kernel, f"plain_{kind}_{tokens}")


def _scaled_kernel(kind: int, zero_code: int, tokens: int, walk: Blocking, stamp: int) -> Any:
    """Codes widened to float32: bound by the widening where tokens are few, so panel by panel."""
    ways = walk.ways
    columns = 4 if kind == INT8 else 8
    x_step = 4 * tokens * columns

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
            sums = zero_sums(tokens, 1, ways)
            x_at = x
            for first in range(0, num_columns, group_size):
                count = min(group_size, num_columns - first)
                for _step in range((count + columns - 1) // columns):
                    sums = add_scaled_step(sums, kind, zero_code, at, scale_at, zero_at, x_at)
                    at += 64
                    x_at += x_step
                scale_at += 32
                zero_at += 16
            store_sums(y + 64 * panel, 4 * y_stride, sums)

    return _compile(kernel, f"scaled_{kind}_{zero_code}_{tokens}")


def _byte_kernel(kind: int, zero_code: int, tokens: int, walk: Blocking, stamp: int) -> Any:
    """Codes and x in int8: exact in int32 within a group, then scaled."""
    at_once, ahead, ways = walk.panels, walk.ahead, walk.ways
    columns = 4 if kind == INT8 else 8
    x_word = 4 * tokens
    x_step = x_word * columns // 4
    unroll = max(1, ways * 4 // columns)

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
        groups = (num_columns + group_size - 1) // group_size
        panel_bytes = 64 * ((num_columns + columns - 1) // columns)
        x_sums = x_scales + groups * x_word
        panel = 0
        while at_once > 1 and num_panels - panel >= at_once:
            totals = zero_sums(tokens, at_once, 1)
            at, x_at, group_at = panels + panel * panel_bytes, x, 0
            scale_at = scales + panel * groups * 32
            zero_at = zeros + panel * groups * 16
            for first in range(0, num_columns, group_size):
                sums = start_int_sums(
                    tokens, at_once, 1, zero_code, zero_at, groups, x_sums + group_at
                )
                count = min(group_size, num_columns - first)
                for _step in range((count + columns - 1) // columns):
                    sums = add_byte_steps(sums, kind, 1, at, panel_bytes, ahead, x_at)
                    at += 64
                    x_at += x_step
                totals = fold_group(totals, sums, scale_at, groups, x_scales + group_at)
                scale_at += 32
                zero_at += 16
                group_at += x_word
            store_sums(y + 64 * panel, 4 * y_stride, totals)
            panel += at_once
        while panel < num_panels:
            rest = zero_sums(tokens, 1, 1)
            at, x_at, group_at = panels + panel * panel_bytes, x, 0
            scale_at = scales + panel * groups * 32
            zero_at = zeros + panel * groups * 16
            for first in range(0, num_columns, group_size):
                part = start_int_sums(
                    tokens, 1, ways, zero_code, zero_at, groups, x_sums + group_at
                )
                count = min(group_size, num_columns - first)
                steps = (count + columns - 1) // columns
                for _steps in range(steps // unroll):
                    part = add_byte_steps(part, kind, unroll, at, panel_bytes, 0, x_at)
                    at += 64 * unroll
                    x_at += x_step * unroll
                for _step in range(steps % unroll):
                    part = add_byte_steps(part, kind, 1, at, panel_bytes, 0, x_at)
                    at += 64
                    x_at += x_step
                rest = fold_group(rest, part, scale_at, groups, x_scales + group_at)
                scale_at += 32
                zero_at += 16
                group_at += x_word
            store_sums(y + 64 * panel, 4 * y_stride, rest)
            panel += 1

    return _compile(kernel, f"bytes_{kind}_{zero_code}_{tokens}")

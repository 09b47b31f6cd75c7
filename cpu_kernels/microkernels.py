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

Where the machine has tiles (amx.py), blocks of at least `MIN_TILE_TOKENS` of the last two run on
them and lie otherwise: `[units][M][64 bytes]`, a unit being 32 columns of bfloat16 or 64 of int8;
the last may be shorter. The bits of `int8` are the same.
"""

# M tokens of a block, K columns, G groups

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from cpu_kernels.amx import tile_kernel_address, tiles
from cpu_kernels.compiling import code_address
from cpu_kernels.formats import WeightFormat
from cpu_kernels.isa import isa

Compute = Literal["float", "bfloat16", "int8"]
MAX_BLOCK_TOKENS = 32
MIN_TILE_TOKENS = 4

# Columns of x are padded with zeros to whole multiples, so that a kernel may read whole steps.
COLUMN_PADDING = 16
_ELEMENT_BYTES: dict[Compute, int] = {"float": 4, "bfloat16": 2, "int8": 1}
# In compiled code; the last two have blocks for tiles from MIN_TILE_TOKENS on.
FLOAT, BFLOAT16, INT8, BFLOAT16_TILES, INT8_TILES = range(5)


def uses_tiles(compute: Compute) -> bool:
    """Do blocks of MIN_TILE_TOKENS and more lie as tiles read them?"""
    return compute != "float" and tiles() is not None


def compute_number(compute: Compute) -> int:
    """What `token_blocks.write_columns` knows an arithmetic of this process by."""
    if uses_tiles(compute):
        return BFLOAT16_TILES if compute == "bfloat16" else INT8_TILES
    return {"float": FLOAT, "bfloat16": BFLOAT16, "int8": INT8}[compute]


class _ComputeNumbers:
    """`compute_number` as a mapping, which asks for tiles only when it is read."""

    def __getitem__(self, compute: Compute) -> int:
        return compute_number(compute)


COMPUTE_NUMBERS = _ComputeNumbers()


@cache
def computes(weight_format: WeightFormat) -> tuple[Compute, ...]:
    """The kinds of arithmetic that this machine has for a format, the exact one first."""
    if weight_format.kind == "bfloat16" and isa().has("avx512-bf16"):
        return ("float", "bfloat16")
    return ("float", "int8") if weight_format.group_size is not None else ("float",)


def block_tokens(compute: Compute) -> tuple[int, ...]:
    """The numbers of tokens that kernels exist for, largest first.

    As many as the sums of fit the registers: 32 of 16 lanes with AVX-512, else 16 of 8 lanes; int8
    needs two for each token. On tiles 16, or twice as many for half the panels.
    """
    if uses_tiles(compute):
        return (MAX_BLOCK_TOKENS, 16, 8, 4, 2, 1)
    if not isa().has("avx512"):
        return (4, 2, 1)
    return (12, 8, 4, 2, 1) if compute == "int8" else (24, 16, 8, 4, 2, 1)


@cache
def fastest_compute(weight_format: WeightFormat) -> Compute:
    """The kind of arithmetic that this machine does a format's products fastest with.

    Quantised weights take "int8", which rounds x too: four to eight times the rate of "float" on
    every machine. Of the others, "bfloat16" must win by a seventh in a product of its largest block
    with panels in the cache, so that noise never changes the choice; measured once, in 2 ms.
    """
    if weight_format.is_quantised:
        return "int8"
    found = computes(weight_format)
    if "bfloat16" not in found:
        return "float"
    seconds = {compute: _probe_seconds(weight_format, compute) for compute in found}
    return "bfloat16" if seconds["bfloat16"] * 7 < seconds["float"] * 6 else "float"


def _probe_seconds(weight_format: WeightFormat, compute: Compute) -> float:
    """Seconds a token of a block with four panels of 512 columns, the best of nine."""
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
    return min(seconds) / num_tokens


_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)


def kernel_address(weight_format: WeightFormat, compute: Compute, num_tokens: int) -> int:
    """Return the address of the kernel for blocks of `num_tokens`; the first call compiles it."""
    kind, has_zeros = weight_format.kind, weight_format.has_zero_point
    if uses_tiles(compute) and num_tokens >= MIN_TILE_TOKENS:
        return tile_kernel_address(kind, has_zeros, num_tokens)
    return code_address("panel_kernels", "make_kernel", kind, has_zeros, compute, num_tokens)


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
    if compute == "int8":
        # An int32 and a float32 sum for every token and panel: the second, which is needed once a
        # group, may leave the registers. Two panels of 8 tokens are 1.4 times as fast as one.
        panels = 4 if num_tokens <= 2 else 2 if num_tokens <= 8 else 1
        return Blocking(panels=panels, ahead=1024 if panels > 1 else 0, ways=ways)
    panels = max(count for count in (1, 2, 4) if count == 1 or count * num_tokens <= 16)
    return Blocking(panels=panels, ahead=2048 if panels > 1 else 0, ways=ways)


def token_bytes(compute: Compute, num_columns: int) -> int:
    """Bytes of one token's share of a block."""
    return -(-num_columns // COLUMN_PADDING) * COLUMN_PADDING * _ELEMENT_BYTES[compute]


def token_scale_bytes(compute: Compute, num_groups: int) -> int:
    """Bytes of one token's share of a block's scales and sums."""
    return 8 * num_groups if compute == "int8" else 0


@cache
def load_kernels(weight_format: WeightFormat) -> None:
    """Load the kernels of all block sizes, compiling what is not there: no step waits for one."""
    compute = fastest_compute(weight_format)
    for num_tokens in block_tokens(compute):
        kernel_address(weight_format, compute, num_tokens)

"""Products of 16 tokens with panels of 16 weight rows on the tiles of AMX (Intel, since 2023).

    kernel(panels, scales, zeros, x, x_scales, y, y_stride, num_columns, group_size, num_panels)

The panels, the arguments and the results are those of microkernels.py; only x lies differently, as
plain rows, one a token, padded to whole tiles (`padded_columns`):

- `amx-bfloat16` (bfloat16 weights): x bfloat16 `[16][K padded to 32]`, sums in float32.
- `amx-int8` (int8 and int4 weights): x int8 `[16][K padded to 64]`, one scale a token and group in
  `x_scales` (float32 `[G][16]`, then the sums of the rounded x, int32 `[G][16]`); the products of
  a group are exact in int32.

x must be zero from K to the end of the panels' last step (2, 4 or 8 columns); what follows in its
rows is not read, and of the panels nothing past their end: the last tile has fewer rows.

16 steps of a panel are a tile as they stand. Four panels are multiplied at a time, on all eight
tiles: four sums, x, one panel's weights, and both once more with the rows of the last tile, for
which one configuration then serves a whole call. The choice assumes that a product takes 52 cycles
but one starts every 16, so that two sums would wait for each other (26 cycles a product) and four
do not; each tile of x loaded serves four products, 5 loads of 8 cycles beside 4 * 16 cycles.

Known: the machine code has the instructions meant; run with the tile instructions emulated it gives
the right numbers. Not known: that any processor with AMX agrees, and the speed. The cycles above
are not measured, and whether int8 in small groups gains is open: a tile product of 64 columns takes
16 cycles, the 64 vector instructions that scale its sums at least 32.
"""

# K columns, G groups

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any, Literal, get_args

import numba
import numpy as np
from numba import types

from cpu_kernels.compiling import compiled_address, source_stamp
from cpu_kernels.isa import isa
from cpu_kernels.simd import pointer_at
from cpu_kernels.tile_instructions import (
    LANES,
    TILE_BYTES,
    TILE_ROW_BYTES,
    TILE_ROWS,
    TILE_WORDS,
    add_scaled,
    ldtilecfg,
    stack_bytes,
    stack_floats,
    store_floats,
    tdpbf16ps,
    tdpbsud,
    tileloadd,
    tilerelease,
    tilestored,
    tilezero,
    unpack_nibbles,
)

AmxFormat = Literal["bfloat16", "int8", "int4"]
AmxCompute = Literal["amx-bfloat16", "amx-int8"]
TOKENS = TILE_ROWS

_PANELS = 4
_INT8_ZERO = 128
_INT4_ZERO = 8
_SUMS_0, _SUMS_1, _SUMS_2, _SUMS_3, _X, _WEIGHTS, _LAST_X, _LAST_WEIGHTS = range(8)
_BLOCK_WORDS = _PANELS * TILE_WORDS
_BLOCK_BYTES = _PANELS * TILE_BYTES
_CONFIG_BYTES = 64

_ARCH_PRCTL = 158  # the number of the system call on x86-64
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18

# panels, scales, zeros, x, x_scales, y; y_stride, num_columns, group_size, num_panels
_SIGNATURE = types.void(*[types.intp] * 10)


@cache
def request_permission() -> bool:
    """Ask Linux to let this process use tiles; once, it holds for all its threads.

    Returns
    -------
    bool
        False where the system refuses, knows no tiles (before 5.16) or is not Linux on x86-64.

    Examples
    --------
    >>> isinstance(request_permission(), bool)
    True
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    system_call = ctypes.CDLL(None).syscall
    system_call.argtypes = [ctypes.c_long] * 3
    system_call.restype = ctypes.c_long
    return bool(system_call(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


def is_available() -> bool:
    """May the kernels run: has the processor tiles, and does the system allow them?

    Returns
    -------
    bool
        False too where `HETERO_ISA` asks for less than `amx`.

    Examples
    --------
    >>> isinstance(is_available(), bool)
    True
    """
    return isa().has("amx") and request_permission()


def padded_columns(num_columns: int, compute: AmxCompute) -> int:
    """Return the columns of a row of x: `num_columns` padded to whole tiles.

    Parameters
    ----------
    num_columns
        K, at least 1.
    compute
        `amx-bfloat16` or `amx-int8`.

    Returns
    -------
    int
        A multiple of 32 (bfloat16) or 64 (int8); a row is as many times 64 bytes.

    Examples
    --------
    >>> padded_columns(65, "amx-bfloat16"), padded_columns(65, "amx-int8")
    (96, 128)
    """
    tile_columns = TILE_ROW_BYTES // (2 if compute == "amx-bfloat16" else 1)
    return -(-num_columns // tile_columns) * tile_columns


def kernel_address(format_kind: AmxFormat, compute: AmxCompute, has_zeros: bool = False) -> int:
    """Return the address of the kernel of a weight format; the first call compiles it.

    Parameters
    ----------
    format_kind
        `bfloat16`, `int8` or `int4`.
    compute
        `amx-bfloat16` for bfloat16 weights, `amx-int8` for the others.
    has_zeros
        Does int4 have zero points?

    Returns
    -------
    int
        Of a C function with the ten arguments in the first lines of this file, the first six
        addresses and the others int64; for blocks of 16 tokens.

    Raises
    ------
    RuntimeError
        If tiles are not available: the code would end in an illegal instruction.
    ValueError
        If there is no such kernel.

    Examples
    --------
    >>> kernel_address("int8", "amx-int8") > 0  # doctest: +SKIP
    True
    """
    is_bfloat16 = compute == "amx-bfloat16"
    if (
        format_kind not in get_args(AmxFormat)
        or compute not in get_args(AmxCompute)
        or is_bfloat16 != (format_kind == "bfloat16")
        or (has_zeros and format_kind != "int4")
    ):
        zeros = " with zero points" if has_zeros else ""
        raise ValueError(f"there is no {compute} kernel for {format_kind} weights{zeros}")
    if not is_available():
        raise RuntimeError("this process may not use AMX tiles; ask is_available() first")
    return compiled_address(_compiled_kernel, format_kind, has_zeros)


@cache
def _compiled_kernel(format_kind: AmxFormat, has_zeros: bool) -> Any:
    stamp = source_stamp()
    is_int4 = format_kind == "int4"

    def multiply_bfloat16(
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
        _multiply_bfloat16(
            pointer_at(panels, np.uint8),
            pointer_at(x, np.uint8),
            pointer_at(y, np.float32),
            y_stride,
            num_columns,
            num_panels,
        )

    def multiply_codes(
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
        num_groups = (num_columns + group_size - 1) // group_size
        _multiply_codes(
            pointer_at(panels, np.uint8),
            pointer_at(scales, np.uint16),
            pointer_at(zeros, np.uint8),
            pointer_at(x, np.uint8),
            pointer_at(x_scales, np.float32),
            pointer_at(x_scales + 4 * TOKENS * num_groups, np.int32),
            pointer_at(y, np.float32),
            y_stride,
            num_columns,
            group_size,
            num_panels,
            is_int4,
            has_zeros,
        )

    kernel = multiply_bfloat16 if format_kind == "bfloat16" else multiply_codes
    return numba.cfunc(_SIGNATURE, cache=True, nogil=True, error_model="numpy")(kernel)


@numba.njit(nogil=True, error_model="numpy")
def _configure(config: Any, tile_steps: int, last_steps: int) -> None:
    """Set up tiles for `tile_steps` and for the `last_steps` (0: none) of a panel."""
    for i in range(_CONFIG_BYTES):
        config[i] = np.uint8(0)
    config[0] = np.uint8(1)
    for tile in range(8):
        config[16 + 2 * tile] = np.uint8(TILE_ROW_BYTES)
        config[48 + tile] = np.uint8(TILE_ROWS)
    config[16 + 2 * _X] = np.uint8(4 * tile_steps)
    config[48 + _WEIGHTS] = np.uint8(tile_steps)
    if last_steps > 0:
        config[16 + 2 * _LAST_X] = np.uint8(4 * last_steps)
        config[48 + _LAST_WEIGHTS] = np.uint8(last_steps)
    ldtilecfg(config)


@numba.njit(nogil=True, error_model="numpy")
def _zero_sums() -> None:
    tilezero(_SUMS_0)
    tilezero(_SUMS_1)
    tilezero(_SUMS_2)
    tilezero(_SUMS_3)


@numba.njit(nogil=True, error_model="numpy")
def _store_sums(array: Any, at_0: int, at_1: int, at_2: int, at_3: int, stride: int) -> None:
    tilestored(_SUMS_0, array, at_0, stride)
    tilestored(_SUMS_1, array, at_1, stride)
    tilestored(_SUMS_2, array, at_2, stride)
    tilestored(_SUMS_3, array, at_3, stride)


@numba.njit(nogil=True, error_model="numpy")
def _add_bfloat16(
    panels: Any, at_0: int, at_1: int, at_2: int, at_3: int, x: Any, x_at: int, x_stride: int
) -> None:
    tileloadd(_X, x, x_at, x_stride)
    tileloadd(_WEIGHTS, panels, at_0, TILE_ROW_BYTES)
    tdpbf16ps(_SUMS_0, _X, _WEIGHTS)
    tileloadd(_WEIGHTS, panels, at_1, TILE_ROW_BYTES)
    tdpbf16ps(_SUMS_1, _X, _WEIGHTS)
    tileloadd(_WEIGHTS, panels, at_2, TILE_ROW_BYTES)
    tdpbf16ps(_SUMS_2, _X, _WEIGHTS)
    tileloadd(_WEIGHTS, panels, at_3, TILE_ROW_BYTES)
    tdpbf16ps(_SUMS_3, _X, _WEIGHTS)


@numba.njit(nogil=True, error_model="numpy")
def _add_last_bfloat16(
    panels: Any, at_0: int, at_1: int, at_2: int, at_3: int, x: Any, x_at: int, x_stride: int
) -> None:
    tileloadd(_LAST_X, x, x_at, x_stride)
    tileloadd(_LAST_WEIGHTS, panels, at_0, TILE_ROW_BYTES)
    tdpbf16ps(_SUMS_0, _LAST_X, _LAST_WEIGHTS)
    tileloadd(_LAST_WEIGHTS, panels, at_1, TILE_ROW_BYTES)
    tdpbf16ps(_SUMS_1, _LAST_X, _LAST_WEIGHTS)
    tileloadd(_LAST_WEIGHTS, panels, at_2, TILE_ROW_BYTES)
    tdpbf16ps(_SUMS_2, _LAST_X, _LAST_WEIGHTS)
    tileloadd(_LAST_WEIGHTS, panels, at_3, TILE_ROW_BYTES)
    tdpbf16ps(_SUMS_3, _LAST_X, _LAST_WEIGHTS)


@numba.njit(nogil=True, error_model="numpy")
def _add_bytes(
    codes: Any, at_0: int, at_1: int, at_2: int, at_3: int, x: Any, x_at: int, x_stride: int
) -> None:
    tileloadd(_X, x, x_at, x_stride)
    tileloadd(_WEIGHTS, codes, at_0, TILE_ROW_BYTES)
    tdpbsud(_SUMS_0, _X, _WEIGHTS)
    tileloadd(_WEIGHTS, codes, at_1, TILE_ROW_BYTES)
    tdpbsud(_SUMS_1, _X, _WEIGHTS)
    tileloadd(_WEIGHTS, codes, at_2, TILE_ROW_BYTES)
    tdpbsud(_SUMS_2, _X, _WEIGHTS)
    tileloadd(_WEIGHTS, codes, at_3, TILE_ROW_BYTES)
    tdpbsud(_SUMS_3, _X, _WEIGHTS)


@numba.njit(nogil=True, error_model="numpy")
def _add_last_bytes(
    codes: Any, at_0: int, at_1: int, at_2: int, at_3: int, x: Any, x_at: int, x_stride: int
) -> None:
    tileloadd(_LAST_X, x, x_at, x_stride)
    tileloadd(_LAST_WEIGHTS, codes, at_0, TILE_ROW_BYTES)
    tdpbsud(_SUMS_0, _LAST_X, _LAST_WEIGHTS)
    tileloadd(_LAST_WEIGHTS, codes, at_1, TILE_ROW_BYTES)
    tdpbsud(_SUMS_1, _LAST_X, _LAST_WEIGHTS)
    tileloadd(_LAST_WEIGHTS, codes, at_2, TILE_ROW_BYTES)
    tdpbsud(_SUMS_2, _LAST_X, _LAST_WEIGHTS)
    tileloadd(_LAST_WEIGHTS, codes, at_3, TILE_ROW_BYTES)
    tdpbsud(_SUMS_3, _LAST_X, _LAST_WEIGHTS)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _multiply_bfloat16(
    panels: Any, x: Any, y: Any, y_stride: int, num_columns: int, num_panels: int
) -> None:
    num_steps = (num_columns + 1) // 2
    last_steps = num_steps % TILE_ROWS
    panel_bytes = num_steps * TILE_ROW_BYTES
    x_stride = (num_columns + 31) // 32 * TILE_ROW_BYTES
    _configure(stack_bytes(_CONFIG_BYTES), TILE_ROWS, last_steps)
    for panel_0 in range(0, num_panels, _PANELS):
        # Past the last panel the last one again: its tiles come from the cache, and fewer sums
        # would only wait for each other.
        panel_1 = min(panel_0 + 1, num_panels - 1)
        panel_2 = min(panel_0 + 2, num_panels - 1)
        panel_3 = min(panel_0 + 3, num_panels - 1)
        at_0, at_1 = panel_0 * panel_bytes, panel_1 * panel_bytes
        at_2, at_3 = panel_2 * panel_bytes, panel_3 * panel_bytes
        _zero_sums()
        x_at = 0
        for _tile in range(num_steps // TILE_ROWS):
            _add_bfloat16(panels, at_0, at_1, at_2, at_3, x, x_at, x_stride)
            at_0 += TILE_BYTES
            at_1 += TILE_BYTES
            at_2 += TILE_BYTES
            at_3 += TILE_BYTES
            x_at += TILE_ROW_BYTES
        if last_steps > 0:
            _add_last_bfloat16(panels, at_0, at_1, at_2, at_3, x, x_at, x_stride)
        _store_sums(
            y, LANES * panel_0, LANES * panel_1, LANES * panel_2, LANES * panel_3, 4 * y_stride
        )
    tilerelease()


@numba.njit(nogil=True, error_model="numpy")
def _unpack_panels(
    unpacked: Any, panels: Any, at: int, panel_bytes: int, count: int, num_rows: int
) -> None:
    """Write `num_rows` rows of a tile for each of `count` panels, from half as many int4 steps."""
    for i in range(count):
        for row in range(0, num_rows, 2):
            target = i * TILE_BYTES + row * TILE_ROW_BYTES
            unpack_nibbles(
                unpacked, target, panels, at + i * panel_bytes + row // 2 * TILE_ROW_BYTES
            )


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _multiply_codes(
    panels: Any,
    scales: Any,
    zeros: Any,
    x: Any,
    x_scales: Any,
    x_sums: Any,
    y: Any,
    y_stride: int,
    num_columns: int,
    group_size: int,
    num_panels: int,
    is_int4: bool,
    has_zeros: bool,
) -> None:
    # a step is 4 columns, one row of a tile; of int4, half of what 64 bytes of a panel hold
    num_steps = (num_columns + 7) // 8 * 2 if is_int4 else (num_columns + 3) // 4
    step_bytes = TILE_ROW_BYTES // 2 if is_int4 else TILE_ROW_BYTES
    group_steps = group_size // 4
    num_groups = (num_columns + group_size - 1) // group_size
    tile_steps = min(TILE_ROWS, group_steps)
    last_steps = num_steps % tile_steps
    panel_bytes = num_steps * step_bytes
    x_stride = (num_columns + 63) // 64 * TILE_ROW_BYTES

    totals = stack_floats(_BLOCK_WORDS)
    products = stack_floats(_BLOCK_WORDS)
    unpacked = stack_bytes(_BLOCK_BYTES)
    offsets = stack_floats(LANES)
    group_x_sums = stack_floats(TOKENS)
    codes = unpacked if is_int4 else panels
    for lane in range(LANES):
        offsets[lane] = np.float32(_INT4_ZERO if is_int4 else _INT8_ZERO)
    _configure(stack_bytes(_CONFIG_BYTES), tile_steps, last_steps)
    for first in range(0, num_panels, _PANELS):
        # past the last panel the last one again, as for bfloat16, but it is scaled only once
        count = min(_PANELS, num_panels - first)
        panel_at = first * panel_bytes
        apart = TILE_BYTES if is_int4 else panel_bytes
        at_0 = 0 if is_int4 else panel_at
        at_1 = at_0 + min(1, count - 1) * apart
        at_2 = at_0 + min(2, count - 1) * apart
        at_3 = at_0 + min(3, count - 1) * apart
        tilezero(_SUMS_0)
        for i in range(count):
            tilestored(_SUMS_0, totals, i * TILE_WORDS, TILE_ROW_BYTES)
        for group in range(num_groups):
            step = group * group_steps
            end = min(step + group_steps, num_steps)
            _zero_sums()
            while step < end:
                rows = min(tile_steps, end - step)
                at = 0 if is_int4 else step * TILE_ROW_BYTES
                if is_int4:
                    source = panel_at + step * step_bytes
                    _unpack_panels(unpacked, panels, source, panel_bytes, count, rows)
                if rows == tile_steps:
                    _add_bytes(
                        codes, at_0 + at, at_1 + at, at_2 + at, at_3 + at, x, 4 * step, x_stride
                    )
                else:
                    _add_last_bytes(
                        codes, at_0 + at, at_1 + at, at_2 + at, at_3 + at, x, 4 * step, x_stride
                    )
                step += rows
            _store_sums(products, 0, TILE_WORDS, 2 * TILE_WORDS, 3 * TILE_WORDS, TILE_ROW_BYTES)
            store_floats(group_x_sums, x_sums, group * TOKENS)
            for i in range(count):
                scales_at = ((first + i) * num_groups + group) * LANES
                if has_zeros:
                    store_floats(offsets, zeros, scales_at)
                add_scaled(
                    totals,
                    products,
                    i * TILE_WORDS,
                    group_x_sums,
                    x_scales,
                    group * TOKENS,
                    offsets,
                    scales,
                    scales_at,
                )
        for i in range(count):
            tileloadd(_SUMS_0, totals, i * TILE_WORDS, TILE_ROW_BYTES)
            tilestored(_SUMS_0, y, LANES * (first + i), 4 * y_stride)
    tilerelease()

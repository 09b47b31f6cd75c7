"""The products of `microkernels.py` on the tiles of AMX (Intel, since 2023).

They read the panels of formats.py as they stand: 16 steps of bfloat16 or int8 are one tile; int4 is
unpacked into tiles first, 16 steps of 4 columns at a time. x lies as token_blocks.py says: units of
64 bytes of every token, so that a tile of x is one stretch of memory.

A call multiplies on eight tiles: four sums (16 tokens with four panels, or 32 with two), x, one
panel's weights, and both of these once more with the rows of the last tile, for which one
configuration then serves the whole call. The choice assumes that a product takes 52 cycles but one
starts every 16, so that two sums would wait for each other (26 cycles a product) and four do not;
beside 4 * 16 cycles of products stand 5 loads of 8. 32 tokens read half the weights from the cache,
whose second level gives less than the 64 bytes a cycle that 16 tokens would ask for.

Codes are summed exactly in int32 within a group, then scaled as the vector kernels do: the bits are
theirs. bfloat16 differs from them: even and odd columns of a tile are summed apart, and denormals,
read or made, count as zero. So for x and w in bfloat16

    |y - sum(x w)| <= (K + 5) 2**-24 sum|x w| + 2**-126 (sum(|x| + |w|) + K + 1).

Known: the machine code has the instructions meant; with the tile instructions emulated it gives the
right numbers. Not known: the speed on a processor with AMX. The cycles above are not measured, and
whether int8 in small groups gains is open: a tile product of 64 columns takes 16 cycles, the 64
vector operations that scale its sums at least 32.
"""

# M tokens of a block, K columns, G groups

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from cpu_kernels.compiling import Source
from cpu_kernels.microkernels import COLUMN_PADDING
from cpu_kernels.simd import pointer_at
from cpu_kernels.tile_emulator import EMULATED_TILES, STATE_BYTES
from cpu_kernels.tile_instructions import (
    CONFIG_BYTES,
    PROCESSOR_TILES,
    TILE_BYTES,
    TILE_ROW_BYTES,
    TILE_ROWS,
    Tiles,
    fold_tile,
    stack_bytes,
    unpack_nibbles,
    widen_sums,
)

_SUMS_0, _SUMS_1, _SUMS_2, _SUMS_3, _X, _WEIGHTS, _LAST_X, _LAST_WEIGHTS = range(8)
_NUM_SUMS = 4
_SUMS_BYTES = _NUM_SUMS * TILE_BYTES
_ZERO_CODES = {"int8": 128, "int4": 8}


def make_tile_kernel(kind: str, has_zeros: bool, num_tokens: int, is_emulated: bool) -> Source:
    """The product of so many tokens, at most 16 or 32, with panels of a format."""
    tiles = EMULATED_TILES if is_emulated else PROCESSOR_TILES
    state_bytes = STATE_BYTES if is_emulated else TILE_ROW_BYTES
    if kind == "bfloat16":
        return _bfloat16_kernel(tiles, state_bytes, num_tokens)
    zero_code = 0 if has_zeros else _ZERO_CODES[kind]
    return _byte_kernel(tiles, state_bytes, num_tokens, kind == "int4", zero_code)


def _make_configure(tiles: Tiles, rows: int) -> Callable[..., None]:
    """For `rows` tokens in a tile, `tile_steps` of a panel and (0: none) `last_steps`."""
    configure_tiles = tiles.configure

    @numba.njit(nogil=True, error_model="numpy")
    def configure(state: int, config: int, tile_steps: int, last_steps: int) -> None:
        sizes = pointer_at(config, np.uint8)
        for i in range(CONFIG_BYTES):
            sizes[i] = np.uint8(0)
        sizes[0] = np.uint8(1)
        for tile in range(_X):
            sizes[16 + 2 * tile] = np.uint8(TILE_ROW_BYTES)
            sizes[48 + tile] = np.uint8(rows)
        sizes[16 + 2 * _X] = np.uint8(4 * tile_steps)
        sizes[48 + _X] = np.uint8(rows)
        sizes[16 + 2 * _WEIGHTS] = np.uint8(TILE_ROW_BYTES)
        sizes[48 + _WEIGHTS] = np.uint8(tile_steps)
        if last_steps > 0:
            sizes[16 + 2 * _LAST_X] = np.uint8(4 * last_steps)
            sizes[48 + _LAST_X] = np.uint8(rows)
            sizes[16 + 2 * _LAST_WEIGHTS] = np.uint8(TILE_ROW_BYTES)
            sizes[48 + _LAST_WEIGHTS] = np.uint8(last_steps)
        configure_tiles(state, config)

    return configure


def _make_zero_sums(tiles: Tiles) -> Callable[..., None]:
    zero = tiles.zero

    @numba.njit(nogil=True, error_model="numpy")
    def zero_sums(state: int) -> None:
        zero(state, _SUMS_0)
        zero(state, _SUMS_1)
        zero(state, _SUMS_2)
        zero(state, _SUMS_3)

    return zero_sums


def _make_store_sums(tiles: Tiles) -> Callable[..., None]:
    store = tiles.store

    @numba.njit(nogil=True, error_model="numpy")
    def store_sums(state: int, at_0: int, at_1: int, at_2: int, at_3: int, stride: int) -> None:
        store(state, _SUMS_0, at_0, stride)
        store(state, _SUMS_1, at_1, stride)
        store(state, _SUMS_2, at_2, stride)
        store(state, _SUMS_3, at_3, stride)

    return store_sums


def _make_add(
    tiles: Tiles, multiply: Callable[..., None], num_tokens: int, x_tile: int, weights_tile: int
) -> Callable[..., None]:
    """Add a tile of x times one of each panel: sums 0 to 3 are of panels 0 to 3.

    With 32 tokens sums 0 and 1 are of the first 16 with panels 0 and 1, 2 and 3 of the others.
    """
    load = tiles.load

    @numba.njit(nogil=True, error_model="numpy")
    def add_panels(
        state: int, x: int, x_stride: int, at_0: int, at_1: int, at_2: int, at_3: int
    ) -> None:
        load(state, x_tile, x, x_stride)
        load(state, weights_tile, at_0, TILE_ROW_BYTES)
        multiply(state, _SUMS_0, x_tile, weights_tile)
        load(state, weights_tile, at_1, TILE_ROW_BYTES)
        multiply(state, _SUMS_1, x_tile, weights_tile)
        load(state, weights_tile, at_2, TILE_ROW_BYTES)
        multiply(state, _SUMS_2, x_tile, weights_tile)
        load(state, weights_tile, at_3, TILE_ROW_BYTES)
        multiply(state, _SUMS_3, x_tile, weights_tile)

    @numba.njit(nogil=True, error_model="numpy")
    def add_halves(
        state: int, x: int, x_stride: int, at_0: int, at_1: int, at_2: int, at_3: int
    ) -> None:
        others = x + TILE_ROWS * x_stride
        load(state, x_tile, x, x_stride)
        load(state, weights_tile, at_0, TILE_ROW_BYTES)
        multiply(state, _SUMS_0, x_tile, weights_tile)
        load(state, x_tile, others, x_stride)
        multiply(state, _SUMS_2, x_tile, weights_tile)
        load(state, weights_tile, at_1, TILE_ROW_BYTES)
        multiply(state, _SUMS_3, x_tile, weights_tile)
        # once more: a second tile for x there is not
        load(state, x_tile, x, x_stride)
        multiply(state, _SUMS_1, x_tile, weights_tile)

    add = add_halves if num_tokens > TILE_ROWS else add_panels
    return add


def _bfloat16_kernel(tiles: Tiles, state_bytes: int, tokens: int) -> Source:
    """A tile is 32 columns."""
    halves = (tokens + TILE_ROWS - 1) // TILE_ROWS
    at_once = _NUM_SUMS // halves
    release = tiles.release
    configure = _make_configure(tiles, min(tokens, TILE_ROWS))
    zero_sums, store_sums = _make_zero_sums(tiles), _make_store_sums(tiles)
    add = _make_add(tiles, tiles.multiply_bfloat16, tokens, _X, _WEIGHTS)
    add_last = _make_add(tiles, tiles.multiply_bfloat16, tokens, _LAST_X, _LAST_WEIGHTS)

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
        num_steps = (num_columns + 1) // 2
        whole, last_steps = num_steps // TILE_ROWS, num_steps % TILE_ROWS
        panel_bytes = num_steps * TILE_ROW_BYTES
        padded = (num_columns + COLUMN_PADDING - 1) // COLUMN_PADDING * COLUMN_PADDING
        last_stride = 2 * padded - whole * TILE_ROW_BYTES
        state = stack_bytes(state_bytes)
        configure(state, stack_bytes(CONFIG_BYTES), TILE_ROWS, last_steps)
        for first in range(0, num_panels, at_once):
            # Past the last panel the last one again: its tiles come from the cache, and fewer sums
            # would only wait for each other.
            more_1 = min(1, num_panels - 1 - first)
            more_2 = min(2, num_panels - 1 - first)
            more_3 = min(3, num_panels - 1 - first)
            at_0 = panels + first * panel_bytes
            at_1 = at_0 + more_1 * panel_bytes
            at_2 = at_0 + more_2 * panel_bytes
            at_3 = at_0 + more_3 * panel_bytes
            zero_sums(state)
            x_at = x
            for _tile in range(whole):
                add(state, x_at, TILE_ROW_BYTES, at_0, at_1, at_2, at_3)
                x_at += tokens * TILE_ROW_BYTES
                at_0 += TILE_BYTES
                at_1 += TILE_BYTES
                at_2 += TILE_BYTES
                at_3 += TILE_BYTES
            if last_steps > 0:
                add_last(state, x_at, last_stride, at_0, at_1, at_2, at_3)
            y_0 = y + TILE_ROW_BYTES * first
            y_1 = y_0 + TILE_ROW_BYTES * more_1
            y_2, y_3 = y_0 + TILE_ROW_BYTES * more_2, y_0 + TILE_ROW_BYTES * more_3
            if halves == 2:
                y_2, y_3 = y_0 + TILE_ROWS * 4 * y_stride, y_1 + TILE_ROWS * 4 * y_stride
            store_sums(state, y_0, y_1, y_2, y_3, 4 * y_stride)
        release(state)

    return Source(kernel, num_arguments=10)


@numba.njit(nogil=True, error_model="numpy")
def _unpack_panels(target: int, packed: int, panel_bytes: int, count: int, rows: int) -> None:
    """Write `rows` rows of a tile for each of `count` panels, from half as many int4 steps."""
    for panel in range(count):
        for row in range(0, rows, 2):
            unpack_nibbles(
                target + panel * TILE_BYTES + row * TILE_ROW_BYTES,
                packed + panel * panel_bytes + row // 2 * TILE_ROW_BYTES,
            )


def _byte_kernel(
    tiles: Tiles, state_bytes: int, tokens: int, is_int4: bool, zero_code: int
) -> Source:
    """Codes and x in int8. A tile is 64 columns, or a group of 32; a step here is 4 columns."""
    rows = min(tokens, TILE_ROWS)
    halves = (tokens + TILE_ROWS - 1) // TILE_ROWS
    at_once = _NUM_SUMS // halves
    # a step of int4 is half of what 64 bytes of a panel hold
    step_bytes = TILE_ROW_BYTES // 2 if is_int4 else TILE_ROW_BYTES
    release, zero, load, store = tiles.release, tiles.zero, tiles.load, tiles.store
    configure = _make_configure(tiles, rows)
    zero_sums, store_sums = _make_zero_sums(tiles), _make_store_sums(tiles)
    add = _make_add(tiles, tiles.multiply_bytes, tokens, _X, _WEIGHTS)
    add_last = _make_add(tiles, tiles.multiply_bytes, tokens, _LAST_X, _LAST_WEIGHTS)

    @numba.njit(nogil=True, error_model="numpy")
    def fold_group(
        totals: int,
        products: int,
        count: int,
        x_sums: int,
        x_scales: int,
        scales: int,
        zeros: int,
        num_groups: int,
    ) -> None:
        floats = stack_bytes(TILE_ROW_BYTES)
        for half in range(halves):
            widen_sums(rows, floats, x_sums + half * TILE_ROW_BYTES)
            for panel in range(count):
                place = (half * at_once + panel) * TILE_BYTES
                fold_tile(
                    rows,
                    zero_code,
                    totals + place,
                    products + place,
                    floats,
                    x_scales + half * TILE_ROW_BYTES,
                    scales + panel * num_groups * 32,
                    zeros + panel * num_groups * 16,
                )

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
        groups = (num_columns + group_size - 1) // group_size
        num_steps = (num_columns + 7) // 8 * 2 if is_int4 else (num_columns + 3) // 4
        group_steps = group_size // 4
        tile_steps = min(TILE_ROWS, group_steps)
        panel_bytes = num_steps * step_bytes
        padded = (num_columns + COLUMN_PADDING - 1) // COLUMN_PADDING * COLUMN_PADDING
        x_sums = x_scales + groups * 4 * tokens
        state = stack_bytes(state_bytes)
        totals, products = stack_bytes(_SUMS_BYTES), stack_bytes(_SUMS_BYTES)
        unpacked = stack_bytes(_SUMS_BYTES)
        apart = TILE_BYTES if is_int4 else panel_bytes
        configure(state, stack_bytes(CONFIG_BYTES), tile_steps, num_steps % tile_steps)
        for first in range(0, num_panels, at_once):
            # past the last panel the last one again, as for bfloat16, but it is scaled only once
            count = min(at_once, num_panels - first)
            panel = panels + first * panel_bytes
            zero(state, _SUMS_0)
            for i in range(_NUM_SUMS):
                store(state, _SUMS_0, totals + i * TILE_BYTES, TILE_ROW_BYTES)
            step = 0
            for group in range(groups):
                end = min(step + group_steps, num_steps)
                zero_sums(state)
                while step < end:
                    steps = min(tile_steps, end - step)
                    at_0 = panel + step * step_bytes
                    if is_int4:
                        _unpack_panels(unpacked, at_0, panel_bytes, count, steps)
                        at_0 = unpacked
                    at_1 = at_0 + min(1, count - 1) * apart
                    at_2 = at_0 + min(2, count - 1) * apart
                    at_3 = at_0 + min(3, count - 1) * apart
                    unit = step // TILE_ROWS * TILE_ROW_BYTES
                    x_at = x + unit * tokens + 4 * (step % TILE_ROWS)
                    x_stride = min(TILE_ROW_BYTES, padded - unit)
                    if steps == tile_steps:
                        add(state, x_at, x_stride, at_0, at_1, at_2, at_3)
                    else:
                        add_last(state, x_at, x_stride, at_0, at_1, at_2, at_3)
                    step += steps
                store_sums(
                    state,
                    products,
                    products + TILE_BYTES,
                    products + 2 * TILE_BYTES,
                    products + 3 * TILE_BYTES,
                    TILE_ROW_BYTES,
                )
                place = first * groups + group
                fold_group(
                    totals,
                    products,
                    count,
                    x_sums + group * 4 * tokens,
                    x_scales + group * 4 * tokens,
                    scales + place * 32,
                    zeros + place * 16,
                    groups,
                )
            for half in range(halves):
                for i in range(count):
                    load(state, _SUMS_0, totals + (half * at_once + i) * TILE_BYTES, TILE_ROW_BYTES)
                    target = y + TILE_ROW_BYTES * (first + i + half * y_stride)
                    store(state, _SUMS_0, target, 4 * y_stride)
        release(state)

    return Source(kernel, num_arguments=10)

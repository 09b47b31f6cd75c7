"""The tile instructions of AMX in memory, for machines without: what Intel's manual says of them.

Kernels compiled with these run anywhere, slowly, and give what a processor would. What a processor
would refuse (a tile that is not configured, operands that do not fit) spoils the sums.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from cpu_kernels.simd import pointer_at
from cpu_kernels.tile_instructions import (
    CONFIG_BYTES,
    TILE_BYTES,
    TILE_ROW_BYTES,
    TILE_ROWS,
    Tiles,
)

_NUM_TILES = 8
# The configuration, then the tiles
STATE_BYTES = CONFIG_BYTES + _NUM_TILES * TILE_BYTES
_ROW_BYTES_AT, _ROWS_AT = 16, 48
_NAN_BITS = 0x7FC00000  # far from any sum of ours also where it is an integer
_SMALLEST_NORMAL = np.float32(2.0**-126)


@numba.njit(nogil=True, error_model="numpy")
def _rows(state: int, tile: int) -> int:
    return int(pointer_at(state, np.uint8)[_ROWS_AT + tile])


@numba.njit(nogil=True, error_model="numpy")
def _row_bytes(state: int, tile: int) -> int:
    return int(pointer_at(state + _ROW_BYTES_AT, np.uint16)[tile])


@numba.njit(nogil=True, error_model="numpy")
def _tile_at(state: int, tile: int) -> int:
    return state + CONFIG_BYTES + tile * TILE_BYTES


@numba.njit(nogil=True, error_model="numpy")
def _is_valid(config: Any, row_bytes: Any) -> bool:
    """Palette 1, sizes within the tiles and both or none of a tile, zeros elsewhere."""
    valid = int(config[0]) == 1
    for i in range(CONFIG_BYTES):
        is_size = _ROW_BYTES_AT <= i < _ROW_BYTES_AT + 2 * _NUM_TILES
        is_size = is_size or _ROWS_AT <= i < _ROWS_AT + _NUM_TILES
        valid = valid and (i == 0 or is_size or config[i] == 0)
    for tile in range(_NUM_TILES):
        rows, width = int(config[_ROWS_AT + tile]), int(row_bytes[tile])
        valid = valid and rows <= TILE_ROWS and width <= TILE_ROW_BYTES
        valid = valid and (rows == 0) == (width == 0) and width % 4 == 0
    return valid


@numba.njit(nogil=True, error_model="numpy")
def _release(state: int) -> None:
    memory = pointer_at(state, np.int64)
    for i in range(STATE_BYTES // 8):
        memory[i] = 0


@numba.njit(nogil=True, error_model="numpy")
def _configure(state: int, config: int) -> None:
    _release(state)
    given = pointer_at(config, np.uint8)
    if _is_valid(given, pointer_at(config + _ROW_BYTES_AT, np.uint16)):
        memory = pointer_at(state, np.uint8)
        for i in range(CONFIG_BYTES):
            memory[i] = given[i]


@numba.njit(nogil=True, error_model="numpy")
def _fill(state: int, tile: int, word: int) -> None:
    words = pointer_at(_tile_at(state, tile), np.int32)
    for i in range(TILE_BYTES // 4):
        words[i] = word


@numba.njit(nogil=True, error_model="numpy")
def _zero(state: int, tile: int) -> None:
    _fill(state, tile, 0 if _rows(state, tile) > 0 else _NAN_BITS)


@numba.njit(nogil=True, error_model="numpy")
def _load(state: int, tile: int, address: int, stride: int) -> None:
    _fill(state, tile, 0)
    for row in range(_rows(state, tile)):
        source = pointer_at(address + row * stride, np.uint8)
        target = pointer_at(_tile_at(state, tile) + row * TILE_ROW_BYTES, np.uint8)
        for i in range(_row_bytes(state, tile)):
            target[i] = source[i]


@numba.njit(nogil=True, error_model="numpy")
def _store(state: int, tile: int, address: int, stride: int) -> None:
    for row in range(_rows(state, tile)):
        source = pointer_at(_tile_at(state, tile) + row * TILE_ROW_BYTES, np.uint8)
        target = pointer_at(address + row * stride, np.uint8)
        for i in range(_row_bytes(state, tile)):
            target[i] = source[i]


@numba.njit(nogil=True, error_model="numpy")
def _fit(state: int, sums: int, x: int, weights: int) -> bool:
    """Do the sizes go together, and are the three different tiles?"""
    rows, steps = _rows(state, sums), _rows(state, weights)
    found = rows > 0 and steps > 0 and sums != x and sums != weights and x != weights
    found = found and _rows(state, x) == rows and _row_bytes(state, x) == 4 * steps
    return found and _row_bytes(state, sums) == _row_bytes(state, weights)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _flushed(value: Any) -> Any:
    """A denormal as zero."""
    return np.float32(0) if abs(value) < _SMALLEST_NORMAL else value


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _float(bits: Any) -> Any:
    """The bfloat16 in the upper half of 32 bits."""
    return _flushed(np.uint32(bits & 0xFFFF0000).view(np.float32))


@numba.njit(nogil=True, error_model="numpy")
def _multiply_bfloat16(state: int, sums: int, x: int, weights: int) -> None:
    """Even and odd columns are summed apart, then both and what was there.

    A product of two bfloat16 is a float32 where it is in range, so that the manual's fused
    operation rounds no less.
    """
    if not _fit(state, sums, x, weights):
        _fill(state, sums, _NAN_BITS)
        return
    for row in range(_rows(state, sums)):
        total = pointer_at(_tile_at(state, sums) + row * TILE_ROW_BYTES, np.float32)
        a = pointer_at(_tile_at(state, x) + row * TILE_ROW_BYTES, np.uint32)
        for word in range(_row_bytes(state, sums) // 4):
            even, odd = np.float32(0), np.float32(0)
            for step in range(_rows(state, weights)):
                b = pointer_at(_tile_at(state, weights) + step * TILE_ROW_BYTES, np.uint32)
                even = _flushed(even + _float(a[step] << 16) * _float(b[word] << 16))
                odd = _flushed(odd + _float(a[step]) * _float(b[word]))
            total[word] = _flushed(_flushed(total[word]) + _flushed(even + odd))


@numba.njit(nogil=True, error_model="numpy")
def _multiply_bytes(state: int, sums: int, x: int, weights: int) -> None:
    if not _fit(state, sums, x, weights):
        _fill(state, sums, _NAN_BITS)
        return
    for row in range(_rows(state, sums)):
        total = pointer_at(_tile_at(state, sums) + row * TILE_ROW_BYTES, np.int32)
        a = pointer_at(_tile_at(state, x) + row * TILE_ROW_BYTES, np.int8)
        for step in range(_rows(state, weights)):
            b = pointer_at(_tile_at(state, weights) + step * TILE_ROW_BYTES, np.uint8)
            for word in range(_row_bytes(state, sums) // 4):
                for byte in range(4):
                    product = np.int32(a[4 * step + byte]) * np.int32(b[4 * word + byte])
                    total[word] += np.int32(product)


EMULATED_TILES = Tiles(
    configure=_configure,
    release=_release,
    zero=_zero,
    load=_load,
    store=_store,
    multiply_bfloat16=_multiply_bfloat16,
    multiply_bytes=_multiply_bytes,
)

"""The tile registers of Intel's AMX as numba operations, and the vector work between tile products.

There are eight tiles of at most 16 rows of 64 bytes; `configure` sets the rows and the bytes of a
row of each. A product adds x (rows x 4k bytes) times weights (k rows of 4-byte words) to sums (rows
x words): word j of a row of x meets row j of the weights, and the bytes or bfloat16 pairs of the
two words are multiplied and summed. Tile numbers are constants in the code, so LLVM allocates no
tiles, spills none and leaves the configuration alone.

Addresses and strides are plain numbers of bytes. Every instruction takes `state` first: memory in
which tile_emulator.py keeps its tiles, and nothing to a processor, which has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from cpu_kernels.formats import PANEL_ROWS
from cpu_kernels.panel_ops import (
    _all_lanes,
    _broadcast,
    _load_scales,
    _load_words,
    _load_zeros,
    _multiply_add,
    _offset,
    _operation,
    _operation_of_literals,
    _pointer,
)
from cpu_kernels.simd import _call

TILE_ROWS = 16
TILE_ROW_BYTES = 64
TILE_BYTES = TILE_ROWS * TILE_ROW_BYTES
CONFIG_BYTES = 64

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_F32 = ir.FloatType()
_COLUMN = ir.VectorType(_F32, PANEL_ROWS)
_PACKED = ir.VectorType(_I8, TILE_ROW_BYTES)


class Tiles(NamedTuple):
    """The seven instructions, of the processor or emulated.

    `configure(state, config)` reads 64 bytes: byte 0 is the palette, 1; bytes 16 + 2t, of 16 bits,
    hold the bytes of a row of tile t, bytes 48 + t its rows; the others are zero. It zeroes the
    tiles. `release(state)` drops tiles and configuration, so that a switch of threads need not save
    them. `zero(state, tile)`. `load` and `store(state, tile, address, stride)` move a tile whose
    row r starts at address + r * stride. `multiply_bfloat16(state, sums, x, weights)` adds products
    of pairs of bfloat16 to float32 sums, `multiply_bytes` those of four signed bytes of x and
    unsigned bytes of weights to int32 sums.
    """

    configure: Callable[..., None]
    release: Callable[..., None]
    zero: Callable[..., None]
    load: Callable[..., None]
    store: Callable[..., None]
    multiply_bfloat16: Callable[..., None]
    multiply_bytes: Callable[..., None]


def _constant(number_type: Any) -> Any:
    return ir.Constant(_I8, number_type.literal_value)


@_operation
def _ldtilecfg(_: Any, state: Any, config: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[1], _I8)
        _call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [pointer])
        return context.get_dummy_value()

    return types.none(types.intp, types.intp), generate


@_operation
def _tilerelease(_: Any, state: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.none(types.intp), generate


def _on_tiles(name: str) -> Callable[..., Any]:
    """Code of an instruction whose operands are tiles only."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, name, ir.VoidType(), [_constant(tile) for tile in signature.args[1:]])
        return context.get_dummy_value()

    return generate


def _on_memory(name: str) -> Callable[..., Any]:
    """Code of an instruction that moves a tile."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, address, stride = arguments
        operands = [_constant(signature.args[1]), _pointer(builder, address, _I8), stride]
        _call(builder, name, ir.VoidType(), operands)
        return context.get_dummy_value()

    return generate


@_operation_of_literals
def _tilezero(_: Any, state: Any, tile: Any) -> Any:
    return types.none(types.intp, tile), _on_tiles("llvm.x86.tilezero")


@_operation_of_literals
def _tileloadd(_: Any, state: Any, tile: Any, address: Any, stride: Any) -> Any:
    signature = types.none(types.intp, tile, types.intp, types.intp)
    return signature, _on_memory("llvm.x86.tileloadd64")


@_operation_of_literals
def _tilestored(_: Any, state: Any, tile: Any, address: Any, stride: Any) -> Any:
    signature = types.none(types.intp, tile, types.intp, types.intp)
    return signature, _on_memory("llvm.x86.tilestored64")


@_operation_of_literals
def _tdpbf16ps(_: Any, state: Any, sums: Any, x: Any, weights: Any) -> Any:
    return types.none(types.intp, sums, x, weights), _on_tiles("llvm.x86.tdpbf16ps")


@_operation_of_literals
def _tdpbsud(_: Any, state: Any, sums: Any, x: Any, weights: Any) -> Any:
    return types.none(types.intp, sums, x, weights), _on_tiles("llvm.x86.tdpbsud")


PROCESSOR_TILES = Tiles(
    configure=_ldtilecfg,
    release=_tilerelease,
    zero=_tilezero,
    load=_tileloadd,
    store=_tilestored,
    multiply_bfloat16=_tdpbf16ps,
    multiply_bytes=_tdpbsud,
)


@_operation_of_literals
def stack_bytes(_: Any, size: Any) -> Any:
    """Address of so many bytes on the stack, at a cache line's start, not filled."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = ir.ArrayType(_I8, signature.args[0].literal_value)
        with builder.goto_entry_block():
            start = builder.alloca(memory)
            start.align = TILE_ROW_BYTES
        return builder.ptrtoint(start, _I64)

    return types.intp(size), generate


@_operation
def unpack_nibbles(_: Any, target: Any, packed: Any) -> Any:
    """Write the low four bits of 64 bytes as one row of a tile and the high four as the next."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, packed = arguments
        codes = builder.load(_pointer(builder, packed, _PACKED), align=1)
        low = builder.and_(codes, _all_lanes(_PACKED, 15))
        high = builder.lshr(codes, _all_lanes(_PACKED, 4))
        for row in (low, high):
            builder.store(row, _pointer(builder, target, _PACKED), align=TILE_ROW_BYTES)
            target = _offset(builder, target, TILE_ROW_BYTES)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp), generate


@_operation_of_literals
def widen_sums(_: Any, rows: Any, target: Any, x_sums: Any) -> Any:
    """Write the int32 sums of `rows` tokens as float32.

    One after the other they would be stores that the next reads of all of them wait for.
    """
    lanes = rows.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, target, x_sums = arguments
        numbers = builder.load(_pointer(builder, x_sums, ir.VectorType(_I32, lanes)), align=4)
        floats = ir.VectorType(_F32, lanes)
        place = _pointer(builder, target, floats)
        builder.store(builder.sitofp(numbers, floats), place, align=4 * lanes)
        return context.get_dummy_value()

    return types.none(rows, types.intp, types.intp), generate


@_operation_of_literals
def fold_tile(
    _: Any,
    rows: Any,
    zero_code: Any,
    totals: Any,
    products: Any,
    x_sums: Any,
    x_scales: Any,
    scales: Any,
    zeros: Any,
) -> Any:
    """totals[t] += (products[t] - x_sums[t] * zeros) * (scales * x_scales[t]), for `rows` tokens.

    `totals` (float32) and `products` (int32) are tiles, `x_sums` and `x_scales` float32, one a
    token. All but the last product and sum are exact: the bits are those of panel_ops.fold_group.
    """
    num_rows, code = rows.literal_value, zero_code.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, totals, products, x_sums, x_scales, scales, zeros = arguments
        scale = _load_scales(builder, scales)
        zero = builder.sitofp(_load_zeros(builder, zeros, code), _COLUMN)
        minus_zero = builder.fsub(_all_lanes(_COLUMN, 0.0), zero)
        for token in range(num_rows):
            row, word = TILE_ROW_BYTES * token, 4 * token
            x_sum = _broadcast(builder, _offset(builder, x_sums, word), _F32, _COLUMN)
            x_scale = _broadcast(builder, _offset(builder, x_scales, word), _F32, _COLUMN)
            words = _load_words(builder, _offset(builder, products, row))
            product = builder.sitofp(words, _COLUMN)
            centred = _multiply_add(builder, minus_zero, x_sum, product)
            factor = builder.fmul(scale, x_scale)
            place = _pointer(builder, _offset(builder, totals, row), _COLUMN)
            before = builder.load(place, align=TILE_ROW_BYTES)
            after = _multiply_add(builder, centred, factor, before)
            builder.store(after, place, align=TILE_ROW_BYTES)
        return context.get_dummy_value()

    return types.none(rows, zero_code, *[types.intp] * 6), generate

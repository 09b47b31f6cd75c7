"""The tile registers of Intel's AMX as numba operations, and the vector work between tile products.

There are eight tiles of at most 16 rows of 64 bytes; `ldtilecfg` sets the rows and the bytes of a
row of each. A product adds x (rows x 4k bytes) times weights (k rows of 4-byte words) to sums (rows
x words): word j of a row of x meets row j of the weights, and the bytes or bfloat16 pairs of the
two words are multiplied and summed. Tile numbers are constants in the code, so LLVM allocates no
tiles, spills none and leaves the configuration alone.

An `array` and its index are what they are in simd.py; strides are in bytes. The instructions have
no Python form, for the tiles are state of the processor: tests put a model of it in their place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numpy.typing import NDArray

from cpu_kernels.formats import from_bfloat16_bits
from cpu_kernels.simd import _call, _compiled_by, _element

TILE_ROWS = 16
TILE_ROW_BYTES = 64
TILE_BYTES = TILE_ROWS * TILE_ROW_BYTES
TILE_WORDS = TILE_BYTES // 4  # float32 or int32 in a tile of sums
LANES = 16  # words in a row of a tile, whatever the vectors of the machine

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))
_F32 = ir.FloatType()
_FLOATS = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)
_PACKED = ir.VectorType(_I8, TILE_ROW_BYTES)


def _outside_compiled_code() -> NotImplementedError:
    return NotImplementedError("tiles are registers of the processor: only compiled code has them")


def _require_constants(*numbers: Any) -> None:
    # numba tries the plain types first and then, after this error, those of the constants
    if not all(isinstance(number, types.IntegerLiteral) for number in numbers):
        raise TypingError("tile numbers and sizes must be constants")


def _constant(number_type: Any) -> Any:
    return ir.Constant(_I8, number_type.literal_value)


def _bytes_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    address = _element(context, builder, array_type, array, index)
    return builder.bitcast(address, _I8.as_pointer())


def _generate_ldtilecfg(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    config = _bytes_at(context, builder, signature.args[0], arguments[0], ir.Constant(_I32, 0))
    _call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [config])
    return context.get_dummy_value()


@_compiled_by(_generate_ldtilecfg, lambda config: types.none(config))
def ldtilecfg(config: NDArray[np.uint8]) -> None:
    """Configure the tiles and zero them.

    Byte 0 is the palette, 1; bytes 16 + 2t, of 16 bits, hold the bytes of a row of tile t, bytes
    48 + t its rows; the others are zero.
    """
    raise _outside_compiled_code()


def _generate_tilerelease(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    _call(builder, "llvm.x86.tilerelease", ir.VoidType(), [])
    return context.get_dummy_value()


@_compiled_by(_generate_tilerelease, lambda: types.none())
def tilerelease() -> None:
    """Drop tiles and configuration, so that a switch of threads need not save them."""
    raise _outside_compiled_code()


def _numbers_only(*tiles: Any) -> Any:
    _require_constants(*tiles)
    return types.none(*tiles)


def _tiles_instruction(name: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, name, ir.VoidType(), [_constant(tile) for tile in signature.args])
        return context.get_dummy_value()

    return generate


@_compiled_by(_tiles_instruction("llvm.x86.tilezero"), _numbers_only)
def tilezero(tile: int) -> None:
    """Fill a tile with zeros."""
    raise _outside_compiled_code()


@_compiled_by(_tiles_instruction("llvm.x86.tdpbf16ps"), _numbers_only)
def tdpbf16ps(sums: int, x: int, weights: int) -> None:
    """Add the products of bfloat16 pairs to float32 sums; denormals count as zero."""
    raise _outside_compiled_code()


@_compiled_by(_tiles_instruction("llvm.x86.tdpbsud"), _numbers_only)
def tdpbsud(sums: int, x: int, weights: int) -> None:
    """Add the products of four signed bytes of x and unsigned bytes of weights to int32 sums."""
    raise _outside_compiled_code()


def _tile_and_memory(tile: Any, array: Any, index: Any, stride: Any) -> Any:
    _require_constants(tile)
    return types.none(tile, array, types.intp, types.intp)


def _memory_instruction(name: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, array, index, stride = arguments
        start = _bytes_at(context, builder, signature.args[1], array, index)
        _call(builder, name, ir.VoidType(), [_constant(signature.args[0]), start, stride])
        return context.get_dummy_value()

    return generate


@_compiled_by(_memory_instruction("llvm.x86.tileloadd64"), _tile_and_memory)
def tileloadd(tile: int, array: NDArray[Any], index: int, stride: int) -> None:
    """Read a tile whose row r starts `r * stride` bytes behind array[index]."""
    raise _outside_compiled_code()


@_compiled_by(_memory_instruction("llvm.x86.tilestored64"), _tile_and_memory)
def tilestored(tile: int, array: NDArray[Any], index: int, stride: int) -> None:
    """Write a tile whose row r starts `r * stride` bytes behind array[index]."""
    raise _outside_compiled_code()


def _on_stack(element: Any, size_type: Any) -> Any:
    _require_constants(size_type)
    return types.CPointer(element)(size_type)  # type: ignore[no-untyped-call]


def _generate_on_stack(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    pointer_type = context.get_value_type(signature.return_type)
    memory = ir.ArrayType(pointer_type.pointee, signature.args[0].literal_value)
    with builder.goto_entry_block():
        start = builder.alloca(memory)
        start.align = TILE_ROW_BYTES
    return builder.bitcast(start, pointer_type)


@_compiled_by(_generate_on_stack, lambda size: _on_stack(types.float32, size))
def stack_floats(size: int) -> NDArray[np.float32]:
    """Return memory for `size` float32 on the stack, starting at a cache line, not filled."""
    return np.full(size, np.nan, np.float32)


@_compiled_by(_generate_on_stack, lambda size: _on_stack(types.uint8, size))
def stack_bytes(size: int) -> NDArray[np.uint8]:
    """Return memory for `size` bytes on the stack, starting at a cache line, not filled."""
    return np.full(size, 0xA5, np.uint8)


def _generate_unpack_nibbles(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    target, target_at, packed, packed_at = arguments
    source = _bytes_at(context, builder, signature.args[2], packed, packed_at)
    codes = builder.load(builder.bitcast(source, _PACKED.as_pointer()), align=1)
    low = builder.and_(codes, ir.Constant(_PACKED, [15] * TILE_ROW_BYTES))
    high = builder.lshr(codes, ir.Constant(_PACKED, [4] * TILE_ROW_BYTES))
    first = _bytes_at(context, builder, signature.args[0], target, target_at)
    second = builder.gep(first, [ir.Constant(_I32, TILE_ROW_BYTES)])
    for start, row in ((first, low), (second, high)):
        builder.store(row, builder.bitcast(start, _PACKED.as_pointer()), align=TILE_ROW_BYTES)
    return context.get_dummy_value()


@_compiled_by(
    _generate_unpack_nibbles,
    lambda target, i, packed, j: types.none(target, types.intp, packed, types.intp),
)
def unpack_nibbles(
    target: NDArray[np.uint8], target_at: int, packed: NDArray[np.uint8], packed_at: int
) -> None:
    """Write the low four bits of 64 bytes as one row of a tile and the high four as the next."""
    codes = packed[packed_at : packed_at + TILE_ROW_BYTES]
    target[target_at : target_at + TILE_ROW_BYTES] = codes & 15
    target[target_at + TILE_ROW_BYTES : target_at + 2 * TILE_ROW_BYTES] = codes >> 4


def _generate_store_floats(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    target, source, source_at = arguments
    element = signature.args[1].dtype
    stored = ir.VectorType(_I8 if element == types.uint8 else _I32, LANES)
    first = _element(context, builder, signature.args[1], source, source_at)
    numbers = builder.load(builder.bitcast(first, stored.as_pointer()), align=element.bitwidth // 8)
    if stored != _INTS:
        numbers = builder.zext(numbers, _INTS)
    start = _element(context, builder, signature.args[0], target, ir.Constant(_I32, 0))
    place = builder.bitcast(start, _FLOATS.as_pointer())
    builder.store(builder.sitofp(numbers, _FLOATS), place, align=TILE_ROW_BYTES)
    return context.get_dummy_value()


@_compiled_by(
    _generate_store_floats, lambda target, source, i: types.none(target, source, types.intp)
)
def store_floats(target: NDArray[np.float32], source: NDArray[Any], source_at: int) -> None:
    """Write 16 numbers of source[source_at:], uint8 or int32, as float32 to target.

    One after the other they would be 16 stores that the next 64-byte load has to wait for.
    """
    target[:LANES] = source[source_at : source_at + LANES]


def _splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _generate_add_scaled(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    types_of = signature.args
    totals, products, at, x_sums, x_scales, x_at, offsets, scales, scales_at = arguments
    zero = ir.Constant(_I32, 0)

    def row(number: int, array: Any, index: Any, llvm_type: Any, align: int) -> Any:
        start = _element(context, builder, types_of[number], array, index)
        return builder.bitcast(start, llvm_type.as_pointer()), align

    def read(place: tuple[Any, int]) -> Any:
        return builder.load(place[0], align=place[1])

    def multiply_add(x: Any, y: Any, z: Any) -> Any:
        return _call(builder, f"llvm.fmuladd.v{LANES}f32", _FLOATS, [x, y, z])

    halves = read(row(7, scales, scales_at, ir.VectorType(_I16, LANES), 2))
    bits = builder.shl(builder.zext(halves, _INTS), ir.Constant(_INTS, [16] * LANES))
    scale = builder.bitcast(bits, _FLOATS)
    offset = read(row(6, offsets, zero, _FLOATS, TILE_ROW_BYTES))
    for token in range(TILE_ROWS):
        index = builder.add(at, ir.Constant(at.type, token * LANES))
        product = builder.sitofp(read(row(1, products, index, _INTS, TILE_ROW_BYTES)), _FLOATS)
        x_sum = read(row(3, x_sums, ir.Constant(_I32, token), _F32, 4))
        x_index = builder.add(x_at, ir.Constant(x_at.type, token))
        x_scale = read(row(4, x_scales, x_index, _F32, 4))
        minus_offset = builder.fsub(ir.Constant(_FLOATS, [-0.0] * LANES), offset)
        centred = multiply_add(_splat(builder, x_sum), minus_offset, product)
        scaled = builder.fmul(_splat(builder, x_scale), centred)
        total = row(0, totals, index, _FLOATS, TILE_ROW_BYTES)
        builder.store(multiply_add(scaled, scale, read(total)), total[0], align=total[1])
    return context.get_dummy_value()


@_compiled_by(
    _generate_add_scaled,
    lambda totals, products, i, x_sums, x_scales, j, offsets, scales, k: types.none(
        totals, products, types.intp, x_sums, x_scales, types.intp, offsets, scales, types.intp
    ),
)
def add_scaled(
    totals: NDArray[np.float32],
    products: NDArray[np.float32],
    at: int,
    x_sums: NDArray[np.float32],
    x_scales: NDArray[np.float32],
    x_scales_at: int,
    offsets: NDArray[np.float32],
    scales: NDArray[np.uint16],
    scales_at: int,
) -> None:
    """Add (products - x_sums * offsets) * x_scales * scales to totals, for 16 tokens and 16 rows.

    `totals[at:]` and `products[at:]` are tiles, one row a token, the products the bits of int32;
    `x_sums` and `x_scales[x_scales_at:]` have one value a token, `offsets` and
    `scales[scales_at:]` (the bits of bfloat16) one a row of the weights.
    """
    tile = slice(at, at + TILE_WORDS)
    shape = (TILE_ROWS, LANES)
    product = products[tile].view(np.int32).reshape(shape).astype(np.float32)
    x_scale = x_scales[x_scales_at : x_scales_at + TILE_ROWS, None]
    scale = from_bfloat16_bits(scales[scales_at : scales_at + LANES])
    centred = product - x_sums[:TILE_ROWS, None] * offsets[:LANES]
    totals[tile] += (x_scale * centred * scale).reshape(-1)

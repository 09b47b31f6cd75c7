"""Vectors and 4 x 4 tiles of vectors as numba values, with a plain Python twin of every operation.

A compiled operation becomes one or a few LLVM vector instructions, so one kernel source is AVX-512,
AVX2, SSE2 or NEON code, whichever the machine has. Called from Python (a kernel's `.py_func`) the
same operation works on small numpy arrays, which is also its definition.

A *tile* is 16 accumulator vectors in 4 rows and 4 columns: `add_outer` adds row_i * column_j lane
by lane to each, 16 multiply-adds for 8 operands. An `array` is a pointer in compiled code (one
argument where a numba array is seven, and no code for negative indices) and a one-dimensional
array in Python. Its elements are float32, uint16 (the bits of bfloat16) or int16
(the bits of float16).
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import infer_global, make_intrinsic_template
from numba.extending import models, register_model
from numpy.typing import NDArray

from cpu_kernels.calls import CACHE_LINE_BYTES
from cpu_kernels.formats import from_bfloat16_bits, to_bfloat16_bits
from cpu_kernels.isa import configure_numba, isa

configure_numba()  # before any kernel on vectors is compiled

# A tile of 16-lane vectors fits the 32 registers of AVX-512; elsewhere it would be twice the file.
LANES = 16 if isa().has("avx512") else 8
TILE = 4

Vector = NDArray[np.float32]  # (LANES,) in the Python twins
Tile = NDArray[np.float32]  # (TILE, TILE, LANES) in the Python twins

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_LLVM_VECTOR = ir.VectorType(_F32, LANES)
_LLVM_BITS = ir.VectorType(_I32, LANES)

# x86 without F16C: LLVM would call a library that is not there, and end the process.
_HAS_FLOAT16 = isa().has("avx2") or platform.machine().lower() not in ("x86_64", "amd64")
# float16 as float32 bits: exponents of the smallest normal number, 2**-14, and of 2**16, the first
# too large one; what a float32's exponent is more than a float16's; the sign.
_SMALLEST_NORMAL, _TOO_LARGE, _REBIAS, _SIGN = 113 << 23, 143 << 23, 112 << 23, 1 << 31


class _VectorType(types.Type):
    pass


class _TileType(types.Type):
    pass


_vector = _VectorType(f"float32x{LANES}")
_tile = _TileType(f"float32x{LANES}_tile")


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _LLVM_VECTOR)  # type: ignore[no-untyped-call]


@register_model(_TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        sixteen = ir.ArrayType(_LLVM_VECTOR, TILE * TILE)
        super().__init__(manager, numba_type, sixteen)  # type: ignore[no-untyped-call]


# numba calls a code generator with (context, builder, signature, LLVM values of the arguments)
_Generator = Callable[[Any, Any, Any, Any], Any]
_Twin = TypeVar("_Twin", bound=Callable[..., Any])


def _compiled_by(generator: _Generator, result: Any) -> Callable[[_Twin], _Twin]:
    """Compile calls of the decorated function with `generator`; from Python it stays what it is.

    `numba.extending.intrinsic` does the same but leaves nothing callable from Python, and without
    that no kernel's `.py_func` could be tested.
    """

    def register(twin: _Twin) -> _Twin:
        def definition(typing_context: Any, *arguments: Any) -> Any:
            return result(*arguments), generator

        own = inspect.signature(twin).parameters.values()
        context = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        definition.__signature__ = inspect.Signature([context, *own])  # type: ignore[attr-defined]
        template = make_intrinsic_template(  # type: ignore[no-untyped-call]
            twin, definition, twin.__name__
        )
        infer_global(twin, types.Function(template))  # type: ignore[no-untyped-call]
        return twin

    return register


def _constant(value: float) -> Any:
    return ir.Constant(_LLVM_VECTOR, [value] * LANES)


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
        builder.module, function_type, name
    )
    return builder.call(function, arguments)


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    # fmuladd, not fma: where the CPU has no fused form it is a product and a sum, not a libm call
    return _call(builder, f"llvm.fmuladd.v{LANES}f32", _LLVM_VECTOR, [x, y, z])


def _splat(builder: Any, scalar: Any, vector_type: Any) -> Any:
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(first, undefined, zeros)


def _shuffle(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
    return builder.shuffle_vector(x, y, mask)


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    is_pointer = isinstance(array_type, types.CPointer)
    first = array if is_pointer else context.make_array(array_type)(context, builder, array).data
    return builder.gep(first, [index])


def _stored_lane_type(array_type: Any) -> Any:
    return _F32 if array_type.dtype == types.float32 else ir.IntType(16)


def _widen(builder: Any, array_type: Any, stored: Any) -> Any:
    if array_type.dtype == types.float32:
        return stored
    if array_type.dtype == types.uint16:
        return _as_floats(builder, builder.shl(builder.zext(stored, _LLVM_BITS), _bits(16)))
    if not _HAS_FLOAT16:
        return _widen_float16(builder, stored)
    halves = builder.bitcast(stored, ir.VectorType(ir.HalfType(), LANES))
    return builder.fpext(halves, _LLVM_VECTOR)


def _bits(number: int) -> Any:
    return ir.Constant(_LLVM_BITS, [number] * LANES)


def _as_bits(builder: Any, value: Any) -> Any:
    return builder.bitcast(value, _LLVM_BITS)


def _as_floats(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, _LLVM_VECTOR)


def _widen_float16(builder: Any, stored: Any) -> Any:
    """Widen by moving the exponent; a denormal gets one by subtracting the 1 it does not have."""
    wide = builder.zext(stored, _LLVM_BITS)
    sign = builder.shl(builder.and_(wide, _bits(0x8000)), _bits(16))
    magnitude = builder.shl(builder.and_(wide, _bits(0x7FFF)), _bits(13))
    exponent = builder.and_(magnitude, _bits(0x7C00 << 13))
    normal = builder.add(magnitude, _bits(_REBIAS))
    # infinity and NaN: from the largest exponent of one format to that of the other
    special = builder.add(normal, _bits(_REBIAS))
    implied = _as_floats(builder, _bits(_SMALLEST_NORMAL))
    with_one = _as_floats(builder, builder.add(magnitude, _bits(_SMALLEST_NORMAL)))
    denormal = _as_bits(builder, builder.fsub(with_one, implied))
    is_denormal = builder.icmp_unsigned("==", exponent, _bits(0))
    is_special = builder.icmp_unsigned("==", exponent, _bits(0x7C00 << 13))
    bits = builder.select(is_special, special, builder.select(is_denormal, denormal, normal))
    return _as_floats(builder, builder.or_(bits, sign))


def _narrow_float16(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even, as F16C does: NaN stays quiet, 65520 becomes infinity."""
    bits = _as_bits(builder, value)
    sign = builder.and_(bits, _bits(_SIGN))
    magnitude = builder.xor(bits, sign)
    odd = builder.and_(builder.lshr(magnitude, _bits(13)), _bits(1))
    # half of the last kept bit, less one if that bit is 0: a tie then goes to the even neighbour
    carry = builder.add(_bits(0xFFF), odd)
    rebiased = builder.sub(magnitude, _bits(_REBIAS))
    normal = builder.lshr(builder.add(rebiased, carry), _bits(13))
    # beside 1/2 the last bit of a float32 is 2**-24, as a denormal's: the addition rounds
    half = _bits(126 << 23)
    rounded = builder.fadd(_as_floats(builder, magnitude), _as_floats(builder, half))
    denormal = builder.sub(_as_bits(builder, rounded), half)
    payload = builder.and_(builder.lshr(magnitude, _bits(13)), _bits(0x3FF))
    is_nan = builder.icmp_unsigned(">", magnitude, _bits(0x7F800000))
    special = builder.select(is_nan, builder.or_(payload, _bits(0x7E00)), _bits(0x7C00))
    is_denormal = builder.icmp_unsigned("<", magnitude, _bits(_SMALLEST_NORMAL))
    is_special = builder.icmp_unsigned(">=", magnitude, _bits(_TOO_LARGE))
    stored = builder.select(is_special, special, builder.select(is_denormal, denormal, normal))
    stored = builder.or_(stored, builder.lshr(sign, _bits(16)))
    return builder.trunc(stored, ir.VectorType(ir.IntType(16), LANES))


def _widened(stored: NDArray[Any]) -> Vector:
    if stored.dtype == np.uint16:
        return from_bfloat16_bits(stored)
    return stored.view(np.float16).astype(np.float32) if stored.dtype == np.int16 else stored


def _narrow(builder: Any, array_type: Any, value: Any) -> Any:
    if array_type.dtype == types.float32:
        return value
    short = ir.VectorType(ir.IntType(16), LANES)
    if array_type.dtype != types.uint16:
        if not _HAS_FLOAT16:
            return _narrow_float16(builder, value)
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), short)
    return _narrow_bfloat16(builder, value)


def _narrow_bfloat16(builder: Any, value: Any) -> Any:
    """The arithmetic of formats.to_bfloat16_bits: AVX512_BF16's instruction drops denormals."""
    short = ir.VectorType(ir.IntType(16), LANES)
    bits = _as_bits(builder, value)
    top = builder.lshr(bits, _bits(16))
    carry = builder.add(_bits(0x7FFF), builder.and_(top, _bits(1)))
    rounded = builder.lshr(builder.add(bits, carry), _bits(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, builder.or_(top, _bits(0x40)), rounded), short)


def _narrowed(array: NDArray[Any], value: Vector) -> NDArray[Any]:
    if array.dtype == np.uint16:
        return to_bfloat16_bits(value)
    return value.astype(np.float16).view(np.int16) if array.dtype == np.int16 else value


def _generate_load(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array_type = signature.args[0]
    lane = _stored_lane_type(array_type)
    address = _element(context, builder, array_type, *arguments)
    pointer = builder.bitcast(address, ir.VectorType(lane, LANES).as_pointer())
    return _widen(builder, array_type, builder.load(pointer, align=4 if lane == _F32 else 2))


@_compiled_by(_generate_load, lambda array, index: _vector(array, types.intp))
def load(array: NDArray[Any], index: int) -> Vector:
    """Return array[index : index + LANES] as float32."""
    return _widened(array[index : index + LANES])


def _first_lanes(builder: Any, count: Any) -> Any:
    lane_numbers = ir.Constant(_LLVM_BITS, list(range(LANES)))
    counts = _splat(builder, builder.trunc(count, _I32), _LLVM_BITS)
    return builder.icmp_signed("<", lane_numbers, counts)


def _generate_load_first(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array_type = signature.args[0]
    array, index, count = arguments
    lane = _stored_lane_type(array_type)
    stored = ir.VectorType(lane, LANES)
    address = builder.bitcast(
        _element(context, builder, array_type, array, index), stored.as_pointer()
    )
    mask = _first_lanes(builder, count)
    zeros = ir.Constant(stored, [0.0 if lane == _F32 else 0] * LANES)
    name = f"llvm.masked.load.v{LANES}{'f32' if lane == _F32 else 'i16'}.p0"
    size = ir.Constant(_I32, 4 if lane == _F32 else 2)
    return _widen(builder, array_type, _call(builder, name, stored, [address, size, mask, zeros]))


@_compiled_by(_generate_load_first, lambda array, i, n: _vector(array, types.intp, types.intp))
def load_first(array: NDArray[Any], index: int, count: int) -> Vector:
    """Return the first `count` elements from `index`, zeros in the other lanes; reads no others."""
    lanes = np.zeros(LANES, np.float32)
    count = min(max(count, 0), LANES)
    lanes[:count] = _widened(array[index : index + count])
    return lanes


def _generate_store(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, value = arguments
    address = _element(context, builder, signature.args[0], array, index)
    stored = _narrow(builder, signature.args[0], value)
    alignment = 4 if stored.type == _LLVM_VECTOR else 2
    builder.store(stored, builder.bitcast(address, stored.type.as_pointer()), align=alignment)
    return context.get_dummy_value()


@_compiled_by(_generate_store, lambda array, i, v: types.none(array, types.intp, _vector))
def store(array: NDArray[Any], index: int, value: Vector) -> None:
    """Set array[index : index + LANES], rounded to its format: to nearest, ties to even."""
    array[index : index + LANES] = _narrowed(array, value)


def _generate_store_first(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, count, value = arguments
    address = _element(context, builder, signature.args[0], array, index)
    stored = _narrow(builder, signature.args[0], value)
    is_float32 = stored.type == _LLVM_VECTOR
    pointer = builder.bitcast(address, stored.type.as_pointer())
    alignment = ir.Constant(_I32, 4 if is_float32 else 2)
    operands = [stored, pointer, alignment, _first_lanes(builder, count)]
    name = f"llvm.masked.store.v{LANES}{'f32' if is_float32 else 'i16'}.p0"
    _call(builder, name, ir.VoidType(), operands)
    return context.get_dummy_value()


@_compiled_by(
    _generate_store_first,
    lambda array, i, n, v: types.none(array, types.intp, types.intp, _vector),
)
def store_first(array: NDArray[Any], index: int, count: int, value: Vector) -> None:
    """Write the first `count` lanes from array[index] on, rounded to its format; nothing else."""
    count = min(max(count, 0), LANES)
    array[index : index + count] = _narrowed(array, value)[:count]


def _generate_round_as(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array_type = signature.args[0]
    return _widen(builder, array_type, _narrow(builder, array_type, arguments[1]))


@_compiled_by(_generate_round_as, lambda array, v: _vector(array, _vector))
def round_as(array: NDArray[Any], value: Vector) -> Vector:
    """Return what the array would hold if the value were stored in it."""
    return _widened(_narrowed(array, value))


def _generate_line_elements(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    size = 4 if signature.args[0].dtype == types.float32 else 2
    return ir.Constant(ir.IntType(64), CACHE_LINE_BYTES // size)


@_compiled_by(_generate_line_elements, lambda array: types.int64(array))
def line_elements(array: NDArray[Any]) -> int:
    """Return how many elements of the array a cache line holds."""
    return CACHE_LINE_BYTES // array.itemsize


def _generate_splat(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return _splat(builder, arguments[0], _LLVM_VECTOR)


@_compiled_by(_generate_splat, lambda scalar: _vector(types.float32))
def splat(scalar: float | np.float32) -> Vector:
    """Return a vector of one value."""
    return np.full(LANES, scalar, np.float32)


@_compiled_by(lambda c, builder, s, a: builder.fadd(*a), lambda x, y: _vector(_vector, _vector))
def add(x: Vector, y: Vector) -> Vector:
    """Return x + y."""
    return x + y


@_compiled_by(lambda c, builder, s, a: builder.fsub(*a), lambda x, y: _vector(_vector, _vector))
def subtract(x: Vector, y: Vector) -> Vector:
    """Return x - y."""
    return x - y


@_compiled_by(lambda c, builder, s, a: builder.fmul(*a), lambda x, y: _vector(_vector, _vector))
def multiply(x: Vector, y: Vector) -> Vector:
    """Return x * y."""
    return x * y


@_compiled_by(lambda c, builder, s, a: builder.fdiv(*a), lambda x, y: _vector(_vector, _vector))
def divide(x: Vector, y: Vector) -> Vector:
    """Return x / y."""
    return x / y


def _generate_where_positive(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    sign, x, y = arguments
    return builder.select(builder.fcmp_ordered(">", sign, _constant(0.0)), x, y)


@_compiled_by(_generate_where_positive, lambda s, x, y: _vector(_vector, _vector, _vector))
def where_positive(sign: Vector, x: Vector, y: Vector) -> Vector:
    """Return x in the lanes where `sign` is above zero, y in the others."""
    return np.where(sign > 0, x, y)


def _generate_maximum(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x, y = arguments
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@_compiled_by(_generate_maximum, lambda x, y: _vector(_vector, _vector))
def maximum(x: Vector, y: Vector) -> Vector:
    """Return the larger of x and y in every lane."""
    return np.where(x > y, x, y)


def _halves(width: int, groups: int) -> tuple[list[int], list[int]]:
    # lanes of the lower and of the upper half of every group, over two vectors side by side
    size = width // groups
    starts = range(0, 2 * width, size)
    lower = [start + lane for start in starts for lane in range(size // 2)]
    return lower, [lane + size // 2 for lane in lower]


def _fold(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        low = _shuffle(builder, value, value, list(range(width)))
        high = _shuffle(builder, value, value, list(range(width, 2 * width)))
        value = combine(low, high)
    return builder.extract_element(value, ir.Constant(_I32, 0))


def _generate_lane_sum(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return _fold(builder, arguments[0], builder.fadd)


@_compiled_by(_generate_lane_sum, lambda x: types.float32(_vector))
def lane_sum(x: Vector) -> np.float32:
    """Return the sum of the lanes."""
    return np.float32(x.sum())


def _generate_lane_max(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    def larger(x: Any, y: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", x, y), x, y)

    return _fold(builder, arguments[0], larger)


@_compiled_by(_generate_lane_max, lambda x: types.float32(_vector))
def lane_max(x: Vector) -> np.float32:
    """Return the largest lane."""
    return np.float32(x.max())


# Chebyshev fit of 2**f on [-0.5, 0.5]: relative error 1e-7 in float32 arithmetic.
_EXP2 = (1.0, 0.6931472, 0.2402265, 0.05550327, 0.009618025, 0.0013400433, 0.00015469732)


def _generate_exp2(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x = arguments[0]
    magic = _constant(
        12582912.0
    )  # 1.5 * 2**23: adding it rounds to an integer, kept in the low bits
    shifted = builder.fadd(x, magic)
    fraction = builder.fsub(x, builder.fsub(shifted, magic))
    series = _constant(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        series = _multiply_add(builder, series, fraction, _constant(coefficient))
    exponent = builder.shl(
        builder.bitcast(shifted, _LLVM_BITS), ir.Constant(_LLVM_BITS, [23] * LANES)
    )
    scaled = builder.bitcast(
        builder.add(builder.bitcast(series, _LLVM_BITS), exponent), _LLVM_VECTOR
    )
    in_range = builder.select(
        builder.fcmp_ordered(">", x, _constant(-126.0)), scaled, _constant(0.0)
    )
    return builder.select(builder.fcmp_unordered("uno", x, x), x, in_range)


@_compiled_by(_generate_exp2, lambda x: _vector(_vector))
def exp2(x: Vector) -> Vector:
    """Return 2**x for x <= 0: zero below -126, NaN for NaN."""
    return np.where(x > -126, np.exp2(x), np.where(np.isnan(x), x, np.float32(0.0)))


def _tile_of(rows: list[Any], builder: Any) -> Any:
    value = ir.Constant(ir.ArrayType(_LLVM_VECTOR, TILE * TILE), ir.Undefined)
    for number, row in enumerate(rows):
        value = builder.insert_value(value, row, number)
    return value


def _generate_zero_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return _tile_of([_constant(0.0)] * TILE * TILE, builder)


@_compiled_by(_generate_zero_tile, lambda: _tile())
def zero_tile() -> Tile:
    """Return a tile of zeros."""
    return np.zeros((TILE, TILE, LANES), np.float32)


def _tile_addresses(
    context: Any, builder: Any, array_type: Any, array: Any, index: Any, stride: Any
) -> Any:
    first = _element(context, builder, array_type, array, index)
    for row in range(TILE):
        for column in range(TILE):
            offset = builder.mul(stride, ir.Constant(stride.type, row))
            offset = builder.add(offset, ir.Constant(stride.type, column * LANES))
            yield builder.bitcast(builder.gep(first, [offset]), _LLVM_VECTOR.as_pointer())


def _generate_load_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    addresses = _tile_addresses(context, builder, signature.args[0], *arguments)
    return _tile_of([builder.load(address, align=4) for address in addresses], builder)


@_compiled_by(_generate_load_tile, lambda array, i, s: _tile(array, types.intp, types.intp))
def load_tile(array: NDArray[np.float32], index: int, row_stride: int) -> Tile:
    """Return the tile whose row r starts at array[index + r * row_stride]."""
    rows = [array[index + r * row_stride :][: TILE * LANES] for r in range(TILE)]
    return np.stack(rows).reshape(TILE, TILE, LANES)


def _generate_store_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, stride, value = arguments
    addresses = _tile_addresses(context, builder, signature.args[0], array, index, stride)
    for number, address in enumerate(addresses):
        builder.store(builder.extract_value(value, number), address, align=4)
    return context.get_dummy_value()


@_compiled_by(
    _generate_store_tile, lambda array, i, s, t: types.none(array, types.intp, types.intp, _tile)
)
def store_tile(array: NDArray[np.float32], index: int, row_stride: int, value: Tile) -> None:
    """Write row r of the tile at array[index + r * row_stride]."""
    for r in range(TILE):
        array[index + r * row_stride :][: TILE * LANES] = value[r].reshape(-1)


def _generate_add_outer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    value, operands = arguments[0], arguments[1:]
    sums = [
        _multiply_add(
            builder,
            operands[row],
            operands[TILE + column],
            builder.extract_value(value, row * TILE + column),
        )
        for row in range(TILE)
        for column in range(TILE)
    ]
    return _tile_of(sums, builder)


@_compiled_by(_generate_add_outer, lambda t, *operands: _tile(_tile, *([_vector] * 8)))
def add_outer(
    value: Tile,
    row_0: Vector,
    row_1: Vector,
    row_2: Vector,
    row_3: Vector,
    column_0: Vector,
    column_1: Vector,
    column_2: Vector,
    column_3: Vector,
) -> Tile:
    """Return tile[r][c] + row_r * column_c, lane by lane."""
    rows = np.stack([row_0, row_1, row_2, row_3])
    return value + rows[:, None] * np.stack([column_0, column_1, column_2, column_3])


def _generate_store_lane_sums(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, stride, value = arguments
    vectors = [builder.extract_value(value, number) for number in range(TILE * TILE)]
    groups = 1
    while groups < LANES:  # each round halves the partial sums and packs two vectors into one
        lower, upper = _halves(LANES, groups)
        vectors = [
            builder.fadd(_shuffle(builder, x, y, lower), _shuffle(builder, x, y, upper))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        groups *= 2
    first = _element(context, builder, signature.args[0], array, index)
    for row in range(TILE):
        packed = vectors[row * TILE // LANES]
        start = row * TILE % LANES
        sums = _shuffle(builder, packed, packed, list(range(start, start + TILE)))
        offset = builder.mul(stride, ir.Constant(stride.type, row))
        pointer = builder.bitcast(builder.gep(first, [offset]), sums.type.as_pointer())
        builder.store(sums, pointer, align=4)
    return context.get_dummy_value()


@_compiled_by(
    _generate_store_lane_sums,
    lambda array, i, s, t: types.none(array, types.intp, types.intp, _tile),
)
def store_lane_sums(array: NDArray[np.float32], index: int, row_stride: int, value: Tile) -> None:
    """Write the four lane sums of row r of the tile at array[index + r * row_stride]."""
    for r in range(TILE):
        array[index + r * row_stride :][:TILE] = value[r].sum(axis=1)


def _generate_prefetch(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    address = _element(context, builder, signature.args[0], *arguments)
    bytes_pointer = builder.bitcast(address, ir.IntType(8).as_pointer())
    # read, keep in every cache level, data
    flags = [ir.Constant(_I32, flag) for flag in (0, 3, 1)]
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [bytes_pointer, *flags])
    return context.get_dummy_value()


@_compiled_by(_generate_prefetch, lambda array, i: types.none(array, types.intp))
def prefetch(array: NDArray[Any], index: int) -> None:
    """Ask for the cache line of array[index]; any index is allowed."""


def _generate_fetch_add(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, amount = arguments
    address = _element(context, builder, signature.args[0], array, index)
    return builder.atomic_rmw("add", address, amount, "seq_cst")


@_compiled_by(_generate_fetch_add, lambda array, i, n: types.int64(array, types.intp, types.int64))
def fetch_add(array: NDArray[np.int64], index: int, amount: int) -> int:
    """Add to array[index] in one atomic step and return what was there before."""
    before = int(array[index])
    array[index] += amount
    return before


def _generate_pointer_at(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


def _pointer_type(address: Any, dtype: Any) -> Any:
    return types.CPointer(dtype.dtype)(types.int64, dtype)  # type: ignore[no-untyped-call]


@_compiled_by(_generate_pointer_at, _pointer_type)
def pointer_at(address: int, dtype: Any) -> Any:
    """Return an address as what compiled code takes for an array; there is no Python form."""
    raise NotImplementedError(f"address {address} of {dtype} outside compiled code")


@_compiled_by(_generate_pointer_at, lambda address, dtype: dtype.dtype(types.int64, dtype))
def call_at(address: int, dtype: Any) -> Any:
    """Return the structure of a numpy dtype at an address; there is no Python form."""
    raise NotImplementedError(f"address {address} of {dtype} outside compiled code")

"""Steps of a product with a panel of 16 weight rows, as numba values that stay in registers.

`words` are the 64 bytes of one step of a panel: lane l belongs to row l. `column` is one weight of
each row in float32. `sums` holds a running sum of 16 rows for every token of a block, several times
over where few tokens would wait for the latency of one chain of additions (`ways`). All are 16
lanes wide whatever the machine: LLVM makes two or four registers of one where they are narrower.
Addresses are plain numbers of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from cpu_kernels.isa import isa

PANEL_ROWS = 16
WORD_BYTES = 64

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_WORDS = ir.VectorType(_I32, PANEL_ROWS)
_COLUMN = ir.VectorType(_F32, PANEL_ROWS)
_HALF_WORDS = ir.VectorType(_I16, PANEL_ROWS)
_SHORTS = ir.VectorType(_I16, 2 * PANEL_ROWS)
_BYTES = ir.VectorType(_I8, 4 * PANEL_ROWS)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BFLOATS = ir.VectorType(_BFloat(), 2 * PANEL_ROWS)

# One `call` of numba's code generators: (context, builder, signature, arguments) -> LLVM value
_Generator = Callable[[Any, Any, Any, Any], Any]


def _operation(definition: Callable[..., Any]) -> Callable[..., Any]:
    """Make a numba intrinsic of its definition, whose first parameter is left out in calls."""
    made: Callable[..., Any] = intrinsic(definition)
    return made


def _operation_of_literals(definition: Callable[..., Any]) -> Callable[..., Any]:
    """The same for one that needs the values of its constant arguments when it is compiled."""
    made: Callable[..., Any] = intrinsic(prefer_literal=True)(definition)
    return made


class _Register(types.Type):
    pass


class SumsType(types.Type):
    """Running sums: `tokens` x `ways` vectors of 16 lanes, float32 or int32."""

    def __init__(self, kind: str, tokens: int, ways: int) -> None:
        super().__init__(f"{kind}_sums_{tokens}x{ways}")
        self.kind = kind
        self.tokens = tokens
        self.ways = ways


words_type = _Register("panel_words")
column_type = _Register("panel_column")


@register_model(_Register)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        llvm_type = _WORDS if numba_type == words_type else _COLUMN
        super().__init__(manager, numba_type, llvm_type)  # type: ignore[no-untyped-call]


@register_model(SumsType)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: SumsType) -> None:
        lane = _COLUMN if numba_type.kind == "float" else _WORDS
        array = ir.ArrayType(lane, numba_type.tokens * numba_type.ways)
        super().__init__(manager, numba_type, array)  # type: ignore[no-untyped-call]


def _pointer(builder: Any, address: Any, llvm_type: Any) -> Any:
    return builder.inttoptr(address, llvm_type.as_pointer())


def _offset(builder: Any, address: Any, num_bytes: int) -> Any:
    return builder.add(address, ir.Constant(_I64, num_bytes))


def _splat(builder: Any, scalar: Any, vector_type: Any) -> Any:
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, vector_type.count), [0] * vector_type.count)
    return builder.shuffle_vector(first, undefined, zeros)


def _all_lanes(vector_type: Any, value: float | int) -> Any:
    return ir.Constant(vector_type, [value] * vector_type.count)


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
        builder.module, function_type, name
    )
    return builder.call(function, arguments)


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", _COLUMN, [x, y, z])


def _broadcast(builder: Any, address: Any, lane: Any, vector_type: Any) -> Any:
    return _splat(builder, builder.load(_pointer(builder, address, lane), align=4), vector_type)


def _rounded_to_bfloat16(builder: Any, value: Any) -> Any:
    """Nearest, ties to even, NaN kept quiet, as `formats.to_bfloat16_bits`."""
    words = ir.VectorType(_I32, value.type.count)
    bits = builder.bitcast(value, words)
    top = builder.lshr(bits, _all_lanes(words, 16))
    carry = builder.add(_all_lanes(words, 0x7FFF), builder.and_(top, _all_lanes(words, 1)))
    rounded = builder.lshr(builder.add(bits, carry), _all_lanes(words, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(top, _all_lanes(words, 0x40))
    shorts = ir.VectorType(_I16, value.type.count)
    return builder.trunc(builder.select(is_nan, quiet, rounded), shorts)


@_operation
def load_words(_: Any, address: Any) -> Any:
    """Read one step of a panel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_pointer(builder, arguments[0], _WORDS), align=16)

    return words_type(types.intp), generate


@_operation
def low_nibbles(_: Any, words: Any) -> Any:
    """The low four bits of every byte."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.and_(arguments[0], _all_lanes(_WORDS, 0x0F0F0F0F))

    return words_type(words_type), generate


@_operation
def high_nibbles(_: Any, words: Any) -> Any:
    """The high four bits of every byte."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shifted = builder.lshr(arguments[0], _all_lanes(_WORDS, 4))
        return builder.and_(shifted, _all_lanes(_WORDS, 0x0F0F0F0F))

    return words_type(words_type), generate


@_operation
def as_column(_: Any, words: Any) -> Any:
    """Words that are float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _COLUMN)

    return column_type(words_type), generate


@_operation_of_literals
def bfloat16_column(_: Any, words: Any, half: Any) -> Any:
    """Widen the first (0) or the second (1) bfloat16 of every word."""
    is_first = half.literal_value == 0

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if is_first:
            bits = builder.shl(arguments[0], _all_lanes(_WORDS, 16))
        else:
            bits = builder.and_(arguments[0], _all_lanes(_WORDS, 0xFFFF0000))
        return builder.bitcast(bits, _COLUMN)

    return column_type(words_type, half), generate


@_operation_of_literals
def code_column(_: Any, words: Any, shift: Any, bits: Any, scale: Any, offset: Any) -> Any:
    """scale * (the `bits`-wide code at bit `shift` of every word) + offset."""
    mask = (1 << bits.literal_value) - 1
    at = shift.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes = builder.lshr(arguments[0], _all_lanes(_WORDS, at))
        if at + bits.literal_value < 32:
            codes = builder.and_(codes, _all_lanes(_WORDS, mask))
        return _multiply_add(builder, builder.sitofp(codes, _COLUMN), arguments[3], arguments[4])

    return column_type(words_type, shift, bits, column_type, column_type), generate


@_operation
def load_scales(_: Any, address: Any) -> Any:
    """Read the 16 bfloat16 scales of a group."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stored = builder.load(_pointer(builder, arguments[0], _HALF_WORDS), align=2)
        bits = builder.shl(builder.zext(stored, _WORDS), _all_lanes(_WORDS, 16))
        return builder.bitcast(bits, _COLUMN)

    return column_type(types.intp), generate


@_operation
def load_zeros(_: Any, address: Any) -> Any:
    """Read the 16 zero points of a group, one byte each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sixteen = ir.VectorType(_I8, PANEL_ROWS)
        stored = builder.load(_pointer(builder, arguments[0], sixteen), align=1)
        return builder.zext(stored, _WORDS)

    return words_type(types.intp), generate


@_operation_of_literals
def same_words(_: Any, value: Any) -> Any:
    """One constant in every lane."""
    constant = value.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _all_lanes(_WORDS, constant)

    return words_type(value), generate


@_operation
def offset_of_zeros(_: Any, zeros: Any, scales: Any) -> Any:
    """Return -zero * scale: what turns scale * code into scale * (code - zero)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros = builder.sitofp(arguments[0], _COLUMN)
        negated = builder.fsub(_all_lanes(_COLUMN, 0.0), zeros)
        return builder.fmul(negated, arguments[1])

    return column_type(words_type, column_type), generate


@_operation_of_literals
def zero_sums(_: Any, tokens: Any, ways: Any) -> Any:
    """Float32 sums of nothing."""
    result = SumsType("float", tokens.literal_value, ways.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = ir.ArrayType(_COLUMN, result.tokens * result.ways)
        return ir.Constant(array, [[0.0] * PANEL_ROWS] * array.count)

    return result(tokens, ways), generate


@_operation_of_literals
def add_column(_: Any, sums: Any, way: Any, column: Any, x: Any) -> Any:
    """sums[way][token] += column * x[token], x being float32 at an address."""
    first = way.literal_value % sums.ways * sums.tokens

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, _, column, address = arguments
        for token in range(sums.tokens):
            x = _broadcast(builder, _offset(builder, address, 4 * token), _F32, _COLUMN)
            before = builder.extract_value(value, first + token)
            after = _multiply_add(builder, column, x, before)
            value = builder.insert_value(value, after, first + token)
        return value

    return sums(sums, way, column_type, types.intp), generate


@_operation_of_literals
def add_bfloat16_pairs(_: Any, sums: Any, way: Any, words: Any, x: Any) -> Any:
    """sums[way][token] += the two bfloat16 products of every word, x interleaved by token."""
    first = way.literal_value % sums.ways * sums.tokens

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, _, words, address = arguments
        for token in range(sums.tokens):
            x = _broadcast(builder, _offset(builder, address, 4 * token), _I32, _WORDS)
            before = builder.extract_value(value, first + token)
            after = _call(
                builder,
                "llvm.x86.avx512bf16.dpbf16ps.512",
                _COLUMN,
                [before, builder.bitcast(words, _BFLOATS), builder.bitcast(x, _BFLOATS)],
            )
            value = builder.insert_value(value, after, first + token)
        return value

    return sums(sums, way, words_type, types.intp), generate


@_operation_of_literals
def start_int_sums(_: Any, tokens: Any, ways: Any, zeros: Any, x_sums: Any) -> Any:
    """Int32 sums that begin at -zero * (sum of the group's x): codes then count from their zero."""
    result = SumsType("int", tokens.literal_value, ways.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, zeros, address = arguments
        nothing = _all_lanes(_WORDS, 0)
        value = ir.Constant(ir.ArrayType(_WORDS, result.tokens * result.ways), ir.Undefined)
        for index in range(result.tokens * result.ways):
            start = nothing
            if index < result.tokens:
                sums = _broadcast(builder, _offset(builder, address, 4 * index), _I32, _WORDS)
                start = builder.sub(nothing, builder.mul(sums, zeros))
            value = builder.insert_value(value, start, index)
        return value

    return result(tokens, ways, words_type, types.intp), generate


@_operation_of_literals
def add_byte_products(_: Any, sums: Any, way: Any, words: Any, x: Any) -> Any:
    """sums[way][token] += the four products of unsigned weight bytes and signed x bytes."""
    first = way.literal_value % sums.ways * sums.tokens

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, _, words, address = arguments
        for token in range(sums.tokens):
            x = _broadcast(builder, _offset(builder, address, 4 * token), _I32, _WORDS)
            before = builder.extract_value(value, first + token)
            after = _add_four_products(builder, before, words, x)
            value = builder.insert_value(value, after, first + token)
        return value

    return sums(sums, way, words_type, types.intp), generate


# From LLVM 22 on the operands are bytes; before, they were words.
_DOT_OPERAND = _BYTES if llvmlite.binding.llvm_version_info[0] >= 22 else _WORDS


def _add_four_products(builder: Any, sums: Any, weights: Any, x: Any) -> Any:
    if isa().has("avx512-bf16"):
        operands = [builder.bitcast(operand, _DOT_OPERAND) for operand in (weights, x)]
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _WORDS, [sums, *operands])
    if isa().has("avx2"):
        # Bytes 0 and 2, then 1 and 3, as pairs of 16 bits: unsigned weights, signed x.
        low = _all_lanes(_WORDS, 0x00FF00FF)
        eight = _all_lanes(_SHORTS, 8)
        x_shorts = builder.bitcast(x, _SHORTS)
        for weight_pairs, x_pairs in (
            (builder.and_(weights, low), builder.ashr(builder.shl(x_shorts, eight), eight)),
            (
                builder.and_(builder.lshr(weights, _all_lanes(_WORDS, 8)), low),
                builder.ashr(x_shorts, eight),
            ),
        ):
            pairs = builder.bitcast(weight_pairs, _SHORTS)
            sums = builder.add(sums, _pair_products(builder, pairs, x_pairs))
        return sums
    for byte in range(4):
        codes = builder.lshr(weights, _all_lanes(_WORDS, 8 * byte))
        codes = builder.and_(codes, _all_lanes(_WORDS, 0xFF))
        signed = builder.shl(x, _all_lanes(_WORDS, 24 - 8 * byte))
        signed = builder.ashr(signed, _all_lanes(_WORDS, 24))
        sums = builder.add(sums, builder.mul(codes, signed))
    return sums


def _pair_products(builder: Any, x: Any, y: Any) -> Any:
    """x[2l] * y[2l] + x[2l + 1] * y[2l + 1] in int32."""
    if isa().has("avx512"):
        return _call(builder, "llvm.x86.avx512.pmaddw.d.512", _WORDS, [x, y])
    half, result = ir.VectorType(_I16, PANEL_ROWS), ir.VectorType(_I32, PANEL_ROWS // 2)
    parts = []
    for start in (0, PANEL_ROWS):
        lanes = ir.Constant(ir.VectorType(_I32, half.count), list(range(start, start + half.count)))
        operands = [builder.shuffle_vector(v, v, lanes) for v in (x, y)]
        parts.append(_call(builder, "llvm.x86.avx2.pmadd.wd", result, operands))
    both = ir.Constant(_WORDS, list(range(PANEL_ROWS)))
    return builder.shuffle_vector(*parts, both)


@_operation
def fold_group(_: Any, totals: Any, sums: Any, scales: Any, x_scales: Any) -> Any:
    """totals[token] += scale of the row * scale of x[token] * sums[token]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, group, scales, address = arguments
        for token in range(totals.tokens):
            total = builder.extract_value(group, token)
            for way in range(1, sums.ways):
                part = builder.extract_value(group, way * sums.tokens + token)
                total = builder.add(total, part)
            x_scale = _broadcast(builder, _offset(builder, address, 4 * token), _F32, _COLUMN)
            before = builder.extract_value(value, token)
            factor = builder.fmul(scales, x_scale)
            after = _multiply_add(builder, builder.sitofp(total, _COLUMN), factor, before)
            value = builder.insert_value(value, after, token)
        return value

    return totals(totals, sums, column_type, types.intp), generate


@_operation
def store_sums(_: Any, address: Any, stride: Any, sums: Any) -> Any:
    """Write the 16 sums of token t at address + t * stride bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, stride, value = arguments
        for token in range(sums.tokens):
            total = builder.extract_value(value, token)
            for way in range(1, sums.ways):
                total = builder.fadd(total, builder.extract_value(value, way * sums.tokens + token))
            builder.store(total, _pointer(builder, address, _COLUMN), align=4)
            address = builder.add(address, stride)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, sums), generate


# Vectors of simd.py on their way into a block of tokens: LANES neighbours of one token's x go to
# places that are `stride` bytes apart.


def _scatter(builder: Any, address: Any, stride: Any, values: Any) -> None:
    for lane in range(values.type.count):
        element = builder.extract_element(values, ir.Constant(_I32, lane))
        builder.store(element, _pointer(builder, address, element.type), align=4)
        if lane + 1 < values.type.count:
            address = builder.add(address, stride)


@_operation
def scatter_floats(_: Any, address: Any, stride: Any, vector: Any) -> Any:
    """Write lane i as float32 at address + i * stride."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _scatter(builder, *arguments)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, vector), generate


@_operation
def scatter_bfloat16_pairs(_: Any, address: Any, stride: Any, vector: Any) -> Any:
    """Write lanes 2i and 2i + 1, rounded to bfloat16, as one word at address + i * stride."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, stride, value = arguments
        shorts = _rounded_to_bfloat16(builder, value)
        words = builder.bitcast(shorts, ir.VectorType(_I32, shorts.type.count // 2))
        _scatter(builder, address, stride, words)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, vector), generate


@_operation
def scatter_bytes(_: Any, address: Any, stride: Any, vector: Any) -> Any:
    """Write lanes 4i to 4i + 3, which hold integers, as one word at address + i * stride."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, stride, value = arguments
        lanes = value.type.count
        ints = ir.VectorType(_I32, lanes)
        # The saturating form: what NaN becomes is then known.
        whole = _call(builder, f"llvm.fptosi.sat.v{lanes}i32.v{lanes}f32", ints, [value])
        values = builder.trunc(whole, ir.VectorType(_I8, lanes))
        words = builder.bitcast(values, ir.VectorType(_I32, lanes // 4))
        _scatter(builder, address, stride, words)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, vector), generate


@_operation
def absolute(_: Any, vector: Any) -> Any:
    """|x| in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        return _call(builder, f"llvm.fabs.v{value.type.count}f32", value.type, [value])

    return vector(vector), generate


@_operation
def nearest_integers(_: Any, vector: Any) -> Any:
    """Round every lane to the nearest integer, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        return _call(builder, f"llvm.rint.v{value.type.count}f32", value.type, [value])

    return vector(vector), generate


# Work shared by threads: counters in memory, kernels behind addresses.


@_operation
def add_atomically(_: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address in one step and return what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(builder, arguments[0], _I64)
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.intp, types.int64), generate


@_operation
def load_atomically(_: Any, address: Any) -> Any:
    """Read the int64 at an address, and see all that was written before it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0], _I64), "acquire", 8)

    return types.int64(types.intp), generate


@_operation
def relax(_: Any) -> Any:
    """Leave the core to its other hyperthread for a moment, where there is a word for it."""
    is_x86 = isa().highest != "portable"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if is_x86:
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.none(), generate


@_operation
def yield_core(_: Any) -> Any:
    """Let the system run another thread on this core (sched_yield)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "sched_yield", _I32, [])
        return context.get_dummy_value()

    return types.none(), generate


@_operation
def call_kernel(
    _: Any,
    kernel: Any,
    panels: Any,
    scales: Any,
    zeros: Any,
    x: Any,
    x_scales: Any,
    y: Any,
    y_stride: Any,
    num_columns: Any,
    group_size: Any,
    num_panels: Any,
) -> Any:
    """Call a microkernel by its address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [_I64] * 10)
        builder.call(_pointer(builder, arguments[0], function), arguments[1:])
        return context.get_dummy_value()

    return types.none(*[types.intp] * 11), generate

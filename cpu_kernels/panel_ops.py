"""Steps of a product with panels of 16 weight rows, as numba values that stay in registers.

A step is 64 bytes of a panel, whose 32-bit lane l belongs to row l. Every operation works on some
neighbouring panels at once: a product of few tokens reads memory as fast as it can only in as many
streams as the processor likes (microkernels.py). Vectors are 16 lanes wide whatever the machine:
LLVM makes two or four registers of one where they are narrower. Addresses are plain numbers of
bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from cpu_kernels.formats import PANEL_ROWS, STEP_BYTES
from cpu_kernels.isa import isa
from cpu_kernels.simd import _call, _narrow_bfloat16, _splat

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


def _operation(definition: Callable[..., Any]) -> Callable[..., Any]:
    """Make a numba intrinsic of its definition, whose first parameter is left out in calls."""
    made: Callable[..., Any] = intrinsic(definition)
    return made


def _operation_of_literals(definition: Callable[..., Any]) -> Callable[..., Any]:
    """The same for one that needs the values of its constant arguments when it is compiled."""
    made: Callable[..., Any] = intrinsic(prefer_literal=True)(definition)
    return made


class SumsType(types.Type):
    """Running sums of 16 lanes, float32 or int32, for every token of `panels` panels.

    Each is kept `ways` times over, and added up when it is stored.
    """

    def __init__(self, kind: str, tokens: int, panels: int, ways: int) -> None:
        super().__init__(f"{kind}_sums_{tokens}x{panels}x{ways}")
        self.kind = kind
        self.tokens = tokens
        self.panels = panels
        self.ways = ways

    @property
    def count(self) -> int:
        """Vectors of 16 lanes."""
        return self.tokens * self.panels * self.ways

    def index(self, panel: int, way: int, token: int) -> int:
        """Place of a vector."""
        return (panel * self.ways + way % self.ways) * self.tokens + token


@register_model(SumsType)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: SumsType) -> None:
        lane = _COLUMN if numba_type.kind == "float" else _WORDS
        array = ir.ArrayType(lane, numba_type.count)
        super().__init__(manager, numba_type, array)  # type: ignore[no-untyped-call]


def _pointer(builder: Any, address: Any, llvm_type: Any) -> Any:
    return builder.inttoptr(address, llvm_type.as_pointer())


def _offset(builder: Any, address: Any, num_bytes: int) -> Any:
    return builder.add(address, ir.Constant(_I64, num_bytes))


def _all_lanes(vector_type: Any, value: float | int) -> Any:
    return ir.Constant(vector_type, [value] * vector_type.count)


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", _COLUMN, [x, y, z])


def _broadcast(builder: Any, address: Any, lane: Any, vector_type: Any) -> Any:
    return _splat(builder, builder.load(_pointer(builder, address, lane), align=4), vector_type)


# How one 64-byte step of a panel is widened: what `add_steps` multiplies.
FLOAT32, BFLOAT16, BFLOAT16_PAIRS, INT8, INT4 = 0, 1, 2, 3, 4


def _load_words(builder: Any, address: Any) -> Any:
    return builder.load(_pointer(builder, address, _WORDS), align=4)


def _is_none(ahead: Any) -> bool:
    """Is a distance of prefetches the constant 0?"""
    return isinstance(ahead, types.IntegerLiteral) and ahead.literal_value == 0


@_operation
def prefetch_at(_: Any, address: Any) -> Any:
    """Ask for the cache line at any address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.none(types.intp), generate


def _prefetch(builder: Any, address: Any) -> None:
    # read, keep in every cache level, data
    flags = [ir.Constant(_I32, flag) for flag in (0, 3, 1)]
    pointer = _pointer(builder, address, _I8)
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])


def _float_columns(builder: Any, kind: int, words: Any) -> list[Any]:
    """The weights of a step of a format without scales, column by column."""
    if kind == FLOAT32:
        return [builder.bitcast(words, _COLUMN)]
    halves = (
        builder.shl(words, _all_lanes(_WORDS, 16)),
        builder.and_(words, _all_lanes(_WORDS, 0xFFFF0000)),
    )
    return [builder.bitcast(half, _COLUMN) for half in halves]


def _coded_columns(builder: Any, kind: int, words: Any, scale: Any, offset: Any) -> list[Any]:
    """scale * code + offset, column by column: byte by byte, or first the low halves of bytes."""
    shifts = (0, 8, 16, 24) if kind == INT8 else (0, 8, 16, 24, 4, 12, 20, 28)
    bits = 8 if kind == INT8 else 4
    columns = []
    for shift in shifts:
        codes = builder.lshr(words, _all_lanes(_WORDS, shift))
        if shift + bits < 32:
            codes = builder.and_(codes, _all_lanes(_WORDS, (1 << bits) - 1))
        columns.append(_multiply_add(builder, builder.sitofp(codes, _COLUMN), scale, offset))
    return columns


def _add_column(builder: Any, value: Any, first: int, tokens: int, column: Any, x: Any) -> Any:
    """Add column * x[token] to the vectors from `first` on; x is float32 at an address."""
    for token in range(tokens):
        x_token = _broadcast(builder, _offset(builder, x, 4 * token), _F32, _COLUMN)
        before = builder.extract_value(value, first + token)
        after = _multiply_add(builder, column, x_token, before)
        value = builder.insert_value(value, after, first + token)
    return value


def _zeros(sums: SumsType) -> Any:
    lane, zero = (_COLUMN, 0.0) if sums.kind == "float" else (_WORDS, 0)
    return ir.Constant(ir.ArrayType(lane, sums.count), [[zero] * PANEL_ROWS] * sums.count)


@_operation_of_literals
def zero_sums(_: Any, tokens: Any, panels: Any, ways: Any) -> Any:
    """Float32 sums of nothing."""
    result = SumsType("float", tokens.literal_value, panels.literal_value, ways.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _zeros(result)

    return result(tokens, panels, ways), generate


@_operation_of_literals
def add_steps(
    _: Any, sums: Any, kind: Any, steps: Any, at: Any, panel_bytes: Any, ahead: Any, x: Any
) -> Any:
    """Add the products of some steps of every panel, of a format without scales.

    The first panel's step is at address `at`, the next panel's `panel_bytes` on; what lies `ahead`
    bytes on is asked for already, if that is not 0.
    """
    what, num_steps = kind.literal_value, steps.literal_value
    has_ahead = not _is_none(ahead)
    pairs = what == BFLOAT16_PAIRS

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, _, _, start, stride, distance, x = arguments
        for panel in range(sums.panels):
            way, x_at = 0, x
            for step in range(num_steps):
                at = _offset(builder, start, STEP_BYTES * step)
                if has_ahead:
                    _prefetch(builder, builder.add(at, distance))
                words = _load_words(builder, at)
                if pairs:
                    first = sums.index(panel, way, 0)
                    value = _add_pairs(builder, value, first, sums.tokens, words, x_at)
                    x_at, way = _offset(builder, x_at, 4 * sums.tokens), way + 1
                    continue
                for column in _float_columns(builder, what, words):
                    first = sums.index(panel, way, 0)
                    value = _add_column(builder, value, first, sums.tokens, column, x_at)
                    x_at, way = _offset(builder, x_at, 4 * sums.tokens), way + 1
            start = builder.add(start, stride)
        return value

    distance_type = types.intp if has_ahead else ahead
    signature = sums(sums, kind, steps, types.intp, types.intp, distance_type, types.intp)
    return signature, generate


def _add_pairs(builder: Any, value: Any, first: int, tokens: int, words: Any, x: Any) -> Any:
    """Add the two bfloat16 products of every word."""
    for token in range(tokens):
        x_token = _broadcast(builder, _offset(builder, x, 4 * token), _I32, _WORDS)
        before = builder.extract_value(value, first + token)
        after = _call(
            builder,
            "llvm.x86.avx512bf16.dpbf16ps.512",
            _COLUMN,
            [before, builder.bitcast(words, _BFLOATS), builder.bitcast(x_token, _BFLOATS)],
        )
        value = builder.insert_value(value, after, first + token)
    return value


def _load_scales(builder: Any, address: Any) -> Any:
    stored = builder.load(_pointer(builder, address, _HALF_WORDS), align=2)
    bits = builder.shl(builder.zext(stored, _WORDS), _all_lanes(_WORDS, 16))
    return builder.bitcast(bits, _COLUMN)


def _load_zeros(builder: Any, address: Any, zero_code: int) -> Any:
    """Zero points of 16 rows: one for all, or from memory where `zero_code` is 0."""
    if zero_code:
        return _all_lanes(_WORDS, zero_code)
    sixteen = ir.VectorType(_I8, PANEL_ROWS)
    return builder.zext(builder.load(_pointer(builder, address, sixteen), align=1), _WORDS)


@_operation_of_literals
def add_scaled_step(
    _: Any, sums: Any, kind: Any, zero_code: Any, at: Any, scales: Any, zeros: Any, x: Any
) -> Any:
    """Add the products of one step of one panel, of a format with scales, widened to float32."""
    what, code = kind.literal_value, zero_code.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, _, _, at, scales, zeros, x = arguments
        scale = _load_scales(builder, scales)
        zero = builder.sitofp(_load_zeros(builder, zeros, code), _COLUMN)
        offset = builder.fmul(builder.fsub(_all_lanes(_COLUMN, 0.0), zero), scale)
        columns = _coded_columns(builder, what, _load_words(builder, at), scale, offset)
        for way, column in enumerate(columns):
            first = sums.index(0, way, 0)
            value = _add_column(builder, value, first, sums.tokens, column, x)
            x = _offset(builder, x, 4 * sums.tokens)
        return value

    return sums(sums, kind, zero_code, *[types.intp] * 4), generate


@_operation_of_literals
def start_int_sums(
    _: Any,
    tokens: Any,
    panels: Any,
    ways: Any,
    zero_code: Any,
    zeros: Any,
    num_groups: Any,
    x_sums: Any,
) -> Any:
    """Int32 sums that begin at -zero * (sum of the group's x): codes then count from their zero."""
    result = SumsType("int", tokens.literal_value, panels.literal_value, ways.literal_value)
    code = zero_code.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, _, _, zeros, num_groups, x_sums = arguments
        value = _zeros(result)
        for panel in range(result.panels):
            zero = _load_zeros(builder, zeros, code)
            for token in range(result.tokens):
                address = _offset(builder, x_sums, 4 * token)
                sums = _broadcast(builder, address, _I32, _WORDS)
                start = builder.sub(_all_lanes(_WORDS, 0), builder.mul(sums, zero))
                value = builder.insert_value(value, start, result.index(panel, 0, token))
            zeros = builder.add(zeros, builder.mul(num_groups, ir.Constant(_I64, 16)))
        return value

    signature = result(tokens, panels, ways, zero_code, *[types.intp] * 3)
    return signature, generate


@_operation_of_literals
def add_byte_steps(
    _: Any, sums: Any, kind: Any, steps: Any, at: Any, panel_bytes: Any, ahead: Any, x: Any
) -> Any:
    """Add the products of some steps of every panel, of int8 or int4 codes and int8 x."""
    is_int4, num_steps = kind.literal_value == INT4, steps.literal_value
    has_ahead = not _is_none(ahead)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, _, _, start, stride, distance, x = arguments
        nibbles = _all_lanes(_WORDS, 0x0F0F0F0F)
        for panel in range(sums.panels):
            way, x_at = 0, x
            for step in range(num_steps):
                at = _offset(builder, start, STEP_BYTES * step)
                if has_ahead:
                    _prefetch(builder, builder.add(at, distance))
                words = _load_words(builder, at)
                parts = [words]
                if is_int4:
                    high = builder.lshr(words, _all_lanes(_WORDS, 4))
                    parts = [builder.and_(words, nibbles), builder.and_(high, nibbles)]
                for part in parts:
                    for token in range(sums.tokens):
                        address = _offset(builder, x_at, 4 * token)
                        x_token = _broadcast(builder, address, _I32, _WORDS)
                        index = sums.index(panel, way, token)
                        before = builder.extract_value(value, index)
                        after = _add_four_products(builder, before, part, x_token)
                        value = builder.insert_value(value, after, index)
                    x_at, way = _offset(builder, x_at, 4 * sums.tokens), way + 1
            start = builder.add(start, stride)
        return value

    distance_type = types.intp if has_ahead else ahead
    signature = sums(sums, kind, steps, types.intp, types.intp, distance_type, types.intp)
    return signature, generate


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
def fold_group(_: Any, totals: Any, sums: Any, scales: Any, num_groups: Any, x_scales: Any) -> Any:
    """totals[panel][token] += scale of the row * scale of x[token] * sums[panel][token]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, group, scales, num_groups, x_scales = arguments
        for panel in range(sums.panels):
            scale = _load_scales(builder, scales)
            for token in range(sums.tokens):
                total = builder.extract_value(group, sums.index(panel, 0, token))
                for way in range(1, sums.ways):
                    part = builder.extract_value(group, sums.index(panel, way, token))
                    total = builder.add(total, part)
                address = _offset(builder, x_scales, 4 * token)
                factor = builder.fmul(scale, _broadcast(builder, address, _F32, _COLUMN))
                before = builder.extract_value(value, totals.index(panel, 0, token))
                after = _multiply_add(builder, builder.sitofp(total, _COLUMN), factor, before)
                value = builder.insert_value(value, after, totals.index(panel, 0, token))
            scales = builder.add(scales, builder.mul(num_groups, ir.Constant(_I64, 32)))
        return value

    return totals(totals, sums, types.intp, types.intp, types.intp), generate


@_operation
def store_sums(_: Any, address: Any, stride: Any, sums: Any) -> Any:
    """Write token t's 16 sums of panel p at address + t * stride + p * 64 bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, stride, value = arguments
        for token in range(sums.tokens):
            for panel in range(sums.panels):
                total = builder.extract_value(value, sums.index(panel, 0, token))
                for way in range(1, sums.ways):
                    part = builder.extract_value(value, sums.index(panel, way, token))
                    total = builder.fadd(total, part)
                place = _offset(builder, address, STEP_BYTES * panel)
                builder.store(total, _pointer(builder, place, _COLUMN), align=4)
            address = builder.add(address, stride)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, sums), generate


# Vectors of simd.py on their way into a block of tokens: LANES neighbours of one token's x go to
# places that are `stride` bytes apart.


def _scatter(builder: Any, address: Any, stride: Any, values: Any) -> None:
    """Write lanes of 4 bytes `stride` bytes apart; at once where they lie side by side."""
    is_plain = builder.icmp_signed("==", stride, ir.Constant(_I64, 4))
    with builder.if_else(is_plain, likely=False) as (then, otherwise):
        with then:
            builder.store(values, _pointer(builder, address, values.type), align=4)
        with otherwise:
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
        shorts = _narrow_bfloat16(builder, value)
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
        # What NaN becomes is not defined, and not used: its group's scale is NaN.
        whole = builder.fptosi(value, ints)
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


@_operation
def xor_of_words(_: Any, address: Any, count: Any) -> Any:
    """Read `count` times 256 bytes in four chains and return a number made of all of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, count = arguments
        chains = [cgutils.alloca_once(builder, _WORDS) for _ in range(4)]  # type: ignore[no-untyped-call]
        for chain in chains:
            builder.store(_all_lanes(_WORDS, 0), chain)
        with cgutils.for_range(builder, count) as loop:
            start = builder.add(address, builder.mul(loop.index, ir.Constant(_I64, 256)))
            for index, chain in enumerate(chains):
                words = _load_words(builder, _offset(builder, start, STEP_BYTES * index))
                builder.store(builder.xor(builder.load(chain), words), chain)
        total = builder.load(chains[0])
        for chain in chains[1:]:
            total = builder.xor(total, builder.load(chain))
        found = ir.Constant(_I32, 0)
        for lane in range(PANEL_ROWS):
            found = builder.xor(found, builder.extract_element(total, ir.Constant(_I32, lane)))
        return builder.sext(found, _I64)

    return types.int64(types.intp, types.intp), generate


# Work shared by threads: counters in memory, kernels behind addresses.


@_operation
def load_atomically(_: Any, address: Any) -> Any:
    """Read the int64 at an address, and see all that was written before it was.

    In one order with all atomic additions: a thread that adds here and then reads there cannot miss
    one that adds there and then reads here.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0], _I64), "seq_cst", 8)

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
def clock(_: Any) -> Any:
    """Read a counter that runs evenly on all cores; 0 where the processor has none we know."""
    names = {"x86_64": "readcyclecounter", "amd64": "readcyclecounter"}
    names |= {"aarch64": "readsteadycounter", "arm64": "readsteadycounter"}
    name = names.get(platform.machine().lower())

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_I64, 0) if name is None else _call(builder, f"llvm.{name}", _I64, [])

    return types.int64(), generate


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


@_operation
def call_body(_: Any, body: Any, call: Any, item: Any, worker: Any) -> Any:
    """Call `void body(call *, item, worker)` by its address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        builder.call(_pointer(builder, arguments[0], function), arguments[1:])
        return context.get_dummy_value()

    return types.none(*[types.intp] * 4), generate

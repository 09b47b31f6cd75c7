"""Steps of decode attention over a few query heads at once, as numba values, with Python twins.

A *group* is G query heads of one KV head, G a power of two up to LANES. Compiled code is made for
each G: functions get it as `heads`, a tuple of G zeros, because numba knows the length of a tuple
when it compiles. Scores have no sum over the lanes of a vector: W = LANES / G neighbouring elements
of a key go to each head's lanes, times as many of its query (lane g * W + w), and W tokens are
folded into one vector in the end (lane t * G + g). For 8 heads of 128 that takes 1.5 operations a
token, where sums over whole vectors take 22 beside 64 multiply-adds (counted).

Outputs are tiles of `rows` heads by `columns` vectors, 16 registers at most, each value widened in
a register and used for all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from cpu_kernels import simd
from cpu_kernels.attention import TILE_TOKENS, tile_columns, tile_rows
from cpu_kernels.simd import LANES, Tile, Vector, load

_VECTORS = simd.TILE * simd.TILE

Heads = tuple[int, ...]  # zeros; only its length counts


def _spread(builder: Any, pointer: Any, width: int) -> Any:
    """LANES / width copies of `width` neighbouring floats."""
    if width == 1:
        return simd._splat(builder, builder.load(pointer, align=4), simd._LLVM_VECTOR)
    if width == 2:  # as one number: LLVM knows the instruction for that
        double = ir.DoubleType()
        pair = builder.load(builder.bitcast(pointer, double.as_pointer()), align=4)
        pairs = simd._splat(builder, pair, ir.VectorType(double, LANES // 2))
        return builder.bitcast(pairs, simd._LLVM_VECTOR)
    vector = ir.VectorType(ir.FloatType(), width)
    few = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=4)
    return simd._shuffle(builder, few, few, [lane % width for lane in range(LANES)])


def _generate_add_keys(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    value, query, array, index, row_stride, _ = arguments
    width = LANES // len(signature.args[5])
    first = simd._element(context, builder, signature.args[2], array, index)
    for token in range(TILE_TOKENS):
        offset = builder.mul(row_stride, ir.Constant(row_stride.type, token))
        key = _spread(builder, builder.gep(first, [offset]), width)
        before = builder.extract_value(value, token)
        after = simd._multiply_add(builder, query, key, before)
        value = builder.insert_value(value, after, token)
    return value


@simd._compiled_by(
    _generate_add_keys,
    lambda t, q, a, i, s, h: simd._tile(simd._tile, simd._vector, a, types.intp, types.intp, h),
)
def add_keys(
    value: Tile,
    query: Vector,
    array: NDArray[np.float32],
    index: int,
    row_stride: int,
    heads: Heads,
) -> Tile:
    """Add to vector t: query * the W elements from array[index + t * row_stride], repeated."""
    width = LANES // len(heads)
    starts = [index + t * row_stride for t in range(TILE_TOKENS)]
    keys = np.stack([np.tile(array[start : start + width], len(heads)) for start in starts])
    return value + (query * keys).reshape(value.shape)


def _generate_store_scores(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, value, _ = arguments
    num_heads = len(signature.args[3])
    width = LANES // num_heads
    vectors = [builder.extract_value(value, number) for number in range(_VECTORS)]
    size = width
    while size > 1:  # each round halves the partial sums of a token and packs two vectors into one
        lower = [
            which + head * width + token * size + lane
            for head in range(num_heads)
            for which in (0, LANES)
            for token in range(width // size)
            for lane in range(size // 2)
        ]
        upper = [lane + size // 2 for lane in lower]
        vectors = [
            builder.fadd(simd._shuffle(builder, x, y, lower), simd._shuffle(builder, x, y, upper))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        size //= 2
    by_token = [head * width + token for token in range(width) for head in range(num_heads)]
    first = simd._element(context, builder, signature.args[0], array, index)
    for number, vector in enumerate(vectors):
        offset = ir.Constant(index.type, number * LANES)
        pointer = builder.bitcast(builder.gep(first, [offset]), simd._LLVM_VECTOR.as_pointer())
        builder.store(simd._shuffle(builder, vector, vector, by_token), pointer, align=4)
    return context.get_dummy_value()


@simd._compiled_by(
    _generate_store_scores, lambda a, i, t, h: types.none(a, types.intp, simd._tile, h)
)
def store_scores(array: NDArray[np.float32], index: int, value: Tile, heads: Heads) -> None:
    """Sum the W lanes of every token and head; write token by token, head by head."""
    sums = value.reshape(TILE_TOKENS, len(heads), -1).sum(axis=2)
    array[index : index + sums.size] = sums.reshape(-1)


def _fold_tokens(combine: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, shift = arguments[0], len(signature.args[1])
        while shift < LANES:
            turned = [(lane + shift) % LANES for lane in range(LANES)]
            value = combine(builder, value, simd._shuffle(builder, value, value, turned))
            shift *= 2
        return value

    return generate


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@simd._compiled_by(_fold_tokens(_larger), lambda x, h: simd._vector(simd._vector, h))
def largest_of_tokens(x: Vector, heads: Heads) -> Vector:
    """Return each head's largest of its W tokens, in all its lanes."""
    return np.tile(x.reshape(-1, len(heads)).max(axis=0), LANES // len(heads))


@simd._compiled_by(
    _fold_tokens(lambda builder, x, y: builder.fadd(x, y)),
    lambda x, h: simd._vector(simd._vector, h),
)
def sum_of_tokens(x: Vector, heads: Heads) -> Vector:
    """Return each head's sum over its W tokens, in all its lanes."""
    return np.tile(x.reshape(-1, len(heads)).sum(axis=0), LANES // len(heads))


def _splat_of(context: Any, builder: Any, array_type: Any, array: Any, index: Any, at: int) -> Any:
    first = simd._element(context, builder, array_type, array, index)
    pointer = builder.gep(first, [ir.Constant(index.type, at)])
    return simd._splat(builder, builder.load(pointer, align=4), simd._LLVM_VECTOR)


def _generate_load_outputs(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, factors, at, _ = arguments
    rows = tile_rows(len(signature.args[4]))
    columns = tile_columns(len(signature.args[4]))
    first = simd._element(context, builder, signature.args[0], array, index)
    value = simd._tile_of([simd._constant(0.0)] * _VECTORS, builder)
    for row in range(rows):
        factor = _splat_of(context, builder, signature.args[2], factors, at, row)
        for number in range(row * columns, (row + 1) * columns):
            offset = ir.Constant(index.type, number * LANES)
            pointer = builder.bitcast(builder.gep(first, [offset]), simd._LLVM_VECTOR.as_pointer())
            scaled = builder.fmul(builder.load(pointer, align=4), factor)
            value = builder.insert_value(value, scaled, number)
    return value


@simd._compiled_by(
    _generate_load_outputs,
    lambda a, i, f, j, h: simd._tile(a, types.intp, f, types.intp, h),
)
def load_outputs(
    array: NDArray[np.float32],
    index: int,
    factors: NDArray[np.float32],
    factors_at: int,
    heads: Heads,
) -> Tile:
    """Return a tile of outputs, each head's times its factor."""
    rows, columns = tile_rows(len(heads)), tile_columns(len(heads))
    value = np.zeros((_VECTORS, LANES), np.float32)
    outputs = array[index : index + rows * columns * LANES].reshape(-1, LANES)
    value[: rows * columns] = outputs * factors[factors_at:][:rows].repeat(columns)[:, None]
    return value.reshape(simd.TILE, simd.TILE, LANES)


def _generate_store_outputs(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, value, _ = arguments
    num_heads = len(signature.args[3])
    first = simd._element(context, builder, signature.args[0], array, index)
    for number in range(tile_rows(num_heads) * tile_columns(num_heads)):
        offset = ir.Constant(index.type, number * LANES)
        pointer = builder.bitcast(builder.gep(first, [offset]), simd._LLVM_VECTOR.as_pointer())
        builder.store(builder.extract_value(value, number), pointer, align=4)
    return context.get_dummy_value()


@simd._compiled_by(
    _generate_store_outputs, lambda a, i, t, h: types.none(a, types.intp, simd._tile, h)
)
def store_outputs(array: NDArray[np.float32], index: int, value: Tile, heads: Heads) -> None:
    """Write a tile of outputs, vector after vector."""
    size = tile_rows(len(heads)) * tile_columns(len(heads)) * LANES
    array[index : index + size] = value.reshape(-1)[:size]


def _load_two(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> list[Any]:
    """Two vectors of neighbouring elements, in the order of `column_of`."""
    if array_type.dtype != types.uint16:
        second = builder.add(index, ir.Constant(index.type, LANES))
        signature = simd._vector(array_type, types.intp)
        return [
            simd._generate_load(context, builder, signature, (array, at)) for at in (index, second)
        ]
    # one operation a vector, where widening neighbours takes two
    address = simd._element(context, builder, array_type, array, index)
    words = builder.load(builder.bitcast(address, simd._LLVM_BITS.as_pointer()), align=2)
    sixteen, high = (ir.Constant(simd._LLVM_BITS, [n] * LANES) for n in (16, 0xFFFF0000))
    parts = builder.shl(words, sixteen), builder.and_(words, high)
    return [builder.bitcast(part, simd._LLVM_VECTOR) for part in parts]


def _two(array: NDArray[Any], index: int) -> NDArray[np.float32]:
    row = np.concatenate([load(array, index), load(array, index + LANES)])
    return np.concatenate([row[::2], row[1::2]]) if array.dtype == np.uint16 else row


def _generate_is_split(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return ir.Constant(ir.IntType(1), int(signature.args[0].dtype == types.uint16))


@simd._compiled_by(_generate_is_split, lambda array: types.boolean(array))
def is_split(array: NDArray[Any]) -> bool:
    """Are the elements of two vectors widened to the even ones and then the odd ones?"""
    return array.dtype == np.uint16


def _generate_widen_two(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    target, target_at, source, source_at = arguments
    first = simd._element(context, builder, signature.args[0], target, target_at)
    parts = _load_two(context, builder, signature.args[2], source, source_at)
    for number, part in enumerate(parts):
        pointer = builder.gep(first, [ir.Constant(target_at.type, number * LANES)])
        builder.store(part, builder.bitcast(pointer, simd._LLVM_VECTOR.as_pointer()), align=4)
    return context.get_dummy_value()


@simd._compiled_by(_generate_widen_two, lambda a, i, b, j: types.none(a, types.intp, b, types.intp))
def widen_two(
    target: NDArray[np.float32], target_at: int, source: NDArray[Any], source_at: int
) -> None:
    """Copy two vectors of neighbouring elements as float32, split if `is_split`."""
    target[target_at : target_at + 2 * LANES] = _two(source, source_at)


def _generate_add_values(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    value, weights, weights_at, values, values_at, _ = arguments
    weights_type, values_type = signature.args[1], signature.args[3]
    rows = tile_rows(len(signature.args[5]))
    columns = tile_columns(len(signature.args[5]))
    loaded = []
    for column in range(0, columns, 2):
        at = builder.add(values_at, ir.Constant(values_at.type, column * LANES))
        loaded += _load_two(context, builder, values_type, values, at)
    for row in range(rows):
        weight = _splat_of(context, builder, weights_type, weights, weights_at, row)
        for column in range(columns):
            number = row * columns + column
            before = builder.extract_value(value, number)
            after = simd._multiply_add(builder, weight, loaded[column], before)
            value = builder.insert_value(value, after, number)
    return value


@simd._compiled_by(
    _generate_add_values,
    lambda t, w, i, v, j, h: simd._tile(simd._tile, w, types.intp, v, types.intp, h),
)
def add_values(
    value: Tile,
    weights: NDArray[np.float32],
    weights_at: int,
    values: NDArray[Any],
    values_at: int,
    heads: Heads,
) -> Tile:
    """Add one token: each head's weight times the vectors of values from values[values_at]."""
    rows, columns = tile_rows(len(heads)), tile_columns(len(heads))
    row = np.concatenate([_two(values, values_at + c * LANES) for c in range(0, columns, 2)])
    total = value.reshape(-1).copy()
    total[: rows * row.size] += np.outer(weights[weights_at:][:rows], row).reshape(-1)
    return total.reshape(value.shape)


def _generate_prefetch_far(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    address = simd._element(context, builder, signature.args[0], *arguments)
    pointer = builder.bitcast(address, ir.IntType(8).as_pointer())
    # read, keep in the outer caches, data
    flags = [ir.Constant(ir.IntType(32), flag) for flag in (0, 1, 1)]
    simd._call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])
    return context.get_dummy_value()


@simd._compiled_by(_generate_prefetch_far, lambda array, i: types.none(array, types.intp))
def prefetch_far(array: NDArray[Any], index: int) -> None:
    """Ask for the cache line of array[index] in the outer caches; any index is allowed.

    The first level has 16 places for lines on their way: nothing but reading blocks takes 10 GB/s
    on a Sapphire Rapids core when they are prefetched into it, 12 into the second level, of the
    14.5 of a plain read. x86's prefetcht2, which this is, and prefetcht1 do the same within noise.
    """

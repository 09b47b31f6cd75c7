"""The compiled loops of `packing.py`: they check nothing and allocate nothing.

One panel of 16 rows at a time, a chunk of columns at a time: every row of the chunk becomes 32-bit
words in the first-level cache, and 16 x 16 words are then turned in registers, rows to columns.
Arrays are as in `simd.py`; `x_at` is the index of x's start, or its address if x lies in scratch.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.compiling import Source
from cpu_kernels.formats import PANEL_ROWS, STEP_BYTES, TOO_LARGE
from cpu_kernels.packing import (
    BFLOAT16,
    CHUNK_COLUMNS,
    CODES_AT,
    FLOAT32,
    INT4_ZERO,
    INT8,
    SCRATCH_BYTES,
    WORDS_AT,
    PackingCall,
)
from cpu_kernels.simd import (
    LANES,
    call_at,
    fetch_add,
    load,
    load_first,
    pointer_at,
    store,
    store_first,
)

_CALL = np.dtype(PackingCall)
_NUM_BAD_AT = PackingCall.num_bad.offset
_SPARE = CHUNK_COLUMNS  # the one value more, read and written as bits and as a float32
_TOO_LARGE_BITS = int(np.float32(TOO_LARGE).view(np.int32))
# 1.5 * 2**23: adding it rounds a small float32 to an integer, to nearest and ties to even
_ROUND = np.float32(12582912.0)
_ONE = np.float32(1)


def make_pack() -> Source:
    """The body of a `PackingCall` that writes panels."""

    def pack(address: int, item: int, worker: int) -> None:
        call = call_at(address, _CALL)
        scratch = call.scratch + worker * SCRATCH_BYTES
        _pack_panel(call, scratch, item, pointer_at(address + _NUM_BAD_AT, np.int64))

    return Source(pack, num_arguments=3)


def make_unpack() -> Source:
    """The body of a `PackingCall` that reads panels."""

    def unpack(address: int, item: int, worker: int) -> None:
        call = call_at(address, _CALL)
        _unpack_panel(call, call.scratch + worker * SCRATCH_BYTES, item)

    return Source(unpack, num_arguments=3)


def _turn(builder: Any, rows: list[Any]) -> list[Any]:
    # in step d, rows i and i + d swap the lanes in which they differ from the transposed matrix
    distance = PANEL_ROWS // 2
    while distance:
        turned = list(rows)
        for i in range(PANEL_ROWS):
            if i & distance:
                continue
            lanes = range(PANEL_ROWS)
            first = [n if not n & distance else PANEL_ROWS + n - distance for n in lanes]
            second = [n + distance if not n & distance else PANEL_ROWS + n for n in lanes]
            for row, places in ((i, first), (i + distance, second)):
                mask = ir.Constant(ir.VectorType(ir.IntType(32), PANEL_ROWS), places)
                turned[row] = builder.shuffle_vector(rows[i], rows[i + distance], mask)
        rows = turned
        distance //= 2
    return rows


def _turning(*, past_caches: bool) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_at, source_stride, target, target_at, target_stride = arguments
        vector = ir.VectorType(ir.IntType(32), PANEL_ROWS)

        def address(array: Any, at: Any, stride: Any, row: int) -> Any:
            index = builder.add(at, builder.mul(stride, ir.Constant(stride.type, row)))
            return builder.bitcast(builder.gep(array, [index]), vector.as_pointer())

        # rows of a matrix are aligned to their elements only
        align = signature.args[0].dtype.bitwidth // 8
        rows = [
            builder.load(address(source, source_at, source_stride, row), align=align)
            for row in range(PANEL_ROWS)
        ]
        for row, value in enumerate(_turn(builder, rows)):
            pointer = address(target, target_at, target_stride, row)
            written = builder.store(value, pointer, align=STEP_BYTES if past_caches else 4)
            if past_caches:
                one = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
                written.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    def turn(
        typing_context: Any,
        source: Any,
        source_at: Any,
        source_stride: Any,
        target: Any,
        target_at: Any,
        target_stride: Any,
    ) -> Any:
        place = types.intp
        return types.void(source, place, place, target, place, place), generate

    return intrinsic(turn)


# Copy 16 x 16 words, rows to columns: (source, at, stride, target, at, stride), where a row starts
# `stride` elements after the one before. The second needs an aligned target and does not read it
# first: bfloat16 to bfloat16 8 to 10 GB/s a thread instead of 5. Its stores are weakly ordered; the
# atomic addition with which a thread finishes its panel orders them.
_turn_words = _turning(past_caches=False)
_turn_words_past_caches = _turning(past_caches=True)


@numba.njit(nogil=True, error_model="numpy")
def _pack_panel(call: Any, scratch: int, panel: int, num_bad: Any) -> None:
    """Write one panel, chunk by chunk."""
    words = pointer_at(scratch + WORDS_AT, np.uint32)
    panels = pointer_at(call.panels, np.uint32)
    step = call.columns_per_step
    panel_at = panel * -(-call.num_columns // step) * PANEL_ROWS
    done = _copy_whole_blocks(call, panel, panels, panel_at)
    for first in range(done, call.num_columns, CHUNK_COLUMNS):
        count = min(CHUNK_COLUMNS, call.num_columns - first)
        for lane in range(PANEL_ROWS):
            _pack_row(call, scratch, panel, lane, first, count, num_bad)
        out_at = panel_at + first // step * PANEL_ROWS
        chunk_steps = -(-count // step)
        whole = chunk_steps - chunk_steps % PANEL_ROWS
        _turn_blocks(words, 0, CHUNK_COLUMNS, 1, panels, out_at, whole, call.panels)
        for s in range(whole, chunk_steps):
            for lane in range(PANEL_ROWS):
                panels[out_at + s * PANEL_ROWS + lane] = words[lane * CHUNK_COLUMNS + s]


@numba.njit(nogil=True, error_model="numpy")
def _copy_whole_blocks(call: Any, panel: int, panels: Any, panel_at: int) -> int:
    """Turn a matrix that is in the blob's format already; return how many columns are done."""
    if call.weight_kind != call.matrix_kind or (panel + 1) * PANEL_ROWS > call.num_rows:
        return 0
    at, stride = panel * PANEL_ROWS * call.num_columns, call.num_columns
    if call.weight_kind == BFLOAT16:
        steps: int = call.num_columns // (2 * PANEL_ROWS) * PANEL_ROWS
        matrix = pointer_at(call.matrix, np.uint16)
        _turn_blocks(matrix, at, stride, 2, panels, panel_at, steps, call.panels)
        return steps * 2
    steps = call.num_columns // PANEL_ROWS * PANEL_ROWS
    words = pointer_at(call.matrix, np.uint32)
    _turn_blocks(words, at, stride, 1, panels, panel_at, steps, call.panels)
    return steps


@numba.njit(nogil=True, error_model="numpy")
def _turn_blocks(
    source: Any,
    at: int,
    stride: int,
    word_elements: int,
    panels: Any,
    out_at: int,
    num_steps: int,
    panels_address: int,
) -> None:
    """Turn 16 rows into steps, a multiple of 16."""
    is_aligned = panels_address % STEP_BYTES == 0
    for s in range(0, num_steps, PANEL_ROWS):
        i, to = at + s * word_elements, out_at + s * PANEL_ROWS
        if is_aligned:
            _turn_words_past_caches(source, i, stride, panels, to, PANEL_ROWS)
        else:
            _turn_words(source, i, stride, panels, to, PANEL_ROWS)


@numba.njit(nogil=True, error_model="numpy")
def _pack_row(
    call: Any, scratch: int, panel: int, lane: int, first: int, count: int, num_bad: Any
) -> None:
    """Set the words of one row of the chunk, zeros where the matrix has no such row."""
    row = panel * PANEL_ROWS + lane
    at = row * call.num_columns + first
    filled = count if row < call.num_rows else 0
    words_at = scratch + WORDS_AT + lane * CHUNK_COLUMNS * 4
    kind = call.weight_kind
    if kind == BFLOAT16 and call.matrix_kind == BFLOAT16:
        _copy(
            pointer_at(call.matrix, np.uint16), at, filled, pointer_at(words_at, np.uint16), count
        )
        return
    values_at = words_at if kind == FLOAT32 else scratch
    values = pointer_at(values_at, np.float32)
    if call.matrix_kind == FLOAT32:
        _widen(pointer_at(call.matrix, np.float32), at, filled, values, count)
    elif call.matrix_kind == BFLOAT16:
        _widen(pointer_at(call.matrix, np.uint16), at, filled, values, count)
    else:
        _widen(pointer_at(call.matrix, np.int16), at, filled, values, count)
    if kind == BFLOAT16:
        _round_to(pointer_at(words_at, np.uint16), 0, values, count + count % 2)
    elif kind != FLOAT32:
        codes_at = words_at if kind == INT8 else scratch + CODES_AT
        for column in range(0, count, call.group_size):
            group = (first + column) // call.group_size
            _quantise(
                call,
                scratch,
                column,
                min(call.group_size, count - column),
                pointer_at(codes_at, np.uint8),
                (panel * call.num_groups + group) * PANEL_ROWS + lane,
                num_bad,
            )
        if kind != INT8:
            _join_halves(
                pointer_at(codes_at, np.uint32), -(-count // 8), pointer_at(words_at, np.uint32)
            )


@numba.njit(nogil=True, error_model="numpy")
def _copy(source: Any, at: int, filled: int, words: Any, count: int) -> None:
    for i in range(filled):
        words[i] = source[at + i]
    for i in range(filled, count + count % 2):
        words[i] = np.uint16(0)


@numba.njit(nogil=True, error_model="numpy")
def _widen(source: Any, at: int, filled: int, values: Any, count: int) -> None:
    """Set the first `count` float32 and the rest of their last vector, zeros after `filled`."""
    whole = filled - filled % LANES
    for i in range(0, whole, LANES):
        store(values, i, load(source, at + i))
    for i in range(whole, count, LANES):
        store(values, i, load_first(source, at + i, filled - i))


@numba.njit(nogil=True, error_model="numpy")
def _round_to(matrix: Any, at: int, values: Any, count: int) -> None:
    """Set the first `count` elements from `at` on, rounded to the matrix's format."""
    whole = count - count % LANES
    for i in range(0, whole, LANES):
        store(matrix, at + i, load(values, i))
    if whole < count:
        store_first(matrix, at + whole, count - whole, load(values, whole))


@numba.njit(nogil=True, error_model="numpy")
def _quantise(
    call: Any, scratch: int, start: int, count: int, codes: Any, scale_at: int, num_bad: Any
) -> None:
    """Set the codes, the scale and the zero point of one row of a group."""
    values, bits = pointer_at(scratch, np.float32), pointer_at(scratch, np.int32)
    # as integers that are ordered like the floats: a minimum of floats is no vector instruction
    # while there may be NaN, and here NaN lies beyond infinity
    low: Any = np.int32(0)
    high: Any = np.int32(0)
    for i in range(start, start + count):
        key = np.int32(bits[i] ^ np.int32(np.int32(bits[i] >> 31) & np.int32(0x7FFFFFFF)))
        low, high = min(low, key), max(high, key)
    low = np.int32(~low) if low < 0 else np.int32(0)  # now bits of the magnitude
    if max(low, high) >= _TOO_LARGE_BITS:
        found: Any = 0
        for i in range(start, start + count):
            found += np.int32(bits[i] & 0x7FFFFFFF) >= _TOO_LARGE_BITS
        fetch_add(num_bad, 0, found)
        low = high = np.int32(0)
    has_zero = call.weight_kind == INT4_ZERO
    bits[_SPARE] = low
    lowest = values[_SPARE]  # without its sign
    bits[_SPARE] = high
    span = values[_SPARE] + lowest if has_zero else max(values[_SPARE], lowest)
    steps = np.float32(call.scale_steps)
    values[_SPARE] = span / steps
    scale_bits = np.int32(np.int32(bits[_SPARE] + np.int32(0xFFFF)) >> 16)
    bits[_SPARE] = np.int32(scale_bits << 16)
    if values[_SPARE] * steps < span:
        scale_bits = np.int32(scale_bits + 1)
        bits[_SPARE] = np.int32(scale_bits << 16)
    divisor = values[_SPARE] if scale_bits else _ONE
    pointer_at(call.scales, np.uint16)[scale_at] = np.uint16(scale_bits)
    zero = np.int32(call.zero_code)
    if has_zero:
        zero = np.int32((lowest / divisor + _ROUND) - _ROUND)
        pointer_at(call.zeros, np.uint8)[scale_at] = np.uint8(zero)
    largest = np.int32(255 if call.weight_kind == INT8 else 15)
    step = call.columns_per_step
    for i in range(start, start + -(-count // step) * step):
        code = np.int32(np.int32((values[i] / divisor + _ROUND) - _ROUND) + zero)
        codes[i] = np.uint8(min(code, largest))


@numba.njit(nogil=True, error_model="numpy")
def _join_halves(codes: Any, num_words: int, words: Any) -> None:
    """Join 8 bytes of codes to 4 bytes, the first 4 codes in the low halves."""
    for i in range(num_words):
        words[i] = np.uint32(codes[2 * i] | np.uint32(codes[2 * i + 1] << 4))


@numba.njit(nogil=True, error_model="numpy")
def _unpack_panel(call: Any, scratch: int, panel: int) -> None:
    """Write the rows of one panel, chunk by chunk."""
    words = pointer_at(scratch + WORDS_AT, np.uint32)
    panels = pointer_at(call.panels, np.uint32)
    step = call.columns_per_step
    panel_at = panel * -(-call.num_columns // step) * PANEL_ROWS
    for first in range(0, call.num_columns, CHUNK_COLUMNS):
        count = min(CHUNK_COLUMNS, call.num_columns - first)
        at = panel_at + first // step * PANEL_ROWS
        chunk_steps = -(-count // step)
        whole = chunk_steps - chunk_steps % PANEL_ROWS
        for s in range(0, whole, PANEL_ROWS):
            _turn_words(panels, at + s * PANEL_ROWS, PANEL_ROWS, words, s, CHUNK_COLUMNS)
        for s in range(whole, chunk_steps):
            for lane in range(PANEL_ROWS):
                words[lane * CHUNK_COLUMNS + s] = panels[at + s * PANEL_ROWS + lane]
        for lane in range(min(PANEL_ROWS, call.num_rows - panel * PANEL_ROWS)):
            _unpack_row(call, scratch, panel, lane, first, count)


@numba.njit(nogil=True, error_model="numpy")
def _unpack_row(call: Any, scratch: int, panel: int, lane: int, first: int, count: int) -> None:
    """Write one row of the chunk from its words."""
    at = (panel * PANEL_ROWS + lane) * call.num_columns + first
    words_at = scratch + WORDS_AT + lane * CHUNK_COLUMNS * 4
    kind = call.weight_kind
    if kind == BFLOAT16 and call.matrix_kind == BFLOAT16:
        stored, matrix = pointer_at(words_at, np.uint16), pointer_at(call.matrix, np.uint16)
        for i in range(count):
            matrix[at + i] = stored[i]
        return
    values_at = words_at if kind == FLOAT32 else scratch
    values = pointer_at(values_at, np.float32)
    if kind == BFLOAT16:
        _widen(pointer_at(words_at, np.uint16), 0, count, values, count)
    elif kind != FLOAT32:
        codes_at = words_at
        if kind != INT8:
            codes_at = scratch + CODES_AT
            _split_halves(
                pointer_at(words_at, np.uint32), -(-count // 8), pointer_at(codes_at, np.uint32)
            )
        for column in range(0, count, call.group_size):
            group = (first + column) // call.group_size
            _multiply_codes(
                call,
                pointer_at(codes_at, np.uint8),
                scratch,
                column,
                min(call.group_size, count - column),
                (panel * call.num_groups + group) * PANEL_ROWS + lane,
            )
    if call.matrix_kind == BFLOAT16:
        _round_to(pointer_at(call.matrix, np.uint16), at, values, count)
    else:
        _round_to(pointer_at(call.matrix, np.float32), at, values, count)


@numba.njit(nogil=True, error_model="numpy")
def _split_halves(words: Any, num_words: int, codes: Any) -> None:
    """Undo `_join_halves`."""
    for i in range(num_words):
        codes[2 * i] = np.uint32(words[i] & np.uint32(0x0F0F0F0F))
        codes[2 * i + 1] = np.uint32(np.uint32(words[i] >> 4) & np.uint32(0x0F0F0F0F))


@numba.njit(nogil=True, error_model="numpy")
def _multiply_codes(
    call: Any, codes: Any, scratch: int, start: int, count: int, scale_at: int
) -> None:
    """Set the values of one row of a group."""
    values, bits = pointer_at(scratch, np.float32), pointer_at(scratch, np.int32)
    bits[_SPARE] = np.int32(np.int32(pointer_at(call.scales, np.uint16)[scale_at]) << 16)
    scale = values[_SPARE]
    zero = np.int32(call.zero_code)
    if call.weight_kind == INT4_ZERO:
        zero = np.int32(pointer_at(call.zeros, np.uint8)[scale_at])
    for i in range(start, start + count):
        values[i] = np.float32(np.int32(np.int32(codes[i]) - zero)) * scale

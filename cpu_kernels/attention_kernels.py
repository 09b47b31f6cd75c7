"""The compiled loops of `attention.py`: nothing is allocated.

Arrays have no dimensions here (simd.py says what an `array` is); `x_at` is the index of x's start,
`heads` what attention_ops.py says.
"""

# S sequences, C KV heads, G heads of a group (a power of two), W = LANES / G

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from cpu_kernels.attention_ops import (
    TILE_TOKENS,
    add_keys,
    add_values,
    is_split,
    largest_of_tokens,
    load_outputs,
    prefetch_far,
    store_outputs,
    store_scores,
    sum_of_tokens,
    widen_two,
)
from cpu_kernels.compiling import compile_body, compiled_address, source_stamp
from cpu_kernels.panel_ops import call_on_threads
from cpu_kernels.simd import (
    LANES,
    add,
    divide,
    exp2,
    fetch_add,
    line_elements,
    load,
    load_first,
    maximum,
    multiply,
    pointer_at,
    splat,
    store,
    subtract,
    zero_tile,
)

SEGMENT_TOKENS = 512
# 32 keys of 128 float32 = 16 KB, which the first-level cache holds
CHUNK_TOKENS = 32
# Columns of keys that lie side by side in float32: the rows of a tile are a constant apart.
KEY_COLUMNS = 64
# Rows of the cache of a worker's item, the first ones of its next, and the numbers from 0; behind
# them what prefetches may take for a row.
WORKER_ROWS = SEGMENT_TOKENS + 3 * CHUNK_TOKENS
_NUMBERS = SEGMENT_TOKENS + CHUNK_TOKENS
_NEXT_ITEM, _NEXT_WORKER, PENDING = 0, 1, 2  # places in `counters`
# Starting a thread takes 3 us, in which another attends to 30 KB
_THREAD_BYTES = 1 << 17
_LOG2_E, _LN_2 = math.log2(math.e), math.log(2.0)
_ZERO, _MINUS_INFINITY = np.float32(0.0), np.float32(-np.inf)

# how the kernel sees each cache format: uint16 is bfloat16's bits, int16 float16's
CACHE_FORMATS = {"float32": np.float32, "uint16": np.uint16, "float16": np.int16}

DONE, REFUSED, NEEDS_SCRATCH, NEEDS_THREADS = 0, 1, 2, 3  # what `enter_attend` returns


class AttentionCall(ctypes.Structure):
    """One call as its threads see it: addresses, sizes, and where each part of scratch begins."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in [
                "q",
                "key_cache",
                "value_cache",
                "block_tables",
                "context_lens",
                "sinks",
                "out",
                "lse",
                "floats",
                "counters",
                "tails",
                "num_seqs",
                "num_kv_heads",
                "group_size",
                "key_width",
                "value_width",
                "block_size",
                "max_blocks",
                "window",
                "has_sinks",
                "padded_group",
                "padded_key",
                "padded_value",
                "maxima_at",
                "sums_at",
                "workers_at",
                "worker_size",
                "rows_at",
                "num_items",
                "num_workers",
                "scratch_bytes",
            ]
        ),
        ("scale", ctypes.c_double),
    )


CALL_DTYPE = np.dtype(AttentionCall)


def heads_at_once(group_size: int) -> int:
    """Return how many query heads of a KV head the kernel takes together."""
    return min(1 << (group_size - 1).bit_length(), LANES)


def attend_address(cache_dtype: np.dtype[Any], group_size: int) -> int:
    """Return the address of `void attend(AttentionCall *)` for a cache format and heads."""
    return compiled_address(_compiled_attend, cache_dtype, heads_at_once(group_size))


@cache
def _compiled_attend(cache_dtype: np.dtype[Any], num_heads: int) -> Any:
    element = CACHE_FORMATS[cache_dtype.name]
    heads = (0,) * num_heads
    stamp = source_stamp()

    @compile_body(AttentionCall)
    def body(call_pointer: Any) -> None:
        _ = stamp
        call = numba.carray(call_pointer, 1)[0]  # type: ignore[attr-defined]
        _attend(
            call,
            pointer_at(call.q, np.float32),
            pointer_at(call.key_cache, element),
            pointer_at(call.value_cache, element),
            pointer_at(call.block_tables, np.int32),
            pointer_at(call.context_lens, np.int32),
            pointer_at(call.sinks, np.float32),
            pointer_at(call.out, np.float32),
            pointer_at(call.lse, np.float32),
            pointer_at(call.floats, np.float32),
            pointer_at(call.counters, np.int64),
            pointer_at(call.tails, element),
            heads,
        )

    return body


def _address_of(formats: tuple[Any, ...], dimensions: int, *, is_written: bool) -> Any:
    """Return an operation: array to address. With any other array the caller does not compile."""

    def address(typing_context: Any, array: Any) -> Any:
        is_plain = isinstance(array, types.Array) and array.layout == "C" and array.aligned
        fits = is_plain and array.dtype in formats and array.ndim == dimensions
        if not fits or (is_written and not array.mutable):
            raise TypingError(f"{array} is no contiguous array of one of {formats}")
        return types.int64(array), _generate_address

    return intrinsic(address)


def _generate_address(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    return builder.ptrtoint(data, context.get_value_type(types.int64))


_floats_1d = _address_of((types.float32,), 1, is_written=False)
_floats_3d = _address_of((types.float32,), 3, is_written=False)
_outputs_2d = _address_of((types.float32,), 2, is_written=True)
_outputs_3d = _address_of((types.float32,), 3, is_written=True)
_cache_4d = _address_of((types.float32, types.uint16, types.int16), 4, is_written=False)
_ints_1d = _address_of((types.int32,), 1, is_written=False)
_ints_2d = _address_of((types.int32,), 2, is_written=False)


@numba.njit(nogil=True, error_model="numpy")
def _round_up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


@numba.njit(nogil=True, error_model="numpy")
def _num_segments(length: int, window: int) -> int:
    return (min(length, window) + SEGMENT_TOKENS - 1) // SEGMENT_TOKENS


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _plan_call(call: Any, context_lens: Any, heads_together: int, num_threads: int) -> bool:
    """Complete the sizes of a call; False if a context length is out of range."""
    num_segments, num_tokens = 0, 0
    for seq in range(call.num_seqs):
        length = int(context_lens[seq])
        if length < 1 or length > call.max_blocks * call.block_size:
            return False
        num_segments += _num_segments(length, call.window)
        num_tokens += min(length, call.window)
    call.num_items = num_segments * call.num_kv_heads
    call.padded_group = _round_up(call.group_size, heads_together)
    call.padded_key = _round_up(call.key_width, 2 * LANES)
    call.padded_value = _round_up(call.value_width, tile_columns_of(heads_together) * LANES)
    row_bytes = 2 * (call.key_width + call.value_width)
    num_bytes = num_tokens * call.num_kv_heads * row_bytes
    call.num_workers = max(1, min(num_threads, call.num_items, num_bytes // _THREAD_BYTES))
    # scratch, float32: partial outputs, their maxima, their sums, then each worker's queries,
    # scores, factors and keys; int64: counters, each worker's rows; last the workers' value tails
    states = call.num_items * (call.padded_group // heads_together) * LANES
    call.maxima_at = call.num_items * call.padded_group * call.padded_value
    call.sums_at = call.maxima_at + states
    call.workers_at = call.sums_at + states
    call.worker_size = call.padded_group * (call.padded_key + CHUNK_TOKENS) + _round_up(
        call.padded_group, LANES
    )
    call.worker_size += CHUNK_TOKENS * _round_up(call.padded_key, KEY_COLUMNS)
    call.rows_at = PENDING + call.num_seqs * call.num_kv_heads
    num_floats = call.workers_at + call.num_workers * call.worker_size
    num_counters = _round_up(call.rows_at + call.num_workers * WORKER_ROWS, 8)
    tail_bytes = call.num_workers * CHUNK_TOKENS * KEY_COLUMNS * 4
    call.scratch_bytes = 4 * num_floats + 8 * num_counters + tail_bytes
    call.counters = 4 * num_floats
    call.tails = call.counters + 8 * num_counters
    return True


@numba.njit(nogil=True, error_model="numpy")
def tile_columns_of(heads_together: int) -> int:
    """Return `tile_columns` of a number of heads that is known only at run time."""
    return min(4, TILE_TOKENS // min(heads_together, TILE_TOKENS // 2))


def _make_enter_attend() -> Any:
    stamp = source_stamp()

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def enter_attend(
        calls: Any,
        q: Any,
        keys: Any,
        values: Any,
        block_tables: Any,
        context_lens: Any,
        sinks: Any,
        has_sinks: bool,
        out: Any,
        lse: Any,
        scale: float,
        window: int,
        heads_together: int,
        num_threads: int,
        scratch: int,
        scratch_bytes: int,
        body: int,
        parallel: int,
    ) -> int:
        """Complete a call and run it; what it returns is DONE or why it was not run."""
        _ = stamp
        call = calls[0]
        call.q, call.key_cache, call.value_cache = _floats_3d(q), _cache_4d(keys), _cache_4d(values)
        call.block_tables, call.context_lens = _ints_2d(block_tables), _ints_1d(context_lens)
        call.sinks, call.out, call.lse = _floats_1d(sinks), _outputs_3d(out), _outputs_2d(lse)
        num_seqs, num_heads, key_width = q.shape
        num_blocks, num_kv_heads, block_size, value_width = values.shape
        fits = keys.shape == (num_blocks, num_kv_heads, block_size, key_width)
        fits = fits and block_tables.shape[0] == num_seqs and context_lens.shape[0] == num_seqs
        fits = fits and out.shape == (num_seqs, num_heads, value_width)
        fits = fits and lse.shape == (num_seqs, num_heads) and num_kv_heads > 0
        fits = fits and (not has_sinks or sinks.shape[0] == num_heads)
        if not fits or num_heads % num_kv_heads != 0 or window < 1 or num_threads < 1:
            return REFUSED
        call.num_seqs, call.num_kv_heads, call.block_size = num_seqs, num_kv_heads, block_size
        call.group_size = num_heads // num_kv_heads
        call.key_width, call.value_width = key_width, value_width
        call.max_blocks, call.window = block_tables.shape[1], window
        call.has_sinks, call.scale = has_sinks, scale * _LOG2_E
        if not _plan_call(call, context_lens, heads_together, num_threads):
            return REFUSED
        if call.num_items == 0 or num_heads == 0:
            return DONE
        if call.scratch_bytes > scratch_bytes:
            return NEEDS_SCRATCH
        call.floats = scratch
        call.counters += scratch
        call.tails += scratch
        counters = pointer_at(call.counters, np.int64)
        for i in range(call.rows_at):
            counters[i] = 0
        if parallel == 0:
            return NEEDS_THREADS
        call_on_threads(parallel, body, calls.ctypes.data, call.num_workers)
        return DONE

    return enter_attend


# Takes a tenth of the time of ctypes: arrays cost it 0.1 us each instead of 1.
enter_attend = _make_enter_attend()


# inline="always" on the outer functions only: LLVM builds every function once for itself and again
# inside each caller; an earlier form of this kernel compiled in 3.2 s of CPU like this, in 4.3 with
# all inlined and in 4.9 with none.
@numba.njit(nogil=True, error_model="numpy", inline="always")
def _attend(
    call: Any,
    q: Any,
    keys: Any,
    values: Any,
    block_tables: Any,
    context_lens: Any,
    sinks: Any,
    out: Any,
    lse: Any,
    floats: Any,
    counters: Any,
    tails: Any,
    heads: Any,
) -> None:
    """Take items (sequence, KV head, segment) until none is left."""
    num_heads = len(heads)
    groups = call.padded_group // num_heads
    worker = fetch_add(counters, _NEXT_WORKER, 1)
    query_at = call.workers_at + worker * call.worker_size
    scores_at = query_at + call.padded_group * call.padded_key
    factors_at = scores_at + call.padded_group * CHUNK_TOKENS
    keys_at = factors_at + _round_up(call.padded_group, LANES)
    rows_at = call.rows_at + worker * WORKER_ROWS
    tail_at = worker * CHUNK_TOKENS * KEY_COLUMNS
    partial_size = call.padded_group * call.padded_value
    for t in range(CHUNK_TOKENS):
        counters[rows_at + _NUMBERS + t] = t

    item = fetch_add(counters, _NEXT_ITEM, 1)
    seq, seq_item, queries_of = 0, 0, -1
    while item < call.num_items:
        seq, seq_item = _sequence_of(call, context_lens, item, seq, seq_item)
        length = int(context_lens[seq])
        num_segments = _num_segments(length, call.window)
        kv_head, segment = (item - seq_item) // num_segments, (item - seq_item) % num_segments
        pair = seq * call.num_kv_heads + kv_head
        first = max(0, length - call.window) + segment * SEGMENT_TOKENS
        num_tokens = min(SEGMENT_TOKENS, length - first)
        _find_rows(call, block_tables, seq, kv_head, first, num_tokens, counters, rows_at)
        # the start of the next item is asked for while this one ends
        next_item = fetch_add(counters, _NEXT_ITEM, 1)
        if next_item < call.num_items:
            _find_next_rows(
                call,
                block_tables,
                context_lens,
                next_item,
                seq,
                seq_item,
                counters,
                rows_at + num_tokens,
            )
        else:
            for t in range(num_tokens, num_tokens + CHUNK_TOKENS):
                counters[rows_at + t] = counters[rows_at]
        if pair != queries_of:
            _load_queries(
                q,
                pair * call.group_size * call.key_width,
                call.group_size,
                call.key_width,
                np.float32(call.scale),
                floats,
                query_at,
                call.padded_group,
                call.padded_key,
                num_heads,
                is_split(keys),
            )
            queries_of = pair
        _attend_segment(
            keys,
            values,
            counters,
            rows_at,
            num_tokens,
            call.key_width,
            call.value_width,
            groups,
            call.padded_key,
            call.padded_value,
            floats,
            query_at,
            scores_at,
            factors_at,
            keys_at,
            item * partial_size,
            call.maxima_at + item * groups * LANES,
            call.sums_at + item * groups * LANES,
            tails,
            tail_at,
            heads,
        )
        if fetch_add(counters, PENDING + pair, 1) == num_segments - 1:
            of_pair = item - segment
            _merge_segments(
                floats,
                of_pair * partial_size,
                call.maxima_at + of_pair * groups * LANES,
                call.sums_at + of_pair * groups * LANES,
                factors_at,
                num_segments,
                groups,
                call.padded_value,
                call.group_size,
                call.value_width,
                sinks,
                kv_head * call.group_size,
                call.has_sinks,
                out,
                pair * call.group_size * call.value_width,
                lse,
                pair * call.group_size,
                is_split(keys),
                heads,
            )
        item = next_item


@numba.njit(nogil=True, error_model="numpy")
def _sequence_of(call: Any, context_lens: Any, item: int, seq: int, seq_item: int) -> Any:
    """Return the sequence of an item, and its first item; `seq` is one at or before it."""
    while True:
        num_segments = _num_segments(int(context_lens[seq]), call.window)
        next_item = seq_item + num_segments * call.num_kv_heads
        if item < next_item:
            return seq, seq_item
        seq += 1
        seq_item = next_item


@numba.njit(nogil=True, error_model="numpy")
def _find_rows(
    call: Any,
    block_tables: Any,
    seq: int,
    kv_head: int,
    first: int,
    num_tokens: int,
    rows: Any,
    rows_at: int,
) -> None:
    """Write the rows of the cache in which the tokens from `first` on lie."""
    # block by block: a division for every token takes a sixth of the whole time
    place = seq * call.max_blocks + first // call.block_size
    slot = first % call.block_size
    filled = 0
    while filled < num_tokens:
        block = int(block_tables[place])
        row = (block * call.num_kv_heads + kv_head) * call.block_size + slot
        count = min(call.block_size - slot, num_tokens - filled)
        for i in range(count):
            rows[rows_at + filled + i] = row + i
        filled += count
        place += 1
        slot = 0


@numba.njit(nogil=True, error_model="numpy")
def _find_next_rows(
    call: Any,
    block_tables: Any,
    context_lens: Any,
    item: int,
    seq: int,
    seq_item: int,
    rows: Any,
    rows_at: int,
) -> None:
    """Write the rows of an item's first chunk; the last one again where it has fewer tokens."""
    seq, seq_item = _sequence_of(call, context_lens, item, seq, seq_item)
    length = int(context_lens[seq])
    num_segments = _num_segments(length, call.window)
    kv_head, segment = (item - seq_item) // num_segments, (item - seq_item) % num_segments
    first = max(0, length - call.window) + segment * SEGMENT_TOKENS
    num_tokens = min(CHUNK_TOKENS, length - first)
    _find_rows(call, block_tables, seq, kv_head, first, num_tokens, rows, rows_at)
    for t in range(num_tokens, CHUNK_TOKENS):
        rows[rows_at + t] = rows[rows_at + num_tokens - 1]


@numba.njit(nogil=True, error_model="numpy")
def _column_of(position: int, is_split: bool) -> int:
    """Return which column lies at a position of a widened row (attention_ops.is_split)."""
    if not is_split:
        return position
    within = position % (2 * LANES)
    return position - within + 2 * (within % LANES) + within // LANES


@numba.njit(nogil=True, error_model="numpy")
def _load_queries(
    q: Any,
    q_at: int,
    group: int,
    width: int,
    scale: Any,
    floats: Any,
    query_at: int,
    padded_group: int,
    padded_width: int,
    num_heads: int,
    is_split: bool,
) -> None:
    """Copy a KV head's queries, scaled, W columns of every head side by side; zeros as padding."""
    together = LANES // num_heads
    for g in range(padded_group):
        start = query_at + g // num_heads * num_heads * padded_width + g % num_heads * together
        for d in range(0, padded_width, together):
            for w in range(together):
                column = _column_of(d + w, is_split)
                is_inside = g < group and column < width
                value = q[q_at + g * width + column] * scale if is_inside else _ZERO
                floats[start + d * num_heads + w] = value


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _attend_segment(
    keys: Any,
    values: Any,
    rows: Any,
    rows_at: int,
    num_tokens: int,
    key_width: int,
    value_width: int,
    groups: int,
    padded_key: int,
    padded_value: int,
    floats: Any,
    query_at: int,
    scores_at: int,
    factors_at: int,
    keys_at: int,
    partial_at: int,
    maxima_at: int,
    sums_at: int,
    tails: Any,
    tail_at: int,
    heads: Any,
) -> None:
    """Attend to some tokens: unnormalised sums of values, maxima, sums of weights."""
    num_heads = len(heads)
    columns = tile_columns_of(num_heads) * LANES
    whole_width = value_width - value_width % columns
    for i in range(0, groups * num_heads * padded_value, LANES):
        store(floats, partial_at + i, splat(_ZERO))
    for group in range(groups):
        store(floats, maxima_at + group * LANES, splat(_MINUS_INFINITY))
        store(floats, sums_at + group * LANES, splat(_ZERO))
    for chunk in range(0, num_tokens, CHUNK_TOKENS):
        chunk_tokens = min(CHUNK_TOKENS, num_tokens - chunk)
        here = rows_at + chunk
        # behind a last chunk that is not full begin the rows of the next item
        ahead = here + chunk_tokens
        _widen_keys(keys, rows, here, chunk_tokens, key_width, floats, keys_at, tails, tail_at)
        for group in range(groups):
            query = query_at + group * num_heads * padded_key
            scores = scores_at + group * num_heads * CHUNK_TOKENS
            _score_chunk(
                floats,
                query,
                keys_at,
                chunk_tokens,
                padded_key,
                scores,
                keys,
                rows,
                ahead,
                key_width if group == 0 else 0,
                heads,
            )
            _weigh_chunk(
                floats,
                scores,
                chunk_tokens,
                maxima_at + group * LANES,
                sums_at + group * LANES,
                factors_at,
                heads,
            )
            partial = partial_at + group * num_heads * padded_value
            _add_chunk_values(
                floats,
                scores,
                factors_at,
                values,
                rows,
                here,
                value_width,
                0,
                whole_width,
                chunk_tokens,
                partial,
                ahead if group == 0 else here,
                heads,
            )
            if whole_width < value_width:
                if group == 0:
                    _copy_tails(
                        values, rows, here, chunk_tokens, value_width, whole_width, tails, tail_at
                    )
                _add_chunk_values(
                    floats,
                    scores,
                    factors_at,
                    tails,
                    rows,
                    rows_at + _NUMBERS,
                    KEY_COLUMNS,
                    tail_at,
                    columns,
                    chunk_tokens,
                    partial + num_heads * whole_width,
                    rows_at + _NUMBERS,
                    heads,
                )


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _ask_for_line(cache: Any, rows: Any, ahead: int, at: int, end: int, width: int) -> Any:
    """Prefetch a line of the row at rows[ahead]; return the place of the one behind it.

    In the order of addresses, which the processor's own prefetcher knows: in that of the loops,
    every second line or column by column, decode attention takes 9 to 19 % longer.
    """
    prefetch_far(cache, at)
    at += line_elements(cache)
    if at >= end:
        ahead += 1
        at = rows[ahead] * width
        end = at + width
    return ahead, at, end


@numba.njit(nogil=True, error_model="numpy")
def _widen_keys(
    cache: Any,
    rows: Any,
    rows_at: int,
    num_rows: int,
    width: int,
    floats: Any,
    keys_at: int,
    tails: Any,
    tail_at: int,
) -> None:
    """Copy keys to float32, KEY_COLUMNS of all tokens side by side, padded with zeros."""
    whole = width - width % (2 * LANES)
    ahead = rows_at + num_rows
    at = rows[ahead] * width
    end = at + width
    for t in range(num_rows):
        source = rows[rows_at + t] * width
        target = keys_at + t * KEY_COLUMNS
        # the first half of the next chunk's keys
        for _ in range(0, width, 2 * line_elements(cache)):
            ahead, at, end = _ask_for_line(cache, rows, ahead, at, end, width)
        for d in range(0, whole, 2 * LANES):
            to = target + d // KEY_COLUMNS * KEY_COLUMNS * CHUNK_TOKENS + d % KEY_COLUMNS
            widen_two(floats, to, cache, source + d)
        if whole < width:
            for d in range(0, 2 * LANES, LANES):
                lanes = load_first(cache, source + whole + d, width - whole - d)
                store(tails, tail_at + d, lanes)
            to = target + whole // KEY_COLUMNS * KEY_COLUMNS * CHUNK_TOKENS + whole % KEY_COLUMNS
            widen_two(floats, to, tails, tail_at)


@numba.njit(nogil=True, error_model="numpy")
def _copy_tails(
    cache: Any,
    rows: Any,
    rows_at: int,
    num_rows: int,
    width: int,
    first: int,
    tails: Any,
    tail_at: int,
) -> None:
    """Copy the columns from `first` on, padded with zeros to whole tiles."""
    for t in range(num_rows):
        source = rows[rows_at + t] * width
        for d in range(0, KEY_COLUMNS, LANES):
            lanes = load_first(cache, source + first + d, width - first - d)
            store(tails, tail_at + t * KEY_COLUMNS + d, lanes)


@numba.njit(nogil=True, error_model="numpy")
def _score_chunk(
    floats: Any,
    query_at: int,
    keys_at: int,
    num_tokens: int,
    padded_key: int,
    scores_at: int,
    next_keys: Any,
    rows: Any,
    next_rows_at: int,
    next_width: int,
    heads: Any,
) -> None:
    """Set scores[t, g] = query g . key t; rows past the end of a last tile are stale."""
    num_heads = len(heads)
    together = LANES // num_heads
    span = max(together, KEY_COLUMNS // TILE_TOKENS)
    ahead = next_rows_at + num_tokens // 2
    at = rows[ahead] * next_width
    end = at + next_width
    for t in range(0, num_tokens, TILE_TOKENS):
        tile = zero_tile()
        for column in range(0, padded_key, KEY_COLUMNS):
            key = keys_at + column * CHUNK_TOKENS + t * KEY_COLUMNS
            for d in range(0, min(KEY_COLUMNS, padded_key - column), span):
                # the second half of the next chunk's keys, evenly over the steps
                for _ in range(0, span * TILE_TOKENS, 2 * line_elements(next_keys)):
                    ahead, at, end = _ask_for_line(next_keys, rows, ahead, at, end, next_width)
                for e in range(d, d + span, together):
                    query = load(floats, query_at + (column + e) * num_heads)
                    tile = add_keys(tile, query, floats, key + e, KEY_COLUMNS, heads)
        store_scores(floats, scores_at + t * num_heads, tile, heads)


@numba.njit(nogil=True, error_model="numpy")
def _weigh_chunk(
    floats: Any,
    scores_at: int,
    num_tokens: int,
    maximum_at: int,
    sum_at: int,
    factors_at: int,
    heads: Any,
) -> None:
    """Turn scores into weights 2 ** (score - maximum); factors: what older maxima are worth."""
    end = scores_at + num_tokens * len(heads)
    padded_end = scores_at + _round_up(num_tokens, TILE_TOKENS) * len(heads)
    for i in range(end, padded_end):
        floats[i] = _MINUS_INFINITY
    before = load(floats, maximum_at)
    now = before
    for i in range(scores_at, padded_end, LANES):
        now = maximum(now, load(floats, i))
    now = largest_of_tokens(now, heads)
    factor = exp2(subtract(before, now))
    total = multiply(load(floats, sum_at), factor)
    for i in range(scores_at, padded_end, LANES):
        weights = exp2(subtract(load(floats, i), now))
        store(floats, i, weights)
        total = add(total, weights)
    store(floats, maximum_at, now)
    store(floats, sum_at, total)
    store(floats, factors_at, factor)


@numba.njit(nogil=True, error_model="numpy")
def _add_chunk_values(
    floats: Any,
    weights_at: int,
    factors_at: int,
    cache: Any,
    rows: Any,
    rows_at: int,
    row_width: int,
    cache_at: int,
    width: int,
    num_tokens: int,
    partial_at: int,
    next_rows_at: int,
    heads: Any,
) -> None:
    """Add weight[t, g] * value t to each head's outputs, tile by tile of heads and columns."""
    num_heads = len(heads)
    tile_heads = min(num_heads, TILE_TOKENS // 2)
    tile_width = tile_columns_of(num_heads) * LANES
    partial = partial_at
    ahead, at = next_rows_at, rows[next_rows_at] * row_width
    end = at + row_width
    for column in range(0, width, tile_width):
        for head in range(0, num_heads, tile_heads):
            tile = load_outputs(floats, partial, floats, factors_at + head, heads)
            for t in range(num_tokens):
                if head == 0:
                    for _ in range(0, tile_width, line_elements(cache)):
                        ahead, at, end = _ask_for_line(cache, rows, ahead, at, end, row_width)
                value = rows[rows_at + t] * row_width + cache_at + column
                weight = weights_at + t * num_heads + head
                tile = add_values(tile, floats, weight, cache, value, heads)
            store_outputs(floats, partial, tile, heads)
            partial += tile_heads * tile_width


@numba.njit(nogil=True, error_model="numpy")
def _merge_segments(
    floats: Any,
    partial_at: int,
    maxima_at: int,
    sums_at: int,
    spare_at: int,
    num_segments: int,
    groups: int,
    padded_value: int,
    group_size: int,
    value_width: int,
    sinks: Any,
    sinks_at: int,
    has_sinks: bool,
    out: Any,
    out_at: int,
    lse: Any,
    lse_at: int,
    is_split: bool,
    heads: Any,
) -> None:
    """Weigh the segments by their maxima, normalise, and write `out` and `lse` of one KV head."""
    num_heads = len(heads)
    tile_heads = min(num_heads, TILE_TOKENS // 2)
    tile_width = tile_columns_of(num_heads) * LANES
    partial_size = groups * num_heads * padded_value
    for group in range(groups):
        count = min(num_heads, group_size - group * num_heads)
        sink = splat(_MINUS_INFINITY)
        if has_sinks:
            for lane in range(LANES):
                head = min(lane % num_heads, count - 1)
                logit = sinks[sinks_at + group * num_heads + head]
                floats[spare_at + lane] = np.float32(logit * _LOG2_E)
            sink = load(floats, spare_at)
        largest = sink
        for s in range(num_segments):
            largest = maximum(load(floats, maxima_at + (s * groups + group) * LANES), largest)
        total = splat(_ZERO)
        for s in range(num_segments):
            i = (s * groups + group) * LANES
            factor = exp2(subtract(load(floats, maxima_at + i), largest))
            total = add(total, multiply(load(floats, sums_at + i), factor))
        total = add(sum_of_tokens(total, heads), exp2(subtract(sink, largest)))
        for s in range(num_segments):
            i = (s * groups + group) * LANES
            factor = exp2(subtract(load(floats, maxima_at + i), largest))
            store(floats, sums_at + i, divide(factor, total))
        for g in range(count):
            tile, row = g // tile_heads, g % tile_heads
            for e in range(0, _round_up(value_width, 2 * LANES), LANES):
                slab, vector = e // tile_width, e % tile_width
                at = partial_at + group * num_heads * padded_value + slab * tile_width * num_heads
                at += (tile * tile_heads + row) * tile_width + vector
                merged = splat(_ZERO)
                for s in range(num_segments):
                    share = splat(floats[sums_at + (s * groups + group) * LANES + g])
                    merged = add(merged, multiply(share, load(floats, at + s * partial_size)))
                store(floats, spare_at, merged)
                to = out_at + (group * num_heads + g) * value_width
                for lane in range(LANES):
                    column = _column_of(e + lane, is_split)
                    if column < value_width:
                        out[to + column] = floats[spare_at + lane]
        store(floats, maxima_at + group * LANES, largest)
        store(floats, sums_at + group * LANES, total)
        for g in range(count):
            base_2 = floats[maxima_at + group * LANES + g] + math.log2(
                floats[sums_at + group * LANES + g]
            )
            lse[lse_at + group * num_heads + g] = np.float32(base_2 * _LN_2)

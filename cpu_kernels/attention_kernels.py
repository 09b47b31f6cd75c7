"""The compiled loops of `attention.py`: nothing is allocated.

Arrays have no dimensions here (simd.py says what an `array` is); `x_at` is the index of x's start,
`heads` what attention_ops.py says.
"""

# S sequences, C KV heads, G heads of a group (a power of two), W = LANES / G

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from cpu_kernels import attention
from cpu_kernels.attention import (
    BAD_BLOCK,
    BAD_LENGTH,
    CHUNK_TOKENS,
    FINE,
    KEY_COLUMNS,
    MAX_SEGMENT_TOKENS,
    TILE_TOKENS,
    WORKER_ROWS,
    AttentionCall,
    PlanCall,
)
from cpu_kernels.attention_ops import (
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
from cpu_kernels.calls import DONE
from cpu_kernels.compiling import Source
from cpu_kernels.simd import (
    LANES,
    add,
    call_at,
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
from cpu_kernels.work_items import claim_item, finish_item

_CALL, _PLAN = np.dtype(AttentionCall), np.dtype(PlanCall)
_NUMBERS = MAX_SEGMENT_TOKENS + CHUNK_TOKENS  # where a worker's rows have the numbers from 0
_LOG2_E, _LN_2, _SQRT_2 = math.log2(math.e), math.log(2.0), math.sqrt(2.0)
_ZERO, _MINUS_INFINITY = np.float32(0.0), np.float32(-np.inf)

# how the kernel sees each cache format: uint16 is bfloat16's bits, int16 float16's
_ELEMENTS = {"float32": np.float32, "uint16": np.uint16, "float16": np.int16}

_compiled = numba.njit(nogil=True, error_model="numpy")
_round_up, _num_segments = _compiled(attention.round_up), _compiled(attention.num_segments)
_segment_tokens = _compiled(attention.segment_tokens)
tile_rows_of = _compiled(attention.tile_rows)
tile_columns_of = _compiled(attention.tile_columns)


def make_plan() -> Source:
    """The body of a `PlanCall`."""

    def plan(address: int, item: int, worker: int) -> None:
        found = call_at(address, _PLAN)
        call = call_at(found.attention, _CALL)
        _plan(
            found,
            call,
            pointer_at(call.context_lens, np.int32),
            pointer_at(call.block_tables, np.int32),
            pointer_at(call.integers, np.int64),
        )

    return Source(plan, num_arguments=3)


def make_attend(cache_dtype: str, num_heads: int) -> Source:
    """The body of an `AttentionCall` for a cache format and heads taken together."""
    element = _ELEMENTS[cache_dtype]
    heads = (0,) * num_heads

    def attend(address: int, item: int, worker: int) -> None:
        call = call_at(address, _CALL)
        _attend(
            address,
            call,
            item,
            worker,
            pointer_at(call.q, np.float32),
            pointer_at(call.key_cache, element),
            pointer_at(call.value_cache, element),
            pointer_at(call.block_tables, np.int32),
            pointer_at(call.context_lens, np.int32),
            pointer_at(call.sinks, np.float32),
            pointer_at(call.out, np.float32),
            pointer_at(call.lse, np.float32),
            pointer_at(call.floats, np.float32),
            pointer_at(call.integers, np.int64),
            pointer_at(call.tails, element),
            heads,
        )

    return Source(attend, num_arguments=3)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _plan(plan: Any, call: Any, context_lens: Any, block_tables: Any, integers: Any) -> None:
    """Check what will be read, clear the counts of finished segments, and set `num_items`."""
    plan.state, plan.num_tokens, call.num_items = FINE, 0, 0
    if call.num_seqs == 0:
        return
    shortest = longest = int(context_lens[0])
    segments, num_tokens = 0, 0
    for seq in range(call.num_seqs):
        length = int(context_lens[seq])
        shortest, longest = min(shortest, length), max(longest, length)
        segments += _num_segments(length, call.window)
        num_tokens += min(length, call.window)
    if shortest < 1 or longest > call.max_blocks * call.block_size:
        plan.shortest, plan.longest = shortest, longest
        plan.state = BAD_LENGTH
        return
    for seq in range(call.num_seqs):
        length = int(context_lens[seq])
        first = seq * call.max_blocks + max(0, length - call.window) // call.block_size
        last = seq * call.max_blocks + (length - 1) // call.block_size
        lowest = highest = int(block_tables[first])
        for place in range(first, last + 1):
            lowest = min(lowest, int(block_tables[place]))
            highest = max(highest, int(block_tables[place]))
        if lowest < 0 or highest >= plan.num_blocks:
            plan.bad_seq, plan.bad_block = seq, lowest if lowest < 0 else highest
            plan.state = BAD_BLOCK
            return
    for i in range(call.rows_at):
        integers[i] = 0
    plan.num_tokens = num_tokens
    if call.group_size > 0:
        call.num_items = segments * call.num_kv_heads


# inline="always" on the outer functions only: LLVM builds every function once for itself and again
# inside each caller; an earlier form of this kernel compiled in 3.2 s of CPU like this, in 4.3 with
# all inlined and in 4.9 with none.
@numba.njit(nogil=True, error_model="numpy", inline="always")
def _attend(
    address: int,
    call: Any,
    first_item: int,
    worker: int,
    q: Any,
    keys: Any,
    values: Any,
    block_tables: Any,
    context_lens: Any,
    sinks: Any,
    out: Any,
    lse: Any,
    floats: Any,
    integers: Any,
    tails: Any,
    heads: Any,
) -> None:
    """Do an item (sequence, KV head, segment), then claim others until none is left."""
    num_heads = len(heads)
    groups = call.padded_group // num_heads
    query_at = call.workers_at + worker * call.worker_size
    scores_at = query_at + call.padded_group * call.padded_key
    factors_at = scores_at + call.padded_group * CHUNK_TOKENS
    keys_at = factors_at + _round_up(call.padded_group, LANES)
    rows_at = call.rows_at + worker * WORKER_ROWS
    tail_at = worker * CHUNK_TOKENS * KEY_COLUMNS
    partial_size = call.padded_group * call.padded_value
    for t in range(CHUNK_TOKENS):
        integers[rows_at + _NUMBERS + t] = t

    item = first_item
    seq, seq_item, queries_of = 0, 0, -1
    while item < call.num_items:
        seq, seq_item = _sequence_of(call, context_lens, item, seq, seq_item)
        length = int(context_lens[seq])
        num_segments = _num_segments(length, call.window)
        kv_head, segment = (item - seq_item) // num_segments, (item - seq_item) % num_segments
        pair = seq * call.num_kv_heads + kv_head
        size = _segment_tokens(min(length, call.window), num_segments)
        first = max(0, length - call.window) + segment * size
        num_tokens = min(size, length - first)
        _find_rows(call, block_tables, seq, kv_head, first, num_tokens, integers, rows_at)
        # the start of the next item is asked for while this one ends
        next_item = claim_item(address)
        if next_item < call.num_items:
            _find_next_rows(
                call,
                block_tables,
                context_lens,
                next_item,
                seq,
                seq_item,
                integers,
                rows_at + num_tokens,
            )
        else:
            for t in range(num_tokens, num_tokens + CHUNK_TOKENS):
                integers[rows_at + t] = integers[rows_at]
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
            integers,
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
        if fetch_add(integers, pair, 1) == num_segments - 1:
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
        if item != first_item:  # whoever called finishes that one
            finish_item(address, DONE)
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
    size = _segment_tokens(min(length, call.window), num_segments)
    first = max(0, length - call.window) + segment * size
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
    """Set scores[t, g] = query g . key t; rows past the end of a last tile are stale.

    With a `next_width` of 0 nothing is asked for ahead.
    """
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
                if next_width > 0:
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
    tile_heads = tile_rows_of(num_heads)
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
    tile_heads = tile_rows_of(num_heads)
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
            base_2 = floats[maxima_at + group * LANES + g] + _log2(
                floats[sums_at + group * LANES + g]
            )
            lse[lse_at + group * num_heads + g] = np.float32(base_2 * _LN_2)


@numba.njit(nogil=True, error_model="numpy")
def _log2(x: float) -> float:
    """Return the logarithm of a float32 of about 1 or more, within 1e-11, without libm."""
    rest, exponent = np.float64(x), 0
    while rest > _SQRT_2 and exponent < 128:  # an infinite one ends too
        rest *= 0.5
        exponent += 1
    # log(rest) = 2 artanh(s); |s| < 0.172, so that s**15 / 15 is 2e-13
    s = (rest - 1.0) / (rest + 1.0)
    square = s * s
    series = 0.0
    for power in (13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = series * square + 1.0 / power
    return exponent + 2.0 * _LOG2_E * s * series

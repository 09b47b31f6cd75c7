"""The compiled loops of `attention.py`: they check nothing and allocate nothing.

Arrays have no dimensions here (simd.py says what an `array` is); `x_at` is the index of x's start.
"""

from __future__ import annotations

import ctypes
import math
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

from cpu_kernels import simd
from cpu_kernels.simd import (
    LANES,
    TILE,
    add,
    add_outer,
    exp2,
    fetch_add,
    lane_max,
    lane_sum,
    line_elements,
    load,
    load_first,
    load_tile,
    maximum,
    multiply,
    pointer_at,
    prefetch,
    splat,
    store,
    store_first,
    store_lane_sums,
    store_tile,
    subtract,
    zero_tile,
)

SEGMENT_TOKENS = 512
# 32 tokens of 128 float32 = 16 KB, which the first-level cache holds; 64 tokens are 10 % slower
CHUNK_TOKENS = 32
VALUE_PADDING = TILE * LANES
WORKER_ROWS = SEGMENT_TOKENS + CHUNK_TOKENS
_NEXT_ITEM, _NEXT_WORKER, PENDING = 0, 1, 2  # places in `counters`
_LN_2 = math.log(2.0)

# how the kernel sees each cache format: uint16 is bfloat16's bits, int16 float16's
CACHE_FORMATS = {"float32": np.float32, "uint16": np.uint16, "float16": np.int16}


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
                "out",
                "lse",
                "floats",
                "counters",
                "num_seqs",
                "num_kv_heads",
                "group_size",
                "key_width",
                "value_width",
                "block_size",
                "max_blocks",
                "window",
                "padded_group",
                "padded_key",
                "padded_value",
                "maxima_at",
                "sums_at",
                "workers_at",
                "worker_size",
                "rows_at",
            ]
        ),
        ("scale", ctypes.c_double),
    )


# functools.cache lets two threads both compile and then drops one result, whose code is in use
_COMPILING = threading.Lock()


def attend_address(cache_dtype: np.dtype[Any]) -> int:
    """Return the address of `void attend(AttentionCall *)` for a cache format."""
    with _COMPILING:
        return int(_compiled_attend(cache_dtype).address)


@cache
def _compiled_attend(cache_dtype: np.dtype[Any]) -> Any:
    element = CACHE_FORMATS[cache_dtype.name]
    # numba's disk cache sees changes of this file only; what a closure holds is part of its key
    simd_changed_ns = Path(simd.__file__).stat().st_mtime_ns
    call_type = numba.from_dtype(np.dtype(AttentionCall))
    pointer = types.CPointer(call_type)  # type: ignore[no-untyped-call]

    @numba.cfunc(types.void(pointer), cache=True, nogil=True, error_model="numpy")
    def body(call_pointer: Any) -> None:
        _ = simd_changed_ns
        call = numba.carray(call_pointer, 1)[0]  # type: ignore[attr-defined]
        _attend(
            call,
            pointer_at(call.q, np.float32),
            pointer_at(call.key_cache, element),
            pointer_at(call.value_cache, element),
            pointer_at(call.block_tables, np.int32),
            pointer_at(call.context_lens, np.int32),
            pointer_at(call.out, np.float32),
            pointer_at(call.lse, np.float32),
            pointer_at(call.floats, np.float32),
            pointer_at(call.counters, np.int64),
        )

    return body


# inline="always" on the outer functions only: LLVM builds every function once for itself and again
# inside each caller. Seconds of CPU to compile, first and next format: 4.9 and 4.7 without, 4.3 and
# 4.0 with all inlined (numba's own passes then take longer), 3.2 and 1.8 like this.
@numba.njit(nogil=True, error_model="numpy", inline="always")
def _attend(
    call: Any,
    q: Any,
    keys: Any,
    values: Any,
    block_tables: Any,
    context_lens: Any,
    out: Any,
    lse: Any,
    floats: Any,
    counters: Any,
) -> None:
    """Take items (sequence, KV head, segment) until none is left."""
    group, padded_group = call.group_size, call.padded_group
    worker = fetch_add(counters, _NEXT_WORKER, 1)
    query_at = call.workers_at + worker * call.worker_size
    scores_at = query_at + padded_group * call.padded_key
    tokens_at = scores_at + padded_group * CHUNK_TOKENS
    rows_at = call.rows_at + worker * WORKER_ROWS
    partial_size = padded_group * call.padded_value

    item = fetch_add(counters, _NEXT_ITEM, 1)
    first_item = 0
    for seq in range(call.num_seqs):
        length = context_lens[seq]
        start = max(0, length - call.window)
        num_segments = (length - start + SEGMENT_TOKENS - 1) // SEGMENT_TOKENS
        next_seq_item = first_item + num_segments * call.num_kv_heads
        while item < next_seq_item:
            kv_head = (item - first_item) // num_segments
            segment = (item - first_item) % num_segments
            head = (seq * call.num_kv_heads + kv_head) * group
            _load_queries(
                q,
                head * call.key_width,
                group,
                call.key_width,
                call.scale,
                floats,
                query_at,
                padded_group,
                call.padded_key,
            )
            first = start + segment * SEGMENT_TOKENS
            _attend_segment(
                keys,
                values,
                block_tables,
                seq * call.max_blocks,
                kv_head,
                call.num_kv_heads,
                call.block_size,
                first,
                min(first + SEGMENT_TOKENS, length),
                call.key_width,
                call.value_width,
                padded_group,
                call.padded_key,
                call.padded_value,
                floats,
                query_at,
                scores_at,
                tokens_at,
                item * partial_size,
                call.maxima_at + item * padded_group,
                call.sums_at + item * padded_group,
                counters,
                rows_at,
            )
            pair = seq * call.num_kv_heads + kv_head
            if fetch_add(counters, PENDING + pair, 1) == num_segments - 1:
                first_of_pair = item - segment
                _merge_segments(
                    floats,
                    first_of_pair * partial_size,
                    call.maxima_at + first_of_pair * padded_group,
                    call.sums_at + first_of_pair * padded_group,
                    num_segments,
                    padded_group,
                    call.padded_value,
                    group,
                    call.value_width,
                    out,
                    head * call.value_width,
                    lse,
                    head,
                )
            item = fetch_add(counters, _NEXT_ITEM, 1)
        first_item = next_seq_item


@numba.njit(nogil=True, error_model="numpy")
def _load_queries(
    q: Any,
    q_at: int,
    group: int,
    width: int,
    scale: float,
    floats: Any,
    query_at: int,
    padded_group: int,
    padded_width: int,
) -> None:
    """Copy a group's queries, scaled, with zeros in the padding."""
    factor = splat(np.float32(scale))
    for g in range(padded_group):
        for d in range(0, padded_width, LANES):
            count = width - d if g < group else 0
            lanes = load_first(q, q_at + g * width + d, count)
            store(floats, query_at + g * padded_width + d, multiply(lanes, factor))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _attend_segment(
    keys: Any,
    values: Any,
    block_tables: Any,
    table_at: int,
    kv_head: int,
    num_kv_heads: int,
    block_size: int,
    first: int,
    last: int,
    key_width: int,
    value_width: int,
    padded_group: int,
    padded_key: int,
    padded_value: int,
    floats: Any,
    query_at: int,
    scores_at: int,
    tokens_at: int,
    partial_at: int,
    maxima_at: int,
    sums_at: int,
    rows: Any,
    rows_at: int,
) -> None:
    """Attend to tokens first..last-1: unnormalised sums of values, maxima, sums of weights."""
    for i in range(0, padded_group * padded_value, LANES):
        store(floats, partial_at + i, splat(np.float32(0.0)))
    for g in range(padded_group):
        floats[maxima_at + g] = np.float32(-np.inf)
        floats[sums_at + g] = np.float32(0.0)
    num_tokens = last - first
    # block by block: a division for every token takes a sixth of the whole time
    place = first // block_size
    slot = first % block_size
    filled = 0
    while filled < num_tokens:
        block_row = (block_tables[table_at + place] * num_kv_heads + kv_head) * block_size + slot
        count = min(block_size - slot, num_tokens - filled)
        for i in range(count):
            rows[rows_at + filled + i] = block_row + i
        filled += count
        place += 1
        slot = 0
    # the last row again, for prefetches past the end
    for t in range(num_tokens, num_tokens + CHUNK_TOKENS):
        rows[rows_at + t] = rows[rows_at + num_tokens - 1]
    for chunk in range(0, num_tokens, CHUNK_TOKENS):
        chunk_tokens = min(CHUNK_TOKENS, num_tokens - chunk)
        here = rows_at + chunk
        _widen_rows(keys, rows, here, chunk_tokens, key_width, floats, tokens_at, padded_key)
        _score_chunk(
            floats,
            query_at,
            padded_group,
            tokens_at,
            chunk_tokens,
            padded_key,
            scores_at,
            values,
            rows,
            here,
            value_width,
        )
        _weigh_chunk(
            floats,
            scores_at,
            chunk_tokens,
            padded_group,
            maxima_at,
            sums_at,
            partial_at,
            padded_value,
        )
        _widen_rows(values, rows, here, chunk_tokens, value_width, floats, tokens_at, padded_value)
        _add_chunk_values(
            floats,
            scores_at,
            padded_group,
            tokens_at,
            chunk_tokens,
            padded_value,
            partial_at,
            keys,
            rows,
            here + CHUNK_TOKENS,
            key_width,
        )


@numba.njit(nogil=True, error_model="numpy")
def _widen_rows(
    cache: Any,
    rows: Any,
    rows_at: int,
    num_rows: int,
    width: int,
    floats: Any,
    tokens_at: int,
    padded_width: int,
) -> None:
    """Copy cache rows to float32 rows, padded with zeros."""
    whole = width - width % LANES
    for t in range(num_rows):
        source = rows[rows_at + t] * width
        target = tokens_at + t * padded_width
        for d in range(0, whole, LANES):
            store(floats, target + d, load(cache, source + d))
        for d in range(whole, padded_width, LANES):
            store(floats, target + d, load_first(cache, source + d, width - d))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _prefetch_row(cache: Any, row: int, width: int) -> None:
    for d in range(0, width, line_elements(cache)):
        prefetch(cache, row * width + d)


@numba.njit(nogil=True, error_model="numpy")
def _score_chunk(
    floats: Any,
    query_at: int,
    padded_group: int,
    tokens_at: int,
    num_tokens: int,
    padded_key: int,
    scores_at: int,
    next_cache: Any,
    rows: Any,
    next_rows_at: int,
    next_width: int,
) -> None:
    """Set scores[g, t] = query g . key t, four by four; the last tile may score stale rows."""
    for t in range(0, num_tokens, TILE):
        for i in range(t, t + TILE):
            _prefetch_row(next_cache, rows[next_rows_at + i], next_width)
        k0 = tokens_at + t * padded_key
        k1 = k0 + padded_key
        k2 = k1 + padded_key
        k3 = k2 + padded_key
        for g in range(0, padded_group, TILE):
            q0 = query_at + g * padded_key
            q1 = q0 + padded_key
            q2 = q1 + padded_key
            q3 = q2 + padded_key
            tile = zero_tile()
            for d in range(0, padded_key, LANES):
                tile = add_outer(
                    tile,
                    load(floats, q0 + d),
                    load(floats, q1 + d),
                    load(floats, q2 + d),
                    load(floats, q3 + d),
                    load(floats, k0 + d),
                    load(floats, k1 + d),
                    load(floats, k2 + d),
                    load(floats, k3 + d),
                )
            store_lane_sums(floats, scores_at + g * CHUNK_TOKENS + t, CHUNK_TOKENS, tile)


@numba.njit(nogil=True, error_model="numpy")
def _weigh_chunk(
    floats: Any,
    scores_at: int,
    num_tokens: int,
    padded_group: int,
    maxima_at: int,
    sums_at: int,
    partial_at: int,
    padded_value: int,
) -> None:
    """Turn scores into weights 2 ** (score - maximum); rescale what older maxima weighed."""
    for g in range(padded_group):
        row = scores_at + g * CHUNK_TOKENS
        for t in range(num_tokens, -(-num_tokens // LANES) * LANES):
            floats[row + t] = np.float32(-np.inf)
        largest = load(floats, row)
        for t in range(LANES, num_tokens, LANES):
            largest = maximum(largest, load(floats, row + t))
        before = floats[maxima_at + g]
        now = max(before, lane_max(largest))
        shift = splat(now)
        total = splat(np.float32(0.0))
        for t in range(0, num_tokens, LANES):
            weights = exp2(subtract(load(floats, row + t), shift))
            store(floats, row + t, weights)
            total = add(total, weights)
        rescale = exp2(subtract(splat(before), shift))
        floats[maxima_at + g] = now
        floats[sums_at + g] = floats[sums_at + g] * lane_max(rescale) + lane_sum(total)
        partial = partial_at + g * padded_value
        for e in range(partial, partial + padded_value, LANES):
            store(floats, e, multiply(load(floats, e), rescale))


@numba.njit(nogil=True, error_model="numpy")
def _add_chunk_values(
    floats: Any,
    weights_at: int,
    padded_group: int,
    tokens_at: int,
    num_tokens: int,
    padded_value: int,
    partial_at: int,
    next_cache: Any,
    rows: Any,
    next_rows_at: int,
    next_width: int,
) -> None:
    """Add weight[g, t] * value t to partial[g], four heads by four vectors of columns at a time."""
    for g in range(0, padded_group, TILE):
        w0 = weights_at + g * CHUNK_TOKENS
        w1 = w0 + CHUNK_TOKENS
        w2 = w1 + CHUNK_TOKENS
        w3 = w2 + CHUNK_TOKENS
        for e in range(0, padded_value, VALUE_PADDING):
            at = partial_at + g * padded_value + e
            tile = load_tile(floats, at, padded_value)
            for t in range(num_tokens):
                if g == 0 and e == 0:
                    _prefetch_row(next_cache, rows[next_rows_at + t], next_width)
                v = tokens_at + t * padded_value + e
                tile = add_outer(
                    tile,
                    splat(floats[w0 + t]),
                    splat(floats[w1 + t]),
                    splat(floats[w2 + t]),
                    splat(floats[w3 + t]),
                    load(floats, v),
                    load(floats, v + LANES),
                    load(floats, v + 2 * LANES),
                    load(floats, v + 3 * LANES),
                )
            store_tile(floats, at, padded_value, tile)


@numba.njit(nogil=True, error_model="numpy")
def _merge_segments(
    floats: Any,
    partial_at: int,
    maxima_at: int,
    sums_at: int,
    num_segments: int,
    padded_group: int,
    padded_value: int,
    group: int,
    value_width: int,
    out: Any,
    out_at: int,
    lse: Any,
    lse_at: int,
) -> None:
    """Weigh the segments by their maxima, normalise, and write `out` and `lse` of one group."""
    for g in range(group):
        largest = floats[maxima_at + g]
        for s in range(1, num_segments):
            largest = max(largest, floats[maxima_at + s * padded_group + g])
        total = np.float32(0.0)
        for s in range(num_segments):
            i = s * padded_group + g
            total += floats[sums_at + i] * np.float32(math.exp2(floats[maxima_at + i] - largest))
        for s in range(num_segments):
            i = s * padded_group + g
            share = np.float32(math.exp2(floats[maxima_at + i] - largest)) / total
            floats[sums_at + i] = share
        for e in range(0, value_width, LANES):
            merged = splat(np.float32(0.0))
            for s in range(num_segments):
                i = s * padded_group + g
                weight = splat(floats[sums_at + i])
                merged = add(
                    merged, multiply(weight, load(floats, partial_at + i * padded_value + e))
                )
            store_first(out, out_at + g * value_width + e, value_width - e, merged)
        lse[lse_at + g] = np.float32((largest + math.log2(total)) * _LN_2)

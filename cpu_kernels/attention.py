"""Attention of one new token a sequence over a paged KV cache, on the CPU.

A sequence's cached tokens are cut into segments of `SEGMENT_TOKENS`; a work item is (sequence, KV
head, segment), taken by whichever thread is free. It widens a chunk of keys to float32 in the
first-level cache, scores all query heads of that KV head, and does the same with the values: the
inner loops know one format and no blocks, and memory is read once. Whoever finishes the last
segment of a (sequence, KV head) merges them in order. Segments depend neither on the number of
threads nor on the other sequences, so neither do the results, to the last bit.
"""

# S sequences, H query heads, C KV heads, G = H / C, D key width, E value width, B blocks, P block
# size; the scratch pads G to whole tiles, D to whole vectors and E to whole rows of a tile.

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.attention_kernels import (
    CACHE_FORMATS,
    CHUNK_TOKENS,
    PENDING,
    SEGMENT_TOKENS,
    VALUE_PADDING,
    WORKER_ROWS,
    AttentionCall,
    attend_address,
)
from cpu_kernels.simd import CACHE_LINE_BYTES, LANES, TILE
from cpu_kernels.threads import fork_join

_LOG2_E = math.log2(math.e)
_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)


def decode_attention(
    q: NDArray[np.float32],
    key_cache: NDArray[Any],
    value_cache: NDArray[Any],
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    *,
    scale: float,
    window: int | None,
    num_threads: int,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None:
    """Attend from the newest token of every sequence to its cached tokens.

    out[s, h] = softmax(scale * q[s, h] @ keys.T) @ values, accumulated in float32, over the last
    `window` tokens. The same numbers come out for any `num_threads`. May be called from several
    threads at once. The first call of a cache format compiles (2 to 3 s, then kept on disk).

    Parameters
    ----------
    q
        (S, H, D) queries.
    key_cache
        (B, C, P, D) float32, float16, or uint16 (the bits of bfloat16); C divides H.
    value_cache
        (B, C, P, E), of the keys' format.
    block_tables
        (S, max_blocks) numbers of the blocks of each sequence, all < B; entries past its end are
        not read.
    context_lens
        (S,) tokens of each sequence in the cache, the new one included, at least 1.
    scale
        Factor of the scores, usually D ** -0.5.
    window
        Tokens that the new one sees, itself included (Hugging Face's sliding window); None: all.
    num_threads
        Threads to use at most.
    out
        (S, H, E), written entirely.
    lse
        (S, H) natural logarithm of the sum of the exponentials of the scores, for
        `merge_attention`.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together.

    Examples
    --------
    >>> cache = np.ones((1, 1, 16, 8), np.float32)
    >>> out, lse = np.empty((1, 2, 8), np.float32), np.empty((1, 2), np.float32)
    >>> decode_attention(
    ...     np.zeros((1, 2, 8), np.float32), cache, cache, np.zeros((1, 1), np.int32),
    ...     np.array([3], np.int32), scale=1.0, window=None, num_threads=1, out=out, lse=lse,
    ... )
    >>> bool(np.allclose(out, 1.0)), bool(np.allclose(lse, np.log(3)))
    (True, True)

    Notes
    -----
    Segments and their merge are Flash-Decoding (Dao et al. 2023); the running maximum within one is
    Online Softmax (Milakov and Gimelshein 2018), Algorithm 3.
    """
    _check(q, key_cache, value_cache, block_tables, context_lens, out, lse)
    longest = block_tables.shape[1] * key_cache.shape[2]
    seen = longest if window is None else window
    if seen < 1 or num_threads < 1:
        raise ValueError(f"window is {window} and num_threads {num_threads}; both start at 1")
    lengths = context_lens.tolist()
    if lengths and not 1 <= min(lengths) <= max(lengths) <= longest:
        raise ValueError(
            f"context lengths are {min(lengths)} to {max(lengths)} but must be 1 to {longest}: "
            f"{block_tables.shape[1]} blocks of {key_cache.shape[2]} tokens"
        )
    num_segments = sum(-(-min(length, seen) // SEGMENT_TOKENS) for length in lengths)
    if num_segments == 0:
        return
    _, num_kv_heads, block_size, key_width = key_cache.shape
    num_seqs, num_heads, value_width = out.shape
    group_size = num_heads // num_kv_heads
    padded_group = _round_up(group_size, TILE)
    padded_key = _round_up(key_width, LANES)
    padded_value = _round_up(value_width, VALUE_PADDING)
    num_items = num_segments * num_kv_heads
    num_workers = min(num_threads, num_items)
    # scratch, float32: partial outputs, their maxima, their sums, then each worker's queries and
    # scores; int64: the counters, then each worker's rows of the cache
    maxima_at = num_items * padded_group * padded_value
    sums_at = maxima_at + num_items * padded_group
    workers_at = _round_up(sums_at + num_items * padded_group, LANES)
    worker_size = padded_group * (padded_key + CHUNK_TOKENS)
    worker_size += CHUNK_TOKENS * max(padded_key, padded_value)
    rows_at = PENDING + num_seqs * num_kv_heads
    floats = _empty_aligned(workers_at + num_workers * worker_size)
    counters = np.zeros(rows_at + num_workers * WORKER_ROWS, np.int64)
    arrays = (q, key_cache, value_cache, block_tables, context_lens, out, lse, floats, counters)
    sizes = (num_seqs, num_kv_heads, group_size, key_width, value_width, block_size)
    padded = (padded_group, padded_key, padded_value)
    parts = (maxima_at, sums_at, workers_at, worker_size, rows_at)
    max_blocks = block_tables.shape[1]
    addresses = map(_address, arrays)
    call = AttentionCall(*addresses, *sizes, max_blocks, seen, *padded, *parts, scale * _LOG2_E)
    fork_join(attend_address(key_cache.dtype), ctypes.addressof(call), num_workers)


def merge_attention(
    out_a: NDArray[np.float32],
    lse_a: NDArray[np.float32],
    out_b: NDArray[np.float32],
    lse_b: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Combine the attention of the same queries to two disjoint sets of tokens.

    Parameters
    ----------
    out_a, out_b
        (..., E) attention to each set.
    lse_a, lse_b
        (...) log-sum-exp of each set's scores; -inf for an empty set, whose `out` is ignored.

    Returns
    -------
    out, lse
        (..., E) and (...): the attention to both sets; zeros and -inf where both are empty.

    Examples
    --------
    >>> one, two = np.array([[1.0]], np.float32), np.array([[2.0]], np.float32)
    >>> merge_attention(one, np.zeros(1, np.float32), two, np.zeros(1, np.float32))[0]
    array([[1.5]], dtype=float32)
    """
    largest = np.maximum(lse_a, lse_b)
    finite = np.where(np.isneginf(largest), np.float32(0), largest)
    weight_a, weight_b = np.exp(lse_a - finite), np.exp(lse_b - finite)
    total = weight_a + weight_b
    is_empty = total == 0
    safe_total = np.where(is_empty, np.float32(1), total)
    # where, not a product: an ignored `out` may hold anything, and 0 * NaN is NaN
    out = np.zeros_like(out_a)
    for weight, part in ((weight_a, out_a), (weight_b, out_b)):
        share = (weight / safe_total)[..., None]
        out += np.where(share > 0, share * part, np.float32(0))
    with np.errstate(divide="ignore"):
        return out, finite + np.log(total)


def _check(
    q: NDArray[np.float32],
    key_cache: NDArray[Any],
    value_cache: NDArray[Any],
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None:
    if key_cache.dtype.name not in CACHE_FORMATS or key_cache.dtype != value_cache.dtype:
        raise ValueError(
            f"keys are {key_cache.dtype} and values {value_cache.dtype}; both must be one of "
            f"float32, float16 or uint16 (the bits of bfloat16)"
        )
    num_seqs, num_heads, key_width = q.shape
    num_blocks, num_kv_heads, block_size, value_width = value_cache.shape
    keys_shape = (num_blocks, num_kv_heads, block_size, key_width)
    out_shape = (num_seqs, num_heads, value_width)
    tables_shape = (num_seqs, block_tables.shape[-1])
    expected = (
        ("q", q, _FLOAT32, q.shape),
        ("key_cache", key_cache, key_cache.dtype, keys_shape),
        ("value_cache", value_cache, key_cache.dtype, value_cache.shape),
        ("block_tables", block_tables, _INT32, tables_shape),
        ("context_lens", context_lens, _INT32, (num_seqs,)),
        ("out", out, _FLOAT32, out_shape),
        ("lse", lse, _FLOAT32, (num_seqs, num_heads)),
    )
    for name, array, dtype, shape in expected:
        if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape} but must be contiguous {dtype} {shape}"
            )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide by {num_kv_heads} KV heads")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _address(array: NDArray[Any]) -> int:
    # array.ctypes.data takes 1.5 us, five times this, and there are ten arrays in a call
    if array.flags.writeable:
        return ctypes.addressof(_START.from_buffer(array))  # type: ignore[arg-type]
    return int(array.ctypes.data)


_START = ctypes.c_char * 0


def _empty_aligned(size: int) -> NDArray[np.float32]:
    # numpy aligns to 16 bytes; a vector across two cache lines costs two loads: +50 % in the loops
    spare = CACHE_LINE_BYTES // 4
    floats = np.empty(size + spare, np.float32)
    return floats[-_address(floats) // 4 % spare :]

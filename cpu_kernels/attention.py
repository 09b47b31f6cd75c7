"""Attention of one new token a sequence over a paged KV cache, on the CPU.

A sequence's cached tokens are cut into segments of `SEGMENT_TOKENS`; a work item is (sequence, KV
head, segment), taken by whichever thread is free. Chunk by chunk it scores all query heads of that
KV head and adds up the values, while the next chunk is on its way into the second-level cache:
memory is read once. Whoever finishes the last segment of a (sequence, KV head) merges them in
order. Segments depend neither on the number of threads nor on the other sequences, so neither do
the results, to the last bit.

How many items there are depends on the contexts, which grow between runs of the same links: a
first link reads them and checks what the second one will read.
"""

# S sequences, H query heads, C KV heads, D key width, E value width, B blocks, P block size

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.calls import CACHE_LINE_BYTES, Link, call_fields, run_link
from cpu_kernels.compiling import code_address
from cpu_kernels.isa import isa
from cpu_kernels.scratch import Scratch

SEGMENT_TOKENS = 512
# 32 keys of 128 float32 = 16 KB, which the first-level cache holds
CHUNK_TOKENS = 32
# Tokens of a tile of scores, and vectors of a tile of outputs.
TILE_TOKENS = 16
# Columns of keys that lie side by side in float32: the rows of a tile are a constant apart.
KEY_COLUMNS = 64
# Rows of the cache of a worker's item, the first ones of its next, and the numbers from 0; behind
# them what prefetches may take for a row.
MAX_SEGMENT_TOKENS = SEGMENT_TOKENS * 3 // 2
WORKER_ROWS = MAX_SEGMENT_TOKENS + 3 * CHUNK_TOKENS
FINE, BAD_LENGTH, BAD_BLOCK = 0, 1, 2  # what `PlanCall.state` may be

_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
# float32, float16, and bfloat16's bits
_CACHE_DTYPES = (_FLOAT32, np.dtype(np.uint16), np.dtype(np.float16))
# as many tokens as a context length can say
_NO_WINDOW = 2**31 - 1
# Starting a thread takes 3 us, in which another attends to 30 KB
_THREAD_BYTES = 1 << 17
_LOG2_E = math.log2(math.e)


class AttentionCall(ctypes.Structure):
    """The second link as its threads see it: addresses, sizes, where each part of scratch begins.

    Places that end in `_at` count float32 from `floats` or int64 from `integers`.
    """

    _fields_ = (
        *call_fields(
            "q",
            "key_cache",
            "value_cache",
            "block_tables",
            "context_lens",
            "sinks",
            "out",
            "lse",
            "floats",
            "integers",
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
        ),
        ("scale", ctypes.c_double),
    )


class PlanCall(ctypes.Structure):
    """The first link: the address of the second one's call, and what was found.

    `state` is FINE, or BAD_LENGTH or BAD_BLOCK: the second link then does nothing, and
    `check_attention` says why. `num_tokens` are attended to by every KV head.
    """

    _fields_ = call_fields(
        "attention",
        "num_blocks",
        "state",
        "num_tokens",
        "shortest",
        "longest",
        "bad_seq",
        "bad_block",
    )


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
    sinks: NDArray[np.float32] | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Attend from the newest token of every sequence to its cached tokens.

    out[s, h] = softmax(scale * q[s, h] @ keys.T) @ values, accumulated in float32, over the last
    `window` tokens. The same numbers come out for any `num_threads`. May be called from several
    threads at once. The first call of a cache format and a number of query heads a KV head
    compiles (3 to 7 s on a busy core, then kept on disk).

    Parameters
    ----------
    q
        (S, H, D) queries.
    key_cache
        (B, C, P, D) float32, float16, or uint16 (the bits of bfloat16); C divides H.
    value_cache
        (B, C, P, E), of the keys' format.
    block_tables
        (S, max_blocks) numbers of the blocks of each sequence, all < B; entries past its end, or
        before its window, are not read.
    context_lens
        (S,) tokens of each sequence in the cache, the new one included, at least 1.
    scale
        Factor of the scores, usually D ** -0.5.
    window
        Tokens that the new one sees, itself included (Hugging Face's sliding window); None: all.
    num_threads
        Threads to use at most; fewer where the cache is too small to pay for their start.
    out
        (S, H, E), written entirely.
    lse
        (S, H) natural logarithm of the sum of the exponentials of the scores, and of the sink, for
        `merge_attention`.
    sinks
        (H,) a logit of each head, not scaled, that takes part in the softmax and has no value: the
        weights of the tokens then add up to less than 1 (gpt-oss). None: without. A window does not
        hide it. Where parts are merged, one of them has it.
    scratch
        Memory of the caller for its calls, one at a time; None: fresh memory.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together, a context length is out of range,
        or a block number that would be read is none of the cache's.

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
    Online Softmax (Milakov and Gimelshein 2018), Algorithm 3. Sinks are those of gpt-oss (OpenAI
    2025), after Xiao et al. 2023.
    """
    links = decode_attention_links(
        q,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        scale=scale,
        window=window,
        num_threads=num_threads,
        out=out,
        lse=lse,
        sinks=sinks,
        scratch=scratch,
    )
    plan, attend = links
    run_link(plan, num_threads=1)
    check_attention(links)
    row_bytes = 2 * (q.shape[2] + value_cache.shape[3])
    num_bytes = plan.call.num_tokens * value_cache.shape[1] * row_bytes
    useful_threads = min(num_threads, attend.call.num_items, num_bytes // _THREAD_BYTES)
    run_link(attend, num_threads=max(1, useful_threads))


def decode_attention_links(
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
    sinks: NDArray[np.float32] | None = None,
    scratch: Scratch | None = None,
) -> tuple[Link, Link]:
    """Return what `decode_attention` would run, for a chain of up to `num_threads` threads.

    The first link reads `context_lens` and `block_tables`, anew at each run, and sets how many
    items the second one has; both belong in one chain, with nothing between them that uses the same
    scratch. Scratch is sized for the longest contexts that `block_tables` and `window` allow, so
    the same links serve every step of a batch while the contents of the two arrays change.

    A context length that is out of range, or a number of no block among those that would be read,
    makes the second link do nothing: test `call.state` of the first one, or call
    `check_attention`, after the chain has run.

    `call.q`, `call.key_cache`, `call.value_cache`, `call.out` and `call.lse` of the second link may
    be set to other arrays of the same shapes; the caller keeps those alive.

    Raises
    ------
    ValueError
        As `decode_attention`, but for what `context_lens` and `block_tables` hold.

    Examples
    --------
    >>> from cpu_kernels.calls import Chain
    >>> cache = np.ones((1, 1, 16, 8), np.float32)
    >>> out, lse = np.empty((1, 2, 8), np.float32), np.empty((1, 2), np.float32)
    >>> context_lens = np.array([3], np.int32)
    >>> links = decode_attention_links(
    ...     np.zeros((1, 2, 8), np.float32), cache, cache, np.zeros((1, 1), np.int32),
    ...     context_lens, scale=1.0, window=None, num_threads=1, out=out, lse=lse,
    ... )
    >>> chain = Chain(links, num_threads=1)
    >>> for context_lens[0] in (3, 4):
    ...     chain.run()
    ...     check_attention(links)
    >>> bool(np.allclose(lse, np.log(4)))
    True
    """
    seen = _NO_WINDOW if window is None else min(window, _NO_WINDOW)
    _check(
        q, key_cache, value_cache, block_tables, context_lens, seen, num_threads, out, lse, sinks
    )
    num_blocks, num_kv_heads, block_size, value_width = value_cache.shape
    call = AttentionCall(
        q=q.ctypes.data,
        key_cache=key_cache.ctypes.data,
        value_cache=value_cache.ctypes.data,
        block_tables=block_tables.ctypes.data,
        context_lens=context_lens.ctypes.data,
        sinks=0 if sinks is None else sinks.ctypes.data,
        out=out.ctypes.data,
        lse=lse.ctypes.data,
        num_seqs=q.shape[0],
        num_kv_heads=num_kv_heads,
        group_size=q.shape[1] // num_kv_heads,
        key_width=q.shape[2],
        value_width=value_width,
        block_size=block_size,
        max_blocks=block_tables.shape[1],
        window=seen,
        has_sinks=sinks is not None,
        scale=scale * _LOG2_E,
    )
    memory = _place(call, num_threads, scratch or Scratch())
    num_heads = heads_at_once(call.group_size)
    body = code_address("attention_kernels", "make_attend", key_cache.dtype.name, num_heads)
    arrays = (q, key_cache, value_cache, block_tables, context_lens, sinks, out, lse, memory)
    plan = PlanCall(num_items=1, attention=ctypes.addressof(call), num_blocks=num_blocks)
    return (
        Link(code_address("attention_kernels", "make_plan"), plan, (call, *arrays)),
        Link(body, call, arrays),
    )


def check_attention(links: tuple[Link, Link]) -> None:
    """Raise if the last run of `decode_attention_links` found what it could not attend to.

    Raises
    ------
    ValueError
        If a context length was out of range, or a block number was no number of a block.
    """
    plan, call = links[0].call, links[1].call
    if plan.state == BAD_LENGTH:
        raise ValueError(
            f"context lengths are {plan.shortest} to {plan.longest} but must be 1 to "
            f"{call.max_blocks * call.block_size}: {call.max_blocks} blocks of {call.block_size} "
            f"tokens"
        )
    if plan.state == BAD_BLOCK:
        raise ValueError(
            f"block_tables has block {plan.bad_block} for sequence {plan.bad_seq} but the cache "
            f"has {plan.num_blocks} blocks, numbered from 0"
        )


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


def heads_at_once(group_size: int) -> int:
    """Return how many query heads of a KV head the kernel takes together."""
    return min(1 << max(0, group_size - 1).bit_length(), num_lanes())


def num_lanes() -> int:
    """Return `simd.LANES`, whose module needs numba."""
    return 16 if isa().has("avx512") else 8


def tile_rows(num_heads: int) -> int:
    """Return how many of the heads taken together one tile of outputs has."""
    return min(num_heads, TILE_TOKENS // 2)


def tile_columns(num_heads: int) -> int:
    """Return how many vectors of columns one tile of outputs has."""
    return min(4, TILE_TOKENS // min(num_heads, TILE_TOKENS // 2))


def round_up(size: int, multiple: int) -> int:
    """Return the next multiple, of a size of at least 0."""
    return (size + multiple - 1) // multiple * multiple


def num_segments(length: int, window: int) -> int:
    """Return into how many segments the cached tokens that a query sees are cut.

    Up to 8 they are of one length each, of 512 tokens more or less: a short last one would cost as
    much as a long one.
    """
    num_tokens = min(length, window)
    if num_tokens > 8 * SEGMENT_TOKENS:
        return (num_tokens + SEGMENT_TOKENS - 1) // SEGMENT_TOKENS
    return max(1, (num_tokens + SEGMENT_TOKENS // 2) // SEGMENT_TOKENS)


def segment_tokens(num_tokens: int, count: int) -> int:
    """Return how many tokens a segment has, of so many; the last one perhaps fewer."""
    if num_tokens > 8 * SEGMENT_TOKENS:
        return SEGMENT_TOKENS
    return ((num_tokens + count - 1) // count + CHUNK_TOKENS - 1) // CHUNK_TOKENS * CHUNK_TOKENS


def _place(call: AttentionCall, num_threads: int, scratch: Scratch) -> NDArray[np.uint8]:
    """Set where the parts of scratch begin, for the longest contexts, and return the memory."""
    lanes, num_heads = num_lanes(), heads_at_once(call.group_size)
    pairs = call.num_seqs * call.num_kv_heads
    max_items = pairs * num_segments(call.max_blocks * call.block_size, call.window)
    call.padded_group = round_up(call.group_size, num_heads)
    call.padded_key = round_up(call.key_width, 2 * lanes)
    call.padded_value = round_up(call.value_width, tile_columns(num_heads) * lanes)
    # float32: partial outputs, their maxima, their sums, then each worker's queries, scores,
    # factors and keys; int64: finished segments of each (sequence, KV head), each worker's rows;
    # last the workers' value tails. What shorter contexts do not need is never touched.
    states = max_items * (call.padded_group // num_heads) * lanes
    call.maxima_at = max_items * call.padded_group * call.padded_value
    call.sums_at = call.maxima_at + states
    call.workers_at = call.sums_at + states
    call.worker_size = (
        call.padded_group * (call.padded_key + CHUNK_TOKENS)
        + round_up(call.padded_group, lanes)
        + CHUNK_TOKENS * round_up(call.padded_key, KEY_COLUMNS)
    )
    call.rows_at = pairs
    num_floats = call.workers_at + num_threads * call.worker_size
    float_bytes = round_up(4 * num_floats, CACHE_LINE_BYTES)
    integer_bytes = round_up(8 * (pairs + num_threads * WORKER_ROWS), CACHE_LINE_BYTES)
    tail_bytes = num_threads * CHUNK_TOKENS * KEY_COLUMNS * 4
    memory = scratch.take(float_bytes + integer_bytes + tail_bytes)
    call.floats = memory.ctypes.data
    call.integers = call.floats + float_bytes
    call.tails = call.integers + integer_bytes
    return memory


def _check(
    q: NDArray[np.float32],
    key_cache: NDArray[Any],
    value_cache: NDArray[Any],
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    window: int,
    num_threads: int,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
    sinks: NDArray[np.float32] | None,
) -> None:
    """Refuse what does not fit."""
    if key_cache.dtype not in _CACHE_DTYPES or key_cache.dtype != value_cache.dtype:
        raise ValueError(
            f"keys are {key_cache.dtype} and values {value_cache.dtype}; both must be one of "
            f"float32, float16 or uint16 (the bits of bfloat16)"
        )
    for name, array, dimensions in (("q", q, 3), ("value_cache", value_cache, 4)):
        if array.ndim != dimensions:
            raise ValueError(f"{name} is {array.shape} but must have {dimensions} dimensions")
    num_seqs, num_heads, key_width = q.shape
    num_blocks, num_kv_heads, block_size, value_width = value_cache.shape
    keys_shape = (num_blocks, num_kv_heads, block_size, key_width)
    tables_shape = (num_seqs, block_tables.shape[-1] if block_tables.ndim else 0)
    expected: list[tuple[str, NDArray[Any], np.dtype[Any], tuple[int, ...], bool]] = [
        ("q", q, _FLOAT32, q.shape, False),
        ("key_cache", key_cache, key_cache.dtype, keys_shape, False),
        ("value_cache", value_cache, key_cache.dtype, value_cache.shape, False),
        ("block_tables", block_tables, _INT32, tables_shape, False),
        ("context_lens", context_lens, _INT32, (num_seqs,), False),
        ("out", out, _FLOAT32, (num_seqs, num_heads, value_width), True),
        ("lse", lse, _FLOAT32, (num_seqs, num_heads), True),
    ]
    if sinks is not None:
        expected.append(("sinks", sinks, _FLOAT32, (num_heads,), False))
    for name, array, dtype, shape, is_written in expected:
        is_plain = array.flags.c_contiguous and array.flags.aligned
        is_plain = is_plain and (array.flags.writeable or not is_written)
        if array.dtype != dtype or array.shape != shape or not is_plain:
            kind = "contiguous, aligned, writeable" if is_written else "contiguous, aligned"
            raise ValueError(
                f"{name} is {array.dtype} {array.shape} but must be {kind} {dtype} {shape}"
            )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide by {num_kv_heads} KV heads")
    if window < 1 or num_threads < 1:
        raise ValueError(f"window is {window} and num_threads {num_threads}; both start at 1")

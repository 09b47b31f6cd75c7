"""Attention of one new token a sequence over a paged KV cache, on the CPU.

A sequence's cached tokens are cut into segments of `SEGMENT_TOKENS`; a work item is (sequence, KV
head, segment), taken by whichever thread is free. Chunk by chunk it scores all query heads of that
KV head and adds up the values, while the next chunk is on its way into the second-level cache:
memory is read once. Whoever finishes the last segment of a (sequence, KV head) merges them in
order. Segments depend neither on the number of threads nor on the other sequences, so neither do
the results, to the last bit.
"""

# S sequences, H query heads, C KV heads, D key width, E value width, B blocks, P block size

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numba.core.errors import TypingError
from numpy.typing import NDArray

from cpu_kernels.attention_kernels import (
    CACHE_FORMATS,
    CALL_DTYPE,
    DONE,
    NEEDS_SCRATCH,
    NEEDS_THREADS,
    attend_address,
    enter_attend,
    heads_at_once,
)
from cpu_kernels.scratch import Scratch
from cpu_kernels.threads import fork_join, openmp_address

_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
_FLOAT16 = np.dtype(np.float16)
_NO_SINKS = np.empty(0, np.float32)
# more tokens than any cache has
_NO_WINDOW = 1 << 40


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
        (S, max_blocks) numbers of the blocks of each sequence, all < B; entries past its end are
        not read.
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
    Online Softmax (Milakov and Gimelshein 2018), Algorithm 3. Sinks are those of gpt-oss (OpenAI
    2025), after Xiao et al. 2023.
    """
    keys, values = key_cache, value_cache
    if keys.dtype == _FLOAT16 and values.dtype == _FLOAT16:
        keys, values = keys.view(np.int16), values.view(np.int16)
    seen = _NO_WINDOW if window is None else window
    scratch = scratch or Scratch()
    parallel = openmp_address()
    calls = np.zeros(1, CALL_DTYPE)
    try:
        group_size = q.shape[1] // keys.shape[1]
        body = attend_address(key_cache.dtype, group_size)
        num_bytes = scratch.num_bytes
        for _ in range(2):
            state = enter_attend(
                calls,
                q,
                keys,
                values,
                block_tables,
                context_lens,
                _NO_SINKS if sinks is None else sinks,
                sinks is not None,
                out,
                lse,
                scale,
                seen,
                heads_at_once(group_size),
                num_threads,
                scratch.address(num_bytes),
                num_bytes,
                body,
                parallel,
            )
            if state != NEEDS_SCRATCH:
                break
            num_bytes = int(calls["scratch_bytes"][0])
    except (TypingError, KeyError, IndexError, ZeroDivisionError):
        state = None
    if state == NEEDS_THREADS:
        fork_join(body, calls.ctypes.data, int(calls["num_workers"][0]))
    elif state != DONE:
        _refuse(
            q,
            key_cache,
            value_cache,
            block_tables,
            context_lens,
            seen,
            num_threads,
            out,
            lse,
            sinks,
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


def _refuse(
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
) -> NoReturn:
    """Say what does not fit."""
    if key_cache.dtype.name not in CACHE_FORMATS or key_cache.dtype != value_cache.dtype:
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
    tables_shape = (num_seqs, block_tables.shape[-1])
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
    longest = block_tables.shape[1] * block_size
    raise ValueError(
        f"context lengths are {context_lens.min()} to {context_lens.max()} but must be 1 to "
        f"{longest}: {block_tables.shape[1]} blocks of {block_size} tokens"
    )

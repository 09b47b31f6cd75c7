"""The small steps of a decode step between its products: norms, rotary, activation, routing, sums.

At one token these take less time than the call of a torch operation, and a layer has some twenty
of them. Here each step is one compiled call of 1 to 5 us. The first call of a function with new
formats compiles (0.4 to 1.7 s, then kept on disk). bfloat16 is the uint16 array of its bits;
what is not an argument in bfloat16 is float32 all through, so that a step rounds once, when it
stores.
"""

# T tokens, D hidden, I expert width, E experts, H query heads, C KV heads, B blocks, P block size,
# K head dim

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numba.core.errors import TypingError
from numpy.typing import NDArray

from cpu_kernels.elementwise_kernels import (
    NORM_FULL,
    NORM_HEAD,
    NORM_NONE,
    add_residual_loop,
    prepare_qkv_loop,
    rms_norm_loop,
    route_loop,
    silu_multiply_loop,
)
from cpu_kernels.threads import fork_join

QkNorm = Literal["none", "head", "full"]

# Elements that a thread must have to pay for itself. Starting a thread on Python code takes some 50
# us, as long as 100 000 elements; a body in C would take 2 us, and the compilation of every loop a
# second time. Decode stays far below; in a prefill of 512 tokens the products take 10 ms and more.
SPLIT_ELEMENTS = 1 << 18

_HIDDEN, _CACHE = ("float32", "uint16"), ("float32", "uint16", "float16")
_NORM_KINDS = {"none": NORM_NONE, "head": NORM_HEAD, "full": NORM_FULL}
_NO_WEIGHT = np.empty(0, np.float32)
_FLOAT16 = np.dtype(np.float16)


def rms_norm(
    x: NDArray[Any],
    weight: NDArray[Any],
    eps: float,
    out: NDArray[Any],
    *,
    num_threads: int = 1,
) -> None:
    """Divide every row by its root mean square, round to x's format, then scale.

    The order of rounding is that of transformers' RMS norms. uint16 is bfloat16 in all arrays.

    Parameters
    ----------
    x
        (T, D) float32 or uint16.
    weight
        (D,) float32 or uint16.
    eps
        Added to the mean of the squares.
    out
        (T, D) float32 or uint16, written entirely; may be x.
    num_threads
        Threads to use at most, at least 1; more than one only if there is work for them.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together.

    Examples
    --------
    >>> out = np.empty((1, 2), np.float32)
    >>> rms_norm(np.array([[3.0, -3.0]], np.float32), np.array([1.0, 2.0], np.float32), 0.0, out)
    >>> out
    array([[ 1., -2.]], dtype=float32)
    """
    arguments = (x, weight, eps, out)
    if _is_small(x, num_threads) and _did(rms_norm_loop, arguments):
        return
    width = x.shape[-1:]
    expected = (
        _Expected("x", x, _HIDDEN, (-1, *width)),
        _Expected("weight", weight, _HIDDEN, width),
        _Expected("out", out, _HIDDEN, x.shape, is_written=True),
    )
    _check(expected)
    _split(rms_norm_loop, arguments, (0, 3), num_threads)


def silu_multiply(gate_up: NDArray[Any], out: NDArray[Any], *, num_threads: int = 1) -> None:
    """Set out = silu(gate) * up, for rows that hold gate and up side by side.

    In bfloat16 the activation is rounded before the product, as in transformers; float32 is not.

    Parameters
    ----------
    gate_up
        (T, 2 * I) float32 or uint16 (the bits of bfloat16).
    out
        (T, I) float32 or uint16, written entirely.
    num_threads
        As in `rms_norm`.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together.

    Examples
    --------
    >>> out = np.empty((1, 2), np.float32)
    >>> silu_multiply(np.array([[0.0, 40.0, 5.0, 0.5]], np.float32), out)
    >>> out
    array([[ 0., 20.]], dtype=float32)

    Notes
    -----
    exp(-|gate|) has a relative error of 1e-7 * (1 + |gate|).
    """
    arguments = (gate_up, out)
    if _is_small(gate_up, num_threads) and _did(silu_multiply_loop, arguments):
        return
    out_shape = (*gate_up.shape[:1], gate_up.shape[-1] // 2) if gate_up.ndim else ()
    expected = (
        _Expected("gate_up", gate_up, _HIDDEN, (-1, *(2 * width for width in out_shape[1:]))),
        _Expected("out", out, _HIDDEN, out_shape, is_written=True),
    )
    _check(expected)
    _split(silu_multiply_loop, arguments, (0, 1), num_threads)


def add_residual(
    x: NDArray[Any],
    y: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    out: NDArray[Any],
    *,
    num_threads: int = 1,
) -> None:
    """Set out = x + (y + bias), summed in float32.

    Parameters
    ----------
    x
        (T, D) float32 or uint16 (the bits of bfloat16).
    y
        (T, D) float32, as a product leaves it.
    bias
        (D,) float32, None for none.
    out
        (T, D) in x's format, written entirely; may be x.
    num_threads
        As in `rms_norm`.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together.

    Examples
    --------
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> add_residual(x, np.array([[10.0, 20.0]], np.float32), None, x)
    >>> x
    array([[11., 22.]], dtype=float32)
    """
    arguments = (x, y, bias is not None, _NO_WEIGHT if bias is None else bias, out)
    if _is_small(x, num_threads) and x.dtype == out.dtype and _did(add_residual_loop, arguments):
        return
    width = x.shape[-1:]
    _check(
        (
            _Expected("x", x, _HIDDEN, (-1, *width)),
            _Expected("y", y, ("float32",), x.shape),
            _Expected("bias", arguments[3], ("float32",), (0,) if bias is None else width),
            _Expected("out", out, (x.dtype.name,), x.shape, is_written=True),
        )
    )
    _split(add_residual_loop, arguments, (0, 1, 4), num_threads)


def route(
    logits: NDArray[np.float32],
    top_k: int,
    norm_topk_prob: bool,
    ids_out: NDArray[np.int64],
    weights_out: NDArray[np.float32],
    *,
    num_threads: int = 1,
) -> None:
    """Pick the `top_k` most probable experts of each token, by softmax over all experts.

    The most probable comes first, of equal logits the expert of the lower number. A NaN among a
    token's logits makes all its weights NaN; its experts are then any, but different ones.

    Parameters
    ----------
    logits
        (T, E) float32.
    top_k
        Experts a token, 1 to E.
    norm_topk_prob
        Shall the weights of a token add up to 1?
    ids_out
        (T, top_k) int64, written entirely.
    weights_out
        (T, top_k) float32, written entirely.
    num_threads
        As in `rms_norm`.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together.

    Examples
    --------
    >>> ids, weights = np.empty((1, 2), np.int64), np.empty((1, 2), np.float32)
    >>> route(np.log(np.array([[0.1, 0.6, 0.3]], np.float32)), 2, False, ids, weights)
    >>> ids, weights.round(3)
    (array([[1, 2]]), array([[0.6, 0.3]], dtype=float32))
    """
    arguments = (logits, top_k, norm_topk_prob, ids_out, weights_out)
    if _is_small(logits, num_threads) and _did(route_loop, arguments):
        return
    num_experts = logits.shape[-1:]
    kept = (*logits.shape[:1], top_k)
    expected = (
        _Expected("logits", logits, ("float32",), (-1, *num_experts)),
        _Expected("ids_out", ids_out, ("int64",), kept, is_written=True),
        _Expected("weights_out", weights_out, ("float32",), kept, is_written=True),
    )
    _check(expected)
    if not 1 <= top_k <= num_experts[0]:
        raise ValueError(f"top_k is {top_k} but must be 1 to {num_experts[0]}, the experts")
    _split(route_loop, arguments, (0, 3, 4), num_threads)


def rotary_tables(
    positions: NDArray[Any],
    inv_freq: NDArray[np.float32],
    cos_out: NDArray[np.float32],
    sin_out: NDArray[np.float32],
) -> None:
    """Compute the rotations of a step, once for all its layers.

    Parameters
    ----------
    positions
        (T,) integers.
    inv_freq
        (K / 2,) float32 radians per position.
    cos_out, sin_out
        (T, K / 2) float32, written entirely.

    Raises
    ------
    ValueError
        If shapes or formats do not fit together.

    Examples
    --------
    >>> cos, sin = np.empty((2, 1), np.float32), np.empty((2, 1), np.float32)
    >>> rotary_tables(np.array([0, 1]), np.array([np.pi], np.float32), cos, sin)
    >>> cos.ravel()
    array([ 1., -1.], dtype=float32)
    """
    shape = (positions.size, inv_freq.size)
    _check(
        (
            _Expected("positions", positions, ("int64", "int32"), (-1,)),
            _Expected("inv_freq", inv_freq, ("float32",), (-1,)),
            _Expected("cos_out", cos_out, ("float32",), shape, is_written=True),
            _Expected("sin_out", sin_out, ("float32",), shape, is_written=True),
        )
    )
    angles = positions.astype(np.float32)[:, None] * inv_freq
    np.cos(angles, out=cos_out)
    np.sin(angles, out=sin_out)


def prepare_qkv(
    qkv: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    slots: NDArray[np.int64],
    *,
    qk_norm: QkNorm,
    q_norm: NDArray[Any] | None,
    k_norm: NDArray[Any] | None,
    norm_eps: float,
    clip: float | None,
    q_out: NDArray[np.float32],
    key_cache: NDArray[Any],
    value_cache: NDArray[Any],
    num_threads: int = 1,
) -> None:
    """Norm, clip and rotate queries and keys; write keys and values to their places in the cache.

    A full norm comes before the clip and a norm of heads after it, as in transformers' models.
    Everything is float32 up to the store; transformers rounds to the model's format after the
    product, the norm, its scale, the rotary table and each product of the rotation.

    Parameters
    ----------
    qkv
        (T, (H + 2 * C) * K) float32: the query heads, the key heads, the value heads; any bias is
        in it. Not changed.
    cos, sin
        (T, K / 2) float32, of `rotary_tables`; halves of a head are rotated as pairs.
    slots
        (T,) int64, block * P + place of every token in the cache, all different.
    qk_norm
        "head": RMS norms of single heads; "full": of all queries and of all keys together.
    q_norm, k_norm
        Weights, float32 or uint16 (the bits of bfloat16): (K,) for "head", (H * K,) and (C * K,)
        for "full", None for "none".
    norm_eps
        Added to the mean of the squares.
    clip
        Largest magnitude of queries, keys and values; None for no bound.
    q_out
        (T, H, K) float32, written entirely.
    key_cache, value_cache
        (B, C, P, K) float32, float16 or uint16 (the bits of bfloat16); only the slots are written.
    num_threads
        As in `rms_norm`.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together, or a slot is outside the cache;
        nothing is written then.

    Examples
    --------
    >>> keys, values = np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 1, 2, 2), np.float32)
    >>> q = np.empty((1, 1, 2), np.float32)
    >>> prepare_qkv(
    ...     np.arange(6, dtype=np.float32)[None], np.zeros((1, 1), np.float32),
    ...     np.ones((1, 1), np.float32), np.array([1]), qk_norm="none", q_norm=None, k_norm=None,
    ...     norm_eps=0.0, clip=None, q_out=q, key_cache=keys, value_cache=values,
    ... )
    >>> q.tolist(), keys.tolist(), values.tolist()
    ([[[-1.0, 0.0]]], [[[[0.0, 0.0], [-3.0, 2.0]]]], [[[[0.0, 0.0], [4.0, 5.0]]]])
    """
    keys, values = key_cache, value_cache
    if keys.dtype == _FLOAT16 and values.dtype == _FLOAT16:
        keys, values = keys.view(np.int16), values.view(np.int16)
    arguments = (
        qkv,
        cos,
        sin,
        slots,
        _NORM_KINDS[qk_norm],
        _NO_WEIGHT if q_norm is None else q_norm,
        _NO_WEIGHT if k_norm is None else k_norm,
        norm_eps,
        math.inf if clip is None else clip,
        q_out,
        keys,
        values,
    )
    is_small = _is_small(qkv, num_threads) and key_cache.dtype == value_cache.dtype
    if is_small and _did(prepare_qkv_loop, arguments):
        return
    _check_qkv(qkv, cos, sin, slots, qk_norm, arguments[5:7], q_out, key_cache, value_cache)
    _split(prepare_qkv_loop, arguments, (0, 1, 2, 3, 9), num_threads)


class _Expected(NamedTuple):
    name: str
    array: NDArray[Any]
    formats: tuple[str, ...]
    shape: tuple[int, ...]  # -1: any
    is_written: bool = False


def _is_small(array: NDArray[Any], num_threads: int) -> bool:
    return num_threads == 1 or array.size < 2 * SPLIT_ELEMENTS


def _did(loop: Any, arguments: tuple[Any, ...]) -> bool:
    """Run the loop; False if it refused the sizes, or does not exist for these formats."""
    try:
        return bool(loop(*arguments))
    except TypingError:
        return False


def _check(arrays: tuple[_Expected, ...]) -> None:
    for name, array, formats, shape, is_written in arrays:
        fits = len(shape) == array.ndim and all(
            wanted in (-1, size) for wanted, size in zip(shape, array.shape, strict=True)
        )
        is_plain = array.flags.c_contiguous and array.flags.aligned
        is_plain = is_plain and (array.flags.writeable or not is_written)
        if not fits or not is_plain or array.dtype.name not in formats:
            kind = "contiguous, aligned, writeable" if is_written else "contiguous, aligned"
            sizes = ", ".join("any" if size == -1 else str(size) for size in shape)
            raise ValueError(
                f"{name} is {array.dtype} {array.shape} with strides {array.strides}"
                f"{'' if array.flags.writeable else ', read-only'} but must be {kind} "
                f"{' or '.join(formats)} ({sizes})"
            )


def _check_qkv(
    qkv: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    slots: NDArray[np.int64],
    qk_norm: QkNorm,
    norms: tuple[Any, ...],
    q_out: NDArray[np.float32],
    key_cache: NDArray[Any],
    value_cache: NDArray[Any],
) -> None:
    _check(
        (
            _Expected("q_out", q_out, ("float32",), (-1, -1, -1), is_written=True),
            _Expected("key_cache", key_cache, _CACHE, (-1, -1, -1, *q_out.shape[2:]), True),
            _Expected("value_cache", value_cache, (key_cache.dtype.name,), key_cache.shape, True),
        )
    )
    num_tokens, num_heads, width = q_out.shape
    num_blocks, num_kv_heads, block_size, _ = key_cache.shape
    if width % 2:
        raise ValueError(f"heads are {width} wide but rotary needs an even width")
    sizes = {"none": (0, 0), "head": (width, width)}
    q_size, k_size = sizes.get(qk_norm, (num_heads * width, num_kv_heads * width))
    _check(
        (
            _Expected(
                "qkv", qkv, ("float32",), (num_tokens, (num_heads + 2 * num_kv_heads) * width)
            ),
            _Expected("cos", cos, ("float32",), (num_tokens, width // 2)),
            _Expected("sin", sin, ("float32",), (num_tokens, width // 2)),
            _Expected("slots", slots, ("int64",), (num_tokens,)),
            _Expected("q_norm", norms[0], _HIDDEN, (q_size,)),
            _Expected("k_norm", norms[1], _HIDDEN, (k_size,)),
        )
    )
    num_slots = num_blocks * block_size
    if num_tokens and not 0 <= slots.min() <= slots.max() < num_slots:
        raise ValueError(
            f"slots are {slots.min()} to {slots.max()} but must be 0 to {num_slots - 1}: "
            f"{num_blocks} blocks of {block_size} tokens"
        )


def _split(
    loop: Any, arguments: tuple[Any, ...], by_token: tuple[int, ...], num_threads: int
) -> None:
    """Run the loop over blocks of tokens, one a thread; the arguments are checked."""
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads} but must be at least 1")
    num_tokens, size = len(arguments[0]), arguments[0].size
    num_blocks = max(1, min(num_threads, num_tokens, size // max(1, SPLIT_ELEMENTS)))
    bounds = [num_tokens * block // num_blocks for block in range(num_blocks + 1)]
    parts = [
        [
            argument[start:end] if place in by_token else argument
            for place, argument in enumerate(arguments)
        ]
        for start, end in pairwise(bounds)
    ]
    remaining, results = iter(parts), []

    def run(_: int | None) -> None:
        for part in remaining:  # one iterator for all threads: each part has one taker
            results.append(loop(*part))

    # compiles here if at all: an exception would be lost in a thread
    empty = [a[:0] if place in by_token else a for place, a in enumerate(arguments)]
    results.append(loop(*empty))
    body = _BODY(run)
    fork_join(ctypes.cast(body, ctypes.c_void_p).value or 0, 0, num_blocks)
    assert results == [True] * (num_blocks + 1), "a loop refused arguments that were checked"


_BODY: Callable[[Callable[[int | None], None]], Any] = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

"""The compiled loops of `elementwise.py`: nothing is allocated; False if sizes do not fit.

numba's dispatcher takes the arrays: 0.1 us for each of them, types and layouts compared, where
ctypes takes 0.5 us for the address alone. Behind the checks, arrays are pointers as in simd.py;
`x_at` is the index of x's start.
"""

# T tokens, D hidden, I expert width, E experts, H query heads, C KV heads, B blocks, P block size,
# K head dim

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from cpu_kernels.compiling import source_stamp
from cpu_kernels.isa import isa
from cpu_kernels.simd import (
    LANES,
    add,
    divide,
    exp2,
    lane_max,
    lane_sum,
    load,
    load_first,
    maximum,
    multiply,
    round_as,
    splat,
    store,
    store_first,
    subtract,
    where_positive,
)

NORM_NONE, NORM_HEAD, NORM_FULL = 0, 1, 2
_LOG2_E = np.float32(math.log2(math.e))
_ZERO, _ONE, _MINUS_ONE = np.float32(0.0), np.float32(1.0), np.float32(-1.0)

isa()  # numba reads what this may set when it first compiles


def _pointer(formats: tuple[Any, ...], *, is_written: bool) -> Any:
    """Return an operation: array to pointer. With any other array the caller does not compile."""

    def pointer_to(typing_context: Any, array: Any) -> Any:
        is_plain = isinstance(array, types.Array) and array.layout == "C" and array.aligned
        if not is_plain or array.dtype not in formats or (is_written and not array.mutable):
            raise TypingError(f"{array} is no contiguous array of one of {formats}")
        return types.CPointer(array.dtype)(array), _generate_pointer  # type: ignore[no-untyped-call]

    return intrinsic(pointer_to)


def _generate_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return context.make_array(signature.args[0])(context, builder, arguments[0]).data


_HIDDEN = (types.float32, types.uint16)
_hidden = _pointer(_HIDDEN, is_written=False)
_hidden_out = _pointer(_HIDDEN, is_written=True)
_float32 = _pointer((types.float32,), is_written=False)
_float32_out = _pointer((types.float32,), is_written=True)
_int64 = _pointer((types.int64,), is_written=False)
_int64_out = _pointer((types.int64,), is_written=True)
_cache_out = _pointer((*_HIDDEN, types.int16), is_written=True)


# inline="always" on the outer functions only, as in attention_kernels.py: seconds of CPU to compile
# all five loops once, 4.6 without, 6.3 with all inlined, 4.0 like this
@numba.njit(nogil=True, error_model="numpy")
def _load_part(array: Any, at: int, count: int) -> Any:
    """Return up to a vector of the `count` elements that are left."""
    return load(array, at) if count >= LANES else load_first(array, at, count)


@numba.njit(nogil=True, error_model="numpy")
def _store_part(array: Any, at: int, count: int, value: Any) -> None:
    if count >= LANES:
        store(array, at, value)
    else:
        store_first(array, at, count, value)


@numba.njit(nogil=True, error_model="numpy")
def _clip(x: Any, limit: Any) -> Any:
    """Return x within -limit to limit."""
    low = splat(-limit)
    # maximum() gives its second operand where one is NaN: x, both times
    upper = multiply(maximum(low, multiply(x, splat(_MINUS_ONE))), splat(_MINUS_ONE))
    return maximum(low, upper)


@numba.njit(nogil=True, error_model="numpy")
def _inverse_rms(x: Any, x_at: int, width: int, eps: float, limit: Any) -> Any:
    """Return 1 / sqrt(mean(clip(x) ** 2) + eps)."""
    total = splat(_ZERO)
    for d in range(0, width, LANES):
        lanes = _clip(_load_part(x, x_at + d, width - d), limit)
        total = add(total, multiply(lanes, lanes))
    return np.float32(1.0 / math.sqrt(lane_sum(total) / width + eps))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _rms_norm(x: Any, weight: Any, eps: float, out: Any, num_tokens: int, width: int) -> None:
    for t in range(num_tokens):
        row = t * width
        scale = splat(_inverse_rms(x, row, width, eps, np.float32(np.inf)))
        for d in range(0, width, LANES):
            left = width - d
            normed = round_as(x, multiply(_load_part(x, row + d, left), scale))
            scaled = multiply(normed, _load_part(weight, d, left))
            _store_part(out, row + d, left, scaled)


def _make_rms_norm() -> Any:
    stamp = source_stamp()

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def rms_norm(x: Any, weight: Any, eps: float, out: Any) -> bool:
        """x (T, D), weight (D,), out (T, D)."""
        _ = stamp
        num_tokens, width = x.shape
        if out.shape != x.shape or weight.shape != (width,):
            return False
        _rms_norm(_hidden(x), _hidden(weight), eps, _hidden_out(out), num_tokens, width)
        return True

    return rms_norm


rms_norm_loop = _make_rms_norm()


@numba.njit(nogil=True, error_model="numpy", inline="always")
def silu(x: Any) -> Any:
    """Return x / (1 + exp(-x)) of a vector, by an exponential that cannot overflow."""
    size = maximum(x, multiply(x, splat(_MINUS_ONE)))
    fall = exp2(multiply(size, splat(-_LOG2_E)))
    return multiply(x, divide(where_positive(x, splat(_ONE), fall), add(splat(_ONE), fall)))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _silu_multiply(gate_up: Any, out: Any, num_tokens: int, width: int) -> None:
    for t in range(num_tokens):
        gate_at = 2 * t * width
        for d in range(0, width, LANES):
            left = width - d
            gate = _load_part(gate_up, gate_at + d, left)
            up = _load_part(gate_up, gate_at + width + d, left)
            activated = round_as(gate_up, silu(gate))
            _store_part(out, t * width + d, left, multiply(activated, up))


def _make_silu_multiply() -> Any:
    stamp = source_stamp()

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def silu_multiply(gate_up: Any, out: Any) -> bool:
        """gate_up (T, 2 I), out (T, I)."""
        _ = stamp
        num_tokens, width = out.shape
        if gate_up.shape != (num_tokens, 2 * width):
            return False
        _silu_multiply(_hidden(gate_up), _hidden_out(out), num_tokens, width)
        return True

    return silu_multiply


silu_multiply_loop = _make_silu_multiply()


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _add_rows(
    x: Any, y: Any, bias: Any, has_bias: bool, out: Any, num_tokens: int, width: int
) -> None:
    for t in range(num_tokens):
        for d in range(0, width, LANES):
            left = width - d
            addend = _load_part(y, t * width + d, left)
            if has_bias:
                addend = add(addend, _load_part(bias, d, left))
            total = add(_load_part(x, t * width + d, left), addend)
            _store_part(out, t * width + d, left, total)


def _make_add_residual() -> Any:
    stamp = source_stamp()

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def add_residual(x: Any, y: Any, has_bias: bool, bias: Any, out: Any) -> bool:
        """x, y, out (T, D); bias (D,), or anything if there is none."""
        _ = stamp
        num_tokens, width = x.shape
        if y.shape != x.shape or out.shape != x.shape or (has_bias and bias.shape != (width,)):
            return False
        _add_rows(
            _hidden(x), _float32(y), _float32(bias), has_bias, _hidden_out(out), num_tokens, width
        )
        return True

    return add_residual


add_residual_loop = _make_add_residual()


@numba.njit(nogil=True, error_model="numpy")
def _exp_below(value: Any, largest: Any) -> Any:
    """Return exp(value - largest)."""
    return lane_max(exp2(splat((value - largest) * _LOG2_E)))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _sum_exp(logits: Any, at: int, count: int, largest: Any) -> Any:
    sums = splat(_ZERO)
    whole = count - count % LANES
    for e in range(0, whole, LANES):
        below = subtract(load(logits, at + e), splat(largest))
        sums = add(sums, exp2(multiply(below, splat(_LOG2_E))))
    total = lane_sum(sums)
    for e in range(whole, count):
        total += _exp_below(logits[at + e], largest)
    return total


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _take_largest(
    logits: Any, at: int, count: int, top_k: int, ids: Any, values: Any, kept_at: int
) -> None:
    """Write the largest logits and their numbers, largest first and equal ones by number."""
    for e in range(count):
        value = logits[at + e]
        last = kept_at + min(e, top_k - 1)
        # with a NaN among them the order is any, but the first `top_k` fill every place
        if e >= top_k and not value > values[last]:
            continue
        place = last
        while place > kept_at and value > values[place - 1]:
            values[place] = values[place - 1]
            ids[place] = ids[place - 1]
            place -= 1
        values[place] = value
        ids[place] = e


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _route(
    logits: Any,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    norm_topk_prob: bool,
    ids: Any,
    weights: Any,
) -> None:
    for t in range(num_tokens):
        at, kept_at = t * num_experts, t * top_k
        _take_largest(logits, at, num_experts, top_k, ids, weights, kept_at)
        largest = weights[kept_at]
        # over all experts even where the kept ones are normed: a NaN anywhere is to be seen
        total = _sum_exp(logits, at, num_experts, largest)
        kept = _ZERO
        for j in range(kept_at, kept_at + top_k):
            weights[j] = _exp_below(weights[j], largest) / total
            kept += weights[j]
        if norm_topk_prob:
            for j in range(kept_at, kept_at + top_k):
                weights[j] /= kept


def _make_route() -> Any:
    stamp = source_stamp()

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def route(logits: Any, top_k: int, norm_topk_prob: bool, ids: Any, weights: Any) -> bool:
        """logits (T, E), ids and weights (T, top_k)."""
        _ = stamp
        num_tokens, num_experts = logits.shape
        if ids.shape != (num_tokens, top_k) or weights.shape != ids.shape:
            return False
        if not 1 <= top_k <= num_experts:
            return False
        _route(
            _float32(logits),
            num_tokens,
            num_experts,
            top_k,
            norm_topk_prob,
            _int64_out(ids),
            _float32_out(weights),
        )
        return True

    return route


route_loop = _make_route()


@numba.njit(nogil=True, error_model="numpy")
def _prepared(
    qkv: Any,
    at: int,
    left: int,
    is_normed: bool,
    weight: Any,
    weight_at: int,
    scale: Any,
    first: Any,
    then: Any,
) -> Any:
    """Return a vector of queries or keys, clipped to `first`, normed, clipped to `then`."""
    lanes = _clip(_load_part(qkv, at, left), first)
    if is_normed:
        lanes = multiply(lanes, splat(scale))
        lanes = multiply(lanes, _load_part(weight, weight_at, left))
    return _clip(lanes, then)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _rotate_heads(
    qkv: Any,
    at: int,
    num_heads: int,
    weight: Any,
    kind: int,
    eps: float,
    limit: Any,
    cos: Any,
    sin: Any,
    angles_at: int,
    half: int,
    out: Any,
    out_at: int,
    out_stride: int,
) -> None:
    """Norm, clip and rotate the queries or the keys of one token."""
    width = 2 * half
    infinity = np.float32(np.inf)
    first, then = (infinity, limit) if kind == NORM_FULL else (limit, infinity)
    is_normed = kind != NORM_NONE
    scale = _ONE
    weight_at = 0
    if kind == NORM_FULL:
        scale = _inverse_rms(qkv, at, num_heads * width, eps, first)
    for _ in range(num_heads):
        if kind == NORM_HEAD:
            scale = _inverse_rms(qkv, at, width, eps, first)
        for d in range(0, half, LANES):
            e, left = half + d, half - d
            a = _prepared(qkv, at + d, left, is_normed, weight, weight_at + d, scale, first, then)
            b = _prepared(qkv, at + e, left, is_normed, weight, weight_at + e, scale, first, then)
            c, s = _load_part(cos, angles_at + d, left), _load_part(sin, angles_at + d, left)
            _store_part(out, out_at + d, left, subtract(multiply(a, c), multiply(b, s)))
            _store_part(out, out_at + e, left, add(multiply(b, c), multiply(a, s)))
        if kind == NORM_FULL:
            weight_at += width
        at += width
        out_at += out_stride


@numba.njit(nogil=True, error_model="numpy")
def _copy_head(qkv: Any, at: int, width: int, limit: Any, out: Any, out_at: int) -> None:
    for d in range(0, width, LANES):
        _store_part(out, out_at + d, width - d, _clip(_load_part(qkv, at + d, width - d), limit))


def _make_prepare_qkv() -> Any:
    stamp = source_stamp()

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def prepare_qkv(
        qkv: Any,
        cos: Any,
        sin: Any,
        slots: Any,
        kind: int,
        q_norm: Any,
        k_norm: Any,
        eps: float,
        clip: float,
        q_out: Any,
        key_cache: Any,
        value_cache: Any,
    ) -> bool:
        """qkv (T, (H + 2 C) K), cos and sin (T, K / 2), q_out (T, H, K), caches (B, C, P, K)."""
        _ = stamp
        num_tokens, num_heads, width = q_out.shape
        num_blocks, num_kv_heads, block_size, _ = key_cache.shape
        half = width // 2
        row = (num_heads + 2 * num_kv_heads) * width
        if width % 2 or qkv.shape != (num_tokens, row) or slots.shape != (num_tokens,):
            return False
        if cos.shape != (num_tokens, half) or sin.shape != cos.shape:
            return False
        if key_cache.shape[3] != width or value_cache.shape != key_cache.shape:
            return False
        normed = (0, 0)
        if kind == NORM_HEAD:
            normed = (width, width)
        elif kind == NORM_FULL:
            normed = (num_heads * width, num_kv_heads * width)
        if (q_norm.size, k_norm.size) != normed or q_norm.ndim != 1 or k_norm.ndim != 1:
            return False
        for t in range(num_tokens):
            if not 0 <= slots[t] < num_blocks * block_size:
                return False
        source, keys, values = _float32(qkv), _cache_out(key_cache), _cache_out(value_cache)
        q_weight, k_weight = _hidden(q_norm), _hidden(k_norm)
        c, s, limit = _float32(cos), _float32(sin), np.float32(clip)
        places, q = _int64(slots), _float32_out(q_out)
        stride = block_size * width
        for t in range(num_tokens):
            at = t * row
            _rotate_heads(
                source,
                at,
                num_heads,
                q_weight,
                kind,
                eps,
                limit,
                c,
                s,
                t * half,
                half,
                q,
                t * num_heads * width,
                width,
            )
            at += num_heads * width
            block, offset = places[t] // block_size, places[t] % block_size
            cached = block * num_kv_heads * stride + offset * width
            _rotate_heads(
                source,
                at,
                num_kv_heads,
                k_weight,
                kind,
                eps,
                limit,
                c,
                s,
                t * half,
                half,
                keys,
                cached,
                stride,
            )
            at += num_kv_heads * width
            for head in range(num_kv_heads):
                _copy_head(source, at + head * width, width, limit, values, cached + head * stride)
        return True

    return prepare_qkv


prepare_qkv_loop = _make_prepare_qkv()

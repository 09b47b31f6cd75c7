"""The compiled loops of `elementwise.py`: they check nothing and allocate nothing.

Arrays are pointers as in simd.py; `x_at` is the index of x's start. Formats are dtype names.
"""

# T tokens, D hidden, I expert width, E experts, H query heads, C KV heads, B blocks, P block size,
# K head dim

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types

from cpu_kernels.compiling import Source
from cpu_kernels.elementwise import (
    NORM_FULL,
    NORM_HEAD,
    NORM_NONE,
    AddResidualCall,
    PrepareQkvCall,
    RmsNormCall,
    RouteCall,
    SiluMultiplyCall,
)
from cpu_kernels.simd import (
    LANES,
    _call,
    _compiled_by,
    add,
    call_at,
    divide,
    exp2,
    lane_max,
    lane_sum,
    load,
    load_first,
    maximum,
    multiply,
    pointer_at,
    round_as,
    splat,
    store,
    store_first,
    subtract,
    where_positive,
)

_RMS_NORM, _SILU_MULTIPLY = np.dtype(RmsNormCall), np.dtype(SiluMultiplyCall)
_ADD_RESIDUAL, _ROUTE = np.dtype(AddResidualCall), np.dtype(RouteCall)
_PREPARE_QKV = np.dtype(PrepareQkvCall)
# what simd.py takes for an array of each format: float16 goes by its bits
_ELEMENTS: dict[str, Any] = {"float32": np.float32, "uint16": np.uint16, "float16": np.int16}
_LOG2_E = np.float32(math.log2(math.e))
_ZERO, _ONE, _MINUS_ONE = np.float32(0.0), np.float32(1.0), np.float32(-1.0)


def make_rms_norm(x_format: str, weight_format: str, out_format: str) -> Source:
    """The body of a `RmsNormCall`."""
    x_type, weight_type = _ELEMENTS[x_format], _ELEMENTS[weight_format]
    out_type = _ELEMENTS[out_format]

    def rms_norm(address: int, item: int, worker: int) -> None:
        call = call_at(address, _RMS_NORM)
        first, last = _tokens(call, item)
        x, weight = pointer_at(call.x, x_type), pointer_at(call.weight, weight_type)
        _rms_norm(x, weight, call.eps, pointer_at(call.out, out_type), first, last, call.width)

    return Source(rms_norm, num_arguments=3)


def make_silu_multiply(in_format: str, out_format: str) -> Source:
    """The body of a `SiluMultiplyCall`."""
    in_type, out_type = _ELEMENTS[in_format], _ELEMENTS[out_format]

    def silu_multiply(address: int, item: int, worker: int) -> None:
        call = call_at(address, _SILU_MULTIPLY)
        first, last = _tokens(call, item)
        gate_up, out = pointer_at(call.gate_up, in_type), pointer_at(call.out, out_type)
        bias = pointer_at(call.bias, np.float32)
        _silu_multiply(gate_up, bias, call.bias != 0, out, first, last, call.width)

    return Source(silu_multiply, num_arguments=3)


def make_add_residual(x_format: str) -> Source:
    """The body of an `AddResidualCall`."""
    x_type = _ELEMENTS[x_format]

    def add_residual(address: int, item: int, worker: int) -> None:
        call = call_at(address, _ADD_RESIDUAL)
        first, last = _tokens(call, item)
        x, y = pointer_at(call.x, x_type), pointer_at(call.y, np.float32)
        bias, out = pointer_at(call.bias, np.float32), pointer_at(call.out, x_type)
        _add_rows(x, y, bias, call.bias != 0, out, first, last, call.width)

    return Source(add_residual, num_arguments=3)


def make_route() -> Source:
    """The body of a `RouteCall`."""

    def route(address: int, item: int, worker: int) -> None:
        call = call_at(address, _ROUTE)
        first, last = _tokens(call, item)
        _route(
            pointer_at(call.logits, np.float32),
            first,
            last,
            call.num_experts,
            call.top_k,
            call.norm_topk_prob != 0,
            pointer_at(call.ids, np.int64),
            pointer_at(call.weights, np.float32),
        )

    return Source(route, num_arguments=3)


def make_prepare_qkv(q_norm_format: str, k_norm_format: str, cache_format: str) -> Source:
    """The body of a `PrepareQkvCall`."""
    q_norm_type, k_norm_type = _ELEMENTS[q_norm_format], _ELEMENTS[k_norm_format]
    cache_type = _ELEMENTS[cache_format]

    def prepare_qkv(address: int, item: int, worker: int) -> None:
        call = call_at(address, _PREPARE_QKV)
        first, last = _tokens(call, item)
        _prepare_qkv(
            pointer_at(call.qkv, np.float32),
            pointer_at(call.bias, np.float32),
            call.bias != 0,
            pointer_at(call.cos, np.float32),
            pointer_at(call.sin, np.float32),
            pointer_at(call.slots, np.int64),
            call.norm_kind,
            pointer_at(call.q_norm, q_norm_type),
            pointer_at(call.k_norm, k_norm_type),
            call.eps,
            np.float32(call.limit),
            pointer_at(call.q_out, np.float32),
            pointer_at(call.key_cache, cache_type),
            pointer_at(call.value_cache, cache_type),
            first,
            last,
            call.num_heads,
            call.num_kv_heads,
            call.head_dim,
            call.block_size,
        )

    return Source(prepare_qkv, num_arguments=3)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _tokens(call: Any, item: int) -> tuple[int, int]:
    """Return an item's first token and the one behind its last."""
    first = item * call.tokens_per_item
    return first, min(first + call.tokens_per_item, call.num_tokens)


# inline="always" on the outer functions only, as in attention_kernels.py: seconds of CPU to compile
# all five loops once with numba's dispatchers, 4.6 without, 6.3 with all inlined, 4.0 like this
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
def _load_biased(array: Any, at: int, bias: Any, bias_at: int, has_bias: bool, count: int) -> Any:
    lanes = _load_part(array, at, count)
    return add(lanes, _load_part(bias, bias_at, count)) if has_bias else lanes


def _generate_square_root(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return _call(builder, "llvm.sqrt.f64", ir.DoubleType(), arguments)


# an instruction, where numba's math.sqrt is a call of the C library
@_compiled_by(_generate_square_root, lambda x: types.float64(types.float64))
def _square_root(x: float | np.float32) -> float:
    return math.sqrt(x)


@numba.njit(nogil=True, error_model="numpy")
def _inverse_root(square_sums: Any, width: int, eps: float) -> Any:
    """Return 1 / sqrt(mean + eps)."""
    return np.float32(1.0 / _square_root(lane_sum(square_sums) / width + eps))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _rms_norm(x: Any, weight: Any, eps: float, out: Any, first: int, last: int, width: int) -> None:
    """x (T, D), weight (D,), out (T, D)."""
    for t in range(first, last):
        row = t * width
        sums = splat(_ZERO)
        for d in range(0, width, LANES):
            lanes = _load_part(x, row + d, width - d)
            sums = add(sums, multiply(lanes, lanes))
        scale = splat(_inverse_root(sums, width, eps))
        for d in range(0, width, LANES):
            left = width - d
            normed = round_as(x, multiply(_load_part(x, row + d, left), scale))
            scaled = multiply(normed, _load_part(weight, d, left))
            _store_part(out, row + d, left, scaled)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def silu(x: Any) -> Any:
    """Return x / (1 + exp(-x)) of a vector, by an exponential that cannot overflow."""
    size = maximum(x, multiply(x, splat(_MINUS_ONE)))
    fall = exp2(multiply(size, splat(-_LOG2_E)))
    return multiply(x, divide(where_positive(x, splat(_ONE), fall), add(splat(_ONE), fall)))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _silu_multiply(
    gate_up: Any, bias: Any, has_bias: bool, out: Any, first: int, last: int, width: int
) -> None:
    """gate_up (T, 2 I), bias (2 I,), out (T, I)."""
    for t in range(first, last):
        gate_at = 2 * t * width
        up_at = gate_at + width
        for d in range(0, width, LANES):
            left = width - d
            gate = _load_biased(gate_up, gate_at + d, bias, d, has_bias, left)
            up = _load_biased(gate_up, up_at + d, bias, width + d, has_bias, left)
            activated = round_as(gate_up, silu(gate))
            _store_part(out, t * width + d, left, multiply(activated, up))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _add_rows(
    x: Any, y: Any, bias: Any, has_bias: bool, out: Any, first: int, last: int, width: int
) -> None:
    """x, y, out (T, D); bias (D,)."""
    for t in range(first, last):
        for d in range(0, width, LANES):
            left = width - d
            addend = _load_biased(y, t * width + d, bias, d, has_bias, left)
            total = add(_load_part(x, t * width + d, left), addend)
            _store_part(out, t * width + d, left, total)


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
    first: int,
    last: int,
    num_experts: int,
    top_k: int,
    norm_topk_prob: bool,
    ids: Any,
    weights: Any,
) -> None:
    """logits (T, E), ids and weights (T, top_k)."""
    for t in range(first, last):
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


@numba.njit(nogil=True, error_model="numpy")
def _clipped_inverse_rms(
    qkv: Any,
    at: int,
    bias: Any,
    bias_at: int,
    has_bias: bool,
    width: int,
    eps: float,
    limit: Any,
) -> Any:
    sums = splat(_ZERO)
    for d in range(0, width, LANES):
        lanes = _load_biased(qkv, at + d, bias, bias_at + d, has_bias, width - d)
        lanes = _clip(lanes, limit)
        sums = add(sums, multiply(lanes, lanes))
    return _inverse_root(sums, width, eps)


@numba.njit(nogil=True, error_model="numpy")
def _prepared(
    qkv: Any,
    at: int,
    bias: Any,
    bias_at: int,
    has_bias: bool,
    left: int,
    is_normed: bool,
    weight: Any,
    weight_at: int,
    scale: Any,
    first: Any,
    then: Any,
) -> Any:
    """Return a vector of queries or keys, clipped to `first`, normed, clipped to `then`."""
    lanes = _clip(_load_biased(qkv, at, bias, bias_at, has_bias, left), first)
    if is_normed:
        lanes = multiply(lanes, splat(scale))
        lanes = multiply(lanes, _load_part(weight, weight_at, left))
    return _clip(lanes, then)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _rotate_heads(
    qkv: Any,
    at: int,
    bias: Any,
    bias_at: int,
    has_bias: bool,
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
        size = num_heads * width
        scale = _clipped_inverse_rms(qkv, at, bias, bias_at, has_bias, size, eps, first)
    for _ in range(num_heads):
        if kind == NORM_HEAD:
            scale = _clipped_inverse_rms(qkv, at, bias, bias_at, has_bias, width, eps, first)
        for d in range(0, half, LANES):
            e, left = half + d, half - d
            a = _prepared(
                qkv,
                at + d,
                bias,
                bias_at + d,
                has_bias,
                left,
                is_normed,
                weight,
                weight_at + d,
                scale,
                first,
                then,
            )
            b = _prepared(
                qkv,
                at + e,
                bias,
                bias_at + e,
                has_bias,
                left,
                is_normed,
                weight,
                weight_at + e,
                scale,
                first,
                then,
            )
            c, s = _load_part(cos, angles_at + d, left), _load_part(sin, angles_at + d, left)
            _store_part(out, out_at + d, left, subtract(multiply(a, c), multiply(b, s)))
            _store_part(out, out_at + e, left, add(multiply(b, c), multiply(a, s)))
        if kind == NORM_FULL:
            weight_at += width
        at += width
        bias_at += width
        out_at += out_stride


@numba.njit(nogil=True, error_model="numpy")
def _copy_head(
    qkv: Any,
    at: int,
    bias: Any,
    bias_at: int,
    has_bias: bool,
    width: int,
    limit: Any,
    out: Any,
    out_at: int,
) -> None:
    for d in range(0, width, LANES):
        lanes = _load_biased(qkv, at + d, bias, bias_at + d, has_bias, width - d)
        _store_part(out, out_at + d, width - d, _clip(lanes, limit))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _prepare_qkv(
    qkv: Any,
    bias: Any,
    has_bias: bool,
    cos: Any,
    sin: Any,
    slots: Any,
    kind: int,
    q_norm: Any,
    k_norm: Any,
    eps: float,
    limit: Any,
    q_out: Any,
    key_cache: Any,
    value_cache: Any,
    first: int,
    last: int,
    num_heads: int,
    num_kv_heads: int,
    width: int,
    block_size: int,
) -> None:
    """qkv (T, (H + 2 C) K), cos and sin (T, K / 2), q_out (T, H, K), caches (B, C, P, K)."""
    half = width // 2
    keys_at, values_at = num_heads * width, (num_heads + num_kv_heads) * width
    row = values_at + num_kv_heads * width
    stride = block_size * width
    for t in range(first, last):
        at = t * row
        _rotate_heads(
            qkv,
            at,
            bias,
            0,
            has_bias,
            num_heads,
            q_norm,
            kind,
            eps,
            limit,
            cos,
            sin,
            t * half,
            half,
            q_out,
            t * num_heads * width,
            width,
        )
        block, offset = slots[t] // block_size, slots[t] % block_size
        cached = block * num_kv_heads * stride + offset * width
        _rotate_heads(
            qkv,
            at + keys_at,
            bias,
            keys_at,
            has_bias,
            num_kv_heads,
            k_norm,
            kind,
            eps,
            limit,
            cos,
            sin,
            t * half,
            half,
            key_cache,
            cached,
            stride,
        )
        for head in range(num_kv_heads):
            value = values_at + head * width
            place = cached + head * stride
            _copy_head(qkv, at + value, bias, value, has_bias, width, limit, value_cache, place)

"""The small steps of a decode step between its products: norms, rotary, activation, routing, sums.

At one token these take less time than the call of a torch operation, and a layer has some twenty
of them: each is a link for a chain (`*_link`), and a function that runs that link alone. bfloat16
is the uint16 array of its bits; what is not an argument in bfloat16 is float32 all through, so
that a step rounds once, when it stores.

Every link has items of whole tokens, and may be run many times. Where its docstring names fields
of its call, the caller may set them to the addresses of other arrays of the same shapes and
formats, contiguous and aligned as well, which he then keeps alive.
"""

# T tokens, D hidden, I expert width, E experts, H query heads, C KV heads, B blocks, P block size,
# K head dim

from __future__ import annotations

import ctypes
import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.calls import Link, call_fields, run_link
from cpu_kernels.compiling import code_address

QkNorm = Literal["none", "head", "full"]
NORM_NONE, NORM_HEAD, NORM_FULL = 0, 1, 2

# Elements of an item: some microseconds of work, many times what it costs to claim it. Up to
# FEW_TOKENS tokens, a small decode step, are one item however long their rows are.
ITEM_ELEMENTS = 1 << 15
FEW_TOKENS = 4

_FLOAT32, _BFLOAT16, _FLOAT16 = np.dtype(np.float32), np.dtype(np.uint16), np.dtype(np.float16)
_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)
_HIDDEN, _CACHE = (_FLOAT32, _BFLOAT16), (_FLOAT32, _BFLOAT16, _FLOAT16)
_NORM_KINDS = {"none": NORM_NONE, "head": NORM_HEAD, "full": NORM_FULL}
_NO_WEIGHT = np.empty(0, np.float32)


class RmsNormCall(ctypes.Structure):
    """Norms as their threads see them."""

    _fields_ = (
        *call_fields("x", "weight", "out", "num_tokens", "tokens_per_item", "width"),
        ("eps", ctypes.c_double),
    )


class SiluMultiplyCall(ctypes.Structure):
    """Activations as their threads see them; a `bias` of 0 is none."""

    _fields_ = call_fields("gate_up", "bias", "out", "num_tokens", "tokens_per_item", "width")


class AddResidualCall(ctypes.Structure):
    """Sums as their threads see them; a `bias` of 0 is none."""

    _fields_ = call_fields("x", "y", "bias", "out", "num_tokens", "tokens_per_item", "width")


class RouteCall(ctypes.Structure):
    """Routing as its threads see it."""

    _fields_ = call_fields(
        "logits",
        "ids",
        "weights",
        "num_tokens",
        "tokens_per_item",
        "num_experts",
        "top_k",
        "norm_topk_prob",
    )


class PrepareQkvCall(ctypes.Structure):
    """Queries, keys and values as their threads see them; a `bias` of 0 is none."""

    _fields_ = (
        *call_fields(
            "qkv",
            "bias",
            "cos",
            "sin",
            "slots",
            "q_norm",
            "k_norm",
            "q_out",
            "key_cache",
            "value_cache",
            "num_tokens",
            "tokens_per_item",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "block_size",
            "norm_kind",
        ),
        ("eps", ctypes.c_double),
        ("limit", ctypes.c_double),
    )


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
    _run(rms_norm_link(x, weight, eps, out), num_threads)


def rms_norm_link(x: NDArray[Any], weight: NDArray[Any], eps: float, out: NDArray[Any]) -> Link:
    """Return what `rms_norm` would run; `x`, `weight` and `out` of its call may be exchanged.

    Raises
    ------
    ValueError
        As `rms_norm`.
    """
    width = x.shape[-1:]
    _check(
        (
            _Expected("x", x, _HIDDEN, (-1, *width)),
            _Expected("weight", weight, _HIDDEN, width),
            _Expected("out", out, _HIDDEN, x.shape, is_written=True),
        )
    )
    call = RmsNormCall(
        x=x.ctypes.data,
        weight=weight.ctypes.data,
        out=out.ctypes.data,
        width=width[0],
        eps=eps,
    )
    _set_items(call, *x.shape)
    return Link(_body("make_rms_norm", x, weight, out), call, (x, weight, out))


def silu_multiply(
    gate_up: NDArray[Any],
    out: NDArray[Any],
    *,
    bias: NDArray[np.float32] | None = None,
    num_threads: int = 1,
) -> None:
    """Set out = silu(gate) * up, for rows that hold gate and up side by side.

    In bfloat16 the activation is rounded before the product, as in transformers; float32 is not.

    Parameters
    ----------
    gate_up
        (T, 2 * I) float32 or uint16 (the bits of bfloat16).
    out
        (T, I) float32 or uint16, written entirely.
    bias
        (2 * I,) float32, added to every row of a float32 gate_up first; None for none.
    num_threads
        As in `rms_norm`.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together, a bias and bfloat16 among them.

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
    _run(silu_multiply_link(gate_up, out, bias=bias), num_threads)


def silu_multiply_link(
    gate_up: NDArray[Any], out: NDArray[Any], *, bias: NDArray[np.float32] | None = None
) -> Link:
    """Return what `silu_multiply` would run.

    `gate_up`, `out` and, for float32, `bias` of its call may be exchanged; a `bias` of 0 is none.

    Raises
    ------
    ValueError
        As `silu_multiply`.
    """
    out_shape = (*gate_up.shape[:1], gate_up.shape[-1] // 2) if gate_up.ndim else ()
    row = tuple(2 * width for width in out_shape[1:])
    _check(
        (
            _Expected("gate_up", gate_up, _HIDDEN, (-1, *row)),
            _Expected("out", out, _HIDDEN, out_shape, is_written=True),
        )
    )
    if bias is not None:
        _check((_Expected("bias", bias, (_FLOAT32,), row),))
        if gate_up.dtype != _FLOAT32:
            raise ValueError(
                f"gate_up is {gate_up.dtype} {gate_up.shape} but must be float32 to have a bias"
            )
    call = SiluMultiplyCall(
        gate_up=gate_up.ctypes.data,
        bias=_address(bias),
        out=out.ctypes.data,
        width=out_shape[1],
    )
    _set_items(call, *gate_up.shape)
    return Link(_body("make_silu_multiply", gate_up, out), call, (gate_up, bias, out))


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
    _run(add_residual_link(x, y, bias, out), num_threads)


def add_residual_link(
    x: NDArray[Any],
    y: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    out: NDArray[Any],
) -> Link:
    """Return what `add_residual` would run.

    `x`, `y`, `bias` and `out` of its call may be exchanged; a `bias` of 0 is none.

    Raises
    ------
    ValueError
        As `add_residual`.
    """
    width = x.shape[-1:]
    _check(
        (
            _Expected("x", x, _HIDDEN, (-1, *width)),
            _Expected("y", y, (_FLOAT32,), x.shape),
            _Expected("out", out, (x.dtype,), x.shape, is_written=True),
        )
    )
    if bias is not None:
        _check((_Expected("bias", bias, (_FLOAT32,), width),))
    call = AddResidualCall(
        x=x.ctypes.data,
        y=y.ctypes.data,
        bias=_address(bias),
        out=out.ctypes.data,
        width=width[0],
    )
    _set_items(call, *x.shape)
    return Link(_body("make_add_residual", x), call, (x, y, bias, out))


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
    _run(route_link(logits, top_k, norm_topk_prob, ids_out, weights_out), num_threads)


def route_link(
    logits: NDArray[np.float32],
    top_k: int,
    norm_topk_prob: bool,
    ids_out: NDArray[np.int64],
    weights_out: NDArray[np.float32],
) -> Link:
    """Return what `route` would run; `logits`, `ids` and `weights` of its call may be exchanged.

    Raises
    ------
    ValueError
        As `route`.
    """
    num_experts = logits.shape[-1:]
    kept = (*logits.shape[:1], top_k)
    _check(
        (
            _Expected("logits", logits, (_FLOAT32,), (-1, *num_experts)),
            _Expected("ids_out", ids_out, (_INT64,), kept, is_written=True),
            _Expected("weights_out", weights_out, (_FLOAT32,), kept, is_written=True),
        )
    )
    if not 1 <= top_k <= num_experts[0]:
        raise ValueError(f"top_k is {top_k} but must be 1 to {num_experts[0]}, the experts")
    call = RouteCall(
        logits=logits.ctypes.data,
        ids=ids_out.ctypes.data,
        weights=weights_out.ctypes.data,
        num_experts=num_experts[0],
        top_k=top_k,
        norm_topk_prob=bool(norm_topk_prob),
    )
    _set_items(call, *logits.shape)
    return Link(_body("make_route"), call, (logits, ids_out, weights_out))


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
            _Expected("positions", positions, (_INT64, _INT32), (-1,)),
            _Expected("inv_freq", inv_freq, (_FLOAT32,), (-1,)),
            _Expected("cos_out", cos_out, (_FLOAT32,), shape, is_written=True),
            _Expected("sin_out", sin_out, (_FLOAT32,), shape, is_written=True),
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
    bias: NDArray[np.float32] | None = None,
    num_threads: int = 1,
) -> None:
    """Norm, clip and rotate queries and keys; write keys and values to their places in the cache.

    A full norm comes before the clip and a norm of heads after it, as in transformers' models.
    Everything is float32 up to the store; transformers rounds to the model's format after the
    product, the norm, its scale, the rotary table and each product of the rotation.

    Parameters
    ----------
    qkv
        (T, (H + 2 * C) * K) float32: the query heads, the key heads, the value heads. Not
        changed.
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
    bias
        ((H + 2 * C) * K,) float32, added to every row of qkv first; None for none.
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
    link = prepare_qkv_link(
        qkv,
        cos,
        sin,
        slots,
        qk_norm=qk_norm,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        clip=clip,
        q_out=q_out,
        key_cache=key_cache,
        value_cache=value_cache,
        bias=bias,
    )
    _run(link, num_threads)


def prepare_qkv_link(
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
    bias: NDArray[np.float32] | None = None,
) -> Link:
    """Return what `prepare_qkv` would run.

    `qkv`, `bias`, `cos`, `sin`, `slots`, `q_norm`, `k_norm`, `q_out`, `key_cache` and `value_cache`
    of its call may be exchanged; a `bias` of 0 is none.

    The slots are checked here and never again. Whoever changes the array later, or exchanges it,
    answers for it that all are different and in the cache: a run writes wherever they point.

    Raises
    ------
    ValueError
        As `prepare_qkv`.
    """
    q_weight = _NO_WEIGHT if q_norm is None else q_norm
    k_weight = _NO_WEIGHT if k_norm is None else k_norm
    norm_kind = _NORM_KINDS[qk_norm]
    _check_qkv(
        qkv, cos, sin, slots, qk_norm, (q_weight, k_weight), q_out, key_cache, value_cache, bias
    )
    call = PrepareQkvCall(
        qkv=qkv.ctypes.data,
        bias=_address(bias),
        cos=cos.ctypes.data,
        sin=sin.ctypes.data,
        slots=slots.ctypes.data,
        q_norm=q_weight.ctypes.data,
        k_norm=k_weight.ctypes.data,
        q_out=q_out.ctypes.data,
        key_cache=key_cache.ctypes.data,
        value_cache=value_cache.ctypes.data,
        num_heads=q_out.shape[1],
        num_kv_heads=key_cache.shape[1],
        head_dim=q_out.shape[2],
        block_size=key_cache.shape[2],
        norm_kind=norm_kind,
        eps=norm_eps,
        limit=math.inf if clip is None else clip,
    )
    _set_items(call, *qkv.shape)
    body = _body("make_prepare_qkv", q_weight, k_weight, key_cache)
    keeps = (qkv, bias, cos, sin, slots, q_weight, k_weight, q_out, key_cache, value_cache)
    return Link(body, call, keeps)


class _Expected(NamedTuple):
    name: str
    array: NDArray[Any]
    formats: tuple[np.dtype[Any], ...]
    shape: tuple[int, ...]  # -1: any
    is_written: bool = False


def _check(arrays: tuple[_Expected, ...]) -> None:
    for name, array, formats, shape, is_written in arrays:
        fits = shape == array.shape or (
            len(shape) == array.ndim
            and all(wanted in (-1, size) for wanted, size in zip(shape, array.shape, strict=True))
        )
        is_plain = array.flags.c_contiguous and array.flags.aligned
        is_plain = is_plain and (array.flags.writeable or not is_written)
        if not fits or not is_plain or array.dtype not in formats:
            kind = "contiguous, aligned, writeable" if is_written else "contiguous, aligned"
            sizes = ", ".join("any" if size == -1 else str(size) for size in shape)
            raise ValueError(
                f"{name} is {array.dtype} {array.shape} with strides {array.strides}"
                f"{'' if array.flags.writeable else ', read-only'} but must be {kind} "
                f"{' or '.join(known.name for known in formats)} ({sizes})"
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
    bias: NDArray[np.float32] | None,
) -> None:
    _check(
        (
            _Expected("q_out", q_out, (_FLOAT32,), (-1, -1, -1), is_written=True),
            _Expected("key_cache", key_cache, _CACHE, (-1, -1, -1, *q_out.shape[2:]), True),
            _Expected("value_cache", value_cache, (key_cache.dtype,), key_cache.shape, True),
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
                "qkv", qkv, (_FLOAT32,), (num_tokens, (num_heads + 2 * num_kv_heads) * width)
            ),
            _Expected("cos", cos, (_FLOAT32,), (num_tokens, width // 2)),
            _Expected("sin", sin, (_FLOAT32,), (num_tokens, width // 2)),
            _Expected("slots", slots, (_INT64,), (num_tokens,)),
            _Expected("q_norm", norms[0], _HIDDEN, (q_size,)),
            _Expected("k_norm", norms[1], _HIDDEN, (k_size,)),
        )
    )
    if bias is not None:
        _check((_Expected("bias", bias, (_FLOAT32,), qkv.shape[1:]),))
    num_slots = num_blocks * block_size
    if num_tokens and not 0 <= slots.min() <= slots.max() < num_slots:
        raise ValueError(
            f"slots are {slots.min()} to {slots.max()} but must be 0 to {num_slots - 1}: "
            f"{num_blocks} blocks of {block_size} tokens"
        )


def _address(array: NDArray[Any] | None) -> int:
    return 0 if array is None else array.ctypes.data


def _body(maker: str, *arrays: NDArray[Any]) -> int:
    """Return the address of the body for the formats of these arrays."""
    return code_address("elementwise_kernels", maker, *(array.dtype.name for array in arrays))


def _set_items(call: Any, num_tokens: int, row_elements: int) -> None:
    """Give every item of a call so many tokens that it is worth claiming."""
    call.num_tokens = num_tokens
    call.tokens_per_item = max(FEW_TOKENS, ITEM_ELEMENTS // max(1, row_elements))
    call.num_items = -(-num_tokens // call.tokens_per_item)


def _run(link: Link, num_threads: int) -> None:
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads} but must be at least 1")
    run_link(link, num_threads=min(num_threads, max(1, link.call.num_items)))

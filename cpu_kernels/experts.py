"""A whole mixture-of-experts layer in one call: gate, up, activation, down, weighted sum."""

# T tokens, k choices a token, D hidden, I expert width, E experts

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.experts_kernels import (
    CALL_DTYPE,
    enter_experts,
    experts_address,
    scratch_bytes,
)
from cpu_kernels.formats import WeightFormat
from cpu_kernels.microkernels import Compute, block_tokens, computes, kernel_address
from cpu_kernels.scratch import Scratch
from cpu_kernels.threads import fork_join, openmp_address
from cpu_kernels.token_blocks import COMPUTE_NUMBERS, token_bytes

# Rows of gate and up in one item. A multiple of every group size, so that an item rounds whole
# groups of h; 128 rows of 2048 bfloat16 are half a megabyte, twice: 40 us of reading.
_ROWS_PER_ITEM = 128
_DOWN_ITEM_BYTES = 1 << 18
_PANELS_AT_ONCE = 4
# More choices are done in parts: scratch then stays at some 100 MB, and an expert of 128 still has
# 32 tokens in each, enough to be bound by arithmetic.
_MAX_CHOICES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedExperts:
    """The experts of one layer as the kernels read them.

    Parameters
    ----------
    blob
        E * `expert_bytes` bytes: every expert is the blobs of its gate (I rows), up (I rows) and
        down (D rows), one after the other, so that one expert is one copy.
    weight_format
        How all three are stored.
    num_experts, hidden, width
        E, D and I.

    Raises
    ------
    ValueError
        If the blob has another size, or is not contiguous bytes.
    """

    blob: NDArray[np.uint8]
    weight_format: WeightFormat
    num_experts: int
    hidden: int
    width: int

    def __post_init__(self) -> None:
        expected = self.num_experts * expert_bytes(self.weight_format, self.hidden, self.width)
        is_plain = self.blob.dtype == np.uint8 and self.blob.flags.c_contiguous
        if self.blob.shape != (expected,) or not is_plain:
            raise ValueError(
                f"the blob is {self.blob.dtype} {self.blob.shape} but must be contiguous uint8 "
                f"({expected},): {self.num_experts} experts"
            )


def expert_bytes(weight_format: WeightFormat, hidden: int, width: int) -> int:
    """Return the bytes of one expert: gate and up (width, hidden), down (hidden, width).

    Examples
    --------
    >>> expert_bytes(WeightFormat(kind="bfloat16"), 32, 16)  # 3 * 32 * 16 * 2
    3072
    """
    gate = weight_format.packed_bytes(width, hidden)
    return 2 * gate + weight_format.packed_bytes(hidden, width)


def run_experts(
    x: NDArray[Any],
    experts: PackedExperts,
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    *,
    compute: Compute,
    num_threads: int,
    scratch: Scratch,
    out: NDArray[np.float32],
) -> None:
    """Write the sum over each token's choices of weight * down(silu(gate(x)) * up(x)).

    Inner sums are float32 (int32 within a group for int8); h is not rounded between the products
    for compute "float", to bfloat16 for "bfloat16", to int8 for "int8". The same bits come out for
    any number of threads.

    Parameters
    ----------
    x
        (T, D) float32, or uint16 (the bits of bfloat16). Rows may lie apart, columns may not.
    experts
        The layer's experts.
    ids
        (T, k) the experts each token chose, 0..E-1.
    weights
        (T, k) how much each choice counts.
    compute
        One of `computes(experts.weight_format)`: see microkernels.py.
    num_threads
        Threads to use at most.
    scratch
        Memory of the caller; one call at a time.
    out
        (T, D) contiguous, written entirely.

    Raises
    ------
    ValueError
        If shapes, formats or memory layouts do not fit together, or an id is none of the experts.

    Examples
    --------
    >>> from cpu_kernels.formats import pack
    >>> bfloat16 = WeightFormat(kind="bfloat16")
    >>> ones = pack(np.ones((1, 1), np.float32), bfloat16)
    >>> experts = PackedExperts(blob=np.concatenate([ones, ones, ones]), weight_format=bfloat16,
    ...     num_experts=1, hidden=1, width=1)
    >>> out = np.empty((1, 1), np.float32)
    >>> run_experts(np.full((1, 1), 2, np.float32), experts, np.zeros((1, 1), np.int64),
    ...     np.ones((1, 1), np.float32), compute="float", num_threads=1, scratch=Scratch(), out=out)
    >>> round(float(out[0, 0]), 4)  # silu(2) * 2
    3.5232
    """
    is_plain = x.dtype in _X_DTYPES and x.ndim == 2 and out.dtype == _FLOAT32 and out.ndim == 2
    is_plain = is_plain and out.flags.c_contiguous and compute in computes(experts.weight_format)
    for array, dtype in ((ids, _INT64), (weights, _FLOAT32)):
        is_plain = is_plain and array.dtype == dtype and array.ndim == 2
        is_plain = is_plain and array.flags.c_contiguous
    is_plain = is_plain and out.flags.writeable and out.shape == (len(x), experts.hidden)
    is_plain = is_plain and x.shape == out.shape and ids.shape == weights.shape
    if not is_plain or num_threads < 1 or len(ids) != len(x) or ids.shape[1] == 0:
        _refuse(x, experts, ids, weights, compute, num_threads, out)
    tokens_at_once = max(1, _MAX_CHOICES // ids.shape[1])
    for first in range(0, len(x), tokens_at_once):
        part = slice(first, first + tokens_at_once)
        if not _run(
            x[part], experts, ids[part], weights[part], compute, num_threads, scratch, out[part]
        ):
            _refuse(x, experts, ids, weights, compute, num_threads, out)


def _run(
    x: NDArray[Any],
    experts: PackedExperts,
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    compute: Compute,
    num_threads: int,
    scratch: Scratch,
    out: NDArray[np.float32],
) -> bool:
    shape = _shape(
        experts.weight_format,
        experts.num_experts,
        experts.hidden,
        experts.width,
        ids.shape[1],
        compute,
    )
    calls = shape.template.copy()
    num_bytes = scratch_bytes(calls, len(x), num_threads)
    body, parallel = experts_address(x.dtype == _UINT16), openmp_address()
    address = scratch.address(num_bytes)
    if not enter_experts(
        calls, experts.blob, x, ids, weights, out, address, body, parallel, num_threads
    ):
        return False
    if parallel == 0 and num_threads > 1:
        fork_join(body, calls.ctypes.data, num_threads)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What every call with one layer shape has in common; keeps `kernel_sizes` alive."""

    template: NDArray[Any]  # one record of experts_kernels.CALL_DTYPE
    kernel_sizes: NDArray[np.int64]  # (tokens, address) of every kernel, largest first


@lru_cache(maxsize=256)
def _shape(
    weight_format: WeightFormat,
    num_experts: int,
    hidden: int,
    width: int,
    top_k: int,
    compute: Compute,
) -> _Shape:
    gate = weight_format.packed_bytes(width, hidden)
    down_at = 2 * gate
    down_panel_bytes = weight_format.panel_bytes(width)
    pairs = [(size, kernel_address(weight_format, compute, size)) for size in block_tokens(compute)]
    kernel_sizes = np.array(pairs, np.int64)
    values = {
        "hidden": hidden,
        "width": width,
        "num_experts": num_experts,
        "top_k": top_k,
        "compute": COMPUTE_NUMBERS[compute],
        "group_size": weight_format.group_size or 0,
        "panel_bytes": weight_format.panel_bytes(hidden),
        "num_groups": weight_format.num_groups(hidden),
        "down_panel_bytes": down_panel_bytes,
        "num_down_groups": weight_format.num_groups(width),
        "token_bytes": token_bytes(compute, hidden),
        "down_token_bytes": token_bytes(compute, width),
        "expert_bytes": expert_bytes(weight_format, hidden, width),
        "gate_scales_at": weight_format.scales_at(width, hidden),
        "gate_zeros_at": weight_format.zeros_at(width, hidden),
        "up_at": gate,
        "up_scales_at": gate + weight_format.scales_at(width, hidden),
        "up_zeros_at": gate + weight_format.zeros_at(width, hidden),
        "down_at": down_at,
        "down_scales_at": down_at + weight_format.scales_at(hidden, width),
        "down_zeros_at": down_at + weight_format.zeros_at(hidden, width),
        "rows_per_item": _ROWS_PER_ITEM,
        "down_panels_per_item": max(_PANELS_AT_ONCE, _DOWN_ITEM_BYTES // down_panel_bytes // 4 * 4),
        "kernel_sizes": kernel_sizes.ctypes.data,
        "num_kernel_sizes": len(pairs),
    }
    template = np.zeros(1, CALL_DTYPE)
    for name, value in values.items():
        template[name] = value
    return _Shape(template=template, kernel_sizes=kernel_sizes)


def _refuse(
    x: NDArray[Any],
    experts: PackedExperts,
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    compute: Compute,
    num_threads: int,
    out: NDArray[np.float32],
) -> NoReturn:
    """Say what does not fit."""
    num_tokens, hidden = x.shape[0], experts.hidden
    if x.shape != (num_tokens, hidden) or x.dtype.name not in ("float32", "uint16"):
        raise ValueError(
            f"x is {x.dtype} {x.shape} but must be float32 or uint16 (the bits of bfloat16), "
            f"(T, {hidden})"
        )
    if x.strides[1] != x.itemsize or x.strides[0] < 0 or x.strides[0] % x.itemsize:
        raise ValueError(
            f"x has strides {x.strides} bytes but its columns must be neighbours, {x.itemsize} "
            "bytes apart"
        )
    for name, array, dtype, shape in (
        ("ids", ids, np.dtype(np.int64), (num_tokens, ids.shape[-1])),
        ("weights", weights, np.dtype(np.float32), ids.shape),
        ("out", out, np.dtype(np.float32), x.shape),
    ):
        if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape} with strides {array.strides} but must be "
                f"contiguous {dtype} {shape}"
            )
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if ids.shape[1] == 0:
        raise ValueError(f"ids is {ids.shape} but every token must choose at least one expert")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < experts.num_experts:
        raise ValueError(
            f"ids are {ids.min()} to {ids.max()} but must be 0 to {experts.num_experts - 1}"
        )
    if compute not in computes(experts.weight_format):
        raise ValueError(
            f"compute is {compute!r} but {experts.weight_format.kind} weights can have "
            f"{computes(experts.weight_format)} on this machine"
        )
    raise ValueError(f"num_threads is {num_threads} but must be at least 1")


_FLOAT32, _UINT16, _INT64 = np.dtype(np.float32), np.dtype(np.uint16), np.dtype(np.int64)
_X_DTYPES = (_FLOAT32, _UINT16)

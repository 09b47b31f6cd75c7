"""A whole mixture-of-experts layer in one call: gate, up, activation, down, weighted sum."""

# T tokens, k choices a token, D hidden, I expert width, E experts

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.experts_kernels import (
    BLOCK_FIELDS,
    EXPERT_FIELDS,
    MAX_BLOCK_TOKENS,
    ExpertsCall,
    experts_address,
    sort_address,
)
from cpu_kernels.formats import PANEL_ROWS, WeightFormat, num_panels
from cpu_kernels.microkernels import Compute, block_tokens, computes, kernel_address
from cpu_kernels.scratch import Scratch
from cpu_kernels.threads import fork_join
from cpu_kernels.token_blocks import COMPUTE_NUMBERS, token_bytes

# Rows of gate and up in one item. A multiple of every group size, so that an item rounds whole
# groups of h; 128 rows of 2048 bfloat16 are half a megabyte, twice: 40 us of reading.
_ROWS_PER_ITEM = 128
_DOWN_ITEM_BYTES = 1 << 18


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
    out: NDArray[Any],
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
        (T, D) contiguous, of x's format, written entirely.

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
    _check(x, experts, ids, weights, compute, num_threads, out)
    num_tokens, top_k = ids.shape
    if num_tokens == 0:
        return
    shape = _shape(
        experts.weight_format, experts.num_experts, experts.hidden, experts.width, top_k, compute
    )
    call = ExpertsCall.from_buffer_copy(shape.template)
    num_choices = num_tokens * top_k
    # every expert with tokens has at most one block of each small size beside its large ones
    max_blocks = min(num_choices, num_choices // MAX_BLOCK_TOKENS + 6 * experts.num_experts)
    worker_bytes = 2 * 4 * MAX_BLOCK_TOKENS * _ROWS_PER_ITEM
    padded_hidden = num_panels(experts.hidden) * PANEL_ROWS
    call.counters_at = ctypes.addressof(call)
    call.experts = _address(experts.blob)
    call.num_tokens = num_tokens
    call.x = _address(x)
    call.x_stride = x.strides[0] // x.itemsize
    call.ids = _address(ids)
    call.weights = _address(weights)
    call.out = _address(out)
    call.worker_bytes = worker_bytes
    sizes = (
        ("order", 8 * num_choices),
        ("places", 8 * num_choices),
        ("starts", 8 * (experts.num_experts + 1)),
        ("blocks", 8 * BLOCK_FIELDS * max_blocks),
        ("chosen", 8 * EXPERT_FIELDS * min(num_choices, experts.num_experts)),
        ("x_blocks", num_choices * call.token_bytes),
        ("x_scales", num_choices * 8 * call.num_groups),
        ("h_blocks", num_choices * call.down_token_bytes),
        ("h_scales", num_choices * 8 * call.num_down_groups),
        ("products", num_choices * 4 * padded_hidden),
        ("workers", num_threads * worker_bytes),
    )
    address = scratch.address(sum(size + -size % 64 for _, size in sizes))
    for name, size in sizes:
        setattr(call, name, address)
        address += size + -size % 64
    fork_join(sort_address(), call.counters_at, 1)
    fork_join(experts_address(x.dtype == np.uint16), call.counters_at, num_threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What every call with one layer shape has in common; keeps `kernel_sizes` alive."""

    template: bytes
    kernel_sizes: Any


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
    kernel_sizes = (ctypes.c_int64 * (2 * len(pairs)))(*(n for pair in pairs for n in pair))
    call = ExpertsCall(
        hidden=hidden,
        width=width,
        num_experts=num_experts,
        top_k=top_k,
        compute=COMPUTE_NUMBERS[compute],
        group_size=weight_format.group_size or 0,
        panel_bytes=weight_format.panel_bytes(hidden),
        num_groups=weight_format.num_groups(hidden),
        down_panel_bytes=down_panel_bytes,
        num_down_groups=weight_format.num_groups(width),
        token_bytes=token_bytes(compute, hidden),
        down_token_bytes=token_bytes(compute, width),
        expert_bytes=expert_bytes(weight_format, hidden, width),
        gate_scales_at=weight_format.scales_at(width, hidden),
        gate_zeros_at=weight_format.zeros_at(width, hidden),
        up_at=gate,
        up_scales_at=gate + weight_format.scales_at(width, hidden),
        up_zeros_at=gate + weight_format.zeros_at(width, hidden),
        down_at=down_at,
        down_scales_at=down_at + weight_format.scales_at(hidden, width),
        down_zeros_at=down_at + weight_format.zeros_at(hidden, width),
        rows_per_item=_ROWS_PER_ITEM,
        down_panels_per_item=max(1, _DOWN_ITEM_BYTES // down_panel_bytes),
        kernel_sizes=ctypes.addressof(kernel_sizes),
        num_kernel_sizes=len(pairs),
    )
    return _Shape(template=bytes(call), kernel_sizes=kernel_sizes)


def _check(
    x: NDArray[Any],
    experts: PackedExperts,
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    compute: Compute,
    num_threads: int,
    out: NDArray[Any],
) -> None:
    num_tokens, hidden = x.shape[0], experts.hidden
    if x.shape != (num_tokens, hidden) or x.dtype.name not in ("float32", "uint16"):
        raise ValueError(
            f"x is {x.dtype} {x.shape} but must be float32 or uint16 (the bits of bfloat16), "
            f"(T, {hidden})"
        )
    if x.strides[1] != x.itemsize or x.strides[0] < 0:
        raise ValueError(
            f"x has strides {x.strides} bytes but its columns must be neighbours, {x.itemsize} "
            "bytes apart"
        )
    for name, array, dtype, shape in (
        ("ids", ids, np.dtype(np.int64), (num_tokens, ids.shape[-1])),
        ("weights", weights, np.dtype(np.float32), ids.shape),
        ("out", out, x.dtype, x.shape),
    ):
        if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape} with strides {array.strides} but must be "
                f"contiguous {dtype} {shape}"
            )
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < experts.num_experts:
        raise ValueError(
            f"ids are {ids.min()} to {ids.max()} but must be 0 to {experts.num_experts - 1}"
        )
    if compute not in computes(experts.weight_format):
        raise ValueError(
            f"compute is {compute!r} but {experts.weight_format.kind} weights can have "
            f"{computes(experts.weight_format)} on this machine"
        )
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads} but must be at least 1")


def _address(array: NDArray[Any]) -> int:
    if array.flags.writeable and array.flags.c_contiguous:
        return ctypes.addressof(_START.from_buffer(array))  # type: ignore[arg-type]
    return int(array.ctypes.data)


_START = ctypes.c_char * 0

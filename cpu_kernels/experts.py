"""A whole mixture-of-experts layer in one call: gate, up, activation, down, weighted sum."""

# T tokens, k choices a token, D hidden, I expert width, E experts

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.calls import Chain, Link, call_fields
from cpu_kernels.compiling import code_address
from cpu_kernels.formats import PANEL_ROWS, WeightFormat
from cpu_kernels.microkernels import (
    COMPUTE_NUMBERS,
    MAX_BLOCK_TOKENS,
    Compute,
    block_tokens,
    computes,
    kernel_address,
    token_bytes,
)
from cpu_kernels.scratch import ALIGNMENT, Scratch

# Rows of gate and up in one item. A multiple of every group size, so that an item rounds whole
# groups of h; 128 rows of 2048 bfloat16 are half a megabyte, twice: 40 us of reading.
_ROWS_PER_ITEM = 128
_DOWN_ITEM_BYTES = 1 << 18
_PANELS_AT_ONCE = 4
# Tokens that need more scratch are done in parts, each of which reads its experts again. What 2048
# tokens need where x and h are bfloat16, int8 (groups of 32), float32:
#   Qwen3-30B-A3B (D 2048, I 768, 8 of 128)   217   184   305 MiB
#   Mixtral-8x7B  (D 4096, I 14336, 2 of 8)   208   154   352 MiB
#   DeepSeek-V3   (D 7168, I 2048, 8 of 256)  737   629  1025 MiB
# DeepSeek's are then 3 to 5 parts, in which an expert has 13 to 21 tokens: fewer would leave the
# products bound by the reading of weights. A `Scratch` that grew to this holds a quarter more.
_PART_BYTES = 1 << 28

# A block: its first choice, how many, and the address of the kernel for as many.
BLOCK_FIELDS = 3
# An expert that was chosen: its number, its first block, how many.
EXPERT_FIELDS = 3
# The id of a choice that is of no expert, and where it lies among the sorted ones.
NO_EXPERT, NO_PLACE = -1, -1
# What a `SortCall` has found.
SORTED, NO_SUCH_EXPERT = 0, 1


class ExpertsCall(ctypes.Structure):
    """A part of a layer as its threads see it: addresses, sizes, where parts of scratch begin."""

    _fields_ = call_fields(
        # shapes and formats
        "hidden",
        "width",
        "num_experts",
        "top_k",
        "compute",
        "group_size",
        "panel_bytes",
        "num_groups",
        "down_panel_bytes",
        "num_down_groups",
        "token_bytes",
        "down_token_bytes",
        "expert_bytes",
        "gate_scales_at",
        "gate_zeros_at",
        "up_at",
        "up_scales_at",
        "up_zeros_at",
        "down_at",
        "down_scales_at",
        "down_zeros_at",
        "rows_per_item",
        "down_panels_per_item",
        "kernel_sizes",
        "num_kernel_sizes",
        # arrays of all tokens, and which of them are this part's
        "experts",
        "x",
        "x_stride",
        "weights",
        "out",
        "first_token",
        "num_tokens",
        # scratch
        "order",
        "places",
        "starts",
        "chosen",
        "blocks",
        "x_blocks",
        "x_scales",
        "h_blocks",
        "h_scales",
        "products",
        "workers",
        "worker_bytes",
        # set by the link before, as is num_items
        "num_blocks",
        "num_chosen",
        "num_prepared",
    )


class SortCall(ctypes.Structure):
    """What sorts a part's choices for its `ExpertsCall`."""

    # `lowest` and `highest` of the part's ids
    _fields_ = call_fields("ids", "experts_call", "state", "lowest", "highest")


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
        (T, k) the experts each token chose, 0..E-1, or -1: a choice of no expert, which adds
        nothing and of which nothing is read. A token that has no other gets zeros.
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
        If shapes, formats or memory layouts do not fit together, or an id is neither an expert's
        nor -1.

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
    links = experts_links(
        x,
        experts,
        ids,
        weights,
        compute=compute,
        num_threads=num_threads,
        scratch=scratch,
        out=out,
    )
    Chain(links, num_threads=num_threads).run()
    check_experts(links)


def experts_links(
    x: NDArray[Any],
    experts: PackedExperts,
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    *,
    compute: Compute,
    num_threads: int,
    scratch: Scratch,
    out: NDArray[np.float32],
) -> tuple[Link, ...]:
    """Return what `run_experts` would run, for a chain of up to `num_threads` threads.

    A pair of links for each part of the tokens: one with a `SortCall`, whose single item sorts the
    part's choices by expert, and one with an `ExpertsCall`, which does the work. There is one pair
    unless the scratch of all tokens would exceed 256 MiB: some 2400 tokens of Qwen3-30B-A3B in
    bfloat16, 500 of DeepSeek-V3 in float32. A chain takes all of them in this order, with nothing
    between them that uses `scratch`.

    Arrays are read when the chain runs, so an earlier link of it may write them. `call.ids` of
    every sort, and `call.x`, `call.weights` and `call.out` of all others, may be set to other
    arrays of all T tokens with the same shapes and strides.

    An id of -1 is a choice of no expert, as in `run_experts`. A chain cannot raise: where an id is
    of neither kind, the part's rows of out are not written, and `check_experts` says so.

    Raises
    ------
    ValueError
        As `run_experts`, but for the ids.
    """
    _check(x, experts, ids, weights, compute, num_threads, out)
    num_tokens, top_k = ids.shape
    shape = _shape(
        experts.weight_format, experts.num_experts, experts.hidden, experts.width, top_k, compute
    )
    # whatever the threads, on which no bit of the result may depend
    whole = _scratch_sizes(shape.template, num_tokens, num_threads=0)
    num_parts = max(1, min(num_tokens, -(-sum(whole.values()) // _PART_BYTES)))
    tokens_at_once = -(-num_tokens // num_parts)
    sizes = _scratch_sizes(shape.template, tokens_at_once, num_threads)
    memory = scratch.take(sum(sizes.values()))  # parts run one after the other
    keeps = (x, experts, ids, weights, out, memory, shape)
    bodies = (
        code_address("experts_kernels", "make_sort"),
        code_address("experts_kernels", "make_experts", x.dtype == _UINT16),
    )
    links: list[Link] = []
    for first in range(0, max(1, num_tokens), max(1, tokens_at_once)):
        call = ExpertsCall.from_buffer_copy(shape.template)
        call.experts = experts.blob.ctypes.data
        call.x, call.x_stride = x.ctypes.data, x.strides[0] // x.itemsize
        call.weights, call.out = weights.ctypes.data, out.ctypes.data
        call.first_token = first
        call.num_tokens = min(tokens_at_once, num_tokens - first)
        at = memory.ctypes.data
        for name, num_bytes in sizes.items():
            setattr(call, name, at)
            at += num_bytes
        sort = SortCall(
            num_items=min(1, num_tokens),
            ids=ids.ctypes.data,
            experts_call=ctypes.addressof(call),
            state=SORTED,
        )
        links += [Link(bodies[0], sort, (call, *keeps)), Link(bodies[1], call, keeps)]
    return tuple(links)


def check_experts(links: Iterable[Link]) -> None:
    """Raise what `run_experts` would, after a chain with these links has run.

    Parameters
    ----------
    links
        What `experts_links` returned; others are passed over.

    Raises
    ------
    ValueError
        If an id was neither an expert's nor -1.

    Examples
    --------
    >>> check_experts(())
    """
    sorts = [link.call for link in links if isinstance(link.call, SortCall)]
    for sort in sorts:
        if sort.state == NO_SUCH_EXPERT:
            last = ExpertsCall.from_address(sort.experts_call).num_experts - 1
            raise ValueError(
                f"ids are {sort.lowest} to {sort.highest} but must be 0 to {last}, or {NO_EXPERT} "
                "for no expert"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What every call with one layer shape has in common; keeps `kernel_sizes` alive."""

    template: ExpertsCall
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
    template = ExpertsCall(
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
        worker_bytes=2 * 4 * MAX_BLOCK_TOKENS * _ROWS_PER_ITEM,
        down_panels_per_item=max(_PANELS_AT_ONCE, _DOWN_ITEM_BYTES // down_panel_bytes // 4 * 4),
        kernel_sizes=kernel_sizes.ctypes.data,
        num_kernel_sizes=len(pairs),
    )
    return _Shape(template=template, kernel_sizes=kernel_sizes)


def _scratch_sizes(call: ExpertsCall, num_tokens: int, num_threads: int) -> dict[str, int]:
    """Bytes of each part of scratch, whole cache lines, in the order in which they lie."""
    num_choices = num_tokens * call.top_k
    padded_hidden = -(-call.hidden // PANEL_ROWS) * PANEL_ROWS
    sizes = {
        "order": 8 * num_choices,
        "places": 8 * num_choices,
        "starts": 8 * (call.num_experts + 1),
        "chosen": 8 * EXPERT_FIELDS * min(num_choices, call.num_experts),
        "blocks": 8 * BLOCK_FIELDS * num_choices,
        "x_blocks": num_choices * call.token_bytes,
        "x_scales": num_choices * 8 * call.num_groups,
        "h_blocks": num_choices * call.down_token_bytes,
        "h_scales": num_choices * 8 * call.num_down_groups,
        "products": num_choices * 4 * padded_hidden,
        "workers": num_threads * call.worker_bytes,
    }
    return {name: -(-size // ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}


def _check(
    x: NDArray[Any],
    experts: PackedExperts,
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    compute: Compute,
    num_threads: int,
    out: NDArray[np.float32],
) -> None:
    """Refuse what does not fit; the common case is found in few steps."""
    is_plain = x.dtype in _X_DTYPES and x.ndim == 2 and out.dtype == _FLOAT32
    for array, dtype in ((ids, _INT64), (weights, _FLOAT32)):
        is_plain = is_plain and array.dtype == dtype and array.ndim == 2
        is_plain = is_plain and array.flags.c_contiguous
    is_plain = is_plain and out.flags.c_contiguous and out.flags.writeable
    is_plain = is_plain and x.shape == out.shape and x.shape[1] == experts.hidden
    is_plain = is_plain and (x.size == 0 or _has_plain_rows(x))
    is_plain = is_plain and ids.shape == weights.shape and len(ids) == len(x) and ids.shape[1] > 0
    if is_plain and num_threads >= 1 and compute in computes(experts.weight_format):
        return
    num_tokens, hidden = x.shape[0], experts.hidden
    if x.shape != (num_tokens, hidden) or x.dtype.name not in ("float32", "uint16"):
        raise ValueError(
            f"x is {x.dtype} {x.shape} but must be float32 or uint16 (the bits of bfloat16), "
            f"(T, {hidden})"
        )
    if x.size != 0 and not _has_plain_rows(x):
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
    if compute not in computes(experts.weight_format):
        raise ValueError(
            f"compute is {compute!r} but {experts.weight_format.kind} weights can have "
            f"{computes(experts.weight_format)} on this machine"
        )
    raise ValueError(f"num_threads is {num_threads} but must be at least 1")


def _has_plain_rows(x: NDArray[Any]) -> bool:
    """Whether columns are neighbours and rows whole elements apart."""
    return x.strides[1] == x.itemsize and x.strides[0] >= 0 and x.strides[0] % x.itemsize == 0


_FLOAT32, _UINT16, _INT64 = np.dtype(np.float32), np.dtype(np.uint16), np.dtype(np.int64)
_X_DTYPES = (_FLOAT32, _UINT16)

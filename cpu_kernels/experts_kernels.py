"""The compiled loops of `experts.py`: they check nothing and allocate nothing.

A *choice* is one (token, chosen expert) pair. Choices are sorted by expert; neighbours of one
expert form blocks of as many tokens as a microkernel takes. Phases, each a range of work items:

1. `prepare`: a block's tokens as the kernels read them,
2. `gate_up`: some rows of one expert's gate and up for all its blocks, the activation, and the
   result as the kernels of `down` read it,
3. `down`: some rows of one expert's down for all its blocks,
4. `combine`: a token's choices, weighted and added in the order of choice.
"""

# T tokens, k choices a token, N = T * k choices, D hidden, I expert width, E experts

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numba
import numpy as np

from cpu_kernels.compiling import compile_body, compiled_address, source_stamp
from cpu_kernels.elementwise_kernels import silu
from cpu_kernels.formats import PANEL_ROWS
from cpu_kernels.microkernels import MAX_BLOCK_TOKENS
from cpu_kernels.panel_ops import call_kernel, call_on_threads
from cpu_kernels.scratch import ALIGNMENT
from cpu_kernels.simd import (
    LANES,
    add,
    load,
    multiply,
    pointer_at,
    splat,
    store,
    store_first,
)
from cpu_kernels.token_blocks import write_columns
from cpu_kernels.work_items import Counters, claim_item, claim_worker, finish_item, wait_for

# A block: its first choice, how many, and the address of the kernel for as many.
BLOCK_FIELDS = 3
# An expert that was chosen: its number, its first block, how many.
EXPERT_FIELDS = 3
_PREPARE, _GATE_UP, _DOWN = 0, 1, 2


class ExpertsCall(ctypes.Structure):
    """One call as its threads see it: addresses, sizes, and where each part of scratch begins."""

    _fields_ = (
        ("counters", Counters),
        *(
            (name, ctypes.c_int64)
            for name in [
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
                # this call
                "counters_at",
                "experts",
                "num_tokens",
                "x",
                "x_stride",
                "ids",
                "weights",
                "out",
                # scratch
                "order",
                "places",
                "starts",
                "blocks",
                "chosen",
                "x_blocks",
                "x_scales",
                "h_blocks",
                "h_scales",
                "products",
                "workers",
                "worker_bytes",
                # found by `sort`
                "num_blocks",
                "num_chosen",
                "num_prepared",
            ]
        ),
    )


def experts_address(x_is_bfloat16: bool) -> int:
    """Return the address of `void experts(ExpertsCall *)` for a format of x."""
    return compiled_address(_compiled_experts, x_is_bfloat16)


@cache
def _compiled_experts(x_is_bfloat16: bool) -> Any:
    x_type = np.uint16 if x_is_bfloat16 else np.float32
    stamp = source_stamp()

    @compile_body(ExpertsCall)
    def body(call_pointer: Any) -> None:
        _ = stamp
        call = numba.carray(call_pointer, 1)[0]  # type: ignore[attr-defined]
        _experts(
            call,
            pointer_at(call.x, x_type),
            pointer_at(call.weights, np.float32),
            pointer_at(call.out, np.float32),
            pointer_at(call.order, np.int64),
            pointer_at(call.places, np.int64),
            pointer_at(call.blocks, np.int64),
            pointer_at(call.chosen, np.int64),
            pointer_at(call.products, np.float32),
        )

    return body


CALL_DTYPE = np.dtype(ExpertsCall)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _aligned(num_bytes: int) -> int:
    return (num_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@numba.njit(nogil=True, error_model="numpy")
def _lay_out_scratch(call: Any, start: int, num_threads: int) -> int:
    """Give every part of scratch its place from `start` on; return where the last ends."""
    num_choices = call.num_tokens * call.top_k
    padded_hidden = (call.hidden + PANEL_ROWS - 1) // PANEL_ROWS * PANEL_ROWS
    call.order = start
    call.places = call.order + _aligned(8 * num_choices)
    call.starts = call.places + _aligned(8 * num_choices)
    call.chosen = call.starts + _aligned(8 * (call.num_experts + 1))
    call.blocks = call.chosen + _aligned(8 * EXPERT_FIELDS * min(num_choices, call.num_experts))
    call.x_blocks = call.blocks + _aligned(8 * BLOCK_FIELDS * num_choices)
    call.x_scales = call.x_blocks + _aligned(num_choices * call.token_bytes)
    call.h_blocks = call.x_scales + _aligned(num_choices * 8 * call.num_groups)
    call.h_scales = call.h_blocks + _aligned(num_choices * call.down_token_bytes)
    call.products = call.h_scales + _aligned(num_choices * 8 * call.num_down_groups)
    call.workers = call.products + _aligned(num_choices * 4 * padded_hidden)
    call.worker_bytes = 2 * 4 * MAX_BLOCK_TOKENS * call.rows_per_item
    end: int = call.workers + num_threads * call.worker_bytes
    return end


def _make_scratch_bytes() -> Any:
    stamp = source_stamp()

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def scratch_bytes(calls: Any, num_tokens: int, num_threads: int) -> int:
        """Return the bytes of scratch that a call of so many tokens needs."""
        _ = stamp
        call = calls[0]
        call.num_tokens = num_tokens
        size: int = _lay_out_scratch(call, 0, num_threads)
        return size

    return scratch_bytes


def _make_enter_experts() -> Any:
    stamp = source_stamp()

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def enter_experts(
        calls: Any,
        blob: Any,
        x: Any,
        ids: Any,
        weights: Any,
        out: Any,
        scratch: int,
        body: int,
        parallel: int,
        num_threads: int,
    ) -> bool:
        """Complete a call and run it; False, and nothing done, where an array does not fit it."""
        _ = stamp
        call = calls[0]
        num_tokens = x.shape[0]
        fits = x.shape[1] == call.hidden and x.strides[1] == x.itemsize
        fits = fits and x.strides[0] >= 0 and x.strides[0] % x.itemsize == 0
        fits = fits and ids.shape[0] == num_tokens and ids.shape[1] == call.top_k
        fits = fits and weights.shape[0] == num_tokens and weights.shape[1] == call.top_k
        fits = fits and out.shape[0] == num_tokens and out.shape[1] == call.hidden
        if not fits:
            return False
        call.experts = blob.ctypes.data
        call.counters_at = calls.ctypes.data
        call.num_tokens = num_tokens
        call.x = x.ctypes.data
        call.x_stride = x.strides[0] // x.itemsize
        call.ids = ids.ctypes.data
        call.weights = weights.ctypes.data
        call.out = out.ctypes.data
        _lay_out_scratch(call, scratch, num_threads)
        if not _sort(
            call,
            pointer_at(call.ids, np.int64),
            pointer_at(call.kernel_sizes, np.int64),
            pointer_at(call.order, np.int64),
            pointer_at(call.places, np.int64),
            pointer_at(call.starts, np.int64),
            pointer_at(call.blocks, np.int64),
            pointer_at(call.chosen, np.int64),
        ):
            return False
        if parallel != 0 or num_threads == 1:
            call_on_threads(parallel, body, call.counters_at, num_threads)
        return True

    return enter_experts


# Through numba's dispatcher, which takes an array in a tenth of the time of ctypes.
scratch_bytes = _make_scratch_bytes()
enter_experts = _make_enter_experts()


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _sort(
    call: Any,
    ids: Any,
    kernel_sizes: Any,
    order: Any,
    places: Any,
    starts: Any,
    blocks: Any,
    chosen: Any,
) -> bool:
    """Sort choices by expert, in token order within one, and cut each expert's into blocks.

    False where a choice is none of the experts.
    """
    num_choices = call.num_tokens * call.top_k
    for expert in range(call.num_experts + 1):
        starts[expert] = 0
    for choice in range(num_choices):
        if ids[choice] < 0 or ids[choice] >= call.num_experts:
            return False
        starts[ids[choice] + 1] += 1
    for expert in range(call.num_experts):
        starts[expert + 1] += starts[expert]
    for choice in range(num_choices):
        expert = ids[choice]
        place = starts[expert]
        starts[expert] = place + 1
        order[place] = choice
        places[choice] = place
    # every start has moved on to the end of its expert
    num_blocks, num_chosen, first = 0, 0, 0
    for expert in range(call.num_experts):
        end = starts[expert]
        if end > first:
            chosen[EXPERT_FIELDS * num_chosen] = expert
            chosen[EXPERT_FIELDS * num_chosen + 1] = num_blocks
            for size in range(call.num_kernel_sizes):
                tokens = kernel_sizes[2 * size]
                while end - first >= tokens:
                    blocks[BLOCK_FIELDS * num_blocks] = first
                    blocks[BLOCK_FIELDS * num_blocks + 1] = tokens
                    blocks[BLOCK_FIELDS * num_blocks + 2] = kernel_sizes[2 * size + 1]
                    num_blocks += 1
                    first += tokens
            before = chosen[EXPERT_FIELDS * num_chosen + 1]
            chosen[EXPERT_FIELDS * num_chosen + 2] = num_blocks - before
            num_chosen += 1
    call.num_blocks = num_blocks
    call.num_chosen = num_chosen
    # one token is read by every expert as it is
    call.num_prepared = 1 if call.num_tokens == 1 else num_blocks
    return True


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _experts(
    call: Any,
    x: Any,
    weights: Any,
    out: Any,
    order: Any,
    places: Any,
    blocks: Any,
    chosen: Any,
    products: Any,
) -> None:
    """Take items of the four phases until none is left."""
    row_parts = -(-call.width // call.rows_per_item)
    num_down_panels = -(-call.hidden // PANEL_ROWS)
    down_parts = -(-num_down_panels // call.down_panels_per_item)
    num_gate_up = call.num_chosen * row_parts
    num_down = call.num_chosen * down_parts
    first_gate_up = call.num_prepared
    first_down = first_gate_up + num_gate_up
    first_combine = first_down + num_down
    num_items = first_combine + call.num_tokens
    counters = call.counters_at
    worker = call.workers + claim_worker(counters) * call.worker_bytes
    item = claim_item(counters)
    while item < num_items:
        if item < first_gate_up:
            _prepare(call, x, order, blocks, item)
            finish_item(counters, _PREPARE)
        elif item < first_down:
            wait_for(counters, _PREPARE, call.num_prepared)
            index = item - first_gate_up
            first_row = index % row_parts * call.rows_per_item
            num_rows = min(call.rows_per_item, call.width - first_row)
            _gate_up(call, blocks, chosen, index // row_parts, first_row, num_rows, worker)
            finish_item(counters, _GATE_UP)
        elif item < first_combine:
            wait_for(counters, _GATE_UP, num_gate_up)
            index = item - first_down
            first_panel = index % down_parts * call.down_panels_per_item
            num_panels = min(call.down_panels_per_item, num_down_panels - first_panel)
            _down(call, blocks, chosen, index // down_parts, first_panel, num_panels)
            finish_item(counters, _DOWN)
        else:
            wait_for(counters, _DOWN, num_down)
            _combine(call, weights, out, places, products, item - first_combine)
        item = claim_item(counters)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _prepare(call: Any, x: Any, order: Any, blocks: Any, block: int) -> None:
    first = blocks[BLOCK_FIELDS * block]
    tokens = 1 if call.num_tokens == 1 else blocks[BLOCK_FIELDS * block + 1]
    scales = call.x_scales + 8 * call.num_groups * first
    for token in range(tokens):
        row = order[first + token] // call.top_k
        write_columns(
            x,
            row * call.x_stride,
            call.hidden,
            0,
            token,
            tokens,
            call.compute,
            call.group_size,
            call.x_blocks + first * call.token_bytes,
            scales,
            scales + 4 * call.num_groups * tokens,
        )


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _gate_up(
    call: Any,
    blocks: Any,
    chosen: Any,
    index: int,
    first_row: int,
    num_rows: int,
    worker: int,
) -> None:
    """Set h = silu(gate) * up for some rows of one expert."""
    expert = call.experts + chosen[EXPERT_FIELDS * index] * call.expert_bytes
    first_block = chosen[EXPERT_FIELDS * index + 1]
    first_panel = first_row // PANEL_ROWS
    num_panels = -(-num_rows // PANEL_ROWS)
    panels = expert + first_panel * call.panel_bytes
    scales = expert + first_panel * call.num_groups * 2 * PANEL_ROWS
    zeros = expert + first_panel * call.num_groups * PANEL_ROWS
    stride = call.rows_per_item
    up_at = worker + 4 * MAX_BLOCK_TOKENS * stride
    gate, up = pointer_at(worker, np.float32), pointer_at(up_at, np.float32)
    for block in range(first_block, first_block + chosen[EXPERT_FIELDS * index + 2]):
        first, tokens = blocks[BLOCK_FIELDS * block], blocks[BLOCK_FIELDS * block + 1]
        kernel = blocks[BLOCK_FIELDS * block + 2]
        prepared = 0 if call.num_tokens == 1 else first
        x = call.x_blocks + prepared * call.token_bytes
        x_scales = call.x_scales + 8 * call.num_groups * prepared
        call_kernel(
            kernel,
            panels,
            scales + call.gate_scales_at,
            zeros + call.gate_zeros_at,
            x,
            x_scales,
            worker,
            stride,
            call.hidden,
            call.group_size,
            num_panels,
        )
        call_kernel(
            kernel,
            panels + call.up_at,
            scales + call.up_scales_at,
            zeros + call.up_zeros_at,
            x,
            x_scales,
            up_at,
            stride,
            call.hidden,
            call.group_size,
            num_panels,
        )
        h_scales = call.h_scales + 8 * call.num_down_groups * first
        for token in range(tokens):
            at = token * stride
            # whole vectors: rows are padded to whole panels, whose padding gives zeros
            for row in range(at, at + num_panels * PANEL_ROWS, LANES):
                store(gate, row, multiply(silu(load(gate, row)), load(up, row)))
            write_columns(
                gate,
                at,
                num_rows,
                first_row,
                token,
                tokens,
                call.compute,
                call.group_size,
                call.h_blocks + first * call.down_token_bytes,
                h_scales,
                h_scales + 4 * call.num_down_groups * tokens,
            )


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _down(
    call: Any, blocks: Any, chosen: Any, index: int, first_panel: int, num_panels: int
) -> None:
    """Multiply some rows of one expert's down with its h."""
    expert = call.experts + chosen[EXPERT_FIELDS * index] * call.expert_bytes
    first_block = chosen[EXPERT_FIELDS * index + 1]
    stride = -(-call.hidden // PANEL_ROWS) * PANEL_ROWS
    for block in range(first_block, first_block + chosen[EXPERT_FIELDS * index + 2]):
        first = blocks[BLOCK_FIELDS * block]
        call_kernel(
            blocks[BLOCK_FIELDS * block + 2],
            expert + call.down_at + first_panel * call.down_panel_bytes,
            expert + call.down_scales_at + first_panel * call.num_down_groups * 2 * PANEL_ROWS,
            expert + call.down_zeros_at + first_panel * call.num_down_groups * PANEL_ROWS,
            call.h_blocks + first * call.down_token_bytes,
            call.h_scales + 8 * call.num_down_groups * first,
            call.products + 4 * (first * stride + first_panel * PANEL_ROWS),
            stride,
            call.width,
            call.group_size,
            num_panels,
        )


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _combine(call: Any, weights: Any, out: Any, places: Any, products: Any, token: int) -> None:
    """Weigh and add the products of one token's choices."""
    stride = -(-call.hidden // PANEL_ROWS) * PANEL_ROWS
    first = token * call.top_k
    for d in range(0, call.hidden, LANES):
        total = splat(np.float32(0))
        for choice in range(first, first + call.top_k):
            product = load(products, places[choice] * stride + d)
            total = add(total, multiply(splat(weights[choice]), product))
        if call.hidden - d >= LANES:
            store(out, token * call.hidden + d, total)
        else:
            store_first(out, token * call.hidden + d, call.hidden - d, total)

"""The compiled loops of `experts.py`: they check nothing and allocate nothing.

A *choice* is one (token, chosen expert) pair. A link of its own sorts the choices by expert;
neighbours of one expert form blocks of as many tokens as a microkernel takes. The link after it has
four phases, each a range of work items:

1. `prepare`: a block's tokens as the kernels read them,
2. `gate_up`: some rows of one expert's gate and up for all its blocks, the activation, and the
   result as the kernels of `down` read it,
3. `down`: some rows of one expert's down for all its blocks,
4. `combine`: a token's choices, weighted and added in the order of choice.
"""

# T tokens, k choices a token, N = T * k choices, D hidden, I expert width, E experts

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from cpu_kernels.compiling import Source
from cpu_kernels.elementwise_kernels import silu
from cpu_kernels.experts import (
    BLOCK_FIELDS,
    EXPERT_FIELDS,
    NO_EXPERT,
    NO_PLACE,
    NO_SUCH_EXPERT,
    SORTED,
    ExpertsCall,
    SortCall,
)
from cpu_kernels.formats import PANEL_ROWS
from cpu_kernels.microkernels import MAX_BLOCK_TOKENS
from cpu_kernels.panel_ops import call_kernel
from cpu_kernels.simd import (
    LANES,
    add,
    call_at,
    load,
    multiply,
    pointer_at,
    splat,
    store,
    store_first,
)
from cpu_kernels.token_blocks import write_columns
from cpu_kernels.work_items import finish_item, wait_for

_SORT, _EXPERTS = np.dtype(SortCall), np.dtype(ExpertsCall)
_PREPARE, _GATE_UP, _DOWN = 0, 1, 2


def make_sort() -> Source:
    """The body of a `SortCall`."""

    def sort(address: int, item: int, worker: int) -> None:
        sort_call = call_at(address, _SORT)
        call = call_at(sort_call.experts_call, _EXPERTS)
        first = 8 * call.first_token * call.top_k
        ids = pointer_at(sort_call.ids + first, np.int64)
        if _find_range(sort_call, ids, call.num_tokens * call.top_k, call.num_experts):
            _sort(
                call,
                ids,
                pointer_at(call.kernel_sizes, np.int64),
                pointer_at(call.order, np.int64),
                pointer_at(call.places, np.int64),
                pointer_at(call.starts, np.int64),
                pointer_at(call.blocks, np.int64),
                pointer_at(call.chosen, np.int64),
            )
        else:
            call.num_items = 0

    return Source(sort, num_arguments=3)


def make_experts(x_is_bfloat16: bool) -> Source:
    """The body of an `ExpertsCall` for a format of x."""
    x_type = np.uint16 if x_is_bfloat16 else np.float32
    x_bytes = 2 if x_is_bfloat16 else 4

    def experts(address: int, item: int, worker: int) -> None:
        call = call_at(address, _EXPERTS)
        first = call.first_token
        _experts(
            address,
            call,
            pointer_at(call.x + x_bytes * first * call.x_stride, x_type),
            pointer_at(call.weights + 4 * first * call.top_k, np.float32),
            pointer_at(call.out + 4 * first * call.hidden, np.float32),
            pointer_at(call.order, np.int64),
            pointer_at(call.places, np.int64),
            pointer_at(call.blocks, np.int64),
            pointer_at(call.chosen, np.int64),
            pointer_at(call.products, np.float32),
            item,
            call.workers + worker * call.worker_bytes,
        )

    return Source(experts, num_arguments=3)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _find_range(sort_call: Any, ids: Any, num_choices: int, num_experts: int) -> bool:
    """Set the state, the lowest and the highest id; return whether all are experts, or none."""
    lowest = highest = ids[0]
    for choice in range(num_choices):
        lowest = min(lowest, ids[choice])
        highest = max(highest, ids[choice])
    sort_call.lowest, sort_call.highest = lowest, highest
    are_experts = lowest >= NO_EXPERT and highest < num_experts
    sort_call.state = SORTED if are_experts else NO_SUCH_EXPERT
    return bool(are_experts)


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
) -> None:
    """Sort choices by expert, in token order within one, and cut each expert's into blocks.

    Choices of no expert have no place.
    """
    num_choices = call.num_tokens * call.top_k
    for expert in range(call.num_experts + 1):
        starts[expert] = 0
    for choice in range(num_choices):
        if ids[choice] != NO_EXPERT:
            starts[ids[choice] + 1] += 1
    for expert in range(call.num_experts):
        starts[expert + 1] += starts[expert]
    for choice in range(num_choices):
        expert = ids[choice]
        if expert == NO_EXPERT:
            places[choice] = NO_PLACE
            continue
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
    call.num_prepared = min(1, num_blocks) if call.num_tokens == 1 else num_blocks
    row_parts, down_parts = _parts(call)
    call.num_items = call.num_prepared + num_chosen * (row_parts + down_parts) + call.num_tokens


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _parts(call: Any) -> tuple[int, int]:
    """Items of one expert's gate and up, and of its down."""
    num_panels = -(-call.hidden // PANEL_ROWS)
    return -(-call.width // call.rows_per_item), -(-num_panels // call.down_panels_per_item)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _experts(
    at: int,
    call: Any,
    x: Any,
    weights: Any,
    out: Any,
    order: Any,
    places: Any,
    blocks: Any,
    chosen: Any,
    products: Any,
    item: int,
    worker_memory: int,
) -> None:
    """Do an item of one of the four phases."""
    row_parts, down_parts = _parts(call)
    num_gate_up = call.num_chosen * row_parts
    num_down = call.num_chosen * down_parts
    first_gate_up = call.num_prepared
    first_down = first_gate_up + num_gate_up
    first_combine = first_down + num_down
    if item < first_gate_up:
        _prepare(call, x, order, blocks, item)
        finish_item(at, _PREPARE)
    elif item < first_down:
        wait_for(at, _PREPARE, call.num_prepared)
        index = item - first_gate_up
        first_row = index % row_parts * call.rows_per_item
        num_rows = min(call.rows_per_item, call.width - first_row)
        _gate_up(call, blocks, chosen, index // row_parts, first_row, num_rows, worker_memory)
        finish_item(at, _GATE_UP)
    elif item < first_combine:
        wait_for(at, _GATE_UP, num_gate_up)
        index = item - first_down
        num_panels = -(-call.hidden // PANEL_ROWS)
        first_panel = index % down_parts * call.down_panels_per_item
        count = min(call.down_panels_per_item, num_panels - first_panel)
        _down(call, blocks, chosen, index // down_parts, first_panel, count)
        finish_item(at, _DOWN)
    else:
        wait_for(at, _DOWN, num_down)
        _combine(call, weights, out, places, products, item - first_combine)


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
    worker_memory: int,
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
    up_at = worker_memory + 4 * MAX_BLOCK_TOKENS * stride
    gate, up = pointer_at(worker_memory, np.float32), pointer_at(up_at, np.float32)
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
            worker_memory,
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
            if places[choice] != NO_PLACE:
                product = load(products, places[choice] * stride + d)
                total = add(total, multiply(splat(weights[choice]), product))
        if call.hidden - d >= LANES:
            store(out, token * call.hidden + d, total)
        else:
            store_first(out, token * call.hidden + d, call.hidden - d, total)

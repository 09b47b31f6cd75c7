"""The compiled loops of `linear.py`: they check nothing and allocate nothing."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from cpu_kernels.compiling import Source
from cpu_kernels.formats import PANEL_ROWS
from cpu_kernels.linear import BLOCK_FIELDS, LinearCall
from cpu_kernels.panel_ops import call_kernel
from cpu_kernels.simd import call_at, pointer_at
from cpu_kernels.token_blocks import write_columns
from cpu_kernels.work_items import finish_item, wait_for

_CALL = np.dtype(LinearCall)
_PREPARE = 0


def make_linear(x_is_bfloat16: bool) -> Source:
    """The body of a `LinearCall` for a format of x."""
    x_type = np.uint16 if x_is_bfloat16 else np.float32

    def linear(address: int, item: int, worker: int) -> None:
        call = call_at(address, _CALL)
        x, blocks = pointer_at(call.x, x_type), pointer_at(call.blocks, np.int64)
        _linear(address, call, x, blocks, item)

    return Source(linear, num_arguments=3)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _linear(at: int, call: Any, x: Any, blocks: Any, item: int) -> None:
    """Prepare a block of tokens, or multiply some panels with all of them."""
    if item < call.num_blocks:
        _prepare(call, x, blocks, item)
        finish_item(at, _PREPARE)
    else:
        wait_for(at, _PREPARE, call.num_blocks)
        num_panels = (call.num_rows + PANEL_ROWS - 1) // PANEL_ROWS
        first = (item - call.num_blocks) * call.panels_per_item
        _multiply(call, blocks, first, min(first + call.panels_per_item, num_panels))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _prepare(call: Any, x: Any, blocks: Any, block: int) -> None:
    """Write one block of tokens as the kernels read it."""
    first, tokens = blocks[BLOCK_FIELDS * block], blocks[BLOCK_FIELDS * block + 1]
    scales = call.x_scales + 8 * call.num_groups * first
    for token in range(tokens):
        write_columns(
            x,
            (first + token) * call.x_stride,
            call.num_columns,
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
def _multiply(call: Any, blocks: Any, first: int, last: int) -> None:
    """Multiply panels first..last-1 with every block of tokens."""
    num_tail_rows = call.num_rows % PANEL_ROWS
    whole = min(last, call.num_rows // PANEL_ROWS)
    panels = call.panels + first * call.panel_bytes
    scales = call.scales + first * call.num_groups * 2 * PANEL_ROWS
    zeros = call.zeros + first * call.num_groups * PANEL_ROWS
    tail_panels = call.panels + whole * call.panel_bytes
    tail_scales = call.scales + whole * call.num_groups * 2 * PANEL_ROWS
    tail_zeros = call.zeros + whole * call.num_groups * PANEL_ROWS
    out, tail = pointer_at(call.out, np.float32), pointer_at(call.tail, np.float32)
    for block in range(call.num_blocks):
        start, tokens = blocks[BLOCK_FIELDS * block], blocks[BLOCK_FIELDS * block + 1]
        kernel = blocks[BLOCK_FIELDS * block + 2]
        x = call.x_blocks + start * call.token_bytes
        x_scales = call.x_scales + 8 * call.num_groups * start
        at = start * call.out_stride + first * PANEL_ROWS
        if whole > first:
            call_kernel(
                kernel,
                panels,
                scales,
                zeros,
                x,
                x_scales,
                call.out + 4 * at,
                call.out_stride,
                call.num_columns,
                call.group_size,
                whole - first,
            )
        if last > whole:  # the last panel, some of whose rows are padding
            call_kernel(
                kernel,
                tail_panels,
                tail_scales,
                tail_zeros,
                x,
                x_scales,
                call.tail,
                PANEL_ROWS,
                call.num_columns,
                call.group_size,
                1,
            )
            row = start * call.out_stride + whole * PANEL_ROWS
            for token in range(tokens):
                for lane in range(num_tail_rows):
                    out[row + token * call.out_stride + lane] = tail[token * PANEL_ROWS + lane]

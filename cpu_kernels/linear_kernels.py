"""The compiled loops of `linear.py`: they check nothing and allocate nothing."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numba
import numpy as np

from cpu_kernels.compiling import compile_body, compiled_address, source_stamp
from cpu_kernels.formats import PANEL_ROWS
from cpu_kernels.panel_ops import call_kernel, call_on_threads
from cpu_kernels.simd import pointer_at
from cpu_kernels.token_blocks import write_columns
from cpu_kernels.work_items import Counters, claim_item, finish_item, wait_for

# A block of tokens: its first token, how many, and the address of the kernel for as many.
BLOCK_FIELDS = 3
_PREPARE = 0


class LinearCall(ctypes.Structure):
    """One call as its threads see it: addresses, sizes, and where each part of scratch begins."""

    _fields_ = (
        ("counters", Counters),
        *(
            (name, ctypes.c_int64)
            for name in [
                "panels",
                "scales",
                "zeros",
                "panel_bytes",
                "group_size",
                "num_groups",
                "num_rows",
                "num_columns",
                "counters_at",
                "compute",
                "token_bytes",
                "panels_per_item",
                "x",
                "x_stride",
                "out",
                "out_stride",
                "blocks",
                "num_blocks",
                "x_blocks",
                "x_scales",
                "tail",
                # within the blob, and of one token
                "scales_at",
                "zeros_at",
                "token_scale_bytes",
            ]
        ),
    )


def linear_address(x_is_bfloat16: bool) -> int:
    """Return the address of `void linear(LinearCall *)` for a format of x."""
    return compiled_address(_compiled_linear, x_is_bfloat16)


@cache
def _compiled_linear(x_is_bfloat16: bool) -> Any:
    x_type = np.uint16 if x_is_bfloat16 else np.float32
    stamp = source_stamp()

    @compile_body(LinearCall)
    def body(call_pointer: Any) -> None:
        _ = stamp
        call = numba.carray(call_pointer, 1)[0]  # type: ignore[attr-defined]
        _linear(call, pointer_at(call.x, x_type), pointer_at(call.blocks, np.int64))

    return body


CALL_DTYPE = np.dtype(LinearCall)


def _make_enter_linear() -> Any:
    stamp = source_stamp()

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def enter_linear(
        calls: Any,
        blob: Any,
        x: Any,
        out: Any,
        blocks: Any,
        scratch: int,
        body: int,
        parallel: int,
        num_threads: int,
    ) -> bool:
        """Complete a call and run it; False, and nothing done, where x or out do not fit it."""
        _ = stamp
        call = calls[0]
        num_tokens = x.shape[0]
        fits = x.shape[1] == call.num_columns and x.strides[1] == x.itemsize and x.strides[0] >= 0
        fits = fits and out.shape[0] == num_tokens and out.shape[1] == call.num_rows
        fits = fits and x.strides[0] % x.itemsize == 0 and out.strides[0] % 4 == 0
        if not (fits and out.strides[1] == 4 and out.strides[0] >= 0):
            return False
        start = blob.ctypes.data
        call.panels = start
        call.scales = start + call.scales_at
        call.zeros = start + call.zeros_at
        call.counters_at = calls.ctypes.data
        call.x = x.ctypes.data
        call.x_stride = x.strides[0] // x.itemsize
        call.out = out.ctypes.data
        call.out_stride = out.strides[0] // 4
        call.blocks = blocks.ctypes.data
        call.num_blocks = blocks.shape[0]
        call.x_blocks = scratch
        call.x_scales = scratch + num_tokens * call.token_bytes
        call.tail = call.x_scales + num_tokens * call.token_scale_bytes
        if parallel != 0 or num_threads == 1:
            call_on_threads(parallel, body, call.counters_at, num_threads)
        return True

    return enter_linear


# Takes a tenth of the time of ctypes: arrays cost it 0.1 us each instead of 1.
enter_linear = _make_enter_linear()


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _linear(call: Any, x: Any, blocks: Any) -> None:
    """Prepare blocks of tokens, then multiply panels with all of them, until no item is left."""
    num_panels = (call.num_rows + PANEL_ROWS - 1) // PANEL_ROWS
    num_items = call.num_blocks + -(-num_panels // call.panels_per_item)
    item = claim_item(call.counters_at)
    while item < num_items:
        if item < call.num_blocks:
            _prepare(call, x, blocks, item)
            finish_item(call.counters_at, _PREPARE)
        else:
            wait_for(call.counters_at, _PREPARE, call.num_blocks)
            first = (item - call.num_blocks) * call.panels_per_item
            _multiply(call, blocks, first, min(first + call.panels_per_item, num_panels))
        item = claim_item(call.counters_at)


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

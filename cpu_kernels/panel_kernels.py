"""The compiled products of `microkernels.py`."""

# M tokens of a block, K columns, G groups

from __future__ import annotations

from cpu_kernels.compiling import Source
from cpu_kernels.microkernels import Blocking, Compute, blocking
from cpu_kernels.panel_ops import (
    BFLOAT16,
    BFLOAT16_PAIRS,
    FLOAT32,
    INT4,
    INT8,
    add_byte_steps,
    add_scaled_step,
    add_steps,
    fold_group,
    prefetch_at,
    start_int_sums,
    store_sums,
    zero_sums,
)

_STEP_KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8, "int4": INT4}
_ZERO_CODES = {"int8": 128, "int4": 8}
# x that belongs to a step, in words of 4 bytes a token: float32 values, or pairs of bfloat16
_X_WORDS = {FLOAT32: 1, BFLOAT16: 2, BFLOAT16_PAIRS: 1, INT8: 4, INT4: 8}


def make_kernel(kind: str, has_zeros: bool, compute: Compute, num_tokens: int) -> Source:
    """The product of so many tokens with panels of a format."""
    walk = blocking(compute, num_tokens)
    if compute == "int8":
        zero_code = 0 if has_zeros else _ZERO_CODES[kind]
        return _byte_kernel(_STEP_KINDS[kind], zero_code, num_tokens, walk)
    if kind in _ZERO_CODES:
        zero_code = 0 if has_zeros else _ZERO_CODES[kind]
        return _scaled_kernel(_STEP_KINDS[kind], zero_code, num_tokens, walk)
    step_kind = BFLOAT16_PAIRS if compute == "bfloat16" else _STEP_KINDS[kind]
    return _plain_kernel(step_kind, num_tokens, walk)


def _plain_kernel(kind: int, tokens: int, walk: Blocking) -> Source:
    """A format without scales."""
    at_once, ahead, ways = walk.panels, walk.ahead, walk.ways
    columns = 1 if kind == FLOAT32 else 2
    x_step = 4 * tokens * _X_WORDS[kind]
    unroll = max(1, ways // _X_WORDS[kind])

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        steps = (num_columns + columns - 1) // columns
        panel_bytes = 64 * steps
        panel = 0
        while at_once > 1 and num_panels - panel >= at_once:
            sums = zero_sums(tokens, at_once, 1)
            at, x_at = panels + panel * panel_bytes, x
            last = at + panel_bytes - ahead
            for _step in range(steps):
                # at the end of a panel, the start of the one that this stream goes on with
                far = ahead if at < last else ahead + (at_once - 1) * panel_bytes
                sums = add_steps(sums, kind, 1, at, panel_bytes, far, x_at)
                at += 64
                x_at += x_step
            store_sums(y + 64 * panel, 4 * y_stride, sums)
            panel += at_once
        while panel < num_panels:
            rest = zero_sums(tokens, 1, ways)
            at, x_at = panels + panel * panel_bytes, x
            for _steps in range(steps // unroll):
                rest = add_steps(rest, kind, unroll, at, panel_bytes, 0, x_at)
                at += 64 * unroll
                x_at += x_step * unroll
            for _step in range(steps % unroll):
                rest = add_steps(rest, kind, 1, at, panel_bytes, 0, x_at)
                at += 64
                x_at += x_step
            store_sums(y + 64 * panel, 4 * y_stride, rest)
            panel += 1

    return Source(kernel, num_arguments=10)


def _scaled_kernel(kind: int, zero_code: int, tokens: int, walk: Blocking) -> Source:
    """Codes widened to float32: bound by the widening where tokens are few, so panel by panel."""
    ways = walk.ways
    columns = 4 if kind == INT8 else 8
    x_step = 4 * tokens * columns

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        at, scale_at, zero_at = panels, scales, zeros
        for panel in range(num_panels):
            sums = zero_sums(tokens, 1, ways)
            x_at = x
            for first in range(0, num_columns, group_size):
                count = min(group_size, num_columns - first)
                for _step in range((count + columns - 1) // columns):
                    sums = add_scaled_step(sums, kind, zero_code, at, scale_at, zero_at, x_at)
                    at += 64
                    x_at += x_step
                scale_at += 32
                zero_at += 16
            store_sums(y + 64 * panel, 4 * y_stride, sums)

    return Source(kernel, num_arguments=10)


def _byte_kernel(kind: int, zero_code: int, tokens: int, walk: Blocking) -> Source:
    """Codes and x in int8: exact in int32 within a group, then scaled."""
    at_once, ahead, ways = walk.panels, walk.ahead, walk.ways
    columns = 4 if kind == INT8 else 8
    x_word = 4 * tokens
    x_step = x_word * columns // 4
    unroll = max(1, ways * 4 // columns)

    def kernel(
        panels: int,
        scales: int,
        zeros: int,
        x: int,
        x_scales: int,
        y: int,
        y_stride: int,
        num_columns: int,
        group_size: int,
        num_panels: int,
    ) -> None:
        groups = (num_columns + group_size - 1) // group_size
        panel_bytes = 64 * ((num_columns + columns - 1) // columns)
        x_sums = x_scales + groups * x_word
        panel = 0
        while at_once > 1 and num_panels - panel >= at_once:
            totals = zero_sums(tokens, at_once, 1)
            at, x_at, group_at = panels + panel * panel_bytes, x, 0
            last = at + panel_bytes - ahead
            scale_at = scales + panel * groups * 32
            zero_at = zeros + panel * groups * 16
            for first in range(0, num_columns, group_size):
                sums = start_int_sums(
                    tokens, at_once, 1, zero_code, zero_at, groups, x_sums + group_at
                )
                count = min(group_size, num_columns - first)
                # At the end of a panel, the start of the one that this stream goes on with; and
                # the scales of these, a stream of its own.
                far = ahead if at < last else ahead + (at_once - 1) * panel_bytes
                for next_panel in range(at_once):
                    prefetch_at(scale_at + (at_once + next_panel) * groups * 32)
                for _step in range((count + columns - 1) // columns):
                    sums = add_byte_steps(sums, kind, 1, at, panel_bytes, far, x_at)
                    at += 64
                    x_at += x_step
                totals = fold_group(totals, sums, scale_at, groups, x_scales + group_at)
                scale_at += 32
                zero_at += 16
                group_at += x_word
            store_sums(y + 64 * panel, 4 * y_stride, totals)
            panel += at_once
        while panel < num_panels:
            rest = zero_sums(tokens, 1, 1)
            at, x_at, group_at = panels + panel * panel_bytes, x, 0
            scale_at = scales + panel * groups * 32
            zero_at = zeros + panel * groups * 16
            for first in range(0, num_columns, group_size):
                part = start_int_sums(
                    tokens, 1, ways, zero_code, zero_at, groups, x_sums + group_at
                )
                count = min(group_size, num_columns - first)
                steps = (count + columns - 1) // columns
                for _steps in range(steps // unroll):
                    part = add_byte_steps(part, kind, unroll, at, panel_bytes, 0, x_at)
                    at += 64 * unroll
                    x_at += x_step * unroll
                for _step in range(steps % unroll):
                    part = add_byte_steps(part, kind, 1, at, panel_bytes, 0, x_at)
                    at += 64
                    x_at += x_step
                rest = fold_group(rest, part, scale_at, groups, x_scales + group_at)
                scale_at += 32
                zero_at += 16
                group_at += x_word
            store_sums(y + 64 * panel, 4 * y_stride, rest)
            panel += 1

    return Source(kernel, num_arguments=10)

"""Kernels for CUDA that multiply with quantised panels as they lie in the host's memory.

A panel (cpu_kernels/formats.py) is a run of 64-byte steps, one 32-bit word a row: neighbouring
threads read neighbouring words, so the layout of the CPU's kernels is read at the full width of
GPU memory too, and nothing is packed anew. The code at place j of a word of step s is of column
`columns of a step * s + j`.

Codes less their zero are whole numbers of 8 bits, exact in bfloat16: they are multiplied as such,
summed in float32, and each group's sum is multiplied with its scale. No weight is ever rounded.
"""

# T tokens of a tile, K columns, R rows of a matrix, S steps of a group, G groups, L 16 rows of a
# panel, J codes of a word, E experts

# Kernels are no Python: their arguments are pointers, numbers on the device, and constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from cpu_kernels.formats import PANEL_ROWS, STEP_BYTES, WeightFormat
from hetero.model.quantised import Panels

# A group's steps are the columns of one product of tiles, of which tensor cores take 16 at least.
_GROUP_SIZE = 128
# Words that a block of threads has on their way in a product of one token: 16 for each of 128.
_WORDS_AT_ONCE = 2048
_FEW_TOKENS, _MANY_TOKENS = 16, 64
_ROWS_BY_FEW, _ROWS_BY_MANY = 32, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """A kernel, the tokens and rows of one of its tiles, and its constants."""

    kernel: Any
    tokens: int
    rows: int
    constants: dict[str, int]

    @classmethod
    def of(cls, format_: WeightFormat, num_tokens: int, num_experts: int | None) -> Tiling:
        """For tokens of so many experts, or of one matrix for all."""
        assert format_.group_size == _GROUP_SIZE
        steps = _GROUP_SIZE // format_.columns_per_step
        constants = {
            "STEPS": steps,
            "PLACES": format_.columns_per_step,
            "ZERO": format_.zero_code,
            "IS_BY_EXPERT": num_experts is not None,
        }
        # Where hardly two tokens share a matrix nothing is gained by reading it for both.
        if num_tokens <= (1 if num_experts is None else num_experts // 2):
            constants["GROUPS"] = _WORDS_AT_ONCE // (steps * PANEL_ROWS)
            return cls(kernel=_one_token, tokens=1, rows=PANEL_ROWS, constants=constants)
        is_few = num_tokens <= _FEW_TOKENS * (num_experts or 1)
        tokens = _FEW_TOKENS if is_few else _MANY_TOKENS
        rows = _ROWS_BY_FEW if is_few else _ROWS_BY_MANY
        constants |= {"TILE_TOKENS": tokens, "TILE_ROWS": rows}
        return cls(kernel=_many_tokens, tokens=tokens, rows=rows, constants=constants)


def multiply_panels(x_TK: Tensor, panels: Panels) -> Tensor:
    """x W^T of the matrices of one expert, side by side, in the format of x."""
    return _multiply(x_TK, panels, None)


def multiply_panels_by_expert(x_NK: Tensor, panels: Panels, ends_E: Tensor) -> Tensor:
    """Each expert's rows by its matrices; rows behind the last end are left as they are."""
    return _multiply(x_NK, panels, ends_E)


def _multiply(x: Tensor, panels: Panels, ends_E: Tensor | None) -> Tensor:
    num_tokens, out = len(x), x.new_empty(len(x), panels.num_outputs)
    if not num_tokens:
        return out
    format_, num_columns = panels.weight_format, panels.num_columns
    tiling = Tiling.of(format_, num_tokens, None if ends_E is None else len(ends_E))
    tiles, num_tiles = (out, out, out), -(-num_tokens // tiling.tokens)
    if ends_E is not None:
        tiles = _tiles(ends_E, num_tokens, tiling.tokens)
        num_tiles = len(tiles[0])
    num_blocks = -(-panels.num_rows // tiling.rows)
    num_groups = format_.num_groups(num_columns)
    is_whole = tiling.kernel is _one_token
    tiling.kernel[num_tiles, panels.num_matrices * num_blocks](
        x.contiguous() if is_whole else _by_place(x, num_groups, format_.columns_per_step),
        panels.blobs_EB.view(torch.int32),
        panels.blobs_EB.view(torch.int16),
        out,
        *tiles,
        num_tokens,
        panels.num_rows,
        num_columns,
        format_.panel_bytes(num_columns) // STEP_BYTES,
        num_groups,
        panels.blobs_EB.stride(0) // STEP_BYTES,
        panels.blob_bytes // STEP_BYTES,
        format_.scales_at(panels.num_rows, num_columns) // STEP_BYTES,
        num_blocks,
        **tiling.constants,
        # Tiles of float32 are twice as large: three at a time outgrow the memory that they share.
        num_stages=2 if x.dtype == torch.float32 else 3,
        enable_fp_fusion=True,  # releases differ in what they do unasked
    )
    return out


def _tiles(ends_E: Tensor, num_rows: int, tile_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert, first and last token of each tile of tokens sorted by expert; int32, on the device.

    Every expert's last tile may be filled in part, so that there may be one more for each. How many
    there are only the device knows: tiles that are too many end where they begin, or before.
    """
    num_experts = len(ends_E)
    count = min(num_rows, num_rows // tile_tokens + num_experts)
    starts_E = F.pad(ends_E[:-1], (1, 0))
    tiles_E = (ends_E - starts_E + (tile_tokens - 1)) // tile_tokens
    last_E = tiles_E.cumsum(0, dtype=torch.int32)
    numbers = torch.arange(count, dtype=torch.int32, device=ends_E.device)
    experts = torch.searchsorted(last_E, numbers, right=True).clamp_(max=num_experts - 1)
    starts = starts_E[experts] + (numbers - (last_E - tiles_E)[experts]) * tile_tokens
    ends = torch.minimum(ends_E[experts], starts + tile_tokens)
    return experts.int(), starts.int(), ends.int()


def _by_place(x_TK: Tensor, num_groups: int, num_places: int) -> Tensor:
    """Columns of a group in the order (place in a word, step), filled up with zeros."""
    padded = F.pad(x_TK, (0, num_groups * _GROUP_SIZE - x_TK.shape[1]))
    steps = padded.view(len(x_TK), num_groups, -1, num_places)
    return steps.transpose(2, 3).reshape(len(x_TK), -1)


# Arguments that are not compiled into a kernel: models have too many shapes.
SIZES = (
    "num_tokens",
    "num_rows",
    "num_columns",
    "num_steps",
    "num_groups",
    "expert_lines",
    "matrix_lines",
    "scales_line",
    "blocks",
)


@triton.jit
def _code(words, place: tl.constexpr, PLACES: tl.constexpr, ZERO: tl.constexpr):
    """The codes at a place of 32-bit words, less their zero."""
    shift: tl.constexpr = 8 * (place % 4) + 4 * (place // 4)
    mask: tl.constexpr = 255 if PLACES == 4 else 15
    return ((words >> shift) & mask) - ZERO


@triton.jit(do_not_specialize=SIZES)
def _one_token(
    x_ptr,
    words_ptr,
    scales_ptr,
    out_ptr,
    tile_experts_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    num_tokens,
    num_rows,
    num_columns,
    num_steps,
    num_groups,
    expert_lines,
    matrix_lines,
    scales_line,
    blocks,
    STEPS: tl.constexpr,
    PLACES: tl.constexpr,
    ZERO: tl.constexpr,
    GROUPS: tl.constexpr,
    IS_BY_EXPERT: tl.constexpr,
):
    """One token by one panel; all words of a round are neighbours."""
    tile, block = tl.program_id(0), tl.program_id(1)
    matrix, panel = block // blocks, block % blocks
    line, token = matrix.to(tl.int64) * matrix_lines, tile
    if IS_BY_EXPERT:
        token = tl.load(tile_starts_ptr + tile)
        if token >= tl.load(tile_ends_ptr + tile):
            return
        line += tl.load(tile_experts_ptr + tile).to(tl.int64) * expert_lines
    x_ptr += token.to(tl.int64) * num_columns
    words_ptr += (line + panel * num_steps) * 16
    scales_ptr += (line + scales_line) * 32 + panel * num_groups * 16
    lanes_L = tl.arange(0, 16)
    sums_GSL = tl.zeros((GROUPS, STEPS, 16), tl.float32)
    for first in range(0, num_groups, GROUPS):
        groups_G = first + tl.arange(0, GROUPS)
        steps_GS = groups_G[:, None] * STEPS + tl.arange(0, STEPS)[None, :]
        words_GSL = tl.load(
            words_ptr + steps_GS[:, :, None] * 16 + lanes_L[None, None, :],
            mask=(steps_GS < num_steps)[:, :, None],
            other=0,
        )
        bits_GL = tl.load(
            scales_ptr + groups_G[:, None] * 16 + lanes_L[None, :],
            mask=(groups_G < num_groups)[:, None],
            other=0,
        )
        scales_GL = (bits_GL.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        group_GSL = tl.zeros((GROUPS, STEPS, 16), tl.float32)
        for place in tl.static_range(PLACES):
            columns_GS = steps_GS * PLACES + place
            x_GS = tl.load(x_ptr + columns_GS, mask=columns_GS < num_columns, other=0.0)
            codes_GSL = _code(words_GSL, place, PLACES, ZERO).to(tl.float32)
            group_GSL += codes_GSL * x_GS.to(tl.float32)[:, :, None]
        sums_GSL += group_GSL * scales_GL[:, None, :]
    sums_L = tl.sum(tl.sum(sums_GSL, axis=1), axis=0)
    rows_L = panel * 16 + lanes_L
    width = num_rows * (tl.num_programs(1) // blocks)
    out_ptr += token.to(tl.int64) * width + matrix * num_rows
    tl.store(out_ptr + rows_L, sums_L.to(out_ptr.dtype.element_ty), mask=rows_L < num_rows)


@triton.jit(do_not_specialize=SIZES)
def _many_tokens(
    x_ptr,
    words_ptr,
    scales_ptr,
    out_ptr,
    tile_experts_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    num_tokens,
    num_rows,
    num_columns,
    num_steps,
    num_groups,
    expert_lines,
    matrix_lines,
    scales_line,
    blocks,
    STEPS: tl.constexpr,
    PLACES: tl.constexpr,
    ZERO: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    IS_BY_EXPERT: tl.constexpr,
):
    """A tile of tokens by a tile of rows, group by group; x lies as `_by_place` has it."""
    tile, block = tl.program_id(0), tl.program_id(1)
    matrix, first_row = block // blocks, (block % blocks) * TILE_ROWS
    line, start, end = matrix.to(tl.int64) * matrix_lines, tile * TILE_TOKENS, num_tokens
    if IS_BY_EXPERT:
        start = tl.load(tile_starts_ptr + tile)
        end = tl.load(tile_ends_ptr + tile)
        if start >= end:
            return
        line += tl.load(tile_experts_ptr + tile).to(tl.int64) * expert_lines
    tokens_T = start + tl.arange(0, TILE_TOKENS)
    rows_R = first_row + tl.arange(0, TILE_ROWS)
    panels_R, lanes_R = rows_R // 16, rows_R % 16
    # Whole panels are there to be read, 16 bytes at a time.
    is_token_T, is_panel_R = tokens_T < end, panels_R * 16 < num_rows
    steps_S = tl.arange(0, STEPS)
    x_T = x_ptr + tokens_T.to(tl.int64) * (num_groups * STEPS * PLACES)
    words_R = words_ptr + line * 16 + panels_R * (num_steps * 16) + lanes_R
    scales_R = scales_ptr + (line + scales_line) * 32 + panels_R * (num_groups * 16) + lanes_R
    sums_TR = tl.zeros((TILE_TOKENS, TILE_ROWS), tl.float32)
    for group in range(num_groups):
        own_S = group * STEPS + steps_S
        words_SR = tl.load(
            words_R[None, :] + own_S[:, None] * 16,
            mask=(own_S < num_steps)[:, None] & is_panel_R[None, :],
            other=0,
        )
        bits_R = tl.load(scales_R + group * 16, mask=is_panel_R, other=0)
        scale_R = (bits_R.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        group_TR = tl.zeros((TILE_TOKENS, TILE_ROWS), tl.float32)
        for place in tl.static_range(PLACES):
            x_TS = tl.load(
                x_T[:, None] + ((group * PLACES + place) * STEPS + steps_S)[None, :],
                mask=is_token_T[:, None],
                other=0.0,
            )
            codes_SR = _code(words_SR, place, PLACES, ZERO).to(tl.float32).to(x_TS.dtype)
            group_TR = tl.dot(x_TS, codes_SR, group_TR, input_precision="ieee")
        sums_TR += group_TR * scale_R[None, :]
    width = num_rows * (tl.num_programs(1) // blocks)
    out_TR = out_ptr + tokens_T.to(tl.int64)[:, None] * width + matrix * num_rows + rows_R[None, :]
    tl.store(
        out_TR,
        sums_TR.to(out_ptr.dtype.element_ty),
        mask=is_token_T[:, None] & (rows_R < num_rows)[None, :],
    )

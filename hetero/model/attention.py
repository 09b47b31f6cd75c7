"""Attention of one layer over a paged KV cache: prefill and decode, on any torch device."""

# T new tokens, S sequences, B blocks read, P block size, C keys read, D hidden, H query heads,
# G KV heads, R = H / G query heads a KV head, K head dim

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cpu_kernels.attention import decode_attention
from cpu_kernels.scratch import Scratch
from hetero.model.batch import BatchTensors
from hetero.model.norm import rms_norm
from hetero.model.quantised import product
from hetero.model.rotary import apply_rotary
from planner.model_spec import ModelSpec
from planner.workload import Phase

AttentionKernel = Literal["numba", "torch"]


class LayerKV(Protocol):
    """Pages of one layer, (num_blocks, G, P, K), allocated zeroed: pads of a table are read."""

    @property
    def key(self) -> Tensor: ...

    @property
    def value(self) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReads:
    """Keys of one sequence of a prefill step, for rows `start` to `end`.

    Without blocks, the step's own keys are all there are; without a mask, attention is causal.
    `num_keys` are read of the blocks, or all of them, pads included, which the mask hides.
    """

    start: int
    end: int
    blocks_B: Tensor | None
    mask_TC: Tensor | None
    num_keys: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PageReads:
    """Keys of every sequence of a decode step, padded to the longest."""

    blocks_SB: Tensor
    mask_S11C: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionStep:
    """What layers share in a step on the device that attends: made once, read by each."""

    phase: Phase
    kernel: AttentionKernel
    blocks_T: Tensor
    offsets_T: Tensor
    block_tables_SB: Tensor
    context_lens_S: Tensor
    prompts: Mapping[int | None, tuple[PromptReads, ...]]  # by window; prefill only
    pages: Mapping[int | None, PageReads]  # by window; decode with the torch kernel only
    scratch: Scratch  # of the numba kernel: layers run one after the other


def attention_step(
    batch: BatchTensors,
    *,
    dtype: torch.dtype,
    block_size: int,
    windows: Collection[int | None],
    kernel: AttentionKernel,
) -> AttentionStep:
    """Page indices and masks of a step, for layers with any of `windows`."""
    prompts: dict[int | None, tuple[PromptReads, ...]] = {}
    pages: dict[int | None, PageReads] = {}
    for window in set(windows):
        if batch.phase == "prefill":
            prompts[window] = tuple(
                prompt_reads(batch, index, window, block_size, dtype)
                for index in range(batch.num_seqs)
            )
        elif kernel == "torch":
            pages[window] = page_reads(batch, window, block_size, dtype)
    return AttentionStep(
        phase=batch.phase,
        kernel=kernel,
        blocks_T=batch.slots_T // block_size,
        offsets_T=batch.slots_T % block_size,
        block_tables_SB=batch.block_tables_SB,
        context_lens_S=batch.context_lens_S,
        prompts=prompts,
        pages=pages,
        scratch=Scratch(),
    )


def attention_layer(
    x_TD: Tensor,
    weights: Mapping[str, Tensor],
    kv: LayerKV,
    cos_TK: Tensor,
    sin_TK: Tensor,
    step: AttentionStep,
    spec: ModelSpec,
    *,
    window: int | None,
    num_threads: int,
) -> Tensor:
    """x + attention of the normed x; writes the new keys and values into their pages."""
    q_THK, k_TGK, v_TGK = project(x_TD, weights, cos_TK, sin_TK, spec)
    attended = attend(q_THK, k_TGK, v_TGK, kv, step, window=window, num_threads=num_threads)
    return attention_output(attended, x_TD, weights)


def project(
    x_TD: Tensor,
    weights: Mapping[str, Tensor],
    cos_TK: Tensor,
    sin_TK: Tensor,
    spec: ModelSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of the normed x."""
    num_tokens, norm_eps, head_dim = x_TD.shape[0], spec.norm_eps, spec.head_dim
    normed_TD = rms_norm(x_TD, weights["input_norm"], norm_eps)
    qkv = product(normed_TD, weights, "qkv")
    if spec.qk_norm == "full":
        q, k, _ = qkv.split((spec.q_size, spec.kv_size, spec.kv_size), dim=1)
        q.copy_(rms_norm(q, weights["q_norm"], norm_eps))
        k.copy_(rms_norm(k, weights["k_norm"], norm_eps))
    if spec.clip_qkv is not None:
        qkv.clamp_(-spec.clip_qkv, spec.clip_qkv)
    # Queries and keys are heads of one tensor as long as they can be: half the number of ops, which
    # cost 4 us each however small.
    heads_THK = qkv.view(num_tokens, -1, head_dim)
    qk_THK, v_TGK = heads_THK.split((spec.num_heads + spec.num_kv_heads, spec.num_kv_heads), dim=1)
    if spec.qk_norm == "head":
        qk_THK = F.rms_norm(qk_THK, (head_dim,), None, norm_eps)
        qk_THK[:, : spec.num_heads].mul_(weights["q_norm"])
        qk_THK[:, spec.num_heads :].mul_(weights["k_norm"])
    rotated_THK = apply_rotary(qk_THK, cos_TK, sin_TK)
    return rotated_THK[:, : spec.num_heads], rotated_THK[:, spec.num_heads :], v_TGK


def attend(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    kv: LayerKV,
    step: AttentionStep,
    *,
    window: int | None,
    num_threads: int,
) -> Tensor:
    """Values by their scores, heads joined; writes the new keys and values into their pages."""
    kv.key[step.blocks_T, :, step.offsets_T] = k_TGK
    kv.value[step.blocks_T, :, step.offsets_T] = v_TGK
    if step.phase == "prefill":
        parts = [_attend_prompt(q_THK, k_TGK, v_TGK, kv, part) for part in step.prompts[window]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if step.kernel == "numba":
        return _decode_numba(q_THK, kv, step, window, num_threads)
    return decode_torch(q_THK, kv, step.pages[window])


def attention_output(attended: Tensor, x_TD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """x + the output product of what `attend` gave."""
    return product(attended, weights, "o").add_(x_TD)


def _attend_prompt(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, kv: LayerKV, reads: PromptReads
) -> Tensor:
    """Attention of one sequence's new tokens, its heads joined: (T, H * K)."""
    if reads.blocks_B is not None:
        return attend_pages(q_THK, kv, reads)
    rows = slice(reads.start, reads.end)
    k_GCK, v_GCK = k_TGK[rows].transpose(0, 1), v_TGK[rows].transpose(0, 1)
    return _attend_keys(q_THK[rows], k_GCK, v_GCK, reads.mask_TC)


def attend_pages(q_THK: Tensor, kv: LayerKV, reads: PromptReads) -> Tensor:
    """The same with all keys read from their pages, in the format of the queries."""
    assert reads.blocks_B is not None
    k_GCK = _gather(kv.key, reads.blocks_B)[:, : reads.num_keys].to(q_THK.dtype)
    v_GCK = _gather(kv.value, reads.blocks_B)[:, : reads.num_keys].to(q_THK.dtype)
    return _attend_keys(q_THK[reads.start : reads.end], k_GCK, v_GCK, reads.mask_TC)


def _attend_keys(q_THK: Tensor, k_GCK: Tensor, v_GCK: Tensor, mask_TC: Tensor | None) -> Tensor:
    num_tokens, num_kv_heads, head_dim = q_THK.shape[0], k_GCK.shape[0], k_GCK.shape[2]
    q_GRTK = q_THK.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    # KV heads as the batch and a stride of 0 for the query heads that share one: as fast as
    # enable_gqa on the CPU, and on CUDA enable_gqa with a mask falls back to materialised scores.
    out_GRTK = F.scaled_dot_product_attention(
        q_GRTK,
        k_GCK[:, None].expand(-1, q_GRTK.shape[1], -1, -1),
        v_GCK[:, None].expand(-1, q_GRTK.shape[1], -1, -1),
        attn_mask=mask_TC,
        is_causal=mask_TC is None,
    )
    return out_GRTK.permute(2, 0, 1, 3).reshape(num_tokens, -1)


def _gather(pages: Tensor, blocks_B: Tensor) -> Tensor:
    """The keys or values of blocks in a row: (G, B * P, K)."""
    # index_select over whole blocks and then one copy: half the time of pages[blocks] in bfloat16.
    return pages.index_select(0, blocks_B).transpose(0, 1).flatten(1, 2)


def decode_torch(q_SHK: Tensor, kv: LayerKV, reads: PageReads) -> Tensor:
    """One query a sequence over gathered pages; the query heads of a KV head are rows."""
    num_seqs, num_heads, head_dim = q_SHK.shape
    num_kv_heads = kv.key.shape[1]

    def gather(pages: Tensor) -> Tensor:
        blocks = pages.index_select(0, reads.blocks_SB.flatten())
        return blocks.view(num_seqs, -1, *pages.shape[1:]).transpose(1, 2).flatten(2, 3)

    out_SGRK = F.scaled_dot_product_attention(
        q_SHK.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim),
        gather(kv.key),
        gather(kv.value),
        attn_mask=reads.mask_S11C,
    )
    return out_SGRK.reshape(num_seqs, -1)


def _decode_numba(
    q_SHK: Tensor, kv: LayerKV, step: AttentionStep, window: int | None, num_threads: int
) -> Tensor:
    """One query a sequence, read straight from the pages of a cache in CPU memory."""
    out_SHK = torch.empty(q_SHK.shape, dtype=torch.float32)
    decode_attention(
        q_SHK.to(torch.float32).contiguous().numpy(),
        as_array(kv.key),
        as_array(kv.value),
        step.block_tables_SB.numpy(),
        step.context_lens_S.numpy(),
        scale=q_SHK.shape[-1] ** -0.5,
        window=window,
        num_threads=num_threads,
        out=out_SHK.numpy(),
        lse=np.empty(q_SHK.shape[:2], np.float32),
        scratch=step.scratch,
    )
    return out_SHK.flatten(1).to(q_SHK.dtype)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A CPU tensor as numpy, which has no bfloat16: its bits; nothing is copied."""
    array: NDArray[Any] = (
        tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    ).numpy()
    return array


def prompt_reads(
    batch: BatchTensors,
    index: int,
    window: int | None,
    block_size: int,
    dtype: torch.dtype,
    *,
    from_pages: bool = False,
) -> PromptReads:
    """Keys of one sequence; `from_pages` reads them there even where the step's own are all.

    It then reads no pads of the last block, which a device would have to be asked to cut off.
    """
    start, end = batch.query_starts[index], batch.query_starts[index + 1]
    past = batch.past_lens[index]
    num_keys = past + end - start
    is_causal = past == 0 and (window is None or window >= num_keys)
    if is_causal and not from_pages:
        return PromptReads(start=start, end=end, blocks_B=None, mask_TC=None)
    device = batch.block_tables_SB.device
    blocks_B, first_key = None, 0
    if past > 0 or from_pages:
        first_block = max(0, past + 1 - window) // block_size if window is not None else 0
        first_key = first_block * block_size
        blocks_B = batch.block_tables_SB[index, first_block : -(-num_keys // block_size)]
        if not from_pages:
            num_keys = first_key + len(blocks_B) * block_size
    exact = num_keys - first_key if from_pages else None
    if is_causal:
        return PromptReads(start=start, end=end, blocks_B=blocks_B, mask_TC=None, num_keys=exact)
    seen_TC = _seen(
        torch.arange(past, past + end - start, device=device)[:, None],
        torch.arange(first_key, num_keys, device=device),
        window,
    )
    mask_TC = _additive(seen_TC, dtype)
    return PromptReads(start=start, end=end, blocks_B=blocks_B, mask_TC=mask_TC, num_keys=exact)


def page_reads(
    batch: BatchTensors, window: int | None, block_size: int, dtype: torch.dtype
) -> PageReads:
    tables_SB, lens_S = batch.block_tables_SB, batch.context_lens_S
    num_blocks = tables_SB.shape[1]
    columns_SB = torch.arange(num_blocks, device=tables_SB.device).expand(len(tables_SB), -1)
    if window is not None:
        # `window` tokens in a row lie in this many blocks at most.
        num_read = min(num_blocks, (window + block_size - 2) // block_size + 1)
        first_S = (lens_S - window).clamp_(min=0) // block_size
        columns_SB = first_S[:, None] + columns_SB[:, :num_read]
        tables_SB = tables_SB.gather(1, columns_SB.clamp(max=num_blocks - 1))
    offsets_P = torch.arange(block_size, device=tables_SB.device)
    positions_SC = (columns_SB[:, :, None] * block_size + offsets_P).flatten(1)
    seen_SC = _seen(lens_S[:, None] - 1, positions_SC, window)
    return PageReads(blocks_SB=tables_SB, mask_S11C=_additive(seen_SC, dtype)[:, None, None])


def _seen(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys a query sees, by position: none after it, and the last `window` up to it."""
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, -inf elsewhere: what attention turns a boolean mask into, in every layer."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, float("-inf"))

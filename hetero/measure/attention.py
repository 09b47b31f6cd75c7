"""Rates of attention: KV bytes per second in decode, FLOP per second in prefill."""

# T tokens, H query heads, G KV heads, R = H / G query heads a KV head, K head dim, C context

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from cpu_kernels.attention import decode_attention
from cpu_kernels.scratch import Scratch
from hetero.kv_cache import BLOCK_SIZE
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import median_seconds
from hetero.model.families import TORCH_DTYPES
from planner.model_spec import Dtype, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Heads of the attention that is measured, and its context."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    context_len: int = 2048
    prefill_len: int = 512

    @classmethod
    def of(cls, spec: ModelSpec) -> AttentionShape:
        """The heads of a model."""
        return cls(num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)


def cpu_decode_bytes_per_s(
    memory: ColdMemory, shape: AttentionShape, *, dtype: Dtype, num_threads: int, budget_s: float
) -> float:
    """Rate at which the decode kernel reads keys and values of one sequence from cold memory."""
    num_blocks = shape.context_len // BLOCK_SIZE
    cache_shape = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, shape.num_heads, shape.head_dim), dtype=np.float32)
    # A cache that has been in use for a while: a sequence's blocks lie in any order.
    block_tables = rng.permutation(num_blocks).astype(np.int32)[None]
    context_lens = np.array([shape.context_len], dtype=np.int32)
    out = np.empty_like(q)
    lse = np.empty((1, shape.num_heads), dtype=np.float32)
    scratch = Scratch()

    def attend() -> None:
        caches = [memory.take(dtype, *cache_shape) for _ in range(2)]
        bits = [c.view(torch.uint16) if dtype == "bfloat16" else c for c in caches]
        decode_attention(
            q,
            bits[0].numpy(),
            bits[1].numpy(),
            block_tables,
            context_lens,
            scale=shape.head_dim**-0.5,
            window=None,
            num_threads=num_threads,
            scratch=scratch,
            out=out,
            lse=lse,
        )

    seconds = median_seconds(attend, device=torch.device("cpu"), budget_s=budget_s)
    itemsize = TORCH_DTYPES[dtype].itemsize
    # keys and values
    kv_bytes = 2 * shape.context_len * shape.num_kv_heads * shape.head_dim * itemsize
    return kv_bytes / seconds


def gpu_decode_bytes_per_s(
    memory: ColdMemory, shape: AttentionShape, *, dtype: Dtype, budget_s: float
) -> float:
    """Rate of torch's decode attention of one sequence: gather its pages, then attend.

    The same operations as `hetero.model.attention` with its torch kernel.
    """
    num_blocks = shape.context_len // BLOCK_SIZE
    pages_shape = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    blocks = torch.randperm(num_blocks, device=memory.device)
    group = shape.num_heads // shape.num_kv_heads
    q_1GRK = torch.randn(1, shape.num_kv_heads, group, shape.head_dim, device=memory.device).to(
        TORCH_DTYPES[dtype]
    )
    mask_111C = torch.zeros(1, 1, 1, shape.context_len, dtype=q_1GRK.dtype, device=memory.device)

    def gathered() -> torch.Tensor:
        pages = memory.take(dtype, *pages_shape).index_select(0, blocks)
        return pages[None].transpose(1, 2).flatten(2, 3)

    def attend() -> None:
        F.scaled_dot_product_attention(q_1GRK, gathered(), gathered(), attn_mask=mask_111C)

    seconds = median_seconds(attend, device=memory.device, budget_s=budget_s)
    kv_bytes = 2 * shape.context_len * shape.num_kv_heads * shape.head_dim * q_1GRK.element_size()
    return kv_bytes / seconds


def prefill_flop_per_s(
    device: torch.device, shape: AttentionShape, *, dtype: Dtype, budget_s: float
) -> float:
    """Rate of causal attention of one prompt, counted as `ModelSpec.attention_flops` counts."""
    tokens = shape.prefill_len
    groups, width = shape.num_kv_heads, shape.head_dim
    repeat = shape.num_heads // groups
    q_TGRK = torch.randn(tokens, groups, repeat, width, device=device).to(TORCH_DTYPES[dtype])
    k_TGK, v_TGK = (
        torch.randn(tokens, groups, width, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2)
    )

    def attend() -> None:
        # Strides and heads as in `hetero.model.attention`: they decide which kernel torch picks.
        F.scaled_dot_product_attention(
            q_TGRK.permute(1, 2, 0, 3),
            k_TGK.transpose(0, 1)[:, None].expand(-1, repeat, -1, -1),
            v_TGK.transpose(0, 1)[:, None].expand(-1, repeat, -1, -1),
            is_causal=True,
        )

    seconds = median_seconds(attend, device=device, budget_s=budget_s)
    # 4 * heads * head_dim * (c(c+1)/2)
    flops = 4.0 * shape.num_heads * shape.head_dim * tokens * (tokens + 1) / 2
    return flops / seconds

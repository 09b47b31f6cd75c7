"""Batches over shuffled pages, built by hand: what the scheduler and the KV cache make."""

# S sequences, B blocks of the longest sequence

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetero.model.batch import BatchTensors
from planner.model_spec import ModelSpec
from planner.workload import Phase

# Divides nothing that the tests use.
BLOCK_SIZE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Keys and values of one layer."""

    key: Tensor
    value: Tensor


def empty_pages(
    num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> Pages:
    """Zeroed pages, as the KV cache must be."""
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
    return Pages(key=torch.zeros(shape, dtype=dtype), value=torch.zeros(shape, dtype=dtype))


def model_pages(spec: ModelSpec, num_blocks: int, dtype: torch.dtype) -> list[Pages]:
    """Zeroed pages for every layer."""
    return [empty_pages(num_blocks, spec.num_kv_heads, spec.head_dim, dtype) for _ in spec.layers]


def shuffled_tables(num_seqs: int, blocks_per_seq: int, *, num_blocks: int, seed: int) -> Tensor:
    """Different random blocks for every sequence."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(num_blocks, generator=generator)[: num_seqs * blocks_per_seq]
    return blocks.view(num_seqs, blocks_per_seq).to(torch.int32)


def make_batch(
    phase: Phase, tokens: Sequence[Sequence[int]], past_lens: Sequence[int], tables_SB: Tensor
) -> BatchTensors:
    """The step that appends `tokens` to sequences of `past_lens` cached tokens."""
    query_starts = [0]
    positions: list[int] = []
    slots: list[int] = []
    for new, past, table in zip(tokens, past_lens, tables_SB.tolist(), strict=True):
        query_starts.append(query_starts[-1] + len(new))
        for position in range(past, past + len(new)):
            positions.append(position)
            slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
    context_lens = [past + len(new) for new, past in zip(tokens, past_lens, strict=True)]
    used = [-(-length // BLOCK_SIZE) for length in context_lens]
    block_tables = torch.zeros(len(tokens), max(used), dtype=torch.int32)
    for row, num_used in enumerate(used):
        block_tables[row, :num_used] = tables_SB[row, :num_used]
    return BatchTensors(
        phase=phase,
        token_ids_T=torch.tensor([token for new in tokens for token in new]),
        positions_T=torch.tensor(positions),
        slots_T=torch.tensor(slots),
        block_tables_SB=block_tables,
        context_lens_S=torch.tensor(context_lens, dtype=torch.int32),
        logit_rows_L=torch.tensor([end - 1 for end in query_starts[1:]]),
        query_starts=tuple(query_starts),
        past_lens=tuple(past_lens),
    )

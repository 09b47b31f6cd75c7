"""Seconds of attention: decode by context and batch, prefill by new tokens and past."""

# T new tokens, S sequences, H query heads, G KV heads, K head dim, B blocks

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cpu_kernels.attention import decode_attention_links
from cpu_kernels.calls import Link
from cpu_kernels.scratch import Scratch
from hetero.kv_cache import BLOCK_SIZE, LayerKV
from hetero.measure.chains import num_rounds, timed_chains
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import timed
from hetero.model.attention import as_array, attend_pages, decode_torch, page_reads, prompt_reads
from hetero.model.batch import BatchTensors
from hetero.model.families import TORCH_DTYPES
from planner.device import Sample
from planner.kv_blocks import num_blocks_for
from planner.model_spec import Dtype, ModelSpec

Heads = tuple[int, int, int]  # (H, G, K)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Attention that is measured: its heads, and each sequence's past and new tokens.

    Decode has one new token, whose key and value are in the cache: it reads `context + 1` tokens.
    """

    heads: Heads
    dtype: Dtype = "bfloat16"
    num_seqs: int = 1
    context: int = 0
    num_tokens: int = 1

    @property
    def num_blocks(self) -> int:
        """KV blocks of all sequences."""
        return self.num_seqs * num_blocks_for(self.context + self.num_tokens)

    @property
    def kv_bytes(self) -> int:
        """Bytes of these blocks: keys and values."""
        _, kv_heads, width = self.heads
        itemsize = TORCH_DTYPES[self.dtype].itemsize
        return 2 * self.num_blocks * BLOCK_SIZE * kv_heads * width * itemsize

    @property
    def prefill_flops(self) -> float:
        """FLOPs of scores and values of a prompt's new tokens."""
        pairs = self.num_tokens * (self.context + self.num_tokens / 2)
        return self.num_seqs * 4.0 * self.heads[0] * self.heads[2] * pairs

    def layer(self, memory: ColdMemory) -> LayerKV:
        """Its keys and values, in the next pieces of memory."""
        shape = (self.num_blocks, self.heads[1], BLOCK_SIZE, self.heads[2])
        return LayerKV(key=memory.take(self.dtype, *shape), value=memory.take(self.dtype, *shape))

    def batch(self, device: torch.device) -> BatchTensors:
        """A step of these sequences; a decode step where each has one new token."""
        num_keys, rows = self.context + self.num_tokens, self.num_seqs * self.num_tokens
        return BatchTensors(
            phase="decode" if self.num_tokens == 1 else "prefill",
            token_ids_T=torch.zeros(rows, dtype=torch.int64, device=device),
            positions_T=torch.arange(self.context, num_keys, device=device).repeat(self.num_seqs),
            slots_T=torch.arange(rows, device=device),
            block_tables_SB=torch.from_numpy(self.tables()).to(device),
            context_lens_S=torch.full((self.num_seqs,), num_keys, dtype=torch.int32, device=device),
            logit_rows_L=torch.arange(self.num_seqs, device=device),
            query_starts=tuple(range(0, rows + 1, self.num_tokens)),
            past_lens=(self.context,) * self.num_seqs,
        )

    def tables(self) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        """block_tables_SB of a cache that has been in use for a while: blocks lie in any order."""
        order = np.random.default_rng(0).permutation(self.num_blocks).astype(np.int32)
        return order.reshape(self.num_seqs, -1)


def heads_of(spec: ModelSpec) -> Heads:
    """The heads of a model."""
    return (spec.num_heads, spec.num_kv_heads, spec.head_dim)


def decode_sample(
    memory: ColdMemory, case: AttentionCase, *, num_threads: int, budget_s: float
) -> Sample:
    """Measure our decode attention: one token of each sequence after its context."""
    rounds = decode_rounds(memory, case, num_threads=num_threads)
    found = timed_chains(rounds, num_threads=num_threads, budget_s=budget_s)
    return Sample(
        lane="cpu",
        kernel="decode_attention",
        format=case.dtype,
        shape=case.heads,
        num_seqs=case.num_seqs,
        context=case.context + 1,
        num_threads=num_threads,
        seconds=found.seconds,
        spread=found.spread,
    )


def decode_rounds(
    memory: ColdMemory, case: AttentionCase, *, num_threads: int
) -> list[Sequence[Link]]:
    """Links of rounds, each over a cache that the ones before have not read."""
    heads, _, width = case.heads
    q = np.random.default_rng(0).standard_normal((case.num_seqs, heads, width), dtype=np.float32)
    lens, tables = np.full(case.num_seqs, case.context + 1, np.int32), case.tables()
    out, lse = np.empty_like(q), np.empty(q.shape[:2], np.float32)
    scratch = Scratch()
    rounds: list[Sequence[Link]] = []
    for _ in range(num_rounds(memory.num_bytes, case.kv_bytes)):
        kv = case.layer(memory)
        rounds.append(
            decode_attention_links(
                q,
                as_array(kv.key),
                as_array(kv.value),
                tables,
                lens,
                scale=width**-0.5,
                window=None,
                num_threads=num_threads,
                scratch=scratch,
                out=out,
                lse=lse,
            )
        )
    return rounds


def torch_decode_sample(memory: ColdMemory, case: AttentionCase, *, budget_s: float) -> Sample:
    """Measure torch's decode attention on the memory's device: gather the pages, then attend."""
    device, (heads, _, width) = memory.device, case.heads
    q_SHK = torch.randn(case.num_seqs, heads, width, device=device).to(TORCH_DTYPES[case.dtype])
    reads = page_reads(case.batch(device), None, BLOCK_SIZE, q_SHK.dtype)
    found = timed(
        lambda: decode_torch(q_SHK, case.layer(memory), reads), device=device, budget_s=budget_s
    )
    return Sample(
        lane="cpu" if device.type == "cpu" else "gpu",
        kernel="decode_attention",
        format=case.dtype,
        backend="torch",
        shape=case.heads,
        num_seqs=case.num_seqs,
        context=case.context + 1,
        num_threads=torch.get_num_threads() if device.type == "cpu" else 1,
        seconds=found.seconds,
        spread=found.spread,
    )


def prefill_sample(
    memory: ColdMemory, case: AttentionCase, *, compute_dtype: Dtype, budget_s: float
) -> Sample:
    """Measure causal attention of one prompt's new tokens, its keys in pages of `case.dtype`.

    On the CPU our layers widen all to float32 for torch, whatever the model's format.
    """
    device, (heads, _, width) = memory.device, case.heads
    q_THK = torch.randn(case.num_tokens, heads, width, device=device)
    q_THK = q_THK.to(TORCH_DTYPES[compute_dtype])
    batch = case.batch(device)
    reads = prompt_reads(batch, 0, None, BLOCK_SIZE, q_THK.dtype, from_pages=True)
    found = timed(
        lambda: attend_pages(q_THK, case.layer(memory), reads), device=device, budget_s=budget_s
    )
    return Sample(
        lane="cpu" if device.type == "cpu" else "gpu",
        kernel="prefill_attention",
        format=compute_dtype,
        backend="torch",
        shape=case.heads,
        num_tokens=case.num_tokens,
        context=case.context,
        num_threads=torch.get_num_threads() if device.type == "cpu" else 1,
        seconds=found.seconds,
        spread=found.spread,
    )

"""Attention over divided caches against float64: each device's part, and both merged."""

# S sequences, H query heads, G KV heads, K head dim, C cached tokens

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetero.kv_cache import LayerKV
from hetero.model.attention import as_array
from hetero.model.batch import BatchTensors
from hetero.model.cpu_layers import attend_projected_part, cpu_attention_step
from hetero.model.cpu_workspace import CpuKernels
from hetero.model.divided_cache import DividedCacheStep, RestRows, attend_front, front_reads, merge
from planner.model_spec import LayerSpec, ModelSpec, RopeSpec
from planner.placement import KV_BLOCK_TOKENS

HEADS, KV_HEADS, HEAD_DIM = 6, 3, 14
# Two that end in the front, its last token, the first behind it, and long ones.
PASTS = (0, 9, 31, 32, 70, 123)


def make_spec(window: int | None) -> ModelSpec:
    return ModelSpec(
        name="toy",
        architecture="LlamaForCausalLM",
        dtype="float32",
        hidden_size=12,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=11,
        max_position_embeddings=256,
        layers=(LayerSpec(intermediate_size=16, window=window),),
        rope=RopeSpec(theta=1e4),
        is_tied=True,
    )


class Case:
    """Sequences with so many cached tokens each and one new one, their caches divided."""

    def __init__(self, pasts: tuple[int, ...], num_front_blocks: int, window: int | None) -> None:
        rng = torch.Generator().manual_seed(len(pasts) + num_front_blocks)
        self.spec, self.pasts, self.window = make_spec(window), pasts, window
        self.num_front_tokens = num_front_blocks * KV_BLOCK_TOKENS
        shape = (len(pasts), HEADS + 2 * KV_HEADS, HEAD_DIM)
        self.qkv = torch.randn(shape, generator=rng) * 2
        longest = max(pasts) + 1
        # of every sequence, what is cached and the new token at its place
        self.keys = torch.randn((len(pasts), longest, KV_HEADS, HEAD_DIM), generator=rng)
        self.values = torch.randn(self.keys.shape, generator=rng)
        for row, past in enumerate(pasts):
            self.keys[row, past] = self.qkv[row, HEADS : HEADS + KV_HEADS]
            self.values[row, past] = self.qkv[row, HEADS + KV_HEADS :]
        num_blocks = -(-longest // KV_BLOCK_TOKENS)
        # Block numbers of fronts first, those of the rest behind, neither in the order of rows.
        fronts, rest = len(pasts) * num_front_blocks, len(pasts) * num_blocks
        self.tables = np.zeros((len(pasts), num_blocks), np.int32)
        behind = max(0, num_blocks - num_front_blocks)
        self.tables[:, :num_front_blocks] = (
            np.random.default_rng(1).permutation(fronts).reshape(len(pasts), -1)[:, :num_blocks]
        )
        if behind:
            order = np.random.default_rng(2).permutation(len(pasts) * behind)
            self.tables[:, num_front_blocks:] = fronts + order.reshape(len(pasts), behind)
        self.fronts, self.num_fronts, self.num_front_blocks = (
            self._pages(fronts),
            fronts,
            num_front_blocks,
        )
        self.rest = self._pages(rest)
        for row, past in enumerate(pasts):
            for at in range(past):
                self._write(row, at)

    @staticmethod
    def _pages(count: int) -> LayerKV:
        shape = (count, KV_HEADS, KV_BLOCK_TOKENS, HEAD_DIM)
        return LayerKV(key=torch.zeros(shape), value=torch.zeros(shape))

    def _write(self, row: int, at: int) -> None:
        block = int(self.tables[row, at // KV_BLOCK_TOKENS])
        is_front = at < self.num_front_tokens
        pages = self.fronts if is_front else self.rest
        page = block if is_front else block - self.num_fronts
        pages.key[page, :, at % KV_BLOCK_TOKENS] = self.keys[row, at]
        pages.value[page, :, at % KV_BLOCK_TOKENS] = self.values[row, at]

    def batch(self, rows: list[int], tables: NDArray[np.int32], start: int) -> BatchTensors:
        pasts = [self.pasts[row] for row in rows]
        at = [past - start for past in pasts]
        slots = [
            int(tables[row, place // KV_BLOCK_TOKENS]) * KV_BLOCK_TOKENS + place % KV_BLOCK_TOKENS
            for row, place in enumerate(at)
        ]
        return BatchTensors(
            phase="decode",
            token_ids_T=torch.zeros(len(rows), dtype=torch.int64),
            positions_T=torch.tensor(pasts),
            slots_T=torch.tensor(slots),
            block_tables_SB=torch.from_numpy(tables),
            context_lens_S=torch.tensor([place + 1 for place in at], dtype=torch.int32),
            logit_rows_L=torch.arange(len(rows)),
            query_starts=tuple(range(len(rows) + 1)),
            past_lens=tuple(pasts),
        )

    def attended(self) -> Tensor:
        """By both devices, as a step does it."""
        rows = [row for row, past in enumerate(self.pasts) if past >= self.num_front_tokens]
        everyone = list(range(len(self.pasts)))
        tables = np.ascontiguousarray(self.tables[rows, self.num_front_blocks :]) - self.num_fronts
        rest_batch = self.batch(rows, tables, self.num_front_tokens) if rows else None
        rest = RestRows(
            num_seqs=len(self.pasts),
            rows=None if rows == everyone else torch.tensor(rows),
            batch=rest_batch,
        )
        step = DividedCacheStep(
            self.spec, num_front_tokens=self.num_front_tokens, fronts={0: self.fronts}, rest=rest
        )
        kernels = CpuKernels(num_threads=1, inv_freq_F=np.ones(HEAD_DIM // 2, np.float32))

        def attend(qkv: Tensor) -> tuple[Tensor, Tensor]:
            assert rest_batch is not None
            shared = cpu_attention_step(
                rest_batch, kernels, block_size=KV_BLOCK_TOKENS, windows={self.window}
            )
            found, lse = attend_projected_part(
                qkv, self.rest, shared, kernels, self.spec, self.window
            )
            return found, torch.from_numpy(lse)

        packed = step.attend_rest(self.qkv, attend)
        step.attend_front(0, self.qkv, self.batch(everyone, self.tables, 0))
        return step.merge(packed).view(len(self.pasts), HEADS, HEAD_DIM)

    def exact(self, first: int = 0, last: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
        """Attention to the tokens from `first` to `last` in float64, and its log-sum-exp."""
        out = np.zeros((len(self.pasts), HEADS, HEAD_DIM))
        lse = np.full((len(self.pasts), HEADS), -np.inf)
        queries = self.qkv[:, :HEADS].double().numpy() * HEAD_DIM**-0.5
        for row, past in enumerate(self.pasts):
            start = first if self.window is None else max(first, past + 1 - self.window)
            stop = past + 1 if last is None else min(past + 1, last)
            if start >= stop:
                continue
            keys = self.keys[row, start:stop].double().numpy()
            values = self.values[row, start:stop].double().numpy()
            for head in range(HEADS):
                kv_head = head // (HEADS // KV_HEADS)
                scores = keys[:, kv_head] @ queries[row, head]
                lse[row, head] = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
                out[row, head] = np.exp(scores - lse[row, head]) @ values[:, kv_head]
        return out, lse


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("num_front_blocks", [1, 2, 5, 9])
@pytest.mark.parametrize("pasts", [PASTS, (3,), (123,), (5, 15), (64, 99)])
def test_both_parts_merged_are_attention_to_all_tokens(
    pasts: tuple[int, ...], num_front_blocks: int, window: int | None
) -> None:
    """To 1e-5; the new token is written to where it is; windows may hide a whole part."""
    case = Case(pasts, num_front_blocks, window)
    actual = case.attended()
    expected, _ = case.exact()
    assert np.abs(actual.double().numpy() - expected).max() < 1e-5
    for row, past in enumerate(pasts):
        block, at = int(case.tables[row, past // KV_BLOCK_TOKENS]), past % KV_BLOCK_TOKENS
        is_front = past < case.num_front_tokens
        pages = case.fronts if is_front else case.rest
        page = block if is_front else block - case.num_fronts
        assert torch.equal(pages.key[page, :, at], case.keys[row, past])
        assert torch.equal(pages.value[page, :, at], case.values[row, past])


def test_no_other_page_is_written() -> None:
    """Rows whose new token is on the CPU leave the front as it is, beside others that write it."""
    case = Case(PASTS, 2, None)
    before = as_array(case.fronts.key).copy()
    case.attended()
    changed = np.argwhere((as_array(case.fronts.key) != before).any(axis=(1, 3)))
    new = [
        [case.tables[row, past // KV_BLOCK_TOKENS], past % KV_BLOCK_TOKENS]
        for row, past in enumerate(PASTS)
        if past < case.num_front_tokens
    ]
    assert sorted(map(list, changed.tolist())) == sorted(new)


@pytest.mark.parametrize("window", [None, 7, 100])
def test_a_part_has_the_log_sum_exp_of_its_scores(window: int | None) -> None:
    """Of the front; -inf and zeros where a window hides it, beside rows that see some of it."""
    case = Case(PASTS, 2, window)
    reads = front_reads(case.batch(list(range(len(PASTS))), case.tables, 0), window, 32)
    assert reads is not None
    for row, past in enumerate(PASTS[:3]):
        case._write(row, past)
    out, lse = attend_front(case.qkv[:, :HEADS], case.fronts, reads)
    expected_out, expected_lse = case.exact(last=32)
    is_empty = np.isneginf(expected_lse)
    assert is_empty.any() == (window == 7)
    assert np.array_equal(np.isneginf(lse.numpy()), is_empty)
    assert not out.numpy()[is_empty].any()
    seen_lse = lse.double().numpy()[~is_empty]
    assert np.abs(seen_lse - expected_lse[~is_empty]).max() < 1e-5
    assert np.abs(out.double().numpy() - expected_out).max() < 1e-5


def test_nothing_is_read_of_fronts_that_all_windows_have_left() -> None:
    case = Case((70, 123), 2, 7)
    assert front_reads(case.batch([0, 1], case.tables, 0), 7, 32) is None


def test_parts_of_very_different_scores_merge_without_overflow() -> None:
    """By shares in proportion to exp(lse): 0 and 1, a half each, and a third."""
    lse = torch.tensor([[200.0], [-300.0], [5.0], [0.0]])
    other = torch.tensor([[-200.0], [float("-inf")], [5.0], [np.log(2.0)]])
    packed = torch.cat((torch.full((4, 1), 4.0), other.float()), dim=1)
    found = merge((torch.ones((4, 1, 1)), lse), packed)
    assert found.flatten().tolist() == pytest.approx([1.0, 1.0, 2.5, 3.0], abs=1e-6)

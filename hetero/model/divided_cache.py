"""Attention of a decode step over divided caches: the GPU over the first tokens of every sequence,
the CPU over the others, merged by log-sum-exp."""

# S sequences, H query heads, G KV heads, R = H / G, K head dim, B blocks read, P block size,
# C = B * P keys read

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hetero.model.attention import LayerKV
from hetero.model.batch import BatchTensors
from planner.kv_blocks import num_blocks_for
from planner.model_spec import ModelSpec
from planner.placement import KV_BLOCK_TOKENS

_EMPTY = float("-inf")  # the log-sum-exp of no scores
_LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True, kw_only=True)
class RestRows:
    """Which sequences of a step have tokens on the CPU, the new one among them.

    `rows` are theirs, None where all have; `batch` has their indices in the pages of the CPU, with
    contexts counted from where fronts end; None where no sequence is that long.
    """

    num_seqs: int
    rows: Tensor | None
    batch: BatchTensors | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontWrites:
    """Where the keys and values of new tokens go that are in a front."""

    blocks_S: Tensor
    offsets_S: Tensor
    is_new_S11: Tensor | None  # None: all are


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontReads:
    """Keys of fronts that queries see, of every sequence those of the same blocks; pads masked."""

    blocks_SB: Tensor
    mask_S11C: Tensor


def front_writes(batch: BatchTensors, num_front_tokens: int) -> FrontWrites | None:
    """New tokens that are in a front; None where all are on the CPU."""
    num_new = sum(past < num_front_tokens for past in batch.past_lens)
    if num_new == 0:
        return None
    blocks_S, offsets_S = batch.slots_T // KV_BLOCK_TOKENS, batch.slots_T % KV_BLOCK_TOKENS
    if num_new == batch.num_seqs:
        return FrontWrites(blocks_S=blocks_S, offsets_S=offsets_S, is_new_S11=None)
    # The others write what is there to their own first token: to pick rows, a device would have to
    # be asked how many there are.
    is_new_S = batch.positions_T < num_front_tokens
    return FrontWrites(
        blocks_S=torch.where(is_new_S, blocks_S, batch.block_tables_SB[:, 0].long()),
        offsets_S=torch.where(is_new_S, offsets_S, 0),
        is_new_S11=is_new_S[:, None, None],
    )


def front_reads(
    batch: BatchTensors, window: int | None, num_front_tokens: int
) -> FrontReads | None:
    """What queries see of the fronts; None where that is nothing."""
    longest = min(num_front_tokens, 1 + max(batch.past_lens))
    shortest = 1 + min(batch.past_lens)
    first = 0 if window is None else max(0, shortest - window) // KV_BLOCK_TOKENS
    last = num_blocks_for(longest)
    if first >= last:
        return None
    device = batch.positions_T.device
    keys_C = torch.arange(first * KV_BLOCK_TOKENS, last * KV_BLOCK_TOKENS, device=device)
    queries_S1 = batch.positions_T[:, None]
    seen_SC = (keys_C <= queries_S1) & (keys_C < num_front_tokens)
    if window is not None:
        seen_SC &= keys_C > queries_S1 - window
    mask_SC = torch.zeros(seen_SC.shape, device=device).masked_fill_(~seen_SC, _EMPTY)
    return FrontReads(
        blocks_SB=batch.block_tables_SB[:, first:last], mask_S11C=mask_SC[:, None, None]
    )


def write_front(k_SGK: Tensor, v_SGK: Tensor, kv: LayerKV, writes: FrontWrites) -> None:
    """Write new keys and values into their pages."""
    blocks_S, offsets_S = writes.blocks_S, writes.offsets_S
    for pages, new_SGK in ((kv.key, k_SGK), (kv.value, v_SGK)):
        written_SGK = new_SGK
        if writes.is_new_S11 is not None:
            old_SGK = pages[blocks_S, :, offsets_S]
            written_SGK = torch.where(writes.is_new_S11, new_SGK, old_SGK)
        pages[blocks_S, :, offsets_S] = written_SGK


def attend_front(q_SHK: Tensor, kv: LayerKV, reads: FrontReads) -> tuple[Tensor, Tensor]:
    """Values by their scores (S, H, K) and the log-sum-exp of the scores (S, H), in float32.

    Where a query sees nothing of the front they are 0 and -inf.
    """
    num_seqs, num_heads, head_dim = q_SHK.shape
    num_kv_heads = kv.key.shape[1]

    def gather(pages: Tensor) -> Tensor:
        blocks = pages.index_select(0, reads.blocks_SB.flatten())
        blocks = blocks.view(num_seqs, -1, *pages.shape[1:]).transpose(1, 2)
        found = torch.empty(blocks.shape, dtype=torch.float32, device=pages.device)
        return found.copy_(blocks).flatten(2, 3)

    q_SGRK = q_SHK.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scaled_SGRK = q_SGRK.float() * head_dim**-0.5
    scores_SGRC = torch.matmul(scaled_SGRK, gather(kv.key).transpose(2, 3)).add_(reads.mask_S11C)
    lse_SGR = torch.logsumexp(scores_SGRC, dim=-1)
    # of nothing -inf - -inf would be none
    weights_SGRC = scores_SGRC.sub_(lse_SGR.clamp_min(_LEAST)[..., None]).exp_()
    out_SGRK = torch.matmul(weights_SGRC, gather(kv.value))
    return out_SGRK.reshape(q_SHK.shape), lse_SGR.reshape(num_seqs, num_heads)


def pack_rest(attended: Tensor, lse_SH: Tensor, rest: RestRows) -> Tensor:
    """Both side by side in the format of the first, for one copy; a row for every sequence.

    Those without tokens on the CPU have 0 and -inf.
    """
    packed = torch.cat((attended, lse_SH.view(attended.dtype)), dim=1)
    if rest.rows is None:
        return packed
    every = empty_rest(rest.num_seqs, attended.shape[1], lse_SH.shape[1], attended.dtype)
    every[rest.rows] = packed
    return every


def empty_rest(num_seqs: int, width: int, num_heads: int, dtype: torch.dtype) -> Tensor:
    """The same where no sequence has tokens on the CPU."""
    lse_SH = torch.full((num_seqs, num_heads), _EMPTY)
    return torch.cat((torch.zeros((num_seqs, width), dtype=dtype), lse_SH.view(dtype)), dim=1)


def merge(front: tuple[Tensor, Tensor], packed: Tensor) -> Tensor:
    """Attention to both parts, heads joined, in the format of `packed`.

    Online softmax (Milakov and Gimelshein 2018): each part by its share of the sum of exponentials.
    """
    out_SHK, lse_SH = front
    num_seqs, num_heads, head_dim = out_SHK.shape
    width = num_heads * head_dim
    rest_SHK = packed[:, :width].view(num_seqs, num_heads, head_dim).float()
    rest_lse_SH = packed[:, width:].contiguous().view(torch.float32)
    both_SH = torch.logaddexp(lse_SH, rest_lse_SH)
    front_share, rest_share = (lse_SH - both_SH).exp_(), (rest_lse_SH - both_SH).exp_()
    merged_SHK = out_SHK * front_share[..., None] + rest_SHK * rest_share[..., None]
    return merged_SHK.view(num_seqs, width).to(packed.dtype)


class DividedCacheStep:
    """What the layers of a decode step with divided caches share. Mutable; one step."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_front_tokens: int,
        fronts: Mapping[int, LayerKV],
        rest: RestRows,
    ) -> None:
        self.rest = rest
        self._spec = spec
        self._num_front_tokens = num_front_tokens
        self._fronts = fronts
        self._writes: FrontWrites | None = None
        self._reads: dict[int | None, FrontReads | None] | None = None
        self._front: tuple[Tensor, Tensor] | None = None

    def attend_front(self, layer: int, qkv: Tensor, batch: BatchTensors) -> None:
        """The GPU's part of a layer, which `merge` reads; new keys and values go where they are."""
        if self._reads is None:
            self._writes = front_writes(batch, self._num_front_tokens)
            windows = {each.window for each in self._spec.layers}
            self._reads = {
                window: front_reads(batch, window, self._num_front_tokens) for window in windows
            }
        spec, kv, reads = self._spec, self._fronts[layer], self._reads[self._window(layer)]
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        q_SHK, k_SGK, v_SGK = qkv.view(len(qkv), -1, spec.head_dim).split(heads, dim=1)
        if self._writes is not None:
            write_front(k_SGK, v_SGK, kv, self._writes)
        if reads is None:
            zeros = torch.zeros(q_SHK.shape, device=qkv.device)
            self._front = zeros, torch.full(q_SHK.shape[:2], _EMPTY, device=qkv.device)
        else:
            self._front = attend_front(q_SHK, kv, reads)

    def attend_rest(self, qkv: Tensor, attend: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """The CPU's part of a layer, packed; `attend` does the rows that have one."""
        rest, spec = self.rest, self._spec
        if rest.batch is None:
            return empty_rest(rest.num_seqs, spec.q_size, spec.num_heads, qkv.dtype)
        found = attend(qkv if rest.rows is None else qkv.index_select(0, rest.rows))
        return pack_rest(*found, rest)

    def merge(self, packed: Tensor) -> Tensor:
        """What both devices give for a layer."""
        assert self._front is not None
        return merge(self._front, packed)

    def _window(self, layer: int) -> int | None:
        return self._spec.layers[layer].window

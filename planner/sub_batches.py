"""Two uneven sub-batches, so that the CPU's decode attention hides behind the GPU's work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol


class Predictor(Protocol):
    """Seconds of the parts of one layer; the planner's from a profile, an engine's from tables."""

    @property
    def launch_s(self) -> float:
        """Handing a sub-batch's attention to the CPU and its result back."""

    def linear_s(self, num_tokens: int) -> float:
        """Projections, dense feed-forward, router and norms of so many tokens on the GPU."""

    def gpu_experts_s(self, num_tokens: int) -> float:
        """The experts that the GPU runs, resident or copied; 0 for a dense model."""

    def cpu_experts_s(self, num_tokens: int) -> float:
        """The experts that the CPU runs; 0 for a dense model."""

    def prefill_s(self, num_tokens: int) -> float:
        """Attention of one prompt on the GPU."""

    def gpu_attention_s(self, num_context_tokens: int) -> float:
        """Decode attention on the GPU over so many cached tokens of all its sequences."""

    def cpu_attention_s(self, num_seqs: int, num_context_tokens: int) -> float:
        """Decode attention on the CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A sequence that waits to be prefilled."""

    seq_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """A sequence that decodes, its context with the new token; its KV cache is on one device."""

    seq_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SubBatch:
    """What runs together: prompts by where their KV cache will live, decodes by where it does."""

    gpu_prefills: tuple[Prompt, ...] = ()
    cpu_prefills: tuple[Prompt, ...] = ()
    gpu_decodes: tuple[Decode, ...] = ()
    cpu_decodes: tuple[Decode, ...] = ()

    @property
    def num_seqs(self) -> int:
        prefills = len(self.gpu_prefills) + len(self.cpu_prefills)
        return prefills + len(self.gpu_decodes) + len(self.cpu_decodes)

    @property
    def num_tokens(self) -> int:
        """Tokens of its linear layers: a prompt's all, a decode's one."""
        prompts = sum(each.num_tokens for each in (*self.gpu_prefills, *self.cpu_prefills))
        return prompts + len(self.gpu_decodes) + len(self.cpu_decodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTimes:
    """Seconds of one layer of one sub-batch.

    `linear_s` ends when its experts have, on whichever device; `cpu_experts_s` of it keep the CPU
    busy.
    """

    linear_s: float
    prefill_s: float
    gpu_attention_s: float
    cpu_attention_s: float
    cpu_experts_s: float

    @property
    def gpu_s(self) -> float:
        """The layer, as long as its CPU attention is hidden."""
        return self.linear_s + self.prefill_s + self.gpu_attention_s


def batch_times(batch: SubBatch, predictor: Predictor) -> BatchTimes:
    """Price a sub-batch: sums of its tokens and contexts, each prompt on its own."""
    return _load(batch, predictor).times(predictor)


def remains_s(batches: tuple[SubBatch, SubBatch], predictor: Predictor) -> tuple[float, float]:
    """Seconds a layer by which each sub-batch's CPU attention ends before the GPU needs it.

    While the CPU attends for one, the GPU does that one's own attention and the linear part of
    the other, and the CPU the other's experts too: both read the same memory, so that their
    seconds add up. A pair hides all CPU attention where neither is negative (NEO, MLSys'25, its
    two inequalities in the form of its release; there without experts).
    """
    first, second = (_load(each, predictor) for each in batches)
    return _remains_s(first, second, predictor)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """A sub-batch as its times see it: one more decode on the CPU changes three numbers."""

    num_tokens: int
    num_cpu_decodes: int
    num_cpu_context: int
    prefill_s: float
    gpu_attention_s: float

    def with_cpu_decode(self, decode: Decode) -> _Load:
        return replace(
            self,
            num_tokens=self.num_tokens + 1,
            num_cpu_decodes=self.num_cpu_decodes + 1,
            num_cpu_context=self.num_cpu_context + decode.num_tokens,
        )

    def times(self, predictor: Predictor) -> BatchTimes:
        cpu_experts_s = predictor.cpu_experts_s(self.num_tokens)
        experts_s = max(predictor.gpu_experts_s(self.num_tokens), cpu_experts_s)
        attention_s = 0.0
        if self.num_cpu_decodes:
            attention_s = predictor.cpu_attention_s(self.num_cpu_decodes, self.num_cpu_context)
        return BatchTimes(
            linear_s=predictor.linear_s(self.num_tokens) + experts_s,
            prefill_s=self.prefill_s,
            gpu_attention_s=self.gpu_attention_s,
            cpu_attention_s=attention_s,
            cpu_experts_s=cpu_experts_s,
        )


def _load(batch: SubBatch, predictor: Predictor) -> _Load:
    prompts = (*batch.gpu_prefills, *batch.cpu_prefills)
    gpu_attention_s = 0.0
    if batch.gpu_decodes:
        num_context = sum(each.num_tokens for each in batch.gpu_decodes)
        gpu_attention_s = predictor.gpu_attention_s(num_context)
    return _Load(
        num_tokens=batch.num_tokens,
        num_cpu_decodes=len(batch.cpu_decodes),
        num_cpu_context=sum(each.num_tokens for each in batch.cpu_decodes),
        prefill_s=math.fsum(predictor.prefill_s(each.num_tokens) for each in prompts),
        gpu_attention_s=gpu_attention_s,
    )


def _remains_s(first: _Load, second: _Load, predictor: Predictor) -> tuple[float, float]:
    one, other, launch_s = first.times(predictor), second.times(predictor), predictor.launch_s
    return _remain_s(one, other, launch_s), _remain_s(other, one, launch_s)


def _remain_s(own: BatchTimes, other: BatchTimes, launch_s: float) -> float:
    gpu_s = other.linear_s + own.prefill_s + own.gpu_attention_s
    return gpu_s - (own.cpu_attention_s + launch_s + other.cpu_experts_s)


def pair_layer_s(batches: tuple[SubBatch, SubBatch], predictor: Predictor) -> float:
    """Seconds of a layer of a pair: two stages, each as long as its slower side.

    NEO's max(T_l0, T_ca1) + max(T_l1 + T_ga0, T_ca0), with prompts, launches and experts as in
    `remains_s`; where nothing remains negative it is the sum of both `gpu_s`.
    """
    gpu_s = math.fsum(batch_times(each, predictor).gpu_s for each in batches)
    return gpu_s + math.fsum(max(0.0, -each) for each in remains_s(batches, predictor))


def split_in_two(
    first: SubBatch,
    cpu_decodes: Sequence[Decode],
    max_cpu_decodes: int,
    min_linear_tokens: int,
    predictor: Predictor,
) -> tuple[SubBatch, SubBatch] | None:
    """Spread the CPU's decodes over two sub-batches so that their attention is hidden.

    `first` has all that the GPU attends for, the second only decodes of the CPU. In the order of
    arrival a decode goes where more time remains, the very first to the second; one that would not
    be hidden is passed over, and with it all that are as long. Last, prompts that will live on the
    CPU are put off again as in `without_late_prompts`, while all stays hidden.

    Returns
    -------
    tuple of SubBatch or None
        None where the second would be empty.
    """
    loads = [_load(first, predictor), _load(SubBatch(), predictor)]
    taken: tuple[list[Decode], list[Decode]] = ([], [])
    target, too_long = 1, math.inf
    for decode in cpu_decodes:
        if len(taken[0]) + len(taken[1]) == max_cpu_decodes:
            break
        if decode.num_tokens >= too_long:
            continue
        before = loads[target]
        loads[target] = before.with_cpu_decode(decode)
        remains = _remains_s(loads[0], loads[1], predictor)
        if min(remains) < 0:
            loads[target] = before
            too_long = decode.num_tokens
            continue
        taken[target].append(decode)
        target = 1 if remains[1] > remains[0] else 0
    if not taken[1]:
        return None
    wider = replace(first, cpu_decodes=tuple(taken[0]))
    second = SubBatch(cpu_decodes=tuple(taken[1]))
    while (fewer := _without_last_prompt(wider, min_linear_tokens)) is not None:
        if min(remains_s((fewer, second), predictor)) < 0:
            break
        wider = fewer
    return wider, second


def without_late_prompts(batch: SubBatch, min_linear_tokens: int) -> SubBatch:
    """Put off prompts that will live on the CPU, the last first, while enough tokens are left.

    From so many tokens on a wider product hardly costs less for each token, and a prompt that the
    GPU has no room for gains nothing by being early.

    Examples
    --------
    >>> prompts = tuple(Prompt(seq_id=index, num_tokens=100) for index in range(4))
    >>> len(without_late_prompts(SubBatch(cpu_prefills=prompts), 128).cpu_prefills)
    2
    """
    while (fewer := _without_last_prompt(batch, min_linear_tokens)) is not None:
        batch = fewer
    return batch


def _without_last_prompt(batch: SubBatch, min_linear_tokens: int) -> SubBatch | None:
    """None where there is none or too few tokens would be left."""
    if not batch.cpu_prefills:
        return None
    fewer = replace(batch, cpu_prefills=batch.cpu_prefills[:-1])
    return fewer if fewer.num_tokens >= min_linear_tokens else None

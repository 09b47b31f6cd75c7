"""Which sequences run next, and where each keeps its KV cache: NEO's iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.sub_batches import (
    Decode,
    Predictor,
    Prompt,
    SubBatch,
    batch_times,
    split_in_two,
    without_late_prompts,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queues:
    """All sequences, each queue in order of arrival; a decode is in the queue of its KV cache."""

    waiting: tuple[Prompt, ...] = ()
    gpu_decodes: tuple[Decode, ...] = ()
    cpu_decodes: tuple[Decode, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an iteration must stay within.

    Attributes
    ----------
    num_gpu_blocks, num_cpu_blocks : int
        KV blocks of `block_tokens` tokens; the CPU's at least as many, as every sequence on the
        GPU may have to be swapped out.
    max_seqs, max_tokens : int
        Of both sub-batches together.
    min_linear_tokens : int
        Of a sub-batch, at least 1: while so many are left, prompts that will live on the CPU are
        put off.
    swap_in_share : float
        Of the GPU's blocks, up to which sequences come back, so that they do not leave at once.
    """

    num_gpu_blocks: int
    num_cpu_blocks: int
    max_seqs: int
    max_tokens: int
    block_tokens: int = 16
    min_linear_tokens: int = 128
    swap_in_share: float = 0.95

    def num_blocks(self, sequence: Prompt | Decode) -> int:
        return -(-sequence.num_tokens // self.block_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """What to run now: nothing, one sub-batch, or two whose parts overlap."""

    batches: tuple[SubBatch, ...]
    swapped_out: tuple[Decode, ...] = ()
    swapped_in: tuple[Decode, ...] = ()

    @property
    def is_pipelined(self) -> bool:
        return len(self.batches) == 2


def next_iteration(queues: Queues, limits: Limits, predictor: Predictor) -> Iteration:
    """Choose what runs now, as NEO does (MLSys'25; swiftllm/server/scheduler.py of its release).

    1. All decodes on the GPU run. While their blocks or tokens are too many, the last one is
       swapped out, to the head of the CPU's queue; sequences at that head come back while there is
       room.
    2. Prompts are admitted first come, first served: to the GPU while their blocks fit; from the
       first that does not, to the CPU.
    3. With the CPU's decodes two sub-batches are made (`split_in_two`), and run if they serve more
       sequences a second than the GPU alone would.

    Where the GPU alone has nothing to run, as no decode fits it, the CPU's run in one sub-batch
    that hides nothing; NEO's release would wait for ever.

    Returns
    -------
    Iteration
        A prompt that is in none of its batches stays waiting, a decode that is not stays in its
        queue (after the swaps).
    """
    room = _Room(limits=limits)
    gpu, cpu, swapped_out, swapped_in = _swap(queues, room)
    to_gpu, to_cpu = _admit(queues.waiting, cpu, room)
    everything = SubBatch(gpu_prefills=to_gpu, cpu_prefills=to_cpu, gpu_decodes=gpu)
    alone = without_late_prompts(everything, limits.min_linear_tokens)
    batches: tuple[SubBatch, ...] = (alone,) if alone.num_seqs else ()
    if alone.num_seqs == 0:
        some = cpu[: room.num_decodes]
        batches = (SubBatch(cpu_decodes=some),) if some else ()
    elif cpu:
        pair = split_in_two(everything, cpu, room.num_decodes, limits.min_linear_tokens, predictor)
        if pair is not None and _rate(pair, predictor) > _rate((alone,), predictor):
            batches = pair
    return Iteration(batches=batches, swapped_out=swapped_out, swapped_in=swapped_in)


@dataclass(slots=True, kw_only=True)
class _Room:
    """What an iteration may still take; it is spent as sequences are chosen."""

    limits: Limits
    num_seqs: int = field(init=False)
    num_tokens: int = field(init=False)
    num_gpu_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_seqs = self.limits.max_seqs
        self.num_tokens = self.limits.max_tokens
        self.num_gpu_blocks = self.limits.num_gpu_blocks

    @property
    def is_overspent(self) -> bool:
        return min(self.num_seqs, self.num_tokens, self.num_gpu_blocks) < 0

    @property
    def num_decodes(self) -> int:
        return max(0, min(self.num_seqs, self.num_tokens))

    def has(self, num_tokens: int) -> bool:
        """Is there room for one more sequence of so many tokens?"""
        return self.num_seqs >= 1 and self.num_tokens >= num_tokens

    def spend(self, num_tokens: int, num_gpu_blocks: int, *, num_seqs: int = 1) -> None:
        self.num_seqs -= num_seqs
        self.num_tokens -= num_tokens
        self.num_gpu_blocks -= num_gpu_blocks


def _swap(
    queues: Queues, room: _Room
) -> tuple[tuple[Decode, ...], tuple[Decode, ...], tuple[Decode, ...], tuple[Decode, ...]]:
    """Decodes on the GPU, on the CPU, swapped out and swapped in."""
    limits = room.limits
    gpu, cpu = list(queues.gpu_decodes), list(queues.cpu_decodes)
    for decode in gpu:
        room.spend(1, limits.num_blocks(decode))
    swapped_out: list[Decode] = []
    while gpu and room.is_overspent:
        last = gpu.pop()
        room.spend(-1, -limits.num_blocks(last), num_seqs=-1)
        cpu.insert(0, last)
        swapped_out.insert(0, last)
    kept_free = limits.num_gpu_blocks - round(limits.swap_in_share * limits.num_gpu_blocks)
    swapped_in: list[Decode] = []
    # What was swapped out is at the head, and does not fit: it comes back another time.
    while cpu and room.has(1):
        if room.num_gpu_blocks - limits.num_blocks(cpu[0]) < kept_free:
            break
        swapped_in.append(cpu.pop(0))
        gpu.append(swapped_in[-1])
        room.spend(1, limits.num_blocks(gpu[-1]))
    return tuple(gpu), tuple(cpu), tuple(swapped_out), tuple(swapped_in)


def _admit(
    waiting: Sequence[Prompt], cpu: Sequence[Decode], room: _Room
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Prompts whose KV cache goes to the GPU, and to the CPU.

    The CPU keeps as many blocks free as the GPU has, for what is swapped out.
    """
    limits = room.limits
    cpu_blocks = limits.num_cpu_blocks - limits.num_gpu_blocks
    cpu_blocks -= sum(limits.num_blocks(decode) for decode in cpu)
    to_gpu: list[Prompt] = []
    to_cpu: list[Prompt] = []
    for prompt in waiting:
        num_blocks = limits.num_blocks(prompt)
        fits_gpu = not to_cpu and num_blocks <= room.num_gpu_blocks
        if not room.has(prompt.num_tokens) or not (fits_gpu or num_blocks <= cpu_blocks):
            break
        room.spend(prompt.num_tokens, num_blocks if fits_gpu else 0)
        cpu_blocks -= 0 if fits_gpu else num_blocks
        (to_gpu if fits_gpu else to_cpu).append(prompt)
    return tuple(to_gpu), tuple(to_cpu)


def _rate(batches: tuple[SubBatch, ...], predictor: Predictor) -> float:
    """Sequences served in a second of one layer."""
    num_seqs = sum(each.num_seqs for each in batches)
    return num_seqs / math.fsum(batch_times(each, predictor).gpu_s for each in batches)

"""KVBlocks: how many blocks of each cache a placement needs, and their bytes on each device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.model_spec import ModelSpec
from planner.placement import Device, Placement
from planner.workload import Workload

KV_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBlocks:
    """Blocks of the caches of a placement.

    Attributes
    ----------
    first : int
        Of sequences at their full length where the decode tier keeps them; all sequences, where it
        has one sub-batch.
    second : int
        Of those of the second sub-batch, on the CPU.
    prompts : int
        Of sequences whose prompt is being computed, where that is done on another device than they
        are decoded on: a sequence leaves them when its prompt ends.
    """

    first: int
    second: int = 0
    prompts: int = 0


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens of one sequence."""
    return -(-num_tokens // KV_BLOCK_TOKENS)


def moves_prompts(placement: Placement, wave: Workload) -> bool:
    """Are prompts of any sequence computed on another device than they are decoded on?"""
    return num_second_seqs(placement, wave) > 0 or any(
        before.kv != after.kv
        for before, after in zip(placement.prefill.layers, placement.decode.layers, strict=True)
    )


def kv_blocks(placement: Placement, wave: Workload) -> KVBlocks:
    """Blocks for sequences that run together, every one at its full length."""
    each = num_blocks_for(wave.context_len)
    second = num_second_seqs(placement, wave)
    prompts = num_prompt_blocks(wave, placement.prefill.max_num_tokens)
    return KVBlocks(
        first=(wave.num_seqs - second) * each,
        second=second * each,
        prompts=prompts if moves_prompts(placement, wave) else 0,
    )


def num_second_seqs(placement: Placement, wave: Workload) -> int:
    """Sequences of the second sub-batch; the first keeps one at least."""
    return min(placement.decode.num_second_seqs, wave.num_seqs - 1)


def num_prompts(wave: Workload, chunk_tokens: int) -> int:
    """Sequences whose prompts are in a prefill step, or begun before it, at most.

    Examples
    --------
    >>> num_prompts(Workload(prompt_len=512, num_seqs=64), 2048)
    5
    """
    return min(wave.num_seqs, 1 + math.ceil(chunk_tokens / wave.prompt_len))


def num_prompt_blocks(wave: Workload, chunk_tokens: int) -> int:
    """Blocks of those prompts; room for one sequence that begins again at its full length."""
    prompts = num_prompts(wave, chunk_tokens) * num_blocks_for(wave.prompt_len)
    return max(prompts, num_blocks_for(wave.context_len))


def layer_kv_bytes(
    spec: ModelSpec,
    wave: Workload,
    layer: int,
    device: Device,
    *,
    prefill: Device,
    decode: Device,
    chunk_tokens: int,
    num_second: int = 0,
) -> int:
    """Bytes of a layer's caches on a device, for sequences that run together.

    `prefill` and `decode` are where each phase keeps the cache (of the first sub-batch).
    """
    held = _num_held(wave, device, prefill, decode, chunk_tokens, num_second)
    return _held_bytes(spec, layer, *held)


def _num_held(
    wave: Workload,
    device: Device,
    prefill: Device,
    decode: Device,
    chunk_tokens: int,
    num_second: int,
) -> tuple[int, int]:
    """Sequences and blocks that any layer with its caches there keeps on a device."""
    seqs = (wave.num_seqs - num_second) * (decode == device) + num_second * (device == "cpu")
    blocks = seqs * num_blocks_for(wave.context_len)
    if prefill == device and (prefill != decode or num_second):
        seqs += num_prompts(wave, chunk_tokens)
        blocks += num_prompt_blocks(wave, chunk_tokens)
    return seqs, blocks


def _held_bytes(spec: ModelSpec, layer: int, seqs: int, blocks: int) -> int:
    num_bytes = blocks * KV_BLOCK_TOKENS * spec.kv_bytes_per_token(layer)
    return num_bytes + seqs * spec.state_bytes(layer)


def kv_bytes(spec: ModelSpec, placement: Placement, wave: Workload, device: Device) -> int:
    """Bytes of all caches of a placement on a device."""
    chunk_tokens, num_second = placement.prefill.max_num_tokens, num_second_seqs(placement, wave)
    held: dict[tuple[Device, Device], tuple[int, int]] = {}
    total = 0
    layers = zip(placement.prefill.layers, placement.decode.layers, strict=True)
    for index, (before, after) in enumerate(layers):
        kept = (before.kv, after.kv)
        if kept not in held:
            held[kept] = _num_held(wave, device, *kept, chunk_tokens, num_second)
        total += _held_bytes(spec, index, *held[kept])
    return total


def bytes_per_block(spec: ModelSpec, placement: Placement, device: Device) -> int:
    """Bytes of one more block for sequences of the first sub-batch, and for their prompts.

    A layer whose cache moves between the phases has blocks on both devices.
    """
    total = 0
    for index in range(spec.num_layers):
        before, after = placement.prefill.layers[index].kv, placement.decode.layers[index].kv
        has_prompts = before != after or placement.decode.num_second_seqs > 0
        count = (after == device) + (before == device and has_prompts)
        total += count * KV_BLOCK_TOKENS * spec.kv_bytes_per_token(index)
    return total

"""KVBlocks: how many blocks of each cache a placement needs, and their bytes on each device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.model_spec import ModelSpec
from planner.placement import KV_BLOCK_TOKENS, Device, LayerPlacement, Placement
from planner.workload import Workload


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
        are decoded on: a sequence leaves them when its prompt ends. Where only parts of them are,
        of those parts (`prompt_span`).
    fronts : int
        Where caches are divided: of the tokens of every sequence that are on the GPU. `first` are
        then of those that follow them. Layers whose cache is whole have both.
    """

    first: int
    second: int = 0
    prompts: int = 0
    fronts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpan:
    """Blocks of a sequence by position: from `start` on, up to `stop` where it ends."""

    start: int = 0
    stop: int | None = None

    def count(self, num_blocks: int) -> int:
        """How many of a sequence's first blocks lie in it.

        Examples
        --------
        >>> [BlockSpan(start=2, stop=4).count(each) for each in (1, 3, 9)]
        [0, 1, 2]
        """
        end = num_blocks if self.stop is None else min(num_blocks, self.stop)
        return max(0, end - self.start)

    def most(self, num_blocks: int) -> int | None:
        """Blocks of the longest sequence that has no more than so many in it; None: of any."""
        if self.stop is not None and num_blocks >= self.stop - self.start:
            return None
        return self.start + num_blocks


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens of one sequence."""
    return -(-num_tokens // KV_BLOCK_TOKENS)


def num_front_blocks(placement: Placement) -> int:
    """Blocks of a sequence on the GPU in layers whose caches are divided."""
    return placement.decode.num_gpu_kv_tokens // KV_BLOCK_TOKENS


def moves_prompts(placement: Placement, wave: Workload) -> bool:
    """Are prompts of any sequence computed on another device than they are decoded on?"""
    return num_second_seqs(placement, wave) > 0 or prompt_span(placement) is not None


def prompt_span(placement: Placement) -> BlockSpan | None:
    """The blocks of a sequence whose prompt has pages of its own, in any layer; None: in none.

    Of a divided cache those of the part that is on the other device in prefill: the other part is
    computed where it stays.
    """
    front, found = num_front_blocks(placement), list[BlockSpan]()
    for before, after in zip(placement.prefill.layers, placement.decode.layers, strict=True):
        if after.num_gpu_kv_tokens:
            is_on_gpu = before.kv == "gpu"
            found.append(BlockSpan(start=front) if is_on_gpu else BlockSpan(stop=front))
        elif before.kv != after.kv:
            found.append(BlockSpan())
    if not found:
        return None
    stops = [each.stop for each in found if each.stop is not None]
    return BlockSpan(
        start=min(each.start for each in found),
        stop=max(stops) if len(stops) == len(found) else None,
    )


def kv_blocks(placement: Placement, wave: Workload) -> KVBlocks:
    """Blocks for sequences that run together, every one at its full length."""
    each = num_blocks_for(wave.context_len)
    second = num_second_seqs(placement, wave)
    prompts, front = 0, num_front_blocks(placement)
    if moves_prompts(placement, wave):
        span = prompt_span(placement) or BlockSpan()
        prompts = num_prompt_blocks(wave, placement.prefill.max_num_tokens, span)
    return KVBlocks(
        first=(wave.num_seqs - second) * (each - min(each, front)),
        second=second * each,
        prompts=prompts,
        # one whole front at least: no sequence is too long for them
        fronts=max(wave.num_seqs * min(each, front), front),
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


def num_prompt_blocks(wave: Workload, chunk_tokens: int, span: BlockSpan | None = None) -> int:
    """Blocks of those prompts; room for one sequence that begins again at its full length.

    Of a span, those of its blocks.
    """
    span = span or BlockSpan()
    prompts = num_prompts(wave, chunk_tokens) * span.count(num_blocks_for(wave.prompt_len))
    return max(prompts, span.count(num_blocks_for(wave.context_len)))


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


def num_pages(
    before: LayerPlacement, after: LayerPlacement, blocks: KVBlocks, device: Device
) -> int:
    """Blocks of a layer on a device, in a placement with divided caches.

    `before` and `after` are the layer in prefill and in decode. The pages that prompts leave when
    they end lie behind those of the part that is on their device.
    """
    if after.num_gpu_kv_tokens:
        part = blocks.fronts if device == "gpu" else blocks.first
        return part + blocks.prompts * (before.kv == device)
    whole = (blocks.fronts + blocks.first) * (after.kv == device)
    return whole + blocks.prompts * (before.kv == device != after.kv)


def kv_bytes(spec: ModelSpec, placement: Placement, wave: Workload, device: Device) -> int:
    """Bytes of all caches of a placement on a device."""
    if placement.decode.num_gpu_kv_tokens:
        return _divided_kv_bytes(spec, placement, wave, device)
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


def _divided_kv_bytes(spec: ModelSpec, placement: Placement, wave: Workload, device: Device) -> int:
    """The same where caches are divided, which recurrent layers between them are not."""
    blocks, chunk_tokens = kv_blocks(placement, wave), placement.prefill.max_num_tokens
    total = 0
    layers = zip(placement.prefill.layers, placement.decode.layers, strict=True)
    for index, (before, after) in enumerate(layers):
        num_seqs, _ = _num_held(wave, device, before.kv, after.kv, chunk_tokens, 0)
        pages = num_pages(before, after, blocks, device)
        total += _held_bytes(spec, index, num_seqs, pages)
    return total


def bytes_per_block(spec: ModelSpec, placement: Placement, device: Device) -> int:
    """Bytes of one more block for sequences of the first sub-batch, and for their prompts.

    A layer whose cache moves between the phases has blocks on both devices. Where caches are
    divided it is one more of what follows the fronts.
    """
    if placement.decode.num_gpu_kv_tokens:
        span = prompt_span(placement)
        assert span is not None
        one = KVBlocks(first=1, prompts=int(span.stop is None))
        layers = zip(placement.prefill.layers, placement.decode.layers, strict=True)
        return sum(
            num_pages(*pair, one, device) * KV_BLOCK_TOKENS * spec.kv_bytes_per_token(index)
            for index, pair in enumerate(layers)
        )
    total = 0
    for index in range(spec.num_layers):
        before, after = placement.prefill.layers[index].kv, placement.decode.layers[index].kv
        has_prompts = before != after or placement.decode.num_second_seqs > 0
        count = (after == device) + (before == device and has_prompts)
        total += count * KV_BLOCK_TOKENS * spec.kv_bytes_per_token(index)
    return total


def num_more_prompts(placement: Placement, wave: Workload, num_more: int) -> int:
    """Blocks for prompts that go with so many more for sequences: none where only fronts move."""
    if not moves_prompts(placement, wave):
        return 0
    span = prompt_span(placement) or BlockSpan()
    return num_more if span.stop is None else 0

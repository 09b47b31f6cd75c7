"""KVTables: the pages in which layers have the blocks of a sequence, in prefill and in decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from hetero.kv_cache import Caches, LayerKV, MovedPages, moved_layers
from hetero.model.divided_cache import RestRows
from hetero.scheduler import Batch
from hetero.sequence import Sequence
from planner.kv_blocks import KVBlocks, num_front_blocks, prompt_span
from planner.placement import KV_BLOCK_TOKENS, Device, Placement

# The pages of a sequence's blocks, by their position in it.
Table = Callable[[Sequence], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTables:
    """Which pages of a layer are a sequence's.

    In layers whose cache is whole they have the numbers of `Sequence.block_table`, or while its
    prompt is computed on another device those of `Sequence.prompt_table`. Where caches are divided
    the numbers of fronts come first: on the GPU pages have these numbers, on the CPU they are
    counted from the end of them, and on either the pages of prompts lie behind.

    Attributes
    ----------
    moved : frozenset of int
        Layers whose cache moves as a whole when a prompt ends, of any sub-batch.
    divided : Mapping of int to Device
        Layers whose cache is divided, and the device on which prefill computes it.
    num_front_blocks : int
        Blocks of a sequence that are on the GPU in these.
    blocks : KVBlocks
        Sizes of the pools.
    prompt_start : int
        Position in a sequence of the first block of its prompt table.
    """

    moved: frozenset[int]
    divided: Mapping[int, Device]
    num_front_blocks: int
    blocks: KVBlocks
    prompt_start: int

    @classmethod
    def create(cls, placement: Placement, blocks: KVBlocks) -> KVTables:
        """The tables of a placement."""
        layers = enumerate(zip(placement.prefill.layers, placement.decode.layers, strict=True))
        divided = {at: before.kv for at, (before, after) in layers if after.num_gpu_kv_tokens}
        moved = {index for layers in moved_layers(placement, blocks) for index in layers}
        span = prompt_span(placement)
        return cls(
            moved=frozenset(moved - divided.keys()),
            divided=divided,
            num_front_blocks=num_front_blocks(placement),
            blocks=blocks,
            prompt_start=0 if span is None else span.start,
        )

    def of_prompts(self) -> Iterator[tuple[frozenset[int], Table]]:
        """Layers whose pages have other numbers in prefill than `block_table`, with those."""
        if self.moved:
            yield self.moved, lambda sequence: sequence.prompt_table or sequence.block_table
        for device, table in (("gpu", self._prompt_on_gpu), ("cpu", self._prompt_on_cpu)):
            layers = frozenset(at for at, where in self.divided.items() if where == device)
            if layers:
                yield layers, table

    def _prompt_on_gpu(self, sequence: Sequence) -> list[int]:
        """The front where it stays, the rest behind all fronts."""
        count, behind = self.num_front_blocks, self._behind("gpu")
        rest = sequence.prompt_table[count - self.prompt_start :]
        return [*sequence.block_table[:count], *(behind + page for page in rest)]

    def _prompt_on_cpu(self, sequence: Sequence) -> list[int]:
        """The front behind all else, the rest where it stays."""
        count, behind = self.num_front_blocks, self._behind("cpu")
        front = sequence.prompt_table[:count]
        return [*(behind + page for page in front), *self._rest(sequence, count)]

    def _behind(self, device: Device) -> int:
        """Where the pages of prompts begin in a divided cache."""
        return self.blocks.fronts if device == "gpu" else self.blocks.first

    def _rest(self, sequence: Sequence, start: int) -> list[int]:
        return [block - self.blocks.fronts for block in sequence.block_table[start:]]

    def moved_pages(self, caches: Caches, layer: int, sequence: Sequence) -> MovedPages:
        """What of a layer moves when a sequence's prompt has ended, and where to."""
        source = caches.prefill.layer(layer)
        target = caches.decode[sequence.sub_batch].layer(layer)
        count, at_source = self.num_front_blocks, sequence.prompt_table
        at_target = sequence.block_table
        if self.divided.get(layer) == "gpu":
            at_source = self._prompt_on_gpu(sequence)[count:]
            at_target = self._rest(sequence, count)
        elif layer in self.divided:
            at_source = [self._behind("cpu") + page for page in at_source[:count]]
            target = caches.fronts[layer]
        return MovedPages(
            source=source,
            at_source=at_source,
            target=target,
            at_target=at_target[: len(at_source)],
        )

    def pages(self, caches: Caches, sequence: Sequence) -> Iterator[tuple[LayerKV, list[int]]]:
        """Every layer's pages of a sequence, also those that its prompt has not left yet."""
        for index, layer in enumerate(caches.decode[sequence.sub_batch].layers):
            if index not in self.divided:
                yield layer, sequence.block_table
                continue
            yield layer, self._rest(sequence, self.num_front_blocks)
            yield caches.fronts[index], sequence.block_table[: self.num_front_blocks]
        for index in (*self.moved, *self.divided) if sequence.prompt_table else ():
            behind = self._behind(self.divided[index]) if index in self.divided else 0
            yield caches.prefill.layer(index), [behind + page for page in sequence.prompt_table]

    def rest_rows(self, batch: Batch) -> RestRows:
        """What the CPU attends to in a decode step over divided caches."""
        num_tokens = self.num_front_blocks * KV_BLOCK_TOKENS
        rows = [at for at, item in enumerate(batch.items) if item.num_past_tokens >= num_tokens]
        if not rows:
            return RestRows(num_seqs=len(batch.items), rows=None, batch=None)
        fronts = [0] * self.num_front_blocks
        part = replace(batch, items=tuple(batch.items[at] for at in rows))
        tensors = part.tensors_in(lambda each: fronts + self._rest(each, len(fronts)))
        tables_SB = tensors.block_tables_SB[:, len(fronts) :].contiguous()
        lens_S = tensors.context_lens_S - num_tokens
        return RestRows(
            num_seqs=len(batch.items),
            rows=None if len(rows) == len(batch.items) else torch.tensor(rows),
            batch=replace(tensors, block_tables_SB=tables_SB, context_lens_S=lens_S),
        )

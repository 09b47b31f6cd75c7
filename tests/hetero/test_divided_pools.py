"""Divided caches under any pools: every token is where its device reads it, every sequence ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hetero.errors import RequestError
from hetero.kv_cache import BLOCK_SIZE, BlockAllocator, BlockPools, Caches, LayerKV, PagedKV
from hetero.kv_tables import KVTables
from hetero.model.decoder import KVMove
from hetero.scheduler import Batch, Scheduler
from hetero.sequence import Sequence
from planner.kv_blocks import BlockSpan, KVBlocks
from planner.placement import Device
from planner.step_graph import Lane, Op
from tests.hetero.test_scheduler import make_sequence

PLACES: tuple[tuple[Device, ...], ...] = (("gpu",), ("cpu",), ("gpu", "cpu"))


class DividedMachine:
    """A scheduler whose layers only remember which token is in which slot, and on which device.

    `devices` are where prefill computes each layer.
    """

    def __init__(
        self, *, devices: tuple[Device, ...], num_front: int, blocks: KVBlocks, **limits: Any
    ) -> None:
        starts = [num_front if each == "gpu" else 0 for each in devices]
        span = BlockSpan(start=min(starts), stop=None if "gpu" in devices else num_front)
        self.pools = BlockPools(
            decode=(BlockAllocator(blocks.first, blocks.fronts),),
            prompts=BlockAllocator(blocks.prompts),
            moving=frozenset({0}),
            prompt_span=span,
            fronts=BlockAllocator(blocks.fronts),
            num_front_blocks=num_front,
        )
        self.tables = KVTables(
            moved=frozenset(),
            divided=dict(enumerate(devices)),
            num_front_blocks=num_front,
            blocks=blocks,
            prompt_start=span.start,
        )
        self.num_front_tokens = num_front * BLOCK_SIZE
        self.devices = devices
        rests, fronts, prefill = list[LayerKV](), dict[int, LayerKV](), list[LayerKV]()
        for layer, device in enumerate(devices):
            fronts[layer] = empty_pages(blocks.fronts + blocks.prompts * (device == "gpu"))
            rests.append(empty_pages(blocks.first + blocks.prompts * (device == "cpu")))
            prefill.append(fronts[layer] if device == "gpu" else rests[layer])
        self.caches = Caches(
            prefill=PagedKV(layers=tuple(prefill)),
            decode=(PagedKV(layers=tuple(rests)),),
            fronts=fronts,
        )
        self.scheduler = Scheduler(blocks=self.pools, **limits)
        self.sequences: list[Sequence] = []

    def add(self, prompt_len: int, max_tokens: int | None) -> None:
        """Add a sequence, or see it refused."""
        sequence = make_sequence(str(len(self.sequences)), prompt_len, max_tokens)
        try:
            self.scheduler.add(sequence)
        except RequestError as error:
            assert "plan for prompts" in str(error) or "KV cache more memory" in str(error)
        else:
            self.sequences.append(sequence)

    def steps(self) -> Iterator[Batch]:
        """Steps until nothing is unfinished; more than 2000 are taken for starvation."""
        for _ in range(2000):
            batch = self.scheduler.schedule()
            if batch is None:
                return
            self.check_blocks()
            if batch.phase == "prefill":
                self.prefill(batch)
            else:
                self.decode(batch)
            self.scheduler.advance(batch, [1] * len(batch.sampled))
            for sequence in batch.sampled:
                if sequence.num_tokens == self.scheduler.token_limit(sequence):
                    self.scheduler.finish(sequence, "length")
            for item in batch.items:
                if item.sequence.must_move:
                    self.move(item.sequence)
            yield batch
        raise AssertionError("the scheduler does not come to an end")

    def check_blocks(self) -> None:
        """Each is held once or free, and those of fronts come first in every table."""
        prompts = self.pools.prompts
        assert prompts is not None
        held = [block for each in self.sequences for block in each.block_table]
        free = sum(pool.num_free for pool in self.pools.allocators) - prompts.num_free
        assert len(set(held)) == len(held) == self.tables.blocks.fronts + self.num_first - free
        for each in self.sequences:
            front = each.block_table[: self.tables.num_front_blocks]
            assert all(block < self.tables.blocks.fronts for block in front)
            rest = each.block_table[self.tables.num_front_blocks :]
            assert all(block >= self.tables.blocks.fronts for block in rest)
        held = [page for each in self.sequences for page in each.prompt_table]
        assert len(set(held)) == len(held) == prompts.num_blocks - prompts.num_free
        for pool in self.pools.allocators:
            pool.check_integrity()

    @property
    def num_first(self) -> int:
        return self.tables.blocks.first

    def prefill(self, batch: Batch) -> None:
        """In the pages of prefill every token that a query sees is its sequence's."""
        for layers, table in self.tables.of_prompts():
            tensors = batch.tensors_in(table)
            for layer in layers:
                pages = self.caches.prefill.layer(layer)
                write(pages, tensors.slots_T, tensors.token_ids_T, tensors.positions_T)
                for row, item in enumerate(batch.items):
                    count = item.num_past_tokens + item.num_tokens
                    check(pages, tensors.block_tables_SB[row], item.sequence, 0, count)

    def decode(self, batch: Batch) -> None:
        """The same in the front of a sequence and in what follows it."""
        whole, rest = batch.tensors(), self.tables.rest_rows(batch)
        on_cpu = [
            row
            for row, item in enumerate(batch.items)
            if item.num_past_tokens >= self.num_front_tokens
        ]
        if rest.rows is not None:
            assert rest.rows.tolist() == on_cpu
        else:
            assert len(on_cpu) == (0 if rest.batch is None else len(batch.items))
        in_front = [row for row in range(len(batch.items)) if row not in on_cpu]
        for layer in range(len(self.devices)):
            front, behind = self.caches.fronts[layer], self.caches.decode[0].layer(layer)
            if in_front:
                of_front = (whole.slots_T, whole.token_ids_T, whole.positions_T)
                write(front, *(each[in_front] for each in of_front))
            if rest.batch is not None:
                write(behind, rest.batch.slots_T, *(whole.token_ids_T, whole.positions_T), on_cpu)
            for row, item in enumerate(batch.items):
                count = min(item.num_past_tokens + 1, self.num_front_tokens)
                check(front, whole.block_tables_SB[row], item.sequence, 0, count)
            for at, row in enumerate(on_cpu):
                assert rest.batch is not None
                sequence, count = batch.items[row].sequence, int(rest.batch.context_lens_S[at])
                assert count == batch.items[row].num_past_tokens + 1 - self.num_front_tokens
                table = rest.batch.block_tables_SB[at]
                check(behind, table, sequence, self.num_front_tokens, count)

    def move(self, sequence: Sequence) -> None:
        move = KVMove(
            SameMemory(),  # type: ignore[arg-type]
            lambda layer: self.tables.moved_pages(self.caches, layer, sequence),
        )
        for layer, device in enumerate(self.devices):
            lane: Lane = "d2h" if device == "gpu" else "h2d"
            move.perform(Op(index=layer, kind="copy", lane=lane, payload="kv", layer=layer))
        self.scheduler.leave_prompt_pages(sequence)


class SameMemory:
    """What the copies of an accelerator are where both devices have one memory."""

    def upload(self, source: Tensor) -> Tensor:
        return source.clone()

    download = upload


def empty_pages(count: int) -> LayerKV:
    """Keys are tokens, values positions."""
    shape = (count, 1, BLOCK_SIZE, 1)
    return LayerKV(key=torch.full(shape, -1), value=torch.full(shape, -1))


def write(
    pages: LayerKV, slots_T: Tensor, tokens_T: Tensor, at_T: Tensor, rows: Any = None
) -> None:
    blocks_T, offsets_T = slots_T // BLOCK_SIZE, slots_T % BLOCK_SIZE
    for tensor, values_T in ((pages.key, tokens_T), (pages.value, at_T)):
        written_T = values_T if rows is None else values_T[rows]
        tensor[blocks_T, 0, offsets_T, 0] = written_T


def check(pages: LayerKV, table: Tensor, sequence: Sequence, start: int, count: int) -> None:
    """So many tokens of a sequence from one on are in these pages."""
    places = torch.arange(count)
    blocks = table[places // BLOCK_SIZE].long()
    tokens = pages.key[blocks, 0, places % BLOCK_SIZE, 0]
    positions = pages.value[blocks, 0, places % BLOCK_SIZE, 0]
    assert tokens.tolist() == sequence.token_ids[start : start + count]
    assert positions.tolist() == [start + place for place in range(count)]


@st.composite
def machines(draw: st.DrawFn) -> DividedMachine:
    """Pools of few blocks, one front at least, as it is planned."""
    num_front = draw(st.integers(1, 4))
    return DividedMachine(
        devices=draw(st.sampled_from(PLACES)),
        num_front=num_front,
        blocks=KVBlocks(
            first=draw(st.integers(0, 8)),
            prompts=draw(st.integers(0, 8)),
            fronts=num_front + draw(st.integers(0, 6)),
        ),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 70)),
        max_model_len=draw(st.sampled_from([100, 200])),
    )


@settings(deadline=None, max_examples=300)
@given(
    machine=machines(),
    requests=st.lists(
        st.tuples(st.integers(1, 90), st.none() | st.integers(1, 90)), min_size=1, max_size=12
    ),
)
def test_every_sequence_ends_with_all_its_tokens_where_they_are_read(
    machine: DividedMachine, requests: list[tuple[int, int | None]]
) -> None:
    for prompt_len, max_tokens in requests:
        machine.add(prompt_len, max_tokens)
    for _ in machine.steps():
        pass
    for sequence in machine.sequences:
        assert sequence.finish_reason == "length"
        assert sequence.num_tokens == machine.scheduler.token_limit(sequence)
    for pool in machine.pools.allocators:
        assert pool.num_free == pool.num_blocks


@pytest.mark.parametrize(("devices", "most"), [(("gpu",), 3), (("cpu",), 6), (("gpu", "cpu"), 2)])
def test_a_prompt_longer_than_the_pages_hold_is_refused_with_the_number(
    devices: tuple[Device, ...], most: int
) -> None:
    """2 pages for prompts, 1 block in a front and 5 behind; fronts alone need no more of them."""
    machine = DividedMachine(
        devices=devices,
        num_front=1,
        blocks=KVBlocks(first=5, prompts=2, fronts=1),
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_model_len=200,
    )
    assert machine.pools.max_prompt_tokens == most * BLOCK_SIZE
    machine.scheduler.add(make_sequence("longest", most * BLOCK_SIZE, 1))
    with pytest.raises(RequestError, match=str(most * BLOCK_SIZE)):
        machine.scheduler.add(make_sequence("longer", most * BLOCK_SIZE + 1, 1))

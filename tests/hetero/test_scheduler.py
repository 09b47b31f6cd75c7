"""Scheduler: its steps, its fairness, and that neither chunks nor preemption change an output."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from numpy.typing import NDArray

from hetero.errors import RequestError
from hetero.kv_cache import BLOCK_SIZE, BlockAllocator, BlockPools
from hetero.model.batch import BatchTensors
from hetero.sampler import SamplingParams
from hetero.scheduler import Batch, Scheduler
from hetero.sequence import Sequence
from planner.kv_blocks import num_blocks_for, num_prompts
from planner.workload import Workload, decode_shape, prefill_shapes

VOCAB_SIZE = 97


def make_sequence(seq_id: str, prompt_len: int, max_tokens: int | None = 4) -> Sequence:
    """A sequence whose prompt depends on its id."""
    rng = np.random.default_rng(zlib.crc32(seq_id.encode()))
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=rng.integers(0, VOCAB_SIZE, prompt_len).tolist(),
        params=SamplingParams(max_tokens=max_tokens),
    )


def next_token(context: NDArray[np.int64]) -> int:
    """The fake model: a token that depends on every token before it and on their order."""
    return zlib.crc32(context.tobytes()) % VOCAB_SIZE


def output_alone(sequence: Sequence, num_tokens: int) -> list[int]:
    """What the fake model gives a sequence without scheduler and cache."""
    token_ids = list(sequence.prompt_token_ids)
    for _ in range(num_tokens):
        token_ids.append(next_token(np.array(token_ids, dtype=np.int64)))
    return token_ids[sequence.num_prompt_tokens :]


class Machine:
    """A scheduler with a fake model that sees tokens only through slots and block tables.

    Where prompts of sub-batches `moving` are computed elsewhere, all prompts of a step are computed
    in one cache: the pages of prompts, behind those of the first sub-batch's where its own do not
    move; and what ends moves to the cache of its sub-batch.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        num_second: int = 0,
        num_prompts: int = 0,
        moving: frozenset[int] = frozenset(),
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 512,
    ) -> None:
        self.blocks = BlockAllocator(num_blocks)
        self.ticks = itertools.count()
        self.pools = BlockPools(
            decode=(self.blocks, *([BlockAllocator(num_second)] if num_second else [])),
            prompts=BlockAllocator(num_prompts, 0 if 0 in moving else num_blocks)
            if moving
            else None,
            moving=moving,
        )
        self.scheduler = Scheduler(
            blocks=self.pools,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            clock=lambda: float(next(self.ticks)),
        )
        self.caches = [empty_cache(num_blocks), empty_cache(num_second)]
        self.prefill_cache = self.caches[0]
        if moving:
            self.prefill_cache = empty_cache(num_prompts + (0 if 0 in moving else num_blocks))
            if 0 not in moving:
                self.caches[0] = self.prefill_cache
        self.sequences: list[Sequence] = []

    def add(self, seq_id: str, prompt_len: int, max_tokens: int | None = 4) -> Sequence:
        sequence = make_sequence(seq_id, prompt_len, max_tokens)
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def step(self) -> Batch | None:
        """One step: schedule, compute, advance, finish what has reached its limit."""
        batch = self.scheduler.schedule()
        if batch is None:
            return None
        assert_within_limits(self.scheduler, batch)
        assert_no_block_shared(self)
        self.scheduler.advance(batch, self.compute(batch))
        for sequence in batch.sampled:
            if sequence.num_tokens == self.scheduler.token_limit(sequence):
                self.scheduler.finish(sequence, "length")
        self.move(batch)
        return batch

    def steps(self) -> Iterator[Batch]:
        """Steps until nothing is unfinished; more than 2000 are taken for starvation."""
        for _ in range(2000):
            batch = self.step()
            if batch is None:
                return
            yield batch
        raise AssertionError("the scheduler does not come to an end")

    def compute(self, batch: Batch) -> list[int]:
        """Tokens of the step, each sub-batch of a decode step from its own cache."""
        if batch.phase == "prefill":
            found = self.compute_in(self.prefill_cache, batch, batch.prompt_tensors())
        else:
            parts = [(cache, batch.part(number)) for number, cache in enumerate(self.caches)]
            found = {}
            for cache, part in parts:
                if part is not None:
                    found |= self.compute_in(cache, part, part.tensors())
        return [found[sequence.seq_id] for sequence in batch.sampled]

    def compute_in(
        self, cache: NDArray[np.int64], batch: Batch, tensors: BatchTensors
    ) -> dict[str, int]:
        written = np.stack([tensors.token_ids_T.numpy(), tensors.positions_T.numpy()], axis=1)
        cache[tensors.slots_T.numpy()] = written
        last: dict[int, int] = {}
        for i, item in enumerate(batch.items):
            positions = np.arange(tensors.context_lens_S[i].item())
            table = tensors.block_tables_SB[i].numpy()
            cached = cache[table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE]
            # Every cached token is the sequence's own, at its own place.
            assert cached[:, 1].tolist() == positions.tolist()
            assert cached[:, 0].tolist() == item.sequence.token_ids[: len(positions)]
            last[tensors.query_starts[i + 1] - 1] = next_token(cached[:, 0])
        rows = tensors.logit_rows_L.tolist()
        sampled = zip(batch.sampled, rows, strict=True)
        return {sequence.seq_id: last[row] for sequence, row in sampled}

    def move(self, batch: Batch) -> None:
        """Take ended prompts to the cache that they decode from."""
        for sequence in (item.sequence for item in batch.items):
            if sequence.must_move:
                sources = self.prefill_cache.reshape(-1, BLOCK_SIZE, 2)
                targets = self.caches[sequence.sub_batch].reshape(-1, BLOCK_SIZE, 2)
                blocks = sequence.block_table[: len(sequence.prompt_table)]
                targets[blocks] = sources[sequence.prompt_table]
                sources[sequence.prompt_table] = -1
                self.scheduler.leave_prompt_pages(sequence)


def empty_cache(num_blocks: int) -> NDArray[np.int64]:
    """The token and the position of each slot."""
    return np.full((num_blocks * BLOCK_SIZE, 2), -1, dtype=np.int64)


def assert_within_limits(scheduler: Scheduler, batch: Batch) -> None:
    """A step is of one phase, within its limits, with exactly the blocks that it needs."""
    assert scheduler.num_running <= scheduler.max_num_seqs
    assert len(batch.items) <= scheduler.max_num_seqs
    if batch.phase == "prefill":
        assert sum(i.num_tokens for i in batch.items) <= scheduler.max_num_batched_tokens
        assert all(item.has_logits for item in batch.items[1:-1])
    else:
        assert all(item.num_tokens == 1 and item.has_logits for item in batch.items)
    for item in batch.items:
        assert item.num_tokens >= 1
        num_needed = num_blocks_for(item.num_past_tokens + item.num_tokens)
        if item.sequence.sub_batch in scheduler.pools.moving:
            assert len(item.sequence.block_table) >= num_needed
            num_needed *= batch.phase == "prefill"
            assert len(item.sequence.prompt_table) == num_needed
        else:
            assert len(item.sequence.block_table) == num_needed
            assert item.sequence.prompt_table == []


def assert_no_block_shared(machine: Machine) -> None:
    """Every block is either free or in one place of one block table."""
    sequences, pools = machine.sequences, machine.pools
    for number, pool in enumerate(pools.decode):
        tables = [each.block_table for each in sequences if each.sub_batch == number]
        assert_all_accounted_for(pool, tables)
    tables = [each.prompt_table for each in sequences]
    assert_all_accounted_for(pools.prompts or BlockAllocator(0), tables)
    for group in (machine.scheduler._waiting, machine.scheduler._running):
        places = [sequences.index(each) for each in group]
        assert places == sorted(places), "not in the order of add"
    idle = [each for each in sequences if each.status != "running"]
    assert all(not each.block_table and not each.prompt_table for each in idle)


def assert_all_accounted_for(blocks: BlockAllocator, tables: list[list[int]]) -> None:
    held = [block for table in tables for block in table]
    assert len(set(held)) == len(held) == blocks.num_blocks - blocks.num_free
    blocks.check_integrity()


def assert_all_as_alone(machine: Machine) -> None:
    """Every sequence got all of its tokens, the same as alone, and every block is back."""
    for sequence in machine.sequences:
        num_tokens = machine.scheduler.token_limit(sequence) - sequence.num_prompt_tokens
        assert sequence.output_token_ids == output_alone(sequence, num_tokens)
        assert sequence.finish_reason == "length"
    assert_no_block_shared(machine)
    assert_all_free(machine)


def assert_all_free(machine: Machine) -> None:
    pools = machine.pools
    for blocks in (*pools.decode, *([pools.prompts] if pools.prompts else [])):
        assert blocks.num_free == blocks.num_blocks


def phases(machine: Machine, num_steps: int) -> str:
    """The phases of the next steps: `p` or `d` each."""
    batches = [machine.step() for _ in range(num_steps)]
    return "".join(batch.phase[0] for batch in batches if batch is not None)


# Steps


@settings(deadline=None, max_examples=100)
@given(num_seqs=st.integers(1, 8), prompt_len=st.integers(1, 40), chunk_tokens=st.integers(1, 100))
def test_prefill_steps_are_those_that_the_planner_prices(
    num_seqs: int, prompt_len: int, chunk_tokens: int
) -> None:
    """Prompts that wait together are prefilled in the shapes of planner.workload."""
    machine = Machine(max_num_batched_tokens=chunk_tokens)
    for number in range(num_seqs):
        machine.add(str(number), prompt_len)
    expected = prefill_shapes(num_seqs, prompt_len, chunk_tokens)
    batches = list(machine.steps())
    assert [batch.shape for batch in batches[: len(expected)]] == expected
    assert batches[len(expected)].shape == decode_shape(num_seqs, prompt_len)


def test_a_batch_says_where_every_token_goes() -> None:
    """Two prompts of 3 and 18 tokens in steps of 16: a whole one, and one in two chunks."""
    machine = Machine(max_num_batched_tokens=16)
    short, long = machine.add("short", 3), machine.add("long", 18)
    batch = machine.scheduler.schedule()
    assert batch is not None
    assert batch.sampled == (short,)
    tensors = batch.tensors()
    assert tensors.phase == "prefill"
    assert tensors.token_ids_T.tolist() == short.token_ids + long.token_ids[:13]
    assert tensors.positions_T.tolist() == [*range(3), *range(13)]
    assert tensors.slots_T.tolist() == [*range(3), *range(16, 29)]
    assert tensors.block_tables_SB.tolist() == [[0], [1]]
    assert tensors.context_lens_S.tolist() == [3, 13]
    assert tensors.logit_rows_L.tolist() == [2]
    assert tensors.query_starts == (0, 3, 16)
    assert tensors.past_lens == (0, 0)

    machine.scheduler.advance(batch, [7])
    batch = machine.scheduler.schedule()
    assert batch is not None
    assert batch.sampled == (long,)
    tensors = batch.tensors()
    assert tensors.token_ids_T.tolist() == long.token_ids[13:]
    assert tensors.positions_T.tolist() == [13, 14, 15, 16, 17]
    assert tensors.slots_T.tolist() == [29, 30, 31, 32, 33]
    assert tensors.past_lens == (13,)

    machine.scheduler.advance(batch, [8])
    batch = machine.scheduler.schedule()
    assert batch is not None
    assert batch.sampled == (short, long)
    tensors = batch.tensors()
    assert tensors.phase == "decode"
    assert tensors.token_ids_T.tolist() == [7, 8]
    assert tensors.slots_T.tolist() == [3, 34]
    assert tensors.block_tables_SB.tolist() == [[0, 0], [1, 2]]
    assert tensors.context_lens_S.tolist() == [4, 19]
    assert tensors.logit_rows_L.tolist() == [0, 1]
    dtypes = [tensors.token_ids_T.dtype, tensors.slots_T.dtype, tensors.logit_rows_L.dtype]
    assert [str(dtype) for dtype in dtypes] == ["torch.int64"] * 3
    assert str(tensors.block_tables_SB.dtype) == str(tensors.context_lens_S.dtype) == "torch.int32"


def test_a_batch_has_a_part_for_each_sub_batch_that_it_has() -> None:
    """Their items in the order of the batch; the planner is told how many are of the second."""
    machine = Machine()
    sequences = [machine.add(name, 5) for name in "abc"]
    _, batch = itertools.islice(machine.steps(), 2)
    for sequence in sequences[1:]:
        sequence.sub_batch = 1
    first, second = batch.part(0), batch.part(1)
    assert first is not None and first.items == batch.items[:1]
    assert second is not None and second.items == batch.items[1:]
    assert (batch.shape.num_second_seqs, first.shape.num_second_seqs) == (2, None)
    assert first.part(1) is None


def test_the_last_token_needs_no_slot() -> None:
    """A prompt of 16 with one token to generate lives in one block."""
    machine = Machine(num_blocks=1)
    machine.add("a", 16, max_tokens=1)
    assert phases(machine, 2) == "p"
    assert_all_as_alone(machine)


def test_no_step_when_nothing_is_unfinished() -> None:
    """An idle scheduler says so."""
    scheduler = Machine().scheduler
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished


def test_times_are_stamped_once_for_the_first_and_always_for_the_last() -> None:
    """The clock ticks at every schedule and every advance."""
    machine = Machine(max_num_batched_tokens=4)
    sequence = machine.add("a", 8, max_tokens=2)
    list(machine.steps())
    times = (sequence.first_scheduled_s, sequence.first_token_s, sequence.last_token_s)
    # schedule 0, advance 1, schedule 2, advance 3 (first token), schedule 4, advance 5
    assert times == (0.0, 3.0, 5.0)


# Order and fairness


def test_prompts_that_arrive_together_are_all_prefilled_before_the_first_decode() -> None:
    """Three prompts of two chunks each, then three decode steps for the remaining tokens."""
    machine = Machine(max_num_batched_tokens=8)
    for seq_id in "abc":
        machine.add(seq_id, 16)
    assert phases(machine, 10) == "pppppp" + "ddd"
    assert_all_as_alone(machine)


def test_prefill_takes_those_that_decode_along() -> None:
    """A token of 8 for the early one in every chunk of the late one: 7 + 7 + 7 + 3."""
    machine = Machine(max_num_batched_tokens=8)
    early = machine.add("early", 8, max_tokens=9)
    assert phases(machine, 2) == "pd"
    late = machine.add("late", 24)
    for num_tokens, num_output_tokens in ((7, 3), (7, 4), (7, 5), (3, 6)):
        batch = machine.step()
        assert batch is not None and batch.phase == "prefill"
        assert [(item.phase, item.num_tokens) for item in batch.items] == [
            ("decode", 1),
            ("prefill", num_tokens),
        ]
        assert batch.num_phase_tokens == num_tokens
        assert early.num_output_tokens == num_output_tokens
    assert late.num_output_tokens == 1
    assert phases(machine, 3) == "ddd"
    assert_all_as_alone(machine)


def test_a_late_prompt_shares_the_steps_with_those_that_decode_elsewhere() -> None:
    """Its chunks take every second step, and once it decodes nobody waits."""
    machine = Machine(max_num_batched_tokens=8, num_prompts=8, moving=frozenset({0}))
    machine.add("early", 8, max_tokens=9)
    assert phases(machine, 2) == "pd"
    machine.add("late", 24)
    assert phases(machine, 7) == "pdpdpdd"
    list(machine.steps())
    assert_all_as_alone(machine)


def test_more_that_decode_than_a_step_holds_are_not_taken_along() -> None:
    """A prefill step has room for two tokens: prompts and the two that decode take turns."""
    machine = Machine(max_num_batched_tokens=2)
    machine.add("a", 2, max_tokens=9)
    machine.add("b", 2, max_tokens=9)
    assert phases(machine, 3) == "ppd"
    machine.add("late", 4)
    assert phases(machine, 5) == "pdpdd"
    list(machine.steps())
    assert_all_as_alone(machine)


def test_a_prompt_that_waited_from_the_start_is_not_late() -> None:
    """With room for one sequence at a time each is done before the next begins."""
    machine = Machine(max_num_seqs=1)
    for seq_id in "abc":
        machine.add(seq_id, 8, max_tokens=3)
    assert phases(machine, 10) == "pddpddpdd"
    assert_all_as_alone(machine)


def test_endless_arrivals_do_not_hold_up_a_decoding_sequence() -> None:
    """With a new prompt before every step, it gets a token in every second step at least."""
    machine = Machine(max_num_batched_tokens=16, num_blocks=200, max_num_seqs=100)
    first = machine.add("first", 8, max_tokens=30)
    machine.step()
    for number in range(58):
        before = first.num_output_tokens
        machine.add(str(number), 16, max_tokens=1)
        machine.step()
        machine.step()
        assert first.is_finished or first.num_output_tokens > before
    assert first.is_finished


def test_a_prompt_that_waits_is_not_overtaken() -> None:
    """A small prompt behind one whose blocks are not free waits with it."""
    machine = Machine(num_blocks=4)
    machine.add("running", 20, max_tokens=12)  # 2 blocks
    machine.step()
    large, small = machine.add("large", 40), machine.add("small", 1)  # 3 blocks, 1 block
    while not machine.sequences[0].is_finished:
        assert large.status == small.status == "waiting"
        machine.step()
    machine.step()
    assert large.status == small.status == "running"


def test_a_prompt_does_not_start_before_all_of_it_fits() -> None:
    """With 2 blocks free a prompt of 3 waits, although its first chunk would fit."""
    machine = Machine(num_blocks=4, max_num_batched_tokens=20)
    machine.add("running", 20, max_tokens=8)
    machine.step()
    waiting = machine.add("waiting", 40)
    assert phases(machine, 7) == "ddddddd"
    assert (waiting.status, waiting.block_table) == ("waiting", [])
    assert phases(machine, 3) == "ppd"


def test_an_id_used_again_is_not_late_for_its_earlier_use() -> None:
    """What is remembered of a sequence ends with it."""
    machine = Machine(max_num_batched_tokens=8)
    machine.add("early", 8, max_tokens=2)
    machine.step()
    machine.add("again", 8, max_tokens=2)
    list(machine.steps())
    machine.add("first", 8)
    machine.add("again", 8)
    assert phases(machine, 3) == "ppd"


# Preemption


def test_the_sequence_added_last_gives_way_when_blocks_run_out() -> None:
    """Two of 16 + 40 tokens (4 blocks each) in 4 blocks: the second waits, and nothing is lost."""
    machine = Machine(num_blocks=4)
    first, second = machine.add("first", 16, 40), machine.add("second", 16, 40)
    list(machine.steps())
    # 1 + 1 blocks, then 2 + 2 until both hold 32 tokens; the third block of the first is the
    # second's, whose 33 tokens then need 3 blocks and wait for the first to finish.
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert_all_as_alone(machine)


def test_a_preempted_sequence_waits_before_all_others() -> None:
    """Its prompt and its output so far are prefilled in one go when blocks are free again."""
    machine = Machine(num_blocks=4, max_num_seqs=2)
    first, second = machine.add("first", 16, 33), machine.add("second", 16, 33)
    third = machine.add("third", 1)
    while not second.num_preemptions:
        machine.step()
    assert (second.status, second.num_computed_tokens, second.num_tokens) == ("waiting", 0, 33)
    while not first.is_finished:
        assert third.status == "waiting"
        machine.step()
    batch = machine.step()
    assert batch is not None
    items = [(i.sequence, i.num_past_tokens, i.num_tokens, i.has_logits) for i in batch.items]
    assert items == [(second, 0, 33, True), (third, 0, 1, True)]
    list(machine.steps())
    assert_all_as_alone(machine)


# Refusals


def test_a_sequence_that_can_never_fit_is_refused_with_the_numbers() -> None:
    """4 blocks hold 64 tokens: 40 + 26 needs 65 slots, 40 + 25 just fits."""
    machine = Machine(num_blocks=4)
    with pytest.raises(
        RequestError,
        match=r"40 tokens and max_tokens is 26, .* hold 65 tokens but it holds 64; "
        r"lower max_tokens to 25 or less, or give the KV cache more memory",
    ):
        machine.add("a", 40, max_tokens=26)
    assert not machine.scheduler.has_unfinished
    machine.add("a", 40, max_tokens=25)
    list(machine.steps())
    assert_all_as_alone(machine)


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "message"),
    [
        (0, 4, "no tokens"),
        (100, 4, "100 tokens but the model's limit is 100"),
        (70, 4, "shorten the prompt, or give"),
        (70, None, "max_tokens is None, .* hold 99 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(
    prompt_len: int, max_tokens: int | None, message: str
) -> None:
    """The message names the number that is in the way."""
    machine = Machine(num_blocks=4, max_model_len=100)
    with pytest.raises(RequestError, match=message):
        machine.add("a", prompt_len, max_tokens)


def test_an_id_in_use_is_refused() -> None:
    """Two unfinished requests of one id could not be told apart."""
    machine = Machine()
    machine.add("a", 3)
    with pytest.raises(RequestError, match="'a' is in use"):
        machine.add("a", 3)


@pytest.mark.parametrize("max_tokens", [None, 99])
def test_the_model_limit_ends_a_sequence(max_tokens: int | None) -> None:
    """A sequence goes on to max_model_len where max_tokens allows it."""
    machine = Machine(max_model_len=50)
    sequence = machine.add("a", 20, max_tokens)
    list(machine.steps())
    assert sequence.num_tokens == 50
    assert_all_as_alone(machine)


# Ends


def test_an_aborted_sequence_gives_its_blocks_back() -> None:
    """Waiting, part-way through its prompt or decoding: all blocks are free afterwards."""
    machine = Machine(max_num_batched_tokens=8, max_num_seqs=2)
    decoding, part_way, waiting = machine.add("a", 8), machine.add("b", 20), machine.add("c", 8)
    phases(machine, 2)
    states = [(s.status, s.is_prefill) for s in (decoding, part_way, waiting)]
    assert states == [("running", False), ("running", True), ("waiting", True)]
    for sequence in (decoding, part_way, waiting):
        assert machine.scheduler.abort(sequence.seq_id) is sequence
        assert (sequence.status, sequence.finish_reason) == ("finished", "abort")
    assert machine.scheduler.abort("a") is None
    assert not machine.scheduler.has_unfinished
    assert machine.blocks.num_free == machine.blocks.num_blocks


def test_finish_records_why() -> None:
    """The reason and what was met (a token, a string) stay with the sequence."""
    machine = Machine()
    sequence = machine.add("a", 3)
    machine.step()
    machine.scheduler.finish(sequence, "stop", "END")
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", "END")
    assert machine.blocks.num_free == machine.blocks.num_blocks


def test_a_row_without_a_token_adds_nothing() -> None:
    """A numerical error leaves its sequence as it was, for the engine to finish; others go on."""
    machine = Machine()
    failed, fine = machine.add("failed", 3), machine.add("fine", 3)
    batch = machine.scheduler.schedule()
    assert batch is not None
    machine.scheduler.advance(batch, [None, 5])
    machine.scheduler.finish(failed, "error")
    assert (failed.output_token_ids, fine.output_token_ids) == ([], [5])
    batch = machine.scheduler.schedule()
    assert batch is not None
    assert (batch.phase, batch.sampled) == ("decode", (fine,))


def test_tokens_of_a_sequence_that_ended_during_the_step_are_dropped() -> None:
    """An abort between schedule and advance leaves the sequence as it was aborted."""
    machine = Machine()
    gone, fine = machine.add("gone", 3), machine.add("fine", 3)
    batch = machine.scheduler.schedule()
    assert batch is not None
    machine.scheduler.abort("gone")
    machine.scheduler.advance(batch, [4, 5])
    assert (gone.output_token_ids, fine.output_token_ids) == ([], [5])
    assert gone.num_computed_tokens == 0


# Whatever happens


class RandomRuns(RuleBasedStateMachine):
    """Requests arrive, run and are aborted in any order, with few blocks and small steps."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(
            num_blocks=6, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=97
        )

    @rule(prompt_len=st.integers(1, 60), max_tokens=st.integers(1, 37))
    def add(self, prompt_len: int, max_tokens: int) -> None:
        self.machine.add(str(len(self.machine.sequences)), prompt_len, max_tokens)

    @rule(num_steps=st.integers(1, 12))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.machine.step()

    @precondition(lambda self: self.machine.scheduler.has_unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        ids = [s.seq_id for s in self.machine.sequences if not s.is_finished]
        self.machine.scheduler.abort(data.draw(st.sampled_from(ids)))

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        assert_no_block_shared(self.machine)

    @invariant()
    def running_sequences_are_older_than_waiting_ones(self) -> None:
        statuses = [s.status for s in self.machine.sequences if not s.is_finished]
        assert statuses == sorted(statuses)

    def teardown(self) -> None:
        list(self.machine.steps())
        for sequence in self.machine.sequences:
            if sequence.finish_reason == "length":
                assert sequence.num_output_tokens == sequence.params.max_tokens
            expected = output_alone(sequence, sequence.num_output_tokens)
            assert sequence.output_token_ids == expected
        assert self.machine.blocks.num_free == self.machine.blocks.num_blocks


TestRandomRuns = RandomRuns.TestCase
TestRandomRuns.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)


@settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 47)), min_size=1, max_size=10),
    num_blocks=st.integers(6, 12),
    max_num_seqs=st.integers(1, 6),
    chunk_tokens=st.integers(1, 70),
)
def test_every_sequence_gets_the_output_that_it_gets_alone(
    requests: list[tuple[int, int]], num_blocks: int, max_num_seqs: int, chunk_tokens: int
) -> None:
    """Chunks, batches and preemptions change no token, and every sequence comes to its end."""
    machine = Machine(
        num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=chunk_tokens
    )
    for number, (prompt_len, max_tokens) in enumerate(requests):
        machine.add(str(number), prompt_len, max_tokens)
    list(machine.steps())
    assert_all_as_alone(machine)


# Pages for prompts, and two sub-batches

KINDS_OF_POOLS = {
    # prompts of all sequences move; only those of a second sub-batch; those of both
    "prompts": (False, frozenset({0})),
    "second": (True, frozenset({1})),
    "both": (True, frozenset({0, 1})),
}


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Pools of few blocks, some too small for any request."""
    has_second, moving = KINDS_OF_POOLS[draw(st.sampled_from(sorted(KINDS_OF_POOLS)))]
    return Machine(
        num_blocks=draw(st.integers(1, 10)),
        num_second=draw(st.integers(1, 10)) if has_second else 0,
        num_prompts=draw(st.integers(1, 8)),
        moving=moving,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 70)),
        max_model_len=draw(st.sampled_from([100, 200])),
    )


def add_what_fits(machine: Machine, prompt_len: int, max_tokens: int | None) -> None:
    """Add a sequence, or see it refused with nothing changed."""
    try:
        machine.add(str(len(machine.sequences)), prompt_len, max_tokens)
    except RequestError as error:
        assert "plan for prompts" in str(error) or "KV cache more memory" in str(error)


@settings(deadline=None, max_examples=300)
@given(
    machine=machines(),
    requests=st.lists(
        st.tuples(st.integers(1, 80), st.none() | st.integers(1, 90)), min_size=1, max_size=12
    ),
)
def test_every_sequence_ends_whatever_the_pools(
    machine: Machine, requests: list[tuple[int, int | None]]
) -> None:
    """What was not refused gets the tokens that it gets alone, and all blocks come back."""
    for prompt_len, max_tokens in requests:
        add_what_fits(machine, prompt_len, max_tokens)
    list(machine.steps())
    assert_all_as_alone(machine)


class RandomPools(RuleBasedStateMachine):
    """The same with arrivals and aborts at any time."""

    @initialize(machine=machines())
    def begin(self, machine: Machine) -> None:
        self.machine = machine

    @rule(prompt_len=st.integers(1, 60), max_tokens=st.integers(1, 60))
    def add(self, prompt_len: int, max_tokens: int) -> None:
        add_what_fits(self.machine, prompt_len, max_tokens)

    @rule(num_steps=st.integers(1, 12))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.machine.step()

    @precondition(lambda self: self.machine.scheduler.has_unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        ids = [each.seq_id for each in self.machine.sequences if not each.is_finished]
        self.machine.scheduler.abort(data.draw(st.sampled_from(ids)))

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        assert_no_block_shared(self.machine)

    def teardown(self) -> None:
        list(self.machine.steps())
        for sequence in self.machine.sequences:
            assert sequence.is_finished
            expected = output_alone(sequence, sequence.num_output_tokens)
            assert sequence.output_token_ids == expected
        assert_all_free(self.machine)


TestRandomPools = RandomPools.TestCase
TestRandomPools.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


@settings(deadline=None, max_examples=100)
@given(num_seqs=st.integers(1, 8), prompt_len=st.integers(1, 40), chunk_tokens=st.integers(1, 100))
def test_planned_prompt_pages_hold_up_no_prompt(
    num_seqs: int, prompt_len: int, chunk_tokens: int
) -> None:
    """With the blocks that the planner counts, prefill steps are those that it prices."""
    wave = Workload(prompt_len=prompt_len, output_len=4, num_seqs=num_seqs)
    each = num_blocks_for(wave.context_len)
    machine = Machine(
        num_blocks=num_seqs * each,
        num_prompts=num_prompts(wave, chunk_tokens) * each,
        moving=frozenset({0}),
        max_num_batched_tokens=chunk_tokens,
    )
    for number in range(num_seqs):
        machine.add(str(number), prompt_len)
    expected = prefill_shapes(num_seqs, prompt_len, chunk_tokens)
    batches = list(machine.steps())
    assert [batch.shape for batch in batches[: len(expected)]] == expected
    assert len(batches) == len(expected) + 3, "no sequence is prefilled again"


def test_a_prompt_has_two_sets_of_places_until_it_ends() -> None:
    """A prompt of 18 in chunks of 16: blocks of both pools, and those of prompts come back."""
    machine = Machine(num_prompts=2, moving=frozenset({0}), max_num_batched_tokens=16)
    before = machine.add("before", 3, max_tokens=1)
    machine.step()
    assert before.is_finished
    sequence = machine.add("a", 18)
    sequence_blocks = machine.blocks.allocate(2)  # the two that `before` did and did not have
    assert sequence_blocks == [0, 1]
    batch = machine.scheduler.schedule()
    assert batch is not None
    assert (sequence.block_table, sequence.prompt_table) == ([2], [0])
    assert batch.tensors().slots_T.tolist() == [*range(32, 48)]
    assert batch.prompt_tensors().slots_T.tolist() == [*range(16)]
    assert batch.prompt_tensors().block_tables_SB.tolist() == [[0]]
    machine.scheduler.advance(batch, [])
    assert not sequence.must_move
    batch = machine.scheduler.schedule()
    assert batch is not None
    assert (sequence.block_table, sequence.prompt_table) == ([2, 3], [0, 1])
    machine.scheduler.advance(batch, [5])
    assert sequence.must_move
    machine.scheduler.leave_prompt_pages(sequence)
    assert (sequence.block_table, sequence.prompt_table) == ([2, 3], [])
    assert not sequence.must_move


def test_a_prompt_waits_for_pages_of_prompts() -> None:
    """Two prompts of a block in a step, one block for prompts: one after the other."""
    machine = Machine(num_prompts=1, moving=frozenset({0}))
    for seq_id in "abc":
        machine.add(seq_id, 16)
    assert phases(machine, 6) == "pppddd"
    assert_all_as_alone(machine)


def test_a_prompt_longer_than_the_pages_for_prompts_is_refused() -> None:
    """Two blocks for prompts hold 32 tokens; the output may go beyond."""
    machine = Machine(num_prompts=2, moving=frozenset({0}))
    with pytest.raises(
        RequestError,
        match=r"33 tokens but the part of the KV cache in which prompts are computed holds 32; "
        r"shorten the prompt, or plan for prompts of its length",
    ):
        machine.add("a", 33)
    assert not machine.scheduler.has_unfinished
    machine.add("a", 32, max_tokens=40)
    list(machine.steps())
    assert_all_as_alone(machine)


def test_what_could_not_be_prefilled_again_never_gives_way() -> None:
    """6 blocks; with its second block `long` gets all 4, as prompts of 33 tokens have no room.

    By then `old` has one and `short` its last one, which it has to give to `old`.
    """
    machine = Machine(num_blocks=6, num_prompts=2, moving=frozenset({0}))
    old, long = machine.add("old", 1, max_tokens=31), machine.add("long", 16, max_tokens=48)
    short = machine.add("short", 1, max_tokens=31)
    assert phases(machine, 2) == "pp"
    assert [len(each.block_table) for each in (old, long, short)] == [1, 1, 1]
    machine.step()
    assert [len(each.block_table) for each in (old, long, short)] == [1, 4, 1]
    list(machine.steps())
    assert [each.num_preemptions for each in (old, long, short)] == [0, 0, 1]
    assert_all_as_alone(machine)


def test_what_finds_no_room_to_its_end_waits_while_it_can_be_prefilled_again() -> None:
    """5 blocks; `late` needs all 4 with its second one, while `long` has 4 of its own."""
    machine = Machine(num_blocks=5, num_prompts=2, moving=frozenset({0}))
    long, late = machine.add("long", 16, max_tokens=48), machine.add("late", 16, max_tokens=48)
    machine.step()
    machine.step()
    assert [len(each.block_table) for each in (long, late)] == [4, 0]
    assert late.status == "waiting"
    while not long.is_finished:
        machine.step()
        assert late.status == "waiting" or long.is_finished
    list(machine.steps())
    assert [each.num_preemptions for each in (long, late)] == [0, 1]
    assert_all_as_alone(machine)


def test_a_step_is_made_where_all_that_decode_give_way() -> None:
    """`long` gets 4 of 6 blocks with its last chunk; `old` needs a third one and waits."""
    machine = Machine(num_blocks=6, num_prompts=3, moving=frozenset({0}), max_num_batched_tokens=47)
    old = machine.add("old", 31, max_tokens=17)
    assert phases(machine, 1) == "p"
    long = machine.add("long", 48, max_tokens=17)
    assert phases(machine, 2) == "dp"
    assert len(long.block_table) == 4
    batch = machine.step()
    assert batch is not None
    assert (batch.phase, batch.sampled, old.status) == ("prefill", (long,), "waiting")
    assert phases(machine, 1) == "d"
    assert long.num_output_tokens == 2
    list(machine.steps())
    assert_all_as_alone(machine)


def test_a_prefill_again_that_ends_before_the_newest_token_moves_too() -> None:
    """33 tokens again in chunks of 32: the last of them is a decode step of what has moved."""
    machine = Machine(num_blocks=4, num_prompts=3, moving=frozenset({0}), max_num_batched_tokens=32)
    machine.add("first", 16, 33)
    second = machine.add("second", 16, 33)
    list(machine.steps())
    assert second.num_preemptions == 1
    assert_all_as_alone(machine)


def test_sequences_spill_to_the_second_sub_batch() -> None:
    """Blocks of two sequences at full length each: two join the first, two the second, one waits.

    Prompts are of one block, so the first could take a third for now: it would give way later.
    """
    machine = Machine(
        num_blocks=4, num_second=4, num_prompts=2, moving=frozenset({1}), max_num_seqs=5
    )
    sequences = [machine.add(str(number), 16, max_tokens=17) for number in range(4)]
    batch = machine.step()
    assert batch is not None
    assert [each.sub_batch for each in sequences] == [0, 0, 1, 1]
    parts = [batch.part(number) for number in range(3)]
    assert [part and part.sampled for part in parts] == [
        tuple(sequences[:2]),
        tuple(sequences[2:]),
        None,
    ]
    late = machine.add("late", 40, max_tokens=17)
    assert late.status == "waiting"
    batch = machine.step()
    assert batch is not None
    assert (batch.phase, batch.sampled) == ("decode", tuple(sequences))
    list(machine.steps())
    assert all(each.num_preemptions == 0 for each in machine.sequences)
    assert_all_as_alone(machine)


def test_a_sequence_that_gave_way_may_join_the_other_sub_batch() -> None:
    """The first has no room for two at full length, the second none at all until `other` ends."""
    machine = Machine(num_blocks=4, num_second=3, num_prompts=3, moving=frozenset({1}))
    first = machine.add("first", 16, max_tokens=48)
    other = machine.add("other", 33, max_tokens=10)
    second = machine.add("second", 16, max_tokens=32)
    machine.step()
    assert [each.sub_batch for each in (first, other, second)] == [0, 1, 0]
    while not second.num_preemptions:
        machine.step()
    assert other.is_finished
    machine.step()
    assert second.sub_batch == 1
    list(machine.steps())
    assert_all_as_alone(machine)


def test_those_that_gave_way_keep_their_order() -> None:
    """Two in each sub-batch give way in one step, and wait in the order in which they were added.

    Each comes to 48 slots, 3 blocks, of which each sub-batch has 4.
    """
    machine = Machine(
        num_blocks=4, num_second=4, num_prompts=8, moving=frozenset({1}), max_num_batched_tokens=68
    )
    a, b, c, d = (machine.add(name, 17, max_tokens=32) for name in "abcd")
    machine.step()
    assert [each.sub_batch for each in (a, b, c, d)] == [0, 1, 0, 1]
    while not d.num_preemptions:
        machine.step()
    assert [each.num_preemptions for each in (a, b, c, d)] == [0, 0, 1, 1]
    batch = machine.step()
    while batch is not None and batch.phase == "decode":
        batch = machine.step()
    assert batch is not None
    assert batch.sampled == (c, d)
    list(machine.steps())
    assert_all_as_alone(machine)


def test_aborted_prompts_give_all_their_blocks_back() -> None:
    """Part-way, ended but not yet moved, and decoding."""
    machine = Machine(num_prompts=4, moving=frozenset({0}), max_num_batched_tokens=20)
    decoding = machine.add("decoding", 16)
    machine.step()
    ended, part_way = machine.add("ended", 16), machine.add("part-way", 16)
    batch = machine.scheduler.schedule()
    while batch is not None and batch.phase == "decode":
        machine.scheduler.advance(batch, [1])
        batch = machine.scheduler.schedule()
    assert batch is not None
    machine.scheduler.advance(batch, [1])
    assert [each.must_move for each in (decoding, ended, part_way)] == [False, True, False]
    assert part_way.prompt_table != []
    for sequence in (decoding, ended, part_way):
        machine.scheduler.abort(sequence.seq_id)
    assert_all_free(machine)

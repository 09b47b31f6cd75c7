"""NEO's iteration: its published scenarios, and what must hold for any queues."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.neo_iteration import Iteration, Limits, Queues, next_iteration
from planner.sub_batches import Decode, Prompt, SubBatch, batch_times, remains_s
from tests.planner.straight_predictor import STUB, Straight, decodes, predictors, prompt

# 64 GPU blocks of 16 tokens, 64 sequences.
LIMITS = Limits(num_gpu_blocks=64, num_cpu_blocks=2048, max_seqs=64, max_tokens=2048)


def rate(batches: tuple[SubBatch, ...], predictor: Straight) -> float:
    gpu_s = sum(batch_times(each, predictor).gpu_s for each in batches)
    return sum(each.num_seqs for each in batches) / gpu_s


def with_prompt(cpu_lengths: int) -> Queues:
    """VEC 7's busy GPU: four decodes fill it, so that the prompt is for the CPU."""
    return Queues(
        waiting=(prompt(300),),
        gpu_decodes=decodes(4, 256),
        cpu_decodes=decodes(6, cpu_lengths, first_id=10),
    )


def test_the_published_pair_is_run() -> None:
    """VEC 7: 9 sequences in 5.782 ms beat 5 in 4.742; it leaves 0.61 and 0.88 ms."""
    chosen = next_iteration(with_prompt(512), LIMITS, STUB)
    assert chosen.is_pipelined
    first, second = chosen.batches
    assert (len(first.cpu_prefills), len(first.gpu_prefills)) == (1, 0)
    assert (len(first.gpu_decodes), len(first.cpu_decodes)) == (4, 1)
    assert second == SubBatch(cpu_decodes=decodes(3, 512, first_id=10))
    assert remains_s((first, second), STUB) == pytest.approx((0.61, 0.88), abs=0.005)
    alone = SubBatch(cpu_prefills=(prompt(300),), gpu_decodes=decodes(4, 256))
    assert rate(chosen.batches, STUB) == pytest.approx(9 / 5.782, rel=1e-4)
    assert rate((alone,), STUB) == pytest.approx(5 / 4.742, rel=1e-4)
    assert (chosen.swapped_in, chosen.swapped_out) == ((), ())


def test_one_long_decode_on_the_cpu_is_longer_than_the_gpu_has_work_for() -> None:
    """VEC 7: three decodes are 1.03 ms of linear layers, 512 tokens 1.02 and the launch."""
    queues = Queues(gpu_decodes=decodes(3, 256), cpu_decodes=decodes(6, 512, first_id=10))
    chosen = next_iteration(queues, LIMITS, STUB)
    assert chosen == Iteration(batches=(SubBatch(gpu_decodes=decodes(3, 256)),))


def test_short_decodes_all_go_to_the_second_sub_batch() -> None:
    """VEC 7: six of 128 tokens."""
    chosen = next_iteration(with_prompt(128), LIMITS, STUB)
    assert chosen.is_pipelined
    assert chosen.batches[0].cpu_decodes == ()
    assert chosen.batches[1].cpu_decodes == decodes(6, 128, first_id=10)


def test_long_decodes_stay_where_they_are() -> None:
    """VEC 7: six of 2048 tokens; the GPU runs alone, and the prompt with it."""
    chosen = next_iteration(with_prompt(2048), LIMITS, STUB)
    assert not chosen.is_pipelined
    assert chosen.batches == (SubBatch(cpu_prefills=(prompt(300),), gpu_decodes=decodes(4, 256)),)


def test_decodes_come_back_in_order_while_there_is_room() -> None:
    """61 of 64 blocks may be filled: 3 * 16 + 8 are 56, and 8 more are too many."""
    queues = Queues(gpu_decodes=decodes(3, 256), cpu_decodes=decodes(3, 128, first_id=10))
    chosen = next_iteration(queues, LIMITS, STUB)
    assert [each.seq_id for each in chosen.swapped_in] == [10]
    assert [each.seq_id for each in chosen.batches[0].gpu_decodes] == [0, 1, 2, 10]


def test_the_last_decode_leaves_where_the_blocks_are_too_many() -> None:
    """5 * 16 blocks: one leaves, to the head of the CPU's queue, and does not come back at once."""
    queues = Queues(gpu_decodes=decodes(5, 256), cpu_decodes=decodes(1, 16, first_id=10))
    chosen = next_iteration(queues, LIMITS, STUB)
    assert [each.seq_id for each in chosen.swapped_out] == [4]
    assert chosen.swapped_in == ()
    assert chosen.batches[0].gpu_decodes == decodes(4, 256)


@pytest.mark.parametrize("limits", [replace(LIMITS, max_seqs=3), replace(LIMITS, max_tokens=3)])
def test_too_many_sequences_or_tokens_leave_too(limits: Limits) -> None:
    """A decode is one of each."""
    queues = Queues(gpu_decodes=decodes(5, 16))
    chosen = next_iteration(queues, limits, STUB)
    assert [each.seq_id for each in chosen.swapped_out] == [3, 4]
    assert chosen.batches == (SubBatch(gpu_decodes=decodes(3, 16)),)


def test_after_a_prompt_for_the_cpu_none_goes_to_the_gpu() -> None:
    """The second does not fit the 16 free blocks; the third would."""
    waiting = (prompt(100, 20), prompt(300, 21), prompt(50, 22))
    queues = Queues(waiting=waiting, gpu_decodes=decodes(3, 256))
    (batch,) = next_iteration(queues, replace(LIMITS, min_linear_tokens=1000), STUB).batches
    assert batch.gpu_prefills == waiting[:1]
    assert batch.cpu_prefills == waiting[1:]


def test_the_cpu_keeps_as_many_blocks_free_as_the_gpu_has() -> None:
    """84 blocks less 64 hold one prompt of 300 tokens (19 blocks), not two."""
    waiting = (prompt(300, 20), prompt(300, 21), prompt(10, 22))
    queues = Queues(waiting=waiting, gpu_decodes=decodes(4, 256))
    limits = replace(LIMITS, num_cpu_blocks=84, min_linear_tokens=1000)
    (batch,) = next_iteration(queues, limits, STUB).batches
    assert batch.cpu_prefills == waiting[:1]


def test_alone_the_gpu_puts_off_prompts_for_the_cpu() -> None:
    """Of three prompts of 100 tokens two leave at least 128 tokens with four decodes."""
    waiting = tuple(prompt(100, 20 + index) for index in range(3))
    (batch,) = next_iteration(
        Queues(waiting=waiting, gpu_decodes=decodes(4, 256)), LIMITS, STUB
    ).batches
    assert batch.cpu_prefills == waiting[:2]


def test_a_decode_too_large_for_the_gpu_runs_when_nothing_else_can() -> None:
    """1100 tokens are 69 blocks."""
    large = decodes(2, 1100)
    chosen = next_iteration(Queues(cpu_decodes=large), LIMITS, STUB)
    assert chosen == Iteration(batches=(SubBatch(cpu_decodes=large),))


def test_nothing_to_do_is_no_batch() -> None:
    assert next_iteration(Queues(), LIMITS, STUB) == Iteration(batches=())


def numbered(lengths: list[int], first_id: int) -> tuple[Decode, ...]:
    return tuple(
        Decode(seq_id=first_id + index, num_tokens=each) for index, each in enumerate(lengths)
    )


@st.composite
def states(draw: st.DrawFn) -> tuple[Queues, Limits]:
    """Queues that their memories hold, the GPU's perhaps not any more."""
    short = st.lists(st.integers(1, 400), max_size=8)
    waiting = draw(short)
    queues = Queues(
        waiting=tuple(Prompt(seq_id=i, num_tokens=each) for i, each in enumerate(waiting)),
        gpu_decodes=numbered(draw(short), 100),
        cpu_decodes=numbered(draw(st.lists(st.integers(1, 1500), max_size=10)), 200),
    )
    num_gpu_blocks = draw(st.integers(1, 80))
    limits = Limits(
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=num_gpu_blocks + draw(st.integers(0, 300)),
        max_seqs=draw(st.integers(1, 20)),
        max_tokens=draw(st.integers(1, 1200)),
        min_linear_tokens=draw(st.integers(1, 300)),
    )
    return queues, limits


def blocks(limits: Limits, sequences: tuple[Prompt | Decode, ...]) -> int:
    return sum(limits.num_blocks(each) for each in sequences)


@settings(max_examples=300, deadline=None)
@given(states(), predictors)
def test_every_iteration_keeps_its_limits_and_the_order(
    state: tuple[Queues, Limits], predictor: Straight
) -> None:
    """No block and no token over the limit; first come, first served in every queue."""
    queues, limits = state
    chosen = next_iteration(queues, limits, predictor)
    num_out = len(chosen.swapped_out)
    assert not (chosen.swapped_out and chosen.swapped_in)
    assert chosen.swapped_out == queues.gpu_decodes[len(queues.gpu_decodes) - num_out :]
    assert chosen.swapped_in == queues.cpu_decodes[: len(chosen.swapped_in)]
    on_gpu = queues.gpu_decodes[: len(queues.gpu_decodes) - num_out] + chosen.swapped_in
    on_cpu = chosen.swapped_out + queues.cpu_decodes[len(chosen.swapped_in) :]
    assert sum(each.num_seqs for each in chosen.batches) <= limits.max_seqs
    assert sum(each.num_tokens for each in chosen.batches) <= limits.max_tokens
    if not chosen.batches:
        # a prompt with no room, and no decode
        assert not on_gpu and not on_cpu
        return
    first = chosen.batches[0]
    prefills = first.gpu_prefills + first.cpu_prefills
    assert prefills == queues.waiting[: len(prefills)]
    assert first.gpu_decodes == on_gpu
    assert blocks(limits, on_gpu + first.gpu_prefills) <= limits.num_gpu_blocks
    if first.cpu_prefills:
        spare = limits.num_cpu_blocks - limits.num_gpu_blocks
        assert blocks(limits, on_cpu + first.cpu_prefills) <= spare
    for batch in chosen.batches:
        places = [on_cpu.index(each) for each in batch.cpu_decodes]
        assert places == sorted(places)


@settings(max_examples=300, deadline=None)
@given(states(), predictors)
def test_two_sub_batches_hide_all_attention_and_serve_more_than_the_gpu_alone(
    state: tuple[Queues, Limits], predictor: Straight
) -> None:
    """The GPU alone: the same queues without the CPU's decodes that were not swapped in."""
    queues, limits = state
    chosen = next_iteration(queues, limits, predictor)
    if not chosen.is_pipelined:
        return
    first, second = chosen.batches
    assert min(remains_s((first, second), predictor)) >= 0
    assert second.cpu_decodes
    assert (second.gpu_prefills, second.cpu_prefills, second.gpu_decodes) == ((), (), ())
    # A CPU whose attention takes for ever leaves the GPU alone with what it would run.
    (alone,) = next_iteration(queues, limits, replace(predictor, cpu_context=1e9)).batches
    assert alone.cpu_decodes == ()
    assert rate((first, second), predictor) > rate((alone,), predictor)

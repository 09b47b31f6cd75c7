"""Two sub-batches: NEO's hiding rules by hand, and its extension to experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.sub_batches import (
    Decode,
    SubBatch,
    batch_times,
    pair_layer_s,
    remains_s,
    split_in_two,
    without_late_prompts,
)
from tests.planner.straight_predictor import STUB, Straight, decodes, predictors, prompt

# One prompt of 300 tokens whose cache goes to the CPU, and four decodes of 256 on the GPU.
BUSY_GPU = SubBatch(cpu_prefills=(prompt(300),), gpu_decodes=decodes(4, 256))


def test_the_times_of_a_sub_batch_by_hand() -> None:
    """304 tokens: 1 + 3.04; a prompt of 300: 0.6; 1024 tokens of context: 0.1024 ms."""
    times = batch_times(BUSY_GPU, STUB)
    assert (BUSY_GPU.num_seqs, BUSY_GPU.num_tokens) == (5, 304)
    assert times.linear_s == pytest.approx(4.04)
    assert times.gpu_s == pytest.approx(4.7424)
    assert (times.cpu_attention_s, times.cpu_experts_s) == (0, 0)
    with_cpu = batch_times(replace(BUSY_GPU, cpu_decodes=decodes(1, 512)), STUB)
    assert with_cpu.gpu_s == pytest.approx(4.7524)
    assert with_cpu.cpu_attention_s == pytest.approx(1.024)


def test_the_published_pair() -> None:
    """VEC 7: of six decodes of 512 three go to the second and one to the first."""
    pair = split_in_two(BUSY_GPU, decodes(6, 512), 64, 128, STUB)
    assert pair is not None
    # The first goes to the second sub-batch, and two more, as more remains there; one to the first.
    assert [each.seq_id for each in pair[1].cpu_decodes] == [0, 1, 2]
    assert [each.seq_id for each in pair[0].cpu_decodes] == [3]
    assert pair[0].cpu_prefills == BUSY_GPU.cpu_prefills
    # 1.03 + 0.7024 - 1.124 and 4.05 - 3.172
    assert remains_s(pair, STUB) == pytest.approx((0.6084, 0.878))
    # 4.7524 + 1.03
    assert pair_layer_s(pair, STUB) == pytest.approx(5.7824)


def test_short_decodes_all_go_to_the_second() -> None:
    """VEC 7: six of 128 tokens are 1.536 ms, well hidden behind 4.04."""
    pair = split_in_two(BUSY_GPU, decodes(6, 128), 64, 128, STUB)
    assert pair is not None
    assert (len(pair[0].cpu_decodes), len(pair[1].cpu_decodes)) == (0, 6)


def test_decodes_that_cannot_be_hidden_make_no_pair() -> None:
    """VEC 7: 2048 tokens are 4.1 ms; and 512, 1.02 ms, where the GPU has three decodes only."""
    assert split_in_two(BUSY_GPU, decodes(6, 2048), 64, 128, STUB) is None
    three = SubBatch(gpu_decodes=decodes(3, 256))
    assert batch_times(three, STUB).linear_s == pytest.approx(1.03)
    assert split_in_two(three, decodes(6, 512), 64, 128, STUB) is None


def test_a_shorter_decode_passes_one_that_is_too_long() -> None:
    """1900 tokens would not be hidden; all the others are, though they came later."""
    lengths = [1900, 200, 300, 200, 30, 400]
    queue = [Decode(seq_id=index, num_tokens=length) for index, length in enumerate(lengths)]
    only_linear = replace(STUB, linear_base=0.3)
    pair = split_in_two(BUSY_GPU, queue, 64, 128, only_linear)
    assert pair is not None
    # 0.3 + 3.04 - 0.1 hides 1620 tokens
    taken = {each.seq_id for batch in pair for each in batch.cpu_decodes}
    assert taken == {1, 2, 3, 4, 5}


def test_what_is_as_long_as_a_decode_passed_over_is_passed_over_too() -> None:
    """800 tokens are too long at first; two shorter ones make the linear parts longer.

    1 + 0.5 ms for each token of the linear parts. 800 in the second: 1.5 - 1.7 < 0. Then 100 in the
    second, 100 in the first, and 800 more would be hidden: 2 - 1.9; it waits for its turn.
    """
    queue = [Decode(seq_id=i, num_tokens=each) for i, each in enumerate([800, 100, 100, 800])]
    steep = replace(STUB, linear=0.5)
    pair = split_in_two(SubBatch(gpu_decodes=decodes(1, 16, 10)), queue, 64, 128, steep)
    assert pair is not None
    assert [each.seq_id for each in pair[0].cpu_decodes] == [2]
    assert [each.seq_id for each in pair[1].cpu_decodes] == [1]
    longer = replace(pair[1], cpu_decodes=(*pair[1].cpu_decodes, queue[3]))
    assert min(remains_s((pair[0], longer), steep)) >= 0


def test_no_more_decodes_are_taken_than_there_is_room_for() -> None:
    pair = split_in_two(BUSY_GPU, decodes(6, 128), 2, 128, STUB)
    assert pair is not None
    assert len(pair[0].cpu_decodes) + len(pair[1].cpu_decodes) == 2
    assert split_in_two(BUSY_GPU, decodes(6, 128), 0, 128, STUB) is None


def test_prompts_for_the_cpu_are_put_off_from_the_last_while_all_stays_hidden() -> None:
    """Three prompts of 100: one can go (200 tokens left), two would leave fewer than 128.

    With four decodes of 256 (2.15 ms) in the second one stays, as 3.00 ms hide them and 2.00 not.
    """
    prompts = tuple(prompt(100, seq_id) for seq_id in range(3))
    assert without_late_prompts(SubBatch(cpu_prefills=prompts), 128).cpu_prefills == prompts[:2]
    exactly = tuple(prompt(64, seq_id) for seq_id in range(3))
    assert without_late_prompts(SubBatch(cpu_prefills=exactly), 128).cpu_prefills == exactly[:2]
    for_gpu = SubBatch(gpu_prefills=prompts)
    assert without_late_prompts(for_gpu, 128) == for_gpu

    first = SubBatch(cpu_prefills=prompts)
    pair = split_in_two(first, decodes(4, 256), 64, 1, STUB)
    assert pair is not None
    assert pair[0].cpu_prefills == prompts[: len(pair[0].cpu_prefills)]
    assert min(remains_s(pair, STUB)) >= 0
    fewer = replace(pair[0], cpu_prefills=pair[0].cpu_prefills[:-1])
    assert min(remains_s((fewer, pair[1]), STUB)) < 0


def test_experts_on_the_cpu_take_from_the_time_for_attention() -> None:
    """They add up with it: both read the same memory."""
    pair = (BUSY_GPU, SubBatch(cpu_decodes=decodes(2, 256)))
    dense = remains_s(pair, STUB)
    # 0.005 ms a token on either device: the linear part of 304 tokens grows by 1.52 ms, and the
    # CPU is busy for as long
    both = remains_s(pair, replace(STUB, gpu_expert=0.005, cpu_expert=0.005))
    assert both == pytest.approx((dense[0], dense[1]))
    # on the CPU only the linear part waits for them, and hides nothing more
    cpu = replace(STUB, cpu_expert=0.005)
    assert remains_s(pair, cpu) == pytest.approx(dense)
    assert batch_times(BUSY_GPU, cpu).gpu_s == pytest.approx(4.7424 + 1.52)
    # on the GPU only they hide more attention, 1.52 ms of it
    gpu = remains_s(pair, replace(STUB, gpu_expert=0.005))
    assert gpu == pytest.approx((dense[0] + 0.01, dense[1] + 1.52))
    # where the GPU's take three times as long, two thirds of them are left for attention
    mixed = remains_s(pair, replace(STUB, gpu_expert=0.015, cpu_expert=0.005))
    assert mixed[1] == pytest.approx(dense[1] + 3.04)


def test_experts_on_the_cpu_leave_room_for_fewer_decodes() -> None:
    """The linear part waits for them too, so that more of the CPU's time hides nothing more."""
    slow_cpu = replace(STUB, gpu_expert=0.005, cpu_expert=0.005)
    dense = split_in_two(BUSY_GPU, decodes(20, 256), 64, 128, replace(STUB, gpu_expert=0.005))
    busy = split_in_two(BUSY_GPU, decodes(20, 256), 64, 128, slow_cpu)
    assert dense is not None and busy is not None
    assert len(busy[1].cpu_decodes) < len(dense[1].cpu_decodes)
    assert batch_times(busy[0], slow_cpu).linear_s == pytest.approx(1 + 0.015 * busy[0].num_tokens)


lengths = st.integers(1, 3000)


@given(
    st.lists(lengths, max_size=4),
    st.lists(lengths, max_size=4),
    st.lists(lengths, max_size=12),
    st.integers(0, 12),
    st.integers(1, 400),
    predictors,
)
def test_a_pair_hides_all_cpu_attention_and_keeps_the_order(
    prompts: list[int],
    gpu_lengths: list[int],
    cpu_lengths: list[int],
    max_cpu_decodes: int,
    min_linear_tokens: int,
    predictor: Straight,
) -> None:
    """And a decode that was passed over is passed by shorter ones only."""
    first = SubBatch(
        cpu_prefills=tuple(prompt(each, index) for index, each in enumerate(prompts)),
        gpu_decodes=tuple(Decode(seq_id=i, num_tokens=each) for i, each in enumerate(gpu_lengths)),
    )
    queue = [Decode(seq_id=index, num_tokens=each) for index, each in enumerate(cpu_lengths)]
    pair = split_in_two(first, queue, max_cpu_decodes, min_linear_tokens, predictor)
    if pair is None:
        return
    assert min(remains_s(pair, predictor)) >= 0
    gpu_s = sum(batch_times(each, predictor).gpu_s for each in pair)
    assert pair_layer_s(pair, predictor) == pytest.approx(gpu_s)

    assert pair[0].gpu_decodes == first.gpu_decodes
    assert pair[0].cpu_prefills == first.cpu_prefills[: len(pair[0].cpu_prefills)]
    dropped = len(first.cpu_prefills) - len(pair[0].cpu_prefills)
    assert dropped == 0 or pair[0].num_tokens >= min_linear_tokens
    taken = [each.seq_id for batch in pair for each in batch.cpu_decodes]
    assert len(set(taken)) == len(taken) <= max_cpu_decodes
    for batch in pair:
        ids = [each.seq_id for each in batch.cpu_decodes]
        assert ids == sorted(ids)
    for passed in set(range(max(taken))) - set(taken):
        later = [cpu_lengths[index] for index in taken if index > passed]
        assert max(later) < cpu_lengths[passed]


@given(st.lists(lengths, min_size=1, max_size=6), st.lists(lengths, min_size=1, max_size=6))
def test_what_is_not_hidden_is_waited_for(first: list[int], second: list[int]) -> None:
    """NEO's two maxima, written out."""
    pair = (
        SubBatch(
            gpu_decodes=decodes(2, 300),
            cpu_decodes=tuple(Decode(seq_id=i, num_tokens=n) for i, n in enumerate(first)),
        ),
        SubBatch(cpu_decodes=tuple(Decode(seq_id=i, num_tokens=n) for i, n in enumerate(second))),
    )
    one, two = (batch_times(each, STUB) for each in pair)
    expected = max(one.linear_s, two.cpu_attention_s + 0.1)
    expected += max(two.linear_s + one.gpu_attention_s, one.cpu_attention_s + 0.1)
    assert pair_layer_s(pair, STUB) == pytest.approx(expected)

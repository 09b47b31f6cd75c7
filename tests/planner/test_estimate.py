"""Seconds of a whole workload: hand-worked examples, and the obvious sum over all steps."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import strategies
from planner.cost_model import predict
from planner.estimate import PrefillCost, estimate, latency, num_waves, prefill_steps
from planner.hardware import HardwareProfile
from planner.memory import needs
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.step_graph import build, build_kv_move
from planner.workload import Workload, decode_shape, prefill_shapes
from tests.planner.tiny import real_machine, tiny_device, tiny_machine, tiny_spec

SPEC = tiny_spec("d")
CPU = tiny_machine()


def seconds_of_all_steps(
    spec: ModelSpec, placement: Placement, hardware: HardwareProfile, workload: Workload
) -> tuple[list[float], list[int], list[float]]:
    """Every prefill step and every decode step, priced one by one; with prefill's first tokens."""
    shapes = prefill_shapes(
        workload.num_seqs, workload.prompt_len, placement.prefill.max_num_tokens
    )
    prefill_graph, decode_graph = build(spec, placement.prefill), build(spec, placement.decode)
    prefills = [predict(prefill_graph, spec, hardware, shape).makespan_s for shape in shapes]
    decodes = [
        predict(decode_graph, spec, hardware, decode_shape(workload.num_seqs, past)).makespan_s
        for past in range(workload.prompt_len, workload.prompt_len + workload.output_len - 1)
    ]
    return prefills, [shape.num_logits for shape in shapes], decodes


def test_one_sequence_takes_its_prefill_and_a_decode_step_for_each_further_token() -> None:
    """16 bytes per second, one layer, prompt of 8, 5 output tokens, all products negligible.

    Prefill reads embed 2*8*16 = 256, attention 400, dense 784, head 176, sample 40: 1656 bytes.
    A decode step: embed 32, attention 400 + context * 16, dense 784, head 176, sample 40: 1432 and
    16 for each token of context. The 4 steps see 9, 10, 11, 12 tokens: 10.5 in the mean.
    """
    found = estimate(
        SPEC,
        strategies.placement(SPEC, "cpu", 0),
        CPU,
        Workload(prompt_len=8, output_len=5),
    )

    assert found.ttft_s == 1656 / 16 == 103.5
    assert found.tpot_s == 1432 / 16 + 10.5 == 100.0
    assert found.e2e_s == 103.5 + 4 * 100.0
    assert found.prefill_tokens_per_s == 8 / 103.5
    assert found.decode_tokens_per_s == 1 / 100.0
    assert found.num_concurrent_seqs == 1
    assert found.terms_by_phase["prefill"] == {
        "attention": 25.0,
        "router": 0.0,
        "dispatch": 0.0,
        "experts": 0.0,
        "dense": 16.0 + 49.0,  # with the embedding
        "head": 11.0 + 2.5,  # with the sampler
        "transfer": 0.0,
        "wait": 0.0,
    }
    assert found.bottleneck_by_phase == {"prefill": "cpu dense", "decode": "cpu dense"}


def test_one_output_token_needs_no_decode_step() -> None:
    found = estimate(
        SPEC, strategies.placement(SPEC, "cpu", 0), CPU, Workload(prompt_len=8, output_len=1)
    )

    assert found.e2e_s == found.ttft_s == 103.5
    assert found.tpot_s == 0.0


def test_the_first_tokens_of_sequences_that_arrive_together_come_as_their_prompts_end() -> None:
    """4 prompts of 8 in chunks of 16, 2 in each step: half wait for one step, half for both.

    A step: embed 2*16*16 = 512, 400, 784, 176, 2 samples 80: 1952 bytes, 122 s.
    """
    found = estimate(
        SPEC,
        strategies.placement(SPEC, "cpu", 0, chunk_tokens=16),
        CPU,
        Workload(prompt_len=8, output_len=1, num_seqs=4),
    )

    assert found.e2e_s == 244.0
    assert found.ttft_s == (122.0 + 244.0) / 2


def test_a_prompt_in_chunks_reads_the_weights_for_each_chunk_and_the_head_once() -> None:
    """8 tokens in chunks of 4: embed 128, 400, 784 twice, then head 176 and sample 40."""
    found = estimate(
        SPEC,
        strategies.placement(SPEC, "cpu", 0, chunk_tokens=4),
        CPU,
        Workload(prompt_len=8, output_len=1),
    )

    assert found.e2e_s == (2 * (128 + 400 + 784) + 176 + 40) / 16


def test_sequences_in_waves_repeat_the_wave() -> None:
    """4 sequences 2 at a time: twice a wave of two; the second wave's first tokens wait for it."""
    placement = strategies.placement(SPEC, "cpu", 0)
    workload = Workload(prompt_len=8, output_len=5, num_seqs=4)
    found = estimate(SPEC, placement, CPU, workload, num_concurrent=2)
    wave = estimate(SPEC, placement, CPU, Workload(prompt_len=8, output_len=5, num_seqs=2))

    assert found.e2e_s == 2 * wave.e2e_s
    assert found.ttft_s == wave.ttft_s + wave.e2e_s / 2
    assert found.tpot_s == wave.tpot_s
    assert found.decode_tokens_per_s == wave.decode_tokens_per_s
    assert found.num_concurrent_seqs == 2


@pytest.mark.parametrize(("num_seqs", "concurrent", "waves"), [(4, 4, 1), (4, 2, 2), (5, 2, 3)])
def test_a_last_wave_counts_whole(num_seqs: int, concurrent: int, waves: int) -> None:
    assert num_waves(Workload(num_seqs=num_seqs), concurrent) == waves


def test_the_three_times_follow_from_the_phases() -> None:
    """Prefill 10 s (own prompts end after 6 in the mean), KV moves 2 s, 3 decode steps of 4 s."""
    cost = PrefillCost(seconds=10.0, mean_first_s=6.0)
    times = latency(cost, 4.0, 2.0, Workload(output_len=4), 1)

    assert times.ttft_s == 6.0
    assert times.e2e_s == 10.0 + 2.0 + 3 * 4.0
    assert times.tpot_s == (24.0 - 6.0) / 3
    assert latency(cost, 4.0, 2.0, Workload(output_len=4), 3).ttft_s == 6.0 + 24.0


def test_kv_that_changes_device_is_moved_once_for_each_sequence() -> None:
    """Layer 0 goes to the GPU after prefill: 2 sequences * 8 tokens * 16 bytes / 16, latency 1."""
    spec = tiny_spec("dd")
    machine = tiny_machine(gpu=tiny_device("gpu"), latency_s=1.0)
    moved = Placement(
        prefill=strategies.split(spec, "prefill", 1), decode=strategies.offload(spec, "decode", 1)
    )
    workload = Workload(prompt_len=8, output_len=1, num_seqs=2)
    found = estimate(spec, moved, machine, workload)
    prefills, _, _ = seconds_of_all_steps(spec, moved, machine, workload)

    assert len(build_kv_move(moved.prefill, moved.decode).ops) == 1
    assert found.e2e_s == prefills[0] + 2 * (1.0 + 8.0)
    assert found.terms_by_phase["prefill"]["transfer"] >= 18.0


def test_the_bytes_of_the_estimate_are_those_of_the_memory() -> None:
    placement = strategies.placement(SPEC, "gpu", 0)
    machine = tiny_machine(gpu=tiny_device("gpu"))
    memory = needs(SPEC, placement, Workload(), machine)

    assert estimate(SPEC, placement, machine, Workload(), memory).bytes_by_device == {
        "gpu": memory["gpu"].needed_bytes,
        "cpu": memory["cpu"].needed_bytes,
    }


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    prompt_len=st.integers(1, 300),
    chunk_tokens=st.integers(1, 40),
    num_seqs=st.integers(1, 8),
    output_len=st.integers(1, 20),
)
def test_on_one_lane_the_estimate_is_the_sum_over_all_steps(
    prompt_len: int, chunk_tokens: int, num_seqs: int, output_len: int
) -> None:
    """Costs are affine in the past, so a few priced steps stand for all of them exactly."""
    spec, machine = tiny_spec("dm"), real_machine(gpu_bytes=None)
    placement = strategies.placement(spec, "cpu", 0, chunk_tokens=chunk_tokens)
    workload = Workload(prompt_len=prompt_len, output_len=output_len, num_seqs=num_seqs)
    prefills, num_logits, decodes = seconds_of_all_steps(spec, placement, machine, workload)
    firsts = sum(n * end for n, end in zip(num_logits, accumulate(prefills), strict=True))
    found = estimate(spec, placement, machine, workload)

    # Steps of mixed parts round their past and their tokens for each sequence: 2 %.
    tolerance = 0.02 if num_seqs > 1 else 1e-9
    assert found.ttft_s == pytest.approx(firsts / num_seqs, rel=tolerance)
    assert found.e2e_s == pytest.approx(sum(prefills) + sum(decodes), rel=tolerance)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    strategy=st.sampled_from(["offload", "split", "experts-on-cpu"]),
    cut=st.integers(1, 3),
    prompt_len=st.integers(1, 400),
    chunk_tokens=st.integers(4, 40),
    num_seqs=st.integers(1, 4),
)
def test_on_all_lanes_a_few_priced_steps_stand_for_the_others(
    strategy: str, cut: int, prompt_len: int, chunk_tokens: int, num_seqs: int
) -> None:
    """Within 5 % of the sum over all steps, and terms that add up to the seconds."""
    spec, machine = tiny_spec("mmm"), real_machine()
    placement = strategies.placement(spec, strategy, cut, chunk_tokens=chunk_tokens)
    workload = Workload(prompt_len=prompt_len, output_len=1, num_seqs=num_seqs)
    prefills, _, _ = seconds_of_all_steps(spec, placement, machine, workload)
    found = estimate(spec, placement, machine, workload)

    assert found.e2e_s == pytest.approx(sum(prefills), rel=0.05)
    assert sum(found.terms_by_phase["prefill"].values()) == pytest.approx(found.e2e_s, rel=1e-9)


def test_many_equal_steps_are_priced_once() -> None:
    """100 prompts of 16 tokens, 2 in each chunk of 32: one price for 50 steps."""
    (step,) = prefill_steps(Workload(prompt_len=16, num_seqs=100), 32)

    assert step.num_steps == 50.0
    # The first step keeps 100 sequences waiting, the next 98, ..., the last 2.
    assert step.num_awaiting == sum(range(2, 101, 2))


def test_steps_between_priced_pasts_count_for_both() -> None:
    """11 chunks of 10 tokens: ten without logits (pasts 0, 30, 60, 90 priced), one with."""
    steps = prefill_steps(Workload(prompt_len=110), 10)

    assert [(step.shape.num_past_tokens, step.shape.num_logits) for step in steps] == [
        (0.0, 0),
        (30.0, 0),
        (60.0, 0),
        (90.0, 0),
        (100.0, 1),
    ]
    # Pasts 10 and 20 lie a third and two thirds of the way: 1 + 2/3 + 1/3.
    assert [step.num_steps for step in steps] == pytest.approx([2.0, 3.0, 3.0, 2.0, 1.0])

"""Seconds of a whole workload: hand-worked examples, and the obvious sum over all steps."""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner import strategies
from planner.calibration import Correction, Corrections
from planner.cost_model import CostModel, Pricer, predict
from planner.device import Sample
from planner.estimate import PrefillCost, estimate, latency, num_waves, prefill_steps
from planner.memory import needs
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.plan import Estimate
from planner.step_graph import build, build_kv_move
from planner.workload import BatchShape, Workload, decode_shape, prefill_shapes
from tests.planner.tiny import real_machine, tiny_device, tiny_machine, tiny_spec

approx = partial(pytest.approx, rel=1e-12)

SPEC = tiny_spec("d")
CPU = CostModel(tiny_machine())


def seconds_of_all_steps(
    spec: ModelSpec, placement: Placement, costs: CostModel, workload: Workload
) -> tuple[list[float], list[int], list[float]]:
    """Every prefill step and every decode step, priced one by one; with prefill's first tokens."""
    shapes = prefill_shapes(
        workload.num_seqs, workload.prompt_len, placement.prefill.max_num_tokens
    )
    prefills = [step_s(spec, placement, costs, shape) for shape in shapes]
    decodes = [
        step_s(spec, placement, costs, decode_shape(workload.num_seqs, past))
        for past in range(workload.prompt_len, workload.prompt_len + workload.output_len - 1)
    ]
    return prefills, [shape.num_logits for shape in shapes], decodes


def step_s(spec: ModelSpec, placement: Placement, costs: CostModel, shape: BatchShape) -> float:
    graph = build(spec, placement.tier(shape.phase))
    host_s = Pricer(spec, costs, shape).host_s
    return predict(graph, spec, costs, shape).makespan_s + host_s


def test_one_sequence_takes_its_prefill_and_a_decode_step_for_each_further_token() -> None:
    """16 bytes per second, one layer, prompt of 8, 5 output tokens, all else negligible.

    Prefill reads attention 384, dense 768, head 160: 1312 bytes. A decode step as much and 16 for
    each token of context. The 4 steps see 9, 10, 11, 12 tokens: 10.5 in the mean.
    """
    found = estimate(
        SPEC,
        strategies.placement(SPEC, "cpu", 0),
        CPU,
        Workload(prompt_len=8, output_len=5),
    )

    assert found.ttft_s == approx(1312 / 16) == approx(82.0)
    assert found.tpot_s == approx(82.0 + 10.5)
    assert found.e2e_s == approx(82.0 + 4 * 92.5)
    assert found.prefill_tokens_per_s == approx(8 / 82.0)
    assert found.decode_tokens_per_s == approx(1 / 92.5)
    assert found.num_concurrent_seqs == 1
    assert found.terms_by_phase["prefill"] == approx(
        {
            "attention": 24.0,
            "router": 0.0,
            "dispatch": 0.0,
            "experts": 0.0,
            "dense": 48.0,  # with the embedding
            "head": 10.0,  # with the sampler
            "transfer": 0.0,
            "wait": 0.0,
            "host": 0.0,
        }
    )
    assert found.bottleneck_by_phase == {"prefill": "cpu dense", "decode": "cpu dense"}


def test_every_step_also_takes_what_the_host_does_beside_its_ops() -> None:
    """5 s for a step of one sequence: once for the prompt, four times for the further tokens."""
    step = Sample(lane="cpu", kernel="step", backend="torch", seconds=5.0)
    machine = tiny_machine()
    costs = CostModel(replace(machine, samples=(*machine.samples, step)))
    found = estimate(
        SPEC, strategies.placement(SPEC, "cpu", 0), costs, Workload(prompt_len=8, output_len=5)
    )

    assert found.ttft_s == approx(82.0 + 5.0)
    assert found.tpot_s == approx(92.5 + 5.0)
    assert {terms["host"] for terms in found.terms_by_phase.values()} == {5.0}


def test_one_output_token_needs_no_decode_step() -> None:
    found = estimate(
        SPEC, strategies.placement(SPEC, "cpu", 0), CPU, Workload(prompt_len=8, output_len=1)
    )

    assert found.e2e_s == found.ttft_s == approx(82.0)
    assert found.tpot_s == 0.0


def test_the_first_tokens_of_sequences_that_arrive_together_come_as_their_prompts_end() -> None:
    """4 prompts of 8 in chunks of 16, 2 in each step: half wait for one step, half for both."""
    found = estimate(
        SPEC,
        strategies.placement(SPEC, "cpu", 0, chunk_tokens=16),
        CPU,
        Workload(prompt_len=8, output_len=1, num_seqs=4),
    )

    assert found.e2e_s == approx(164.0)
    assert found.ttft_s == approx((82.0 + 164.0) / 2)


def test_a_prompt_in_chunks_reads_the_weights_for_each_chunk_and_the_head_once() -> None:
    """8 tokens in chunks of 4: 384 and 768 twice, then head 160."""
    found = estimate(
        SPEC,
        strategies.placement(SPEC, "cpu", 0, chunk_tokens=4),
        CPU,
        Workload(prompt_len=8, output_len=1),
    )

    assert found.e2e_s == approx((2 * (384 + 768) + 160) / 16)


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
    """Layer 0 goes to the GPU after prefill: 2 sequences * 8 tokens * 16 bytes / 16.

    Keys and values are copies of their own: twice a latency of 1.
    """
    spec = tiny_spec("dd")
    machine = tiny_machine(gpu=tiny_device("emulated"), latency_s=1.0)
    moved = Placement(
        prefill=strategies.split(spec, "prefill", 1), decode=strategies.offload(spec, "decode", 1)
    )
    workload = Workload(prompt_len=8, output_len=1, num_seqs=2)
    costs = CostModel(machine)
    found = estimate(spec, moved, costs, workload)
    prefills, _, _ = seconds_of_all_steps(spec, moved, costs, workload)

    assert len(build_kv_move(moved.prefill, moved.decode).ops) == 1
    assert found.e2e_s == approx(prefills[0] + 2 * (2.0 + 8.0))
    assert found.terms_by_phase["prefill"]["transfer"] >= 20.0


def test_the_bytes_of_the_estimate_are_those_of_the_memory() -> None:
    placement = strategies.placement(SPEC, "gpu", 0)
    machine = tiny_machine(gpu=tiny_device("gpu"))
    memory = needs(SPEC, placement, Workload(), machine)

    found = estimate(SPEC, placement, CostModel(machine), Workload(), memory)
    assert found.bytes_by_device == {
        "gpu": memory["gpu"].needed_bytes,
        "cpu": memory["cpu"].needed_bytes,
    }


def test_bands_lie_around_the_times_and_are_the_errors_of_their_terms() -> None:
    """Prefill: attention 24 s, dense 48, head 10, each off by its own share of the seconds.

    Terms are off independently: the root of the sum of squares of 24, 48 and 10 s, each times its
    share, over 82 s; beside 0.09 for the step as a whole. 1.2816 of that is the 90th percentile.
    """
    placement, workload = strategies.placement(SPEC, "cpu", 0), Workload(prompt_len=8, output_len=1)
    known = {
        ("cpu", term, "prefill"): Correction(factor=1.0, sigma=sigma, is_bounded=False, num_runs=1)
        for term, sigma in (("attention", 0.1), ("dense", 0.2), ("head", 0.3))
    }
    corrections = Corrections(by_key=known, num_runs=1)  # type: ignore[arg-type]
    costs = CostModel(tiny_machine(), corrections=corrections)
    found = estimate(SPEC, placement, costs, workload)

    spread = math.hypot(24 * 0.1, 48 * 0.2, 10 * 0.3) / 82
    factor = math.exp(1.2816 * math.hypot(0.09, spread))
    assert found.band_by_metric["ttft_s"] == pytest.approx((82 / factor, 82 * factor), rel=1e-9)
    assert found.band_by_metric["e2e_s"] == found.band_by_metric["ttft_s"]
    assert found.band_by_metric["tpot_s"] == (0.0, 0.0)


@pytest.mark.parametrize("output_len", [1, 2, 50])
def test_every_band_holds_its_time(output_len: int) -> None:
    workload = Workload(prompt_len=8, output_len=output_len)
    costs = CostModel(real_machine())
    found = estimate(
        tiny_spec("dm"), strategies.placement(tiny_spec("dm"), "split", 1), costs, workload
    )

    for metric, seconds in (
        ("ttft_s", found.ttft_s),
        ("tpot_s", found.tpot_s),
        ("e2e_s", found.e2e_s),
    ):
        low_s, high_s = found.band_by_metric[metric]  # type: ignore[index]
        assert (low_s < seconds < high_s) if seconds else (low_s == high_s == 0.0)


def test_what_was_never_measured_is_less_certain() -> None:
    """Samples of these very calls, then none: 24 s, 48 s and 10 s are the speed of light."""
    machine, placement = tiny_machine(), strategies.placement(SPEC, "cpu", 0)
    workload = Workload(prompt_len=8, output_len=1)
    samples = (
        product((16, 8), 8, 16.0),  # queries, keys and values of 8 tokens: 16 * 8 * 2 bytes / 16
        product((8, 8), 8, 8.0),
        Sample(
            lane="cpu",
            kernel="experts",
            format="bfloat16",
            shape=(1, 8, 16),
            num_tokens=8,
            seconds=48.0,
        ),
        product((10, 8), 1, 10.0),
    )
    known, guessed = (
        estimate(SPEC, placement, CostModel(replace(machine, samples=each)), workload)
        for each in (samples, ())
    )

    assert known.ttft_s == approx(82.0)
    assert known.source_by_phase["prefill"]["measured"] == approx(1.0)
    assert guessed.source_by_phase["prefill"] == {"prior": approx(1.0)}
    assert guessed.ttft_s > known.ttft_s
    assert width(guessed) > width(known) > 1.0


def product(shape: tuple[int, int], num_tokens: int, seconds: float) -> Sample:
    return Sample(
        lane="cpu",
        kernel="linear",
        format="bfloat16",
        shape=shape,
        num_tokens=num_tokens,
        seconds=seconds,
    )


def width(found: Estimate) -> float:
    low_s, high_s = found.band_by_metric["ttft_s"]
    return high_s / low_s


def test_corrections_change_the_seconds_and_are_told() -> None:
    """Dense work of prefill takes twice as long: 48 s more; what is not used is not told."""
    twice = Correction(factor=2.0, sigma=0.1, is_bounded=False, num_runs=3)
    corrections = Corrections(
        by_key={("cpu", "dense", "prefill"): twice, ("gpu", "dense", "prefill"): twice}, num_runs=3
    )
    costs = CostModel(tiny_machine(), corrections=corrections)
    found = estimate(
        SPEC, strategies.placement(SPEC, "cpu", 0), costs, Workload(prompt_len=8, output_len=1)
    )

    assert found.ttft_s == approx(82.0 + 48.0)
    assert found.calibrated_runs == 3
    assert found.correction_by_phase == {"prefill": {"cpu dense": 2.0}, "decode": {}}


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
    spec, costs = tiny_spec("dm"), CostModel(real_machine(gpu_bytes=None))
    placement = strategies.placement(spec, "cpu", 0, chunk_tokens=chunk_tokens)
    workload = Workload(prompt_len=prompt_len, output_len=output_len, num_seqs=num_seqs)
    prefills, num_logits, decodes = seconds_of_all_steps(spec, placement, costs, workload)
    firsts = sum(n * end for n, end in zip(num_logits, accumulate(prefills), strict=True))
    found = estimate(spec, placement, costs, workload)

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
    spec, costs = tiny_spec("mmm"), CostModel(real_machine())
    placement = strategies.placement(spec, strategy, cut, chunk_tokens=chunk_tokens)
    workload = Workload(prompt_len=prompt_len, output_len=1, num_seqs=num_seqs)
    prefills, _, _ = seconds_of_all_steps(spec, placement, costs, workload)
    found = estimate(spec, placement, costs, workload)

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

"""StepSamples: which steps are kept, and what a record adds up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from hetero.model_lookup import find_model, read_model_spec
from hetero.planning import make_plan
from hetero.step_samples import StepSamples, StepTimes
from planner.calibration import CalibrationRecord
from planner.placement import Placement
from planner.plan import Plan
from planner.simulate import simulate
from planner.step_graph import Op, StepGraph, build
from planner.strategies import placement
from planner.workload import BatchShape, Phase, Workload, decode_shape
from tests.machines import toy_machine

SPEC = read_model_spec(find_model())
MACHINE = toy_machine().with_emulated_gpu(memory_bytes=10**9, link_bytes_per_s=4e9)
PREFILL = BatchShape(phase="prefill", num_tokens=8, num_seqs=2, num_past_tokens=0, num_logits=2)


def plan_of(prefill: Placement, decode: Placement) -> Plan:
    made = make_plan(SPEC, MACHINE, Workload(prompt_len=8, output_len=8))
    return replace(made, placement=Placement(prefill=prefill.prefill, decode=decode.decode))


SPLIT = placement(SPEC, "split", 2)
ON_CPU = placement(SPEC, "cpu", 0)


def predict(graph: StepGraph, shape: BatchShape) -> StepTimes:
    """Each op takes a second, and what is outside of them half of one."""
    return StepTimes(timeline=simulate(graph, lambda op: 1.0), host_s=0.5)


def run(
    plan: Plan, phase: Phase, seconds: Sequence[float], host_s: float = 0.25
) -> tuple[CalibrationRecord, ...]:
    """Records of a run whose steps took so long for each op on the CPU, and a second elsewhere."""
    graph = build(SPEC, plan.placement.tier(phase))
    samples = StepSamples(plan)
    for number, each in enumerate(seconds):

        def op_s(op: Op, each: float = each) -> float:
            return each if op.lane == "cpu" else 1.0

        timeline = simulate(graph, op_s)
        shape = PREFILL if phase == "prefill" else decode_shape(2, number)
        samples.watch(graph, shape, timeline, timeline.makespan_s + host_s)
    return samples.records(predict, "rates")


def test_a_record_adds_up_ops_by_lane_and_term() -> None:
    """Two layers of the split on the CPU: two attentions, two of experts, and one sampled token."""
    (record,) = run(plan_of(SPLIT, SPLIT), "decode", [9.0, 3.0])
    found = {(term.lane, term.term): term for term in record.terms}
    assert record.num_steps == 1
    assert (found["cpu", "attention"].predicted_s, found["cpu", "attention"].measured_s) == (2, 6)
    assert (found["cpu", "head"].predicted_s, found["cpu", "head"].measured_s) == (1, 3)
    num_layers = SPEC.num_layers
    assert found["gpu", "attention"].measured_s == num_layers - 2
    assert (found["host", "host"].predicted_s, found["host", "host"].measured_s) == (0.5, 0.25)
    ops = build(SPEC, SPLIT.decode).ops
    assert sum(term.predicted_s for term in record.terms) == len(ops) + 0.5


def test_decode_steps_are_kept_at_powers_of_two_and_then_evenly() -> None:
    """Past tokens number the steps: 2, 4, ..., 128, 192 and 256 are kept, counted from 1."""
    (record,) = run(plan_of(ON_CPU, ON_CPU), "decode", [1.0] * 300)
    kept = [2, 4, 8, 16, 32, 64, 128, 192, 256]
    assert record.num_steps == len(kept)
    assert record.num_past_tokens == pytest.approx(sum(step - 1 for step in kept) / len(kept))
    assert (record.num_tokens, record.num_seqs) == (2, 2)


def test_a_long_run_keeps_no_more_than_a_few_steps() -> None:
    (record,) = run(plan_of(ON_CPU, ON_CPU), "decode", [1.0] * 5000)
    assert record.num_steps == 32


def test_the_first_two_prefill_steps_are_kept() -> None:
    (record,) = run(plan_of(ON_CPU, ON_CPU), "prefill", [2.0, 3.0, 50.0])
    attention = next(term for term in record.terms if term.term == "attention")
    assert record.num_steps == 2
    assert attention.measured_s == SPEC.num_layers * 5.0
    assert attention.predicted_s == SPEC.num_layers * 2


def test_a_step_that_was_interrupted_does_not_count() -> None:
    """Step 8 of the kept 2, 4, 8, 16 took ten times as long beside its prediction."""
    seconds = [1.0] * 16
    seconds[7] = 10.0
    (record,) = run(plan_of(ON_CPU, ON_CPU), "decode", seconds)
    assert record.num_steps == 3
    assert all(
        term.measured_s == pytest.approx(term.predicted_s)
        for term in record.terms
        if term.lane == "cpu"
    )


def test_a_prefill_that_moves_its_cache_says_nothing_of_the_host() -> None:
    """The move is a part of the step and no op of its graph."""
    moved, stays = plan_of(SPLIT, ON_CPU), plan_of(ON_CPU, ON_CPU)
    lanes = [
        {term.lane for term in run(plan, "prefill", [1.0])[0].terms} for plan in (moved, stays)
    ]
    assert "host" not in lanes[0]
    assert "host" in lanes[1]


def test_a_prefill_that_moves_some_sequences_says_nothing_of_the_host() -> None:
    """Those of a second sub-batch go to the CPU, though the first one's cache stays."""
    gpu = placement(SPEC, "gpu", 0)
    decode = replace(gpu.decode, num_second_seqs=1)
    one = plan_of(gpu, gpu)
    plan = replace(
        one,
        placement=replace(gpu, decode=decode),
        workload=replace(one.workload, num_seqs=2),
        estimate=replace(one.estimate, num_concurrent_seqs=2),
    )
    assert "host" not in {term.lane for term in run(plan, "prefill", [1.0])[0].terms}


def test_a_run_without_sampled_steps_has_no_record() -> None:
    assert run(plan_of(ON_CPU, ON_CPU), "decode", [1.0]) == ()


def test_a_record_names_what_was_used() -> None:
    split, cpu = plan_of(SPLIT, SPLIT), plan_of(ON_CPU, ON_CPU)
    (with_gpu,) = run(split, "prefill", [1.0])
    (without,) = run(cpu, "prefill", [1.0])
    assert (with_gpu.placement, with_gpu.accelerator) == ("split", "emulated")
    assert (without.placement, without.accelerator) == ("cpu", "none")
    assert with_gpu.profile_fingerprint == split.profile_fingerprint
    assert with_gpu.rates_fingerprint == "rates"

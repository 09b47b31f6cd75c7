"""Rivals: what each puts where on machines small enough to count, and how they are priced."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner import rival_placements
from planner.errors import PlannerError
from planner.estimate import estimate
from planner.hardware import HardwareProfile
from planner.memory import needs
from planner.model_spec import ModelSpec
from planner.placement import Placement, check_matches
from planner.question import Question
from planner.rivals import RIVALS, RivalName, compare_rivals, rival, rival_names, why_not
from planner.search import search
from planner.workload import Objective, Workload
from tests.planner.test_search_properties import machines, objectives, specs, workloads
from tests.planner.tiny import EXPERTS, real_machine, tiny_spec

GIB = 1 << 30
WORKLOAD = Workload(prompt_len=8, output_len=8)
PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
# Rivals whose placements keep to our memory rules; llama.cpp has its own margin.
OURS: tuple[RivalName, ...] = tuple(name for name in RIVALS if name != "llama-fit")


def found(
    name: RivalName, spec: ModelSpec, machine: HardwareProfile, workload: Workload = WORKLOAD
) -> Placement:
    placement = rival(name, spec, machine, workload)
    assert placement is not None
    assert why_not(name, spec, machine, workload) is None
    return placement


def llama_machine(free_bytes: int) -> HardwareProfile:
    """A GPU of 1 GiB and what llama.cpp then has left."""
    return real_machine(gpu_bytes=GIB + free_bytes)


def gpu_bytes(spec: ModelSpec, placement: Placement, machine: HardwareProfile) -> int:
    return needs(spec, placement, WORKLOAD, machine)["gpu"].needed_bytes


def test_llama_fit_has_the_experts_of_the_first_layers_that_fit() -> None:
    """One expert layer less than all: all dense parts stay, and room of an expert layer is lost."""
    spec, large = tiny_spec("dmmm"), llama_machine(100_000)
    whole = found("llama-fit", spec, large)
    assert all(layer.ffn.runs == "gpu" for layer in whole.decode.layers)
    full = gpu_bytes(spec, whole, large)

    machine = llama_machine(full - 1)
    placement = found("llama-fit", spec, machine)
    runs = [layer.ffn.runs for layer in placement.decode.layers]
    assert runs == ["gpu", "gpu", "gpu", "cpu"]
    assert all(layer.attention.runs == "gpu" for layer in placement.decode.layers)
    assert placement.decode.head.runs == "gpu"
    assert placement.decode.cut == 1
    assert gpu_bytes(spec, placement, machine) == full - EXPERTS
    less = found("llama-fit", spec, llama_machine(full - EXPERTS - 1))
    assert [layer.ffn.runs for layer in less.decode.layers] == ["gpu", "gpu", "cpu", "cpu"]


def test_llama_fit_takes_the_last_layers_where_dense_parts_do_not_all_fit() -> None:
    spec = tiny_spec("mmm")
    machine = llama_machine(100_000)
    without = rival_placements._llama_placement(
        rival_placements.Asked(spec=spec, hardware=machine, workload=WORKLOAD),
        frozenset(range(3)),
        frozenset(),
    )
    budget = gpu_bytes(spec, without, machine) - 1
    placement = found("llama-fit", spec, llama_machine(budget))

    assert [layer.attention.runs for layer in placement.decode.layers] == ["cpu", "gpu", "gpu"]
    assert {layer.ffn.runs for layer in placement.decode.layers} == {"cpu"}


def test_llama_fit_copies_weights_for_steps_of_32_tokens() -> None:
    """A prompt of 31 tokens is computed where the weights are."""
    spec, large = tiny_spec("ddd"), llama_machine(100_000)
    for prompt_len, runs in ((31, "cpu"), (32, "stream")):
        workload = Workload(prompt_len=prompt_len, output_len=2)
        whole = found("llama-fit", spec, large, workload)
        full = needs(spec, whole, workload, large)["gpu"].needed_bytes
        placement = found("llama-fit", spec, llama_machine(full - 1), workload)
        elsewhere = {layer.ffn.runs for layer in placement.prefill.layers} - {"gpu"}
        assert elsewhere == {runs}
        assert "stream" not in {layer.ffn.runs for layer in placement.decode.layers}


def test_flexgen_has_the_same_share_of_every_kind() -> None:
    """Half of the attentions and of the experts of each layer; one more percent does not fit."""
    spec = tiny_spec("mmmm")
    asked = rival_placements.Asked(spec=spec, hardware=real_machine(), workload=WORKLOAD)
    half = rival_placements._flexgen_placement(asked, 50, "gpu")

    assert [layer.attention.runs for layer in half.decode.layers] == ["stream", "gpu"] * 2
    assert {layer.ffn.num_resident for layer in half.decode.layers} == {2}
    assert half.prefill.layers == half.decode.layers
    assert half.decode.cut == 50
    budget = int(gpu_bytes(spec, half, real_machine()) / 0.96) + 10
    placement = found("flexgen", spec, real_machine(gpu_bytes=budget))
    assert placement.decode.cut <= 50
    assert {layer.ffn.num_resident for layer in placement.decode.layers} == {2}


def test_flexgen_computes_attention_where_its_cache_fits() -> None:
    """Caches of 40 sequences are more than the GPU has; it still computes the projections."""
    spec = tiny_spec("dd")
    many = Workload(prompt_len=2, output_len=118, num_seqs=40)
    machine = real_machine(gpu_bytes=150_000, cpu_bytes=1_000_000)
    placement = found("flexgen", spec, machine, many)

    assert {layer.kv for layer in placement.decode.layers} == {"cpu"}
    assert {layer.attention.device for layer in placement.decode.layers} == {"gpu"}
    assert {layer.kv for layer in placement.prefill.layers} == {"gpu"}
    few = found("flexgen", spec, machine)
    assert {layer.kv for layer in few.decode.layers} == {"gpu"}


def test_accelerate_fills_in_order() -> None:
    """The embedding and the first layers; what follows is streamed, attention too."""
    spec, large = tiny_spec("dmdm"), real_machine()
    whole = gpu_bytes(spec, found("accelerate", spec, large), large)
    placement = found("accelerate", spec, real_machine(gpu_bytes=int(whole / 0.96) + 2_000))
    assert {layer.ffn.runs for layer in placement.decode.layers} == {"gpu"}
    placement = found("accelerate", spec, real_machine(gpu_bytes=int((whole - 1) / 0.96)))
    runs = [layer.ffn.runs for layer in placement.decode.layers]

    assert placement.decode.embedding.lives == "gpu"
    assert runs == sorted(runs) and runs[-1] == "stream"
    assert runs == [layer.attention.runs for layer in placement.decode.layers]
    assert placement.decode.cut == runs.count("stream")


@PROPERTY
@given(specs, machines(), workloads, st.sampled_from(RIVALS))
def test_a_rival_fits_or_says_why_not(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload, name: RivalName
) -> None:
    placement = rival(name, spec, machine, workload)
    reason = why_not(name, spec, machine, workload)

    assert (placement is None) == (reason is not None)
    if placement is None:
        assert reason
        return
    assert check_matches(placement, spec) is None
    memory = needs(spec, placement, workload, machine)
    assert memory["cpu"].fits
    assert name == "llama-fit" or all(need.fits for need in memory.values())


@PROPERTY
@given(specs, machines(), workloads, objectives)
def test_no_rival_of_our_space_is_faster_by_more_than_the_gap(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload, objective: Objective
) -> None:
    """Steps of 2048 tokens take the prompts of these workloads at once, as the search's do."""
    question = Question(spec=spec, hardware=machine, workload=workload, objective=objective)
    plan = question.plan()
    for each in compare_rivals(plan, question, OURS):
        assert plan.feasible or not each.fits
        if each.fits:
            assert each.e2e_s is not None and each.ratio is not None
            assert each.e2e_s >= plan.estimate.e2e_s * (1 - plan.optimality_gap) * (1 - 1e-9)


@PROPERTY
@given(specs, machines(), workloads, objectives)
def test_no_rival_is_faster_than_the_fastest_plan(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload, objective: Objective
) -> None:
    question = Question(spec=spec, hardware=machine, workload=workload, objective=objective)
    plan = search(spec, machine, workload, objective, prefers_simple=False)
    for each in compare_rivals(plan, question, RIVALS):
        assert plan.feasible or not each.fits
        assert each.ratio is None or each.ratio >= 1 - 1e-9


def test_a_rival_is_priced_as_the_plan_is() -> None:
    """The plan's own strategy has the plan's times; another one those of its estimate."""
    question = Question(
        spec=tiny_spec("mm"),
        hardware=real_machine(gpu_bytes=20_000),
        workload=WORKLOAD,
        strategy="gpu",
    )
    plan = question.plan()
    own, cpu = compare_rivals(plan, question, ("gpu", "cpu"))

    assert (own.e2e_s, own.ratio) == (plan.estimate.e2e_s, 1.0)
    placement = found("cpu", question.spec, question.hardware)
    alone = estimate(question.spec, placement, question.costs(), WORKLOAD)
    assert (cpu.ttft_s, cpu.tpot_s, cpu.e2e_s) == (alone.ttft_s, alone.tpot_s, alone.e2e_s)
    assert cpu.ratio == alone.e2e_s / plan.estimate.e2e_s


def test_a_rival_may_run_in_waves_for_throughput() -> None:
    """All sequences at once are too many for the GPU."""
    spec = tiny_spec("dd")
    workload = Workload(prompt_len=30, output_len=30, num_seqs=8)
    machine = real_machine(gpu_bytes=45_000, cpu_bytes=1_000_000)
    question = Question(spec=spec, hardware=machine, workload=workload)
    plan = question.plan()
    (at_once,) = compare_rivals(plan, question, ("gpu",))
    (in_waves,) = compare_rivals(
        plan, dataclasses.replace(question, objective="throughput"), ("gpu",)
    )

    assert not at_once.fits and "on the gpu" in at_once.reason
    assert in_waves.fits
    assert in_waves.num_concurrent_seqs is not None and in_waves.num_concurrent_seqs < 8
    times = []
    for size in (4, 2, 1):
        placement = rival("gpu", spec, machine, replace(workload, num_seqs=size))
        if placement is not None:
            priced = estimate(spec, placement, question.costs(), workload, num_concurrent=size)
            times.append(priced.e2e_s)
    assert len(set(times)) > 1
    assert in_waves.e2e_s == min(times)


def test_names_are_checked() -> None:
    assert rival_names("all") == RIVALS
    assert rival_names("gpu,llama-fit,gpu") == ("gpu", "llama-fit")
    with pytest.raises(PlannerError, match="'vllm' is not one of llama-fit, flexgen"):
        rival_names("cpu,vllm")


@pytest.mark.parametrize("name", ["llama-fit", "flexgen", "accelerate"])
def test_without_a_gpu_there_is_nothing_to_place(name: RivalName) -> None:
    machine = real_machine(gpu_bytes=None)
    assert why_not(name, tiny_spec("d"), machine, WORKLOAD) == "the machine has no accelerator"

"""Explanations against the plan that they explain, and what more of anything may do to it."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner import strategies
from planner.estimate import estimate
from planner.explain import bindings, explain, gains, gpu_memory, nearest_fits, step_timelines
from planner.hardware import HardwareProfile
from planner.model_spec import ModelSpec, Module
from planner.placement import (
    ON_CPU,
    ON_GPU,
    STREAMED,
    LayerPlacement,
    ModulePlacement,
    Placement,
    TierPlacement,
)
from planner.question import Question
from planner.what_if import RATES, Rate, with_more_gpu_memory, with_rates
from planner.workload import PHASES, Phase, Workload
from tests.planner.test_search_properties import machines, objectives, specs, workloads
from tests.planner.tiny import (
    ATTENTION,
    DENSE,
    EXPERT,
    HEAD,
    KV_PER_TOKEN,
    ROUTER,
    real_machine,
    tiny_device,
    tiny_machine,
    tiny_spec,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=25)
ROUNDING = 1 + 1e-9


@st.composite
def questions(draw: st.DrawFn) -> Question:
    return Question(
        spec=draw(specs),
        hardware=draw(machines()),
        workload=draw(workloads),
        objective=draw(objectives),
        chunk_tokens=8,
        prefers_simple=draw(st.booleans()),
    )


def test_a_decode_step_is_bound_by_what_reads_most() -> None:
    """16 bytes a second: 768 of the dense matrices, 384 of attention's and 32 of two tokens' cache.

    The head's 160 come third.
    """
    question = Question(
        spec=tiny_spec("d"),
        hardware=tiny_machine(),
        workload=Workload(prompt_len=1, output_len=2),
    )
    dense, attention, head = bindings(question.plan(), question, "decode", 3)

    assert (dense.lane, dense.term, dense.resource) == ("cpu", "dense", "memory")
    assert dense.seconds == pytest.approx(768 / 16, rel=1e-6)
    assert attention.term == "attention"
    assert attention.seconds == pytest.approx((384 + 2 * KV_PER_TOKEN) / 16, rel=1e-6)
    assert head.term == "head"
    assert head.seconds == pytest.approx(160 / 16, rel=1e-6)
    assert dense.share == pytest.approx(768 / (768 + 384 + 32 + 160), rel=1e-2)


@PROPERTY
@given(questions())
def test_bindings_add_up_to_the_phase(question: Question) -> None:
    plan = question.plan()
    for phase in PHASES:
        parts = bindings(plan, question, phase, max_number=99)
        terms = plan.estimate.terms_by_phase[phase]

        assert sum(part.seconds for part in parts) == pytest.approx(sum(terms.values()), rel=1e-9)
        assert sum(part.share for part in parts) == pytest.approx(1.0)
        for term, seconds in terms.items():
            found = sum(part.seconds for part in parts if part.term == term)
            assert found == pytest.approx(seconds, rel=1e-9, abs=1e-15)


def test_caches_that_move_between_the_phases_count_once_for_prefill() -> None:
    """Three layers prefill on the GPU and decode on the CPU."""
    spec, workload = tiny_spec("ddd"), Workload(prompt_len=6, output_len=4)
    question = Question(spec=spec, hardware=real_machine(), workload=workload)
    placement = Placement(
        prefill=strategies.gpu(spec, "prefill"), decode=strategies.cpu(spec, "decode")
    )
    priced = estimate(spec, placement, question.costs(), workload)
    parts = bindings(replace(question.plan(), placement=placement), question, "prefill", 99)

    moved = sum(part.seconds for part in parts if part.term == "transfer")
    assert moved == pytest.approx(priced.terms_by_phase["prefill"]["transfer"], rel=1e-9)


@PROPERTY
@given(questions())
def test_uses_of_gpu_memory_add_up_to_what_may_be_used(question: Question) -> None:
    plan = question.plan()
    found = gpu_memory(plan, question)
    if question.hardware.gpu is None:
        assert found is None
        return
    assert found is not None
    need = question.candidate(plan).memory["gpu"]
    uses = found.bytes_by_use
    modules: tuple[Module, ...] = get_args(Module)

    assert sum(uses.values()) == found.available_bytes == need.available_bytes
    assert sum(uses.get(name, 0) for name in modules) == need.weights_bytes
    assert uses.get("kv", 0) == need.kv_bytes
    assert uses.get("activations", 0) == need.activation_bytes
    assert uses.get("staging", 0) + uses.get("slots", 0) == need.staging_bytes
    assert found.kept_back_bytes == question.hardware.gpu.memory_bytes - need.available_bytes
    assert (uses["free"] >= 0) == need.fits


def tier(phase: Phase, experts: ModulePlacement, num_slots: int) -> TierPlacement:
    """A dense layer that is streamed, and experts of which some are resident."""
    return TierPlacement(
        phase=phase,
        strategy="mixed",
        cut=0,
        max_num_tokens=8,
        embedding=ON_GPU,
        layers=(
            LayerPlacement(attention=ON_GPU, ffn=STREAMED),
            LayerPlacement(attention=ON_CPU, router=ON_GPU, ffn=experts),
        ),
        head=ON_GPU,
        num_expert_slots=num_slots,
    )


def test_residents_buffers_and_slots_are_told_apart() -> None:
    """One expert of four, two buffers of a dense layer, two slots; a tied matrix counts once."""
    question = Question(
        spec=tiny_spec("dm", is_tied=True),
        hardware=real_machine(),
        workload=Workload(prompt_len=4, output_len=4),
    )
    split = ModulePlacement(lives="cpu", runs="split", num_resident=1)
    placement = Placement(prefill=tier("prefill", ON_CPU, 0), decode=tier("decode", split, 2))
    found = gpu_memory(replace(question.plan(), placement=placement), question)

    assert found is not None
    sizes = found.bytes_by_use
    assert {use: sizes[use] for use in ("attention", "router", "experts")} == {
        "attention": ATTENTION,
        "router": ROUTER,
        "experts": EXPERT,
    }
    assert sizes["head"] == HEAD
    assert "embedding" not in sizes and "dense" not in sizes
    assert (sizes["staging"], sizes["slots"]) == (2 * DENSE, 2 * EXPERT)
    # 8 tokens in a block of 16, of the one layer whose attention is on the GPU
    assert sizes["kv"] == 16 * KV_PER_TOKEN


@PROPERTY
@given(questions(), st.sampled_from([None, *RATES]))
def test_more_of_anything_is_never_slower_by_more_than_the_gap(
    question: Question, rate: Rate | None
) -> None:
    """None: more GPU memory. What the plan of the better machine may have missed is its gap."""
    plan = question.plan()
    hardware = question.hardware
    if rate is not None:
        hardware = with_rates(hardware, rate, 1.1)
    elif hardware.gpu is not None:
        hardware = with_more_gpu_memory(hardware, 1_000)
    better = dataclasses.replace(question, hardware=hardware).plan()

    assert better.feasible or not plan.feasible
    if plan.feasible:
        least_s = better.estimate.e2e_s * (1 - better.optimality_gap)
        assert least_s <= plan.estimate.e2e_s * ROUNDING


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("gpu_bytes", [3_000, 6_000, 50_000])
def test_more_is_never_slower_where_kernels_were_measured(rate: Rate, gpu_bytes: int) -> None:
    """Samples of both devices go with the rate; reading and computing take about as long."""
    question = Question(
        spec=tiny_spec("dmmd"),
        hardware=tiny_machine(
            cpu=tiny_device("cpu", read_bytes_per_s=60e3, flop_per_s=200e3, elements_per_s=60e3),
            gpu=tiny_device("gpu", memory_bytes=gpu_bytes, read_bytes_per_s=800e3, flop_per_s=3e6),
            link_bytes_per_s=25e3,
        ),
        workload=Workload(prompt_len=12, output_len=12),
        chunk_tokens=8,
        prefers_simple=False,
    )
    plan = question.plan()
    faster = with_rates(question.hardware, rate, 1.1)
    better = dataclasses.replace(question, hardware=faster).plan()

    least_s = better.estimate.e2e_s * (1 - better.optimality_gap)
    assert plan.feasible and better.feasible
    assert least_s <= plan.estimate.e2e_s * ROUNDING


@PROPERTY
@given(questions())
def test_gains_are_never_below_zero(question: Question) -> None:
    """But for the link's, whose copies slow down the CPU beside them."""
    plan = question.plan()
    if plan.feasible:
        for gain in gains(plan, question):
            assert gain.of == "link" or gain.saved_s >= -1e-9 * plan.estimate.e2e_s
            assert gain.e2e_s == pytest.approx(plan.estimate.e2e_s - gain.saved_s)


def test_a_tenth_more_of_what_binds_saves_its_share() -> None:
    """Reads are all that a decode step of this machine does: 1 - 1/1.1 of the seconds."""
    cpu = tiny_device("cpu", read_bytes_per_s=1e4)
    question = Question(
        spec=tiny_spec("dd"), hardware=tiny_machine(cpu=cpu), workload=Workload(prompt_len=1)
    )
    plan = question.plan()
    memory, compute = gains(plan, question)

    assert (memory.of, compute.of) == ("cpu memory", "cpu compute")
    assert memory.gained_tokens_per_s > 0.05 * plan.estimate.decode_tokens_per_s
    assert compute.saved_s < 1e-6 * plan.estimate.e2e_s


def test_more_gpu_memory_than_the_model_takes_gains_what_it_lacked() -> None:
    """1 GB holds all of a tiny model that its GPU had no room for."""
    question = Question(
        spec=tiny_spec("mmm"),
        hardware=real_machine(gpu_bytes=6_000),
        workload=Workload(prompt_len=6, output_len=5),
        chunk_tokens=8,
    )
    plan = question.plan()
    size = next(gain for gain in gains(plan, question) if gain.of == "gpu memory size")

    assert plan.placement.name != "gpu"
    assert size.placement == "gpu"
    assert size.saved_s > 0


def test_timelines_are_of_the_priced_steps() -> None:
    """A decode step without the host's part is the last op's end."""
    question = Question(
        spec=tiny_spec("dm"), hardware=real_machine(), workload=Workload(prompt_len=20)
    )
    plan = question.plan()
    timelines = step_timelines(plan, question)
    candidate = question.candidate(plan)
    ((_, price),) = candidate.pricer.steps("decode")

    decode_s = timelines["decode"].makespan_s + price.host_s
    assert decode_s == pytest.approx(candidate.decode_step_s, rel=1e-12)
    assert 0 < timelines["prefill"].makespan_s <= candidate.prefill.seconds


def machine_too_small(cpu_bytes: int, gpu_bytes: int | None) -> HardwareProfile:
    machine = real_machine(cpu_bytes=cpu_bytes, gpu_bytes=gpu_bytes)
    kinds = ("bfloat16", "float32", "int8", "int4")
    cpus = tuple(
        replace(cpu, flop_per_s={kind: 60e3 for kind in kinds}) for cpu in machine.cpu_by_threads
    )
    return replace(machine, cpu_by_threads=cpus)


def test_what_would_fit_does_and_one_more_does_not() -> None:
    """18 kB hold 3.9 kB of weights, and caches of 3.8 kB for two long sequences, not for 16."""
    question = Question(
        spec=tiny_spec("ddd"),
        hardware=machine_too_small(20_000, None),
        workload=Workload(prompt_len=40, output_len=40, num_seqs=16),
        chunk_tokens=8,
    )
    assert not question.plan().feasible
    found = {each.change: each for each in nearest_fits(question)}

    assert found["num_seqs"].options == "--num-seqs 2"
    assert found["num_seqs"].workload == replace(question.workload, num_seqs=2)
    more = replace(question.workload, num_seqs=3)
    assert not dataclasses.replace(question, workload=more).plan().feasible
    for each in found.values():
        spec = dataclasses.replace(question.spec, quantization=each.quantization)
        fitting = dataclasses.replace(question, spec=spec, workload=each.workload).plan()
        assert fitting.feasible
        assert fitting.estimate.e2e_s == each.e2e_s
        assert fitting.estimate.decode_tokens_per_s == each.decode_tokens_per_s


@pytest.mark.parametrize(
    ("gpu_bytes", "is_known", "options"),
    [
        (None, False, "--quantization int4"),
        (1_000, True, "--quantization int4"),
        (1_000, False, "--quantization int4 --accelerator none"),
    ],
)
def test_quantised_weights_fit_where_the_checkpoint_does_not(
    gpu_bytes: int | None, is_known: bool, options: str
) -> None:
    """256 wide: 16 bits a weight against 4.125; on the CPU alone where the GPU has no rates."""
    hardware = machine_too_small(400_000, gpu_bytes)
    if is_known:
        assert hardware.gpu is not None
        flop_per_s = dict(hardware.cpu.flop_per_s)
        hardware = replace(hardware, gpu=replace(hardware.gpu, flop_per_s=flop_per_s))
    question = Question(
        spec=dataclasses.replace(
            tiny_spec("dd"),
            hidden_size=256,
            layers=tuple(
                dataclasses.replace(layer, intermediate_size=256)
                for layer in tiny_spec("dd").layers
            ),
        ),
        hardware=hardware,
        workload=Workload(prompt_len=8, output_len=8),
        chunk_tokens=8,
    )
    assert not question.plan().feasible
    (found,) = nearest_fits(question)

    assert (found.change, found.quantization) == ("quantization", "int4")
    assert found.options == options
    assert found.placement == "cpu"


def test_without_the_strategy_that_does_not_fit_another_one_does() -> None:
    question = Question(
        spec=tiny_spec("dd"),
        hardware=real_machine(gpu_bytes=1_000),
        workload=Workload(prompt_len=8, output_len=8),
        chunk_tokens=8,
        strategy="gpu",
    )
    first = nearest_fits(question)[0]

    assert (first.change, first.options, first.placement) == ("strategy", "no --strategy", "cpu")


def test_an_explanation_tells_of_gains_or_of_what_would_fit() -> None:
    fits = Question(
        spec=tiny_spec("d"), hardware=real_machine(), workload=Workload(prompt_len=4, output_len=4)
    )
    lacks = dataclasses.replace(fits, hardware=machine_too_small(100, None))

    plan = fits.plan()
    explained = explain(plan, fits)
    assert [gain.of for gain in explained.gains] == ["gpu memory size", *RATES]
    assert explained.nearest_fits == ()
    assert explained.gpu_memory == gpu_memory(plan, fits)
    explained = explain(lacks.plan(), lacks)
    assert (explained.gains, explained.gpu_memory, explained.nearest_fits) == ((), None, ())


@PROPERTY
@given(specs, machines(), workloads)
def test_every_change_that_is_told_fits(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload
) -> None:
    question = Question(spec=spec, hardware=machine, workload=workload, chunk_tokens=8)
    if question.plan().feasible:
        return
    for each in nearest_fits(dataclasses.replace(question, strategy="cpu")):
        if each.change in ("prompt_len", "output_len", "num_seqs"):
            again = dataclasses.replace(question, workload=each.workload, strategy="cpu").plan()
            assert again.feasible

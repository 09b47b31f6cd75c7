"""Tiers for smaller steps: nothing lies elsewhere, each is faster at its size, none is missed."""

from __future__ import annotations

from itertools import product

import pytest
from msgspec.structs import replace

from planner import strategies
from planner.candidate import Candidate, Wave
from planner.cost_model import CostModel, Pricer
from planner.estimate import estimate
from planner.hardware import HardwareProfile
from planner.memory import needs, staging_bytes
from planner.placement import (
    ON_CPU,
    ON_GPU,
    STREAMED,
    LayerPlacement,
    ModulePlacement,
    Placement,
    Runs,
    TierPlacement,
)
from planner.search import CHUNK_TOKENS, search
from planner.simulate import makespan_s
from planner.step_graph import build
from planner.tier_graphs import TierGraphs
from planner.tiers import DECODE_TIERS, with_smaller_tiers
from planner.workload import Phase, Workload, decode_shape
from tests.planner.replay import ROOT, read_model
from tests.planner.tiny import real_machine, tiny_spec

# The CPU computes a token slowly but needs no copy; the link takes a second for 2000 bytes.
MACHINE = real_machine(
    link_bytes_per_s=2e3,
    cpu_flop_per_s=2e4,
    cpu_read_bytes_per_s=1e5,
    gpu_bytes=10**7,
    cpu_bytes=10**7,
)
SPEC = tiny_spec("dmd")
MANY = Workload(prompt_len=300, output_len=8, num_seqs=70)


def streamed(phase: Phase, *, slots: int = 0) -> TierPlacement:
    """Feed-forward and experts streamed, all else on the GPU."""
    tier = strategies.gpu(SPEC, phase)
    layers = tuple(replace(layer, ffn=STREAMED) for layer in tier.layers)
    return replace(tier, layers=layers, max_num_tokens=2048, num_expert_slots=slots)


def candidate(machine: HardwareProfile = MACHINE, slots: int = 0) -> Candidate:
    placement = Placement(prefill=streamed("prefill"), decode=streamed("decode", slots=slots))
    return Candidate(placement, Wave(SPEC, CostModel(machine), MANY, MANY.num_seqs))


def step_s(whole: Candidate, tier: TierPlacement, num_tokens: int) -> float:
    """Seconds of a decode step in the middle of the workload."""
    shape = decode_shape(num_tokens, MANY.prompt_len + MANY.output_len / 2)
    price = Pricer(SPEC, whole.wave.costs, shape, whole.pricer.backends)
    return makespan_s(build(SPEC, tier), price, whole.wave.costs.slowdowns)


def test_what_large_steps_stream_of_a_divided_layer_small_ones_leave_to_the_cpu() -> None:
    """Its residents stay where they are."""
    spec = tiny_spec("dd")
    divided = ModulePlacement(lives="cpu", runs="stream", num_resident=2)

    def tier(phase: Phase) -> TierPlacement:
        gpu = strategies.gpu(spec, phase)
        layers = tuple(replace(layer, ffn=divided) for layer in gpu.layers)
        return replace(gpu, layers=layers, max_num_tokens=2048)

    placement = Placement(prefill=tier("prefill"), decode=tier("decode"))
    wave = Wave(spec, CostModel(MACHINE), MANY, MANY.num_seqs)
    found = with_smaller_tiers(Candidate(placement, wave)).placement
    one = found.tier("decode", 1)
    assert {layer.ffn for layer in one.layers} == {replace(divided, runs="cpu")}


def test_small_steps_run_on_the_cpu_where_large_ones_are_streamed() -> None:
    whole = candidate()
    placement = with_smaller_tiers(whole).placement

    sizes = [tier.max_num_tokens for tier in placement.smaller if tier.phase == "decode"]
    assert sizes and set(sizes) <= set(DECODE_TIERS)
    for tier in placement.smaller:
        assert tier.lives_on("cpu") == placement.tier(tier.phase).lives_on("cpu")
    one = placement.tier("decode", 1)
    assert {layer.ffn for layer in one.layers} == {ON_CPU}
    assert placement.tier("decode", 70) == whole.placement.decode
    found = needs(SPEC, placement, MANY, MACHINE)
    assert found["gpu"] == whole.memory["gpu"]
    assert found["cpu"].fits


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("size", DECODE_TIERS)
def test_a_tier_is_as_fast_as_any_way_to_run_the_same_weights(size: int, slots: int) -> None:
    """All ways of three layers, those that need larger buffers left out."""
    whole = candidate(slots=slots)
    found = with_smaller_tiers(whole).placement
    room = max(staging_bytes(SPEC, tier) for tier in whole.placement.tiers)
    some: tuple[Runs, ...] = ("cpu", "stream")
    ways: tuple[Runs, ...] = ("cpu", "stream", "split") if slots else some
    best_s = step_s(whole, whole.placement.decode, size)
    for runs in product(some, ways, some):
        layers = tuple(
            replace(layer, ffn=ModulePlacement(lives="cpu", runs=each))
            for layer, each in zip(whole.placement.decode.layers, runs, strict=True)
        )
        tier = replace(whole.placement.decode, layers=layers)
        if staging_bytes(SPEC, tier) <= room:
            best_s = min(best_s, step_s(whole, tier, size))

    # what gains less than 2 % over the next larger tier is not worth one
    assert step_s(whole, found.tier("decode", size), size) <= best_s * 1.05


def test_where_nothing_can_run_otherwise_there_are_no_smaller_tiers() -> None:
    placement = strategies.placement(SPEC, "gpu", 0)
    whole = Candidate(placement, Wave(SPEC, CostModel(MACHINE), MANY, MANY.num_seqs))
    assert with_smaller_tiers(whole) is whole


def test_a_workload_is_priced_by_the_tiers_that_its_steps_run_in() -> None:
    """21000 tokens in steps of 2048 leave one of 520; a tier for up to 1024 takes it."""
    whole = candidate()
    plain = whole.placement
    on_cpu = replace(
        plain.prefill,
        max_num_tokens=1024,
        layers=tuple(replace(layer, ffn=ON_CPU) for layer in plain.prefill.layers),
    )
    tiered = replace(plain, smaller=(on_cpu,))
    graphs = TierGraphs(SPEC, tiered)
    assert graphs.find("prefill", 520) is graphs.find("prefill", 1024)
    assert graphs.find("prefill", 1025) is graphs.find("prefill", 2048)
    assert graphs.find("prefill", 1025) is not graphs.find("prefill", 1024)

    by_step = {}
    for step, price in whole.pricer._steps:
        tier = on_cpu if step.shape.num_tokens <= 1024 else plain.prefill
        by_step[step.shape] = step.num_steps * (
            makespan_s(build(SPEC, tier), price, whole.wave.costs.slowdowns) + price.host_s
        )
    assert {shape.num_tokens for shape in by_step} == {2048, 520}
    costs = CostModel(MACHINE)
    expected = MANY.num_seqs * MANY.prompt_len / sum(by_step.values())
    found = estimate(SPEC, tiered, costs, MANY)
    assert found.prefill_tokens_per_s == pytest.approx(expected)
    assert found.ttft_s != estimate(SPEC, plain, costs, MANY).ttft_s


def smaller_tier(**changes: object) -> TierPlacement:
    layers = tuple(replace(layer, **changes) for layer in streamed("decode").layers)
    return replace(streamed("decode"), max_num_tokens=4, layers=layers)


@pytest.mark.parametrize(
    ("tier", "reason"),
    [
        (replace(streamed("decode"), max_num_tokens=2048), "is for steps of 2048 tokens, no fewer"),
        (replace(streamed("decode"), max_num_tokens=4, head=ON_CPU), "has weights elsewhere"),
        (smaller_tier(ffn=ON_GPU), "has weights elsewhere"),
        (smaller_tier(attention=ON_CPU), "keeps other caches"),
        (smaller_tier(kv_on_cpu=True), "keeps other caches"),
        (replace(smaller_tier(), layers=smaller_tier().layers[:2]), "has 2 layers"),
        (replace(smaller_tier(), num_second_seqs=2), "has two sub-batches"),
    ],
)
def test_a_smaller_tier_shares_weights_and_caches(tier: TierPlacement, reason: str) -> None:
    with pytest.raises(ValueError, match=f"tier 0 of smaller {reason}"):
        Placement(prefill=streamed("prefill"), decode=streamed("decode"), smaller=(tier,))


def test_caches_on_the_cpu_of_attention_on_the_gpu_are_of_decode_only() -> None:
    with pytest.raises(ValueError, match="kv_on_cpu is of attention that runs on the gpu"):
        LayerPlacement(attention=ON_CPU, ffn=ON_CPU, kv_on_cpu=True)
    both = LayerPlacement(attention=STREAMED, ffn=ON_GPU, kv_on_cpu=True)
    assert (both.kv, both.attention.device) == ("cpu", "gpu")
    with pytest.raises(ValueError, match="of decode tiers only"):
        replace(streamed("prefill"), layers=(both,))
    with pytest.raises(ValueError, match="of decode tiers only"):
        replace(streamed("prefill"), num_second_seqs=1)


def test_two_sub_batches_need_all_attention_on_the_gpu() -> None:
    prefill, decode = streamed("prefill"), streamed("decode")
    on_cpu = tuple(replace(layer, attention=ON_CPU) for layer in decode.layers)
    with pytest.raises(ValueError, match="attention of layer 0 runs on the cpu"):
        replace(decode, num_second_seqs=3, layers=on_cpu)
    two = replace(decode, num_second_seqs=3)
    with pytest.raises(ValueError, match="needs all prefill attention on the gpu"):
        Placement(prefill=replace(prefill, layers=on_cpu), decode=two)
    mixed = (replace(two.layers[0], kv_on_cpu=True), *two.layers[1:])
    with pytest.raises(ValueError, match="the first one's cache must be on one device"):
        Placement(prefill=prefill, decode=replace(two, layers=mixed))
    assert Placement(prefill=prefill, decode=two).decode.uses("cpu")


def test_the_bound_holds_for_prompts_that_leave_a_short_last_step() -> None:
    """8200 tokens: 8 are left of steps of 4096 or 8192, and run in a tier of their own."""
    spec = read_model("olmoe-1b-7b")
    machine = HardwareProfile.load(ROOT / "profiles" / "machines" / "laptop-rtx4060.json")
    workload = Workload(prompt_len=2050, output_len=2, num_seqs=4)
    plan = search(spec, machine, workload, prefers_simple=False)
    floor_s = plan.estimate.e2e_s * (1 - plan.optimality_gap)
    for chunk_tokens in CHUNK_TOKENS:
        other = search(spec, machine, workload, chunk_tokens=chunk_tokens, prefers_simple=False)
        assert other.estimate.e2e_s >= floor_s * (1 - 1e-9)
        assert other.estimate.e2e_s >= plan.estimate.e2e_s * 0.99
    assert any(tier.phase == "prefill" for tier in plan.placement.smaller)


def test_a_strategy_that_is_asked_for_has_no_tiers_of_another() -> None:
    spec = read_model("olmoe-1b-7b")
    machine = HardwareProfile.load(ROOT / "profiles" / "machines" / "laptop-rtx4060.json")
    workload = Workload(prompt_len=2050, output_len=2, num_seqs=4)
    assert search(spec, machine, workload, strategy="offload").placement.smaller == ()

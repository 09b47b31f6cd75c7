"""Slots that change and experts copied ahead: what is refused, the graph, bytes and prices."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from planner import strategies
from planner.cost_model import CostModel, ExpertLoad, predict
from planner.memory import needs, staging_bytes, weight_bytes
from planner.placement import (
    ON_CPU,
    ON_GPU,
    STREAMED,
    LayerPlacement,
    ModulePlacement,
    Placement,
    Runs,
    Slots,
    TierPlacement,
)
from planner.step_graph import Op, StepGraph, build
from planner.workload import Phase, Workload, decode_shape
from tests.planner.tiny import EXPERT, real_machine, tiny_machine, tiny_spec

SPEC = tiny_spec("mmm")
LRU = ModulePlacement(lives="cpu", runs="split", num_resident=2, slots="lru")


def tier_of(*ffns: ModulePlacement, phase: Phase = "decode", num_slots: int = 4) -> TierPlacement:
    """Experts as said, all else on the GPU."""
    gpu = strategies.gpu(SPEC, phase)
    layers = tuple(replace(layer, ffn=ffn) for layer, ffn in zip(gpu.layers, ffns, strict=True))
    return replace(gpu, strategy="mixed", layers=layers, num_expert_slots=num_slots)


def both(ffn: ModulePlacement, other: ModulePlacement) -> Placement:
    """All layers so in decode, and otherwise in prefill."""
    return Placement(prefill=tier_of(*[other] * 3, phase="prefill"), decode=tier_of(*[ffn] * 3))


@pytest.mark.parametrize("runs", ["cpu", "stream"])
def test_only_split_experts_have_slots_that_change_or_copy_ahead(runs: Runs) -> None:
    with pytest.raises(ValueError, match=f"slots is lru, but only .* split fetch any, not {runs}"):
        ModulePlacement(lives="cpu", runs=runs, num_resident=2, slots="lru")
    with pytest.raises(ValueError, match="prefetch is true, but only experts that run split"):
        ModulePlacement(lives="cpu", runs=runs, prefetch=True)
    with pytest.raises(ValueError, match="num_resident, the number of slots, is 0; it must be 1"):
        ModulePlacement(lives="cpu", runs="split", slots="lru")


def test_a_guess_needs_the_router_on_the_gpu_and_the_hidden_states_of_a_layer_before() -> None:
    ahead = replace(LRU, prefetch=True)
    with pytest.raises(ValueError, match="needs the router's weights on the gpu"):
        LayerPlacement(attention=ON_GPU, ffn=ahead, router=STREAMED)
    with pytest.raises(ValueError, match="layer 0 has prefetch, but no layer before it"):
        tier_of(ahead, LRU, LRU)
    tier = tier_of(LRU, ahead, LRU)
    on_cpu = LayerPlacement(attention=ON_CPU, ffn=ON_CPU, router=ON_CPU)
    with pytest.raises(ValueError, match="layer 1 has prefetch, but layer 0 has its hidden states"):
        replace(tier, layers=(on_cpu, *tier.layers[1:]))


@pytest.mark.parametrize(
    "ffn", [LRU, ModulePlacement(lives="cpu", runs="split", num_resident=2, prefetch=True)]
)
def test_two_sub_batches_have_no_such_slots(ffn: ModulePlacement) -> None:
    tier = tier_of(ON_GPU, ffn, ON_GPU)
    with pytest.raises(ValueError, match="num_second_seqs is 2, but layer 1 has slots that change"):
        replace(tier, num_second_seqs=2)


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (ON_GPU, "2 slots .* in one tier, but all experts are resident in prefill"),
        (replace(LRU, num_resident=3), "3 slots .* in one tier, but num_resident is 2 in decode"),
        (replace(LRU, slots="static"), "2 slots .* in one tier, but slots is static in prefill"),
        (
            ModulePlacement(lives="cpu", runs="stream", num_resident=1),
            "2 slots .* in one tier, but num_resident is 1 in prefill",
        ),
    ],
)
def test_all_tiers_know_what_is_in_slots_that_change(other: ModulePlacement, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        both(LRU, other)


@pytest.mark.parametrize("other", [LRU, ON_CPU, STREAMED, replace(LRU, prefetch=False)])
def test_the_host_has_all_experts_of_slots_that_change(other: ModulePlacement) -> None:
    """3 layers of 4 experts; 2 slots each on the GPU, and 4 places to copy to."""
    placement = both(LRU, other)
    assert weight_bytes(SPEC, placement, "gpu") == weight_bytes(
        SPEC, both(replace(LRU, slots="static"), replace(LRU, slots="static")), "gpu"
    )
    others = weight_bytes(SPEC, strategies.placement(SPEC, "gpu", 0), "cpu")
    on_cpu = weight_bytes(SPEC, placement, "cpu") - others
    assert on_cpu == 3 * SPEC.layers[0].num_experts * EXPERT
    assert staging_bytes(SPEC, placement.decode) == 4 * EXPERT
    workload = Workload(prompt_len=16, output_len=4)
    machine = tiny_machine(gpu=None)
    assert needs(SPEC, placement, workload, machine)["cpu"].weights_bytes == on_cpu + others


def test_defaults_are_not_in_the_json_of_a_placement() -> None:
    static = msgspec.to_builtins(replace(LRU, slots="static"))
    assert static == {"lives": "cpu", "runs": "split", "num_resident": 2}
    changed = replace(LRU, prefetch=True)
    assert msgspec.convert(msgspec.to_builtins(changed), ModulePlacement) == changed


def by_name(graph: StepGraph) -> dict[str, Op]:
    found = {op.name: op for op in graph.ops}
    assert len(found) == len(graph.ops)
    return found


def test_static_slots_have_the_ops_that_they_had() -> None:
    ops = build(SPEC, tier_of(*[replace(LRU, slots="static")] * 3)).ops
    assert not any(op.kind == "admit" or op.part == "prefetched" for op in ops)


def test_slots_are_overwritten_when_what_they_held_has_been_read() -> None:
    """`admit` comes after the residents' experts and those that it reads; a half of the places to
    copy to is free when the layer before the last one has been admitted."""
    graph = build(SPEC, tier_of(LRU, LRU, LRU))
    ops = by_name(graph)
    for layer in range(3):
        admit = ops[f"admit fetched[{layer}]"]
        assert admit.lane == "gpu"
        assert set(admit.deps) == {
            ops[f"experts resident[{layer}]"].index,
            ops[f"experts fetched[{layer}]"].index,
        }
    fetch = ops["copy weights fetched experts[2] h2d"]
    assert ops["admit fetched[0]"].index in fetch.deps
    assert fetch.buffer == ops["admit fetched[0]"].buffer
    # and before the router of the next step, by the lane
    gpu = [op.index for op in graph.lane("gpu")]
    assert gpu == sorted(gpu)


@pytest.mark.parametrize("slots", ["static", "lru"])
def test_what_is_copied_ahead_waits_for_its_place_and_nothing_waits_for_it(slots: Slots) -> None:
    ahead = replace(LRU, slots=slots, prefetch=True)
    graph = build(SPEC, tier_of(replace(LRU, slots=slots), ahead, ahead))
    ops = by_name(graph)
    reader = "admit" if slots == "lru" else "experts"
    for layer in (1, 2):
        copy = ops[f"copy weights prefetched experts[{layer}] h2d"]
        fetch = ops[f"copy weights fetched experts[{layer}] h2d"]
        assert copy.gives_way and not fetch.gives_way
        assert copy.buffer == fetch.buffer
        assert all(copy.index not in op.deps for op in graph.ops)
        h2d = graph.lane("h2d")
        assert h2d[h2d.index(copy) + 1] == fetch
        guess = ops[f"router prefetched[{layer}]"]
        assert guess.lane == "gpu"
        # beside the experts of the layer before, after whose routing
        assert ops[f"router[{layer - 1}]"].index in guess.deps
        if layer == 2:
            assert ops[f"{reader} fetched[0]"].index in copy.deps


@pytest.mark.parametrize("ffn", [ON_GPU, ON_CPU, STREAMED])
def test_other_layers_guess_before_their_experts(ffn: ModulePlacement) -> None:
    ops = by_name(build(SPEC, tier_of(ffn, replace(LRU, prefetch=True), ON_GPU)))
    assert ops["router prefetched[1]"].index < ops["experts[0]"].index
    assert ops["copy weights prefetched experts[1] h2d"].index < ops["experts[0]"].index


def seconds_of(op: Op, num_seqs: int = 1) -> float:
    costs = CostModel(real_machine(gpu_bytes=10**9))
    return costs.op_cost(op, SPEC, decode_shape(num_seqs, 20)).seconds


def test_a_chunk_is_a_third_of_an_experts_copy_and_all_of_them_what_is_missed() -> None:
    graph = build(SPEC, tier_of(LRU, replace(LRU, prefetch=True), LRU))
    ahead = by_name(graph)["copy weights prefetched experts[1] h2d"]
    chunk_s = seconds_of(replace(ahead, num_chunks=1))

    assert chunk_s > 0
    assert seconds_of(replace(ahead, num_chunks=3)) == pytest.approx(3 * chunk_s)
    costs = CostModel(real_machine(gpu_bytes=10**9))
    shape = decode_shape(1, 20)
    missed = costs.expert_load(replace(ahead, kind="experts", part="missed"), SPEC, shape)
    expected = min(2.0, missed.distinct)  # a half has two places
    assert seconds_of(ahead) == pytest.approx(3 * expected * chunk_s)


def test_what_is_copied_ahead_is_not_fetched() -> None:
    """Fewer copies after the gate; the CPU gets no more, and all get the same in sum.

    A CPU so slow that all of what a half holds is fetched.
    """
    machine = real_machine(gpu_bytes=10**9, cpu_read_bytes_per_s=2e3, cpu_flop_per_s=2e3)
    costs, shape = CostModel(machine), decode_shape(1, 20)
    loads, copies = list[list[ExpertLoad]](), list[float]()
    for prefetch in (False, True):
        graph = build(SPEC, tier_of(LRU, replace(LRU, prefetch=prefetch), LRU))
        ops = by_name(graph)
        names = ("experts resident[1]", "experts fetched[1]", "experts rest[1]")
        loads.append([costs.expert_load(ops[name], SPEC, shape) for name in names])
        fetch = ops["copy weights fetched experts[1] h2d"]
        copies.append(costs.op_cost(fetch, SPEC, shape).seconds)

    without, ahead = loads
    all_of_them = sum(each.distinct for each in without)
    assert sum(each.distinct for each in ahead) == pytest.approx(all_of_them)
    assert ahead[0] == without[0]
    assert ahead[2].distinct <= without[2].distinct + 1e-12
    assert copies[1] < copies[0]


@pytest.mark.parametrize("num_seqs", [1, 4])
def test_such_plans_are_priced_with_bounded_seconds(num_seqs: int) -> None:
    """The step with all of it takes no longer than its ops one after the other."""
    costs, shape = CostModel(real_machine(gpu_bytes=10**9)), decode_shape(num_seqs, 20)
    ahead = replace(LRU, prefetch=True)
    timeline = predict(build(SPEC, tier_of(LRU, ahead, ahead)), SPEC, costs, shape)

    assert 0 < timeline.makespan_s <= sum(timeline.busy_s().values()) + 1e-12
    assert sum(timeline.by_term().values()) == pytest.approx(timeline.makespan_s)

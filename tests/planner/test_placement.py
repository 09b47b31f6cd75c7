"""Placement: contradictions are refused, and the strategies place what they say."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from planner import strategies
from planner.placement import (
    ON_CPU,
    ON_GPU,
    STREAMED,
    Device,
    LayerPlacement,
    ModulePlacement,
    Placement,
    Runs,
    TierPlacement,
    check_matches,
)
from planner.strategies import STRATEGIES, candidates, cuts
from planner.workload import PHASES
from tests.planner.tiny import tiny_spec

SPEC = tiny_spec("dmmd")


@pytest.mark.parametrize(("lives", "runs"), [("gpu", "cpu"), ("gpu", "stream"), ("cpu", "gpu")])
def test_a_module_cannot_live_and_run_in_contradiction(lives: Device, runs: Runs) -> None:
    with pytest.raises(ValueError, match=f"lives on {lives} cannot run as {runs}"):
        ModulePlacement(lives=lives, runs=runs)


def test_only_experts_beside_a_router_on_the_gpu_are_on_both_devices() -> None:
    mixed = ModulePlacement(lives="cpu", runs="cpu", num_resident=1)
    split = ModulePlacement(lives="cpu", runs="split")
    with pytest.raises(ValueError, match="only experts can run split"):
        LayerPlacement(attention=ON_GPU, ffn=split)
    for where in (mixed, split):
        with pytest.raises(ValueError, match="only a feed-forward or experts can have residents"):
            LayerPlacement(attention=where, ffn=ON_CPU)
        with pytest.raises(ValueError, match="need their router on the gpu"):
            LayerPlacement(attention=ON_GPU, ffn=where, router=ON_CPU)
        assert LayerPlacement(attention=ON_CPU, ffn=where, router=ON_GPU).ffn.devices == (
            "gpu",
            "cpu",
        )
    with pytest.raises(ValueError, match="num_resident is 2, but a module that lives on the gpu"):
        ModulePlacement(lives="gpu", runs="gpu", num_resident=2)


def test_a_tier_that_splits_needs_slots() -> None:
    tier = strategies.gpu(SPEC, "decode")
    split = ModulePlacement(lives="cpu", runs="split")
    layers = tuple(
        layer if layer.router is None else replace(layer, ffn=split) for layer in tier.layers
    )
    with pytest.raises(ValueError, match="num_expert_slots is 1, but layers that run split need 2"):
        replace(tier, layers=layers, num_expert_slots=1)


@pytest.mark.parametrize("order", [((), (1, 0), (), ()), ((), (0, 1, 2, 2), (0, 1, 2, 3), ())])
def test_an_order_that_lacks_an_expert_does_not_match(order: tuple[tuple[int, ...], ...]) -> None:
    placement = replace(strategies.placement(SPEC, "gpu", 0), expert_order=order)
    assert "every expert of every layer once" in (check_matches(placement, SPEC) or "")


def test_as_many_residents_as_experts_do_not_match() -> None:
    tiers = []
    for phase in PHASES:
        tier = strategies.gpu(SPEC, phase)
        where = ModulePlacement(lives="cpu", runs="cpu", num_resident=4)
        layers = tuple(
            layer if layer.router is None else replace(layer, ffn=where) for layer in tier.layers
        )
        tiers.append(replace(tier, layers=layers))
    placement = Placement(prefill=tiers[0], decode=tiers[1])
    assert "has 4 experts, the plan has 4 of them beside others" in (
        check_matches(placement, SPEC) or ""
    )


def test_a_contradiction_in_a_file_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="lives on gpu cannot run as stream"):
        msgspec.json.decode('{"lives": "gpu", "runs": "stream"}', type=ModulePlacement)


@pytest.mark.parametrize(("where", "device"), [(ON_GPU, "gpu"), (STREAMED, "gpu"), (ON_CPU, "cpu")])
def test_a_streamed_module_is_computed_on_the_gpu(where: ModulePlacement, device: str) -> None:
    assert where.device == device


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_placement_goes_through_json_unchanged(strategy: str) -> None:
    placement = strategies.placement(SPEC, strategy, 2)
    data = msgspec.json.encode(placement)

    assert msgspec.json.decode(data, type=Placement) == placement


@pytest.mark.parametrize(("field", "value"), [("max_num_tokens", 0), ("cut", -1)])
def test_a_tier_of_no_tokens_or_a_negative_cut_is_refused_where_it_is_read(
    field: str, value: int
) -> None:
    document = msgspec.to_builtins(strategies.cpu(SPEC, "decode"))
    document[field] = value

    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.json.decode(msgspec.json.encode(document), type=TierPlacement)


def test_the_tiers_of_a_placement_have_their_phases_and_one_model() -> None:
    prefill, decode = strategies.gpu(SPEC, "prefill"), strategies.gpu(SPEC, "decode")

    with pytest.raises(ValueError, match="one for prefill and one for decode"):
        Placement(prefill=decode, decode=prefill)
    with pytest.raises(ValueError, match="prefill tier has 4 layers, the decode tier 3"):
        Placement(prefill=prefill, decode=strategies.gpu(tiny_spec("dmm"), "decode"))


def test_a_placement_is_named_after_its_strategies() -> None:
    cpu = strategies.cpu(SPEC, "prefill")

    assert strategies.placement(SPEC, "offload", 1).name == "offload"
    assert Placement(prefill=cpu, decode=strategies.split(SPEC, "decode", 1)).name == "cpu+split"


def test_a_placement_of_another_model_does_not_match() -> None:
    placement = strategies.placement(SPEC, "gpu", 0)

    assert check_matches(placement, SPEC) is None
    assert check_matches(placement, tiny_spec("dmm")) == (
        "the plan has 4 layers, the model 3 - at `$.placement.prefill.layers`"
    )
    assert check_matches(placement, tiny_spec("dddd")) == (
        "layer 1 of the model has a dense feed-forward, the plan says otherwise - at "
        "`$.placement.prefill.layers[1].router`"
    )
    assert check_matches(placement, tiny_spec("mmmd")) == (
        "layer 0 of the model has experts, the plan says otherwise - at "
        "`$.placement.prefill.layers[0].router`"
    )


def runs(tier: TierPlacement) -> str:
    """Embedding, each layer's attention and feed-forward, head: g, c or s (stream) each."""
    layers = " ".join(layer.attention.runs[0] + layer.ffn.runs[0] for layer in tier.layers)
    return f"{tier.embedding.runs[0]} {layers} {tier.head.runs[0]}"


@pytest.mark.parametrize(
    ("strategy", "cut", "expected"),
    [
        ("gpu", 0, "g gg gg gg gg g"),
        ("cpu", 0, "c cc cc cc cc c"),
        ("offload", 1, "c ss gg gg gg g"),
        ("offload", 4, "c ss ss ss ss g"),
        ("split", 0, "c gg gg gg gg g"),
        ("split", 3, "c cc cc cc gg g"),
        ("split", 4, "c cc cc cc cc g"),
        # Layers 1 and 2 have experts; the dense ones stay on the GPU.
        ("experts-on-cpu", 1, "c gg gc gg gg g"),
        ("experts-on-cpu", 2, "c gg gc gc gg g"),
    ],
)
def test_a_strategy_places_modules_up_to_its_cut(strategy: str, cut: int, expected: str) -> None:
    for phase in ("prefill", "decode"):
        assert runs(STRATEGIES[strategy](SPEC, phase, cut)) == expected


@pytest.mark.parametrize("strategy", ["offload", "experts-on-cpu"])
def test_a_tied_embedding_lies_beside_the_head(strategy: str) -> None:
    tier = STRATEGIES[strategy](tiny_spec("dm", is_tied=True), "decode", 1)
    assert tier.embedding == tier.head == ON_GPU


def test_the_router_is_where_attention_is() -> None:
    for name in STRATEGIES:
        for index, layer in enumerate(STRATEGIES[name](SPEC, "decode", 1).layers):
            assert layer.router == (layer.attention if SPEC.layers[index].is_moe else None)


@pytest.mark.parametrize(
    ("layers", "is_tied", "expected"),
    [
        ("ddd", False, {"gpu": [0], "cpu": [0], "offload": [1, 2, 3], "split": [0, 1, 2, 3]}),
        # With a tied embedding, split at 0 would be gpu with the matrix held twice.
        ("dd", True, {"gpu": [0], "cpu": [0], "offload": [1, 2], "split": [1, 2]}),
        (
            "dmm",
            True,
            {
                "gpu": [0],
                "cpu": [0],
                "offload": [1, 2, 3],
                "split": [1, 2, 3],
                "experts-on-cpu": [1, 2],
            },
        ),
    ],
)
def test_every_cut_that_is_a_placement_of_its_own_is_a_candidate(
    layers: str, is_tied: bool, expected: dict[str, list[int]]
) -> None:
    spec = tiny_spec(layers, is_tied=is_tied)
    found: dict[str, list[int]] = {}
    for tier in candidates(spec, "decode", has_gpu=True):
        found.setdefault(tier.strategy, []).append(tier.cut)

    assert found == expected


@pytest.mark.parametrize("is_tied", [True, False])
def test_no_two_candidates_are_the_same_placement(is_tied: bool) -> None:
    tiers = candidates(tiny_spec("dmmd", is_tied=is_tied), "decode", has_gpu=True)
    bare = [replace(tier, strategy="", cut=0) for tier in tiers]

    assert all(bare.count(tier) == 1 for tier in bare)


def test_without_a_gpu_only_the_cpu_is_a_candidate() -> None:
    assert [len(cuts(name, SPEC, has_gpu=False)) for name in STRATEGIES] == [0, 1, 0, 0, 0]


def test_the_step_limit_is_the_same_for_every_candidate() -> None:
    tiers = candidates(SPEC, "prefill", has_gpu=True, chunk_tokens=7)
    assert {tier.max_num_tokens for tier in tiers} == {7}


@pytest.mark.parametrize("pair", [("offload", "split"), ("offload", "experts-on-cpu")])
def test_a_streaming_prefill_shares_its_resident_weights_with_decode_on_the_cpu(
    pair: tuple[str, str],
) -> None:
    """With equal cuts the pair holds no more on the GPU than its decode tier alone."""
    spec = tiny_spec("mmm")
    prefill = STRATEGIES[pair[0]](spec, "prefill", 2)
    decode = STRATEGIES[pair[1]](spec, "decode", 2)

    assert prefill.lives_on("gpu") <= decode.lives_on("gpu")


def test_tiers_of_one_size_are_refused() -> None:
    """A step would not say which of them it runs."""
    spec = tiny_spec("dm")
    gpu = strategies.placement(spec, "gpu", 0)
    few = replace(gpu.decode, max_num_tokens=4)
    with pytest.raises(ValueError, match="two tiers of one phase are for steps of the same"):
        replace(gpu, smaller=(few, replace(few, strategy="mixed")))
    assert replace(gpu, smaller=(few, replace(gpu.prefill, max_num_tokens=4))).smaller


def test_a_step_runs_the_smallest_tier_that_holds_it() -> None:
    """Of both sub-batches the one that has two; a device that only a smaller tier uses is used."""
    spec = tiny_spec("dd")
    offload = strategies.placement(spec, "offload", 2)
    two = replace(offload.decode, embedding=ON_GPU, num_second_seqs=3)
    layers = tuple(replace(layer, ffn=ON_CPU) for layer in two.layers)
    one = replace(two, layers=layers, max_num_tokens=1, num_second_seqs=0)
    placement = Placement(
        prefill=replace(offload.prefill, embedding=ON_GPU), decode=two, smaller=(one,)
    )

    assert placement.step_tier("decode", 1) == one
    assert placement.step_tier("decode", 1, (1,)) == one.alone(1)
    assert placement.step_tier("decode", 2) == two.alone(0)
    assert placement.step_tier("decode", 2, (0, 1)) == two
    assert placement.uses("cpu") and not replace(placement, decode=two.alone(0), smaller=()).uses(
        "cpu"
    )

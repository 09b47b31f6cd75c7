"""Whatever the search may emit gives all-CPU's tokens: states of layers drawn at random, and of
them tiers for smaller steps, sub-batches and orders of experts; prompts whose cache moves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from hetero import LLM, SamplingParams, loading, sampler
from hetero.kv_cache import BlockPools
from hetero.scheduler import Scheduler
from planner import strategies
from planner.candidate import Wave
from planner.cost_model import CostModel
from planner.kv_blocks import KVBlocks
from planner.model_spec import ModelSpec
from planner.placement import (
    ON_CPU,
    ON_GPU,
    STREAMED,
    Device,
    LayerPlacement,
    Placement,
    TierPlacement,
)
from planner.search_space import Draft, Space, placement_of
from planner.step_graph import moved_kv_layers
from planner.timeline import lane_orders
from planner.workload import Phase, Workload
from tests.hetero.test_mixed_experts import GREEDY, PROMPTS, placed, tokens_of
from tests.hetero.test_sub_batches import many_blocks, sub_batches_by_hand
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model, tiny_model, tiny_spec

__all__ = ["many_blocks"]

# Dense layers with and without windows and biases, experts in all layers, and in all but the first.
MODELS = ("llama", "mistral", "qwen3", "olmoe", "qwen3-moe")
# Of so many one in twenty is drawn twice.
NUM_DRAWS = 45
LONE = PROMPTS[2]
# What the draws have for every model, and for each of them.
EVERYWHERE = {"at once", "in turn", "moves", "sub-batches", "tiers", "attention on both"}
DIVIDED = ("columns cpu, residents", "columns stream, residents")
EXPERTS = tuple(f"experts {runs}, residents" for runs in ("cpu", "stream", "split"))
OF_FEED_FORWARDS = {
    "llama": ("columns gpu", "columns cpu", "columns stream"),
    "mistral": DIVIDED,
    "qwen3": DIVIDED,
    "olmoe": EXPERTS,
    "qwen3-moe": (*DIVIDED, *EXPERTS, "experts cpu", "experts stream"),
}


Draw = Any  # hypothesis' function: a value of a strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A placement, and how it is run: the sub-batch of each prompt, all lanes at once or not."""

    placement: Placement
    split: tuple[int, ...] = ()
    overlap: bool


def space_of(spec: ModelSpec) -> Space:
    machine = toy_machine().with_emulated_gpu(memory_bytes=10**9, link_bytes_per_s=4e9)
    workload = Workload(prompt_len=16, output_len=8, num_seqs=len(PROMPTS))
    return Space(Wave(spec, CostModel(machine), workload, workload.num_seqs), 16)


@st.composite
def drawn_placements(draw: st.DrawFn, space: Space) -> Drawn:
    """Every layer and both ends in any state of the search's menus, and what goes with it."""
    spec = space.wave.spec
    columns = [
        draw(st.integers(0, len(space.menu_of[index].states) - 1))
        for index in range(spec.num_layers)
    ]
    ends = draw(st.integers(0, len(space.menus[-1].states) - 1))
    placement = placement_of(space, Draft(layers=tuple(columns), ends=ends))
    if any(layer.is_moe for layer in spec.layers) and draw(st.booleans()):
        orders = [draw(st.permutations(range(layer.num_experts))) for layer in spec.layers]
        placement = replace(placement, expert_order=tuple(map(tuple, orders)))
    split: tuple[int, ...] = ()
    if draw(st.booleans()):
        placement = in_two(placement, draw)
        split = draw(st.sampled_from(list(itertools.product((0, 1), repeat=len(PROMPTS)))))
    if draw(st.booleans()):
        tiers = ((placement.decode, 1), (placement.decode, 2), (placement.prefill, 3))
        few = tuple(smaller(tier, size, draw) for tier, size in tiers)
        placement = replace(placement, smaller=few)
    return Drawn(placement=placement, split=split, overlap=draw(st.booleans()))


def assert_alike(llm: LLM) -> None:
    assert llm.timeline is not None and llm.predicted_timeline is not None
    assert lane_orders(llm.timeline) == lane_orders(llm.predicted_timeline)


def kinds_of(drawn: Drawn) -> set[str]:
    """What of the graphs' variety a placement has."""
    prefill, decode, *few = drawn.placement.tiers
    found = {"tiers"} if few else set()
    found |= {"at once"} if drawn.overlap else {"in turn"}
    found |= {"sub-batches"} if {0, 1} <= set(drawn.split) else set()
    found |= {"moves"} if moved_kv_layers(prefill, decode) else set()
    for layer in (layer for tier in drawn.placement.tiers for layer in tier.layers):
        kind = "columns" if layer.router is None else "experts"
        where = layer.ffn
        found |= {f"{kind} {where.runs}" + (", residents" if where.is_mixed else "")}
        found |= {"attention on both"} if layer.kv != layer.attention.device else set()
    return found


def otherwise(layer: LayerPlacement, phase: Phase, draw: Draw) -> LayerPlacement:
    """A layer with its weights and its cache where they are, whose modules may run otherwise."""
    streams = phase == "decode" and layer.kv == "cpu"
    attention, kv_on_cpu = layer.attention, layer.kv_on_cpu
    if attention.lives == "cpu" and streams:
        kv_on_cpu = draw(st.booleans())
        attention = STREAMED if kv_on_cpu else ON_CPU
    if layer.router is None:
        ffn = layer.ffn
        if ffn.lives == "cpu":
            ffn = replace(ffn, runs=draw(st.sampled_from(("cpu", "stream"))))
        return LayerPlacement(attention=attention, ffn=ffn, kv_on_cpu=kv_on_cpu)
    router, ffn = layer.router, layer.ffn
    if ffn.lives == "cpu":
        ffn = replace(ffn, runs=draw(st.sampled_from(("cpu", "stream", "split"))))
    if router.lives == "cpu":
        router = STREAMED if ffn.is_mixed else draw(st.sampled_from((ON_CPU, STREAMED)))
    return LayerPlacement(attention=attention, ffn=ffn, router=router, kv_on_cpu=kv_on_cpu)


def smaller(tier: TierPlacement, max_num_tokens: int, draw: Draw) -> TierPlacement:
    """A tier for smaller steps beside another."""
    layers = tuple(otherwise(layer, tier.phase, draw) for layer in tier.layers)
    return replace(
        tier,
        layers=layers,
        max_num_tokens=max_num_tokens,
        num_expert_slots=2 * draw(st.integers(1, 3)),
        num_second_seqs=0,
    )


def in_two(placement: Placement, draw: Draw) -> Placement:
    """The same with two sub-batches, and all attention on the GPU, as these need it."""
    decode_kv_on_cpu = draw(st.booleans())

    def attending(tier: TierPlacement, kv_on_cpu: bool) -> TierPlacement:
        layers = tuple(
            replace(
                layer,
                attention=ON_GPU if layer.attention.lives == "gpu" else STREAMED,
                kv_on_cpu=kv_on_cpu,
            )
            for layer in tier.layers
        )
        return replace(tier, layers=layers)

    decode = replace(attending(placement.decode, decode_kv_on_cpu), num_second_seqs=1)
    return replace(placement, prefill=attending(placement.prefill, False), decode=decode)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        save_tiny_model(name, folder, seed=7)
    return folders


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[tuple[int, ...]]]:
    found = {}
    for name, folder in models.items():
        with LLM(folder, profile=toy_machine(), accelerator="none") as llm:
            found[name] = tokens_of(llm)
    return found


@pytest.mark.timeout(900)  # only to shrink what fails
@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("name", MODELS)
def test_any_placement_gives_the_tokens_of_all_cpu(
    models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]], name: str
) -> None:
    """200 of them; ragged prompts together, and one by itself, in steps as they were predicted."""
    seen: list[Drawn] = []
    space = space_of(tiny_spec(tiny_model(name)))

    # The same ones in every run, and others for each model.
    @seed(MODELS.index(name))
    @settings(max_examples=NUM_DRAWS, database=None, deadline=None)
    @given(drawn_placements(space))
    def check(drawn: Drawn) -> None:
        seen.append(drawn)
        with placed(models[name], lambda _: drawn.placement, overlap=drawn.overlap) as llm:
            with sub_batches_by_hand(drawn.split):
                found = llm.generate(PROMPTS, GREEDY, observe=lambda _: assert_alike(llm))
            (lone,) = llm.generate(LONE, GREEDY)
        assert [out.outputs[0].token_ids for out in found] == expected[name]
        assert lone.outputs[0].token_ids == expected[name][PROMPTS.index(LONE)]

    check()
    assert len({drawn.placement for drawn in seen}) >= 200 // len(MODELS)
    assert set().union(*map(kinds_of, seen)) >= EVERYWHERE | set(OF_FEED_FORWARDS[name])


# Four of them come to one block more than their prompts have.
RAGGED: Any = [
    {"prompt_token_ids": [(7 * at + 3 * size) % 101 for at in range(size)]}
    for size in (12, 21, 1, 30, 15, 10)
]
Devices = tuple[Device, Device, Device]
# Where the three layers' attention runs in prefill and in decode.
MOVES: list[tuple[Devices, Devices]] = [
    (("gpu", "gpu", "gpu"), ("cpu", "cpu", "cpu")),
    (("cpu", "cpu", "cpu"), ("gpu", "gpu", "gpu")),
    (("gpu", "gpu", "gpu"), ("gpu", "cpu", "gpu")),
    (("cpu", "cpu", "cpu"), ("cpu", "gpu", "cpu")),
    (("cpu", "gpu", "cpu"), ("gpu", "cpu", "cpu")),
]


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three-layers")
    save_tiny_model("llama", folder, seed=7, num_hidden_layers=len(MOVES[0][0]))
    return folder


def moving(spec: ModelSpec, before: Devices, after: Devices, chunk_tokens: int) -> Placement:
    def tier(phase: Phase, devices: Devices) -> TierPlacement:
        gpu, cpu = strategies.gpu(spec, phase), strategies.cpu(spec, phase)
        layers = ((gpu if device == "gpu" else cpu).layers[at] for at, device in enumerate(devices))
        return replace(gpu, strategy="mixed", cut=0, layers=tuple(layers))

    prefill = replace(tier("prefill", before), max_num_tokens=chunk_tokens)
    return Placement(prefill=prefill, decode=tier("decode", after))


FEW_BLOCKS = KVBlocks(first=5, prompts=3)


@pytest.mark.parametrize(
    ("accelerator", "chunk_tokens", "blocks"),
    [
        *(
            ("emulated", chunk_tokens, blocks)
            for chunk_tokens in (5, 64)
            for blocks in (None, FEW_BLOCKS, KVBlocks(first=6, prompts=4))
        ),
        pytest.param("cuda", 5, FEW_BLOCKS, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("before", "after"), MOVES)
def test_prompts_that_move_give_the_tokens_of_all_cpu(
    three_layers: Path,
    accelerator: str,
    before: Devices,
    after: Devices,
    chunk_tokens: int,
    blocks: KVBlocks | None,
    ragged: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ragged prompts, in parts and whole; with few blocks some wait and are prefilled again."""
    if blocks is not None:
        monkeypatch.setattr(loading, "_kv_blocks", lambda *_: blocks)
    gave_way = mock.Mock(wraps=Scheduler._preempt)
    monkeypatch.setattr(Scheduler, "_preempt", lambda *each: gave_way(*each))
    place = lambda spec: moving(spec, before, after, chunk_tokens)  # noqa: E731
    with placed(three_layers, place, accelerator=accelerator) as llm:
        found = [out.outputs[0].token_ids for out in llm.generate(RAGGED, GREEDY)]
        pools = llm._open_engine().scheduler.pools
    assert found == ragged
    assert gave_way.called == (blocks is not None)
    assert_all_free(pools)


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_failed_prompt_leaves_no_trace_in_its_pages(
    three_layers: Path,
    before: Devices,
    after: Devices,
    ragged: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every page holds NaN when it fails; the same prompt reads its pages as padding, in parts."""
    with placed(three_layers, lambda spec: moving(spec, before, after, 5)) as llm:
        caches, real = llm._open_engine()._caches, sampler.sample

        def poisoned(logits: torch.Tensor, rows: Any) -> Any:
            for layer in (*caches.prefill.layers, *caches.decode[0].layers):
                layer.key.fill_(float("nan"))
                layer.value.fill_(float("nan"))
            return real(torch.full_like(logits, float("nan")), rows)

        monkeypatch.setattr("hetero.engine.sample", poisoned)
        (failed,) = llm.generate(RAGGED[1], SamplingParams(max_tokens=12, temperature=0.0))
        monkeypatch.undo()
        (out,) = llm.generate(RAGGED[1], GREEDY)
        assert_all_free(llm._open_engine().scheduler.pools)
    assert failed.outputs[0].finish_reason == "error"
    assert out.outputs[0].token_ids == ragged[1]


def assert_all_free(pools: BlockPools) -> None:
    assert pools.prompts is not None
    for pool in (*pools.decode, pools.prompts):
        assert pool.num_free == pool.num_blocks


@pytest.fixture(scope="module")
def ragged(three_layers: Path) -> list[tuple[int, ...]]:
    with LLM(three_layers, profile=toy_machine(), accelerator="none") as llm:
        return [out.outputs[0].token_ids for out in llm.generate(RAGGED, GREEDY)]

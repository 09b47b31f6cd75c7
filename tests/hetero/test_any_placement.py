"""Whatever the search may emit gives all-CPU's tokens: states of layers drawn at random, and of
them tiers for smaller steps and two sub-batches."""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
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
from planner.workload import Phase, Workload
from tests.hetero.test_mixed_experts import GREEDY, PROMPTS, placed, tokens_of
from tests.hetero.test_sub_batches import many_blocks, sub_batches_by_hand
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

__all__ = ["many_blocks"]

MODELS = ("llama", "mistral", "olmoe", "qwen3-moe")


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


def random_placement(spec: ModelSpec, seed: int) -> Placement:
    """Every layer and both ends in any state of the search's menus."""
    machine = toy_machine().with_emulated_gpu(memory_bytes=10**9, link_bytes_per_s=4e9)
    workload = Workload(prompt_len=16, output_len=8, num_seqs=len(PROMPTS))
    space = Space(Wave(spec, CostModel(machine), workload, workload.num_seqs), 16)
    draw = Random(seed)
    columns = [draw.randrange(len(space.menu_of[index].states)) for index in range(spec.num_layers)]
    ends = draw.randrange(len(space.menus[-1].states))
    return placement_of(space, Draft(layers=tuple(columns), ends=ends))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", MODELS)
def test_random_states_give_the_tokens_of_all_cpu(
    models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]], name: str, seed: int
) -> None:
    with placed(models[name], lambda spec: random_placement(spec, seed)) as llm:
        assert tokens_of(llm) == expected[name]


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


def otherwise(layer: LayerPlacement, phase: Phase, draw: Random) -> LayerPlacement:
    """A layer with its weights and its cache where they are, whose modules may run otherwise."""
    streams = phase == "decode" and layer.kv == "cpu"
    attention, kv_on_cpu = layer.attention, layer.kv_on_cpu
    if attention.lives == "cpu" and streams:
        kv_on_cpu = draw.random() < 0.5
        attention = STREAMED if kv_on_cpu else ON_CPU
    if layer.router is None:
        ffn = layer.ffn
        if ffn.lives == "cpu":
            ffn = replace(ffn, runs=draw.choice(("cpu", "stream")))
        return LayerPlacement(attention=attention, ffn=ffn, kv_on_cpu=kv_on_cpu)
    router, ffn = layer.router, layer.ffn
    if ffn.lives == "cpu":
        ffn = replace(ffn, runs=draw.choice(("cpu", "stream", "split")))
    if router.lives == "cpu":
        router = STREAMED if ffn.is_mixed else draw.choice((ON_CPU, STREAMED))
    return LayerPlacement(attention=attention, ffn=ffn, router=router, kv_on_cpu=kv_on_cpu)


def smaller(tier: TierPlacement, max_num_tokens: int, draw: Random) -> TierPlacement:
    """A tier for smaller steps beside another."""
    layers = tuple(otherwise(layer, tier.phase, draw) for layer in tier.layers)
    return replace(
        tier,
        layers=layers,
        max_num_tokens=max_num_tokens,
        num_expert_slots=2 * draw.randint(1, 3),
        num_second_seqs=0,
    )


def in_two(placement: Placement, draw: Random) -> Placement:
    """The same with two sub-batches, and all attention on the GPU, as these need it."""
    decode_kv_on_cpu = draw.random() < 0.5

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


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", MODELS)
def test_random_tiers_give_the_tokens_of_all_cpu(
    models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]], name: str, seed: int
) -> None:
    """For a step of one token, of two, and of more; half of them with two sub-batches."""

    def place(spec: ModelSpec) -> Placement:
        draw = Random(seed)
        whole = random_placement(spec, seed)
        if seed % 2:
            whole = in_two(whole, draw)
        tiers = ((whole.decode, 1), (whole.decode, 2), (whole.prefill, 3))
        return replace(whole, smaller=tuple(smaller(tier, size, draw) for tier, size in tiers))

    with placed(models[name], place) as llm:
        for split in itertools.product((0, 1), repeat=3) if seed % 2 else [(0, 0, 0)]:
            with sub_batches_by_hand(split):
                assert tokens_of(llm) == expected[name]
                one = llm.generate(PROMPTS[2], GREEDY)
                assert one[0].outputs[0].token_ids == expected[name][2]

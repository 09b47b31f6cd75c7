"""Caches whose first tokens are on the GPU and the others on the CPU give all-CPU's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from msgspec.structs import replace

from hetero import LLM, SamplingParams, loading, sampler
from hetero.api import GenerationStep
from hetero.kv_cache import Caches
from hetero.model_lookup import find_model, read_model_spec
from hetero.scheduler import Scheduler
from planner import strategies
from planner.kv_blocks import (
    KVBlocks,
    bytes_per_block,
    kv_blocks,
    kv_bytes,
    num_more_prompts,
)
from planner.model_spec import Dtype, ModelSpec
from planner.placement import ON_CPU, STREAMED, Device, LayerPlacement, Placement, TierPlacement
from planner.plan import Plan
from planner.step_graph import build
from planner.timeline import lane_orders
from planner.workload import Workload
from tests.hetero.test_mixed_experts import placed
from tests.hetero.test_sub_batches import tier
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

# Ragged: some end in the first block, some grow from one into the next.
PROMPTS: Any = [
    {"prompt_token_ids": [3, 14, 15, 92]},
    {"prompt_token_ids": [65, 35, 89] * 14},
    {"prompt_token_ids": [7]},
    {"prompt_token_ids": list(range(20, 51))},
    {"prompt_token_ids": [4, 8] * 7},
]
PARAMS = [
    SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True) for count in (6, 9, 22, 5, 8)
]
MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen3-moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        save_tiny_model(name, folder, seed=3)
    return folders


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[tuple[int, ...]]]:
    found = {}
    for name, folder in models.items():
        with LLM(folder, profile=toy_machine(), accelerator="none") as llm:
            found[name] = tokens_of(llm)
    return found


def tokens_of(llm: LLM, observe: Any = None) -> list[tuple[int, ...]]:
    outputs = llm.generate(PROMPTS, PARAMS, observe=observe)
    return [out.outputs[0].token_ids for out in outputs]


def divided(decode: TierPlacement, num_tokens: int, *, every: int = 1) -> TierPlacement:
    """A tier with the first tokens of its caches on the GPU, in every so many-th layer."""
    layers = tuple(
        replace(layer, num_gpu_kv_tokens=num_tokens)
        if layer.kv_on_cpu and at % every == 0
        else layer
        for at, layer in enumerate(decode.layers)
    )
    return replace(decode, layers=layers)


WHERE: dict[str, Callable[[ModelSpec, int], Placement]] = {
    "weights on the gpu": lambda spec, count: Placement(
        prefill=strategies.gpu(spec, "prefill"),
        decode=divided(tier(spec, "decode", kv_on_cpu=True), count),
    ),
    "prompts on the cpu": lambda spec, count: Placement(
        prefill=strategies.cpu(spec, "prefill"),
        decode=divided(
            tier(spec, "decode", STREAMED, STREAMED, router=STREAMED, kv_on_cpu=True), count
        ),
    ),
}


@pytest.mark.parametrize("count", [16, 32, 64])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("where", WHERE)
def test_both_devices_may_attend_for_a_sequence(
    where: str,
    name: str,
    count: int,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """One block of it on the GPU, some, and more than the longest has; in one batch and alone."""
    with placed(models[name], lambda spec: WHERE[where](spec, count)) as llm:
        assert tokens_of(llm) == expected[name]
        alone = llm.generate(PROMPTS[1], PARAMS[1])
        assert alone[0].outputs[0].token_ids == expected[name][1]
        assert_all_free(llm)


@pytest.mark.gpu
@pytest.mark.parametrize("where", WHERE)
def test_both_devices_may_attend_beside_cuda(
    where: str, models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]]
) -> None:
    place = lambda spec: WHERE[where](spec, 16)  # noqa: E731
    with placed(models["qwen3-moe"], place, accelerator="cuda") as llm:
        assert tokens_of(llm) == expected["qwen3-moe"]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_is_predicted_and_run_as_one_graph(
    overlap: bool, models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]]
) -> None:
    """The same ops in the same order on every lane, with both devices' parts of attention."""
    seen: list[Any] = []

    def note(step: GenerationStep) -> None:
        seen.append((step.result.batch.phase, llm.timeline, llm.predicted_timeline))

    place = lambda spec: WHERE["weights on the gpu"](spec, 16)  # noqa: E731
    with placed(models["llama"], place, overlap=overlap) as llm:
        assert tokens_of(llm, observe=note) == expected["llama"]
        graph = build(llm.spec, llm.plan.placement.decode)

    parts = {(op.lane, op.part) for op in graph.ops if op.kind == "attend"}
    assert parts == {("gpu", "resident"), ("cpu", "rest")}
    steps = [(one, other) for phase, one, other in seen if phase == "decode"]
    assert len(steps) == 21
    for measured, predicted in steps:
        assert tuple(span.op for span in measured.spans) == graph.ops
        assert tuple(span.op for span in predicted.spans) == graph.ops
        assert lane_orders(measured) == lane_orders(predicted)


@pytest.mark.parametrize("where", WHERE)
def test_tiers_for_smaller_steps_keep_caches_divided(
    where: str, models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]]
) -> None:
    """Streamed for many sequences, on the CPU for two, and one of another way in between."""

    def place(spec: ModelSpec) -> Placement:
        common: dict[str, Any] = {"router": STREAMED, "kv_on_cpu": True}
        tiers = (
            tier(spec, "decode", STREAMED, STREAMED, **common),
            tier(spec, "decode", STREAMED, ON_CPU, max_num_tokens=2, **common),
            tier(spec, "decode", STREAMED, STREAMED, max_num_tokens=4, **common),
        )
        decode, *smaller = (divided(each, 16) for each in tiers)
        prefill = strategies.cpu if where == "prompts on the cpu" else strategies.offload
        whole = prefill(spec, "prefill", *([spec.num_layers] if "gpu" in where else []))
        return Placement(prefill=whole, decode=decode, smaller=tuple(smaller))

    sizes: set[int] = set()

    def check(step: GenerationStep) -> None:
        shape = step.result.batch.shape
        if shape.phase == "decode":
            sizes.add(shape.num_tokens)
            used = llm.plan.placement.tier("decode", shape.num_tokens)
            assert step.result.graph == build(llm.spec, used)

    with placed(models["qwen3-moe"], place) as llm:
        assert tokens_of(llm, observe=check) == expected["qwen3-moe"]
    assert sizes == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_the_logits_of_the_gpu(dtype: Dtype, models: dict[str, Path]) -> None:
    """Pages in the model's format, the CPU's log-sum-exp in float32; within what is rounded."""
    params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=20, ignore_eos=True)
    found: list[list[Any]] = []
    for count in (0, 16):
        place = lambda spec, count=count: Placement(  # noqa: E731
            prefill=strategies.gpu(spec, "prefill"),
            decode=divided(tier(spec, "decode", kv_on_cpu=count > 0), count),
        )
        with placed(models["qwen3"], place, dtype=dtype) as llm:
            found.append([out.outputs[0].logprobs for out in llm.generate(PROMPTS, params)])

    for one, other in zip(*found, strict=True):
        shared = one[1].keys() & other[1].keys()
        assert len(shared) >= 15
        for token in shared:
            assert one[1][token] == pytest.approx(other[1][token], abs=0.1)


# Four of them come to one block more than their prompts have.
RAGGED: Any = [
    {"prompt_token_ids": [(7 * at + 3 * size) % 101 for at in range(size)]}
    for size in (12, 21, 1, 30, 15, 10)
]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
# What a layer's cache may be in decode.
Kept = Literal["gpu", "cpu", "kv on cpu", "divided"]
# Of three layers: where attention runs in prefill, and how each keeps its cache in decode.
KINDS: list[tuple[tuple[Device, ...], tuple[Kept, ...]]] = [
    (("gpu", "gpu", "gpu"), ("divided", "divided", "divided")),
    (("cpu", "cpu", "cpu"), ("divided", "divided", "divided")),
    (("gpu", "cpu", "gpu"), ("divided", "divided", "divided")),
    (("gpu", "gpu", "gpu"), ("gpu", "divided", "gpu")),
    (("cpu", "cpu", "cpu"), ("cpu", "divided", "kv on cpu")),
    (("gpu", "gpu", "gpu"), ("divided", "cpu", "kv on cpu")),
    (("cpu", "cpu", "cpu"), ("gpu", "divided", "divided")),
    (("cpu", "gpu", "gpu"), ("gpu", "divided", "cpu")),
]
FEW_BLOCKS = KVBlocks(first=3, prompts=3, fronts=3)


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three-layers")
    save_tiny_model("llama", folder, seed=7, num_hidden_layers=3)
    return folder


@pytest.fixture(scope="module")
def ragged(three_layers: Path) -> list[tuple[int, ...]]:
    with LLM(three_layers, profile=toy_machine(), accelerator="none") as llm:
        return [out.outputs[0].token_ids for out in llm.generate(RAGGED, GREEDY)]


def kept(
    spec: ModelSpec,
    before: tuple[Device, ...],
    after: tuple[Kept, ...],
    *,
    count: int = 16,
    chunk_tokens: int = 64,
) -> Placement:
    """A placement of layers that keep their caches so."""
    gpu, cpu = strategies.gpu(spec, "prefill"), strategies.cpu(spec, "prefill")
    layers = tuple((gpu if each == "gpu" else cpu).layers[at] for at, each in enumerate(before))
    prefill = replace(gpu, layers=layers, max_num_tokens=chunk_tokens)
    decode = strategies.gpu(spec, "decode")
    ways: dict[Kept, LayerPlacement] = {
        "gpu": decode.layers[0],
        "cpu": strategies.cpu(spec, "decode").layers[0],
        "kv on cpu": replace(decode.layers[0], kv_on_cpu=True),
        "divided": replace(decode.layers[0], kv_on_cpu=True, num_gpu_kv_tokens=count),
    }
    return Placement(
        prefill=prefill, decode=replace(decode, layers=tuple(ways[each] for each in after))
    )


@pytest.mark.parametrize(
    ("count", "chunk_tokens", "blocks"),
    [(16, 64, None), (16, 5, None), (32, 5, FEW_BLOCKS), (16, 64, FEW_BLOCKS), (16, 5, FEW_BLOCKS)],
)
@pytest.mark.parametrize(("before", "after"), KINDS)
def test_layers_of_every_kind_give_the_tokens_of_all_cpu(
    three_layers: Path,
    before: tuple[Device, ...],
    after: tuple[Kept, ...],
    count: int,
    chunk_tokens: int,
    blocks: KVBlocks | None,
    ragged: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ragged prompts, in parts and whole; with few blocks some wait and are prefilled again."""
    if blocks is not None:
        planned = loading._kv_blocks

        def few(plan: Plan, *args: Any) -> KVBlocks:
            is_divided = plan.placement.decode.num_gpu_kv_tokens > 0
            return blocks if is_divided else planned(plan, *args)

        monkeypatch.setattr(loading, "_kv_blocks", few)
    gave_way = mock.Mock(wraps=Scheduler._preempt)
    monkeypatch.setattr(Scheduler, "_preempt", lambda *each: gave_way(*each))
    place = lambda spec: kept(  # noqa: E731
        spec, before, after, count=count, chunk_tokens=chunk_tokens
    )
    with placed(three_layers, place) as llm:
        assert [out.outputs[0].token_ids for out in llm.generate(RAGGED, GREEDY)] == ragged
        assert_all_free(llm)
    assert gave_way.called == (blocks is not None)


@pytest.mark.parametrize(("before", "after"), KINDS)
def test_a_failed_prompt_leaves_no_trace_in_its_pages(
    three_layers: Path,
    before: tuple[Device, ...],
    after: tuple[Kept, ...],
    ragged: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every page holds NaN when it fails; the same prompt reads its pages as padding, in parts."""
    place = lambda spec: kept(spec, before, after, chunk_tokens=5)  # noqa: E731
    with placed(three_layers, place) as llm:
        caches, real = llm._open_engine()._caches, sampler.sample

        def poisoned(logits: torch.Tensor, rows: Any) -> Any:
            fronts = tuple(caches.fronts.values())
            for layer in (*caches.prefill.layers, *caches.decode[0].layers, *fronts):
                layer.key.fill_(float("nan"))
                layer.value.fill_(float("nan"))
            return real(torch.full_like(logits, float("nan")), rows)

        monkeypatch.setattr("hetero.engine.sample", poisoned)
        (failed,) = llm.generate(RAGGED[1], SamplingParams(max_tokens=12, temperature=0.0))
        monkeypatch.undo()
        (out,) = llm.generate(RAGGED[1], GREEDY)
        assert_all_free(llm)
    assert failed.outputs[0].finish_reason == "error"
    assert out.outputs[0].token_ids == ragged[1]


def assert_all_free(llm: LLM) -> None:
    """No block is held, and every free list is whole."""
    for pool in llm._open_engine().scheduler.pools.allocators:
        assert pool.num_free == pool.num_blocks
        pool.check_integrity()


@pytest.mark.parametrize(("before", "after"), KINDS)
def test_the_accelerator_holds_the_caches_that_were_planned(
    three_layers: Path, before: tuple[Device, ...], after: tuple[Kept, ...]
) -> None:
    """Its bytes are those of the planner's count: fronts on the GPU, prompts while they are."""
    wave = Workload(prompt_len=40, output_len=20, num_seqs=5)
    spec = read_model_spec(find_model(str(three_layers)))
    for count in (16, 48, 64):
        placement = kept(spec, before, after, count=count, chunk_tokens=64)
        planned = kv_blocks(placement, wave)
        more = KVBlocks(
            first=planned.first + 5,
            prompts=planned.prompts + num_more_prompts(placement, wave, 5),
            fronts=planned.fronts,
        )
        devices: tuple[Device, ...] = ("gpu", "cpu")
        for device in devices:
            asked = [bytes_asked(spec, placement, blocks)[device] for blocks in (planned, more)]
            assert asked[0] == kv_bytes(spec, placement, wave, device)
            assert asked[1] == asked[0] + 5 * bytes_per_block(spec, placement, device)


def bytes_asked(spec: ModelSpec, placement: Placement, blocks: KVBlocks) -> dict[Device, int]:
    found: dict[Device, int] = {"gpu": 0, "cpu": 0}

    def empty(device: Device, num_bytes: int) -> torch.Tensor:
        found[device] += num_bytes
        return torch.zeros(num_bytes, dtype=torch.uint8)

    Caches.allocate(spec, placement, blocks, empty)
    return found

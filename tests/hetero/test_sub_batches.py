"""Attention on both devices, two sub-batches and tiers for smaller steps give all-CPU's tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams, loading
from hetero.api import GenerationStep
from hetero.scheduler import Scheduler
from hetero.sequence import Sequence
from planner import strategies
from planner.kv_blocks import KVBlocks
from planner.model_spec import Dtype, ModelSpec
from planner.placement import (
    ON_CPU,
    ON_GPU,
    STREAMED,
    LayerPlacement,
    ModulePlacement,
    Placement,
    TierPlacement,
)
from planner.step_graph import build
from planner.timeline import lane_orders
from planner.workload import Phase
from tests.hetero.test_mixed_experts import ACCELERATORS, placed
from tests.machines import toy_machine
from tests.tiny_models import TINY_MODELS, save_tiny_model

# Ragged, and of other lengths: the first step of decode has six sequences, the last one.
PROMPTS: Any = [
    {"prompt_token_ids": [3, 14, 15, 92]},
    {"prompt_token_ids": [65, 35, 89] * 7},
    {"prompt_token_ids": [7]},
    {"prompt_token_ids": list(range(20, 36))},
    {"prompt_token_ids": [4, 4, 8]},
    {"prompt_token_ids": [50, 1, 60, 2, 70]},
]
PARAMS = [
    SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    for count in (6, 9, 3, 8, 2, 5)
]
SPLIT = ModulePlacement(lives="cpu", runs="split")
REST_ON_CPU = ModulePlacement(lives="cpu", runs="cpu", num_resident=2)
REST_STREAMED = replace(REST_ON_CPU, runs="stream")
REST_SPLIT = replace(REST_ON_CPU, runs="split")


def tier(
    spec: ModelSpec,
    phase: Phase,
    attention: ModulePlacement = ON_GPU,
    ffn: ModulePlacement = ON_GPU,
    *,
    router: ModulePlacement = ON_GPU,
    head: ModulePlacement = ON_GPU,
    kv_on_cpu: bool = False,
    **rest: Any,
) -> TierPlacement:
    """All layers alike."""
    layers = tuple(
        LayerPlacement(
            attention=attention,
            ffn=ffn,
            router=router if layer.is_moe else None,
            kv_on_cpu=kv_on_cpu,
        )
        for layer in spec.layers
    )
    return TierPlacement(
        phase=phase, strategy="mixed", cut=0, embedding=head, layers=layers, head=head, **rest
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in TINY_MODELS}
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


def tokens_of(llm: LLM, count: int = len(PROMPTS), observe: Any = None) -> list[tuple[int, ...]]:
    """Of the first `count` prompts."""
    outputs = llm.generate(PROMPTS[:count], PARAMS[:count], observe=observe)
    return [out.outputs[0].token_ids for out in outputs]


BOTH: dict[str, Callable[[ModelSpec], Placement]] = {
    "weights on the gpu": lambda spec: Placement(
        prefill=strategies.gpu(spec, "prefill"), decode=tier(spec, "decode", kv_on_cpu=True)
    ),
    "weights streamed": lambda spec: Placement(
        prefill=strategies.offload(spec, "prefill", spec.num_layers),
        decode=tier(spec, "decode", STREAMED, STREAMED, router=STREAMED, kv_on_cpu=True),
    ),
    # which the kernels of the CPU read as panels in prefill
    "panels streamed": lambda spec: Placement(
        prefill=strategies.cpu(spec, "prefill"),
        decode=tier(spec, "decode", STREAMED, STREAMED, router=STREAMED, kv_on_cpu=True),
    ),
    "all else on the cpu": lambda spec: Placement(
        prefill=strategies.cpu(spec, "prefill"),
        decode=tier(spec, "decode", STREAMED, ON_CPU, router=ON_CPU, head=ON_CPU, kv_on_cpu=True),
    ),
}


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("where", BOTH)
def test_the_cpu_may_attend_for_projections_on_the_gpu(
    where: str, name: str, models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]]
) -> None:
    """Norms, biases, clipped projections and windows of every family."""
    with placed(models[name], BOTH[where]) as llm:
        assert tokens_of(llm) == expected[name]


@pytest.mark.gpu
@pytest.mark.parametrize("where", BOTH)
def test_the_cpu_may_attend_beside_cuda(
    where: str, models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]]
) -> None:
    with placed(models["olmoe"], BOTH[where], accelerator="cuda") as llm:
        assert tokens_of(llm) == expected["olmoe"]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_layers_may_attend_on_either_device(
    name: str,
    overlap: bool,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """One layer's cache moves to the CPU when a prompt ends, the other's stays on the GPU."""

    def place(spec: ModelSpec) -> Placement:
        decode = strategies.gpu(spec, "decode")
        layers = (decode.layers[0], replace(decode.layers[1], kv_on_cpu=True))
        return Placement(
            prefill=strategies.gpu(spec, "prefill"), decode=replace(decode, layers=layers)
        )

    with placed(models[name], place, overlap=overlap) as llm:
        assert tokens_of(llm) == expected[name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_the_logits_of_the_gpu(dtype: Dtype, models: dict[str, Path]) -> None:
    """Pages in the model's format; within what it rounds."""
    params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=20, ignore_eos=True)
    found: list[list[Any]] = []
    for kv_on_cpu in (False, True):

        def place(spec: ModelSpec, kv_on_cpu: bool = kv_on_cpu) -> Placement:
            decode = tier(spec, "decode", kv_on_cpu=kv_on_cpu)
            return Placement(prefill=strategies.gpu(spec, "prefill"), decode=decode)

        with placed(models["qwen3"], place, dtype=dtype) as llm:
            found.append([out.outputs[0].logprobs for out in llm.generate(PROMPTS, params)])

    for one, other in zip(*found, strict=True):
        shared = one[1].keys() & other[1].keys()
        assert len(shared) >= 15
        for token in shared:
            assert one[1][token] == pytest.approx(other[1][token], abs=0.1)


SUB_BATCHES: dict[str, Callable[[ModelSpec], TierPlacement]] = {
    "first on the gpu": lambda spec: tier(spec, "decode", num_second_seqs=2),
    "both on the cpu": lambda spec: tier(spec, "decode", kv_on_cpu=True, num_second_seqs=2),
    "streamed": lambda spec: tier(
        spec, "decode", STREAMED, STREAMED, router=STREAMED, num_second_seqs=2
    ),
    "streamed, both on the cpu": lambda spec: tier(
        spec,
        "decode",
        STREAMED,
        STREAMED,
        router=STREAMED,
        kv_on_cpu=True,
        num_second_seqs=2,
    ),
    "the rest on the cpu": lambda spec: tier(
        spec, "decode", ffn=ON_CPU, router=ON_CPU, head=ON_CPU, num_second_seqs=2
    ),
    "experts on the cpu": lambda spec: tier(spec, "decode", ffn=ON_CPU, num_second_seqs=2),
    "routers on the cpu": lambda spec: tier(
        spec, "decode", STREAMED, STREAMED, router=ON_CPU, num_second_seqs=2
    ),
    "split experts": lambda spec: tier(
        spec, "decode", ffn=SPLIT, num_second_seqs=2, num_expert_slots=4
    ),
    "residents": lambda spec: tier(spec, "decode", ffn=REST_ON_CPU, num_second_seqs=2),
}
MOE_ONLY = ("routers on the cpu", "split experts", "residents")


def with_prefill(decode: TierPlacement, spec: ModelSpec) -> Placement:
    """All attention of prefill on the GPU, as two sub-batches need it; streamed where decode is."""
    layers = tuple(replace(layer, kv_on_cpu=False) for layer in decode.layers)
    prefill = replace(decode, phase="prefill", layers=layers, num_second_seqs=0)
    return Placement(prefill=prefill, decode=decode)


@contextmanager
def sub_batches_by_hand(split: tuple[int, ...]) -> Iterator[None]:
    """Put sequences into sub-batches in the order in which they come; the rest into the first."""
    add, numbers, chosen = Scheduler.add, iter(split), dict[str, int]()

    def note(scheduler: Scheduler, sequence: Sequence) -> None:
        chosen[sequence.seq_id] = next(numbers, 0)
        add(scheduler, sequence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "add", note)
        patch.setattr(Scheduler, "_sub_batch_for", lambda _, sequence: chosen[sequence.seq_id])
        yield


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for all sequences in either sub-batch."""
    planned = loading._kv_blocks

    def more(*args: Any) -> KVBlocks:
        blocks = planned(*args)
        return KVBlocks(**{name: 100 if count else 0 for name, count in asdict(blocks).items()})

    monkeypatch.setattr(loading, "_kv_blocks", more)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("name", ["olmoe", "llama", "mistral"])
@pytest.mark.parametrize("where", SUB_BATCHES)
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_every_split_of_four_sequences_gives_the_same_tokens(
    accelerator: Any,
    where: str,
    name: str,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """All in one sub-batch too; they end one after the other, so that one chain goes on alone."""
    if name != "olmoe" and where in MOE_ONLY:
        pytest.skip("of experts")
    place = lambda spec: with_prefill(SUB_BATCHES[where](spec), spec)  # noqa: E731
    with placed(models[name], place, accelerator=accelerator) as llm:
        for split in itertools.product((0, 1), repeat=4):
            with sub_batches_by_hand(split):
                assert tokens_of(llm, 4) == expected[name][:4], split


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_is_the_graph_of_the_sub_batches_that_it_has(
    overlap: bool, models: dict[str, Path]
) -> None:
    """Executed and predicted alike; the first sub-batch ends two steps before the second."""
    place = lambda spec: with_prefill(SUB_BATCHES["streamed"](spec), spec)  # noqa: E731
    params = [
        SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True) for count in (4, 6, 6)
    ]
    seen: list[Any] = []
    with placed(models["olmoe"], place, overlap=overlap) as llm:
        decode = llm.plan.placement.decode
        with sub_batches_by_hand((0, 1, 1)):
            llm.generate(
                PROMPTS[:3],
                params,
                observe=lambda step: seen.append((llm.timeline, llm.predicted_timeline)),
            )
        whole, second = build(llm.spec, decode), build(llm.spec, decode.alone(1))

    assert {op.sub_batch for op in whole.ops} == {None, 0, 1}
    for (measured, predicted), graph in zip(seen[1:], [whole] * 3 + [second] * 2, strict=True):
        assert tuple(span.op for span in measured.spans) == graph.ops
        assert tuple(span.op for span in predicted.spans) == graph.ops
        assert lane_orders(measured) == lane_orders(predicted)


TIERS: dict[str, Callable[[ModelSpec], tuple[TierPlacement, ...]]] = {
    "experts on the cpu": lambda spec: (
        tier(spec, "decode", ffn=STREAMED),
        tier(spec, "decode", ffn=ON_CPU, max_num_tokens=1),
        tier(spec, "decode", ffn=SPLIT, num_expert_slots=4, max_num_tokens=4),
    ),
    "with residents": lambda spec: (
        tier(spec, "decode", ffn=REST_STREAMED),
        tier(spec, "decode", ffn=REST_ON_CPU, max_num_tokens=1),
        tier(spec, "decode", ffn=REST_SPLIT, num_expert_slots=2, max_num_tokens=4),
    ),
    # modules that the CPU computes lie in panels, also where they are streamed
    "attention on the cpu": lambda spec: (
        tier(spec, "decode", STREAMED, STREAMED, router=STREAMED, kv_on_cpu=True),
        tier(spec, "decode", ON_CPU, ON_CPU, router=ON_CPU, max_num_tokens=1),
        tier(spec, "decode", ON_CPU, STREAMED, router=STREAMED, max_num_tokens=4),
    ),
    "of two sub-batches": lambda spec: (
        tier(spec, "decode", STREAMED, STREAMED, router=STREAMED, num_second_seqs=3),
        tier(spec, "decode", STREAMED, ON_CPU, router=ON_CPU, max_num_tokens=1),
        tier(spec, "decode", STREAMED, ON_CPU, router=STREAMED, max_num_tokens=4),
    ),
}


def with_smaller(spec: ModelSpec, tiers: tuple[TierPlacement, ...]) -> Placement:
    """Decode tiers, the largest first; prefill is streamed as it is, and a few tokens are too."""
    decode, *smaller = tiers
    placement = with_prefill(decode, spec)
    few = replace(placement.prefill, max_num_tokens=4)
    if all(layer.kv == "gpu" for layer in smaller[0].layers):
        layers = tuple(replace(layer, kv_on_cpu=False) for layer in smaller[0].layers)
        few = replace(few, layers=layers)
    return replace(placement, smaller=(*smaller, few))


@pytest.mark.parametrize("where", TIERS)
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_smaller_steps_run_as_their_tier_says(
    accelerator: Any,
    where: str,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """Six sequences of which one after the other ends, and a prompt of one token by itself."""
    place = lambda spec: with_smaller(spec, TIERS[where](spec))  # noqa: E731
    sizes: set[tuple[Phase, int]] = set()

    def check(step: GenerationStep) -> None:
        shape = step.result.batch.shape
        sizes.add((shape.phase, shape.num_tokens))
        used = llm.plan.placement.tier(shape.phase, shape.num_tokens).alone(0)
        assert step.result.graph == build(llm.spec, used)

    with placed(models["olmoe"], place, accelerator=accelerator) as llm:
        assert tokens_of(llm, observe=check) == expected["olmoe"]
        one = llm.generate(PROMPTS[2], PARAMS[2], observe=check)
        assert one[0].outputs[0].token_ids == expected["olmoe"][2]

    assert sizes == {("prefill", 50), ("prefill", 1), *(("decode", size) for size in range(1, 7))}


@pytest.mark.usefixtures("many_blocks")
def test_both_sub_batches_run_in_the_tier_that_has_two(
    models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]]
) -> None:
    """However few sequences they have; one by itself in the tier of its step's size."""
    place = lambda spec: with_smaller(spec, TIERS["of two sub-batches"](spec))  # noqa: E731
    seen: list[tuple[tuple[int, int], Any]] = []

    def note(step: GenerationStep) -> None:
        batch = step.result.batch
        if batch.phase == "decode":
            second = sum(item.sequence.sub_batch for item in batch.items)
            seen.append(((len(batch.items) - second, second), step.result.graph))

    with placed(models["olmoe"], place) as llm:
        with sub_batches_by_hand((1, 0, 1, 0, 1, 1)):
            assert tokens_of(llm, observe=note) == expected["olmoe"]
        spec, placement = llm.spec, llm.plan.placement

    for (first, second), graph in seen:
        if first and second:
            assert graph == build(spec, placement.decode)
        else:
            used = placement.tier("decode", first + second).alone(int(second > 0))
            assert graph == build(spec, used)
    assert {counts for counts, _ in seen} >= {(2, 4), (2, 1), (1, 0)}

"""Slots that change and experts that are copied ahead give all-CPU's tokens, and are counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from msgspec.structs import replace

from hetero import LLM
from hetero.model.decoder import DecoderStep
from hetero.runtime.devices import EmulatedAccelerator
from hetero.runtime.expert_slots import ExpertSlots, SlotCounts
from hetero.runtime.prefetch import Prefetch, chunk_begin
from planner.cost_model import NUM_COPIES, CostModel
from planner.memory import needs, weight_bytes
from planner.model_spec import Dtype, ModelSpec
from planner.placement import (
    ON_CPU,
    ON_GPU,
    STREAMED,
    LayerPlacement,
    ModulePlacement,
    Placement,
    Slots,
    TierPlacement,
)
from planner.step_graph import Op
from planner.timeline import lane_orders
from planner.workload import PHASES, Phase
from tests.hetero.test_mixed_experts import (
    ACCELERATORS,
    GREEDY,
    PROMPTS,
    Mix,
    assert_near_logits,
    mixed,
    placed,
    tokens_of,
    two_steps,
)
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

NUM_EXPERTS = 5
MODELS = ("olmoe", "qwen3-moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three layers each, so that one guesses for the next; one model begins with a dense layer."""
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        save_tiny_model(name, folder, seed=5, num_hidden_layers=3)
    return folders


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[tuple[int, ...]]]:
    """Greedy tokens of each, all on the CPU."""
    found = {}
    for name, folder in models.items():
        with LLM(folder, profile=toy_machine(), accelerator="none") as llm:
            found[name] = tokens_of(llm)
    return found


def with_slots(
    placement: Placement, slots: Slots, *, prefetch: bool, phases: tuple[Phase, ...] = PHASES
) -> Placement:
    """The same with these slots in all split layers of some phases; all but the first prefetch."""

    def changed(tier: TierPlacement) -> TierPlacement:
        layers = list[LayerPlacement]()
        for index, layer in enumerate(tier.layers):
            if layer.ffn.runs == "split" and tier.phase in phases:
                ffn = replace(layer.ffn, slots=slots, prefetch=prefetch and index > 0)
                layer = replace(layer, ffn=ffn)
            layers.append(layer)
        return replace(tier, layers=tuple(layers))

    return replace(placement, prefill=changed(placement.prefill), decode=changed(placement.decode))


def slotted(
    spec: ModelSpec,
    num_slots: int,
    slots: Slots = "lru",
    *,
    prefetch: bool = False,
    staged: int = 4,
) -> Placement:
    """All layers split in both phases, with so many slots each, experts in a shuffled order."""
    mix = Mix(runs="split", num_resident=num_slots, num_slots=staged)
    return with_slots(mixed(spec, mix, mix, seed=1), slots, prefetch=prefetch)


def one_by_one(llm: LLM) -> list[tuple[int, ...]]:
    """Greedy tokens of one prompt after the other."""
    return [out.outputs[0].token_ids for each in PROMPTS for out in llm.generate([each], GREEDY)]


def counts_of(llm: LLM) -> Mapping[int, SlotCounts]:
    return llm._open_engine().slot_counts


@pytest.fixture(params=[(9.0, 1.0), None], ids=["link is fast", "as priced"])
def times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Experts are fetched as if the CPU took nine copies' time for each, or as the toy machine."""
    if request.param is not None:
        monkeypatch.setattr(CostModel, "expert_times", lambda *_: request.param)
    yield


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("slots", ["static", "lru"])
@pytest.mark.parametrize("num_slots", range(1, NUM_EXPERTS))
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.usefixtures("times")
def test_slots_give_the_greedy_tokens_of_all_cpu(
    accelerator: Any,
    name: str,
    num_slots: int,
    slots: Slots,
    prefetch: bool,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """Ragged prompts in one prefill step, then decode of three sequences."""
    place = lambda spec: slotted(spec, num_slots, slots, prefetch=prefetch)  # noqa: E731
    with placed(models[name], place, accelerator=accelerator) as llm:
        assert tokens_of(llm) == expected[name]


@pytest.mark.parametrize("slots", ["static", "lru"])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.usefixtures("times")
def test_one_op_at_a_time_gives_the_same_tokens(
    slots: Slots,
    prefetch: bool,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """Without overlap nothing urgent is ready before all that is copied ahead has come."""
    place = lambda spec: slotted(spec, 2, slots, prefetch=prefetch)  # noqa: E731
    with placed(models["qwen3-moe"], place, overlap=False) as llm:
        assert tokens_of(llm) == expected["qwen3-moe"]
        counts = counts_of(llm)

    copied_ahead = {layer for layer, each in counts.items() if each.num_prefetched}
    assert copied_ahead == ({1, 2} if prefetch else set())


@pytest.mark.parametrize("staged", [2, 10])
def test_one_sequence_with_few_and_many_staged_experts(
    staged: int,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One at a time in a half, and all of them; a single sequence after the other."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (9.0, 1.0))
    place = lambda spec: slotted(spec, 3, prefetch=True, staged=staged)  # noqa: E731
    with placed(models["olmoe"], place) as llm:
        assert one_by_one(llm) == expected["olmoe"]


Others = Literal["stream", "cpu", "split", "smaller tiers"]


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("other", get_args(Others))
def test_tiers_beside_slots_that_change_give_the_same_tokens(
    other: Others,
    prefetch: bool,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prefill tier without residents, and tiers for steps of few tokens with the same slots."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (2.0, 1.0))

    def place(spec: ModelSpec) -> Placement:
        if other == "smaller tiers":
            both = slotted(spec, 2, prefetch=prefetch)
            tiers = (both.decode, both.prefill, both.decode)
            small = zip(tiers, (1, 4, 2), strict=True)
            return replace(
                both, smaller=tuple(replace(tier, max_num_tokens=size) for tier, size in small)
            )
        decode = Mix(runs="split", num_resident=2)
        both = mixed(spec, Mix(runs=other), decode, seed=2)
        return with_slots(both, "lru", prefetch=prefetch, phases=("decode",))

    with placed(models["olmoe"], place) as llm:
        assert tokens_of(llm) == expected["olmoe"]
        assert one_by_one(llm) == expected["olmoe"]
        assert sum(each.num_admitted for each in counts_of(llm).values()) > 0


@pytest.mark.parametrize("first", [ON_GPU, ON_CPU, STREAMED])
def test_any_layer_with_its_hidden_states_on_the_gpu_guesses_for_the_next(
    first: ModulePlacement,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """Experts of the layer before on the GPU, on the CPU, or streamed; and a dense layer."""

    def place(spec: ModelSpec) -> Placement:
        both = slotted(spec, 2, prefetch=True)

        def changed(tier: TierPlacement) -> TierPlacement:
            layers = (replace(tier.layers[0], ffn=first), *tier.layers[1:])
            return replace(tier, layers=layers)

        return replace(both, prefill=changed(both.prefill), decode=changed(both.decode))

    for name in MODELS:
        with placed(models[name], place, overlap=False) as llm:
            assert tokens_of(llm) == expected[name]
            assert counts_of(llm)[1].num_prefetched > 0


def test_torch_may_compute_what_is_left_to_the_cpu(
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On rows, which are then what is fetched, copied ahead and admitted."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (9.0, 1.0))
    by_torch = dict.fromkeys(("attention", "router", "experts"), "torch")
    monkeypatch.setattr("hetero.api.cpu_backends", lambda *_: by_torch)
    with placed(models["olmoe"], lambda spec: slotted(spec, 2, prefetch=True)) as llm:
        assert tokens_of(llm) == expected["olmoe"]


def test_the_gpu_may_multiply_all_experts_of_a_part_in_one_kernel(
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As CUDA does, in slots whose contents change."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (9.0, 1.0))
    monkeypatch.setattr("hetero.model.decoder.expert_method", lambda *_: "grouped")
    with placed(models["olmoe"], lambda spec: slotted(spec, 2, prefetch=True)) as llm:
        assert tokens_of(llm) == expected["olmoe"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_slots_in_half_precision_give_the_logits_of_the_gpu(
    dtype: Dtype, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in float16, panels in bfloat16; within what the format rounds."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (9.0, 1.0))
    gpu = Mix(runs="gpu")
    assert_near_logits(
        models["olmoe"],
        dtype,
        lambda spec: mixed(spec, gpu, gpu, seed=1),
        lambda spec: slotted(spec, 2, prefetch=True),
    )


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_slots_change_as_an_ordered_list_does(
    num_slots: int, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest goes first, never one that the step's tokens chose; of all steps of a run."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (9.0, 1.0))
    steps: list[tuple[int, list[int], tuple[int, ...]]] = []
    access, admission = ExpertSlots.access, ExpertSlots.admission

    def seen(slots: ExpertSlots, layer: int, kind: Slots, held: Any, ids_Tk: Any) -> None:
        steps.append((layer, ids_Tk.ravel().tolist(), ()))
        access(slots, layer, kind, held, ids_Tk)

    def asked(slots: ExpertSlots, layer: int, kind: Slots, places: Any, kept: Any) -> Any:
        steps[-1] = (*steps[-1][:2], tuple(places))
        return admission(slots, layer, kind, places, kept)

    monkeypatch.setattr(ExpertSlots, "access", seen)
    monkeypatch.setattr(ExpertSlots, "admission", asked)
    place = lambda spec: slotted(spec, num_slots)  # noqa: E731
    with placed(models["olmoe"], place) as llm:
        tokens_of(llm)
        slots, counts = llm._open_engine()._decoder.weights.expert_slots, counts_of(llm)
        first = {layer: mixed_order(llm, layer)[:num_slots] for layer in range(3)}

    evicted = 0
    for layer, experts in first.items():
        used = list(reversed(experts))  # the last slot's goes first
        for _, chosen, fetched in (step for step in steps if step[0] == layer):
            missed = [each for each in fetched if each not in used]
            assert missed == list(fetched)
            for each in chosen:
                if each in used:
                    used.remove(each)
                    used.append(each)
            free = [each for each in used if each not in chosen]
            for old, new in zip(free, missed, strict=False):
                used.remove(old)
                used.append(new)
                evicted += 1
            used.sort(key=partial(_last, chosen))
        assert sorted(used) == sorted(slots.held(layer, "lru", num_slots))
    assert evicted > 0
    # the warm-up's are forgotten: the run's are fewer than all
    assert 0 < sum(each.num_admitted for each in counts.values()) <= evicted


def _last(chosen: list[int], expert: int) -> int:
    """Where a step chose an expert for the last time; -1 where it did not."""
    return max((at for at, each in enumerate(chosen) if each == expert), default=-1)


def mixed_order(llm: LLM, layer: int) -> tuple[int, ...]:
    return llm.plan.placement.order_of_experts(llm.spec, layer)


def test_counts_add_up_and_start_after_the_warm_up(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One op at a time, every missed expert that a half holds is fetched or was copied ahead."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (9.0, 1.0))
    chosen: dict[int, int] = dict.fromkeys(range(3), 0)
    access = ExpertSlots.access

    def seen(slots: ExpertSlots, layer: int, kind: Slots, held: Any, ids_Tk: Any) -> None:
        chosen[layer] += len(np.unique(ids_Tk))
        access(slots, layer, kind, held, ids_Tk)

    place = lambda spec: slotted(spec, 2, prefetch=True, staged=10)  # noqa: E731
    with placed(models["olmoe"], place, overlap=False) as llm:
        assert counts_of(llm) == {}
        monkeypatch.setattr(ExpertSlots, "access", seen)
        tokens_of(llm)
        counts = counts_of(llm)

    for layer, each in counts.items():
        assert each.num_hits + each.num_misses == chosen[layer]
        assert each.num_fetched + each.num_used == each.num_misses > 0
        assert each.num_used <= each.num_prefetched
        assert each.num_hits > 0
    assert counts[0].num_prefetched == 0
    # a guess is no better than chance if it does not look at the present hidden states
    used = sum(counts[layer].num_used for layer in (1, 2))
    assert used > 0.5 * sum(counts[layer].num_prefetched for layer in (1, 2))


def test_a_right_guess_leaves_nothing_to_fetch(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All experts are guessed, and halves hold all of them: no copy after the gate."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (9.0, 1.0))
    choose = ExpertSlots.choose_prefetched

    def all_of_them(
        slots: ExpertSlots, layer: int, kind: Slots, count: int, guess: Any, most: int
    ) -> tuple[int, ...]:
        return choose(slots, layer, kind, count, np.arange(NUM_EXPERTS)[None], most)

    monkeypatch.setattr(ExpertSlots, "choose_prefetched", all_of_them)
    place = lambda spec: slotted(spec, 2, "static", prefetch=True, staged=10)  # noqa: E731
    with placed(models["olmoe"], place, overlap=False) as llm:
        tokens_of(llm)
        counts = counts_of(llm)
    for layer in (1, 2):
        assert counts[layer].num_fetched == 0 < counts[layer].num_used == counts[layer].num_misses
    assert counts[0].num_fetched == counts[0].num_misses > 0


def test_what_has_come_of_an_expert_ahead_is_not_copied_again(
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each copy ahead gives way after two chunks of one expert, which the fetch completes."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (9.0, 1.0))
    copy, sizes = Prefetch.copy, list[int]()

    def two_chunks(prefetch: Prefetch, copy_chunk: Any, is_called: Any) -> None:
        asked = iter((False, False, True))
        copy(prefetch, copy_chunk, lambda: next(asked))

    copy_into = EmulatedAccelerator.copy_into

    def counted(accelerator: EmulatedAccelerator, target: Any, source: Any) -> None:
        sizes.append(source.nbytes)
        copy_into(accelerator, target, source)

    monkeypatch.setattr(Prefetch, "copy", two_chunks)
    monkeypatch.setattr(EmulatedAccelerator, "copy_into", counted)
    place = lambda spec: slotted(spec, 2, prefetch=True)  # noqa: E731
    with placed(models["olmoe"], place) as llm:
        assert tokens_of(llm) == expected["olmoe"]
        expert_bytes = (
            llm._open_engine()
            ._decoder.weights.staging(llm.plan.placement.decode)
            .expert_source(1, 0)
            .nbytes
        )

    rest = expert_bytes - chunk_begin(expert_bytes, 2)
    assert rest in sizes and expert_bytes in sizes


@pytest.mark.parametrize("slots", ["static", "lru"])
@pytest.mark.parametrize("overlap", [True, False])
def test_the_executed_timeline_has_the_ops_of_the_predicted_one(
    slots: Slots, overlap: bool, models: dict[str, Path]
) -> None:
    """In the same order on each lane, for a prefill step and a decode step."""
    place = lambda spec: slotted(spec, 2, slots, prefetch=True)  # noqa: E731
    with placed(models["olmoe"], place, overlap=overlap) as llm:
        seen = two_steps(llm)

    for measured, predicted in seen:
        assert [span.op for span in measured.spans] == [span.op for span in predicted.spans]
        assert lane_orders(measured) == lane_orders(predicted)
        names = [span.op.name for span in measured.spans]
        assert len(set(names)) == len(names)
        assert "copy weights prefetched experts[2] h2d" in names
        assert ("admit fetched[2]" in names) == (slots == "lru")
        assert all(span.end_s >= span.start_s for span in (*measured.spans, *predicted.spans))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_slots", [1, 4])
def test_memory_of_slots_is_what_was_planned(
    num_slots: int, dtype: Dtype, models: dict[str, Path]
) -> None:
    """All experts on the host beside those in slots; the accelerator within its plan."""
    place = lambda spec: slotted(spec, num_slots, prefetch=True)  # noqa: E731
    with placed(models["olmoe"], place, dtype=dtype) as llm:
        plan, spec, placement = llm.plan, llm.spec, llm.plan.placement
        weights = llm._open_engine()._decoder.weights
        for layer in range(3):
            assert len(weights.resident("gpu", "experts", layer)["down"]) == num_slots
            packed = weights.packed("experts", layer)
            held = (
                weights.host_flat("experts", layer).nbytes // spec.expert_bytes(layer)
                if packed is None or packed.experts is None
                else packed.experts.num_experts
            )
            assert held == NUM_EXPERTS
        need, used = needs(spec, placement, plan.wave, llm.hardware), llm.device_bytes()["gpu"]
        assert weight_bytes(spec, placement, "cpu") >= NUM_EXPERTS * sum(
            spec.expert_bytes(layer) for layer in range(3)
        )
    fixed = lambda spec: slotted(spec, num_slots, "static")  # noqa: E731
    with placed(models["olmoe"], fixed, dtype=dtype) as llm:
        static = needs(llm.spec, llm.plan.placement, llm.plan.wave, llm.hardware)
        assert (used, need["gpu"]) == (llm.device_bytes()["gpu"], static["gpu"])
    # what is resident is on the host too
    more = need["cpu"].weights_bytes - static["cpu"].weights_bytes
    assert more == num_slots * sum(spec.expert_bytes(layer) for layer in range(3))


def test_a_guess_is_one_copy(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is priced."""
    num_copies, seen = list[int](), set[int]()
    perform, upload = DecoderStep.perform, EmulatedAccelerator.upload

    def counted_upload(accelerator: EmulatedAccelerator, source: Any) -> Any:
        num_copies.append(1)
        return upload(accelerator, source)

    def counted(step: DecoderStep, op: Op) -> None:
        num_copies.clear()
        perform(step, op)
        if op.payload == "guess":
            seen.add(len(num_copies))

    monkeypatch.setattr(DecoderStep, "perform", counted)
    monkeypatch.setattr(EmulatedAccelerator, "upload", counted_upload)
    with placed(
        models["olmoe"], lambda spec: slotted(spec, 2, prefetch=True), overlap=False
    ) as llm:
        tokens_of(llm)
    assert seen == {NUM_COPIES["guess"]}

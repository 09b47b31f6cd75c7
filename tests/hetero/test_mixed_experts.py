"""Experts on both devices give all-CPU's tokens: residents, and the others on the CPU, streamed or
fetched."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from hetero.model.expert_step import ExpertStep, ExpertTimes, choose_fetched
from planner import strategies
from planner.cost_model import CostModel
from planner.model_spec import Dtype, ModelSpec, Quantization
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
from planner.plan import Plan
from planner.step_graph import Op
from planner.timeline import Timeline, lane_orders
from planner.workload import Phase, Workload
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model, tiny_model, tiny_spec

PROMPTS: Any = [
    {"prompt_token_ids": [3, 14, 15, 92]},
    {"prompt_token_ids": [65, 35, 89] * 7},
    {"prompt_token_ids": [7]},
]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
ACCELERATORS = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
NUM_EXPERTS = 5
# As many slots as hold all experts twice.
MANY_SLOTS = 2 * NUM_EXPERTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How a tier has its experts."""

    runs: Runs
    num_resident: int = 0
    num_slots: int = 4

    def tier(self, spec: ModelSpec, phase: Phase) -> TierPlacement:
        """All else on the GPU."""
        if self.runs == "gpu":
            return strategies.gpu(spec, phase)
        where = ModulePlacement(lives="cpu", runs=self.runs, num_resident=self.num_resident)
        gpu = strategies.gpu(spec, phase)
        layers = (
            replace(layer, ffn=ON_GPU if layer.router is None else where) for layer in gpu.layers
        )
        num_slots = self.num_slots if self.runs == "split" else 0
        return replace(gpu, strategy="mixed", layers=tuple(layers), num_expert_slots=num_slots)


def mixed(spec: ModelSpec, prefill: Mix, decode: Mix, seed: int | None = None) -> Placement:
    """A mix for each phase; a seed shuffles the experts of every layer."""
    order: tuple[tuple[int, ...], ...] = ()
    if seed is not None:
        rng = random.Random(seed)
        order = tuple(
            tuple(rng.sample(range(layer.num_experts), layer.num_experts)) for layer in spec.layers
        )
    return Placement(
        prefill=prefill.tier(spec, "prefill"),
        decode=decode.tier(spec, "decode"),
        expert_order=order,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of expert layers only, one that begins with a dense layer and shares its embedding."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("olmoe", "qwen3-moe")}
    for name, folder in folders.items():
        save_tiny_model(name, folder, seed=5)
    return folders


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[tuple[int, ...]]]:
    """Greedy tokens of each, all on the CPU."""
    found = {}
    for name, folder in models.items():
        with LLM(folder, profile=toy_machine(), accelerator="none") as llm:
            found[name] = tokens_of(llm)
    return found


def tokens_of(llm: LLM) -> list[tuple[int, ...]]:
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]


def two_steps(llm: LLM) -> list[tuple[Timeline, Timeline]]:
    """The measured and the predicted Timeline of a prefill step and of a decode step."""
    seen: list[tuple[Timeline | None, Timeline | None]] = []
    llm.generate(
        PROMPTS[:1],
        SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
        observe=lambda step: seen.append((llm.timeline, llm.predicted_timeline)),
    )
    assert len(seen) == 2
    found = [(one, other) for one, other in seen if one is not None and other is not None]
    assert len(found) == 2
    return found


def assert_near_logits(folder: Path, dtype: Dtype, *places: Any) -> None:
    """Both placements give the first tokens the same logits, within what the format rounds."""
    first = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    found: list[list[Any]] = []
    for place in places:
        with placed(folder, place, dtype=dtype) as llm:
            found.append([out.outputs[0].logprobs for out in llm.generate(PROMPTS, first)])

    for one, other in zip(*found, strict=True):
        shared = one[0].keys() & other[0].keys()
        assert len(shared) >= 15
        for token in shared:
            assert one[0][token] == pytest.approx(other[0][token], abs=0.1)


@contextmanager
def placed(
    folder: Path,
    place: Any,
    *,
    accelerator: Any = "emulated",
    dtype: Dtype = "float32",
    quantization: Quantization | None = None,
    **rest: Any,
) -> Iterator[LLM]:
    """A model under a placement that `place` makes of its spec, put into the plan of another."""
    plan, spec = _plan_on_gpu(folder, accelerator, dtype, quantization)
    plan = msgspec.structs.replace(plan, placement=unnamed(place(spec)))
    with LLM(folder, plan=plan, **_common(accelerator, dtype, quantization), **rest) as llm:
        yield llm


@functools.cache
def _plan_on_gpu(
    folder: Path, accelerator: Any, dtype: Dtype, quantization: Quantization | None
) -> tuple[Plan, ModelSpec]:
    """The plan that others are made of, once for each model."""
    workload = Workload(prompt_len=16, output_len=8, num_seqs=len(PROMPTS))
    common = _common(accelerator, dtype, quantization)
    with LLM(folder, accelerator=accelerator, strategy="gpu", workload=workload, **common) as llm:
        return llm.plan, llm.spec


def _common(accelerator: str, dtype: Dtype, quantization: Quantization | None) -> dict[str, Any]:
    profile = toy_machine() if accelerator == "emulated" else None
    return {
        "profile": profile,
        "dtype": dtype,
        "quantization": quantization,
        "max_model_len": 64,
    }


def unnamed(placement: Placement) -> Placement:
    """The same as no named strategy: a plan's tier that is called one must be it."""
    tiers = [msgspec.structs.replace(tier, strategy="mixed", cut=0) for tier in placement.tiers]
    prefill, decode, *smaller = tiers
    return msgspec.structs.replace(
        placement, prefill=prefill, decode=decode, smaller=tuple(smaller)
    )


MIXES = [Mix(runs=runs, num_resident=n) for runs in ("cpu", "stream", "split") for n in (0, 1, 4)]
PAIRS = [
    *((mix, mix) for mix in MIXES),
    # other residents, or another way, in the other phase
    (Mix(runs="stream", num_resident=1), Mix(runs="split", num_resident=1)),
    (Mix(runs="stream", num_resident=1), Mix(runs="split", num_resident=3)),
    (Mix(runs="stream", num_resident=3), Mix(runs="cpu", num_resident=2)),
    (Mix(runs="split", num_resident=3), Mix(runs="stream", num_resident=0)),
    (Mix(runs="cpu", num_resident=4), Mix(runs="split", num_resident=0)),
    (Mix(runs="gpu"), Mix(runs="split", num_resident=2)),
    (Mix(runs="cpu", num_resident=2), Mix(runs="gpu")),
    (Mix(runs="stream"), Mix(runs="cpu")),
    # one slot of a half, and as many as there are experts
    (Mix(runs="split", num_slots=2), Mix(runs="split", num_resident=1, num_slots=2)),
    (Mix(runs="split", num_slots=MANY_SLOTS), Mix(runs="split", num_slots=MANY_SLOTS)),
]


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_every_mix_gives_the_greedy_tokens_of_all_cpu(
    accelerator: Any,
    prefill: Mix,
    decode: Mix,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """Three sequences, the experts of each layer in another order than the model's."""
    place = lambda spec: mixed(spec, prefill, decode, seed=1)  # noqa: E731
    with placed(models["olmoe"], place, accelerator=accelerator) as llm:
        assert tokens_of(llm) == expected["olmoe"]


@pytest.mark.parametrize("runs", ["cpu", "stream", "split"])
@pytest.mark.parametrize("seed", [None, 2])
def test_one_op_at_a_time_gives_the_same_tokens(
    runs: Runs,
    seed: int | None,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """Without overlap; in the model's order of experts too, and beside a dense layer."""
    mix = Mix(runs=runs, num_resident=2)
    place = lambda spec: mixed(spec, mix, mix, seed)  # noqa: E731
    with placed(models["qwen3-moe"], place, overlap=False) as llm:
        assert tokens_of(llm) == expected["qwen3-moe"]


@pytest.mark.parametrize("strategy", ["offload", "cpu", "experts-on-cpu"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_mix_beside_a_named_strategy_gives_the_same_tokens(
    strategy: str,
    phase: Phase,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """All modules streamed in one phase, or all on the CPU with its router and shuffled experts."""

    def place(spec: ModelSpec) -> Placement:
        mix = Mix(runs="split", num_resident=2)
        cut = 0 if strategy == "cpu" else len(spec.layers)
        named = strategies.placement(spec, strategy, cut)
        both = mixed(spec, mix, mix, seed=3)
        if phase == "prefill":
            return replace(both, prefill=named.prefill)
        return replace(both, decode=named.decode)

    with placed(models["olmoe"], place) as llm:
        assert tokens_of(llm) == expected["olmoe"]


LAYERS: dict[str, LayerPlacement] = {
    "cpu": LayerPlacement(attention=ON_CPU, ffn=ON_CPU, router=ON_CPU),
    "stream": LayerPlacement(
        attention=STREAMED,
        ffn=ModulePlacement(lives="cpu", runs="stream", num_resident=1),
        router=ON_GPU,
    ),
    "split": LayerPlacement(
        attention=ON_GPU,
        ffn=ModulePlacement(lives="cpu", runs="split", num_resident=2),
        router=ON_GPU,
    ),
    "missed on the cpu": LayerPlacement(
        attention=ON_CPU,
        ffn=ModulePlacement(lives="cpu", runs="cpu", num_resident=3),
        router=ON_GPU,
    ),
}


@pytest.mark.parametrize(("overlap", "seed"), [(True, 8), (False, 8), (True, None)])
@pytest.mark.parametrize("names", list(itertools.permutations(LAYERS, 2)), ids="-".join)
def test_layers_may_differ(
    names: tuple[str, str],
    overlap: bool,
    seed: int | None,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """In either phase; buffers and slots in use at once, chains of the CPU before a mixed layer."""

    def place(spec: ModelSpec) -> Placement:
        both = mixed(spec, Mix(runs="split"), Mix(runs="split"), seed)
        layers = tuple(LAYERS[name] for name in names)
        return replace(
            both,
            prefill=replace(both.prefill, layers=layers[::-1]),
            decode=replace(both.decode, layers=layers),
        )

    with placed(models["olmoe"], place, overlap=overlap) as llm:
        assert tokens_of(llm) == expected["olmoe"]


@pytest.mark.parametrize(("cpu_s", "fetch_s"), [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("num_slots", [2, MANY_SLOTS])
def test_fetching_all_or_nothing_gives_the_same_tokens(
    cpu_s: float,
    fetch_s: float,
    num_slots: int,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where copying costs nothing as many as the slots hold are fetched, and none where the CPU
    does."""
    fetched: list[tuple[int, ...]] = []
    fetch = ExpertStep.fetch

    def spy(step: ExpertStep, op: Op) -> None:
        fetched.append(step._fetched)
        fetch(step, op)

    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (cpu_s, fetch_s))
    monkeypatch.setattr(ExpertStep, "fetch", spy)
    mix = Mix(runs="split", num_resident=1, num_slots=num_slots)
    with placed(models["olmoe"], lambda spec: mixed(spec, mix, mix, seed=4)) as llm:
        assert tokens_of(llm) == expected["olmoe"]

    assert fetched
    if fetch_s == 0.0:
        assert all(fetched)
        assert max(map(len, fetched)) == min(num_slots // 2, NUM_EXPERTS - 1)
    else:
        assert not any(fetched)


@pytest.mark.parametrize("runs", ["cpu", "stream", "split"])
@pytest.mark.parametrize("overlap", [True, False])
def test_the_executed_timeline_of_a_mix_has_the_ops_of_the_predicted_one(
    runs: Runs, overlap: bool, models: dict[str, Path]
) -> None:
    """In the same order on each lane, for a prefill step and a decode step."""
    mix = Mix(runs=runs, num_resident=2)
    with placed(models["olmoe"], lambda spec: mixed(spec, mix, mix), overlap=overlap) as llm:
        seen = two_steps(llm)

    for measured, predicted in seen:
        assert [span.op for span in measured.spans] == [span.op for span in predicted.spans]
        assert lane_orders(measured) == lane_orders(predicted)
        parts = {span.op.part for span in measured.spans}
        others = {"cpu": {"missed"}, "stream": {"missed"}, "split": {"fetched", "rest"}}
        assert parts == {"all", "resident"} | others[runs]


@pytest.mark.parametrize("runs", ["cpu", "split"])
def test_torch_may_compute_what_is_left_to_the_cpu(
    runs: Runs,
    models: dict[str, Path],
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    """On rows, which are then what is fetched."""
    mix = Mix(runs=runs, num_resident=1)
    by_torch = dict.fromkeys(("attention", "router", "experts"), "torch")
    with (
        mock.patch("hetero.api.cpu_backends", lambda *_: by_torch),
        placed(models["olmoe"], lambda spec: mixed(spec, mix, mix, seed=6)) as llm,
    ):
        assert tokens_of(llm) == expected["olmoe"]


@pytest.mark.parametrize("runs", ["cpu", "stream", "split"])
def test_the_gpu_may_multiply_all_experts_of_a_part_in_one_kernel(
    runs: Runs, models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]]
) -> None:
    """As CUDA does: from residents, staged copies and slots, in rows and turned from panels."""
    prefill, decode = Mix(runs="stream", num_resident=2), Mix(runs=runs, num_resident=1)
    with (
        mock.patch("hetero.model.decoder.expert_method", lambda *_: "grouped"),
        placed(models["olmoe"], lambda spec: mixed(spec, prefill, decode, seed=9)) as llm,
    ):
        assert tokens_of(llm) == expected["olmoe"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_mix_in_half_precision_gives_the_logits_of_the_gpu(
    dtype: Dtype, models: dict[str, Path]
) -> None:
    """Rows in float16, panels in bfloat16; within what the format rounds."""
    gpu, split = Mix(runs="gpu"), Mix(runs="split", num_resident=1)
    assert_near_logits(
        models["olmoe"],
        dtype,
        lambda spec: mixed(spec, gpu, gpu, seed=7),
        lambda spec: mixed(spec, split, split, seed=7),
    )


def test_the_slowest_experts_are_fetched_first() -> None:
    """Until the copies would take longer than what is left to the CPU."""
    spec = tiny_spec(tiny_model("olmoe"))
    asked: list[tuple[int, int]] = []

    def seconds(layer: int, num_tokens: int) -> tuple[float, float]:
        asked.append((layer, num_tokens))
        return (float(num_tokens), 4.0)

    times = ExpertTimes(spec, seconds)
    tokens = {0: 1, 2: 9, 3: 2, 4: 5}

    # one copy beside 8 s, two beside 3 s in 8 s: as fast, so the fewer
    assert choose_fetched(tokens, 1, times, 4) == (2,)
    assert choose_fetched({**tokens, 1: 3}, 1, times, 4) == (2, 4)
    assert choose_fetched(tokens, 1, times, 0) == ()
    assert choose_fetched({}, 1, times, 4) == ()
    # layers of one shape have the same times, asked for once
    assert asked == [(0, 1), (0, 9), (0, 2), (0, 5), (0, 3)]

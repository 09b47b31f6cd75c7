"""Quantised weights give the tokens of all-CPU with the same quantisation under every placement.

Where the CPU's kernels compute exactly: as they usually do they round what meets such weights to
int8 too, which no GPU does, so that logits are compared instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from planner import strategies
from planner.cost_model import CostModel
from planner.memory import needs
from planner.model_spec import ModelSpec, Quantization
from planner.placement import STREAMED, Placement
from tests.hetero.test_divided_dense import divided
from tests.hetero.test_expert_slots import slotted
from tests.hetero.test_mixed_experts import ACCELERATORS, Mix, mixed, placed, tokens_of
from tests.machines import toy_machine
from tests.tiny_models import TINY_MODELS, TINY_MOE_MODELS, save_tiny_model

QUANTISATIONS: tuple[Quantization, ...] = get_args(Quantization)
HYBRIDS = ("gpu", "offload", "split", "experts-on-cpu")
# Widths of whole groups of 128 and panels of 16, and a feed-forward that can be divided.
WHOLE: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 112,
}
WHOLE_DENSE: dict[str, Any] = {**WHOLE, "intermediate_size": 512}
Tokens = list[tuple[int, ...]]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels multiply quantised weights with what they are given, not rounded."""
    monkeypatch.setattr("hetero.model.cpu_layers.fastest_compute", lambda _: "float")


def on_cpu(folder: Path, quantization: Quantization) -> Tokens:
    with LLM(folder, profile=toy_machine(), accelerator="none", quantization=quantization) as llm:
        return tokens_of(llm)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("quantization", QUANTISATIONS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_family_gives_the_tokens_of_all_cpu_under_every_strategy(
    name: str, quantization: Quantization, accelerator: Any, tmp_path: Path
) -> None:
    """Shapes of no whole group or panel; biases, tied heads."""
    save_tiny_model(name, tmp_path, seed=5)
    expected = on_cpu(tmp_path, quantization)
    profile = toy_machine() if accelerator == "emulated" else None
    for strategy in HYBRIDS:
        if strategy == "experts-on-cpu" and name not in TINY_MOE_MODELS:
            continue
        with LLM(
            tmp_path,
            profile=profile,
            accelerator=accelerator,
            strategy=strategy,
            quantization=quantization,
        ) as llm:
            assert llm.plan.placement.name == strategy
            assert (strategy, tokens_of(llm)) == (strategy, expected)


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    save_tiny_model("olmoe", folder, seed=5, **WHOLE, intermediate_size=128)
    return folder


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    save_tiny_model("mistral", folder, seed=5, **WHOLE_DENSE)
    return folder


MIXES = [
    (Mix(runs="cpu", num_resident=2), Mix(runs="cpu", num_resident=2)),
    (Mix(runs="stream", num_resident=1), Mix(runs="stream", num_resident=3)),
    (Mix(runs="split", num_resident=2), Mix(runs="split", num_resident=2)),
    (Mix(runs="split"), Mix(runs="stream")),
    (Mix(runs="stream"), Mix(runs="cpu", num_resident=4)),
    (Mix(runs="gpu"), Mix(runs="split", num_resident=1)),
]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("quantization", QUANTISATIONS)
@pytest.mark.parametrize(("prefill", "decode"), MIXES)
def test_mixed_experts_give_the_tokens_of_all_cpu(
    prefill: Mix, decode: Mix, quantization: Quantization, accelerator: Any, experts_folder: Path
) -> None:
    """Residents in another order than the model's, the others on the CPU, streamed or fetched."""
    expected = on_cpu(experts_folder, quantization)
    with placed(
        experts_folder,
        lambda spec: mixed(spec, prefill, decode, seed=3),
        accelerator=accelerator,
        quantization=quantization,
    ) as llm:
        assert tokens_of(llm) == expected


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_experts_in_slots_that_change_give_the_tokens_of_all_cpu(
    quantization: Quantization,
    accelerator: Any,
    experts_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is admitted to a slot overwrites the panels that were there; copies seem cheap here."""
    monkeypatch.setattr(CostModel, "expert_times", lambda *_: (9.0, 1.0))
    expected = on_cpu(experts_folder, quantization)
    with placed(
        experts_folder,
        lambda spec: slotted(spec, 2, "lru", prefetch=True),
        accelerator=accelerator,
        quantization=quantization,
    ) as llm:
        assert tokens_of(llm) == expected
        counts = llm._open_engine().slot_counts
    assert sum(each.num_admitted for each in counts.values()) > 0


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("quantization", QUANTISATIONS)
@pytest.mark.parametrize("runs", ["cpu", "stream"])
def test_a_divided_feed_forward_gives_the_tokens_of_all_cpu(
    runs: Any, quantization: Quantization, accelerator: Any, dense_folder: Path
) -> None:
    """512 columns are four groups: 6 shares of 16 are 192, of which the GPU has the first 128."""

    def place(spec: ModelSpec) -> Placement:
        assert spec.dense_columns(0, 6) == 128
        return divided(spec, {"prefill": runs, "decode": runs}, 6)

    expected = on_cpu(dense_folder, quantization)
    with placed(dense_folder, place, accelerator=accelerator, quantization=quantization) as llm:
        assert tokens_of(llm) == expected


@pytest.mark.usefixtures("exact")
def test_one_op_at_a_time_gives_the_same_tokens(experts_folder: Path) -> None:
    """Attention and experts streamed, without overlap."""

    def place(spec: ModelSpec) -> Placement:
        mix = Mix(runs="stream", num_resident=1)
        both = mixed(spec, mix, mix, seed=3)
        layers = tuple(replace(each, attention=STREAMED) for each in both.decode.layers)
        return replace(both, decode=replace(both.decode, layers=layers))

    expected = on_cpu(experts_folder, "int4")
    with placed(experts_folder, place, overlap=False, quantization="int4") as llm:
        assert tokens_of(llm) == expected


@pytest.mark.parametrize("quantization", QUANTISATIONS)
def test_logits_stay_near_those_of_a_cpu_that_rounds_what_meets_the_weights(
    quantization: Quantization,
) -> None:
    """Log-probabilities of the demo model, which is trained, within 0.2: 0.055 was seen."""
    prompts = ["The old man looked at the sea and", "def main():", "It was a dark night. " * 12]
    first = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    found: list[list[Any]] = []
    for where in ({"accelerator": "none"}, {"accelerator": "emulated", "strategy": "gpu"}):
        options: dict[str, Any] = {**where, "profile": toy_machine(), "quantization": quantization}
        with LLM(dtype="float32", **options) as llm:
            found.append([out.outputs[0].logprobs for out in llm.generate(prompts, first)])

    for one, other in zip(*found, strict=True):
        shared = one[0].keys() & other[0].keys()
        assert len(shared) >= 15
        assert max(abs(one[0][token] - other[0][token]) for token in shared) < 0.2


@pytest.mark.parametrize("quantization", [None, *QUANTISATIONS])
def test_the_gpu_holds_the_bytes_that_were_planned(
    quantization: Quantization | None, dense_folder: Path
) -> None:
    """Weights, whole blocks of caches, and buffers for the streamed layer."""

    def place(spec: ModelSpec) -> Placement:
        return strategies.placement(spec, "offload", 1)

    with placed(dense_folder, place, dtype="bfloat16", quantization=quantization) as llm:
        plan = llm.plan
        planned = needs(llm.spec, plan.placement, plan.wave, llm.hardware)["gpu"]
        used = llm.device_bytes()["gpu"]
        kv_blocks = llm.spec.kv_bytes_per_token(0) * 2 * 16
        caches = (used - planned.weights_bytes - planned.staging_bytes) / kv_blocks
    # whole blocks of caches, of which there may be more than were planned
    assert caches == pytest.approx(round(caches), abs=0.01)
    assert used <= planned.available_bytes

"""A dense feed-forward divided by its columns gives the tokens of all-CPU, its parts at once."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from msgspec.structs import replace

from hetero import LLM
from planner import strategies
from planner.model_spec import DENSE_SHARES, Dtype, ModelSpec
from planner.placement import (
    STREAMED,
    ModulePlacement,
    Placement,
    Runs,
    TierPlacement,
)
from planner.timeline import lane_orders
from planner.workload import Phase
from tests.hetero.test_mixed_experts import (
    ACCELERATORS,
    assert_near_logits,
    placed,
    tokens_of,
    two_steps,
)
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

MODELS = ("mistral", "qwen2", "qwen3", "qwen3-moe")
RUNS: tuple[Runs, ...] = ("cpu", "stream")
Tokens = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in found.items():
        save_tiny_model(name, folder, seed=11)
    return found


@pytest.fixture(scope="module")
def on_cpu(folders: dict[str, Path]) -> dict[str, Tokens]:
    """Greedy tokens of each, all on the CPU."""
    found = {}
    for name, folder in folders.items():
        with LLM(folder, profile=toy_machine(), accelerator="none") as llm:
            found[name] = tokens_of(llm)
    return found


def divided(
    spec: ModelSpec, runs: dict[Phase, Runs], num_resident: int, *, is_streaming: bool = False
) -> Placement:
    """Every dense layer divided alike, all else on the GPU, attention streamed there or not."""

    def tier(phase: Phase) -> TierPlacement:
        where = ModulePlacement(lives="cpu", runs=runs[phase], num_resident=num_resident)
        gpu = strategies.gpu(spec, phase)
        layers = (each if each.router else replace(each, ffn=where) for each in gpu.layers)
        if is_streaming:
            layers = (replace(each, attention=STREAMED) for each in tuple(layers))
        return replace(gpu, layers=tuple(layers))

    return Placement(prefill=tier("prefill"), decode=tier("decode"))


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize(("prefill", "decode"), list(product(RUNS, RUNS)))
@pytest.mark.parametrize("num_resident", [1, 7, DENSE_SHARES - 1])
@pytest.mark.parametrize("name", MODELS)
def test_every_division_gives_the_greedy_tokens_of_all_cpu(
    accelerator: Any,
    name: str,
    num_resident: int,
    prefill: Runs,
    decode: Runs,
    folders: dict[str, Path],
    on_cpu: dict[str, Tokens],
) -> None:
    runs: dict[Phase, Runs] = {"prefill": prefill, "decode": decode}
    place = lambda spec: divided(spec, runs, num_resident)  # noqa: E731
    with placed(folders[name], place, accelerator=accelerator) as llm:
        assert tokens_of(llm) == on_cpu[name]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_torch_or_our_kernels_compute_what_is_left_to_the_cpu(
    backend: str, overlap: bool, folders: dict[str, Path], on_cpu: dict[str, Tokens]
) -> None:
    """Beside streamed attention; what a phase streams lies in rows or packed."""
    runs: dict[Phase, Runs] = {"prefill": "stream", "decode": "cpu"}
    place = lambda spec: divided(spec, runs, 5, is_streaming=True)  # noqa: E731
    backends = dict.fromkeys(("attention", "dense"), backend) if backend == "torch" else {}
    with (
        mock.patch("hetero.api.cpu_backends", lambda *_: backends),
        placed(folders["mistral"], place, overlap=overlap) as llm,
    ):
        assert tokens_of(llm) == on_cpu["mistral"]


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_division_in_half_precision_gives_the_logits_of_the_gpu(
    dtype: Dtype, runs: Runs, folders: dict[str, Path]
) -> None:
    """Within what the format rounds: two parts round once more than a whole."""
    both: dict[Phase, Runs] = {"prefill": runs, "decode": runs}
    assert_near_logits(
        folders["mistral"],
        dtype,
        lambda spec: divided(spec, both, 6),
        lambda spec: strategies.placement(spec, "gpu", 0),
    )


@pytest.mark.parametrize("runs", RUNS)
def test_the_parts_of_a_layer_are_ops_of_their_lanes(runs: Runs, folders: dict[str, Path]) -> None:
    """What is executed is what was predicted, in the same order on each lane."""
    both: dict[Phase, Runs] = {"prefill": runs, "decode": runs}
    with placed(folders["mistral"], lambda spec: divided(spec, both, 8)) as llm:
        seen = two_steps(llm)

    for measured, predicted in seen:
        assert lane_orders(measured) == lane_orders(predicted)
        lanes = {span.op.part: span.op.lane for span in measured.spans if span.op.kind == "dense"}
        assert lanes == {"resident": "gpu", "missed": "cpu" if runs == "cpu" else "gpu"}

"""Sequences that decode go on by a token in the steps that prefill others, and none changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from hetero import LLM, SamplingParams
from hetero.api import GenerationStep
from planner.workload import Workload
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

MODELS = ("llama", "mistral", "olmoe")
# Two run at a time: each of the others begins while one decodes.
PROMPTS: Any = [
    {"prompt_token_ids": [(11 * at + 5 * size) % 101 for at in range(size)]}
    for size in (9, 3, 21, 1, 17)
]
PARAMS = [
    SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True) for count in (12, 3, 7, 9, 5)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        save_tiny_model(name, folder, seed=11)
    return folders


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> dict[str, list[tuple[int, ...]]]:
    """Each prompt by itself, all on the CPU."""
    found = {}
    for name, folder in models.items():
        with LLM(folder, profile=toy_machine(), accelerator="none") as llm:
            found[name] = [
                llm.generate(prompt, params)[0].outputs[0].token_ids
                for prompt, params in zip(PROMPTS, PARAMS, strict=True)
            ]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        *itertools.product(MODELS, ("cpu", "gpu", "offload", "split")),
        ("olmoe", "experts-on-cpu"),
    ],
)
def test_prompts_that_begin_while_others_decode_give_the_tokens_that_they_give_alone(
    models: dict[str, Path],
    alone: dict[str, list[tuple[int, ...]]],
    name: str,
    strategy: str,
    dtype: Any,
) -> None:
    """In bfloat16 kernels for one token and for many round differently: no sequence may be lost."""
    steps: list[tuple[str, ...]] = []

    def watch(step: GenerationStep) -> None:
        batch = step.result.batch
        if batch.phase == "prefill":
            steps.append(tuple(item.phase for item in batch.items))

    with LLM(
        models[name],
        profile=toy_machine(),
        accelerator="emulated",
        strategy=strategy,
        workload=Workload(prompt_len=24, output_len=12, num_seqs=2),
        max_num_seqs=2,
        dtype=dtype,
    ) as llm:
        found = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS, observe=watch)]
    assert sum("decode" in phases for phases in steps) == 3
    if dtype == "float32":
        assert found == alone[name]
    assert [len(tokens) for tokens in found] == [12, 3, 7, 9, 5]

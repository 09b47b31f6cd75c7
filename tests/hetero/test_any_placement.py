"""Whatever the search may emit gives all-CPU's tokens: states of layers drawn at random."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from hetero import LLM
from planner.candidate import Wave
from planner.cost_model import CostModel
from planner.mixed_search import _Draft, _placement, _Space
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.workload import Workload
from tests.hetero.test_mixed_experts import PROMPTS, placed, tokens_of
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

MODELS = ("llama", "olmoe", "qwen3-moe")


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
    space = _Space(Wave(spec, CostModel(machine), workload, workload.num_seqs), 16)
    draw = Random(seed)
    columns = [draw.randrange(len(space.menu_of[index].states)) for index in range(spec.num_layers)]
    ends = draw.randrange(len(space.menus[-1].states))
    return _placement(space, _Draft(layers=tuple(columns), ends=ends))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", MODELS)
def test_random_states_give_the_tokens_of_all_cpu(
    models: dict[str, Path], expected: dict[str, list[tuple[int, ...]]], name: str, seed: int
) -> None:
    with placed(models[name], lambda spec: random_placement(spec, seed)) as llm:
        assert tokens_of(llm) == expected[name]

"""While the accelerator prefills some sequences the CPU decodes others, and none changes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from hetero import LLM, SamplingParams, loading
from hetero.api import GenerationStep
from hetero.model.decoder import DecoderStep
from planner import strategies
from planner.kv_blocks import KVBlocks
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.step_graph import Op
from tests.hetero.test_mixed_experts import placed
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

MODELS = ("llama", "mistral", "olmoe")
PROMPTS: Any = [
    {"prompt_token_ids": [(13 * at + 7 * size) % 101 for at in range(size)]}
    for size in (9, 3, 21, 1, 17, 33)
]
PARAMS = [
    SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    for count in (12, 4, 7, 9, 5, 20)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        save_tiny_model(name, folder, seed=13)
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


def offload(spec: ModelSpec) -> Placement:
    """Prefill on the accelerator, all weights streamed; decode on the CPU."""
    prefill = strategies.offload(spec, "prefill", spec.num_layers)
    return Placement(prefill=prefill, decode=strategies.cpu(spec, "decode"))


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accelerator works on each prefill step until others have decoded, or nobody could."""
    real, moment = DecoderStep.perform, threading.Event()

    def perform(step: DecoderStep, op: Op) -> None:
        if op.lane == "gpu" and op.kind == "head":
            moment.wait(timeout=0.05)
        real(step, op)

    monkeypatch.setattr(DecoderStep, "perform", perform)


@pytest.mark.parametrize("blocks", [None, KVBlocks(first=5, prompts=4)])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_decode_goes_on_beside_prefill_and_gives_the_same_tokens(
    models: dict[str, Path],
    alone: dict[str, list[tuple[int, ...]]],
    name: str,
    overlap: bool,
    blocks: KVBlocks | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two at a time; with five blocks of 16 tokens some give way and are prefilled again. Without
    overlap no two steps run at once."""
    if blocks is not None:
        monkeypatch.setattr(loading, "_kv_blocks", lambda *_: blocks)
    slowly(monkeypatch)
    seen: list[tuple[str, bool]] = []

    def watch(step: GenerationStep) -> None:
        seen.append((step.result.batch.phase, step.result.is_beside))

    with placed(models[name], offload, overlap=overlap, max_num_seqs=2) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, observe=watch)
        pools = llm._open_engine().scheduler.pools
        found = [out.outputs[0].token_ids for out in outputs]
    assert found == alone[name]
    assert ("decode", overlap) in seen and ("prefill", overlap) in seen
    assert ("prefill", False) in seen, "the first prompts have nobody beside them"
    for pool in (*pools.decode, pools.prompts):
        assert pool is not None and pool.num_free == pool.num_blocks


def test_what_fails_beside_a_prefill_step_leaves_the_engine_as_good_as_new(
    models: dict[str, Path],
    alone: dict[str, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interrupt of a decode step: the other step ends before its pages are given to others."""
    slowly(monkeypatch)
    with placed(models["llama"], offload, max_num_seqs=2) as llm:

        def interrupt(step: GenerationStep) -> None:
            if step.result.is_beside:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS, observe=interrupt)
        pools = llm._open_engine().scheduler.pools
        for pool in (*pools.decode, pools.prompts):
            assert pool is not None and pool.num_free == pool.num_blocks
        outputs = llm.generate(PROMPTS, PARAMS)
    assert [out.outputs[0].token_ids for out in outputs] == alone["llama"]

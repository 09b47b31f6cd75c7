"""Ops in one chain: which they are, and that they give what single ops do, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hetero import LLM, SamplingParams
from hetero.model.cpu_run import split_runs
from hetero.model.decoder import DecoderStep
from planner.model_spec import Module
from planner.step_graph import Lane, Op, OpKind
from tests.machines import toy_machine
from tests.tiny_models import TINY_MODELS, save_tiny_model

LAYER: tuple[OpKind, ...] = ("attention", "router", "dispatch", "experts", "combine")
DENSE_LAYER: tuple[OpKind, ...] = ("attention", "dense")


def ops(*kinds: OpKind, lane: Lane = "cpu") -> list[Op]:
    return [Op(index=index, kind=kind, lane=lane, layer=0) for index, kind in enumerate(kinds)]


def sizes(given: list[Op], is_packed: Callable[[Module], bool] = lambda module: True) -> list[int]:
    parts = split_runs(given, lambda op, module: object() if is_packed(module) else None)  # type: ignore[arg-type, return-value]
    assert [op for part in parts for op in part] == given
    return [len(part) for part in parts]


def test_a_step_is_its_embedding_one_chain_and_its_sampling() -> None:
    step = ops("embed", *LAYER, *DENSE_LAYER, *LAYER, "head", "sample")
    assert sizes(step) == [1, 13, 1]


def test_a_chain_begins_with_an_op_that_reads_hidden_states_only() -> None:
    """Experts whose routing came from elsewhere, and the sum after them, are single ops."""
    assert sizes(ops("dispatch", "experts", "combine", *LAYER)) == [1, 1, 1, 5]


def test_what_is_not_packed_ends_a_chain() -> None:
    """A streamed module, or one in a format that the kernels do not know."""
    step = ops(*LAYER, *DENSE_LAYER, "head")
    assert sizes(step, lambda module: module != "dense") == [6, 1, 1]
    assert sizes(step, lambda module: False) == [1] * 8


def test_tokens_are_sorted_for_experts_that_torch_computes_beside_our_router() -> None:
    """Their dispatch is an op of its own: our kernels sort the tokens themselves."""
    step = ops(*LAYER, *DENSE_LAYER, "head")
    assert sizes(step, lambda module: module != "experts") == [2, 1, 1, 1, 3]


def test_ops_of_other_devices_are_single() -> None:
    assert sizes(ops(*LAYER, lane="gpu")) == [1] * 5


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_chain_of_layers_gives_what_single_ops_do(
    name: str, quantization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of all tokens, three sequences that end at different times, equal."""
    save_tiny_model(name, tmp_path)
    params = [
        SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=5)
        for count in (3, 9, 6)
    ]
    prompts: Any = [{"prompt_token_ids": list(range(3, 3 + count))} for count in (1, 20, 7)]

    def generate() -> list[Any]:
        with LLM(
            tmp_path, profile=toy_machine(), accelerator="none", quantization=quantization
        ) as llm:
            return [
                (out.outputs[0].token_ids, out.outputs[0].logprobs)
                for out in llm.generate(prompts, params)
            ]

    chained = generate()
    chains: list[int] = []
    perform_chain = DecoderStep._perform_chain

    def count(self: DecoderStep, part: tuple[Op, ...]) -> list[float]:
        chains.append(len(part))
        return perform_chain(self, part)

    monkeypatch.setattr(DecoderStep, "_perform_chain", count)
    assert generate() == chained
    assert len(chains) == 1 + 8 and min(chains) > 4  # one in each decode step, and to warm up
    monkeypatch.setattr("hetero.model.decoder.split_runs", lambda ops, find: [(op,) for op in ops])
    chains.clear()
    assert generate() == chained
    assert not chains

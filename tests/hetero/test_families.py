"""Every family against transformers through the whole engine, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hetero import LLM, SamplingParams
from hetero.sampler import SampledToken, SamplingRow
from hetero.sampler import sample as real_sample
from tests.machines import toy_machine
from tests.tiny_models import TINY_MODELS, save_tiny_model

NUM_STEPS = 16
ATOL = 1e-4
PROMPTS = ([5, 9, 17, 3, 99, 20, 44, 61, 7, 7, 30], [11], [8, 90, 12, 55, 4, 3, 2, 71, 29] * 3)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.Tensor, int]]]:
    """Logits that reached the sampler, with the number of tokens generated before."""
    rows: list[tuple[torch.Tensor, int]] = []

    def recording(logits: torch.Tensor, sampling: list[SamplingRow]) -> list[SampledToken]:
        for row, each in zip(logits, sampling, strict=True):
            rows.append((row.clone(), each.num_output_tokens))
        return real_sample(logits, sampling)

    monkeypatch.setattr("hetero.engine.sample", recording)
    yield rows


def reference(model: Any, prompt: list[int]) -> tuple[list[torch.Tensor], list[int]]:
    """Last-row logits of prefill and of each greedy step, and the tokens, by transformers."""
    logits, tokens = [], []
    fed, cache = torch.tensor([prompt]), None
    for _ in range(NUM_STEPS):
        out = model(fed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].float())
        tokens.append(int(logits[-1].argmax()))
        fed = torch.tensor([[tokens[-1]]])
    return logits, tokens


@pytest.mark.parametrize("name", TINY_MODELS)
@torch.inference_mode()
def test_logits_and_tokens_of_prefill_and_sixteen_steps_are_those_of_transformers(
    name: str, tmp_path: Path, seen: list[tuple[torch.Tensor, int]]
) -> None:
    """One prompt at a time: logits of prefill and of every step within 1e-4, tokens equal."""
    model = save_tiny_model(name, tmp_path)
    params = SamplingParams(max_tokens=NUM_STEPS, temperature=0.0, ignore_eos=True)
    with LLM(tmp_path, profile=toy_machine(), accelerator="none") as llm:
        for prompt in PROMPTS:
            seen.clear()
            (out,) = llm.generate({"prompt_token_ids": list(prompt)}, params)
            expected_logits, expected_tokens = reference(model, list(prompt))

            assert list(out.outputs[0].token_ids) == expected_tokens
            assert len(seen) == NUM_STEPS
            for (row, _), expected in zip(seen, expected_logits, strict=True):
                torch.testing.assert_close(row, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", TINY_MODELS)
@torch.inference_mode()
def test_a_ragged_batch_gives_the_tokens_of_each_prompt_alone(name: str, tmp_path: Path) -> None:
    """Prompts of 11, 1 and 27 tokens in one batch, against transformers one by one."""
    model = save_tiny_model(name, tmp_path, seed=3)
    params = SamplingParams(max_tokens=NUM_STEPS, temperature=0.0, ignore_eos=True)
    with LLM(tmp_path, profile=toy_machine(), accelerator="none") as llm:
        outs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], params)

    for out, prompt in zip(outs, PROMPTS, strict=True):
        assert list(out.outputs[0].token_ids) == reference(model, list(prompt))[1]

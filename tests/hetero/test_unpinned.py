"""Host memory that cannot be pinned: one warning, and predictions of slower copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from hetero.faults import VARIABLE
from planner.hardware import HardwareProfile
from planner.what_if import with_pageable_copies
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

PROMPT: Any = {"prompt_token_ids": [3, 14, 15, 92]}
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
STREAMING: dict[str, Any] = {"accelerator": "emulated", "strategy": "offload"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder, seed=7)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[int, ...]:
    with LLM(folder, profile=toy_machine(), accelerator="none", max_model_len=64) as llm:
        return run(llm)


def run(llm: LLM) -> tuple[int, ...]:
    (out,) = llm.generate(PROMPT, GREEDY)
    return out.outputs[0].token_ids


def machine_with_a_link(*, knows_pageable: bool) -> HardwareProfile:
    machine = toy_machine().with_emulated_gpu(memory_bytes=10**9, link_bytes_per_s=4e9)
    assert machine.link is not None
    rate = 1e9 if knows_pageable else None
    link = replace(machine.link, pageable_h2d_bytes_per_s=rate, pageable_d2h_bytes_per_s=rate)
    return replace(machine, link=link)


def test_pageable_copies_cost_what_they_were_measured_to_cost() -> None:
    """4e9 bytes/s pinned, 1e9 pageable; a profile without pageable rates gives no answer."""
    changed = with_pageable_copies(machine_with_a_link(knows_pageable=True))
    assert changed is not None and changed.link is not None
    assert (changed.link.h2d_bytes_per_s, changed.link.d2h_bytes_per_s) == (1e9, 1e9)
    assert with_pageable_copies(machine_with_a_link(knows_pageable=False)) is None
    assert with_pageable_copies(toy_machine()) is None


def test_host_memory_that_cannot_be_pinned_is_warned_of_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, expected: tuple[int, ...]
) -> None:
    """An emulated link has no pageable rate: predictions stay, and the warning says so."""
    monkeypatch.setenv(VARIABLE, "pin:1+")
    with (
        pytest.warns(RuntimeWarning, match="cannot be pinned") as found,
        LLM(folder, profile=toy_machine(), max_model_len=64, **STREAMING) as llm,
    ):
        tokens = run(llm)
    assert tokens == expected
    (warning,) = found
    assert "the profile has no rate of such copies: predictions are too fast" in str(
        warning.message
    )


def test_predictions_are_those_of_pageable_copies_where_the_profile_knows_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is streamed for each step takes four times as long."""
    real = HardwareProfile.with_emulated_gpu

    def with_rates(machine: HardwareProfile, **sizes: Any) -> HardwareProfile:
        made = real(machine, **sizes)
        assert made.link is not None
        rate = made.link.h2d_bytes_per_s / 4
        link = replace(made.link, pageable_h2d_bytes_per_s=rate, pageable_d2h_bytes_per_s=rate)
        return replace(made, link=link)

    monkeypatch.setattr(HardwareProfile, "with_emulated_gpu", with_rates)
    common: dict[str, Any] = {"profile": toy_machine(), "max_model_len": 64, **STREAMING}
    with LLM(folder, **common) as llm:
        pinned = llm.plan.estimate
    monkeypatch.setenv(VARIABLE, "pin:1")
    with (
        pytest.warns(RuntimeWarning, match="predictions are corrected"),
        LLM(folder, **common) as llm,
    ):
        run(llm)
        assert llm.plan.estimate.tpot_s > pinned.tpot_s
        assert llm.plan.estimate.bytes_by_device == pinned.bytes_by_device
        assert llm.predicted is not None

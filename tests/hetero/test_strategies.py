"""Placement invariance: every strategy gives all-CPU's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from hetero.model_lookup import find_model, read_model_spec
from hetero.planning import usable_hardware
from planner import search, strategies
from planner.hardware import HardwareProfile, Resources
from planner.memory import needs
from planner.placement import Placement
from planner.plan import Plan
from planner.workload import Workload
from tests.machines import toy_machine
from tests.tiny_models import TINY_MODELS, TINY_MOE_MODELS, save_tiny_model

PROMPTS = ["The old man looked at the sea and", "def main():", "It was a dark night. " * 12]
HYBRIDS = ("gpu", "offload", "split", "experts-on-cpu")
ACCELERATORS = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
GREEDY = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    """Greedy tokens of the demo model, all on the CPU."""
    with LLM(profile=toy_machine(), accelerator="none", dtype="float32") as llm:
        return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("strategy", HYBRIDS)
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_every_strategy_gives_the_greedy_tokens_of_all_cpu(
    accelerator: Any, strategy: str, overlap: bool, expected: list[tuple[int, ...]]
) -> None:
    """64 tokens of the demo model in float32, overlapped and one op at a time."""
    with demo(accelerator, strategy=strategy, overlap=overlap) as llm:
        tokens = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]
        assert llm.plan.placement.name == strategy

    assert tokens == expected


@pytest.mark.parametrize("cut", [1, 3, 6])
@pytest.mark.parametrize("strategy", ["offload", "split", "experts-on-cpu"])
def test_every_cut_point_gives_the_greedy_tokens_of_all_cpu(
    strategy: str, cut: int, expected: list[tuple[int, ...]]
) -> None:
    with demo("emulated", plan=lambda spec: strategies.placement(spec, strategy, cut)) as llm:
        tokens = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]

    assert tokens == expected


@pytest.mark.parametrize(
    ("prefill", "decode"), [("offload", "split"), ("split", "experts-on-cpu"), ("cpu", "offload")]
)
def test_phases_with_different_strategies_move_the_kv_cache_and_change_no_token(
    prefill: str, decode: str, expected: list[tuple[int, ...]]
) -> None:
    """Layers whose KV changes device between the phases are copied once per sequence."""

    def pair(spec: Any) -> Placement:
        return Placement(
            prefill=strategies.placement(spec, prefill, 0 if prefill == "cpu" else 4).prefill,
            decode=strategies.placement(spec, decode, 3).decode,
        )

    with demo("emulated", plan=pair) as llm:
        tokens = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]

    assert tokens == expected


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("strategy", HYBRIDS)
@torch.inference_mode()
def test_every_family_gives_the_same_tokens_under_every_strategy(
    name: str, strategy: str, tmp_path: Path
) -> None:
    """Odd shapes, dense and expert layers, on the emulated accelerator."""
    if strategy == "experts-on-cpu" and name not in TINY_MOE_MODELS:
        pytest.skip("the strategy needs experts")
    save_tiny_model(name, tmp_path, seed=5)
    prompts: Any = [{"prompt_token_ids": [3, 14, 15, 92]}, {"prompt_token_ids": [65, 35, 89] * 9}]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    with LLM(tmp_path, profile=toy_machine(), accelerator="none") as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    with LLM(tmp_path, profile=toy_machine(), accelerator="emulated", strategy=strategy) as llm:
        tokens = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]

    assert tokens == expected


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_searched_plan_stays_within_its_gpu_budget(share: float) -> None:
    """The accelerator counts every byte of weights, cache and staging against the budget."""
    budget_gb = share * 0.06
    with LLM(
        profile=toy_machine(),
        accelerator="emulated",
        gpu_mem_gb=budget_gb,
        dtype="float32",
        workload=Workload(prompt_len=64, output_len=64),
    ) as llm:
        llm.generate(PROMPTS[:1], GREEDY)
        used = llm.device_bytes()["gpu"] if llm.plan.placement.uses("gpu") else 0
        planned = needs(llm.spec, llm.plan.placement, llm.plan.workload, llm.hardware)

    assert used <= budget_gb * 1e9
    assert planned["gpu"].fits


def demo(accelerator: Any, *, plan: Any = None, strategy: str | None = None, **rest: Any) -> LLM:
    """The demo model in float32 on the toy machine; `plan` makes a placement from the spec."""
    workload = Workload(prompt_len=64, output_len=64, num_seqs=len(PROMPTS))
    if plan is None:
        profile = toy_machine() if accelerator == "emulated" else None
        accelerator = "none" if strategy == "cpu" else accelerator
        return LLM(
            profile=profile,
            accelerator=accelerator,
            strategy=strategy,
            dtype="float32",
            workload=workload,
            **rest,
        )
    return LLM(
        profile=toy_machine(),
        dtype="float32",
        plan=forced_plan(toy_machine(), plan, workload),
        **rest,
    )


def forced_plan(profile: HardwareProfile, place: Any, workload: Workload) -> Plan:
    """A plan as `search` gives it, with another placement put in by hand, as a user may."""
    spec = read_model_spec(find_model(None), "float32")
    hardware = usable_hardware(profile, Resources(accelerator="emulated"))
    return replace(search(spec, hardware, workload), placement=place(spec))

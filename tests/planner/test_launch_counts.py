"""The launches that the cost model counts are those of hetero/model."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hetero import LLM, SamplingParams
from hetero.model import cpu_layers
from hetero.model.decoder import DecoderStep
from planner.cost_model import _NUM_CPU_CALLS, _NUM_EXPERT_PRODUCTS, _NUM_LAUNCHES
from planner.step_graph import Op
from tests.machines import toy_machine
from tests.tiny_models import save_tiny_model

# Calls that compute nothing: views, or questions about a tensor's state.
_FREE = {
    *("_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk"),
    *("detach", "empty", "empty_like", "expand", "flatten", "new_empty", "permute", "reshape"),
    *("resolve_conj", "resolve_neg", "select", "slice", "split", "split_with_sizes", "squeeze"),
    *("t", "transpose", "unbind", "unsqueeze", "view", "view_as"),
}


class LaunchCounter(TorchDispatchMode):
    """Counts the torch operations that compute. Mutable."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.num_launches += name not in _FREE
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_launches_of_an_op_are_counted_in_the_model(phase: str, tmp_path: Path) -> None:
    """One sequence on the emulated accelerator, within two of what runs.

    The first attention of a step also makes what its layers share, so the fewest count. A prompt of
    3 tokens chooses 3 to 5 experts, a token 3.
    """
    counts: dict[str, list[int]] = defaultdict(list)
    perform = DecoderStep.perform

    def counted(step: DecoderStep, op: Op) -> None:
        with LaunchCounter() as counter:
            perform(step, op)
        if step._tier.phase == phase and op.kind != "copy":
            counts[op.kind].append(counter.num_launches)

    save_tiny_model("qwen3-moe", tmp_path, dtype=torch.bfloat16)
    greedy = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with (
        mock.patch.object(DecoderStep, "perform", counted),
        LLM(tmp_path, profile=toy_machine(), accelerator="emulated", strategy="gpu") as llm,
    ):
        llm.generate([{"prompt_token_ids": [3, 14, 15]}], greedy)

    actual = {kind: min(found) for kind, found in counts.items()}
    assert actual.keys() == _NUM_LAUNCHES.keys()
    num_experts = 3 if phase == "decode" else 4
    expected = {
        **_NUM_LAUNCHES,
        "experts": _NUM_LAUNCHES["experts"] + num_experts * _NUM_EXPERT_PRODUCTS,
    }
    assert expected == pytest.approx(actual, abs=2)


_KERNELS = (
    *("add_residual", "decode_attention", "linear", "prepare_qkv", "rms_norm", "route"),
    *("run_experts", "silu_multiply"),
)


def test_the_kernel_calls_of_an_op_on_the_cpu_are_counted_in_its_layers(tmp_path: Path) -> None:
    """Decode of one sequence; embedding and sampling are torch's and the sampler's."""
    counts: dict[str, list[int]] = defaultdict(list)
    perform = DecoderStep.perform
    num_calls = 0

    def counted(step: DecoderStep, op: Op) -> None:
        before = num_calls
        perform(step, op)
        if step._tier.phase == "decode":
            counts[op.kind].append(num_calls - before)

    def counting(kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            return kernel(*args, **kwargs)

        return call

    save_tiny_model("qwen3-moe", tmp_path, dtype=torch.bfloat16)
    greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    with ExitStack() as patches:
        for name in _KERNELS:
            kernel = getattr(cpu_layers, name)
            patches.enter_context(mock.patch.object(cpu_layers, name, counting(kernel)))
        patches.enter_context(mock.patch.object(DecoderStep, "perform", counted))
        with LLM(tmp_path, profile=toy_machine(), accelerator="none") as llm:
            llm.generate([{"prompt_token_ids": [3, 14, 15]}], greedy)

    actual = {kind: set(found) for kind, found in counts.items()}
    expected = {kind: {count} for kind, count in _NUM_CPU_CALLS.items()}
    expected |= {"embed": {0}, "sample": {0}}  # torch's, and the sampler's
    assert actual == expected

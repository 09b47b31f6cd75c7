"""The kernels that the cost model counts are those of hetero/model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hetero import LLM, SamplingParams
from hetero.model.cpu_run import CpuRun, build_run
from hetero.model.decoder import DecoderStep
from hetero.runtime.devices import EmulatedAccelerator
from planner.cost_model import (
    NUM_COPIES,
    NUM_FRONT_PASSES,
    NUM_MERGE_PASSES,
    NUM_TORCH_PASSES,
    CostModel,
)
from planner.placement import MIXED, ON_CPU, ON_GPU, ModulePlacement
from planner.plan import Plan
from planner.step_graph import Op, OpKind, Payload
from planner.workload import decode_shape
from tests.machines import toy_machine
from tests.planner.tiny import tiny_device, tiny_machine, tiny_spec
from tests.tiny_models import save_tiny_model

# Products and attention are kernels of their own.
_PRODUCTS = {"linear", "mm", "scaled_dot_product_attention"}
# Calls that compute nothing: views, or questions about a tensor's state.
_FREE = {
    *("_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk"),
    *("detach", "empty", "empty_like", "expand", "flatten", "new_empty", "permute", "reshape"),
    *("resolve_conj", "resolve_neg", "select", "slice", "split", "split_with_sizes", "squeeze"),
    *("t", "transpose", "unbind", "unsqueeze", "view", "view_as"),
}


class PassCounter(TorchDispatchMode):
    """Counts the torch operations that compute, beside products. Mutable."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_passes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        found = func(*args, **(kwargs or {}))
        # What is converted to the format that it has is not touched.
        is_same = name == "to" and found is args[0]
        self.num_passes += name not in _FREE | _PRODUCTS and not is_same
        return found


ON_BOTH: tuple[OpKind, ...] = ("qkv", "attend", "attention_output")


@pytest.mark.parametrize("case", ["prefill", "decode", "decode, the cpu attends"])
def test_the_passes_of_torch_are_counted_in_the_model(case: str, tmp_path: Path) -> None:
    """One sequence on the emulated accelerator, within two of what runs beside its products.

    The first attention of a step also makes what its layers share, so the fewest count.
    """
    counts: dict[OpKind, list[int]] = defaultdict(list)
    perform = DecoderStep.perform

    def counted(step: DecoderStep, op: Op) -> None:
        with PassCounter() as counter:
            perform(step, op)
        if step._tier.phase == case.split(",")[0] and op.kind not in ("copy", "sample"):
            counts[op.kind].append(counter.num_passes)

    save_tiny_model("qwen3-moe", tmp_path, dtype=torch.bfloat16)
    plan = plan_of(tmp_path, kv_on_cpu=case.endswith("attends"))
    with mock.patch.object(DecoderStep, "perform", counted):
        run(tmp_path, plan)

    actual = {kind: min(found) for kind, found in counts.items()}
    others = ("attention",) if case.endswith("attends") else ON_BOTH
    expected = {kind: num for kind, num in NUM_TORCH_PASSES.items() if kind not in others}
    assert actual == pytest.approx(expected, abs=2)


def test_the_parts_of_a_divided_feed_forward_have_one_residual(tmp_path: Path) -> None:
    """Both by torch: the missed columns are streamed."""
    counts: dict[str, set[int]] = defaultdict(set)
    perform = DecoderStep.perform

    def counted(step: DecoderStep, op: Op) -> None:
        with PassCounter() as counter:
            perform(step, op)
        if op.part != "all" and op.kind == "dense":
            counts[op.part].add(counter.num_passes)

    save_tiny_model("mistral", tmp_path, dtype=torch.bfloat16)
    where = ModulePlacement(lives="cpu", runs="stream", num_resident=4)
    with mock.patch.object(DecoderStep, "perform", counted):
        run(tmp_path, plan_of(tmp_path, kv_on_cpu=False, ffn=where))

    assert {part: len(found) for part, found in counts.items()} == {"resident": 1, "missed": 1}
    assert min(counts["resident"]) == min(counts["missed"]) + 1
    assert min(counts["resident"]) == pytest.approx(NUM_TORCH_PASSES["dense"], abs=2)


def test_the_passes_over_a_divided_cache_are_counted_in_the_model(tmp_path: Path) -> None:
    """The GPU's part of attention, and the merge, which comes on top of the output's own."""
    counts: dict[str, list[int]] = defaultdict(list)
    perform = DecoderStep.perform

    def counted(step: DecoderStep, op: Op) -> None:
        with PassCounter() as counter:
            perform(step, op)
        if op.kind == "attention_output" or (op.kind == "attend" and op.part == "resident"):
            counts[op.kind].append(counter.num_passes)

    save_tiny_model("qwen3-moe", tmp_path, dtype=torch.bfloat16)
    plan = plan_of(tmp_path, kv_on_cpu=True, num_gpu_kv_tokens=16)
    with mock.patch.object(DecoderStep, "perform", counted):
        run(tmp_path, plan, prompt_len=20)

    merged = NUM_TORCH_PASSES["attention_output"] + NUM_MERGE_PASSES
    assert min(counts["attend"]) == pytest.approx(NUM_FRONT_PASSES, abs=2)
    assert min(counts["attention_output"]) == pytest.approx(merged, abs=2)


def test_the_copies_of_a_payload_are_counted_in_the_model(tmp_path: Path) -> None:
    """Uploads and downloads of a decode step in which the CPU attends and has the experts."""
    counts: dict[Payload, set[int]] = defaultdict(set)
    num_copies: list[int] = []
    perform, upload = DecoderStep.perform, EmulatedAccelerator.upload

    def counted_upload(accelerator: EmulatedAccelerator, source: Tensor) -> Tensor:
        num_copies.append(1)
        return upload(accelerator, source)

    def counted(step: DecoderStep, op: Op) -> None:
        num_copies.clear()
        perform(step, op)
        if op.payload is not None and step._tier.phase == "decode":
            counts[op.payload].add(len(num_copies))

    save_tiny_model("olmoe", tmp_path)
    plan = plan_of(tmp_path, kv_on_cpu=True, ffn=ON_CPU)
    with (
        mock.patch.object(DecoderStep, "perform", counted),
        mock.patch.object(EmulatedAccelerator, "upload", counted_upload),
    ):
        run(tmp_path, plan)

    divided = ModulePlacement(lives="cpu", runs="cpu", num_resident=4)
    save_tiny_model("mistral", tmp_path / "dense")
    plan = plan_of(tmp_path / "dense", kv_on_cpu=True, ffn=divided)
    with (
        mock.patch.object(DecoderStep, "perform", counted),
        mock.patch.object(EmulatedAccelerator, "upload", counted_upload),
    ):
        run(tmp_path / "dense", plan)

    assert counts == {
        payload: {num}
        for payload, num in NUM_COPIES.items()
        if payload not in ("weights", "hidden", "kv", "guess")
    }


def plan_of(
    folder: Path,
    *,
    kv_on_cpu: bool,
    ffn: ModulePlacement = ON_GPU,
    num_gpu_kv_tokens: int = 0,
) -> Plan:
    """A plan with all but the feed-forward on the GPU, and in decode perhaps the caches."""
    with LLM(folder, profile=toy_machine(), accelerator="emulated", strategy="gpu") as llm:
        plan, placement = llm.plan, llm.plan.placement
    layers = tuple(replace(layer, ffn=ffn) for layer in placement.decode.layers)
    if ffn.is_mixed:  # it is divided alike in all tiers
        prefill = replace(placement.prefill, strategy=MIXED, cut=0, layers=layers)
        placement = replace(placement, prefill=prefill)
    layers = tuple(
        replace(layer, kv_on_cpu=kv_on_cpu, num_gpu_kv_tokens=num_gpu_kv_tokens) for layer in layers
    )
    decode = replace(placement.decode, strategy=MIXED, cut=0, layers=layers)
    return replace(plan, placement=replace(placement, decode=decode))


def run(folder: Path, plan: Plan, prompt_len: int = 3) -> None:
    """Generate two tokens of one sequence, an op at a time."""
    greedy = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with LLM(folder, plan=plan, profile=toy_machine(), overlap=False) as llm:
        llm.generate([{"prompt_token_ids": list(range(3, 3 + prompt_len))}], greedy)


def test_the_links_of_an_op_on_the_cpu_are_counted_in_its_layers(tmp_path: Path) -> None:
    """Decode of one sequence; the embedding is torch's, as sampling is."""
    counts: dict[OpKind, set[int]] = defaultdict(set)

    def counted(ops: Sequence[Op], *args: Any) -> CpuRun:
        run = build_run(ops, *args)
        for op, num_links in zip(ops, np.diff(run.ends, prepend=0).tolist(), strict=True):
            counts[op.kind].add(num_links)
        return run

    greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    for name in ("qwen3-moe", "qwen3"):
        folder = tmp_path / name
        save_tiny_model(name, folder, dtype=torch.bfloat16)
        with (
            mock.patch("hetero.model.decoder.build_run", counted),
            LLM(folder, profile=toy_machine(), accelerator="none") as llm,
        ):
            llm.generate([{"prompt_token_ids": [3, 14, 15]}], greedy)

    # The experts' kernel is two links, and so is the attention's.
    expected = {
        kind: {num_kernels(kind) + (kind in ("attention", "experts", "dense"))} for kind in counts
    }
    assert counts == expected


def num_kernels(kind: OpKind) -> int:
    """Kernels that the cost model counts: launches of a second each, as none was measured."""
    cpu = replace(tiny_device("cpu", launch_s=1.0), torch_launch_s=0.0)
    machine = replace(tiny_machine(cpu=cpu), samples=())
    layer = {"dense": 0, "head": None}.get(kind, 1)
    op = Op(index=0, kind=kind, lane="cpu", layer=layer)
    cost = CostModel(machine).op_cost(op, tiny_spec("dm"), decode_shape(1, 3))
    return round(cost.by_resource.get("launch", 0.0))

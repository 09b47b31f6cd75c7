"""Loading weights: every tensor where the placement wants it, converted, shared where tied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from cpu_kernels.formats import unpack
from hetero import LLM, SamplingParams
from hetero.checkpoint import Checkpoint
from hetero.errors import MemoryBudgetError
from hetero.model.families import module_layout
from hetero.runtime.devices import EmulatedAccelerator
from hetero.runtime.weights import Weights, load_weights
from planner import strategies
from planner.kernels import Backend
from planner.model_spec import Dtype, ModelSpec, Module
from planner.placement import Placement
from tests.machines import toy_machine
from tests.tiny_models import TINY_MODELS, save_tiny_model, tiny_spec


def emulated(budget_bytes: int = 100_000_000) -> EmulatedAccelerator:
    return EmulatedAccelerator(budget_bytes=budget_bytes, link_bytes_per_s=50e9, latency_s=0.0)


def load(
    folder: Path, name: str, placement: Callable[[ModelSpec], Placement], dtype: Dtype = "float32"
) -> tuple[ModelSpec, Weights, EmulatedAccelerator]:
    spec = tiny_spec(save_tiny_model(name, folder))
    spec = replace(spec, dtype=dtype)
    accelerator = emulated()
    with Checkpoint.open(folder) as checkpoint:
        weights = load_weights(spec, checkpoint, placement(spec), accelerator)
    accelerator.close()
    return spec, weights, accelerator


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tensor_of_the_checkpoint_is_in_its_slot(name: str, tmp_path: Path) -> None:
    """Compared with what the safetensors library reads; streamed, so that the host has rows."""
    spec, weights, _ = load(
        tmp_path, name, lambda spec: strategies.placement(spec, "offload", spec.num_layers)
    )
    stored = load_file(tmp_path / "model.safetensors")
    seen = set()
    for index, layer in enumerate(spec.layers):
        for module in layer.modules:
            flat = weights.host_flat(module, index)
            for slot in module_layout(spec, module, index).slots:
                found = flat[slot.offset : slot.offset + slot.num_elements].view(slot.shape)
                torch.testing.assert_close(found, stored[slot.name], rtol=0, atol=0)
                seen.add(slot.name)

    head = weights.resident("gpu", "head")
    embedding = weights.resident("gpu" if spec.is_tied else "cpu", "embedding")
    outside = {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
    assert seen == set(stored) - outside
    torch.testing.assert_close(head["norm"], stored["model.norm.weight"], rtol=0, atol=0)
    matrix = stored["model.embed_tokens.weight" if spec.is_tied else "lm_head.weight"]
    torch.testing.assert_close(head["weight"], matrix, rtol=0, atol=0)
    assert (head["weight"].data_ptr() == embedding["weight"].data_ptr()) == spec.is_tied


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_the_cpu_alone_computes_is_packed(name: str, tmp_path: Path) -> None:
    """No rows stay beside the packed matrices, but for an embedding that no head shares."""
    spec, weights, _ = load(tmp_path, name, lambda spec: strategies.placement(spec, "cpu", 0))
    stored = load_file(tmp_path / "model.safetensors")
    packed_head = weights.packed("head")
    assert packed_head is not None
    matrix = packed_head.matrices["weight"]
    rows = unpack(matrix.blob, matrix.weight_format, matrix.num_rows, matrix.num_columns)
    name = "model.embed_tokens.weight" if spec.is_tied else "lm_head.weight"

    assert (rows == stored[name].numpy()).all()
    assert all(
        weights.packed(module, index) is not None
        for index, layer in enumerate(spec.layers)
        for module in layer.modules
    )
    if not spec.is_tied:
        embedding = weights.resident("cpu", "embedding")["weight"]
        torch.testing.assert_close(embedding, stored["model.embed_tokens.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_what_torch_is_faster_with_stays_in_rows(name: str, tmp_path: Path) -> None:
    """Chosen module by module; a tied head that is torch's shares the embedding's rows."""
    spec = tiny_spec(save_tiny_model(name, tmp_path))
    backends: dict[Module, Backend] = {"attention": "torch", "head": "torch", "dense": "numba"}
    with Checkpoint.open(tmp_path) as checkpoint:
        placement = strategies.placement(spec, "cpu", 0)
        weights = load_weights(spec, checkpoint, placement, None, backends=backends)
    stored = load_file(tmp_path / "model.safetensors")

    for index, layer in enumerate(spec.layers):
        for module in layer.modules:
            assert (weights.packed(module, index) is None) == (module == "attention")
        rows = weights.resident("cpu", "attention", index)["o"]
        expected = stored[f"model.layers.{index}.self_attn.o_proj.weight"]
        torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    assert weights.packed("head") is None
    head, embedding = (weights.resident("cpu", each)["weight"] for each in _ENDS)
    assert (head.data_ptr() == embedding.data_ptr()) == spec.is_tied


_ENDS: tuple[Module, ...] = ("head", "embedding")


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_torch_gives_the_tokens_of_our_kernels(name: str, tmp_path: Path) -> None:
    """By a profile in which torch is twice as fast, all is in rows; in float32 tokens are equal."""
    save_tiny_model(name, tmp_path)
    machine = toy_machine()
    # nothing but products takes time
    cpu = msgspec.structs.replace(
        machine.cpu, launch_s=0.0, read_bytes_per_s=1e12, elements_per_s=1e15
    )
    faster = tuple(
        msgspec.structs.replace(sample, backend="torch", seconds=sample.seconds / 2)
        for sample in machine.samples
    )
    fast = msgspec.structs.replace(
        machine, cpu_by_threads=(cpu,), samples=(*machine.samples, *faster)
    )
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    lines: list[str] = []
    tokens = []
    for profile in (machine, fast):
        with LLM(tmp_path, profile=profile, accelerator="none", progress=lines.append) as llm:
            (output,) = llm.generate([{"prompt_token_ids": [3, 14, 15, 9, 2]}], greedy)
            tokens.append(output.outputs[0].token_ids)

    assert tokens[0] == tokens[1]
    (told,) = (line for line in lines if "by torch" in line)
    assert told.endswith("head") and "attention" in told


def test_another_dtype_than_the_stored_one_is_rounded_once(tmp_path: Path) -> None:
    _, weights, _ = load(
        tmp_path, "qwen3", lambda spec: strategies.placement(spec, "gpu", 0), "bfloat16"
    )
    stored = load_file(tmp_path / "model.safetensors")
    norm = weights.resident("gpu", "head")["norm"]

    assert norm.dtype == torch.bfloat16
    torch.testing.assert_close(norm, stored["model.norm.weight"].bfloat16(), rtol=0, atol=0)


def test_the_accelerator_counts_its_weights_and_buffers(tmp_path: Path) -> None:
    """Offload of one of two layers: head, embedding and layer 0, and two buffers of layer 1."""
    spec, weights, accelerator = load(
        tmp_path, "mistral", lambda spec: strategies.placement(spec, "offload", 1)
    )

    def layer_elements(index: int) -> int:
        return sum(
            module_layout(spec, module, index).num_elements for module in ("attention", "dense")
        )

    expected = module_layout(spec, "head").num_elements + layer_elements(0) + 2 * layer_elements(1)
    assert accelerator.used_bytes == 4 * expected
    staged, views = weights.staged("dense", 1, 0, ("attention", "dense"))
    assert staged.numel() == module_layout(spec, "dense", 1).num_elements
    assert views["down"].shape == (60, 44)


def test_weights_beyond_the_budget_are_refused_while_loading(tmp_path: Path) -> None:
    spec = tiny_spec(save_tiny_model("llama", tmp_path))
    accelerator = emulated(budget_bytes=50_000)
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(MemoryBudgetError, match=r"budget is 0\.000 GB"),
    ):
        load_weights(spec, checkpoint, strategies.placement(spec, "gpu", 0), accelerator)
    accelerator.close()


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    spec = tiny_spec(save_tiny_model("olmoe", tmp_path))
    calls: list[tuple[int, int]] = []
    with Checkpoint.open(tmp_path) as checkpoint:
        load_weights(
            spec,
            checkpoint,
            strategies.placement(spec, "cpu", 0),
            None,
            lambda done, total: calls.append((done, total)),
        )

    assert calls == sorted(calls)
    assert calls[-1] == (spec.total_weight_bytes(), spec.total_weight_bytes())

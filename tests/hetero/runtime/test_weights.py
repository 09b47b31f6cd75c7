"""Loading weights: every tensor where the placement wants it, converted, shared where tied."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cpu_kernels.formats import unpack
from hetero import LLM, SamplingParams
from hetero.checkpoint import Checkpoint
from hetero.errors import MemoryBudgetError
from hetero.model.families import module_layout, views
from hetero.model.packed import rows_of_experts
from hetero.runtime.devices import EmulatedAccelerator
from hetero.runtime.pinned import PinnedArena
from hetero.runtime.weights import Weights, load_weights
from planner import strategies
from planner.kernels import Backend
from planner.memory import staging_bytes, weight_bytes
from planner.model_spec import Dtype, ModelSpec, Module
from planner.placement import ModulePlacement, Placement, Runs, TierPlacement
from planner.workload import Phase
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


@pytest.mark.parametrize("num_resident", [1, 6, 15])
def test_a_divided_feed_forward_has_each_column_once(tmp_path: Path, num_resident: int) -> None:
    """The first columns on the accelerator, the others in rows on the host: the checkpoint's."""
    where = ModulePlacement(lives="cpu", runs="stream", num_resident=num_resident)

    def divided(spec: ModelSpec) -> Placement:
        tiers = (strategies.gpu(spec, phase) for phase in ("prefill", "decode"))
        prefill, decode = (
            msgspec.structs.replace(
                tier, layers=tuple(msgspec.structs.replace(each, ffn=where) for each in tier.layers)
            )
            for tier in tiers
        )
        return Placement(prefill=prefill, decode=decode)

    spec, weights, accelerator = load(tmp_path, "mistral", divided)
    stored = load_file(tmp_path / "model.safetensors")
    for layer in range(spec.num_layers):
        parts = [weights.resident(device, "dense", layer) for device in ("gpu", "cpu")]
        of = f"model.layers.{layer}.mlp"
        for half, name in enumerate(("gate_proj", "up_proj")):
            rows = torch.cat([part["gate_up"].chunk(2)[half] for part in parts])
            assert torch.equal(rows, stored[f"{of}.{name}.weight"])
        columns = torch.cat([part["down"] for part in parts], dim=1)
        assert torch.equal(columns, stored[f"{of}.down_proj.weight"])
        assert len(parts[0]["gate_up"]) == 2 * (44 * num_resident // 16)
    staging = weights.staging(divided(spec).decode)
    assert staging.target("dense", 0, 0).nbytes >= spec.part_bytes("dense", 0, num_resident)[1]
    assert weight_bytes(spec, divided(spec), "gpu") <= accelerator.used_bytes


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
    staging = weights.staging(strategies.offload(spec, "decode", 1))
    target = staging.target("dense", 0, 1)
    assert target.nbytes == 4 * module_layout(spec, "dense", 0).num_elements
    assert staging.weights("dense", 0, 1)["down"].shape == (60, 44)


def mix(
    spec: ModelSpec, phase: Phase, runs: Runs, num_resident: int, num_slots: int = 0
) -> TierPlacement:
    """All on the GPU but for the experts, of which some are."""
    where = ModulePlacement(lives="cpu", runs=runs, num_resident=num_resident)
    gpu = strategies.gpu(spec, phase)
    layers = tuple(msgspec.structs.replace(layer, ffn=where) for layer in gpu.layers)
    return msgspec.structs.replace(gpu, layers=layers, num_expert_slots=num_slots)


def test_experts_lie_in_the_order_of_the_placement_on_both_devices(tmp_path: Path) -> None:
    """Two residents in one phase, one in the other: on the GPU the first two, packed the others."""
    order = ((3, 0, 4, 1, 2), (2, 4, 1, 0, 3))
    _, weights, _ = load(
        tmp_path,
        "olmoe",
        lambda spec: Placement(
            prefill=mix(spec, "prefill", "stream", 1),
            decode=mix(spec, "decode", "split", 2, num_slots=2),
            expert_order=order,
        ),
    )
    stored = load_file(tmp_path / "model.safetensors")
    for layer, experts in enumerate(order):
        resident = weights.resident("gpu", "experts", layer)
        packed = weights.packed("experts", layer)
        assert packed is not None and packed.experts is not None
        assert len(resident["down"]) == 2
        assert packed.experts.num_experts == 4  # all but the one that both phases have resident
        copies = torch.from_numpy(packed.experts.blob.copy()).view(4, -1)
        on_cpu = rows_of_experts(copies, packed.layout.weight_format, 44, 60)
        for found, numbers in ((resident, experts[:2]), (on_cpu, experts[1:])):
            for place, number in enumerate(numbers):
                prefix = f"model.layers.{layer}.mlp.experts.{number}"
                gate_up = [stored[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up")]
                down = stored[f"{prefix}.down_proj.weight"]
                torch.testing.assert_close(found["gate_up"][place], torch.cat(gate_up))
                torch.testing.assert_close(found["down"][place], down)


def test_a_module_that_one_phase_computes_and_one_streams_is_held_once(tmp_path: Path) -> None:
    """Packed, in memory that copies run from; what is only streamed is in rows there."""
    pinned: list[int] = []

    class Pinning(EmulatedAccelerator):
        def host_buffer(self, num_bytes: int) -> Tensor:
            found = super().host_buffer(num_bytes)
            pinned.append(found.data_ptr())
            return found

    spec = tiny_spec(save_tiny_model("qwen3-moe", tmp_path))
    both = Placement(
        prefill=strategies.offload(spec, "prefill", 2), decode=strategies.split(spec, "decode", 1)
    )
    accelerator = Pinning(budget_bytes=100_000_000, link_bytes_per_s=50e9, latency_s=0.0)
    with Checkpoint.open(tmp_path) as checkpoint:
        weights = load_weights(spec, checkpoint, both, accelerator)
    accelerator.close()

    for module in spec.layers[0].modules:
        packed = weights.packed(module, 0)
        assert packed is not None
        assert packed.flat.ctypes.data in pinned
    for module in spec.layers[1].modules:
        assert weights.packed(module, 1) is None
        assert weights.host_flat(module, 1).data_ptr() in pinned


def test_weights_are_whole_in_memory_of_which_a_part_cannot_be_pinned(tmp_path: Path) -> None:
    """Of several modules the first chunk is pinned, and all others are not."""
    arena = PinnedArena(lambda address, size: 2 if arena.pinned_bytes else 0, lambda address: None)

    class Refused(EmulatedAccelerator):
        def host_buffer(self, num_bytes: int) -> Tensor:
            return arena.take(num_bytes)

    spec = tiny_spec(save_tiny_model("llama", tmp_path))
    placement = strategies.placement(spec, "offload", spec.num_layers)
    found = []
    accelerators = [Refused(budget_bytes=10**8, link_bytes_per_s=50e9, latency_s=0.0), emulated()]
    with Checkpoint.open(tmp_path) as checkpoint:
        for accelerator in accelerators:
            found.append(load_weights(spec, checkpoint, placement, accelerator))
            accelerator.close()

    assert arena.pinned_bytes > 0 < arena.unpinned_bytes
    for layer, module in itertools.product(range(spec.num_layers), spec.layers[0].modules):
        layout = module_layout(spec, module, layer)
        refused, plain = (views(layout, each.host_flat(module, layer)) for each in found)
        torch.testing.assert_close(dict(refused), dict(plain), rtol=0, atol=0)


def test_nothing_is_staged_over_anything_else(tmp_path: Path) -> None:
    """Two layers that stream, in a buffer each, and two that split, in a half of the slots each."""

    def place(spec: ModelSpec) -> Placement:
        split = mix(spec, "decode", "split", 1, num_slots=6)
        stream = strategies.offload(spec, "decode", 2)
        decode = msgspec.structs.replace(split, layers=(*stream.layers[:2], *split.layers[2:]))
        return Placement(prefill=strategies.gpu(spec, "prefill"), decode=decode)

    spec = tiny_spec(save_tiny_model("olmoe", tmp_path, num_hidden_layers=4))
    accelerator = emulated()
    with Checkpoint.open(tmp_path) as checkpoint:
        placement = place(spec)
        weights = load_weights(spec, checkpoint, placement, accelerator)
    staging = weights.staging(placement.decode)
    accelerator.close()
    targets = [
        staging.target(module, layer, layer)
        for layer in (0, 1)
        for module in spec.layers[0].modules
    ]
    targets += [staging.slot(layer, layer - 2, slot) for layer in (2, 3) for slot in range(3)]

    ranges = sorted((target.data_ptr(), target.data_ptr() + target.nbytes) for target in targets)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (("stream", 3, 0), ("split", 3, 6)),
        (("split", 0, 2), ("stream", 5, 0)),
        (("cpu", 7, 0), ("split", 1, 4)),
    ],
)
def test_the_accelerator_holds_what_the_planner_counts(
    prefill: tuple[Runs, int, int], decode: tuple[Runs, int, int], tmp_path: Path
) -> None:
    """Residents, and the larger staging memory of both phases; shapes that need no padding."""
    shapes: Any = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4}
    spec = tiny_spec(
        save_tiny_model("olmoe", tmp_path, num_experts=16, num_key_value_heads=4, **shapes)
    )
    placement = Placement(
        prefill=mix(spec, "prefill", *prefill), decode=mix(spec, "decode", *decode)
    )
    accelerator = emulated()
    with Checkpoint.open(tmp_path) as checkpoint:
        load_weights(spec, checkpoint, placement, accelerator)
    accelerator.close()

    staged = max(staging_bytes(spec, placement.prefill), staging_bytes(spec, placement.decode))
    assert accelerator.used_bytes == weight_bytes(spec, placement, "gpu") + staged


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

"""Packed modules hold the numbers of the checkpoint, where the kernels look for them."""

# V vocabulary, D hidden

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.experts import expert_bytes
from cpu_kernels.formats import from_bfloat16_bits, to_bfloat16_bits, unpack
from cpu_kernels.linear import PackedMatrix
from hetero.errors import ModelFolderError
from hetero.model import packed as packed_module
from hetero.model.families import TensorSlot, module_layout
from hetero.model.packed import (
    PackedModule,
    embedding_rows,
    is_packable,
    pack_module,
    rows_of_experts,
    rows_of_module,
)
from planner.model_spec import ModelSpec, Module
from tests.hetero.model.packed import checkpoint_tensors, packed
from tests.tiny_models import TINY_MODELS, tiny_model, tiny_spec

DTYPES = [torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def array(tensor: Tensor) -> NDArray[Any]:
    """As the checkpoint reader gives it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    found: NDArray[Any] = tensor.numpy()
    return found


def modules(spec: ModelSpec) -> Iterator[tuple[Module, int | None]]:
    """All modules that can be packed."""
    for index, layer in enumerate(spec.layers):
        for module in layer.modules:
            yield module, index
    yield "head", None


def pack(
    spec: ModelSpec, tensors: dict[str, Tensor], module: Module, layer: int | None
) -> PackedModule:
    layout = module_layout(spec, module, layer)
    return pack_module(spec, module, layout, lambda slot: array(tensors[slot.name]), num_threads=2)


def unpacked(matrix: PackedMatrix) -> NDArray[np.float32]:
    """Its rows."""
    return unpack(matrix.blob, matrix.weight_format, matrix.num_rows, matrix.num_columns)


def vector(values: NDArray[Any]) -> NDArray[np.float32]:
    """A vector in the model's format as float32."""
    return from_bfloat16_bits(values) if values.dtype == np.uint16 else values


def expert_rows(packed: PackedModule) -> tuple[list[NDArray[np.float32]], ...]:
    """gate_up and down of every expert."""
    experts = packed.experts
    assert experts is not None
    size = expert_bytes(experts.weight_format, experts.hidden, experts.width)
    gate_bytes = experts.weight_format.packed_bytes(experts.width, experts.hidden)
    shapes = [(experts.width, experts.hidden)] * 2 + [(experts.hidden, experts.width)]
    starts = [0, gate_bytes, 2 * gate_bytes, size]
    gate_up, down = [], []
    for number in range(experts.num_experts):
        blob = experts.blob[number * size :][:size]
        gate, up, last = (
            unpack(blob[starts[part] : starts[part + 1]], experts.weight_format, *shapes[part])
            for part in range(3)
        )
        gate_up.append(np.concatenate([gate, up]))
        down.append(last)
    return gate_up, down


@pytest.mark.parametrize("name", TINY_MODELS)
@every_dtype
def test_every_module_holds_what_the_torch_layout_holds(name: str, dtype: torch.dtype) -> None:
    """Matrices joined from several tensors, experts one after the other, vectors, biases."""
    model = tiny_model(name, dtype=dtype)
    spec = tiny_spec(model)
    tensors = checkpoint_tensors(model, spec)
    for module, layer in modules(spec):
        found = pack(spec, tensors, module, layer)
        expected = {
            role: tensor.float().numpy()
            for role, tensor in packed(spec, tensors, module, layer).items()
        }
        roles = {*found.matrices, *found.vectors}
        if found.experts is not None:
            gate_up, down = expert_rows(found)
            shape = (len(gate_up), *gate_up[0].shape)
            np.testing.assert_array_equal(gate_up, expected["gate_up"].reshape(shape))
            np.testing.assert_array_equal(down, expected["down"].reshape(len(down), *down[0].shape))
            roles |= {"gate_up", "down"}
        for role, matrix in found.matrices.items():
            np.testing.assert_array_equal(unpacked(matrix), expected[role])
        for role, values in found.vectors.items():
            np.testing.assert_array_equal(vector(values), expected[role])
            is_float32 = dtype == torch.float32 or role.endswith("bias")
            assert values.dtype == (np.float32 if is_float32 else np.uint16), role
        assert roles == expected.keys(), module


@every_dtype
def test_blobs_begin_at_cache_lines(dtype: torch.dtype) -> None:
    """Kernels read whole lines, and writes past the caches need it."""
    model = tiny_model("mixtral", dtype=dtype)
    spec = tiny_spec(model)
    for module, layer in modules(spec):
        found = pack(spec, checkpoint_tensors(model, spec), module, layer)
        blobs = [matrix.blob for matrix in found.matrices.values()]
        blobs += [found.experts.blob] if found.experts is not None else []
        assert blobs
        assert all(blob.ctypes.data % 64 == 0 for blob in blobs)


@pytest.mark.parametrize("checkpoint", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_dtype
def test_a_checkpoint_may_be_in_another_format(checkpoint: torch.dtype, dtype: torch.dtype) -> None:
    """Its values are rounded once, to nearest."""
    model = tiny_model("qwen2")
    spec = tiny_spec(model)
    spec = replace(spec, dtype="float32" if dtype == torch.float32 else "bfloat16")
    tensors = {name: t.to(checkpoint) for name, t in checkpoint_tensors(model, spec).items()}

    found = pack(spec, tensors, "attention", 0)

    def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values if dtype == torch.float32 else from_bfloat16_bits(to_bfloat16_bits(values))

    expected = {
        role: tensor.float().numpy()
        for role, tensor in packed(spec, tensors, "attention", 0).items()
    }
    for role, matrix in found.matrices.items():
        np.testing.assert_array_equal(unpacked(matrix), rounded(expected[role]))
    np.testing.assert_array_equal(
        vector(found.vectors["input_norm"]), rounded(expected["input_norm"])
    )
    # kernels add biases in float32
    np.testing.assert_array_equal(found.vectors["qkv_bias"], expected["qkv_bias"])


@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
@every_dtype
def test_embeddings_are_rows_of_a_tied_head(name: str, dtype: torch.dtype) -> None:
    """The first and the last row, one twice, none."""
    model = tiny_model(name, dtype=dtype)
    spec = tiny_spec(model)
    matrix = pack(spec, checkpoint_tensors(model, spec), "head", None).matrices["weight"]
    for ids in ([0], [100, 7, 16, 15, 7], []):
        token_ids_T = torch.tensor(ids, dtype=torch.int64)

        rows_TD = embedding_rows(matrix, token_ids_T)

        expected = model.model.embed_tokens(token_ids_T)
        assert rows_TD.dtype == dtype
        assert rows_TD.is_contiguous()
        torch.testing.assert_close(rows_TD, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("piece_bytes", [64 << 20, 1])
@every_dtype
def test_copies_of_packed_modules_become_rows(
    monkeypatch: pytest.MonkeyPatch, name: str, piece_bytes: int, dtype: torch.dtype
) -> None:
    """What torch's layout has, turned at once or piece by piece; shapes that divide by nothing."""
    monkeypatch.setattr(packed_module, "_PIECE_BYTES", piece_bytes)
    model = tiny_model(name, dtype=dtype)
    spec = tiny_spec(model)
    tensors = checkpoint_tensors(model, spec)
    for module, layer in modules(spec):
        found = pack(spec, tensors, module, layer)

        rows = rows_of_module(found.layout, torch.from_numpy(found.flat.copy()), dtype)

        expected = packed(spec, tensors, module, layer)
        assert rows.keys() == expected.keys()
        for role, tensor in rows.items():
            assert tensor.dtype == dtype
            torch.testing.assert_close(tensor, expected[role], rtol=0, atol=0)


@every_dtype
def test_experts_in_slots_become_rows_where_they_lie(dtype: torch.dtype) -> None:
    """In slots that are larger than they; of whole panels nothing is copied elsewhere."""
    model = tiny_model(
        "olmoe",
        dtype=dtype,
        hidden_size=64,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    spec = tiny_spec(model)
    tensors = checkpoint_tensors(model, spec)
    found = pack(spec, tensors, "experts", 1)
    experts = found.experts
    assert experts is not None
    copies_EB = torch.from_numpy(experts.blob.copy()).view(experts.num_experts, -1)
    slots_SB = torch.zeros(experts.num_experts, copies_EB.shape[1] + 128, dtype=torch.uint8)
    slots_SB[:, : copies_EB.shape[1]] = copies_EB

    rows = rows_of_experts(slots_SB[:3], experts.weight_format, experts.width, experts.hidden)

    expected = packed(spec, tensors, "experts", 1)
    memory = range(slots_SB.data_ptr(), slots_SB.data_ptr() + slots_SB.nbytes)
    for role, tensor in rows.items():
        torch.testing.assert_close(tensor, expected[role][:3], rtol=0, atol=0)
        assert tensor.data_ptr() in memory


def test_what_the_reader_raises_is_passed_on() -> None:
    """A damaged checkpoint is the user's to mend."""
    spec = tiny_spec(tiny_model("llama"))

    def read(slot: TensorSlot) -> NDArray[Any]:
        raise ModelFolderError(f"{slot.name} is cut short")

    with pytest.raises(ModelFolderError, match="cut short"):
        pack_module(spec, "attention", module_layout(spec, "attention", 0), read, num_threads=1)


def test_weights_are_read_and_packed_where_memory_is_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that a module's loading touches first, on machines with several NUMA nodes."""
    model = tiny_model("mixtral")
    spec = tiny_spec(model)
    tensors = checkpoint_tensors(model, spec)
    is_spread = False

    @contextmanager
    def spread() -> Iterator[bool]:
        nonlocal is_spread
        is_spread = True
        yield True
        is_spread = False

    def read(slot: TensorSlot) -> NDArray[Any]:
        assert is_spread
        return array(tensors[slot.name])

    def pack_here(*arguments: Any, num_threads: int) -> None:
        assert is_spread
        packings.append(arguments)

    packings: list[tuple[Any, ...]] = []
    monkeypatch.setattr(packed_module, "interleaved_memory", spread)
    monkeypatch.setattr(packed_module, "pack_into", pack_here)
    for module, layer in modules(spec):
        pack_module(spec, module, module_layout(spec, module, layer), read, num_threads=1)
        assert not is_spread
    assert packings


def test_models_in_float16_are_not_packed() -> None:
    """Few CPUs multiply it."""
    spec = tiny_spec(tiny_model("llama"))
    packable = [is_packable(replace(spec, dtype=d)) for d in ("float32", "bfloat16", "float16")]
    assert packable == [True, True, False]

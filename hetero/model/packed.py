"""Packed modules: weights of the layers that only the CPU computes, as its kernels read them."""

# D hidden, I feed-forward width, E experts, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.experts import PackedExperts, expert_bytes
from cpu_kernels.formats import PANEL_ROWS, WeightFormat, num_panels
from cpu_kernels.linear import PackedMatrix
from cpu_kernels.microkernels import load_kernels
from cpu_kernels.numa import interleaved_memory
from cpu_kernels.packing import pack_into
from cpu_kernels.scratch import aligned_bytes
from hetero.errors import ModelFolderError
from hetero.model.families import ModuleLayout, TensorSlot, ViewSpec
from planner.model_spec import QUANTIZATION_GROUP, ModelSpec, Module

# Reads a tensor of the checkpoint, in the format it is stored in: float32, float16, or the bits of
# bfloat16 as uint16.
ReadTensor = Callable[[TensorSlot], NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedModule:
    """One module: matrices by role, the experts of an expert layer, and vectors by role.

    Vectors are in the model's format (bfloat16 as uint16), biases in float32, which the kernels
    add them in.
    """

    matrices: dict[str, PackedMatrix]
    experts: PackedExperts | None
    vectors: dict[str, NDArray[Any]]


def is_packable(spec: ModelSpec) -> bool:
    """Do the CPU kernels have the model's format? Not float16, which few CPUs multiply."""
    return spec.dtype in ("float32", "bfloat16")


def weight_format(spec: ModelSpec, module: Module) -> WeightFormat:
    """How the kernels read a module's matrices."""
    kind = spec.weight_kind(module)
    assert kind != "float16"
    is_quantised = kind in ("int8", "int4")
    return WeightFormat(kind=kind, group_size=QUANTIZATION_GROUP if is_quantised else None)


def pack_module(
    spec: ModelSpec, module: Module, layout: ModuleLayout, read: ReadTensor, num_threads: int
) -> PackedModule:
    """Read a module's tensors and pack them; of the rest of the model nothing is held twice.

    On a machine with several NUMA nodes what this thread packs is spread over all of them.

    Raises
    ------
    ModelFolderError
        As `read` does, or weights that are not finite cannot be quantised.
    """
    # Around the reading too: memory of what was read is used again for what is packed.
    with interleaved_memory():
        return _pack_module(spec, module, layout, read, num_threads)


def _pack_module(
    spec: ModelSpec, module: Module, layout: ModuleLayout, read: ReadTensor, num_threads: int
) -> PackedModule:
    format_ = weight_format(spec, module)
    matrices: dict[str, PackedMatrix] = {}
    vectors: dict[str, NDArray[Any]] = {}
    if module in ("experts", "dense") and not spec.has_mlp_bias:
        return PackedModule(
            matrices={},
            experts=_pack_experts(spec, module, layout, format_, read, vectors, num_threads),
            vectors=vectors,
        )
    for view in layout.views:
        slots = _slots_of(layout, view)
        if len(view.shape) == 1:
            vectors[view.role] = _read_vector(spec, view, slots, read)
            continue
        parts = [read(slot) for slot in slots]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        load_kernels(format_)
        blob = aligned_bytes(format_.packed_bytes(*view.shape))
        _pack(rows, format_, blob, slots[0].name, num_threads)
        matrices[view.role] = PackedMatrix(
            blob=blob, weight_format=format_, num_rows=view.shape[0], num_columns=view.shape[1]
        )
    return PackedModule(matrices=matrices, experts=None, vectors=vectors)


def _pack_experts(
    spec: ModelSpec,
    module: Module,
    layout: ModuleLayout,
    format_: WeightFormat,
    read: ReadTensor,
    vectors: dict[str, NDArray[Any]],
    num_threads: int,
) -> PackedExperts:
    """Experts one after the other; a dense feed-forward is an expert that every token chooses."""
    slots = [slot for slot in layout.slots if len(slot.shape) == 2]
    num_experts, width = len(slots) // 3, slots[0].shape[0]
    size = expert_bytes(format_, spec.hidden_size, width)
    blob = aligned_bytes(num_experts * size)
    at = 0
    for slot in slots:  # gate, up and down of expert 0, of expert 1, ...
        end = at + format_.packed_bytes(*slot.shape)
        _pack(read(slot), format_, blob[at:end], slot.name, num_threads)
        at = end
    assert at == len(blob), (module, at, len(blob))
    for view in layout.views:
        if len(view.shape) == 1:
            vectors[view.role] = _read_vector(spec, view, _slots_of(layout, view), read)
    return PackedExperts(
        blob=blob,
        weight_format=format_,
        num_experts=num_experts,
        hidden=spec.hidden_size,
        width=width,
    )


def _pack(
    rows: NDArray[Any],
    format_: WeightFormat,
    blob: NDArray[np.uint8],
    name: str,
    num_threads: int,
) -> None:
    try:
        pack_into(rows, format_, blob, num_threads=num_threads)
    except ValueError as error:  # weights that no scale can hold
        raise ModelFolderError(f"{name}: {error}; run without --quantization") from None


def _slots_of(layout: ModuleLayout, view: ViewSpec) -> list[TensorSlot]:
    """The tensors that are joined in a view of contiguous rows."""
    count = view.shape[0] * (view.shape[1] if len(view.shape) == 2 else 1)
    return [slot for slot in layout.slots if view.offset <= slot.offset < view.offset + count]


def _read_vector(
    spec: ModelSpec, view: ViewSpec, slots: list[TensorSlot], read: ReadTensor
) -> NDArray[Any]:
    joined = np.concatenate([_as_float32(read(slot)) for slot in slots])
    if spec.dtype == "float32" or view.role.endswith("bias"):
        return joined
    return torch.from_numpy(joined).to(torch.bfloat16).view(torch.uint16).numpy()


def _as_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored).view(torch.bfloat16).float().numpy()
    return stored.astype(np.float32)


def embedding_rows(matrix: PackedMatrix, token_ids_T: Tensor) -> Tensor:
    """Rows of a packed embedding matrix, x_TD: where a tied head is packed, there is no other."""
    is_float32 = matrix.weight_format.kind == "float32"
    per_step = matrix.weight_format.columns_per_step
    dtype = torch.float32 if is_float32 else torch.bfloat16
    panels_NSRC = (
        torch.from_numpy(matrix.blob)
        .view(dtype)
        .view(num_panels(matrix.num_rows), -1, PANEL_ROWS, per_step)
    )
    rows = panels_NSRC[token_ids_T // PANEL_ROWS, :, token_ids_T % PANEL_ROWS]
    return rows.flatten(1)[:, : matrix.num_columns].contiguous()

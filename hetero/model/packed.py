"""Packed modules: weights of the layers that the CPU computes, as its kernels read them.

A packed module is one run of bytes, so that a copy of it is a copy of the module. The GPU turns the
panels of such a copy into rows before it computes, but for quantised ones (quantised.py).
"""

# D hidden, I feed-forward width, E experts, V vocabulary, R rows, K columns, B bytes

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.experts import PackedExperts, expert_bytes
from cpu_kernels.formats import PANEL_ROWS, STEP_BYTES, WeightFormat, num_panels
from cpu_kernels.linear import PackedMatrix
from cpu_kernels.microkernels import load_kernels
from cpu_kernels.numa import interleaved_memory
from cpu_kernels.packing import pack_into
from cpu_kernels.scratch import ALIGNMENT, aligned_bytes
from hetero.errors import ModelFolderError
from hetero.model.families import ModuleLayout, TensorSlot, ViewSpec
from hetero.model.quantised import Panels, QuantisedWeights
from planner.model_spec import QUANTIZATION_GROUP, ModelSpec, Module

# Reads a tensor of the checkpoint, in the format it is stored in: float32, float16, or the bits of
# bfloat16 as uint16.
ReadTensor = Callable[[TensorSlot], NDArray[Any]]
# Gives so many bytes that begin at a cache line.
Allocate = Callable[[int], NDArray[np.uint8]]

# The role of all matrices of an expert layer, or of a dense layer that is one expert of its own.
_EXPERTS = "experts"
# Panels are turned into rows in pieces of this size at most, each of which needs as much again.
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPart:
    """Where a role lies: a matrix (R, K) in panels, a vector, or experts (E, I, D)."""

    role: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """One packed module as bytes; every part begins at a cache line."""

    module: Module
    weight_format: WeightFormat
    parts: tuple[PackedPart, ...]

    @property
    def num_bytes(self) -> int:
        last = self.parts[-1]
        return _whole_lines(last.offset + last.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedModule:
    """One module: matrices by role, the experts of an expert layer, and vectors by role.

    Vectors are in the model's format (bfloat16 as uint16), biases in float32, which the kernels
    add them in. All lie in `flat`, as `layout` says.
    """

    layout: PackedLayout
    flat: NDArray[np.uint8]
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


def packed_layout(spec: ModelSpec, module: Module, layout: ModuleLayout) -> PackedLayout:
    """Where the roles of a module lie once it is packed; `layout` is how it lies in rows."""
    format_ = weight_format(spec, module)
    parts: list[PackedPart] = []

    def append(role: str, num_bytes: int, shape: tuple[int, ...]) -> None:
        end = parts[-1].offset + parts[-1].num_bytes if parts else 0
        part = PackedPart(role=role, offset=_whole_lines(end), num_bytes=num_bytes, shape=shape)
        parts.append(part)

    are_experts = module in ("experts", "dense") and not spec.has_mlp_bias
    if are_experts:
        matrices = [slot for slot in layout.slots if len(slot.shape) == 2]
        num_experts, (width, hidden) = len(matrices) // 3, matrices[0].shape
        num_bytes = num_experts * expert_bytes(format_, hidden, width)
        append(_EXPERTS, num_bytes, (num_experts, width, hidden))
    for view in layout.views:
        if len(view.shape) == 1:
            append(view.role, view.shape[0] * _vector_type(spec, view.role).itemsize, view.shape)
        elif not are_experts:
            append(view.role, format_.packed_bytes(*view.shape), view.shape)
    return PackedLayout(module=module, weight_format=format_, parts=tuple(parts))


def pack_module(
    spec: ModelSpec,
    module: Module,
    layout: ModuleLayout,
    read: ReadTensor,
    num_threads: int,
    allocate: Allocate = aligned_bytes,
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
        packing = packed_layout(spec, module, layout)
        flat = allocate(packing.num_bytes)
        found = _unfilled(spec, packing, flat)
        load_kernels(packing.weight_format)
        _fill(spec, layout, found, read, num_threads)
    return found


def _unfilled(spec: ModelSpec, layout: PackedLayout, flat: NDArray[np.uint8]) -> PackedModule:
    """The roles of a packed module in memory that holds anything yet."""
    format_ = layout.weight_format
    matrices: dict[str, PackedMatrix] = {}
    vectors: dict[str, NDArray[Any]] = {}
    experts = None
    for part in layout.parts:
        memory = flat[part.offset : part.offset + part.num_bytes]
        if part.role == _EXPERTS:
            num_experts, width, hidden = part.shape
            experts = PackedExperts(
                blob=memory,
                weight_format=format_,
                num_experts=num_experts,
                hidden=hidden,
                width=width,
            )
        elif len(part.shape) == 1:
            vectors[part.role] = memory.view(_vector_type(spec, part.role))
        else:
            num_rows, num_columns = part.shape
            matrices[part.role] = PackedMatrix(
                blob=memory, weight_format=format_, num_rows=num_rows, num_columns=num_columns
            )
    return PackedModule(
        layout=layout, flat=flat, matrices=matrices, experts=experts, vectors=vectors
    )


def _fill(
    spec: ModelSpec, layout: ModuleLayout, found: PackedModule, read: ReadTensor, num_threads: int
) -> None:
    """Read and pack every role."""
    format_ = found.layout.weight_format
    if found.experts is not None:
        at = 0
        # gate, up and down of expert 0, of expert 1, ...
        for slot in layout.slots:
            if len(slot.shape) == 2:
                end = at + format_.packed_bytes(*slot.shape)
                _pack(read(slot), format_, found.experts.blob[at:end], slot.name, num_threads)
                at = end
        assert at == len(found.experts.blob), (found.layout.module, at)
    for view in layout.views:
        slots = _slots_of(layout, view)
        if view.role in found.vectors:
            found.vectors[view.role][:] = _read_vector(spec, view, slots, read)
        elif view.role in found.matrices:
            parts = [read(slot) for slot in slots]
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
            _pack(rows, format_, found.matrices[view.role].blob, slots[0].name, num_threads)


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
    if _vector_type(spec, view.role) == np.float32:
        return joined
    return torch.from_numpy(joined).to(torch.bfloat16).view(torch.uint16).numpy()


def _vector_type(spec: ModelSpec, role: str) -> np.dtype[Any]:
    is_float32 = spec.dtype == "float32" or role.endswith("bias")
    return np.dtype(np.float32 if is_float32 else np.uint16)


def _as_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored).view(torch.bfloat16).float().numpy()
    return stored.astype(np.float32)


def embedding_rows(matrix: PackedMatrix, token_ids_T: Tensor) -> Tensor:
    """Rows of a packed embedding matrix, x_TD: where a tied head is packed, there is no other."""
    blob = torch.from_numpy(matrix.blob)
    panels_NSRC = _panels(blob, matrix.weight_format, matrix.num_rows, matrix.num_columns)
    rows = panels_NSRC[token_ids_T // PANEL_ROWS, :, token_ids_T % PANEL_ROWS]
    return rows.flatten(1)[:, : matrix.num_columns].contiguous()


def quantised_module(layout: PackedLayout, flat_B: Tensor, dtype: torch.dtype) -> QuantisedWeights:
    """The roles of a copy of a quantised module as the GPU's kernels read them, where they lie."""
    format_ = layout.weight_format
    vectors: dict[str, Tensor] = {}
    panels: dict[str, Panels] = {}
    for part in layout.parts:
        memory = flat_B[part.offset : part.offset + part.num_bytes]
        if part.role == _EXPERTS:
            num_experts, width, hidden = part.shape
            panels |= quantised_experts(memory.view(num_experts, -1), format_, width, hidden).panels
        elif len(part.shape) == 1:
            vectors[part.role] = _vector(part, memory, dtype)
        else:
            panels[part.role] = Panels(
                blobs_EB=memory[None],
                weight_format=format_,
                num_matrices=1,
                num_rows=part.shape[0],
                num_columns=part.shape[1],
            )
    return QuantisedWeights(vectors, panels)


def quantised_experts(
    experts_EB: Tensor, format_: WeightFormat, width: int, hidden: int
) -> QuantisedWeights:
    """The same of copies of packed experts, one in each row."""
    gate_up_bytes = 2 * format_.packed_bytes(width, hidden)
    gate_up = Panels(
        blobs_EB=experts_EB[:, :gate_up_bytes],
        weight_format=format_,
        num_matrices=2,
        num_rows=width,
        num_columns=hidden,
    )
    down = Panels(
        blobs_EB=experts_EB[:, gate_up_bytes : expert_bytes(format_, hidden, width)],
        weight_format=format_,
        num_matrices=1,
        num_rows=hidden,
        num_columns=width,
    )
    return QuantisedWeights({}, {"gate_up": gate_up, "down": down})


def _vector(part: PackedPart, memory: Tensor, dtype: torch.dtype) -> Tensor:
    """A vector of a copy in the format of the model."""
    is_float32 = part.num_bytes == 4 * part.shape[0]
    return memory.view(torch.float32 if is_float32 else dtype).to(dtype)


def rows_of_module(layout: PackedLayout, flat_B: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The roles of a copy of a packed module in rows, as torch computes with them.

    Panels are turned into rows in place: this is done once for each copy.
    """
    format_ = layout.weight_format
    found: dict[str, Tensor] = {}
    for part in layout.parts:
        memory = flat_B[part.offset : part.offset + part.num_bytes]
        if part.role == _EXPERTS:
            num_experts, width, hidden = part.shape
            experts = rows_of_experts(memory.view(num_experts, -1), format_, width, hidden)
            is_dense = layout.module == "dense"
            found |= {role: rows[0] if is_dense else rows for role, rows in experts.items()}
        elif len(part.shape) == 1:
            found[part.role] = _vector(part, memory, dtype)
        else:
            found[part.role] = _rows_in_place(memory[None], format_, *part.shape)[0]
    return found


def rows_of_experts(
    experts_EB: Tensor, format_: WeightFormat, width: int, hidden: int
) -> dict[str, Tensor]:
    """The roles of copies of packed experts, one in each row, turned in place as above.

    Only where the width is no multiple of a panel are gate and up copied to lie side by side.
    """
    gate_bytes, size = format_.packed_bytes(width, hidden), expert_bytes(format_, hidden, width)
    gate_up = experts_EB[:, : 2 * gate_bytes].unflatten(1, (2, gate_bytes))
    down = experts_EB[:, 2 * gate_bytes : size]
    return {
        "gate_up": _rows_in_place(gate_up, format_, width, hidden).flatten(1, 2),
        "down": _rows_in_place(down, format_, hidden, width),
    }


def _rows_in_place(blobs: Tensor, format_: WeightFormat, num_rows: int, num_columns: int) -> Tensor:
    """Rows (..., R, K) of packed matrices (..., B): 16 rows take the bytes of their panel."""
    panels = _panels(blobs, format_, num_rows, num_columns)
    for some in _pieces(panels):
        rows = some.transpose(-3, -2).contiguous()
        some.flatten(-3).copy_(rows.flatten(-3))
    padded: Tensor = panels.flatten(-3).unflatten(-1, (PANEL_ROWS, -1)).flatten(-3, -2)
    return padded[..., :num_rows, :num_columns]


def _panels(blobs: Tensor, format_: WeightFormat, num_rows: int, num_columns: int) -> Tensor:
    """Packed matrices as (..., panels, steps, 16 rows, columns of a step)."""
    dtype = torch.float32 if format_.kind == "float32" else torch.bfloat16
    num_steps = format_.panel_bytes(num_columns) // STEP_BYTES
    shape = (num_panels(num_rows), num_steps, PANEL_ROWS, format_.columns_per_step)
    panels: Tensor = blobs.view(dtype).unflatten(-1, shape)
    return panels


def _pieces(panels: Tensor) -> Iterator[Tensor]:
    """Panels cut along their first dimensions into pieces of no more than `_PIECE_BYTES`."""
    if panels.nbytes <= _PIECE_BYTES or panels.dim() == 3:
        yield panels
    elif len(panels) == 1:
        yield from _pieces(panels[0])
    else:
        num_fitting = max(1, _PIECE_BYTES * len(panels) // panels.nbytes)
        for some in panels.split(num_fitting):
            yield from _pieces(some)


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT

"""Packed module weights taken from a transformers model, without the checkpoint reader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetero.model.families import ModuleLayout, module_layout, views
from planner.model_spec import ModelSpec, Module


def fill(layout: ModuleLayout, tensors: dict[str, Tensor]) -> Tensor:
    """The flat buffer of a module; padding is NaN, so that nobody reads it unnoticed."""
    dtype = next(iter(tensors.values())).dtype
    flat = torch.full((layout.num_elements,), float("nan"), dtype=dtype)
    for slot in layout.slots:
        assert tuple(tensors[slot.name].shape) == slot.shape, slot.name
        flat[slot.offset : slot.offset + slot.num_elements] = tensors[slot.name].flatten()
    return flat


def packed(
    spec: ModelSpec, tensors: dict[str, Tensor], module: Module, layer: int | None = None
) -> dict[str, Tensor]:
    """One module's views, by role."""
    layout = module_layout(spec, module, layer)
    return views(layout, fill(layout, tensors))


def checkpoint_tensors(model: Any, spec: ModelSpec) -> dict[str, Tensor]:
    """A model's weights under their checkpoint names, its fused experts taken apart."""
    tensors: dict[str, Tensor] = {}
    is_mixtral = spec.architecture == "MixtralForCausalLM"
    block = "block_sparse_moe" if is_mixtral else "mlp"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in model.state_dict().items():
        name = name.replace(".mlp.", f".{block}.")
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(tensor):
            if kind == "down_proj":
                tensors[f"{prefix}.{expert}.{down}.weight"] = matrix
            else:
                gate_rows, up_rows = matrix.chunk(2)
                tensors[f"{prefix}.{expert}.{gate}.weight"] = gate_rows
                tensors[f"{prefix}.{expert}.{up}.weight"] = up_rows
    return tensors

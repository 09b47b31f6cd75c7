"""Host copies: what the host has of the modules that are copied to the accelerator."""

# B bytes, E experts

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cpu_kernels.formats import WeightFormat
from hetero.model.families import (
    TORCH_DTYPES,
    ModuleLayout,
    expert_views,
    module_layout,
    views,
)
from hetero.model.packed import (
    PackedLayout,
    PackedModule,
    quantised_experts,
    quantised_module,
    rows_of_experts,
    rows_of_module,
)
from hetero.runtime.homes import Homes
from planner.model_spec import ModelSpec, Module

ModuleKey = tuple[Module, int | None]
ModuleWeights = Mapping[str, Tensor]


class HostCopy(Protocol):
    """What the host has of a module that is copied to the accelerator."""

    @property
    def flat_B(self) -> Tensor:
        """All of it; copies run from it at the link's full rate."""

    @property
    def is_turned(self) -> bool:
        """Are its panels turned into rows in each copy? Those of quantised weights are not."""

    def weights(self, copy_B: Tensor) -> ModuleWeights:
        """The tensors in a copy, to be asked for once where it is turned into rows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostModule:
    """A module as far as the host has it, in rows or packed."""

    flat_B: Tensor
    dtype: torch.dtype
    layout: ModuleLayout | PackedLayout

    @property
    def is_turned(self) -> bool:
        return isinstance(self.layout, PackedLayout) and not self.layout.weight_format.is_quantised

    def weights(self, copy_B: Tensor) -> ModuleWeights:
        if isinstance(self.layout, PackedLayout):
            read = rows_of_module if self.is_turned else quantised_module
            return read(self.layout, copy_B, self.dtype)
        return views(self.layout, copy_B.view(self.dtype))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostExperts:
    """Experts of a layer, each a row of bytes; `packed_format` is None where they lie in rows."""

    spec: ModelSpec
    layer: int
    dtype: torch.dtype
    experts_EB: Tensor
    packed_format: WeightFormat | None

    @property
    def flat_B(self) -> Tensor:
        return self.experts_EB.view(-1)

    @property
    def is_turned(self) -> bool:
        return self.packed_format is not None and not self.packed_format.is_quantised

    @property
    def expert_bytes(self) -> int:
        return self.experts_EB.shape[1]

    def without_first(self, count: int) -> HostExperts:
        """All but the first `count`."""
        return replace(self, experts_EB=self.experts_EB[count:])

    def weights(self, copy_B: Tensor) -> ModuleWeights:
        return self.weights_of(copy_B.view(-1, self.expert_bytes))

    def weights_of(self, copies_EB: Tensor) -> ModuleWeights:
        """The tensors in copies of some experts, to be asked for once."""
        if self.packed_format is None:
            return expert_views(self.spec, self.layer, copies_EB.view(self.dtype))
        width, hidden = self.spec.layers[self.layer].intermediate_size, self.spec.hidden_size
        read = rows_of_experts if self.is_turned else quantised_experts
        return read(copies_EB, self.packed_format, width, hidden)


@dataclass(frozen=True, slots=True, eq=False)
class HostCopies:
    """What the host has of all modules, in rows or packed, as staging copies from it."""

    spec: ModelSpec
    homes: Homes
    rows: Mapping[ModuleKey, Tensor]
    packed: Mapping[ModuleKey, PackedModule]

    def copy(self, module: Module, layer: int, num_resident: int) -> HostCopy:
        """What a tier with so many residents streams of a layer's module."""
        if module == "experts":
            first_on_cpu = self.homes.experts[layer].first("cpu", num_resident)
            return self.experts(layer).without_first(num_resident - first_on_cpu)
        dtype, packed = TORCH_DTYPES[self.spec.dtype], self.packed.get((module, layer))
        if packed is not None:
            flat = torch.from_numpy(packed.flat)
            return HostModule(flat_B=flat, dtype=dtype, layout=packed.layout)
        columns = self.homes.columns(layer, "cpu") if module == "dense" else None
        layout = module_layout(self.spec, module, layer, columns=columns)
        flat = self.rows[module, layer].view(torch.uint8)
        return HostModule(flat_B=flat, dtype=dtype, layout=layout)

    def experts(self, layer: int) -> HostExperts:
        """Those of a layer that are on the CPU."""
        packed, count = self.packed.get(("experts", layer)), self.homes.experts[layer].num_on_cpu
        if packed is not None:
            assert packed.experts is not None
            flat = torch.from_numpy(packed.experts.blob)
        else:
            num_bytes = count * self.spec.expert_bytes(layer)
            flat = self.rows["experts", layer].view(torch.uint8)[:num_bytes]
        return HostExperts(
            spec=self.spec,
            layer=layer,
            dtype=TORCH_DTYPES[self.spec.dtype],
            experts_EB=flat.view(count, -1),
            packed_format=None if packed is None else packed.layout.weight_format,
        )

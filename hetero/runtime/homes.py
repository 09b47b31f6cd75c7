"""Homes: which experts, and which columns of a feed-forward, lie on which device."""

# E experts of the layer

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.experts import NO_EXPERT
from planner.model_spec import ModelSpec
from planner.placement import Device, Placement
from planner.step_graph import Part

# Memories that hold experts; `staging` has those that are streamed, all that are not resident.
ExpertPlace = Literal["gpu", "cpu", "staging"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertHomes:
    """One layer: the GPU has the first `num_on_gpu` of `order`, the CPU the last `num_on_cpu`."""

    order: tuple[int, ...]
    num_on_gpu: int
    num_on_cpu: int

    @classmethod
    def of(cls, spec: ModelSpec, placement: Placement, layer: int) -> ExpertHomes:
        """As a placement has it; layers without residents keep the order of the model."""
        has_residents = any(tier.layers[layer].ffn.num_resident for tier in placement.tiers)
        order = placement.order_of_experts(spec, layer) if has_residents else None
        return cls(
            order=order or tuple(range(spec.layers[layer].num_experts)),
            num_on_gpu=placement.num_resident(spec, layer),
            num_on_cpu=placement.num_on_cpu(spec, layer),
        )

    @property
    def on_gpu(self) -> tuple[int, ...]:
        return self.order[: self.num_on_gpu]

    @property
    def on_cpu(self) -> tuple[int, ...]:
        return self.order[len(self.order) - self.num_on_cpu :]

    def first(self, place: ExpertPlace, num_resident: int) -> int:
        """Position in the order of what a place has first, for a tier with so many residents."""
        on_cpu = len(self.order) - self.num_on_cpu
        return {"gpu": 0, "cpu": on_cpu, "staging": num_resident}[place]

    def count(self, place: ExpertPlace, num_resident: int) -> int:
        """Experts that a place has."""
        if place == "staging":
            return len(self.order) - num_resident
        return self.num_on_gpu if place == "gpu" else self.num_on_cpu

    def local_numbers(self, part: Part, place: ExpertPlace, num_resident: int) -> NDArray[np.int64]:
        """The number that each of the layer's experts has in a place; `NO_EXPERT`: not of the part.

        Examples
        --------
        >>> homes = ExpertHomes(order=(2, 0, 3, 1), num_on_gpu=2, num_on_cpu=3)
        >>> homes.local_numbers("resident", "gpu", 2).tolist()
        [1, -1, 0, -1]
        >>> homes.local_numbers("missed", "cpu", 2).tolist()  # 0, 3 and 1 are on the CPU
        [-1, 2, -1, 1]
        """
        begin = 0 if part in ("all", "resident") else num_resident
        end = num_resident if part == "resident" else len(self.order)
        numbers_E = np.full(len(self.order), NO_EXPERT, np.int64)
        first = self.first(place, num_resident)
        numbers_E[list(self.order[begin:end])] = np.arange(begin - first, end - first)
        return numbers_E


@dataclass(frozen=True, slots=True, kw_only=True)
class Homes:
    """What lies in two memories: by layer the experts, and the divided feed-forwards.

    Attributes
    ----------
    experts : mapping
        Of each layer that has experts.
    shares : mapping
        Of each divided feed-forward, how many shares of its columns the GPU has: the first.
    """

    spec: ModelSpec
    experts: Mapping[int, ExpertHomes]
    shares: Mapping[int, int]

    @classmethod
    def of(cls, spec: ModelSpec, placement: Placement) -> Homes:
        """As a placement has it."""
        experts, shares = dict[int, ExpertHomes](), dict[int, int]()
        for index, layer in enumerate(spec.layers):
            if layer.is_moe:
                experts[index] = ExpertHomes.of(spec, placement, index)
            elif placement.num_resident(spec, index):
                shares[index] = placement.num_resident(spec, index)
        return cls(spec=spec, experts=experts, shares=shares)

    def columns(self, layer: int, device: Device) -> range:
        """Columns of a dense feed-forward that a device has, where it has any."""
        width = self.spec.layers[layer].intermediate_size
        if layer not in self.shares:
            return range(width)
        first_on_cpu = self.spec.dense_columns(layer, self.shares[layer])
        return range(first_on_cpu) if device == "gpu" else range(first_on_cpu, width)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalExperts:
    """The experts of a part in a place: how many the place has, and their numbers there.

    `dispatch_E` is what `moe.dispatch` takes: `count` for experts elsewhere, None where all of the
    layer's experts are here under their own numbers.
    """

    count: int
    numbers_E: NDArray[np.int64]
    dispatch_E: Tensor | None

    @classmethod
    def of(
        cls,
        homes: ExpertHomes,
        part: Part,
        place: ExpertPlace,
        num_resident: int,
        device: torch.device,
    ) -> LocalExperts:
        numbers_E = homes.local_numbers(part, place, num_resident)
        count = homes.count(place, num_resident)
        is_own = np.array_equal(numbers_E, np.arange(len(numbers_E)))
        return cls(
            count=count,
            numbers_E=numbers_E,
            dispatch_E=None if is_own else dispatch_numbers(numbers_E, count).to(device),
        )


def dispatch_numbers(numbers_E: NDArray[np.int64], count: int) -> Tensor:
    """Local numbers as `moe.dispatch` takes them, on the CPU."""
    return torch.from_numpy(np.where(numbers_E == NO_EXPERT, count, numbers_E))

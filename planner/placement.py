"""Placement: where every module lives and how it runs, per tier."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from planner.model_spec import ModelSpec, Module
from planner.workload import DEFAULT_CHUNK_TOKENS, Phase

Device = Literal["gpu", "cpu"]
Runs = Literal["gpu", "cpu", "stream"]


class ModulePlacement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`lives`: the memory that holds the weights; `stream` copies them to the GPU for each use."""

    lives: Device
    runs: Runs

    def __post_init__(self) -> None:
        if (self.lives, self.runs) not in (("gpu", "gpu"), ("cpu", "cpu"), ("cpu", "stream")):
            raise ValueError(f"a module that lives on {self.lives} cannot run as {self.runs}")

    @property
    def device(self) -> Device:
        """The device that computes."""
        return "cpu" if self.runs == "cpu" else "gpu"


ON_GPU = ModulePlacement(lives="gpu", runs="gpu")
ON_CPU = ModulePlacement(lives="cpu", runs="cpu")
STREAMED = ModulePlacement(lives="cpu", runs="stream")


class LayerPlacement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer. The KV cache lies on the device that computes attention.

    `ffn` is the dense feed-forward or the experts; `router` is None in dense layers.
    """

    attention: ModulePlacement
    ffn: ModulePlacement
    router: ModulePlacement | None = None

    @property
    def kv(self) -> Device:
        return self.attention.device

    def modules(self) -> tuple[tuple[Module, ModulePlacement], ...]:
        """Every module of the layer with its placement, in order of use."""
        if self.router is None:
            return (("attention", self.attention), ("dense", self.ffn))
        return (("attention", self.attention), ("router", self.router), ("experts", self.ffn))


class TierPlacement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The placement of one tier: steps of a phase of up to `max_num_tokens` tokens.

    `strategy` and `cut` say which named placement this is: a strategy counts layers, experts or
    blocks up to its cut (`strategies.py`).
    """

    phase: Phase
    strategy: str
    cut: Annotated[int, Meta(ge=0)]
    max_num_tokens: Annotated[int, Meta(ge=1)] = DEFAULT_CHUNK_TOKENS
    embedding: ModulePlacement
    layers: tuple[LayerPlacement, ...]
    head: ModulePlacement

    def lives_on(self, device: Device) -> frozenset[tuple[Module, int | None]]:
        """Modules (with their layer) whose weights this tier wants on a device."""
        found: set[tuple[Module, int | None]] = set()
        if self.embedding.lives == device:
            found.add(("embedding", None))
        if self.head.lives == device:
            found.add(("head", None))
        for index, layer in enumerate(self.layers):
            found.update((name, index) for name, where in layer.modules() if where.lives == device)
        return frozenset(found)

    def uses(self, device: Device) -> bool:
        """True where any module is computed on the device."""
        places = [self.embedding, self.head]
        places += [where for layer in self.layers for _, where in layer.modules()]
        return any(where.device == device for where in places)

    def streamed(self, layer: int) -> tuple[Module, ...]:
        """Modules of a layer that are copied to the GPU for each use."""
        return tuple(n for n, where in self.layers[layer].modules() if where.runs == "stream")


def pair_name(prefill: str, decode: str) -> str:
    """Strategy of both phases, or both strategies joined by a plus."""
    return decode if prefill == decode else f"{prefill}+{decode}"


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tier for prefill and one for decode.

    Weights that any tier wants on a device are resident there for the whole run; moving tens of
    gigabytes between the phases of each request does not pay. KV moves where the tiers put it on
    different devices, and that copy is charged.
    """

    prefill: TierPlacement
    decode: TierPlacement

    def __post_init__(self) -> None:
        if self.prefill.phase != "prefill" or self.decode.phase != "decode":
            raise ValueError("the tiers of a placement are one for prefill and one for decode")
        if len(self.prefill.layers) != len(self.decode.layers):
            raise ValueError(
                f"the prefill tier has {len(self.prefill.layers)} layers, "
                f"the decode tier {len(self.decode.layers)}"
            )

    @property
    def name(self) -> str:
        """`offload` where both phases use one strategy, `offload+split` where they differ."""
        return pair_name(self.prefill.strategy, self.decode.strategy)

    def tier(self, phase: Phase) -> TierPlacement:
        return self.prefill if phase == "prefill" else self.decode

    def lives_on(self, device: Device) -> frozenset[tuple[Module, int | None]]:
        """Modules whose weights are resident on a device: the union over the tiers."""
        return self.prefill.lives_on(device) | self.decode.lives_on(device)

    def uses(self, device: Device) -> bool:
        return self.prefill.uses(device) or self.decode.uses(device)


def check_matches(placement: Placement, spec: ModelSpec) -> str | None:
    """Why a placement cannot be used for a model, or None where it can."""
    for tier in (placement.prefill, placement.decode):
        if len(tier.layers) != spec.num_layers:
            return f"the plan has {len(tier.layers)} layers, the model {spec.num_layers}"
        for index, (where, layer) in enumerate(zip(tier.layers, spec.layers, strict=True)):
            if (where.router is not None) != layer.is_moe:
                kind = "experts" if layer.is_moe else "a dense feed-forward"
                return f"layer {index} of the model has {kind}, the plan says otherwise"
    return None

"""Placement: where every module lives and how it runs, per tier."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from planner.model_spec import ModelSpec, Module
from planner.workload import DEFAULT_CHUNK_TOKENS, Phase

Device = Literal["gpu", "cpu"]

# Two buffers: one is filled while the other is read.
NUM_STREAM_BUFFERS = 2

Runs = Literal["gpu", "cpu", "stream", "split"]


class ModulePlacement(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Where a module's weights live and how it runs.

    Attributes
    ----------
    lives : Device
        The memory that holds the weights.
    runs : Runs
        `stream` copies them to the GPU for each use. `split`, of experts: of those that a step
        needs and the GPU does not hold, some are copied to it and the others run on the CPU, as
        many as let both end together.
    num_resident : int
        Of experts that live on the CPU: so many, the first of the placement's order, live on the
        GPU and run there in its place.
    """

    lives: Device
    runs: Runs
    num_resident: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        known = (("gpu", "gpu"), ("cpu", "cpu"), ("cpu", "stream"), ("cpu", "split"))
        if (self.lives, self.runs) not in known:
            raise ValueError(f"a module that lives on {self.lives} cannot run as {self.runs}")
        if self.lives == "gpu" and self.num_resident:
            raise ValueError(
                f"num_resident is {self.num_resident}, but a module that lives on the gpu is there "
                "whole"
            )

    @property
    def is_mixed(self) -> bool:
        """Do its weights lie, or run, in two places? Of experts only."""
        return self.runs == "split" or self.num_resident > 0

    @property
    def device(self) -> Device:
        """The device that computes; the one that has the result where both do."""
        return "cpu" if self.runs == "cpu" and not self.num_resident else "gpu"

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices that compute."""
        return ("gpu", "cpu") if self.is_mixed and self.runs != "stream" else (self.device,)


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

    def __post_init__(self) -> None:
        whole = [self.attention, self.router, None if self.router is not None else self.ffn]
        if any(where is not None and where.is_mixed for where in whole):
            raise ValueError("only experts can run split or have residents")
        if self.ffn.is_mixed and (self.router is None or self.router.device != "gpu"):
            raise ValueError("experts on both devices need their router on the gpu")

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
    blocks up to its cut (`strategies.py`); `mixed` is none of them. `num_expert_slots` is how many
    experts the GPU has room for beside its residents, for those that split layers copy.
    """

    phase: Phase
    strategy: str
    cut: Annotated[int, Meta(ge=0)]
    max_num_tokens: Annotated[int, Meta(ge=1)] = DEFAULT_CHUNK_TOKENS
    embedding: ModulePlacement
    layers: tuple[LayerPlacement, ...]
    head: ModulePlacement
    num_expert_slots: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.embedding.is_mixed or self.head.is_mixed:
            raise ValueError("only experts can run split or have residents")
        is_split = any(layer.ffn.runs == "split" for layer in self.layers)
        if is_split and self.num_expert_slots < NUM_STREAM_BUFFERS:
            raise ValueError(
                f"num_expert_slots is {self.num_expert_slots}, but layers that run split need "
                f"{NUM_STREAM_BUFFERS} at least"
            )

    def lives_on(self, device: Device) -> frozenset[tuple[Module, int | None]]:
        """Modules (with their layer) whose weights this tier wants on a device, whole or in part.

        Of experts the residents are on the GPU and the others on the CPU.
        """
        found: set[tuple[Module, int | None]] = set()
        if self.embedding.lives == device:
            found.add(("embedding", None))
        if self.head.lives == device:
            found.add(("head", None))
        for index, layer in enumerate(self.layers):
            found.update((name, index) for name, where in layer.modules() if where.lives == device)
            if device == "gpu" and layer.ffn.num_resident:
                found.add(("experts", index))
        return frozenset(found)

    def num_resident(self, spec: ModelSpec, layer: int) -> int:
        """Experts of a layer that this tier wants on the GPU."""
        where = self.layers[layer].ffn
        return spec.layers[layer].num_experts if where.lives == "gpu" else where.num_resident

    def uses(self, device: Device) -> bool:
        """True where any module is computed on the device."""
        places = [self.embedding, self.head]
        places += [where for layer in self.layers for _, where in layer.modules()]
        return any(device in where.devices for where in places)

    def streamed(self, layer: int) -> tuple[Module, ...]:
        """Modules of a layer that are copied to the GPU for each use: experts but the residents."""
        return tuple(n for n, where in self.layers[layer].modules() if where.runs == "stream")


def pair_name(prefill: str, decode: str) -> str:
    """Strategy of both phases, or both strategies joined by a plus."""
    return decode if prefill == decode else f"{prefill}+{decode}"


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tier for prefill and one for decode.

    Weights that any tier wants on a device are resident there for the whole run; moving tens of
    gigabytes between the phases of each request does not pay. KV moves where the tiers put it on
    different devices, and that copy is charged.

    `expert_order` has a row for each layer: its experts, those first that are to be resident
    first. Without it they are in the order of their numbers.
    """

    prefill: TierPlacement
    decode: TierPlacement
    expert_order: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.prefill.phase != "prefill" or self.decode.phase != "decode":
            raise ValueError("the tiers of a placement are one for prefill and one for decode")
        if len(self.prefill.layers) != len(self.decode.layers):
            raise ValueError(
                f"the prefill tier has {len(self.prefill.layers)} layers, "
                f"the decode tier {len(self.decode.layers)}"
            )

    def num_resident(self, spec: ModelSpec, layer: int) -> int:
        """Experts of a layer that live on the GPU: as many as either tier wants there."""
        return max(tier.num_resident(spec, layer) for tier in (self.prefill, self.decode))

    def num_on_cpu(self, spec: ModelSpec, layer: int) -> int:
        """Experts of a layer that live on the CPU: all but those that both tiers have resident."""
        least = min(tier.num_resident(spec, layer) for tier in (self.prefill, self.decode))
        return spec.layers[layer].num_experts - least

    def order_of_experts(self, spec: ModelSpec, layer: int) -> tuple[int, ...]:
        """Experts of a layer, those first that are to be resident first."""
        if self.expert_order:
            return self.expert_order[layer]
        return tuple(range(spec.layers[layer].num_experts))

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
            if layer.is_moe and where.ffn.num_resident >= layer.num_experts:
                return (
                    f"layer {index} of the model has {layer.num_experts} experts, the plan has "
                    f"{where.ffn.num_resident} of them beside others"
                )
    orders = placement.expert_order
    if orders and [sorted(row) for row in orders] != [
        list(range(layer.num_experts)) for layer in spec.layers
    ]:
        return "expert_order of the plan does not have every expert of every layer once"
    return None

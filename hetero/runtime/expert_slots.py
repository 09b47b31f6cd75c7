"""ExpertSlots: which expert lies in which slot of which layer, and what was found there."""

# E experts of a layer, k experts a token, T tokens

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.experts import NO_EXPERT
from hetero.runtime.homes import Homes, LocalExperts, dispatch_numbers
from planner.placement import Placement, Slots
from planner.routing import ExpertPolicy, Lru, Static
from planner.routing.policy import access_order


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCounts:
    """What the steps of a split layer found, each expert counted once a step.

    Attributes
    ----------
    num_hits, num_misses : int
        Experts that some token chose: those in slots, and all others.
    num_fetched : int
        Of the missed ones, those copied after the gate had chosen them.
    num_prefetched : int
        Experts that were there before the gate chose.
    num_used : int
        Of these, those that it chose: missed ones that took no copy.
    num_admitted : int
        Missed ones that got a slot.
    """

    num_hits: int = 0
    num_misses: int = 0
    num_fetched: int = 0
    num_prefetched: int = 0
    num_used: int = 0
    num_admitted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Experts that get slots of a layer: from where they were staged, and the slots' new content.

    `moves` are pairs of a place among the fetched experts and a slot.
    """

    layer: int
    moves: tuple[tuple[int, int], ...]
    held: tuple[int, ...]

    def numbers(self, num_experts: int) -> Tensor:
        """The slot of each expert as `moe.dispatch` takes it, on the CPU."""
        return dispatch_numbers(_numbers(self.held, num_experts), len(self.held))


class ExpertSlots:
    """The slots of all split layers. Mutable: their contents, what was counted.

    The host knows what lies where; what the GPU reads to find an expert is uploaded with the copies
    of a step, and holds from its `admit` op on.
    """

    def __init__(self, homes: Homes, placement: Placement, device: torch.device) -> None:
        self._homes = homes
        self._policies: dict[Slots, ExpertPolicy] = {"static": Static(), "lru": Lru()}
        changing = {
            index
            for tier in placement.tiers
            for index, layer in enumerate(tier.layers)
            if layer.ffn.slots != "static"
        }
        self._held = {layer: homes.experts[layer].on_gpu for layer in changing}
        self._local = {
            layer: self._located(
                layer, held, dispatch_numbers(self._slot_numbers(layer, held), len(held)).to(device)
            )
            for layer, held in self._held.items()
        }
        self._counts: dict[int, SlotCounts] = {}

    def counts(self) -> Mapping[int, SlotCounts]:
        """What was counted so far, by layer."""
        return dict(self._counts)

    def forget_counts(self) -> None:
        """Count from zero."""
        self._counts = {}

    def held(self, layer: int, slots: Slots, num_resident: int) -> tuple[int, ...]:
        """The experts in a layer's slots, for a tier with so many residents."""
        if slots == "static":
            return self._homes.experts[layer].order[:num_resident]
        return self._held[layer]

    def local(self, layer: int) -> LocalExperts:
        """Where the GPU finds experts in slots that change."""
        return self._local[layer]

    def choose_prefetched(
        self, layer: int, slots: Slots, num_resident: int, guess_Tk: NDArray[np.int64], most: int
    ) -> tuple[int, ...]:
        """Experts to copy ahead for a guess of what the layer's gate will choose.

        Those that more tokens would choose are more probable, of equals the one chosen first.
        """
        held = self.held(layer, slots, num_resident)
        experts_E, first_E, counts_E = np.unique(guess_Tk, return_index=True, return_counts=True)
        probable = experts_E[np.lexsort((first_E, -counts_E))].tolist()
        return self._policies[slots].prefetch(layer, probable, held)[:most]

    def access(
        self, layer: int, slots: Slots, held: Collection[int], ids_Tk: NDArray[np.int64]
    ) -> None:
        """The gate's choice of a step, from the slots as they were when it was made."""
        policy, there = self._policies[slots], frozenset(held)
        policy.on_gate(layer, ids_Tk)
        for expert in access_order(ids_Tk):
            policy.on_access(layer, expert, is_hit=expert in there)

    def admission(
        self, layer: int, slots: Slots, places: Mapping[int, int], kept: Collection[int]
    ) -> Admission | None:
        """Which slots the experts at some places get, the first of them first; never those of
        `kept`."""
        if slots == "static":
            return None
        held = self._held[layer]
        victims = self._policies[slots].victims(layer, held, len(places), kept)
        if not victims:
            return None
        content, moves = list(held), list[tuple[int, int]]()
        for victim, (expert, place) in zip(victims, places.items(), strict=False):
            slot = held.index(victim)
            content[slot] = expert
            moves.append((place, slot))
        return Admission(layer=layer, moves=tuple(moves), held=tuple(content))

    def admit(self, admission: Admission, table_E: Tensor) -> None:
        """The experts are in their slots; `table_E` says so on the GPU."""
        layer = admission.layer
        self._held[layer] = admission.held
        self._local[layer] = self._located(layer, admission.held, table_E)
        self.count(layer, SlotCounts(num_admitted=len(admission.moves)))

    def count(self, layer: int, more: SlotCounts) -> None:
        """Add what a step found."""
        before = self._counts.get(layer, SlotCounts())
        self._counts[layer] = replace(
            before,
            **{name: getattr(before, name) + getattr(more, name) for name in SlotCounts.__slots__},
        )

    def _slot_numbers(self, layer: int, held: tuple[int, ...]) -> NDArray[np.int64]:
        return _numbers(held, len(self._homes.experts[layer].order))

    def _located(self, layer: int, held: tuple[int, ...], table_E: Tensor) -> LocalExperts:
        return LocalExperts(
            count=len(held), numbers_E=self._slot_numbers(layer, held), dispatch_E=table_E
        )


def _numbers(held: tuple[int, ...], num_experts: int) -> NDArray[np.int64]:
    """The slot of each expert; `NO_EXPERT` of those in none."""
    numbers_E = np.full(num_experts, NO_EXPERT, np.int64)
    numbers_E[list(held)] = np.arange(len(held))
    return numbers_E

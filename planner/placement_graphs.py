"""PlacementGraphs: the StepGraph of every tier of a placement."""

from __future__ import annotations

from planner.model_spec import ModelSpec
from planner.placement import Placement, TierPlacement
from planner.step_graph import StepGraph, build
from planner.workload import Phase


class PlacementGraphs:
    """The graphs of a placement, each written down when it is first asked for. Mutable."""

    def __init__(self, spec: ModelSpec, placement: Placement) -> None:
        self._spec = spec
        self._placement = placement
        self._graphs: dict[int, tuple[TierPlacement, StepGraph]] = {}

    def of(self, phase: Phase, num_tokens: int | None = None) -> StepGraph:
        """The graph of steps of a phase; of so many tokens, or of the largest."""
        tier = self._placement.tier(phase, num_tokens)
        if id(tier) not in self._graphs:
            self._graphs[id(tier)] = (tier, build(self._spec, tier))
        return self._graphs[id(tier)][1]

"""TierGraphs: which tier runs a step, and the graph that is priced and run."""

from __future__ import annotations

from planner.model_spec import ModelSpec
from planner.placement import Placement, TierKey, TierPlacement
from planner.step_graph import StepGraph, build
from planner.workload import BatchShape, Phase


class TierGraphs:
    """A graph for every kind of step of a placement. Mutable: each is written down when needed."""

    def __init__(self, spec: ModelSpec, placement: Placement) -> None:
        self._spec = spec
        self._placement = placement
        self._graphs: dict[tuple[TierKey, tuple[int, ...]], tuple[TierPlacement, StepGraph]] = {}
        # By step: to find its tier takes as long as a small kernel.
        self._found: dict[tuple[Phase, int, tuple[int, ...]], tuple[TierPlacement, StepGraph]] = {}

    def find(
        self, phase: Phase, num_tokens: int, sub_batches: tuple[int, ...] = (0,)
    ) -> tuple[TierPlacement, StepGraph]:
        """The tier and the graph of a step of so many tokens of sequences of these sub-batches."""
        step = (phase, num_tokens, sub_batches)
        if step not in self._found:
            tier = self._placement.step_tier(phase, num_tokens, sub_batches)
            key = (tier.key, sub_batches)
            if key not in self._graphs:
                self._graphs[key] = (tier, build(self._spec, tier))
            self._found[step] = self._graphs[key]
        return self._found[step]

    @property
    def num_gpu_kv_tokens(self) -> int:
        """Tokens of every sequence on the GPU where decode has its caches divided; 0: nowhere."""
        return self._placement.decode.num_gpu_kv_tokens

    def of(self, shape: BatchShape) -> StepGraph:
        """The graph of a step as it is planned: in two sub-batches, where there is one for each."""
        has_two = self._placement.decode.num_second_seqs > 0 and shape.num_seqs > 1
        sub_batches = (0, 1) if shape.phase == "decode" and has_two else (0,)
        return self.find(shape.phase, shape.num_tokens, sub_batches)[1]

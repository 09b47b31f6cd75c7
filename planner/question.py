"""Question: all that a search is asked with, so that it can be asked again with a part changed."""

from __future__ import annotations

from dataclasses import dataclass

from planner.calibration import NO_CORRECTIONS, Corrections
from planner.candidate import Candidate, Wave
from planner.cost_model import CostModel
from planner.hardware import HardwareProfile
from planner.model_spec import ModelSpec
from planner.plan import Plan
from planner.popularity import Popularity
from planner.search import search
from planner.workload import Objective, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The arguments of `planner.search`; `dataclasses.replace` changes one of them."""

    spec: ModelSpec
    hardware: HardwareProfile
    workload: Workload
    objective: Objective = "latency"
    chunk_tokens: int | None = None
    strategy: str | None = None
    corrections: Corrections = NO_CORRECTIONS
    popularity: Popularity | None = None
    prefers_simple: bool = True

    def plan(self) -> Plan:
        """The answer.

        Raises
        ------
        PlannerError
            The strategy is unknown or does not apply to the model and machine.
        """
        return search(
            self.spec,
            self.hardware,
            self.workload,
            self.objective,
            chunk_tokens=self.chunk_tokens,
            strategy=self.strategy,
            corrections=self.corrections,
            popularity=self.popularity,
            prefers_simple=self.prefers_simple,
        )

    def costs(self) -> CostModel:
        """Prices of ops on the machine."""
        return CostModel(self.hardware, corrections=self.corrections, popularity=self.popularity)

    def candidate(self, plan: Plan) -> Candidate:
        """A plan's placement, priced on the machine of this question."""
        concurrent = plan.estimate.num_concurrent_seqs
        return Candidate(plan.placement, Wave(self.spec, self.costs(), self.workload, concurrent))

"""Search by brute force: every pair of tiers, each checked and priced from scratch."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from planner.cost_model import CostModel
from planner.estimate import estimate
from planner.hardware import HardwareProfile
from planner.memory import needs
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.plan import Estimate
from planner.strategies import candidates
from planner.workload import Objective, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement for a number of concurrent sequences; `lacking_bytes` is 0 where it fits."""

    placement: Placement
    num_concurrent: int
    lacking_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The fastest candidate of each name that fits, and of the others the fewest bytes lacking."""

    fitting: dict[str, Estimate]
    lacking: dict[str, int]

    @property
    def best(self) -> Estimate | None:
        return min(self.fitting.values(), key=lambda found: found.e2e_s, default=None)


def all_candidates(
    spec: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    objective: Objective,
    chunk_tokens: int,
) -> list[Candidate]:
    """Every pair of tiers at every number of concurrent sequences, with the memory it lacks."""
    counts = [workload.num_seqs]
    while objective == "throughput" and counts[-1] > 1:
        counts.append((counts[-1] + 1) // 2)
    found = []
    has_gpu = hardware.gpu is not None
    for prefill in candidates(spec, "prefill", has_gpu=has_gpu, chunk_tokens=chunk_tokens):
        for decode in candidates(spec, "decode", has_gpu=has_gpu, chunk_tokens=chunk_tokens):
            for count in counts:
                placement = Placement(prefill=prefill, decode=decode)
                memory = needs(spec, placement, replace(workload, num_seqs=count), hardware)
                lacking = sum(
                    max(0, need.needed_bytes - need.available_bytes) for need in memory.values()
                )
                found.append(
                    Candidate(placement=placement, num_concurrent=count, lacking_bytes=lacking)
                )
    return found


def brute_force(
    spec: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    objective: Objective,
    chunk_tokens: int,
) -> Answer:
    """Price everything that fits."""
    fitting: dict[str, Estimate] = {}
    lacking: dict[str, int] = {}
    costs = CostModel(hardware)
    for each in all_candidates(spec, hardware, workload, objective, chunk_tokens):
        name = each.placement.name
        lacking[name] = min(lacking.get(name, each.lacking_bytes), each.lacking_bytes)
        if each.lacking_bytes == 0:
            priced = estimate(
                spec, each.placement, costs, workload, num_concurrent=each.num_concurrent
            )
            if name not in fitting or priced.e2e_s < fitting[name].e2e_s:
                fitting[name] = priced
    return Answer(
        fitting=fitting,
        lacking={name: count for name, count in lacking.items() if name not in fitting},
    )

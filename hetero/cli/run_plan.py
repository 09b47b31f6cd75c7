"""The plan of `hetero run`: the one that was given, or one made for its job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hetero.cli.job import Job
from hetero.errors import MemoryBudgetError, UsageError

if TYPE_CHECKING:
    from planner.hardware import HardwareProfile
    from planner.model_spec import ModelSpec
    from planner.plan import Plan


def read_plan(path: Path | None, strategy: str | None) -> Plan | None:
    """The plan of --plan, which has its strategy."""
    if path is None:
        return None
    from planner.plan import Plan

    plan = Plan.load(path)
    if strategy is not None:
        raise UsageError("give --plan or --strategy, not both: a plan already has one")
    return plan


def plan_job(
    given: Plan | None,
    spec: ModelSpec,
    hardware: HardwareProfile,
    job: Job,
    max_tokens: int,
    strategy: str | None,
) -> Plan:
    """The plan that was given, if it applies, or one for this job."""
    from hetero.planning import MAX_NUM_SEQS, check_plan, lacking_memory, make_plan
    from planner.workload import Workload

    if given is not None:
        check_plan(given, spec, hardware)
        return given
    num_seqs = min(len(job.good), MAX_NUM_SEQS)
    while True:
        # Every sequence as long as the longest: memory holds whatever comes.
        workload = Workload(
            prompt_len=job.longest,
            output_len=min(max_tokens, spec.max_position_embeddings - job.longest),
            num_seqs=num_seqs,
        )
        made = make_plan(spec, hardware, workload, strategy=strategy)
        if made.feasible:
            return made
        if num_seqs == 1:
            raise MemoryBudgetError(lacking_memory(made, spec, hardware))
        num_seqs = -(-num_seqs // 2)

"""Rivals: other programs' placements, and our named strategies, priced beside a plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from planner.candidate import Candidate, Wave
from planner.cost_model import CostModel
from planner.errors import PlannerError
from planner.hardware import HardwareProfile
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.plan import Plan
from planner.question import Question
from planner.rival_placements import ENGINES, Asked, Rival
from planner.search import search, wave_sizes
from planner.workload import Workload

RivalName = Literal[
    "llama-fit", "flexgen", "accelerate", "experts-on-cpu", "split", "offload", "cpu", "gpu"
]
RIVALS: tuple[RivalName, ...] = get_args(RivalName)


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalTimes:
    """What a rival's placement would take beside a plan.

    Attributes
    ----------
    name : RivalName
        Which rival.
    fits : bool
        Whether it has a placement that fits; if not the times are None and `reason` says why.
    ttft_s, tpot_s, e2e_s : float or None
        Predicted seconds, as in `planner.plan.Estimate`.
    ratio : float or None
        Its `e2e_s` over the plan's: above 1 where the plan is faster; None where the plan does
        not fit either.
    num_concurrent_seqs : int or None
        Sequences that run at once.
    """

    name: RivalName
    fits: bool
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    ratio: float | None = None
    num_concurrent_seqs: int | None = None
    reason: str = ""


def rival(
    name: RivalName, spec: ModelSpec, hardware: HardwareProfile, workload: Workload
) -> Placement | None:
    """Where a rival would put a model for sequences that run at once; None where it cannot.

    `why_not` says why; the functions behind the names say what differs from the original.
    """
    return find_rival(name, spec, hardware, workload).placement


def why_not(
    name: RivalName, spec: ModelSpec, hardware: HardwareProfile, workload: Workload
) -> str | None:
    """Why a rival has no placement; None where it has one."""
    found = find_rival(name, spec, hardware, workload)
    return found.reason if found.placement is None else None


def find_rival(
    name: RivalName, spec: ModelSpec, hardware: HardwareProfile, workload: Workload
) -> Rival:
    """A rival's placement, or the reason why it has none."""
    asked = Asked(spec=spec, hardware=hardware, workload=workload)
    if name not in ENGINES:
        return named_strategy(asked, name)
    if hardware.gpu is None:
        return Rival(placement=None, reason="the machine has no accelerator")
    return ENGINES[name](asked)


def rival_names(text: str) -> tuple[RivalName, ...]:
    """Names in a text with commas between them, each once; `all` is all of them.

    Raises
    ------
    PlannerError
        Names the unknown one and those that are known.

    Examples
    --------
    >>> rival_names("llama-fit, cpu")
    ('llama-fit', 'cpu')
    """
    known = {str(name): name for name in RIVALS}
    asked = [part.strip() for part in text.split(",")]
    if asked == ["all"]:
        return RIVALS
    for part in asked:
        if part not in known:
            raise PlannerError(f"{part!r} is not one of {', '.join(RIVALS)}, or all")
    return tuple(known[part] for part in dict.fromkeys(asked))


def compare_rivals(
    plan: Plan, question: Question, names: Iterable[RivalName]
) -> tuple[RivalTimes, ...]:
    """Price rivals' placements as the plan was priced.

    For the throughput objective a rival too may run its sequences in waves, and takes those with
    which it is fastest.
    """
    costs = question.costs()
    return tuple(_times(name, plan, question, costs) for name in names)


def _times(name: RivalName, plan: Plan, question: Question, costs: CostModel) -> RivalTimes:
    reason, fitting = "", list[Candidate]()
    for size in wave_sizes(question.workload, question.objective):
        wave = Wave(question.spec, costs, question.workload, size)
        found = find_rival(name, question.spec, question.hardware, wave.sequences)
        reason = reason or found.reason
        if found.placement is not None:
            fitting.append(Candidate(found.placement, wave))
    if not fitting:
        return RivalTimes(name=name, fits=False, reason=reason)
    best = min(fitting, key=lambda each: each.times.e2e_s)
    return RivalTimes(
        name=name,
        fits=True,
        ttft_s=best.times.ttft_s,
        tpot_s=best.times.tpot_s,
        e2e_s=best.times.e2e_s,
        ratio=best.times.e2e_s / plan.estimate.e2e_s if plan.feasible else None,
        num_concurrent_seqs=best.wave.num_concurrent,
    )


def named_strategy(asked: Asked, name: RivalName) -> Rival:
    """One of `planner.strategies` with the best cut that fits, in both phases.

    `gpu`: all on the GPU; `cpu`: all on the CPU; `split`: the first layers on the CPU, as `-ngl`
    of llama.cpp; `experts-on-cpu`: the experts of the first layers, as `--n-cpu-moe`; `offload`:
    the first layers streamed, as `--cpu-offload-gb` of vLLM. All with our steps and margins.
    """
    try:
        plan = search(asked.spec, asked.hardware, asked.workload, strategy=name)
    except PlannerError as error:
        return Rival(placement=None, reason=str(error))
    if not plan.feasible:
        lacking = [asked.why_too_large(plan.placement, each) for each in ("gpu", "cpu")]
        return Rival(placement=None, reason="; ".join(each for each in lacking if each))
    return Rival(placement=plan.placement, reason="")

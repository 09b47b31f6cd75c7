"""Trial: a plan and its rivals really run for a few steps; the fastest as measured is kept."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from msgspec.structs import replace

from hetero.api import LLM
from hetero.errors import MemoryBudgetError
from hetero.outputs import Measured
from hetero.prompts import TokensPrompt
from hetero.sampler import SamplingParams
from planner.backends import cpu_backends
from planner.cost_model import CostModel
from planner.estimate import estimate
from planner.memory import needs
from planner.model_spec import ModelSpec
from planner.placement import Placement
from planner.plan import Alternative, Plan, Trial, TrialRow, TrialTimes
from planner.search import search
from planner.strategies import STRATEGIES, placement
from planner.workload import PHASES, Workload

# From the simplest to run on: what a person would do by hand where the plan were not trusted.
_BASELINES = ("cpu", "experts-on-cpu", "split", "offload", "gpu")
_NUM_DECODE_STEPS = 8
# The slowest rival's prefill may take so long by prediction, unless its prompt is this short.
_MAX_PREFILL_S = 5.0
_MIN_PROMPT_TOKENS = 32
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rivals:
    """The plans that are tried, and the part of their wave that is run of each."""

    plans: tuple[Plan, ...]
    workload: Workload


def trial(
    plan: Plan,
    spec: ModelSpec,
    costs: CostModel,
    load: Callable[[Plan], LLM],
    *,
    say: Callable[[str], None],
) -> Plan:
    """Run a plan, its best rival and the simplest placement, each for a few steps.

    Parameters
    ----------
    plan
        A plan that fits.
    spec, costs
        The model and the prices that it was made with.
    load
        Loads the model under a plan; one is closed before the next is loaded.
    say
        Told of each placement before it is loaded, and why one could not be run.

    Returns
    -------
    Plan
        The plan of the fastest placement, with `trial` saying what was found.

    Raises
    ------
    MemoryBudgetError
        No placement could be run.
    """
    rivals = _rivals(plan, spec, costs)
    if len(rivals.plans) == 1:
        say(f"{plan.placement.name} is the only placement that fits; it is tried alone")
    rows = []
    for number, each in enumerate(rivals.plans, start=1):
        say(f"trying {each.placement.name} ({number} of {len(rivals.plans)})")
        row = _try(each, spec, costs, rivals.workload, load)
        if row.measured is None:
            say(f"warning: {row.name} could not be run: {row.failure}")
        rows.append(row)
    times = [
        (row.measured.e2e_s, index) for index, row in enumerate(rows) if row.measured is not None
    ]
    if not times:
        reasons = "; ".join(f"{row.name}: {row.failure}" for row in rows)
        raise MemoryBudgetError(
            f"none of the placements of {plan.model} could be run ({reasons}); end other "
            "processes, or ask for fewer or shorter sequences"
        )
    _, best = min(times)
    found = Trial(workload=rivals.workload, rows=tuple(rows), kept=rows[best].name)
    return _kept(plan, rivals.plans[best], found)


def _rivals(plan: Plan, spec: ModelSpec, costs: CostModel) -> _Rivals:
    """The plan, its best feasible alternative and the simplest one, each once."""
    feasible = [other for other in plan.alternatives if other.feasible]
    simple = sorted(
        (other for other in feasible if other.name in _BASELINES),
        key=lambda other: _BASELINES.index(other.name),
    )
    is_simplest = plan.placement.name in _BASELINES and all(
        _BASELINES.index(plan.placement.name) < _BASELINES.index(other.name) for other in simple
    )
    others = feasible[:1]
    if not is_simplest:
        others += [other for other in simple[:1] if other not in others]
    plans = (plan, *(_plan_of(other, plan, spec, costs) for other in others))
    return _Rivals(plans=plans, workload=_workload(plans, spec, costs))


def _plan_of(other: Alternative, plan: Plan, spec: ModelSpec, costs: CostModel) -> Plan:
    """The plan that an alternative of another plan stands for."""
    if other.name not in STRATEGIES:  # what was chosen over it is simpler, and as fast within error
        return search(
            spec,
            costs.hardware,
            plan.workload,
            plan.objective,
            corrections=costs.corrections,
            prefers_simple=False,
        )
    chunk_tokens = plan.placement.prefill.max_num_tokens
    cuts = other.cut_by_phase
    found = Placement(
        prefill=placement(spec, other.name, cuts["prefill"], chunk_tokens=chunk_tokens).prefill,
        decode=placement(spec, other.name, cuts["decode"], chunk_tokens=chunk_tokens).decode,
    )
    return replace(
        plan,
        placement=found,
        estimate=estimate(
            spec,
            found,
            costs,
            plan.workload,
            needs(spec, found, plan.wave, costs.hardware),
            num_concurrent=plan.estimate.num_concurrent_seqs,
        ),
    )


def _workload(plans: tuple[Plan, ...], spec: ModelSpec, costs: CostModel) -> Workload:
    """One prefill step that is over soon for the slowest, and a few decode steps."""
    wave = plans[0].wave
    chunk_tokens = plans[0].placement.prefill.max_num_tokens
    workload = replace(
        wave,
        prompt_len=max(1, min(wave.prompt_len, chunk_tokens // wave.num_seqs)),
        output_len=min(wave.output_len, 1 + _NUM_DECODE_STEPS),
    )
    while workload.prompt_len > _MIN_PROMPT_TOKENS:
        slowest_s = max(estimate(spec, plan.placement, costs, workload).ttft_s for plan in plans)
        if slowest_s <= _MAX_PREFILL_S:
            break
        shorter = max(_MIN_PROMPT_TOKENS, workload.prompt_len // 2)
        workload = replace(workload, prompt_len=shorter)
    return workload


def _try(
    plan: Plan,
    spec: ModelSpec,
    costs: CostModel,
    workload: Workload,
    load: Callable[[Plan], LLM],
) -> TrialRow:
    """Run one placement; its times are those of a whole wave of the plan's workload.

    What was run is shorter than the wave: each measured time is stretched as the predicted one is.
    """
    backends = cpu_backends(spec, costs, plan.wave)  # as they are loaded for either
    whole, part = (
        estimate(spec, plan.placement, costs, size, backends=backends)
        for size in (plan.wave, workload)
    )
    measured, failure = None, None
    try:
        found = _measure(plan, workload, load)
        ttft_s = found.ttft_s * whole.ttft_s / part.ttft_s
        tpot_s = found.tpot_s * whole.tpot_s / part.tpot_s if part.tpot_s > 0 else 0.0
        measured = _times(ttft_s, tpot_s, plan.wave)
    except (MemoryBudgetError, MemoryError, torch.OutOfMemoryError) as error:
        failure = str(error) or "there was not enough memory"
    # The next one needs the room.
    gc.collect()
    return TrialRow(
        name=plan.placement.name,
        cut_by_phase={phase: plan.placement.tier(phase).cut for phase in PHASES},
        predicted=_times(whole.ttft_s, whole.tpot_s, plan.wave),
        measured=measured,
        failure=failure,
    )


def _times(ttft_s: float, tpot_s: float, wave: Workload) -> TrialTimes:
    return TrialTimes(ttft_s=ttft_s, tpot_s=tpot_s, e2e_s=ttft_s + (wave.output_len - 1) * tpot_s)


def _measure(plan: Plan, workload: Workload, load: Callable[[Plan], LLM]) -> Measured:
    """Run a workload of random tokens, once to warm up and once to measure."""
    with load(plan) as llm:
        vocab_size, draw = llm.spec.vocab_size, random.Random(_SEED)

        def run(output_len: int) -> None:
            prompts = [
                TokensPrompt(
                    prompt_token_ids=[
                        draw.randrange(vocab_size) for _ in range(workload.prompt_len)
                    ]
                )
                for _ in range(workload.num_seqs)
            ]
            llm.generate(
                prompts, SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
            )

        # The first steps of a size load code; they are no part of what a step costs.
        is_recorded, llm.calibrate = llm.calibrate, False
        run(min(workload.output_len, 2))
        llm.calibrate = is_recorded
        run(workload.output_len)
        assert llm.measured is not None
        return llm.measured


def _kept(plan: Plan, best: Plan, found: Trial) -> Plan:
    """The best plan, with the first one among its alternatives where it is another."""
    if best.placement == plan.placement:
        return replace(plan, trial=found)
    chosen = Alternative(
        name=plan.placement.name,
        cut_by_phase={phase: plan.placement.tier(phase).cut for phase in PHASES},
        feasible=True,
        ttft_s=plan.estimate.ttft_s,
        tpot_s=plan.estimate.tpot_s,
        e2e_s=plan.estimate.e2e_s,
        reason=f"planned; {best.placement.name} was faster when both were tried",
    )
    others = (other for other in plan.alternatives if other.name != best.placement.name)
    return replace(best, alternatives=(chosen, *others), trial=found)

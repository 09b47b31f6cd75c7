"""The plan of `hetero run`: the one that was given, or one made for its job."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hetero.cli.job import Job
from hetero.errors import MemoryBudgetError, ModelFolderError, UsageError

if TYPE_CHECKING:
    from hetero.model_lookup import ModelSource
    from planner.calibration import Corrections
    from planner.hardware import HardwareProfile
    from planner.model_spec import ModelSpec
    from planner.nearest_fit import FittingChange
    from planner.plan import Plan


def check_has_weights(source: ModelSource, purpose: str) -> None:
    """Refuse a model of `profiles/models`, which has shapes and no weights."""
    if source.folder is None:
        raise ModelFolderError(
            f"{source.name} is known by its shapes only, which is enough for hetero plan; "
            f"{purpose} give a folder with its weights"
        )


def read_plan(path: Path | None, strategy: str | None, *, is_tried: bool) -> Plan | None:
    """The plan of --plan, which has its strategy."""
    if path is None:
        return None
    from planner.plan import Plan

    if strategy is not None:
        raise UsageError("give --plan or --strategy, not both: a plan already has one")
    if is_tried:
        raise UsageError("give --plan or --trial, not both: hetero plan --trial makes a tried plan")
    return Plan.load(path)


def plan_job(
    given: Plan | None,
    spec: ModelSpec,
    hardware: HardwareProfile,
    job: Job,
    max_tokens: int,
    strategy: str | None,
    corrections: Corrections,
) -> Plan:
    """The plan that was given, if it applies, or one for this job."""
    from hetero.planning import MAX_NUM_SEQS, check_plan, make_plan, why_not_feasible
    from planner.nearest_fit import nearest_fits
    from planner.question import Question
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
        made = make_plan(spec, hardware, workload, strategy=strategy, corrections=corrections)
        if made.feasible:
            return made
        if num_seqs == 1:
            question = Question(
                spec=spec,
                hardware=hardware,
                workload=workload,
                strategy=strategy,
                corrections=corrections,
            )
            found = [_as_run(each) for each in nearest_fits(question)]
            raise MemoryBudgetError(why_not_feasible(made, question, found))
        num_seqs = -(-num_seqs // 2)


def _as_run(found: FittingChange) -> FittingChange:
    """The same change in the options of `hetero run`, which has a prompt and no length of it."""
    options = found.options.replace("--output-len", "--max-tokens")
    if "--prompt-len" in options:
        options = options.replace("--prompt-len", "a prompt of") + " tokens"
    return dataclasses.replace(found, options=options)


def try_plan(
    made: Plan,
    spec: ModelSpec,
    hardware: HardwareProfile,
    corrections: Corrections,
    model: str | None,
    tell: Callable[[str], None],
    *,
    profile: HardwareProfile,
    overlap: bool = True,
) -> Plan:
    """Run a plan and its rivals for a few steps; the fastest is the plan from then on."""
    from hetero.api import LLM
    from hetero.trial import trial
    from planner.cost_model import CostModel

    def load(plan: Plan) -> LLM:
        return LLM(
            model,
            plan=plan,
            profile=profile,
            # what was planned for: a plan's own format where none was asked for
            dtype=spec.dtype,
            quantization=spec.quantization,
            # told of by whoever chose it
            allow_foreign_profile=True,
            max_model_len=made.workload.context_len,
            overlap=overlap,
            progress=tell,
        )

    return trial(made, spec, CostModel(hardware, corrections=corrections), load, say=tell)

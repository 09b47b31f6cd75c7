"""`hetero plan`: where a model goes, how fast it will be, what limits it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hetero.cli.machine import (
    RIVALS,
    MachineOptions,
    check_agree,
    check_distinct,
    lookup_model,
    machine_options,
    output_path,
    read_profile,
    say,
    usable_part,
)
from hetero.cli.run_plan import check_has_weights, try_plan
from hetero.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from hetero.planning import DtypeName
    from planner.explain import Explanation
    from planner.model_spec import Quantization
    from planner.nearest_fit import FittingChange
    from planner.plan import Plan
    from planner.question import Question
    from planner.rivals import RivalName, RivalTimes
    from planner.workload import Objective


@click.command()
@click.argument("model", required=False)
@machine_options
@click.option("--prompt-len", type=click.IntRange(min=1), help="Prompt tokens of a sequence (512).")
@click.option("--output-len", type=click.IntRange(min=1), help="Tokens to generate (128).")
@click.option(
    "--num-seqs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Sequences that arrive together.",
)
@click.option(
    "--objective",
    type=click.Choice(["latency", "throughput"]),
    default="latency",
    show_default=True,
    help="latency runs all sequences at once; throughput may run them in waves.",
)
@click.option(
    "--trial",
    "is_tried",
    is_flag=True,
    help="Really run the best placements for a few steps and keep the fastest; needs weights.",
)
@click.option(
    "--what-if",
    metavar="TEXT",
    help="Another machine than this, as gpu-mem-gb=24,link=4.0x8,cpu-gbps=90; also cpu-mem-gb and "
    "gpu-gbps.",
)
@click.option(
    "--explain",
    "is_explained",
    is_flag=True,
    help="Add what binds, where GPU memory goes, what more of each part of the machine would gain.",
)
@click.option(
    "--compare",
    metavar="NAMES",
    help="Add where other programs would put the model, and how fast that would be: all, or some "
    f"of {', '.join(RIVALS)}.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the plan as one JSON document; --explain and --compare add the keys explanation "
    "and comparison.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_path,
    help="Also write the plan to this file, for hetero run --plan.",
)
@click.pass_context
def plan(
    context: click.Context,
    /,
    model: str | None,
    prompt_len: int | None,
    output_len: int | None,
    num_seqs: int,
    objective: Objective,
    is_tried: bool,
    what_if: str | None,
    is_explained: bool,
    compare: str | None,
    as_json: bool,
    output: Path | None,
    strategy: str | None,
    dtype: DtypeName,
    quantization: Quantization | None,
    **machine: Any,
) -> None:
    """Say where a model goes on this machine, how fast it will be, and what limits it.

    MODEL is a folder, an org/name in the local hub cache, or a model profile (no weights needed);
    the default is the small model that ships with hetero. Lengths that are not given are 512 and
    128 tokens, less where the model's context is shorter.
    """
    from hetero.measure.calibration_log import own_corrections
    from hetero.measure.store import write_atomically
    from hetero.planning import (
        assumed_note,
        changed_hardware,
        default_workload,
        gpu_what_if,
        low_confidence_note,
        make_plan,
        rivals_asked,
        runnable_profile,
        spec_as_run,
        why_not_feasible,
    )
    from planner.question import Question

    options = MachineOptions(**machine)
    rivals = rivals_asked(compare)
    if is_tried and what_if is not None:
        raise UsageError("--trial runs on the machine as it is; leave it or --what-if out")
    check_agree(options, strategy, gpu_what_if(what_if))
    if options.profile is not None:
        check_distinct(profile=Path(options.profile), output=output)
    source = lookup_model(model)
    if is_tried:
        check_has_weights(source, "to try it")
    profile = read_profile(options)
    if is_tried:
        runnable_profile(profile, "--trial")
    usable = usable_part(profile, options)
    hardware = changed_hardware(usable, what_if, options.gpu_mem_gb, options.cpu_mem_gb)
    spec = spec_as_run(source, dtype, hardware, say, quantization)
    workload = default_workload(
        spec.max_position_embeddings,
        prompt_len=prompt_len,
        output_len=output_len,
        num_seqs=num_seqs,
    )
    known = own_corrections(spec, profile, usable, os.environ, say)
    made = make_plan(spec, hardware, workload, objective, strategy=strategy, corrections=known)
    if is_tried and made.feasible:
        made = try_plan(made, spec, hardware, known, model, say, profile=profile)
    if output is not None:
        write_atomically(output, made.to_json(), is_private=False)
        say(f"wrote {output}")
    question = Question(
        spec=spec,
        hardware=hardware,
        workload=workload,
        objective=objective,
        strategy=strategy,
        corrections=known,
    )
    answer = _answer(made, question, is_explained, rivals)
    found = (low_confidence_note(hardware), assumed_note(spec, hardware))
    notes = tuple(note for note in found if note is not None)
    if as_json:
        _print_json(answer, notes)
    else:
        _print(answer, notes)
    if not made.feasible:
        say(f"error: {why_not_feasible(made, question, _nearest(answer))}")
        context.exit(ExitCode.DOES_NOT_FIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A plan, what it was asked with, and what else was asked about it."""

    plan: Plan
    question: Question
    explanation: Explanation | None
    comparison: tuple[RivalTimes, ...]


def _answer(
    made: Plan, question: Question, is_explained: bool, rivals: tuple[RivalName, ...]
) -> _Answer:
    from planner.explain import explain
    from planner.rivals import compare_rivals

    return _Answer(
        plan=made,
        question=question,
        explanation=explain(made, question) if is_explained else None,
        comparison=compare_rivals(made, question, rivals),
    )


def _nearest(answer: _Answer) -> tuple[FittingChange, ...]:
    """What would fit; looked for now where no explanation did."""
    from planner.nearest_fit import nearest_fits

    if answer.explanation is None:
        return nearest_fits(answer.question)
    return answer.explanation.nearest_fits


def _print_json(answer: _Answer, notes: tuple[str, ...]) -> None:
    """The plan, with a key for each thing that was asked beside it."""
    import msgspec

    from hetero.report import trust_text

    made, hardware = answer.plan, answer.question.hardware
    document = made.to_json()
    added = {
        **({"explanation": answer.explanation} if answer.explanation is not None else {}),
        **({"comparison": answer.comparison} if answer.comparison else {}),
    }
    if added:
        merged = {**msgspec.json.decode(document), **msgspec.to_builtins(added)}
        document = msgspec.json.format(msgspec.json.encode(merged), indent=2) + b"\n"
    click.echo(document, nl=False)
    if hardware.provenance == "datasheet":
        notes = (*notes, trust_text(made, hardware) or "")
    for note in notes:
        say(f"note: {note}")


def _print(answer: _Answer, notes: tuple[str, ...]) -> None:
    from msgspec.structs import replace
    from rich.console import Console

    from hetero.explain_view import print_explanation, print_rivals
    from hetero.report import print_plan
    from planner.explain import step_timelines

    made, question = answer.plan, answer.question
    hardware = replace(question.hardware, notes=(*question.hardware.notes, *notes))
    # A pipe has no width: a table of 100 columns is what grep and a mail can take.
    width = None if sys.stdout.isatty() else 100
    console = Console(width=width, highlight=False)
    print_plan(console, made, hardware, question.spec)
    if answer.explanation is not None:
        print_explanation(console, made, answer.explanation, step_timelines(made, question))
    if answer.comparison:
        print_rivals(console, made, answer.comparison)

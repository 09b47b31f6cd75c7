"""`hetero run`: plan, load, generate, and show what was predicted beside what was measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hetero.cli.job import Job, tokenize
from hetero.cli.machine import (
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
from hetero.cli.rows import Row, RowWriter, read_rows, refuse_existing
from hetero.cli.run_output import TextStream, run_document, show_plan, show_result, teller
from hetero.cli.run_plan import check_has_weights, plan_job, read_plan, try_plan
from hetero.errors import ExitCode, HeteroError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from hetero.api import LLM, GenerationStep
    from hetero.outputs import RequestOutput
    from hetero.planning import DtypeName
    from hetero.run_monitor import RunMonitor
    from hetero.run_view import Progress
    from hetero.sampler import SamplingParams
    from planner.model_spec import Quantization

PROGRESS_CHOICES = ("auto", "rich", "plain", "json", "none")
DEFAULT_MAX_TOKENS = 128

DEMO_PROMPT = "The old man looked at the sea and"
# Greedy text of so small a model goes in circles; the seed keeps the run repeatable.
DEMO_TEMPERATURE = 0.8
DEMO_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A loaded model, what it is to generate, and where it tells of that."""

    llm: LLM
    job: Job
    params: SamplingParams
    console: Console
    progress: Progress


@click.command()
@click.argument("model", required=False)
@click.option("-p", "--prompt", help="Text to continue.")
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help='JSON lines: {"prompt": ...} or {"prompt_token_ids": [...]}, with "custom_id" or not.',
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_path,
    help="A new file for the rows of --input; each is written when it is finished.",
)
@click.option("--chat", is_flag=True, help="The prompt is a user's turn: use the chat template.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_TOKENS,
    show_default=True,
    help="Tokens to generate at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help="0, the default, takes the likeliest token; the demo without a prompt has 0.8.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Keep the fewest tokens whose probabilities reach this.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Keep this many tokens; 0 keeps all.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(min=0, max=1),
    default=0.0,
    show_default=True,
    help="Drop tokens less likely than this times the likeliest.",
)
@click.option(
    "--seed", type=click.IntRange(min=0, max=2**63 - 1), help="Makes sampling repeatable."
)
@click.option("--stop", multiple=True, help="End the text here; can be given several times.")
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A plan of hetero plan -o, for this model and this machine.",
)
@click.option(
    "--trial",
    "is_tried",
    is_flag=True,
    help="First run the best placements for a few steps, and keep the fastest.",
)
@machine_options
@click.option("--no-overlap", is_flag=True, help="One operation at a time, for comparison.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_path,
    help="Write all steps, predicted beside measured, as a Chrome trace (opens in Perfetto).",
)
@click.option(
    "--progress",
    type=click.Choice(PROGRESS_CHOICES),
    default="auto",
    show_default=True,
    help="On stderr; auto is a dashboard on a terminal and plain lines elsewhere.",
)
@click.option("--json", "as_json", is_flag=True, help="Print text and times as one JSON document.")
@click.pass_context
def run(
    context: click.Context,
    /,
    model: str | None,
    prompt: str | None,
    input_path: Path | None,
    output: Path | None,
    chat: bool,
    max_tokens: int,
    temperature: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    plan_path: Path | None,
    is_tried: bool,
    strategy: str | None,
    dtype: DtypeName,
    quantization: Quantization | None,
    no_overlap: bool,
    trace: Path | None,
    progress: Progress,
    as_json: bool,
    top_p: float,
    top_k: int,
    min_p: float,
    **machine: Any,
) -> None:
    """Generate text with a model, under a plan; shows predicted beside measured.

    MODEL is a folder with weights, or an org/name in the local hub cache. Without MODEL and
    without a prompt the small model that ships with hetero continues a sentence. stdout carries
    the text, or one JSON document; all else goes to stderr.
    """
    is_demo = model is None and prompt is None and input_path is None
    _check_options(model, prompt, input_path, output, as_json)
    if input_path is not None:
        rows = read_rows(input_path)
    else:
        rows = (Row(custom_id="prompt", prompt=prompt or DEMO_PROMPT),)
    from hetero.measure.calibration_log import own_corrections
    from hetero.planning import (
        assumed_note,
        check_plan_is_for,
        low_confidence_note,
        naming,
        runnable_profile,
        spec_as_run,
    )

    options = MachineOptions(**machine)
    check_agree(options, strategy)
    check_distinct(input=input_path, output=output, plan=plan_path, trace=trace)
    given = read_plan(plan_path, strategy, is_tried=is_tried)
    source = lookup_model(model)
    check_has_weights(source, "to run it")
    assert source.folder is not None
    profile = read_profile(options, teller(progress))
    with naming(plan_path):
        if given is not None:
            check_plan_is_for(given, source, profile)
        hardware = usable_part(runnable_profile(profile), options, given)
        spec = spec_as_run(source, dtype, hardware, teller(progress), quantization, given)
    doubts = [note for note in (*hardware.notes, low_confidence_note(hardware)) if note is not None]
    if doubts:
        teller(progress)(f"warning: the profile of {hardware.name}: {'; '.join(doubts)}")
    assumed = assumed_note(spec, hardware)
    if assumed is not None:
        teller(progress)(f"warning: {assumed}")
    job = tokenize(rows, source.folder, spec, chat=chat)
    if output is None and job.bad:
        raise job.bad[0].error
    if output is not None and not job.good:
        with RowWriter(output) as writer:
            _write_bad(writer, job)
        context.exit(_rows_code(writer, job))
    known = own_corrections(spec, profile, hardware, os.environ, teller(progress))
    with naming(plan_path):
        made = plan_job(given, spec, hardware, job, max_tokens, strategy, known)
    if is_tried:
        tell = teller(progress)
        made = try_plan(
            made, spec, hardware, known, model, tell, profile=profile, overlap=not no_overlap
        )
    console = _console()
    show_plan(console, progress, made, hardware)

    # Here and not above: torch takes seconds, and every complaint so far came without it.
    from hetero.api import LLM
    from hetero.sampler import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=(DEMO_TEMPERATURE if is_demo else 0.0) if temperature is None else temperature,
        seed=DEMO_SEED if is_demo and seed is None else seed,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        stop=list(stop) or None,
    )
    with LLM(
        model,
        plan=made,
        profile=profile,
        # known, allowed and said above
        allow_foreign_profile=True,
        # what was decided above, and said: a plan's own format where none was asked for
        dtype=spec.dtype,
        quantization=spec.quantization,
        max_model_len=min(spec.max_position_embeddings, job.longest + max_tokens),
        overlap=not no_overlap,
        progress=teller(progress),
    ) as llm:
        if output is not None:
            job = job.within(
                llm.kv_capacity_tokens, llm.prompt_capacity_tokens, max_tokens, llm.max_model_len
            )
        this = Run(llm=llm, job=job, params=params, console=console, progress=progress)
        code = ExitCode.OK
        with nullcontext() if trace is None else llm.trace(trace):
            if output is not None:
                code = _run_rows(this, output)
            elif as_json:
                _run_json(this)
            else:
                _run_text(this, TextStream(DEMO_PROMPT if is_demo else ""))
    context.exit(code)


def _check_options(
    model: str | None,
    prompt: str | None,
    input_path: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    if prompt is not None and input_path is not None:
        raise UsageError("give -p or --input, not both")
    if (input_path is None) != (output is None):
        raise UsageError("--input and --output go together: rows in one file, rows in the other")
    if model is not None and prompt is None and input_path is None:
        raise UsageError("there is nothing to generate: give a text with -p, or rows with --input")
    if prompt is not None and not prompt:
        raise UsageError("the prompt is empty; give at least one character of text with -p")
    if as_json and input_path is not None:
        raise UsageError("--json is for one prompt; the rows of --input go to --output")
    if output is not None:
        refuse_existing(output)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _generate(
    this: Run,
    stream: TextStream | None = None,
    watch: Callable[[GenerationStep], None] | None = None,
) -> tuple[list[RequestOutput], RunMonitor]:
    """Run the job under the view that was asked for; `watch` is called first after each step."""
    from hetero.prompts import TokensPrompt
    from hetero.run_monitor import RunMonitor
    from hetero.run_view import make_view

    llm, max_tokens = this.llm, this.params.max_tokens or 0
    prompts = [TokensPrompt(prompt_token_ids=list(good.token_ids)) for good in this.job.good]
    rooms = [llm.max_model_len - len(good.token_ids) for good in this.job.good]
    monitor = RunMonitor(
        plan=llm.plan,
        hardware=llm.hardware,
        max_output_lens=[min(max_tokens, room) for room in rooms],
        predict=lambda: llm.predicted_timeline,
    )
    shares_terminal = stream is not None and stream.is_terminal
    view = make_view(this.progress, monitor, this.console, shares_terminal=shares_terminal)
    # The dashboard has the text of a terminal: what else is written there would tear it.
    early = None if view.shows_text else stream

    def observe(step: GenerationStep) -> None:
        if watch is not None:
            watch(step)
        if early is not None:
            early.show(step.text(0))
        monitor.observe(step)
        view.after_step()

    with view:
        outputs = llm.generate(prompts, this.params, observe=observe)
        if early is not None:
            early.end(outputs[0].outputs[0].text)
    if stream is not None and early is None:
        stream.end(outputs[0].outputs[0].text)
    return outputs, monitor


def _run_text(this: Run, stream: TextStream) -> None:
    (answer,), monitor = _generate(this, stream)
    show_result(this.console, this.progress, this.llm, monitor.snapshot.last_step)
    _check_answer(answer)


def _run_json(this: Run) -> None:
    (answer,), monitor = _generate(this)
    click.echo(run_document(this.llm, answer), nl=False)
    show_result(this.console, this.progress, this.llm, monitor.snapshot.last_step)
    _check_answer(answer)


def _check_answer(answer: RequestOutput) -> None:
    completion = answer.outputs[0]
    if completion.finish_reason == "error":
        raise HeteroError(
            f"the text ends after {len(completion.token_ids)} tokens, where the model's numbers "
            "overflowed: its weights are damaged, or need another --dtype (bfloat16, float32)"
        )


def _run_rows(this: Run, output: Path) -> ExitCode:
    """Run every row; each is written in the step that finishes it."""
    with RowWriter(output) as writer:
        _write_bad(writer, this.job)
        if not this.job.good:
            return _rows_code(writer, this.job)

        def write_finished(step: GenerationStep) -> None:
            for index, sequence in zip(step.finished, step.result.finished, strict=True):
                has_failed = sequence.finish_reason == "error"
                writer.write(
                    this.job.good[index].row,
                    text=step.text(index),
                    token_ids=sequence.output_token_ids,
                    finish_reason=sequence.finish_reason,
                    error=str(sequence.stop_reason) if has_failed else None,
                )

        _, monitor = _generate(this, watch=write_finished)
    show_result(this.console, this.progress, this.llm, monitor.snapshot.last_step)
    return _rows_code(writer, this.job)


def _write_bad(writer: RowWriter, job: Job) -> None:
    for bad in job.bad:
        writer.write(bad.row, error=str(bad.error))


def _rows_code(writer: RowWriter, job: Job) -> ExitCode:
    if writer.num_failed == 0:
        return ExitCode.OK
    say(f"{writer.num_failed} of {job.num_rows} rows failed; their error says why")
    return ExitCode.FAILED_ROWS

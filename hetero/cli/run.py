"""`hetero run`: plan, load, generate, and show what was predicted beside what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hetero.cli.machine import (
    DtypeName,
    MachineOptions,
    cut_to_options,
    lookup_model,
    machine_options,
    output_path,
    read_profile,
    say,
    spec_as_run,
)
from hetero.cli.rows import Row, RowWriter, read_rows, refuse_existing
from hetero.errors import (
    ExitCode,
    HeteroError,
    MemoryBudgetError,
    ModelFolderError,
    RequestError,
    UsageError,
)

if TYPE_CHECKING:
    from rich.console import Console

    from hetero.api import LLM, GenerationStep, RequestOutput
    from hetero.dashboard import Progress
    from hetero.model_lookup import ModelSource
    from hetero.report import Speed
    from hetero.sampler import SamplingParams
    from hetero.tokenizer import Tokenizer
    from planner.hardware import HardwareProfile
    from planner.model_spec import ModelSpec
    from planner.plan import Plan

SCHEMA_VERSION = 1
PROGRESS_CHOICES = ("auto", "rich", "plain", "json", "none")
DEFAULT_MAX_TOKENS = 128
# As many as hetero.LLM takes into one step unless told otherwise.
MAX_NUM_SEQS = 16

DEMO_PROMPT = "The old man looked at the sea and"
# Greedy text of so small a model goes in circles; the seed keeps the run repeatable.
DEMO_TEMPERATURE = 0.8
DEMO_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that is ready to run, and where it tells of the run."""

    llm: LLM
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
    "output",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_path,
    help="A new file for the rows of --input; each is written when it is finished.",
)
@click.option("--chat", is_flag=True, help="Send the prompt as a user's turn, by the template.")
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
    help="0 takes the likeliest token, the default; the demo without a prompt has 0.8.",
)
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True
)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0 keeps all tokens.")
@click.option("--min-p", type=click.FloatRange(min=0, max=1), default=0.0, show_default=True)
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
@machine_options
@click.option("--no-overlap", is_flag=True, help="One operation at a time, for comparison.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_path,
    help="Write the last step, predicted and measured, as a Chrome trace (opens in Perfetto).",
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
    model: str | None,
    prompt: str | None,
    input_path: Path | None,
    output: Path | None,
    chat: bool,
    temperature: float | None,
    seed: int | None,
    plan_path: Path | None,
    strategy: str | None,
    dtype: DtypeName,
    no_overlap: bool,
    trace: Path | None,
    progress: Progress,
    as_json: bool,
    profile: str | None,
    accelerator: Any,
    gpu_mem_gb: float | None,
    cpu_mem_gb: float | None,
    **sampling: Any,
) -> None:
    """Generate text with a model, under a plan; shows predicted beside measured.

    MODEL is a folder with weights, or an org/name in the local hub cache. Without MODEL and
    without a prompt the small model that ships with hetero continues a sentence. stdout carries
    the text, or one JSON document; all else goes to stderr.
    """
    is_demo = model is None and prompt is None and input_path is None
    _check_options(model, prompt, input_path, output, as_json)
    machine = MachineOptions(
        profile=profile, accelerator=accelerator, gpu_mem_gb=gpu_mem_gb, cpu_mem_gb=cpu_mem_gb
    )
    default_temperature = DEMO_TEMPERATURE if is_demo else 0.0
    how = SamplingOptions(
        temperature=default_temperature if temperature is None else temperature,
        seed=DEMO_SEED if is_demo and seed is None else seed,
        **sampling,
    )
    if input_path is None:
        rows: tuple[Row, ...] = (
            Row(custom_id="prompt", prompt=DEMO_PROMPT if is_demo else prompt or ""),
        )
    else:
        rows = read_rows(input_path)
    source = lookup_model(model)
    if source.folder is None:
        raise ModelFolderError(
            f"{source.name} is known by its shapes only, which is enough for hetero plan; to run "
            "it give a folder with its weights"
        )
    measured = read_profile(profile, _teller(progress))
    given = _read_plan(plan_path, strategy, machine)
    hardware = _hardware(measured, machine, given)
    spec = spec_as_run(source, dtype, hardware)
    job = _tokenize(rows, source, spec, chat)
    if input_path is None and job.bad:
        raise job.bad[0][1]
    if not job.good:
        assert output is not None
        with RowWriter(output) as writer:
            _write_bad(writer, job)
        context.exit(_rows_code(writer, len(rows)))
    made = _plan(given, spec, hardware, job, how.max_tokens, strategy)
    console = _console()
    _show_plan(console, progress, made, hardware)
    # Here and not above: torch takes seconds, and every complaint so far came without it.
    from hetero.api import LLM

    with LLM(
        source.folder if model is not None else None,
        plan=made,
        profile=measured,
        dtype=dtype,
        max_model_len=min(spec.max_position_embeddings, job.longest + how.max_tokens),
        overlap=not no_overlap,
        progress=_teller(progress),
    ) as llm:
        loaded = Loaded(llm=llm, console=console, progress=progress)
        if output is None:
            begin = DEMO_PROMPT if is_demo else ""
            _run_prompt(loaded, job, how.params(), begin, as_json)
            code = ExitCode.OK
        else:
            code = _run_rows(loaded, job, how.params(), output)
        if trace is not None:
            _write_trace(llm, trace)
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


def _teller(progress: Progress) -> Callable[[str], None]:
    """Where lines about measuring and loading go."""
    if progress == "json":
        return lambda line: click.echo(json.dumps({"event": "message", "text": line}), err=True)
    if progress == "none":
        return lambda line: say(line) if line.startswith("warning") else None
    return say


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _read_plan(path: Path | None, strategy: str | None, machine: MachineOptions) -> Plan | None:
    if path is None:
        return None
    from planner.plan import Plan

    plan = Plan.load(path)
    if strategy is not None:
        raise UsageError("give --plan or --strategy, not both: a plan already has one")
    if machine.accelerator not in ("auto", plan.resources.accelerator):
        raise UsageError(
            f"--accelerator is {machine.accelerator} but the plan is for "
            f"{plan.resources.accelerator}; leave it out or plan again"
        )
    if machine.gpu_mem_gb is not None or machine.cpu_mem_gb is not None:
        raise UsageError("memory budgets are part of the plan: leave them out or plan again")
    return plan


def _hardware(
    measured: HardwareProfile, machine: MachineOptions, given: Plan | None
) -> HardwareProfile:
    from hetero.planning import usable_hardware

    if given is None:
        return cut_to_options(measured, machine)
    return usable_hardware(measured, given.resources)


def _plan(
    given: Plan | None,
    spec: ModelSpec,
    hardware: HardwareProfile,
    job: Job,
    max_tokens: int,
    strategy: str | None,
) -> Plan:
    """The plan that was given, if it applies, or one for this job."""
    from hetero.planning import check_plan, lacking_memory, make_plan
    from planner.workload import Workload

    if given is not None:
        check_plan(given, spec, hardware)
        return given
    num_seqs = min(len(job.good), MAX_NUM_SEQS)
    while True:
        # The longest prompt stands for all: memory is planned for it, time is then on the safe side.
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


def _show_plan(console: Console, progress: Progress, plan: Plan, hardware: HardwareProfile) -> None:
    from hetero.report import plan_lines

    if progress == "json":
        document = {"event": "plan", "plan": json.loads(plan.to_json())}
        click.echo(json.dumps(document), err=True)
    elif progress != "none":
        for line in plan_lines(plan, hardware):
            console.print(line, markup=False, soft_wrap=True)


def _show_result(loaded: Loaded) -> None:
    """Predicted beside measured, on stderr."""
    from hetero.report import print_comparison, print_terms
    from planner.timeline import compare

    llm, console = loaded.llm, loaded.console
    assert llm.measured is not None and llm.predicted is not None
    if loaded.progress == "json":
        document = {
            "event": "result",
            "measured": _speed(llm.measured),
            "predicted": _speed(llm.predicted),
        }
        click.echo(json.dumps(document), err=True)
    elif loaded.progress != "none":
        is_emulated = llm.plan.resources.accelerator == "emulated"
        print_comparison(console, llm.predicted, llm.measured, is_emulated=is_emulated)
        predicted, measured = llm.predicted_timeline, llm.timeline
        if predicted is not None and measured is not None:
            phase = "decode" if _has_decoded(llm) else "prefill"
            print_terms(console, phase, compare(predicted, measured))


def _has_decoded(llm: LLM) -> bool:
    return llm.measured is not None and llm.measured.decode_tokens_per_s > 0


def _generate(
    loaded: Loaded,
    job: Job,
    params: SamplingParams,
    observers: Sequence[Callable[[GenerationStep], None]],
    stream: TextStream | None,
) -> list[RequestOutput]:
    """Run the job under the view that was asked for."""
    from hetero.api import TokensPrompt
    from hetero.dashboard import make_view
    from hetero.run_monitor import RunMonitor

    llm = loaded.llm
    prompts = [TokensPrompt(prompt_token_ids=list(ids)) for _, ids in job.good]
    monitor = RunMonitor(
        plan=llm.plan,
        hardware=llm.hardware,
        num_requests=len(prompts),
        max_output_tokens=sum(
            min(params.max_tokens or 0, llm.max_model_len - len(ids)) for _, ids in job.good
        ),
        predict=lambda: llm.predicted_timeline,
    )
    view = make_view(loaded.progress, monitor, loaded.console)

    def observe(step: GenerationStep) -> None:
        for each in observers:
            each(step)
        # The dashboard has the text of a terminal: whatever else wrote there would tear it.
        if stream is not None and not view.shows_text:
            stream.show(step.texts[0])
        monitor.observe(step)
        view.after_step()

    with view:
        return llm.generate(prompts, params, observe=observe)


class TextStream:
    """Writes a growing text to stdout, each part once. Mutable."""

    def __init__(self) -> None:
        self._num_shown = 0

    def show(self, text: str) -> None:
        from hetero.terminal_text import visible

        new = text[self._num_shown :]
        if new:
            # A file gets the text as it is; a terminal would obey what is in it.
            click.echo(visible(new) if sys.stdout.isatty() else new, nl=False)
            sys.stdout.flush()
            self._num_shown = len(text)


def _run_prompt(
    loaded: Loaded, job: Job, params: SamplingParams, begin: str, as_json: bool
) -> None:
    stream = None if as_json else TextStream()
    if stream is not None and begin:
        click.echo(begin, nl=False)
    (answer,) = _generate(loaded, job, params, (), stream)
    if stream is not None:
        stream.show(answer.outputs[0].text)
        click.echo()
    else:
        click.echo(_document(loaded.llm, answer), nl=False)
    _show_result(loaded)
    if answer.outputs[0].finish_reason == "error":
        raise HeteroError(
            f"the model gave no numbers for the next token after {len(answer.outputs[0].token_ids)} "
            "tokens; its weights may be damaged, or overflow as float16: try --dtype bfloat16"
        )


def _document(llm: LLM, answer: RequestOutput) -> bytes:
    """The run as one JSON document."""
    import msgspec

    assert llm.measured is not None and llm.predicted is not None
    completion = answer.outputs[0]
    document = {
        "schema_version": SCHEMA_VERSION,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "num_prompt_tokens": len(answer.prompt_token_ids),
        "num_output_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "plan": llm.plan,
        "measured": _speed(llm.measured),
        "predicted": _speed(llm.predicted),
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def _speed(speed: Speed) -> dict[str, float]:
    return {
        "ttft_s": speed.ttft_s,
        "tpot_s": speed.tpot_s,
        "e2e_s": speed.e2e_s,
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "decode_tokens_per_s": speed.decode_tokens_per_s,
    }


def _run_rows(loaded: Loaded, job: Job, params: SamplingParams, output: Path) -> ExitCode:
    """Run every row; each is written in the step that finishes it."""
    good = [row for row, _ in job.good]
    with RowWriter(output) as writer:
        _write_bad(writer, job)

        def write_finished(step: GenerationStep) -> None:
            for sequence in step.result.finished:
                # LLM numbers its requests from 1, in the order of the prompts.
                index = int(sequence.seq_id) - 1
                is_error = sequence.finish_reason == "error"
                writer.write(
                    good[index],
                    text=step.texts[index],
                    token_ids=sequence.output_token_ids,
                    finish_reason=sequence.finish_reason,
                    error=str(sequence.stop_reason) if is_error else None,
                )

        _generate(loaded, job, params, (write_finished,), None)
    _show_result(loaded)
    return _rows_code(writer, len(job.rows))


def _write_bad(writer: RowWriter, job: Job) -> None:
    for row, error in job.bad:
        writer.write(row, error=str(error))


def _rows_code(writer: RowWriter, num_rows: int) -> ExitCode:
    if writer.num_failed == 0:
        return ExitCode.OK
    say(f"{writer.num_failed} of {num_rows} rows failed; their error says why")
    return ExitCode.FAILED_ROWS


def _write_trace(llm: LLM, path: Path) -> None:
    from hetero.measure.store import write_atomically
    from planner.timeline import chrome_trace

    predicted, measured = llm.predicted_timeline, llm.timeline
    assert predicted is not None and measured is not None
    emulated = " (emulated)" if llm.plan.resources.accelerator == "emulated" else ""
    timelines = [(f"predicted{emulated}", predicted), (f"measured{emulated}", measured)]
    write_atomically(path, chrome_trace(timelines).encode())
    say(f"wrote {path}")

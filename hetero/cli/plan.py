"""`hetero plan`: where a model goes, how fast it will be, what limits it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hetero.cli.machine import (
    MachineOptions,
    lookup_model,
    machine_options,
    output_path,
    read_profile,
    say,
    usable_part,
)
from hetero.cli.run_plan import check_has_weights, try_plan
from hetero.errors import ExitCode

if TYPE_CHECKING:
    from hetero.planning import DtypeName
    from planner.hardware import HardwareProfile
    from planner.model_spec import Quantization
    from planner.plan import Plan
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
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON document.")
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
        default_workload,
        lacking_memory,
        low_confidence_note,
        make_plan,
        spec_as_run,
    )

    options = MachineOptions(**machine)
    source = lookup_model(model)
    if is_tried:
        check_has_weights(source, "to try it")
    profile = read_profile(options)
    hardware = usable_part(profile, options)
    spec = spec_as_run(source, dtype, hardware, say, quantization)
    workload = default_workload(
        spec.max_position_embeddings,
        prompt_len=prompt_len,
        output_len=output_len,
        num_seqs=num_seqs,
    )
    known = own_corrections(spec, profile, hardware, os.environ, say)
    made = make_plan(spec, hardware, workload, objective, strategy=strategy, corrections=known)
    if is_tried and made.feasible:
        made = try_plan(made, spec, hardware, known, model, say, profile=profile)
    if output is not None:
        write_atomically(output, made.to_json(), is_private=False)
        say(f"wrote {output}")
    found = (low_confidence_note(hardware), assumed_note(spec, hardware))
    notes = tuple(note for note in found if note is not None)
    if as_json:
        from hetero.report import trust_text

        click.echo(made.to_json(), nl=False)
        if hardware.provenance == "datasheet":
            notes = (*notes, trust_text(made, hardware) or "")
        for note in notes:
            say(f"note: {note}")
    else:
        _print(made, hardware, notes)
    if not made.feasible:
        say(f"error: {lacking_memory(made, spec, hardware)}")
        context.exit(ExitCode.DOES_NOT_FIT)


def _print(made: Plan, hardware: HardwareProfile, notes: tuple[str, ...]) -> None:
    from msgspec.structs import replace
    from rich.console import Console

    from hetero.report import print_plan

    hardware = replace(hardware, notes=(*hardware.notes, *notes))
    # A pipe has no width: a table of 100 columns is what grep and a mail can take.
    width = None if sys.stdout.isatty() else 100
    print_plan(Console(width=width, highlight=False), made, hardware)

"""`hetero doctor`: what this machine offers, what is missing, and how to fix it."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from hetero.errors import ExitCode

if TYPE_CHECKING:
    from hetero.measure.environment import Check, Status

SCHEMA_VERSION = 1


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the checks as one JSON document.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Check Python, torch, CPU, memory, GPU and stored files; exit 6 if something is broken."""
    import msgspec

    from hetero.measure.environment import check_environment
    from hetero.measure.store import default_cache_dir

    checks = check_environment(default_cache_dir(os.environ))
    has_failed = any(check.status == "fail" for check in checks)
    if as_json:
        document = {
            "schema_version": SCHEMA_VERSION,
            "is_healthy": not has_failed,
            "checks": [asdict(check) for check in checks],
        }
        click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))
    else:
        _print_checks(checks)
    if has_failed:
        context.exit(ExitCode.ENVIRONMENT)


def _print_checks(checks: tuple[Check, ...]) -> None:
    from rich.console import Console
    from rich.text import Text

    styles: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    # soft_wrap: a line stays a line, so that grep finds it
    console = Console(highlight=False)
    for check in checks:
        status = Text(f"{check.status.upper():<5}", style=styles[check.status])
        console.print(status.append(f"{check.name:<13}{check.text}", style="none"), soft_wrap=True)
        if check.fix is not None:
            console.print(Text(f"     {'':<13}fix: {check.fix}"), soft_wrap=True)

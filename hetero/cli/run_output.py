"""What `hetero run` writes: the text as it comes, one JSON document, plan and result on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from hetero.cli.machine import say

if TYPE_CHECKING:
    from rich.console import Console

    from hetero.api import LLM
    from hetero.outputs import RequestOutput
    from hetero.report import Speed
    from hetero.run_monitor import LastStep
    from hetero.run_view import Progress
    from planner.hardware import HardwareProfile
    from planner.plan import Plan

SCHEMA_VERSION = 1


class TextStream:
    """Writes a growing text to stdout, each part once, after a beginning. Mutable."""

    def __init__(self, begin: str) -> None:
        self._waiting = begin
        self._num_shown = 0

    @property
    def is_terminal(self) -> bool:
        return sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Write what is new of the text so far."""
        from hetero.terminal_text import visible

        new = self._waiting + text[self._num_shown :]
        self._waiting, self._num_shown = "", len(text)
        if new:
            # A file gets the text as it is; a terminal would obey what is in it.
            click.echo(visible(new) if self.is_terminal else new, nl=False)
            sys.stdout.flush()

    def end(self, text: str) -> None:
        """Write the rest and end the line."""
        self.show(text)
        click.echo()


def teller(progress: Progress) -> Callable[[str], None]:
    """Where lines about measuring and loading go."""
    if progress == "json":
        return lambda line: _say_json("message", text=line)
    if progress == "none":
        return lambda line: say(line) if line.startswith("warning") else None
    return say


def show_plan(console: Console, progress: Progress, plan: Plan, hardware: HardwareProfile) -> None:
    """The plan in a few lines, before the run."""
    from hetero.report import plan_lines, print_trial

    if progress == "json":
        _say_json("plan", plan=json.loads(plan.to_json()))
    elif progress != "none":
        for line in plan_lines(plan, hardware):
            console.print(line, markup=False, soft_wrap=True)
        if plan.trial is not None:
            print_trial(console, plan.trial)


def show_result(console: Console, progress: Progress, llm: LLM, last: LastStep | None) -> None:
    """Predicted beside measured, after the run."""
    from hetero.report import is_emulated, print_comparison, print_terms

    assert llm.measured is not None and llm.predicted is not None
    if progress == "json":
        _say_json("result", measured=_speed(llm.measured), predicted=_speed(llm.predicted))
    elif progress != "none":
        print_comparison(console, llm.predicted, llm.measured, is_emulated=is_emulated(llm.plan))
        if last is not None:
            console.print()
            print_terms(console, last.phase, last.terms)


def run_document(llm: LLM, answer: RequestOutput) -> bytes:
    """A run of one prompt as one JSON document."""
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


def _say_json(event: str, **values: object) -> None:
    click.echo(json.dumps({"event": event, **values}), err=True)

"""What shows a run while it runs, on stderr: the dashboard, plain lines, JSON lines, or nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Protocol, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from hetero.dashboard import frame, plain_line
from hetero.run_monitor import RunMonitor, Snapshot
from hetero.terminal_text import one_line

Progress = Literal["auto", "rich", "plain", "json", "none"]

FRAMES_PER_S = 4
_TERMINAL_LINE_S = 2.0
_PIPE_LINE_S = 10.0


class ProgressView(Protocol):
    """What shows a run while it runs; `shows_text` where the generated text is part of it."""

    shows_text: bool

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def after_step(self) -> None:
        """Called by the job after the monitor has seen a step."""


def make_view(
    progress: Progress, monitor: RunMonitor, console: Console, *, shares_terminal: bool = False
) -> ProgressView:
    """The view that was asked for; `auto` is the dashboard where stderr is a terminal.

    `shares_terminal`: text goes to a terminal as it comes, so lines wait until it has ended.
    """
    can_animate = console.is_terminal and not console.is_dumb_terminal
    if progress == "none":
        return SilentView()
    if progress == "json":
        period_s = _TERMINAL_LINE_S
        return LineView(monitor, console, period_s=period_s, as_json=True)
    if progress in ("auto", "rich") and can_animate:
        return LiveView(monitor, console)
    if progress == "rich":
        console.print("warning: --progress rich needs a terminal; plain lines instead")
    period_s = _PIPE_LINE_S if progress == "auto" else _TERMINAL_LINE_S
    if shares_terminal and console.is_terminal:
        period_s = math.inf
    return LineView(monitor, console, period_s=period_s)


class SilentView:
    """Shows nothing."""

    shows_text = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def after_step(self) -> None:
        pass


class LineView:
    """Prints a line every `period_s`, and one at the end. Mutable."""

    shows_text = False

    def __init__(
        self, monitor: RunMonitor, console: Console, *, period_s: float, as_json: bool = False
    ) -> None:
        self._monitor = monitor
        self._console = console
        self._period_s = period_s
        self._as_json = as_json
        self._next_s = monitor.elapsed_s + period_s
        self._printed: Snapshot | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._printed is not self._monitor.snapshot:
            self._print()

    def after_step(self) -> None:
        if self._monitor.elapsed_s >= self._next_s:
            self._print()

    def _print(self) -> None:
        snapshot = self._printed = self._monitor.snapshot
        elapsed_s = self._monitor.elapsed_s
        line = json_line(snapshot, elapsed_s) if self._as_json else plain_line(snapshot, elapsed_s)
        self._console.print(Text(line), soft_wrap=True, highlight=False)
        self._next_s = elapsed_s + self._period_s


class LiveView:
    """The dashboard: rich draws it in a thread of its own, from the monitor's snapshots. Mutable.

    An exception while drawing ends the dashboard, not the run: lines follow.
    """

    shows_text = True

    def __init__(self, monitor: RunMonitor, console: Console) -> None:
        self._frame = _Frame(monitor)
        self._lines = LineView(monitor, console, period_s=_TERMINAL_LINE_S)
        self._console = console
        self._has_lines = False
        # stdout carries the result and is left alone; what is written to stderr goes above.
        self._live = Live(
            console=console,
            get_renderable=lambda: self._frame,
            refresh_per_second=FRAMES_PER_S,
            transient=True,
            redirect_stdout=False,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()
        self._check()
        if self._has_lines:
            self._lines.__exit__(kind, error, traceback)

    def after_step(self) -> None:
        self._check()
        if self._has_lines:
            self._lines.after_step()

    def _check(self) -> None:
        if self._frame.error is not None and not self._has_lines:
            self._has_lines = True
            self._live.stop()
            what = f"{type(self._frame.error).__name__}: {self._frame.error}"
            self._console.print(
                Text(one_line(f"warning: the dashboard failed ({what}); lines from here on")),
                soft_wrap=True,
            )


class _Frame:
    """What rich draws: the newest snapshot at the size of the terminal. Mutable: keeps an error."""

    def __init__(self, monitor: RunMonitor) -> None:
        self.error: Exception | None = None
        self._monitor = monitor

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Drawn to the end inside `try`: rich would otherwise meet the exception in its thread.
        try:
            if self.error is None:
                yield from self._segments(console, options)
        except Exception as error:
            self.error = error

    def _segments(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        width, height = console.size
        view = frame(
            self._monitor.snapshot,
            self._monitor.elapsed_s,
            width=width,
            height=height,
            is_ascii=options.ascii_only,
        )
        lines = console.render_lines(view, options.update(width=width, height=None), pad=False)
        for line in lines:
            yield from line
            yield Segment.line()


def json_line(snapshot: Snapshot, elapsed_s: float) -> str:
    """A run as one line of JSON."""
    last = snapshot.last_step
    document = {
        "event": "progress",
        "elapsed_s": elapsed_s,
        "eta_s": snapshot.eta_s,
        "num_done": snapshot.num_done,
        "num_requests": snapshot.num_requests,
        "num_prompt_tokens": snapshot.num_prompt_tokens,
        "num_output_tokens": snapshot.num_output_tokens,
        "prefill_tokens_per_s": snapshot.speeds["prefill"].mean,
        "decode_tokens_per_s": snapshot.speeds["decode"].mean,
        "ttft_s": snapshot.ttft_s,
        "last_step": None
        if last is None
        else {
            "phase": last.phase,
            "predicted_s": last.predicted_s,
            "measured_s": last.measured_s,
        },
    }
    return json.dumps(document)

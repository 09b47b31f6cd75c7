"""The live view of a run: panels on a terminal, or plain lines, or JSON lines; all on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hetero.report import bytes_text, rate_text, ratio_text, seconds_text, terms_table
from hetero.run_monitor import DeviceUse, LastStep, PhaseSpeed, RunMonitor, Snapshot
from hetero.terminal_text import one_line, visible

Progress = Literal["auto", "rich", "plain", "json", "none"]

FRAMES_PER_S = 4
FULL_SIZE = (120, 36)
COMPACT_SIZE = (80, 24)

_TERMINAL_LINE_S = 2.0
_PIPE_LINE_S = 10.0
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_BLOCKS = "_.-=+*%#"
_BAR_CELLS = 20
_MIN_TEXT_LINES = 3


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


def make_view(progress: Progress, monitor: RunMonitor, console: Console) -> ProgressView:
    """The view that was asked for; `auto` is the dashboard where stderr is a terminal."""
    can_animate = console.is_terminal and not console.is_dumb_terminal
    if progress == "none":
        return SilentView()
    if progress == "json":
        period_s = _TERMINAL_LINE_S
        return LineView(monitor, console, period_s=period_s, as_json=True)
    if progress == "rich" or (progress == "auto" and can_animate):
        return LiveView(monitor, console)
    period_s = _TERMINAL_LINE_S if progress == "plain" else _PIPE_LINE_S
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


def frame(
    snapshot: Snapshot, elapsed_s: float, *, width: int, height: int, is_ascii: bool = False
) -> RenderableType:
    """One picture of a run: all panels, the most important ones, or one line, as there is room."""
    if width >= FULL_SIZE[0] and height >= FULL_SIZE[1]:
        return _full(snapshot, elapsed_s, width, height, is_ascii)
    if width >= COMPACT_SIZE[0] and height >= COMPACT_SIZE[1]:
        return _compact(snapshot, elapsed_s, width, height, is_ascii)
    line = plain_line(snapshot, elapsed_s)
    return Text(line, no_wrap=True, overflow="ellipsis", end="")


def plain_line(snapshot: Snapshot, elapsed_s: float) -> str:
    """A run in one line, the most important first."""
    decode, last = snapshot.speeds["decode"], snapshot.last_step
    parts = [
        f"{snapshot.num_done}/{snapshot.num_requests} done",
        f"{snapshot.num_prompt_tokens} tokens in",
        f"{snapshot.num_output_tokens} out",
        f"{seconds_text(elapsed_s)}",
    ]
    if decode.mean is not None:
        parts.insert(1, rate_text(decode.mean))
    if snapshot.eta_s:
        parts.append(f"{seconds_text(snapshot.eta_s)} left")
    if last is not None:
        parts.append(
            f"last {last.phase} step {seconds_text(last.measured_s)}, "
            f"predicted {seconds_text(last.predicted_s)}"
        )
    return ", ".join(parts)


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


def _full(
    snapshot: Snapshot, elapsed_s: float, width: int, height: int, is_ascii: bool
) -> RenderableType:
    left = Group(
        _panel("job", _job(snapshot, elapsed_s, is_ascii), is_ascii),
        _panel("speed", _speed(snapshot, is_ascii), is_ascii),
        _panel("devices", _devices(snapshot.devices, is_ascii), is_ascii),
    )
    right = Group(
        _panel("plan and reality", _terms(snapshot.last_step), is_ascii),
        _panel("last step", _lanes(snapshot.last_step, is_ascii), is_ascii),
    )
    # Rows inside the panels and their borders: 3 + 4 + one a device; terms with heading and sum.
    num_left = 5 + 6 + 2 + len(snapshot.devices)
    last = snapshot.last_step
    num_right = 6 if last is None else 4 + len(last.terms) + 3 + len(last.lanes)
    num_free = height - 1 - max(num_left, num_right) - 1
    return Group(
        _header(snapshot),
        _side_by_side(left, right),
        *_text_panel(snapshot.text, width, num_free, is_ascii),
    )


def _compact(
    snapshot: Snapshot, elapsed_s: float, width: int, height: int, is_ascii: bool
) -> RenderableType:
    left = Group(
        _panel("job", _job(snapshot, elapsed_s, is_ascii), is_ascii),
        _panel("speed", _speed(snapshot, is_ascii), is_ascii),
    )
    right = _panel("plan and reality", _terms(snapshot.last_step), is_ascii)
    num_terms = 0 if snapshot.last_step is None else len(snapshot.last_step.terms)
    num_free = height - 1 - max(11, 4 + num_terms) - (2 + len(snapshot.devices)) - 1
    return Group(
        _header(snapshot),
        _side_by_side(left, right),
        _panel("devices", _devices(snapshot.devices, is_ascii), is_ascii),
        *_text_panel(snapshot.text, width, num_free, is_ascii),
    )


def _header(snapshot: Snapshot) -> Text:
    return Text(one_line(snapshot.title), style="bold", no_wrap=True, overflow="ellipsis")


def _side_by_side(left: RenderableType, right: RenderableType) -> Table:
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(left, right)
    return grid


def _panel(title: str, content: RenderableType, is_ascii: bool) -> Panel:
    border = box.ASCII if is_ascii else box.ROUNDED
    return Panel(content, title=title, title_align="left", box=border, padding=(0, 1))


def _facts(rows: Sequence[tuple[str, str | Text]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in rows:
        table.add_row(Text(name), value if isinstance(value, Text) else Text(value))
    return table


def _job(snapshot: Snapshot, elapsed_s: float, is_ascii: bool) -> Table:
    share = snapshot.num_output_tokens / max(1, snapshot.max_output_tokens)
    eta = "" if snapshot.eta_s is None else f", {seconds_text(snapshot.eta_s)} left"
    done = f" {snapshot.num_done}/{snapshot.num_requests} done"
    return _facts(
        (
            ("requests", _bar(share, is_ascii).append(done)),
            ("tokens", f"{snapshot.num_prompt_tokens} in, {snapshot.num_output_tokens} out"),
            ("time", f"{seconds_text(elapsed_s)}{eta}"),
        )
    )


def _speed(snapshot: Snapshot, is_ascii: bool) -> Table:
    ttft = "-" if snapshot.ttft_s is None else seconds_text(snapshot.ttft_s)
    return _facts(
        (
            ("prefill", _now_and_mean(snapshot.speeds["prefill"])),
            ("decode", _now_and_mean(snapshot.speeds["decode"])),
            ("first token", ttft),
            ("", sparkline(snapshot.decode_history[-24:], is_ascii)),
        )
    )


def _now_and_mean(speed: PhaseSpeed) -> str:
    if speed.mean is None:
        return "-"
    now = "" if speed.now is None else f"{rate_text(speed.now)}, "
    return f"{now}mean {rate_text(speed.mean)}"


def _devices(devices: Sequence[DeviceUse], is_ascii: bool) -> Table:
    rows = []
    for device in devices:
        busy = "" if device.busy_share is None else f"{device.busy_share:4.0%} busy, "
        used = "" if device.used_bytes is None else f"{bytes_text(device.used_bytes)} used, "
        memory = f"{bytes_text(device.planned_bytes)} planned of {bytes_text(device.limit_bytes)}"
        rows.append((device.name, f"{busy}{used}{memory}"))
    return _facts(rows)


def _terms(last: LastStep | None) -> RenderableType:
    if last is None:
        return Text("no step yet", style="dim")
    return terms_table(f"{last.phase} step", last.terms)


def _lanes(last: LastStep | None, is_ascii: bool) -> RenderableType:
    if last is None:
        return Text("no step yet", style="dim")
    rows: list[tuple[str, str | Text]] = [
        (use.lane, _bar(use.busy_share, is_ascii).append(f" {use.busy_share:4.0%} busy"))
        for use in last.lanes
    ]
    ratio = last.measured_s / last.predicted_s if last.predicted_s > 0 else None
    overlap = Text(f"{last.overlap:.0%} of the work; step ").append_text(ratio_text(ratio))
    return _facts([*rows, ("overlap", overlap.append(" predicted"))])


def _text_panel(text: str, width: int, num_free: int, is_ascii: bool) -> list[RenderableType]:
    """The end of the text, as much of it as there is room for; nothing without text."""
    num_lines = num_free - 2
    if not text or num_lines < _MIN_TEXT_LINES:
        return []
    return [_panel("text", _Tail(text, num_lines), is_ascii)]


class _Tail:
    """The last lines of a text, wrapped to the width that it gets."""

    def __init__(self, text: str, num_lines: int) -> None:
        self._text = text
        self._num_lines = num_lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Wrapping the whole of a long text for its last lines would cost more with each token.
        end = self._text[-self._num_lines * options.max_width :]
        lines = Text(visible(end)).wrap(console, options.max_width)
        yield Text("\n").join(lines[-self._num_lines :])


def _bar(share: float, is_ascii: bool) -> Text:
    full = round(min(1.0, max(0.0, share)) * _BAR_CELLS)
    on, off = ("#", ".") if is_ascii else ("\u2588", "\u2591")
    return Text(on * full, style="green").append(off * (_BAR_CELLS - full), style="dim")


def sparkline(values: Sequence[float], is_ascii: bool = False) -> str:
    """Values as characters of rising height, the largest the highest.

    Examples
    --------
    >>> sparkline([1, 2, 4], is_ascii=True)
    '.=#'
    """
    blocks = _ASCII_BLOCKS if is_ascii else _BLOCKS
    top = max(values, default=0.0)
    if top <= 0:
        return ""
    return "".join(blocks[min(7, max(0, round(value / top * 8) - 1))] for value in values)

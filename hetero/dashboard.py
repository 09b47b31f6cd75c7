"""The dashboard: a Snapshot of a run as panels that suit the size of the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import (
    Console,
    ConsoleOptions,
    Group,
    OverflowMethod,
    RenderableType,
    RenderResult,
)
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hetero.explain_view import bar
from hetero.report import (
    AMBER_RATIO,
    bytes_text,
    rate_text,
    ratio_text,
    seconds_text,
    terms_table,
)
from hetero.run_monitor import LANE_CELLS, DeviceUse, LastStep, PhaseSpeed, Snapshot
from hetero.terminal_text import ASCII_BLOCKS, BLOCKS, one_line, visible

FULL_SIZE = (120, 36)
COMPACT_SIZE = (80, 24)

# Of a bar; a sparkline has twice as many.
_FULL_CELLS = 20
_COMPACT_CELLS = 10
_MIN_TEXT_LINES = 3

_BUBBLE, _ASCII_BUBBLE = "\u00b7", ":"


def frame(
    snapshot: Snapshot, elapsed_s: float, *, width: int, height: int, is_ascii: bool = False
) -> RenderableType:
    """One picture of a run: all panels, the most important ones, or one line, as there is room."""
    if width >= FULL_SIZE[0] and height >= FULL_SIZE[1]:
        return _full(snapshot, elapsed_s, width, height, is_ascii)
    if width >= COMPACT_SIZE[0] and height >= COMPACT_SIZE[1]:
        return _compact(snapshot, elapsed_s, width, height, is_ascii)
    line = plain_line(snapshot, elapsed_s)
    return Text(line, no_wrap=True, overflow="crop" if is_ascii else "ellipsis")


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


def _full(
    snapshot: Snapshot, elapsed_s: float, width: int, height: int, is_ascii: bool
) -> RenderableType:
    left = Group(
        _panel("job", _job(snapshot, elapsed_s, _FULL_CELLS, is_ascii), is_ascii),
        _panel("speed", _speed(snapshot, _FULL_CELLS, is_ascii), is_ascii),
        _panel("devices", _devices(snapshot.devices, is_ascii), is_ascii),
    )
    right = Group(
        _panel("plan and reality", _terms(snapshot.last_step, is_ascii), is_ascii),
        _panel("last step", _lanes(snapshot.last_step, is_ascii), is_ascii),
    )
    # Rows inside the panels and their borders: 3 + 4 + one a device; terms with heading and sum.
    num_left = 5 + 6 + 2 + len(snapshot.devices)
    last = snapshot.last_step
    num_right = _num_term_rows(last) + _num_lane_rows(last)
    num_free = height - 1 - max(num_left, num_right) - 1
    return Group(
        _header(snapshot, is_ascii),
        _side_by_side(left, right, width),
        *_text_panel(snapshot.text, width, num_free, is_ascii),
    )


def _compact(
    snapshot: Snapshot, elapsed_s: float, width: int, height: int, is_ascii: bool
) -> RenderableType:
    left = Group(
        _panel("job", _job(snapshot, elapsed_s, _COMPACT_CELLS, is_ascii), is_ascii),
        _panel("speed", _speed(snapshot, _COMPACT_CELLS, is_ascii), is_ascii),
    )
    last = snapshot.last_step
    right = _panel("plan and reality", _terms(last, is_ascii), is_ascii)
    num_free = height - 1 - max(11, _num_term_rows(last)) - (2 + len(snapshot.devices)) - 1
    below: list[RenderableType] = []
    # A text that grows is what most look at: the lanes have what it can spare.
    num_spare = num_free - (2 + _MIN_TEXT_LINES if snapshot.text else 0)
    if num_spare >= _num_lane_rows(last):
        below.append(_panel("last step", _lanes(last, is_ascii), is_ascii))
        num_free -= _num_lane_rows(last)
    return Group(
        _header(snapshot, is_ascii),
        _side_by_side(left, right, width),
        _panel("devices", _devices(snapshot.devices, is_ascii), is_ascii),
        *below,
        *_text_panel(snapshot.text, width, num_free, is_ascii),
    )


def _num_term_rows(last: LastStep | None) -> int:
    """Rows of the panel of terms: its border, heading and sum, and what is the most of it."""
    return 3 if last is None else 4 + len(last.terms) + (_reason(last) is not None)


def _num_lane_rows(last: LastStep | None) -> int:
    """Rows of the panel of lanes: its border, heading and overlap."""
    return 3 if last is None else 4 + len(last.lanes)


def _header(snapshot: Snapshot, is_ascii: bool) -> Text:
    overflow: OverflowMethod = "crop" if is_ascii else "ellipsis"
    # The newest event in the same line: panels keep their places.
    title = "; ".join((snapshot.title, *snapshot.events[-1:]))
    return Text(one_line(title), style="bold", no_wrap=True, overflow=overflow)


def _side_by_side(left: RenderableType, right: RenderableType, width: int) -> Table:
    # Widths, not ratios: for those rich would lay everything out once more to measure it.
    grid = Table.grid()
    grid.add_column(width=width // 2)
    grid.add_column(width=width - width // 2)
    grid.add_row(left, right)
    return grid


def _panel(title: str, content: RenderableType, is_ascii: bool) -> Panel:
    border = box.ASCII if is_ascii else box.ROUNDED
    return Panel(content, title=title, title_align="left", box=border, padding=(0, 1))


def _facts(rows: Sequence[tuple[str, str | Text]], is_ascii: bool) -> Text:
    """A line a fact; a Table would take three times as long to lay out."""
    pad = max(len(name) for name, _ in rows) + 2
    lines = [
        Text().append(name.ljust(pad), style="dim").append_text(_as_text(value))
        for name, value in rows
    ]
    facts = Text("\n").join(lines)
    facts.no_wrap, facts.overflow = True, "crop" if is_ascii else "ellipsis"
    return facts


def _as_text(value: str | Text) -> Text:
    return value if isinstance(value, Text) else Text(value)


def _job(snapshot: Snapshot, elapsed_s: float, num_cells: int, is_ascii: bool) -> Text:
    share = snapshot.num_output_tokens / max(1, snapshot.max_output_tokens)
    eta = f", {seconds_text(snapshot.eta_s)} left" if snapshot.eta_s else ""
    done = f" {snapshot.num_done}/{snapshot.num_requests} done"
    return _facts(
        (
            ("requests", _bar(share, num_cells, is_ascii).append(done)),
            ("tokens", f"{snapshot.num_prompt_tokens} in, {snapshot.num_output_tokens} out"),
            ("time", f"{seconds_text(elapsed_s)}{eta}"),
        ),
        is_ascii,
    )


def _speed(snapshot: Snapshot, num_cells: int, is_ascii: bool) -> Text:
    ttft = "-" if snapshot.ttft_s is None else seconds_text(snapshot.ttft_s)
    return _facts(
        (
            ("prefill", _now_and_mean(snapshot.speeds["prefill"])),
            ("decode", _now_and_mean(snapshot.speeds["decode"])),
            ("1st token", ttft),
            ("", sparkline(snapshot.decode_history[-2 * num_cells :], is_ascii)),
        ),
        is_ascii,
    )


def _now_and_mean(speed: PhaseSpeed) -> str:
    if speed.mean is None:
        return "-"
    if speed.now is None:
        return f"mean {rate_text(speed.mean)}"
    return f"{rate_text(speed.now)} (mean {rate_text(speed.mean).split()[0]})"


def _devices(devices: Sequence[DeviceUse], is_ascii: bool) -> Text:
    return _facts([(device.name, _use_text(device)) for device in devices], is_ascii)


def _use_text(device: DeviceUse) -> str:
    limit, planned = bytes_text(device.limit_bytes), bytes_text(device.planned_bytes)
    if device.used_bytes is None:
        return f"plan {planned} of {limit}"
    busy = "" if device.busy_share is None else f"{device.busy_share:.0%} busy, "
    return f"{busy}{bytes_text(device.used_bytes)}/{limit}, plan {planned}"


def _terms(last: LastStep | None, is_ascii: bool) -> RenderableType:
    if last is None:
        return Text("no step yet", style="dim")
    table, reason = terms_table(last.phase, last.terms, gap=1), _reason(last)
    if reason is None:
        return table
    reason.no_wrap, reason.overflow = True, "crop" if is_ascii else "ellipsis"
    return Group(table, reason)


def _reason(last: LastStep) -> Text | None:
    """What made a step longer than predicted, where that is worth an alarm."""
    ratio = last.measured_s / last.predicted_s if last.predicted_s > 0 else 1.0
    if last.excess is None or ratio <= AMBER_RATIO:
        return None
    lane = "" if last.excess.lane is None else f"{last.excess.lane} "
    words = f"most of it: {lane}{last.excess.term} +{seconds_text(last.excess.seconds)}"
    return Text(words, style=ratio_text(ratio).style)


def _lanes(last: LastStep | None, is_ascii: bool) -> Text:
    """A row a lane: its work over the time of the step, and its busy share beside the plan's."""
    if last is None:
        return Text("no step yet", style="dim")
    lines = [
        Text(f"{'':<5} {seconds_text(last.measured_s):<{LANE_CELLS}}  busy  plan   bubbles", "dim")
    ]
    for use in last.lanes:
        line = Text(f"{use.lane:<5} ", style="dim")
        line.append(_strip(use.shares, is_ascii), style="green")
        line.append(f" {use.busy_share:>5.0%} {use.predicted_share:>5.0%}", style="not dim")
        lines.append(line.append(f" {seconds_text(use.idle_s):>9}", style="not dim"))
    overlap = f"{last.overlap:.0%} of the work, plan {last.predicted_overlap:.0%}"
    lines.append(Text().append("overlap ", style="dim").append(overlap))
    text = Text("\n").join(lines)
    text.no_wrap, text.overflow = True, "crop" if is_ascii else "ellipsis"
    return text


def _strip(shares: Sequence[float], is_ascii: bool) -> str:
    """Work as blocks; where a lane waited between its ops a bubble."""
    blocks = bar(shares, is_ascii)
    first = len(blocks) - len(blocks.lstrip())
    work = blocks.strip().replace(" ", _ASCII_BUBBLE if is_ascii else _BUBBLE)
    return (" " * first + work).ljust(len(blocks))


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


def _bar(share: float, num_cells: int, is_ascii: bool) -> Text:
    full = round(min(1.0, max(0.0, share)) * num_cells)
    on, off = ("#", ".") if is_ascii else ("\u2588", "\u2591")
    return Text().append(on * full, style="green").append(off * (num_cells - full), style="dim")


def sparkline(values: Sequence[float], is_ascii: bool = False) -> str:
    """Values as characters of rising height, the largest the highest.

    Examples
    --------
    >>> sparkline([1, 2, 4], is_ascii=True)
    '.=#'
    """
    blocks = ASCII_BLOCKS if is_ascii else BLOCKS
    top = max(values, default=0.0)
    if top <= 0:
        return ""
    return "".join(blocks[min(7, max(0, round(value / top * 8) - 1))] for value in values)

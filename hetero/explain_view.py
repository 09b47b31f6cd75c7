"""What explanations and rivals look like as text: tables, and the lanes of a step as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from hetero.report import add_row, bytes_text, rate_text, seconds_text, table_of
from hetero.terminal_text import ASCII_BLOCKS, BLOCKS, one_line
from planner.explain import Explanation, Gained, GpuMemory, GpuUse
from planner.kernels import Resource
from planner.nearest_fit import FittingChange
from planner.plan import Plan
from planner.rivals import RivalTimes
from planner.step_graph import LANES, Lane
from planner.timeline import Timeline
from planner.workload import PHASES, Phase

_NUM_CELLS = 60
# Of a cell's time a lane that works less is drawn as idle.
_MIN_BUSY_SHARE = 1 / 16
# Gains of less of the plan's seconds than this are told as none.
_MIN_GAIN = 0.0005

_RESOURCE_NAMES: dict[Resource, str] = {
    "compute": "FLOPs",
    "memory": "memory bandwidth",
    "dequant": "unpacking weights",
    "launch": "starting kernels",
    "link": "the link",
}
_USE_NAMES: dict[GpuUse, str] = {
    "attention": "attention",
    "router": "router, shared experts",
    "experts": "experts",
    "dense": "dense feed-forward",
    "embedding": "embedding",
    "head": "head",
    "kv": "KV cache",
    "activations": "activations",
    "staging": "streamed weights, buffers",
    "slots": "copied experts, slots",
    "free": "free",
}
_GAINED_NAMES: dict[Gained, str] = {
    "gpu memory size": "1 GB more GPU memory",
    "cpu memory": "10% more CPU bandwidth",
    "cpu compute": "10% more CPU FLOPs",
    "gpu memory": "10% more GPU bandwidth",
    "gpu compute": "10% more GPU FLOPs",
    "link": "10% more link bandwidth",
}


def print_explanation(
    console: Console, plan: Plan, explanation: Explanation, timelines: Mapping[Phase, Timeline]
) -> None:
    """Print what binds, the lanes of a step, GPU memory, gains, and what would fit."""
    _print_bindings(console, explanation)
    print_lanes(console, timelines)
    if explanation.gpu_memory is not None and plan.placement.uses("gpu"):
        _print_memory(console, explanation.gpu_memory)
    if explanation.gains:
        _print_gains(console, plan, explanation)
    if explanation.nearest_fits:
        _print_nearest(console, explanation.nearest_fits)


def _print_bindings(console: Console, explanation: Explanation) -> None:
    table = table_of(
        ("what binds", "left"),
        ("lane", "left"),
        ("does", "left"),
        ("bound by", "left"),
        ("time", "right"),
        ("share", "right"),
    )
    names: dict[Phase, str] = {"prefill": "prefill", "decode": "decode step"}
    for phase in PHASES:
        for index, part in enumerate(explanation.bindings_by_phase[phase]):
            add_row(
                table,
                (
                    names[phase] if index == 0 else "",
                    part.lane,
                    part.term,
                    _RESOURCE_NAMES[part.resource],
                    seconds_text(part.seconds),
                    f"{part.share:.0%}",
                ),
            )
    console.print()
    console.print(table)


def print_lanes(console: Console, timelines: Mapping[Phase, Timeline]) -> None:
    """Print a row for each lane of a step of each phase: how much of its time the lane works."""
    is_ascii = console.options.ascii_only
    for phase in PHASES:
        timeline = timelines[phase]
        table = table_of(
            (f"one {phase} step", "left"),
            (seconds_text(timeline.makespan_s), "left"),
            ("busy", "right"),
        )
        for lane, shares in lane_shares(timeline, _NUM_CELLS).items():
            busy = timeline.busy_s()[lane] / timeline.makespan_s
            add_row(table, (lane, Text(bar(shares, is_ascii), no_wrap=True), f"{busy:.0%}"))
        console.print()
        console.print(table)


def lane_shares(timeline: Timeline, num_cells: int) -> dict[Lane, list[float]]:
    """Of each of so many equal parts of a step the share in which each lane works.

    Lanes without ops are left out.
    """
    cell_s = timeline.makespan_s / num_cells
    found: dict[Lane, list[float]] = {}
    for lane in LANES:
        spans = timeline.lane(lane)
        if not spans or cell_s == 0:
            continue
        shares = [0.0] * num_cells
        for span in spans:
            first = min(num_cells - 1, int(span.start_s / cell_s))
            last = min(num_cells - 1, int(span.end_s / cell_s))
            for cell in range(first, last + 1):
                start_s = max(span.start_s, cell * cell_s)
                end_s = min(span.end_s, (cell + 1) * cell_s)
                shares[cell] += max(0.0, end_s - start_s) / cell_s
        found[lane] = [min(1.0, share) for share in shares]
    return found


def bar(shares: Sequence[float], is_ascii: bool) -> str:
    """Shares as characters of rising height, a blank where there is next to none.

    Examples
    --------
    >>> bar([0.0, 0.1, 0.5, 1.0], is_ascii=True)
    ' _=#'
    """
    blocks = ASCII_BLOCKS if is_ascii else BLOCKS
    return "".join(
        blocks[max(0, round(share * len(blocks)) - 1)] if share >= _MIN_BUSY_SHARE else " "
        for share in shares
    )


def _print_memory(console: Console, memory: GpuMemory) -> None:
    table = table_of(("GPU memory", "left"), ("bytes", "right"), ("share", "right"))
    for use, size in memory.bytes_by_use.items():
        name, cell = _USE_NAMES[use], Text(bytes_text(size))
        if size < 0:
            name, cell = "lacking", Text(bytes_text(-size), style="red")
        add_row(table, (name, cell, f"{abs(size) / memory.available_bytes:.1%}"))
    add_row(table, ("may be used", bytes_text(memory.available_bytes), ""))
    add_row(table, ("runtime and margin", bytes_text(memory.kept_back_bytes), ""))
    console.print()
    console.print(table)


def _print_gains(console: Console, plan: Plan, explanation: Explanation) -> None:
    table = table_of(
        ("what more would gain", "left"),
        ("all", "right"),
        ("saved", "right"),
        ("decode", "right"),
        ("gained", "right"),
    )
    for gain in sorted(explanation.gains, key=lambda gain: -gain.saved_s):
        share = gain.saved_s / plan.estimate.e2e_s
        add_row(
            table,
            (
                _GAINED_NAMES[gain.of],
                seconds_text(gain.e2e_s),
                f"{share:.1%}" if abs(share) >= _MIN_GAIN else "-",
                rate_text(gain.decode_tokens_per_s),
                f"{gain.gained_tokens_per_s:+.2f}",
            ),
        )
    console.print()
    console.print(table)


def _print_nearest(console: Console, found: Sequence[FittingChange]) -> None:
    table = table_of(
        ("what would fit", "left"),
        ("placement", "left"),
        ("first", "right"),
        ("each", "right"),
        ("decode", "right"),
    )
    for each in found:
        add_row(
            table,
            (
                each.options,
                each.placement,
                seconds_text(each.ttft_s),
                seconds_text(each.tpot_s),
                rate_text(each.decode_tokens_per_s),
            ),
        )
    console.print()
    console.print(table)


def nearest_text(found: Sequence[FittingChange]) -> str | None:
    """What would fit, for the end of an error line; None where nothing would."""
    if not found:
        return None
    parts = [f"{each.options} ({rate_text(each.decode_tokens_per_s)})" for each in found]
    return f"the nearest that fits: {' or '.join(parts)}"


def print_rivals(console: Console, plan: Plan, rivals: Sequence[RivalTimes]) -> None:
    """Print other programs' placements beside the plan, priced by the same simulator."""
    table = table_of(
        ("placed as by", "left"),
        ("first", "right"),
        ("each", "right"),
        ("all", "right"),
        ("time", "right"),
        ("", "left"),
    )
    est = plan.estimate
    ours = (seconds_text(est.ttft_s), seconds_text(est.tpot_s), seconds_text(est.e2e_s))
    add_row(table, ("hetero", *(ours if plan.feasible else ("-",) * 3), "", plan.placement.name))
    for each in rivals:
        times = (
            "-" if seconds is None else seconds_text(seconds)
            for seconds in (each.ttft_s, each.tpot_s, each.e2e_s)
        )
        ratio = "-" if each.ratio is None else f"{each.ratio:.2f}x"
        add_row(table, (each.name, *times, ratio, each.reason))
    console.print()
    console.print(table)
    note = "placements of other programs, priced as our executor would run them"
    console.print(Text(one_line(note)))

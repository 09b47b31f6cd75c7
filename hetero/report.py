"""What a Plan and a run look like as text: rich tables, and the few lines before a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetero.terminal_text import one_line
from planner.calibration import MAX_FACTOR, MIN_FACTOR
from planner.hardware import HardwareProfile
from planner.kernel_table import Source
from planner.memory import available_bytes
from planner.model_spec import DENSE_SHARES, ModelSpec
from planner.placement import Device, ModulePlacement, Placement, Runs, TierPlacement
from planner.plan import Alternative, Estimate, Plan, TimeMetric, Trial
from planner.timeline import TERMS, TermComparison
from planner.workload import PHASES, Phase, Workload

# Ratio of measured to predicted from which a number is drawn as a warning, and as an alarm.
AMBER_RATIO = 1.25
RED_RATIO = 1.5

Side = Literal["left", "right"]

_MAX_ALTERNATIVES = 8
# Numbers of resident experts that are told one by one; of more the least and the most.
_MAX_RESIDENT_GROUPS = 2
# A correction is worth a word where it moves a term of this share of its phase by this much.
_MIN_CORRECTED_SHARE = 0.05
_MIN_CORRECTION = 0.03
# Of a phase's seconds that lie outside all samples: less is not worth a word.
_MIN_GUESSED_SHARE = 0.1
_GUESSES: tuple[Source, ...] = ("extrapolated", "assumed", "prior")
_MS, _US = 1e-3, 1e-6


class Speed(Protocol):
    """The five numbers that a plan predicts and a run measures."""

    @property
    def ttft_s(self) -> float: ...
    @property
    def tpot_s(self) -> float: ...
    @property
    def e2e_s(self) -> float: ...
    @property
    def prefill_tokens_per_s(self) -> float: ...
    @property
    def decode_tokens_per_s(self) -> float: ...


def seconds_text(seconds: float) -> str:
    """Seconds with three digits and a unit that suits them.

    Examples
    --------
    >>> seconds_text(0.00641), seconds_text(12.34), seconds_text(600)
    ('6.41 ms', '12.3 s', '10.0 min')
    """
    if seconds >= 7200:
        return f"{_three_digits(seconds / 3600)} h"
    if seconds >= 120:
        return f"{_three_digits(seconds / 60)} min"
    if seconds >= 0.9995:
        return f"{_three_digits(seconds)} s"
    if seconds >= 0.9995 * _MS or seconds == 0:
        return f"{_three_digits(seconds / _MS)} ms"
    return f"{_three_digits(seconds / _US)} us"


def rate_text(tokens_per_s: float) -> str:
    """Tokens per second with three digits."""
    return f"{_three_digits(tokens_per_s)} tokens/s"


def bytes_text(num_bytes: float) -> str:
    """Bytes in units of 1e9, or of 1e6 where that is less than 0.1.

    Examples
    --------
    >>> bytes_text(12_345_678_901), bytes_text(23_400_000)
    ('12.3 GB', '23.4 MB')
    """
    if num_bytes >= 0.1e9:
        return f"{_three_digits(num_bytes / 1e9)} GB"
    return f"{_three_digits(num_bytes / 1e6)} MB"


def ratio_text(ratio: float | None) -> Text:
    """Measured over predicted, in the colour of how far it is off."""
    if ratio is None:
        return Text("-")
    style = "red" if ratio > RED_RATIO else "yellow" if ratio > AMBER_RATIO else ""
    return Text(f"{ratio:.2f}x", style=style)


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def workload_text(workload: Workload) -> str:
    """`1 sequence of 512 prompt and 128 output tokens`."""
    plural = "s" if workload.num_seqs > 1 else ""
    return (
        f"{workload.num_seqs} sequence{plural} of {workload.prompt_len} prompt and "
        f"{workload.output_len} output tokens"
    )


def where_text(tier: TierPlacement, spec: ModelSpec | None = None) -> str:
    """Where the modules of a tier run, as `attention gpu 32; experts gpu 20, cpu 12; head gpu`.

    `caches of 8 of the gpu's layers on the cpu`: which then computes scores and values, the GPU the
    projections. Experts that lie in both memories: `experts: 27 layers on the cpu, 16 layers with
    112 of 128 on the gpu (the rest on the cpu)`; without `spec` it is not known of how many. A
    feed-forward that is divided so: `32 layers with 13 of 16 shares on the gpu`.
    """
    experts = [layer.ffn for layer in tier.layers if layer.router is not None]
    dense = [layer.ffn for layer in tier.layers if layer.router is None]
    num_experts = _num_experts(spec)
    groups: list[tuple[str, Sequence[ModulePlacement], str]] = [
        ("attention", [layer.attention for layer in tier.layers], ""),
        ("experts", experts, "experts" if num_experts is None else f"of {num_experts}"),
        ("feed-forward", dense, f"of {DENSE_SHARES} shares"),
    ]
    parts = [
        f"{name}: {_mixed_counts(places, of)}"
        if any(place.is_mixed for place in places)
        else f"{name} {_counts(places)}"
        for name, places, of in groups
        if places
    ]
    num_caches = sum(layer.kv_on_cpu for layer in tier.layers)
    if num_caches:
        parts.insert(1, f"caches of {num_caches} of the gpu's layers on the cpu{_fronts(tier)}")
    parts.append(f"head {_run_name(tier.head.runs)}")
    if tier.num_second_seqs:
        parts.append(
            f"in two sub-batches: {tier.num_second_seqs} sequences keep their caches on the cpu"
        )
    return "; ".join(parts)


def _fronts(tier: TierPlacement) -> str:
    """What of these caches is on the GPU all the same."""
    count = tier.num_gpu_kv_tokens
    num_layers = sum(layer.num_gpu_kv_tokens > 0 for layer in tier.layers)
    if not count:
        return ""
    is_all = num_layers == sum(layer.kv_on_cpu for layer in tier.layers)
    where = "" if is_all else f" in {num_layers} of them"
    return f" from token {count} on{where}"


def steps_text(tier: TierPlacement, placement: Placement) -> str:
    """`decode`, or `decode of up to 4 sequences` of a tier for smaller steps."""
    if tier is placement.tier(tier.phase):
        return tier.phase
    unit = "sequence" if tier.phase == "decode" else "token"
    plural = "s" if tier.max_num_tokens > 1 else ""
    return f"{tier.phase} of up to {tier.max_num_tokens} {unit}{plural}"


def _in_order(placement: Placement) -> list[TierPlacement]:
    """All tiers, a phase's own before those for smaller steps, the largest first."""
    return sorted(
        placement.tiers, key=lambda tier: (PHASES.index(tier.phase), -tier.max_num_tokens)
    )


def _counts(places: Sequence[ModulePlacement]) -> str:
    order: tuple[Runs, ...] = ("gpu", "stream", "cpu")
    counts = {runs: sum(place.runs == runs for place in places) for runs in order}
    return ", ".join(f"{_run_name(runs)} {count}" for runs, count in counts.items() if count)


def _num_experts(spec: ModelSpec | None) -> int | None:
    """Experts of each layer that has any; None where that is not known, or not one number."""
    counts = {layer.num_experts for layer in spec.layers if layer.is_moe} if spec else set[int]()
    return counts.pop() if len(counts) == 1 else None


def _mixed_counts(places: Sequence[ModulePlacement], of: str) -> str:
    """Experts or feed-forwards of layers of which some lie in both memories, by how they run."""
    whole = {"gpu": "on the gpu", "stream": "streamed to the gpu", "cpu": "on the cpu"}
    parts = []
    for runs, name in whole.items():
        count = sum(place.runs == runs and not place.is_mixed for place in places)
        if count:
            parts.append(f"{_layers(count)} {name}")
    others: dict[Runs, str] = {
        "stream": "the rest streamed",
        "cpu": "the rest on the cpu",
        "split": "the rest split",
    }
    for way, rest in others.items():
        residents = [each.num_resident for each in places if each.is_mixed and each.runs == way]
        groups = [[count] * residents.count(count) for count in sorted(set(residents))]
        if len(groups) > _MAX_RESIDENT_GROUPS:
            groups = [sorted(residents)]
        for group in groups:
            parts.append(_resident_text(group, of, rest))
    return ", ".join(parts)


def _resident_text(residents: list[int], of: str, rest: str) -> str:
    """`16 layers with 112 of 128 on the gpu`, of some layers with ascending residents."""
    if not any(residents):
        return f"{_layers(len(residents))} split"
    counts = (
        f"{residents[0]}" if residents[0] == residents[-1] else f"{residents[0]} to {residents[-1]}"
    )
    text = f"{_layers(len(residents))} with {counts} {of} on the gpu"
    return f"{text} ({rest})" if rest else text


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count > 1 else ''}"


def _run_name(runs: Runs) -> str:
    return "gpu (streamed)" if runs == "stream" else runs


def is_emulated(plan: Plan) -> bool:
    """True where the emulated accelerator does a part of the work."""
    return plan.resources.accelerator == "emulated" and plan.placement.uses("gpu")


def machine_line(plan: Plan, hardware: HardwareProfile) -> str:
    """What of the machine the plan uses, and that an emulated accelerator is emulated."""
    rates = "measured" if hardware.provenance == "measured" else "datasheet"
    if hardware.gpu is None:
        return f"{hardware.name}: CPU only, no accelerator is used ({rates} rates)"
    if not plan.placement.uses("gpu"):
        why = ": all on the CPU is predicted to be faster" if _has_slower_gpu_plan(plan) else ""
        return f"{hardware.name}: the accelerator is not used{why} ({rates} rates)"
    if hardware.gpu.kind == "emulated":
        return f"{hardware.name}: EMULATED, its speeds are not a GPU's ({rates} rates)"
    return f"{hardware.name}: CPU and {hardware.gpu.name} ({rates} rates)"


def _has_slower_gpu_plan(plan: Plan) -> bool:
    # With --strategy cpu there is no other, and nothing that was slower.
    return any(other.feasible and other.name != "cpu" for other in plan.alternatives)


def plan_lines(plan: Plan, hardware: HardwareProfile, spec: ModelSpec | None = None) -> list[str]:
    """The plan in a few lines: where, how much memory, how fast, what binds."""
    est = plan.estimate
    lines = [
        f"plan: {plan.model}, {workload_text(plan.workload)}, for {plan.objective}",
        f"machine: {machine_line(plan, hardware)}",
    ]
    for tier in _in_order(plan.placement):
        bound = ""
        if tier is plan.placement.tier(tier.phase):
            bound = f", bound by {est.bottleneck_by_phase.get(tier.phase, 'none')}"
        steps = steps_text(tier, plan.placement)
        lines.append(f"{steps}: {_tier_name(tier)} ({where_text(tier, spec)}){bound}")
    lines.append(f"memory: {_memory_text(plan, hardware)}")
    lines.append(
        f"predicted: first token after {seconds_text(est.ttft_s)}, then "
        f"{seconds_text(est.tpot_s)} a token ({rate_text(est.decode_tokens_per_s)})"
    )
    lines.append(_bands_text(est))
    lines += [text for text in (trust_text(plan, hardware),) if text is not None]
    lines += calibration_lines(est)
    return [one_line(line) for line in lines]


def _bands_text(est: Estimate) -> str:
    names: tuple[tuple[TimeMetric, str], ...] = (("ttft_s", "first token"), ("tpot_s", "a token"))
    parts = []
    for metric, name in names:
        low_s, high_s = est.band_by_metric.get(metric, (0.0, 0.0))
        parts.append(f"{name} {seconds_text(low_s)} to {seconds_text(high_s)}")
    return f"4 of 5 such predictions end in: {', '.join(parts)}"


def trust_text(plan: Plan, hardware: HardwareProfile) -> str | None:
    """What of the prediction rests on no measurement; None where nothing of weight does."""
    if hardware.provenance == "datasheet":
        return "not measured: datasheet rates, and what kernels usually reach of them"
    texts = []
    for phase in PHASES:
        shares = plan.estimate.source_by_phase.get(phase, {})
        guesses = [name for name in _GUESSES if shares.get(name, 0.0) > 0]
        guessed = sum(shares[name] for name in guesses)
        if guessed >= _MIN_GUESSED_SHARE:
            texts.append(f"{guessed:.0%} of {phase} is {' or '.join(guesses)}")
    return f"beyond what was measured: {', '.join(texts)}" if texts else None


def calibration_lines(est: Estimate) -> list[str]:
    """How many runs corrected the prediction, and by phase the corrections that matter."""
    if est.calibrated_runs == 0:
        return []
    plural = "s" if est.calibrated_runs > 1 else ""
    lines = [f"calibrated from {est.calibrated_runs} run{plural}"]
    for phase in PHASES:
        found = _corrections_text(est, phase)
        if found:
            lines.append(f"corrected in {phase}: {found}")
    at_bound = [
        f"{phase} {name}"
        for phase, factors in est.correction_by_phase.items()
        for name, factor in factors.items()
        if factor in (MIN_FACTOR, MAX_FACTOR) and _share(est, phase, name) >= _MIN_CORRECTED_SHARE
    ]
    if at_bound:
        lines.append(
            f"warning: runs are further off the prediction than is corrected "
            f"({MIN_FACTOR:.1f}x to {MAX_FACTOR:.1f}x) in {', '.join(at_bound)}; measure the "
            "machine again with: hetero profile"
        )
    return lines


def _corrections_text(est: Estimate, phase: Phase) -> str:
    return ", ".join(
        f"{name} {factor:.2f}x"
        for name, factor in est.correction_by_phase.get(phase, {}).items()
        if abs(factor - 1) >= _MIN_CORRECTION and _share(est, phase, name) >= _MIN_CORRECTED_SHARE
    )


def _share(est: Estimate, phase: Phase, lane_and_term: str) -> float:
    """Share of a phase that the term of `cpu experts` takes."""
    terms = {str(term): seconds for term, seconds in est.terms_by_phase.get(phase, {}).items()}
    total_s = sum(terms.values())
    return terms.get(lane_and_term.rpartition(" ")[2], 0.0) / total_s if total_s > 0 else 0.0


def _tier_name(tier: TierPlacement) -> str:
    return f"{tier.strategy} {tier.cut}" if tier.cut else tier.strategy


def _memory_text(plan: Plan, hardware: HardwareProfile) -> str:
    return ", ".join(
        f"{bytes_text(size)} of {bytes_text(available_bytes(hardware, device))} on the "
        f"{_device_name(device, hardware)}"
        for device, size in _bytes_by_device(plan).items()
    )


def _bytes_by_device(plan: Plan) -> dict[Device, int]:
    """Memory that the plan takes; host memory holds streamed weights too, a GPU only its own."""
    planned = plan.estimate.bytes_by_device
    uses_gpu = plan.placement.uses("gpu")
    return {device: size for device, size in planned.items() if device != "gpu" or uses_gpu}


def _device_name(device: Device, hardware: HardwareProfile) -> str:
    is_emulated = hardware.gpu is not None and hardware.gpu.kind == "emulated"
    return "gpu (emulated)" if device == "gpu" and is_emulated else device


def gap_text(plan: Plan) -> str:
    """What any other placement could gain, by the bound of the search."""
    at_most = f"{plan.optimality_gap:.1%}"
    return (
        f"proven: by the same prices none of all placements searched takes more than {at_most} "
        "less time"
    )


def print_plan(
    console: Console, plan: Plan, hardware: HardwareProfile, spec: ModelSpec | None = None
) -> None:
    """Print a plan: whether it fits, where everything goes, how fast, and what else there was."""
    console.print(Text(one_line(f"{plan.model} on {machine_line(plan, hardware)}"), style="bold"))
    console.print(Text(f"{workload_text(plan.workload)}, for {plan.objective}"))
    fits = "fits" if plan.feasible else "does not fit; the nearest miss is"
    style = "green" if plan.feasible else "red"
    console.print(Text(fits, style=style).append(f": {plan.placement.name}", style="none"))
    for table in (
        _where_table(plan, spec),
        _memory_table(plan, hardware),
        _speed_table(plan),
        _terms_table(plan),
        _alternatives_table(plan),
    ):
        if table.row_count:
            console.print()
            console.print(table)
    if plan.feasible and hardware.gpu is not None:
        console.print()
        console.print(Text(gap_text(plan)))
    trust = trust_text(plan, hardware)
    if trust is not None:
        console.print()
        console.print(Text(one_line(trust)))
    if plan.trial is not None:
        console.print()
        print_trial(console, plan.trial)
    for line in calibration_lines(plan.estimate):
        console.print(Text(one_line(line)))
    for note in hardware.notes:
        console.print(Text(one_line(f"note: {note}")))


def table_of(*columns: tuple[str, Side], gap: int = 2) -> Table:
    """A table without lines; a column is its heading and the side that its cells keep to."""
    table = Table(box=None, padding=(0, gap, 0, 0), header_style="bold", pad_edge=False)
    for heading, side in columns:
        table.add_column(Text(heading), justify=side, overflow="fold")
    return table


def add_row(table: Table, cells: Iterable[str | Text]) -> None:
    # Text, so that a bracket in a name is not taken for markup.
    table.add_row(*(cell if isinstance(cell, Text) else Text(one_line(cell)) for cell in cells))


def _where_table(plan: Plan, spec: ModelSpec | None) -> Table:
    table = table_of(
        ("phase", "left"), ("strategy", "left"), ("layers", "left"), ("bound by", "left")
    )
    for tier in _in_order(plan.placement):
        is_whole = tier is plan.placement.tier(tier.phase)
        bound = plan.estimate.bottleneck_by_phase.get(tier.phase, "") if is_whole else ""
        steps = steps_text(tier, plan.placement)
        add_row(table, (steps, _tier_name(tier), where_text(tier, spec), bound))
    return table


def _memory_table(plan: Plan, hardware: HardwareProfile) -> Table:
    table = table_of(("memory", "left"), ("planned", "right"), ("may be used", "right"))
    for device, size in _bytes_by_device(plan).items():
        limit = available_bytes(hardware, device)
        planned = Text(bytes_text(size), style="red" if size > limit else "")
        add_row(table, (_device_name(device, hardware), planned, bytes_text(limit)))
    return table


def _speed_table(plan: Plan) -> Table:
    est = plan.estimate
    rows: tuple[tuple[str, TimeMetric, float, str], ...] = (
        ("first token", "ttft_s", est.ttft_s, f"prefill {rate_text(est.prefill_tokens_per_s)}"),
        ("each token", "tpot_s", est.tpot_s, f"decode {rate_text(est.decode_tokens_per_s)}"),
        ("all", "e2e_s", est.e2e_s, ""),
    )
    table = table_of(
        ("predicted", "left"), ("time", "right"), ("4 of 5 end in", "right"), ("rate", "right")
    )
    for name, metric, seconds, rate in rows:
        if metric == "tpot_s" and plan.workload.output_len == 1:
            continue  # the first token is the only one
        low_s, high_s = est.band_by_metric.get(metric, (seconds, seconds))
        band = f"{seconds_text(low_s)} to {seconds_text(high_s)}"
        add_row(table, (name, seconds_text(seconds), band, rate))
    if est.num_concurrent_seqs < plan.workload.num_seqs:
        waves = f"in waves of {est.num_concurrent_seqs} of {plan.workload.num_seqs} sequences"
        add_row(table, (waves, "", "", ""))
    return table


def _terms_table(plan: Plan) -> Table:
    table = table_of(("time goes to", "left"), ("prefill", "right"), ("decode step", "right"))
    terms_by_phase = plan.estimate.terms_by_phase
    totals = {phase: sum(terms.values()) for phase, terms in terms_by_phase.items()}

    def cell(phase: Phase, seconds: float) -> str:
        share = seconds / totals[phase] if totals.get(phase) else 0.0
        return f"{seconds_text(seconds)} {share:4.0%}" if seconds else "-"

    for term in TERMS:
        seconds = {phase: terms_by_phase.get(phase, {}).get(term, 0.0) for phase in PHASES}
        if any(seconds.values()):
            add_row(table, (term, *(cell(phase, seconds[phase]) for phase in PHASES)))
    return table


def _alternatives_table(plan: Plan) -> Table:
    table = table_of(
        ("not chosen", "left"),
        ("first", "right"),
        ("each", "right"),
        ("all", "right"),
        ("", "left"),
    )
    for other in plan.alternatives[:_MAX_ALTERNATIVES]:
        add_row(table, (other.name, *_times(other), other.reason))
    left = len(plan.alternatives) - _MAX_ALTERNATIVES
    if left > 0:
        add_row(table, (f"{left} more", "", "", "", "in --json"))
    return table


def _times(other: Alternative) -> tuple[str, str, str]:
    if not other.feasible:
        return ("-", "-", "-")
    ttft, tpot, e2e = (
        "-" if seconds is None else seconds_text(seconds)
        for seconds in (other.ttft_s, other.tpot_s, other.e2e_s)
    )
    return (ttft, tpot, e2e)


def print_trial(console: Console, trial: Trial) -> None:
    """Print what was tried, predicted beside measured, and whether the plan changed."""
    table = table_of(
        ("tried", "left"),
        ("first", "right"),
        ("measured", "right"),
        ("each", "right"),
        ("measured", "right"),
        ("ratio", "right"),
        ("", "left"),
    )
    for row in trial.rows:
        ours, theirs = row.predicted, row.measured
        if theirs is None:
            cells = (seconds_text(ours.ttft_s), "-", seconds_text(ours.tpot_s), "-", Text("-"))
            add_row(table, (row.name, *cells, row.failure or ""))
            continue
        add_row(
            table,
            (
                row.name,
                *(seconds_text(seconds) for seconds in (ours.ttft_s, theirs.ttft_s)),
                *(seconds_text(seconds) for seconds in (ours.tpot_s, theirs.tpot_s)),
                ratio_text(theirs.e2e_s / ours.e2e_s if ours.e2e_s > 0 else None),
                "kept" if row.name == trial.kept else "",
            ),
        )
    console.print(table)
    console.print(Text(one_line(_trial_text(trial))), soft_wrap=True)


def _trial_text(trial: Trial) -> str:
    planned, ran = trial.rows[0].name, workload_text(trial.workload)
    if len(trial.rows) == 1:
        return f"tried with {ran}; no other placement fits"
    if trial.kept == planned:
        return f"tried with {ran}; the plan stands: {planned} is the fastest as measured"
    return f"tried with {ran}; the plan changed: {trial.kept} instead of {planned}"


def print_comparison(
    console: Console, predicted: Speed, measured: Speed, *, is_emulated: bool = False
) -> None:
    """Print what was predicted beside what was measured; the ratio is measured over predicted."""
    emulated = " (emulated)" if is_emulated else ""
    table = table_of(
        (f"this run{emulated}", "left"),
        ("predicted", "right"),
        ("measured", "right"),
        ("ratio", "right"),
    )
    rows = (
        ("first token", predicted.ttft_s, measured.ttft_s, seconds_text),
        ("each token", predicted.tpot_s, measured.tpot_s, seconds_text),
        ("all", predicted.e2e_s, measured.e2e_s, seconds_text),
    )
    for name, ours, theirs, text in rows:
        ratio = theirs / ours if ours > 0 and theirs > 0 else None
        add_row(table, (name, text(ours), text(theirs), ratio_text(ratio)))
    rates = (
        ("prefill", predicted.prefill_tokens_per_s, measured.prefill_tokens_per_s),
        ("decode", predicted.decode_tokens_per_s, measured.decode_tokens_per_s),
    )
    for name, ours, theirs in rates:
        if theirs > 0:
            # A rate is better when higher: the colours are those of the time per token.
            cell = ratio_text(ours / theirs)
            cell.plain = f"{theirs / ours:.2f}x" if ours > 0 else "-"
            add_row(table, (name, rate_text(ours), rate_text(theirs), cell))
    console.print(table)


def print_terms(console: Console, phase: Phase, terms: Sequence[TermComparison]) -> None:
    """Print the terms of the last step, predicted beside measured."""
    if not terms:
        return
    console.print(terms_table(f"last {phase} step", terms))


def terms_table(title: str, terms: Sequence[TermComparison], *, gap: int = 2) -> Table:
    """A row a term and their sum, each with its ratio; `gap` blanks between the columns."""
    columns: tuple[tuple[str, Side], ...]
    columns = ((title, "left"), ("predicted", "right"), ("measured", "right"), ("ratio", "right"))
    table = table_of(*columns, gap=gap)
    for row in terms:
        cells = (row.term, seconds_text(row.predicted_s), seconds_text(row.measured_s))
        add_row(table, (*cells, ratio_text(row.ratio)))
    ours = sum(row.predicted_s for row in terms)
    theirs = sum(row.measured_s for row in terms)
    ratio = theirs / ours if ours > 0 else None
    add_row(table, ("step", seconds_text(ours), seconds_text(theirs), ratio_text(ratio)))
    return table

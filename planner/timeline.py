"""Timeline: when each op of a step began and ended; by lane, by term, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

from planner.step_graph import LANES, Lane, Op, Term

# `wait`: gaps of the critical path; `host`: what a step takes beside its ops, in no Timeline.
TimelineTerm = Term | Literal["wait", "host"]

_Key = TypeVar("_Key")

TERMS: tuple[TimelineTerm, ...] = (
    "attention",
    "router",
    "dispatch",
    "experts",
    "dense",
    "head",
    "transfer",
    "wait",
    "host",
)


# Made for every op of every step: a dataclass takes five times as long to make.
class Span(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One executed (or predicted) op; seconds from the start of the step."""

    op: Op
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


def _end_s(span: Span) -> float:
    return span.end_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Spans of one step, in the order of the graph.

    `origin_s` is when the step began on the clock that measured it (`time.perf_counter`); a
    predicted one begins at 0.
    """

    spans: tuple[Span, ...]
    origin_s: float = 0.0

    @property
    def makespan_s(self) -> float:
        """Seconds from the start of the step to its last end."""
        return max((span.end_s for span in self.spans), default=0.0)

    def lane(self, lane: Lane) -> tuple[Span, ...]:
        """Spans of one lane by start time."""
        mine = [span for span in self.spans if span.op.lane == lane]
        return tuple(sorted(mine, key=lambda span: (span.start_s, span.op.index)))

    def busy_s(self) -> dict[Lane, float]:
        """Seconds in which each lane worked."""
        busy: dict[Lane, float] = dict.fromkeys(LANES, 0.0)
        for span in self.spans:
            busy[span.op.lane] += span.seconds
        return busy

    def idle_s(self) -> dict[Lane, float]:
        """Bubbles: seconds between each lane's first op and its last in which it did nothing."""
        idle: dict[Lane, float] = dict.fromkeys(LANES, 0.0)
        busy = self.busy_s()
        for lane in LANES:
            spans = [span for span in self.spans if span.op.lane == lane]
            if spans:
                window_s = max(map(_end_s, spans)) - min(span.start_s for span in spans)
                idle[lane] = max(0.0, window_s - busy[lane])
        return idle

    def overlap(self) -> float:
        """Share of the work hidden by overlap: 1 - makespan / sum of busy seconds, at least 0."""
        total = sum(self.busy_s().values())
        return max(0.0, 1.0 - self.makespan_s / total) if total > 0 else 0.0

    def critical_path(self) -> tuple[Span, ...]:
        """The chain of ops that set the makespan, first to last.

        From the op that ends last, step to whatever it waited for: the dependency or the op before
        it on its lane that ended last.
        """
        if not self.spans:
            return ()
        # Lanes in the order of the graph, which they keep: measured starts may be out of order by
        # a clock tick, and a walk along them could go round in circles.
        waited_for: dict[int, Span] = {}
        by_index: dict[int, Span] = {}
        last_of_lane: dict[Lane, Span] = {}
        for span in self.spans:
            op = span.op
            waited = [by_index[dep] for dep in op.deps]
            if op.lane in last_of_lane:
                waited.append(last_of_lane[op.lane])
            if waited:
                waited_for[op.index] = max(waited, key=_end_s)
            by_index[op.index] = last_of_lane[op.lane] = span
        path = [max(self.spans, key=_end_s)]
        while path[-1].op.index in waited_for:
            path.append(waited_for[path[-1].op.index])
        return tuple(reversed(path))

    def by_term(self) -> dict[TimelineTerm, float]:
        """Seconds of the critical path by term, its gaps as `wait`; they add up to the makespan."""
        terms: dict[TimelineTerm, float] = dict.fromkeys(TERMS, 0.0)
        clock = 0.0
        for span in self.critical_path():
            terms["wait"] += max(0.0, span.start_s - clock)
            # Measured neighbours may overlap by a clock tick: count each second once.
            terms[span.op.term] += max(0.0, span.end_s - max(span.start_s, clock))
            clock = max(clock, span.end_s)
        return terms

    def bottleneck(self) -> str:
        """Lane and term that take most of the critical path, as `cpu experts`."""
        seconds: dict[str, float] = {}
        for span in self.critical_path():
            key = f"{span.op.lane} {span.op.term}"
            seconds[key] = seconds.get(key, 0.0) + span.seconds
        return max(seconds, key=lambda key: seconds[key], default="none")


def lane_orders(timeline: Timeline) -> dict[Lane, list[str]]:
    """Names of the ops of each lane in the order in which they ran."""
    return {lane: [span.op.name for span in timeline.lane(lane)] for lane in LANES}


@dataclass(frozen=True, slots=True, kw_only=True)
class TermComparison:
    """Predicted and measured seconds of one term; `ratio` is measured over predicted."""

    term: TimelineTerm
    predicted_s: float
    measured_s: float

    @property
    def ratio(self) -> float | None:
        return self.measured_s / self.predicted_s if self.predicted_s > 0 else None


def compare(predicted: Timeline, measured: Timeline) -> tuple[TermComparison, ...]:
    """Predicted beside measured, term by term of the critical path; empty terms are left out."""
    ours, theirs = predicted.by_term(), measured.by_term()
    rows = (
        TermComparison(term=term, predicted_s=ours[term], measured_s=theirs[term]) for term in TERMS
    )
    return tuple(row for row in rows if row.predicted_s > 0 or row.measured_s > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """What most of a step's seconds beyond its prediction are: a term, and the lane that had it.

    Waits are of no lane.
    """

    lane: Lane | None
    term: TimelineTerm
    seconds: float


def largest_excess(predicted: Timeline, measured: Timeline) -> Excess | None:
    """The term of the critical path that took most longer than predicted; None where none did.

    Its lane is the one whose share of that term grew most.
    """
    excess = _excess(predicted.by_term(), measured.by_term())
    term, seconds = max(excess.items(), key=lambda item: item[1])
    if seconds <= 0.0:
        return None
    by_lane = _excess(_by_lane(predicted, term), _by_lane(measured, term))
    worst = max(LANES, key=lambda lane: by_lane[lane])
    return Excess(lane=worst if by_lane[worst] > 0 else None, term=term, seconds=seconds)


def _excess(ours: Mapping[_Key, float], theirs: Mapping[_Key, float]) -> dict[_Key, float]:
    return {key: theirs[key] - ours[key] for key in ours}


def _by_lane(timeline: Timeline, term: TimelineTerm) -> dict[Lane, float]:
    """Seconds of a term on the critical path, by lane."""
    found: dict[Lane, float] = dict.fromkeys(LANES, 0.0)
    for span in timeline.critical_path():
        if span.op.term == term:
            found[span.op.lane] += span.seconds
    return found

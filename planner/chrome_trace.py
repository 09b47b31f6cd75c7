"""Chrome trace: steps, predicted beside measured, as a file that trace viewers open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from planner.cost_model import copy_bytes, sub_batch_shape
from planner.model_spec import ModelSpec
from planner.step_graph import LANES, Lane, Op
from planner.timeline import Timeline
from planner.workload import BatchShape

# Of a run with more dependencies between lanes than this, later ones are not drawn as arrows.
MAX_ARROWS = 10_000

Side = Literal["predicted", "measured"]

_PIDS: dict[Side, int] = {"predicted": 1, "measured": 2}
# Rows of a set: the steps, and below them the lanes.
_ROWS_OF_SET = 10
_STEP_ROW = 0
_LANE_ROWS: dict[Lane, int] = {lane: row for row, lane in enumerate(LANES, start=1)}

# Start and end of each op, in nanoseconds of the trace.
_Times = list[tuple[int, int]]
_Event = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """A step of a run, or the move of a cache after one.

    `number` counts steps from 1; a move has that of its step. Both Timelines have the same ops.
    """

    number: int
    kind: Literal["prefill", "decode", "kv move"]
    shape: BatchShape
    predicted: Timeline
    measured: Timeline


def chrome_trace(
    steps: Iterable[TracedStep], spec: ModelSpec, *, origin_s: float, note: str = ""
) -> bytes:
    """Write steps down in the Trace Event Format (JSON), which Perfetto and Chrome open.

    Predicted and measured are a process each, with a row for the steps and one for each lane. A
    predicted step begins when the measured one did. Where it is predicted to take longer than until
    the next one begins, that one is drawn on rows of its own (`cpu +1`), so that a row never does
    two things at once. Dependencies between lanes are arrows, the first `MAX_ARROWS` of them.

    Parameters
    ----------
    steps : iterable of TracedStep
        In the order in which they ran; numbers that are missing were left out.
    spec : ModelSpec
        The model, for the bytes of copies.
    origin_s : float
        The beginning of the trace, on the clock of the measured Timelines.
    note : str
        Added to the names of both processes.

    Returns
    -------
    bytes
        The document, an event a line.

    Examples
    --------
    >>> from planner.model_spec import ModelSpec
    >>> def write(spec: ModelSpec, steps: list[TracedStep]) -> bytes:
    ...     return chrome_trace(steps, spec, origin_s=steps[0].measured.origin_s)
    """
    trace = _Trace(spec, origin_s)
    events = b",\n".join(map(msgspec.json.encode, trace.events(steps, note)))
    return b'{"displayTimeUnit":"ms","traceEvents":[\n' + events + b"\n]}\n"


class _Rows:
    """Sets of rows of one process, and until when each is taken. Mutable."""

    def __init__(self) -> None:
        self.ends_ns: list[int] = []

    def take(self, start_ns: int, end_ns: int) -> int:
        """The first set that is free from `start_ns` on."""
        for number, taken_ns in enumerate(self.ends_ns):
            if taken_ns <= start_ns:
                self.ends_ns[number] = end_ns
                return number
        self.ends_ns.append(end_ns)
        return len(self.ends_ns) - 1


class _Trace:
    """Events of a trace in the making. Mutable."""

    def __init__(self, spec: ModelSpec, origin_s: float) -> None:
        self._spec = spec
        self._origin_s = origin_s
        self._rows: dict[Side, _Rows] = {"predicted": _Rows(), "measured": _Rows()}
        self._used: dict[int, str] = {}  # rows that have a name, by thread
        self._num_arrows = 0

    def events(self, steps: Iterable[TracedStep], note: str) -> Iterator[_Event]:
        """All of them; names of rows come with the first event of a row."""
        last = 0
        for step in steps:
            if last == 0:
                for side, pid in _PIDS.items():
                    yield _metadata(pid, None, "process_name", name=f"{side}{note}")
                    yield _metadata(pid, None, "process_sort_index", sort_index=pid)
            yield from self._step(step, max(0, step.number - last - 1))
            last = step.number

    def _step(self, step: TracedStep, num_left_out: int) -> Iterator[_Event]:
        start_ns = _nanoseconds(step.measured.origin_s - self._origin_s)
        facts = [self._facts(op, step.shape) for op in (span.op for span in step.measured.spans)]
        predicted_us = [span.seconds * 1e6 for span in step.predicted.spans]
        sides: dict[Side, Timeline] = {"predicted": step.predicted, "measured": step.measured}
        for side, timeline in sides.items():
            times = _times(timeline, start_ns)
            end_ns = max([end_ns for _, end_ns in times], default=start_ns)
            pid, number = _PIDS[side], self._rows[side].take(start_ns, end_ns)
            first = (pid * 1000 + number) * _ROWS_OF_SET
            threads = [first + _LANE_ROWS[span.op.lane] for span in timeline.spans]
            yield from self._names(pid, first, number, timeline)
            if num_left_out:
                what = f"{num_left_out} steps left out"
                yield _event("i", pid, first + _STEP_ROW, what, "step", start_ns) | {"s": "p"}
            title = f"{step.kind} {step.number}"
            yield _slice(
                pid, first + _STEP_ROW, title, step.kind, (start_ns, end_ns), _step_facts(step)
            )
            for at, span in enumerate(timeline.spans):
                known = facts[at]
                if side == "measured":
                    known = {**known, "predicted_us": round(predicted_us[at], 3)}
                yield _slice(pid, threads[at], span.op.name, span.op.term, times[at], known)
            yield from self._arrows(pid, threads, timeline, times)

    def _names(self, pid: int, first: int, number: int, timeline: Timeline) -> Iterator[_Event]:
        """Names of the rows of a set that are used for the first time."""
        rows = {_STEP_ROW: "step"}
        rows |= {_LANE_ROWS[span.op.lane]: span.op.lane for span in timeline.spans}
        for row, name in sorted(rows.items()):
            tid = first + row
            if tid not in self._used:
                self._used[tid] = name if number == 0 else f"{name} +{number}"
                yield _metadata(pid, tid, "thread_name", name=self._used[tid])
                yield _metadata(pid, tid, "thread_sort_index", sort_index=tid)

    def _arrows(
        self, pid: int, threads: list[int], timeline: Timeline, times: _Times
    ) -> Iterator[_Event]:
        """From an op to those on other lanes that waited for it."""
        for at, span in enumerate(timeline.spans):
            for dep in span.op.deps:
                if threads[dep] == threads[at] or self._num_arrows == MAX_ARROWS:
                    continue
                self._num_arrows += 1
                # A viewer looks for the slice around each end: the last moment of the one, the
                # first of the other. Clocks of two devices may be a tick apart.
                start_ns, end_ns = times[dep]
                leaves_ns = max(start_ns, min(end_ns - 1, times[at][0]))
                arrives_ns = max(times[at][0], leaves_ns)
                common = {"id": self._num_arrows}
                yield _event("s", pid, threads[dep], "needs", "dep", leaves_ns) | common
                yield (
                    _event("f", pid, threads[at], "needs", "dep", arrives_ns) | common | {"bp": "e"}
                )

    def _facts(self, op: Op, shape: BatchShape) -> _Event:
        """What is known of an op beside its name, lane and term."""
        part = shape if op.sub_batch is None else sub_batch_shape(op, shape)
        facts: _Event = {"num_tokens": part.num_tokens}
        if op.layer is not None:
            facts["layer"] = op.layer
        if op.module is not None:
            facts["module"] = op.module
        if op.part != "all":
            facts["part"] = op.part
        if op.num_resident:
            facts["num_resident"] = op.num_resident
        if op.buffer is not None:
            facts["buffer"] = op.buffer
        if op.sub_batch is not None:
            facts["sub_batch"] = op.sub_batch
        # How many experts a split layer fetches is decided inside the op.
        if op.kind == "copy" and op.part != "fetched":
            facts["bytes"] = round(copy_bytes(op, self._spec, part))
        return facts


def _times(timeline: Timeline, start_ns: int) -> _Times:
    """Of each op; a lane's follow each other, though a device's clock may be a tick off."""
    free_ns = dict.fromkeys(LANES, start_ns)
    found: _Times = []
    for span in timeline.spans:
        lane = span.op.lane
        begin_ns = max(free_ns[lane], start_ns + _nanoseconds(span.start_s))
        free_ns[lane] = max(begin_ns, start_ns + _nanoseconds(span.end_s))
        found.append((begin_ns, free_ns[lane]))
    return found


def _step_facts(step: TracedStep) -> _Event:
    shape, predicted, measured = step.shape, step.predicted, step.measured
    return {
        "num_tokens": shape.num_tokens,
        "num_seqs": shape.num_seqs,
        "num_past_tokens": round(shape.num_past_tokens, 1),
        "predicted_us": round(predicted.makespan_s * 1e6, 3),
        "measured_us": round(measured.makespan_s * 1e6, 3),
        "predicted_overlap": round(predicted.overlap(), 3),
        "measured_overlap": round(measured.overlap(), 3),
    }


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _event(ph: str, pid: int, tid: int, name: str, category: str, at_ns: int) -> _Event:
    return {"ph": ph, "pid": pid, "tid": tid, "name": name, "cat": category, "ts": at_ns / 1e3}


def _slice(
    pid: int, tid: int, name: str, category: str, times: tuple[int, int], args: Mapping[str, object]
) -> _Event:
    start_ns, end_ns = times
    event = _event("X", pid, tid, name, category, start_ns)
    return event | {"dur": (end_ns - start_ns) / 1e3, "args": args}


def _metadata(pid: int, tid: int | None, what: str, **args: object) -> _Event:
    event: _Event = {"ph": "M", "pid": pid, "name": what, "args": args}
    return event if tid is None else event | {"tid": tid}

"""StepSamples: steps of a run that are kept, to be compared with their prediction when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Literal

from planner.calibration import CalibrationRecord, CorrectedLane, CorrectedTerm, TermSeconds
from planner.kv_blocks import moves_prompts
from planner.plan import Plan
from planner.step_graph import StepGraph
from planner.timeline import Timeline
from planner.workload import PHASES, BatchShape, Phase

# Prefill steps are few and long; the first decode steps are two of a kind, later ones read more.
_MAX_PREFILL_STEPS = 2
_EVERY_DECODE_STEPS = 64
_MAX_DECODE_STEPS = 32
# A step that took this many times as long beside its price as its neighbours was interrupted.
_INTERRUPTED = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """When the ops of a step ran, or would by prediction, and what it took outside of them.

    `host_s` is None where that is not known.
    """

    timeline: Timeline
    host_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """A step as it ran."""

    graph: StepGraph
    shape: BatchShape
    measured: StepTimes


Predict = Callable[[StepGraph, BatchShape], StepTimes]
# Predicted and measured seconds by lane and term.
_TermTimes = Mapping[tuple[CorrectedLane, CorrectedTerm], tuple[float, float]]


class StepSamples:
    """Keeps a few steps of a run. Mutable.

    Prediction waits until the run has ended: one of every step would cost more than 1 % of it.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._num_steps: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self._samples: dict[Phase, list[StepSample]] = {phase: [] for phase in PHASES}
        # The move of a cache between the devices is a part of its step, and no op of it.
        moves = moves_prompts(plan.placement, plan.wave)
        self._has_known_host: dict[Phase, bool] = {"prefill": not moves, "decode": True}

    def watch(self, graph: StepGraph, shape: BatchShape, timeline: Timeline, step_s: float) -> None:
        """Be told of a step, and keep it if it is one of those that are kept."""
        phase = shape.phase
        self._num_steps[phase] += 1
        if not _is_kept(phase, self._num_steps[phase], len(self._samples[phase])):
            return
        host_s = max(0.0, step_s - timeline.makespan_s) if self._has_known_host[phase] else None
        times = StepTimes(timeline=timeline, host_s=host_s)
        self._samples[phase].append(StepSample(graph=graph, shape=shape, measured=times))

    def records(self, predict: Predict, rates_fingerprint: str) -> tuple[CalibrationRecord, ...]:
        """A record of each phase that had steps; `predict` knows of no corrections."""
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return tuple(
            self._record(phase, samples, predict, rates_fingerprint, at)
            for phase, samples in self._samples.items()
            if samples
        )

    def _record(
        self,
        phase: Phase,
        samples: Sequence[StepSample],
        predict: Predict,
        rates_fingerprint: str,
        at: str,
    ) -> CalibrationRecord:
        plan = self._plan
        steps = _uninterrupted(
            [
                (sample, _seconds(predict(sample.graph, sample.shape), sample.measured))
                for sample in samples
            ]
        )
        totals: dict[tuple[CorrectedLane, CorrectedTerm], tuple[float, float]] = {}
        for _, seconds in steps:
            for key, (predicted_s, measured_s) in seconds.items():
                before = totals.get(key, (0.0, 0.0))
                totals[key] = (before[0] + predicted_s, before[1] + measured_s)
        shapes = [sample.shape for sample, _ in steps]
        return CalibrationRecord(
            at=at,
            model=plan.model,
            model_fingerprint=plan.model_fingerprint,
            profile_fingerprint=plan.profile_fingerprint,
            rates_fingerprint=rates_fingerprint,
            placement=plan.placement.name,
            accelerator=_accelerator(plan),
            phase=phase,
            num_steps=len(steps),
            num_tokens=fmean(shape.num_tokens for shape in shapes),
            num_seqs=fmean(shape.num_seqs for shape in shapes),
            num_past_tokens=fmean(shape.num_past_tokens for shape in shapes),
            terms=tuple(
                TermSeconds(lane=lane, term=term, predicted_s=predicted_s, measured_s=measured_s)
                for (lane, term), (predicted_s, measured_s) in totals.items()
            ),
        )


def _accelerator(plan: Plan) -> Literal["none", "cuda", "emulated"]:
    """What the placement uses beside the CPU."""
    if not plan.placement.uses("gpu"):
        return "none"
    return "emulated" if plan.resources.accelerator == "emulated" else "cuda"


def _is_kept(phase: Phase, step: int, num_kept: int) -> bool:
    """Prefill steps 1 and 2; decode steps 2, 4, 8, ... and then every 64th.

    Examples
    --------
    >>> [step for step in range(1, 200) if _is_kept("decode", step, 0)]
    [2, 4, 8, 16, 32, 64, 128, 192]
    """
    if phase == "prefill":
        return step <= _MAX_PREFILL_STEPS
    is_power_of_2 = step > 1 and step & (step - 1) == 0
    return num_kept < _MAX_DECODE_STEPS and (is_power_of_2 or step % _EVERY_DECODE_STEPS == 0)


def _seconds(predicted: StepTimes, measured: StepTimes) -> _TermTimes:
    """Seconds of a step's ops by lane and term, and outside of them.

    Of all ops, not of the critical path: a lane that waited says as much of its ops as a busy one.
    """
    found: dict[tuple[CorrectedLane, CorrectedTerm], tuple[float, float]] = {}
    for ours, theirs in zip(predicted.timeline.spans, measured.timeline.spans, strict=True):
        key = (theirs.op.lane, theirs.op.term)
        before = found.get(key, (0.0, 0.0))
        # A device's clock may put an end a tick before its start.
        found[key] = (before[0] + ours.seconds, before[1] + max(0.0, theirs.seconds))
    if predicted.host_s is not None and measured.host_s is not None:
        found["host", "host"] = (predicted.host_s, measured.host_s)
    return found


def _uninterrupted(
    steps: Sequence[tuple[StepSample, _TermTimes]],
) -> list[tuple[StepSample, _TermTimes]]:
    """The steps of which nothing else on the machine took much: at least half of them."""
    ratios = list(_ratios(steps))
    limit = _INTERRUPTED * median(ratios)
    return [step for step, ratio in zip(steps, ratios, strict=True) if ratio <= limit]


def _ratios(steps: Sequence[tuple[StepSample, _TermTimes]]) -> Iterator[float]:
    for _, seconds in steps:
        predicted_s = sum(times[0] for times in seconds.values())
        yield sum(times[1] for times in seconds.values()) / max(predicted_s, 1e-12)

"""RunMonitor: watches a running `LLM.generate` and keeps an immutable Snapshot of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import psutil

from hetero.explain_view import lane_shares
from hetero.measure.memory_limit import memory_limit_bytes
from planner.hardware import HardwareProfile
from planner.memory import available_bytes
from planner.placement import Device
from planner.plan import Plan
from planner.step_graph import Lane
from planner.timeline import Excess, TermComparison, Timeline, compare, largest_excess
from planner.workload import PHASES, Phase

if TYPE_CHECKING:
    from hetero.api import GenerationStep

REFRESH_S = 0.25
HISTORY_LEN = 60
# Snapshots (the predicted Timeline above all) may take this share of the run at most, beside what
# the first few may take at once.
_MAX_COST_SHARE = 0.01
_FREE_COST_S = 0.05
# Parts of a step in which the work of a lane is told.
LANE_CELLS = 24
# A step of no time at all has no shares.
_TINY_S = 1e-12
# Enough for the panel of a large terminal.
_MAX_TEXT_CHARS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """Memory of one device, and how busy it is where that is known."""

    name: str
    used_bytes: int | None
    planned_bytes: int
    limit_bytes: int
    busy_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneUse:
    """How much of the last step a lane worked, by prediction and as measured.

    `shares` are those of equal parts of the measured step; `idle_s` is what it waited between its
    first op and its last.
    """

    lane: Lane
    predicted_share: float
    busy_share: float
    idle_s: float
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpeed:
    """Tokens per second of one phase: since the last snapshot, and over the run."""

    now: float | None = None
    mean: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LastStep:
    """The last step, predicted and measured."""

    phase: Phase
    predicted_s: float
    measured_s: float
    terms: tuple[TermComparison, ...]
    lanes: tuple[LaneUse, ...]
    predicted_overlap: float
    overlap: float
    excess: Excess | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run at one moment; times in seconds from its start."""

    title: str
    num_done: int
    num_requests: int
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    max_output_tokens: int
    at_s: float = 0.0
    eta_s: float | None = None
    speeds: dict[Phase, PhaseSpeed] = field(
        default_factory=lambda: {phase: PhaseSpeed() for phase in PHASES}
    )
    decode_history: tuple[float, ...] = ()
    ttft_s: float | None = None
    devices: tuple[DeviceUse, ...] = ()
    last_step: LastStep | None = None
    events: tuple[str, ...] = ()
    text: str = ""


@dataclass(slots=True)
class _PhaseWork:
    """Tokens and seconds of one phase, in all and since the last snapshot. Mutable."""

    num_tokens: int = 0
    seconds: float = 0.0
    num_recent_tokens: int = 0
    recent_s: float = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        self.num_tokens += num_tokens
        self.seconds += seconds
        self.num_recent_tokens += num_tokens
        self.recent_s += seconds

    def take_speed(self) -> PhaseSpeed:
        speed = PhaseSpeed(
            now=self.num_recent_tokens / self.recent_s if self.recent_s > 0 else None,
            mean=self.num_tokens / self.seconds if self.seconds > 0 else None,
        )
        self.num_recent_tokens, self.recent_s = 0, 0.0
        return speed


class RunMonitor:
    """The observer of a run. Mutable; `snapshot` is replaced whole, so any thread may read it.

    Parameters
    ----------
    plan, hardware
        What runs where, and the limits.
    max_output_lens
        The most tokens that each request may generate, in the order of the prompts.
    predict
        Gives the predicted Timeline of the last step, usually `llm.predicted_timeline`.
    clock
        The time in seconds.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        hardware: HardwareProfile,
        max_output_lens: Sequence[int],
        predict: Callable[[], Timeline | None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.start_s = clock()
        self._plan = plan
        self._hardware = hardware
        self._predict = predict
        self._memory_limit_bytes = memory_limit_bytes()
        self._process = psutil.Process()
        # The first call starts the count and gives nothing.
        psutil.cpu_percent()
        self._next_s = self.start_s
        self._cost_s = 0.0
        self._work = {phase: _PhaseWork() for phase in PHASES}
        self._num_output_tokens = 0
        self._max_output_lens = tuple(max_output_lens)
        self._max_output_tokens = sum(max_output_lens)
        self._ttfts_s: list[float] = []
        self._first_token_s: float | None = None
        self._events: list[str] = []
        self._history: deque[float] = deque(maxlen=HISTORY_LEN)
        self.snapshot = Snapshot(
            title=f"{plan.model} as {plan.placement.name}",
            num_done=0,
            num_requests=len(self._max_output_lens),
            max_output_tokens=self._max_output_tokens,
            devices=self._devices(),
        )

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.start_s

    def observe(self, step: GenerationStep) -> None:
        """Count a step; take a snapshot if it is time for one."""
        now_s = self.clock()
        batch = step.result.batch
        phase = batch.phase
        self._work[phase].add(batch.num_phase_tokens, step.result.seconds)
        for sequence in batch.sampled:
            self._num_output_tokens += 1
            if sequence.num_output_tokens == 1 and sequence.first_token_s is not None:
                self._ttfts_s.append(sequence.first_token_s - sequence.arrival_s)
                self._first_token_s = self._first_token_s or now_s
        for index, sequence in zip(step.finished, step.result.finished, strict=True):
            self._max_output_tokens -= self._max_output_lens[index] - sequence.num_output_tokens
        self._events += [event.text for event in step.result.events]
        is_last = step.num_finished == step.num_requests
        if now_s >= self._next_s or is_last or step.result.events:
            self.snapshot = self._snapshot(step, now_s)
            self._cost_s += self.clock() - now_s
            affordable_s = self.start_s + (self._cost_s - _FREE_COST_S) / _MAX_COST_SHARE
            self._next_s = max(now_s + REFRESH_S, affordable_s)

    def _snapshot(self, step: GenerationStep, now_s: float) -> Snapshot:
        speeds = {phase: work.take_speed() for phase, work in self._work.items()}
        decode_now = speeds["decode"].now
        if decode_now is not None:
            self._history.append(decode_now)
        # One text can be followed; of many, the first that still grows would jump about.
        text = step.text(0)[-_MAX_TEXT_CHARS:] if step.num_requests == 1 else ""
        return replace(
            self.snapshot,
            num_done=step.num_finished,
            num_requests=step.num_requests,
            num_prompt_tokens=self._work["prefill"].num_tokens,
            num_output_tokens=self._num_output_tokens,
            max_output_tokens=self._max_output_tokens,
            at_s=now_s - self.start_s,
            eta_s=self._eta_s(now_s),
            speeds=speeds,
            decode_history=tuple(self._history),
            ttft_s=sum(self._ttfts_s) / len(self._ttfts_s) if self._ttfts_s else None,
            devices=self._devices(),
            last_step=self._last_step(step),
            events=tuple(self._events),
            text=text,
        )

    def _eta_s(self, now_s: float) -> float | None:
        """Seconds left at the speed since the first token; less where texts end early."""
        if self._first_token_s is None or self._num_output_tokens < 2 or now_s <= self.start_s:
            return None
        spent_s = now_s - self._first_token_s
        left = max(0, self._max_output_tokens - self._num_output_tokens)
        return spent_s / (self._num_output_tokens - 1) * left

    def _last_step(self, step: GenerationStep) -> LastStep | None:
        measured, predicted = step.result.timeline, self._predict()
        if predicted is None:
            return None
        return LastStep(
            phase=step.result.batch.phase,
            predicted_s=predicted.makespan_s,
            measured_s=measured.makespan_s,
            terms=compare(predicted, measured),
            lanes=_lane_uses(predicted, measured),
            predicted_overlap=predicted.overlap(),
            overlap=measured.overlap(),
            excess=largest_excess(predicted, measured),
        )

    def _devices(self) -> tuple[DeviceUse, ...]:
        planned = self._plan.estimate.bytes_by_device
        gpu = self._hardware.gpu
        uses = [
            DeviceUse(
                name="cpu",
                used_bytes=int(self._process.memory_info().rss),
                planned_bytes=planned.get("cpu", 0),
                limit_bytes=self._memory_limit_bytes,
                busy_share=psutil.cpu_percent() / 100,
            )
        ]
        device: Device = "gpu"
        if gpu is not None and self._plan.placement.uses(device):
            is_emulated = gpu.kind == "emulated"
            uses.append(
                DeviceUse(
                    name="gpu (emulated)" if is_emulated else "gpu",
                    used_bytes=None if is_emulated else _cuda_used_bytes(),
                    planned_bytes=planned.get(device, 0),
                    limit_bytes=available_bytes(self._hardware, device),
                )
            )
        return tuple(uses)


def _lane_uses(predicted: Timeline, measured: Timeline) -> tuple[LaneUse, ...]:
    """Of the lanes that had work."""
    planned_s, busy_s, idle_s = predicted.busy_s(), measured.busy_s(), measured.idle_s()
    return tuple(
        LaneUse(
            lane=lane,
            predicted_share=planned_s[lane] / max(predicted.makespan_s, _TINY_S),
            busy_share=busy_s[lane] / max(measured.makespan_s, _TINY_S),
            idle_s=idle_s[lane],
            shares=tuple(shares),
        )
        for lane, shares in lane_shares(measured, LANE_CELLS).items()
    )


def _cuda_used_bytes() -> int:
    # Here and not above: the monitor of a CPU run needs no torch.
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)

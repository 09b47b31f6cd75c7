"""StepTrace: the steps of a run as they ran, kept for a trace file within bounds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hetero.engine import StepResult
from hetero.errors import UsageError
from hetero.measure.store import write_atomically
from planner.chrome_trace import TracedStep, chrome_trace
from planner.model_spec import ModelSpec
from planner.step_graph import StepGraph
from planner.timeline import Timeline
from planner.workload import BatchShape

# 100 bytes an op while the run goes on, 420 in the file: 4 MB and 17 MB.
MAX_TRACED_OPS = 40_000


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeptRun:
    """A graph that was run in a step."""

    number: int
    kind: Literal["prefill", "decode", "kv move"]
    graph: StepGraph
    shape: BatchShape
    measured: Timeline


class StepTrace:
    """Keeps the first and the last steps of a run: half of `max_ops` each. Mutable.

    Prediction and writing wait until the run has ended.
    """

    def __init__(self, path: Path, *, max_ops: int = MAX_TRACED_OPS) -> None:
        self.path = path
        self._max_half = max_ops // 2
        self._origin_s = time.perf_counter()
        self._num_steps = 0
        self._num_first_ops, self._num_last_ops = 0, 0
        self._first: list[tuple[_KeptRun, ...]] = []
        self._last: deque[tuple[_KeptRun, ...]] = deque()

    def watch(self, result: StepResult) -> None:
        """Keep a step; of a long run the oldest of the last steps makes room."""
        self._num_steps += 1
        runs = tuple(_runs_of(result, self._num_steps))
        num_ops = _num_ops(runs)
        if not self._last and self._num_first_ops + num_ops <= self._max_half:
            self._first.append(runs)
            self._num_first_ops += num_ops
            return
        self._last.append(runs)
        self._num_last_ops += num_ops
        while self._num_last_ops > self._max_half and len(self._last) > 1:
            self._num_last_ops -= _num_ops(self._last.popleft())

    @property
    def summary(self) -> str:
        """What of the run is kept, in a few words."""
        num_kept = len(self._first) + len(self._last)
        if num_kept == self._num_steps:
            return "1 step" if num_kept == 1 else f"all {num_kept} steps"
        return (
            f"the first {len(self._first)} and the last {len(self._last)} of "
            f"{self._num_steps} steps"
        )

    def write(
        self,
        spec: ModelSpec,
        predict: Callable[[StepGraph, BatchShape], Timeline],
        *,
        note: str = "",
    ) -> bool:
        """Write what is kept beside its prediction; False where no step has run.

        Raises
        ------
        EnvironmentProblemError
            The file cannot be written.
        """
        if self._num_steps == 0:
            return False
        steps = (
            TracedStep(
                number=run.number,
                kind=run.kind,
                shape=run.shape,
                predicted=predict(run.graph, run.shape),
                measured=run.measured,
            )
            for runs in (*self._first, *self._last)
            for run in runs
        )
        document = chrome_trace(steps, spec, origin_s=self._origin_s, note=note)
        write_atomically(self.path, document, is_private=False)
        return True


def check_trace_path(path: Path) -> None:
    """Refuse before the run what could not be written after it.

    Raises
    ------
    UsageError
        The folder does not exist, or there is something that is no plain file.
    """
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} of the trace {path} does not exist")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"the trace {path} is no plain file, which a new one would replace")


def _runs_of(result: StepResult, number: int) -> Iterator[_KeptRun]:
    """The step, and the moves after it."""
    yield _KeptRun(
        number=number,
        kind=result.batch.phase,
        graph=result.graph,
        shape=result.batch.shape,
        measured=result.timeline,
    )
    for move in result.moved:
        if move.graph.ops:
            yield _KeptRun(
                number=number,
                kind="kv move",
                graph=move.graph,
                shape=move.shape,
                measured=move.timeline,
            )


def _num_ops(runs: tuple[_KeptRun, ...]) -> int:
    return sum(len(run.graph.ops) for run in runs)

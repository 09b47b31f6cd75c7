"""Executor: runs a StepGraph on real lanes and returns the measured Timeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hetero.runtime.issue_order import issue_order, lane_runs
from hetero.runtime.lanes import LaneRunner, ThreadLane
from hetero.runtime.step_run import Performer, Program, ProgramRun, StepRun, StreamRun
from planner.step_graph import Lane, Op, StepGraph
from planner.timeline import Timeline


class Executor:
    """Runs graphs on lanes.

    Lanes with threads of their own (the emulated accelerator's) get their part of a graph when a
    step begins and wait for each other by themselves. What CUDA's streams are to do is submitted by
    the calling thread as it becomes known. Either way that thread does the `cpu` lane's work.

    Parameters
    ----------
    lanes : mapping
        A runner for each lane that the graphs use, but `cpu`.
    overlap : bool
        False does one op at a time: the reference for the overlapped run.
    """

    def __init__(self, lanes: Mapping[Lane, LaneRunner], *, overlap: bool = True) -> None:
        self._lanes = lanes
        self._overlap = overlap
        self._threads = {name: lane for name, lane in lanes.items() if isinstance(lane, ThreadLane)}
        # By identity: hashing a graph of hundreds of ops would cost more than a small one's step.
        self._programs: dict[int, Program] = {}
        self._runs: dict[int, tuple[StepGraph, tuple[tuple[Op, ...], ...]]] = {}
        self._in_flight: list[StepRun] = []

    def run(
        self,
        graph: StepGraph,
        perform: Callable[[Op], None],
        perform_run: Callable[[tuple[Op, ...]], Sequence[float]] | None = None,
    ) -> Timeline:
        """Perform every op on its lane after its dependencies: `start` and `finish`."""
        return self.start(graph, Performer(perform, perform_run)).finish()

    def start(self, graph: StepGraph, performer: Performer) -> StepRun:
        """Begin a step: until what is left are the last ops of the `cpu` lane.

        Before it is finished another step may run that has only ops of the `cpu` lane.

        Raises
        ------
        Exception
            What an op raised; ops that depend on it were not performed.
        """
        run = self._run_of(graph, performer)
        # Known before any lane works on it: an interrupt may come at any time.
        self.forget_ended()
        self._in_flight.append(run)
        run.begin()
        return run

    def forget_ended(self) -> None:
        """Let go of the values of steps that have ended."""
        self._in_flight = [each for each in self._in_flight if not each.is_over]

    def abandon(self) -> None:
        """Return once no lane works on a step any more; those on their way are given up."""
        for run in self._in_flight:
            run.abandon()
        self._in_flight = []

    def _run_of(self, graph: StepGraph, performer: Performer) -> StepRun:
        """A step that is to begin."""
        others = [name for name in graph.lanes if name != "cpu"]
        for name in others:
            self._lanes[name].begin_step()
        if all(name in self._threads for name in others):
            if id(graph) not in self._programs:
                self._programs[id(graph)] = Program(graph, overlap=self._overlap)
            return ProgramRun(self._programs[id(graph)], self._threads, performer)
        if id(graph) not in self._runs:
            self._runs[id(graph)] = (graph, lane_runs(issue_order(graph)))
        _, runs = self._runs[id(graph)]
        return StreamRun(graph, runs, self._lanes, performer, overlap=self._overlap)

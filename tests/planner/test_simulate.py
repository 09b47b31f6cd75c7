"""Simulate: hand-worked examples, bounds that hold for any graph, and two slower references."""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Mapping
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner import strategies
from planner.simulate import Slowdowns, makespan_s, op_times, simulate
from planner.step_graph import LANES, Lane, Op, StepGraph, build
from tests.planner.graphs import timed_graphs
from tests.planner.tiny import tiny_spec

TimedGraph = tuple[StepGraph, tuple[float, ...]]
PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)


def test_ops_of_one_lane_run_one_after_the_other() -> None:
    graph = StepGraph(
        phase="decode", ops=tuple(Op(index=i, kind="dense", lane="gpu") for i in range(3))
    )
    timeline = simulate(graph, lambda op: float(op.index + 1))

    assert [(span.start_s, span.end_s) for span in timeline.spans] == [(0, 1), (1, 3), (3, 6)]


def test_ops_of_different_lanes_run_at_once_until_one_waits() -> None:
    """cpu 4, h2d 1; the gpu op (2) waits for the copy, the last cpu op (1) for both."""
    ops = (
        Op(index=0, kind="experts", lane="cpu"),
        Op(index=1, kind="copy", lane="h2d"),
        Op(index=2, kind="dense", lane="gpu", deps=(1,)),
        Op(index=3, kind="combine", lane="cpu", deps=(0, 2)),
    )
    timeline = simulate(
        StepGraph(phase="decode", ops=ops), lambda op: (4.0, 1.0, 2.0, 1.0)[op.index]
    )

    assert [(span.start_s, span.end_s) for span in timeline.spans] == [
        (0, 4),
        (0, 1),
        (1, 3),
        (4, 5),
    ]


def test_a_lane_never_reorders() -> None:
    """The second copy could begin at once but stands behind one that waits for the gpu."""
    ops = (
        Op(index=0, kind="dense", lane="gpu"),
        Op(index=1, kind="copy", lane="h2d", deps=(0,)),
        Op(index=2, kind="copy", lane="h2d"),
    )
    timeline = simulate(StepGraph(phase="decode", ops=ops), lambda op: 1.0)

    assert [span.start_s for span in timeline.spans] == [0, 1, 2]


def test_a_graph_without_ops_takes_no_time() -> None:
    empty = StepGraph(phase="decode", ops=())

    assert simulate(empty, lambda op: 1.0).makespan_s == makespan_s(empty, lambda op: 1.0) == 0.0


@PROPERTY
@given(
    copy_s=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    work_s=st.lists(st.integers(0, 20), min_size=8, max_size=8),
)
def test_double_buffered_streaming_takes_what_the_formula_says(
    copy_s: list[int], work_s: list[int]
) -> None:
    """Double-buffered streaming: x_0 + sum of max(g_l, x_{l+1}) + g_last, for any times."""
    num_layers = len(copy_s)
    expected = copy_s[0] + work_s[num_layers - 1]
    expected += sum(max(work_s[i], copy_s[i + 1]) for i in range(num_layers - 1))

    assert streaming_makespan(copy_s, work_s) == expected


def test_uniform_streaming_is_bound_by_the_slower_of_copy_and_work() -> None:
    """Ten layers: 3 + 9 * max(2, 3) + 2 and 2 + 9 * max(2, 3) + 3."""
    assert streaming_makespan([3] * 10, [2] * 10) == 3 + 9 * 3 + 2
    assert streaming_makespan([2] * 10, [3] * 10) == 2 + 9 * 3 + 3


def streaming_makespan(copy_s: list[int], work_s: list[int]) -> float:
    """Makespan of a step that streams every layer: its copy takes x_l, its compute g_l.

    The copy and the compute of a layer are two ops each (attention, dense); all of the time is in
    the dense ones' work and, for the copies, in what attention waits for.
    """
    spec = tiny_spec("d" * len(copy_s))
    graph = build(spec, strategies.offload(spec, "decode", len(copy_s)))

    def seconds(op: Op) -> float:
        if op.layer is None:
            return 0.0
        if op.payload == "weights":
            # The whole copy before the layer begins: the formula knows no finer grain.
            return float(copy_s[op.layer]) if op.module == "attention" else 0.0
        return float(work_s[op.layer]) if op.kind == "dense" else 0.0

    return simulate(graph, seconds).makespan_s


@PROPERTY
@given(timed_graphs())
def test_the_makespan_lies_between_its_bounds(timed: TimedGraph) -> None:
    """Never below the longest chain of dependencies or a lane's work, never above all work."""
    graph, seconds = timed
    timeline = simulate(graph, lambda op: seconds[op.index])
    longest: list[float] = []
    for op in graph.ops:
        longest.append(seconds[op.index] + max((longest[dep] for dep in op.deps), default=0.0))
    slack = 1e-9

    assert timeline.makespan_s >= max(longest) - slack
    assert timeline.makespan_s >= max(timeline.busy_s().values()) - slack
    assert timeline.makespan_s <= sum(seconds) + slack


@PROPERTY
@given(timed_graphs())
def test_one_pass_gives_what_an_event_driven_simulation_gives(timed: TimedGraph) -> None:
    """The obvious version stays: lanes start what they can whenever an op ends."""
    graph, seconds = timed
    timeline = simulate(graph, lambda op: seconds[op.index])

    assert [(span.start_s, span.end_s) for span in timeline.spans] == event_driven(graph, seconds)
    assert makespan_s(graph, lambda op: seconds[op.index]) == timeline.makespan_s


def event_driven(graph: StepGraph, seconds: tuple[float, ...]) -> list[tuple[float, float]]:
    queues = {lane: deque(graph.lane(lane)) for lane in graph.lanes}
    times: dict[int, tuple[float, float]] = {}
    ended: set[int] = set()
    running: list[tuple[float, int]] = []
    idle = set(graph.lanes)
    now = 0.0
    while len(ended) < len(graph.ops):
        for lane in sorted(idle):
            if queues[lane] and ended.issuperset(queues[lane][0].deps):
                op = queues[lane].popleft()
                times[op.index] = (now, now + seconds[op.index])
                heapq.heappush(running, (now + seconds[op.index], op.index))
                idle.discard(lane)
        now, index = heapq.heappop(running)
        ended.add(index)
        idle.add(graph.ops[index].lane)
    return [times[op.index] for op in graph.ops]


@PROPERTY
@given(timed_graphs(), st.data())
def test_a_faster_op_never_makes_a_step_longer(timed: TimedGraph, data: st.DataObject) -> None:
    """Lanes keep their order, so there are no scheduling anomalies."""
    graph, seconds = timed
    index = data.draw(st.integers(0, len(seconds) - 1))
    faster = list(seconds)
    faster[index] /= 2

    before = makespan_s(graph, lambda op: seconds[op.index])
    assert makespan_s(graph, lambda op: faster[op.index]) <= before


BOTH: Slowdowns = {("cpu", "h2d"): 2.0, ("h2d", "cpu"): 2.0}


def at_once(*lanes: Lane) -> StepGraph:
    """One op on each of some lanes, nothing waiting."""
    ops = tuple(Op(index=index, kind="dense", lane=lane) for index, lane in enumerate(lanes))
    return with_long_ops(StepGraph(phase="decode", ops=ops))


def with_long_ops(graph: StepGraph) -> StepGraph:
    """The same graph of ops of the kinds that take long enough to slow each other down."""
    ops = tuple(
        replace(op, kind="copy", payload="weights")
        if op.lane in ("h2d", "d2h")
        else replace(op, kind="dense")
        for op in graph.ops
    )
    return dataclasses.replace(graph, ops=ops)


def test_lanes_slow_each_other_down_while_both_work() -> None:
    """A copy of 3 s takes 6 beside the CPU, which meanwhile does 3 of its 4: 1 more alone."""
    found = op_times(at_once("cpu", "h2d"), lambda op: (4.0, 3.0)[op.index], BOTH)

    assert found == [(0.0, 7.0), (0.0, 6.0)]


def test_of_several_lanes_the_one_that_slows_down_most_counts() -> None:
    """The CPU beside the GPU (1.5) and a copy (2): half speed for 2 s, 1 / 1.5 for 3, then whole.

    1 + 2 of its 4 seconds are then done, at 5.
    """
    slowdowns: Slowdowns = {("cpu", "h2d"): 2.0, ("cpu", "gpu"): 1.5}
    found = op_times(at_once("cpu", "h2d", "gpu"), lambda op: (4.0, 2.0, 5.0)[op.index], slowdowns)

    assert found[0] == pytest.approx((0.0, 6.0))
    assert found[1:] == [(0.0, 2.0), (0.0, 5.0)]


def test_a_lane_that_waits_slows_nobody_down() -> None:
    """The copy begins when the CPU's first op of 2 s has ended; beside the second both halve."""
    ops = (
        Op(index=0, kind="dense", lane="cpu"),
        Op(index=1, kind="copy", lane="h2d", deps=(0,), payload="weights"),
        Op(index=2, kind="dense", lane="cpu"),
    )
    found = op_times(StepGraph(phase="decode", ops=ops), lambda op: (2.0, 1.0, 3.0)[op.index], BOTH)

    assert found == [(0.0, 2.0), (2.0, 4.0), (2.0, 6.0)]


def test_copies_of_less_than_weights_slow_nobody_down() -> None:
    graph = at_once("cpu", "h2d")
    hidden = (graph.ops[0], replace(graph.ops[1], payload="hidden"))
    found = op_times(dataclasses.replace(graph, ops=hidden), lambda op: 4.0, BOTH)

    assert found == [(0.0, 4.0), (0.0, 4.0)]


pairs = st.sampled_from(list(permutations(LANES, 2)))
slowdown_maps = st.dictionaries(pairs, st.floats(1.0, 4.0), max_size=len(LANES) * 3)


@PROPERTY
@given(timed_graphs())
def test_lanes_that_do_not_slow_down_are_simulated_as_without(timed: TimedGraph) -> None:
    """From event to event, and in one pass over the graph."""
    graph, seconds = with_long_ops(timed[0]), timed[1]
    without = op_times(graph, lambda op: seconds[op.index])
    found = op_times(
        graph, lambda op: seconds[op.index], dict.fromkeys(permutations(LANES, 2), 1.0)
    )

    for (start_s, end_s), (plain_start_s, plain_end_s) in zip(found, without, strict=True):
        assert start_s == pytest.approx(plain_start_s, abs=1e-9)
        assert end_s == pytest.approx(plain_end_s, abs=1e-9)


@PROPERTY
@given(timed_graphs(), slowdown_maps)
def test_slowdowns_never_make_an_op_end_earlier(
    timed: TimedGraph, slowdowns: dict[tuple[Lane, Lane], float]
) -> None:
    """Nor later than if every op took the largest of them."""
    graph, seconds = with_long_ops(timed[0]), timed[1]
    worst = max(slowdowns.values(), default=1.0)
    without = op_times(graph, lambda op: seconds[op.index])
    found = op_times(graph, lambda op: seconds[op.index], slowdowns)

    for (_, end_s), (_, plain_end_s) in zip(found, without, strict=True):
        assert plain_end_s - 1e-9 <= end_s <= worst * plain_end_s + 1e-9


@settings(deadline=None, derandomize=True, max_examples=60)
@given(timed_graphs(max_num_ops=6), slowdown_maps)
def test_slowdowns_give_what_small_steps_in_time_give(
    timed: TimedGraph, slowdowns: dict[tuple[Lane, Lane], float]
) -> None:
    """Each event of the reference is late by a step at most, and delays what follows as much."""
    graph, seconds = with_long_ops(timed[0]), timed[1]
    found = op_times(graph, lambda op: seconds[op.index], slowdowns)
    worst = max(slowdowns.values(), default=1.0)
    tolerance = 2 * len(graph.ops) * worst * TIME_STEP_S

    for times, expected in zip(found, in_small_steps(graph, seconds, slowdowns), strict=True):
        assert times == pytest.approx(expected, abs=tolerance)


TIME_STEP_S = 2.0**-9


def in_small_steps(
    graph: StepGraph, seconds: tuple[float, ...], slowdowns: Mapping[tuple[Lane, Lane], float]
) -> list[tuple[float, float]]:
    """What each lane works on gets a little less in every small step, by the worst other lane."""
    waiting = {lane: list(graph.lane(lane)) for lane in graph.lanes}
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    left_s = dict(enumerate(seconds))
    num_steps = 0
    while len(ends) < len(graph.ops):
        working: dict[Lane, Op] = {}
        for lane, ops in waiting.items():
            if ops and all(dep in ends for dep in ops[0].deps):
                working[lane] = ops[0]
                starts.setdefault(ops[0].index, num_steps * TIME_STEP_S)
        num_steps += 1
        for lane, op in working.items():
            factors = [slowdowns.get((lane, other), 1.0) for other in working]
            left_s[op.index] -= TIME_STEP_S / max(factors)
            if left_s[op.index] <= 0:
                ends[op.index] = num_steps * TIME_STEP_S
                waiting[lane].pop(0)
    return [(starts[op.index], ends[op.index]) for op in graph.ops]

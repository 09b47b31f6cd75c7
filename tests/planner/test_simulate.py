"""Simulate: hand-worked examples, bounds that hold for any graph, and an event-driven reference."""

from __future__ import annotations

import heapq
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from planner import strategies
from planner.simulate import makespan_s, simulate
from planner.step_graph import Op, StepGraph, build
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

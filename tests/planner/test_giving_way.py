"""Copies that give way in the simulator: by hand, and against an event-driven reference."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner.simulate import Slowdowns, op_times, work_until_called_s
from planner.step_graph import LANES, Lane, Op, StepGraph
from tests.planner.graphs import timed_graphs

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
# Lanes that do not slow each other down are simulated from event to event all the same.
NO_SLOWDOWNS: Slowdowns = dict.fromkeys(permutations(LANES, 2), 1.0)


def ahead(index: int, *deps: int, lane: Lane = "h2d") -> Op:
    """Experts of layer 1 that are copied ahead."""
    return Op(
        index=index,
        kind="copy",
        lane=lane,
        deps=deps,
        layer=1,
        payload="weights",
        part="prefetched",
    )


def urgent(index: int, *deps: int) -> Op:
    """Experts of layer 1 that its gate has chosen."""
    return Op(
        index=index, kind="copy", lane="h2d", deps=deps, layer=1, payload="weights", part="fetched"
    )


def graph_of(*ops: Op) -> StepGraph:
    return StepGraph(phase="decode", ops=ops)


def priced(*seconds: float, chunk_s: float) -> Callable[[Op], float]:
    """Seconds of ops by their index; of a chunk of any that gives way the same."""
    return lambda op: seconds[op.index] if op.num_chunks is None else chunk_s


@pytest.mark.parametrize("slowdowns", [None, NO_SLOWDOWNS])
@pytest.mark.parametrize(
    ("router_s", "end_s"),
    [
        (5.0, 6.0),  # called in its third chunk of 2 s
        (6.0, 6.0),  # called between two
        (0.0, 0.0),  # before it has begun
        (11.0, 9.0),  # after its end, in 4.5 chunks
        (8.5, 9.0),  # in the last one, which is half a chunk
    ],
)
def test_a_copy_ahead_ends_with_a_chunk_once_an_urgent_one_is_ready(
    router_s: float, end_s: float, slowdowns: Slowdowns | None
) -> None:
    """The gate is done after `router_s`; the urgent copy takes 3 s."""
    graph = graph_of(ahead(0), Op(index=1, kind="dense", lane="gpu", layer=1), urgent(2, 1))
    found = op_times(graph, priced(9.0, router_s, 3.0, chunk_s=2.0), slowdowns)

    begin_s = max(router_s, end_s)
    assert found == [(0.0, end_s), (0.0, router_s), (begin_s, begin_s + 3.0)]


@pytest.mark.parametrize("slowdowns", [None, NO_SLOWDOWNS])
def test_a_copy_ahead_that_nothing_follows_is_done_as_a_whole(slowdowns: Slowdowns | None) -> None:
    graph = graph_of(ahead(0), Op(index=1, kind="dense", lane="gpu", layer=1))

    assert op_times(graph, priced(9.0, 1.0, chunk_s=2.0), slowdowns)[0] == (0.0, 9.0)


@pytest.mark.parametrize("slowdowns", [None, NO_SLOWDOWNS])
def test_one_copy_ahead_gives_way_to_another(slowdowns: Slowdowns | None) -> None:
    """The second could begin at 1, in the first's chunk of 2 s; nothing calls it, for 9 s."""
    graph = graph_of(ahead(0), Op(index=1, kind="dense", lane="gpu", layer=1), ahead(2, 1))

    found = op_times(graph, priced(9.0, 1.0, 9.0, chunk_s=2.0), slowdowns)
    assert found == [(0.0, 2.0), (0.0, 1.0), (2.0, 11.0)]


def test_a_copy_ahead_that_is_slowed_down_has_slower_chunks() -> None:
    """The gate is done at 5 beside a copy at half speed, 2.5 s of work: 3 s are 1.5 chunks, so that
    it ends with 4 s of work. The gpu is idle then: 1.5 s more, at 6.5."""
    graph = graph_of(ahead(0), Op(index=1, kind="dense", lane="gpu", layer=1), urgent(2, 1))
    slowdowns: Slowdowns = {("h2d", "gpu"): 2.0}

    found = op_times(graph, priced(9.0, 5.0, 3.0, chunk_s=2.0), slowdowns)
    assert found == [(0.0, 6.5), (0.0, 5.0), (6.5, 9.5)]


def test_an_urgent_copy_waits_for_a_chunk_at_most() -> None:
    for called in range(60):
        done_s = called / 5
        waits_s = work_until_called_s(done_s, 9.0, 2.0) - min(done_s, 9.0)
        assert 0.0 <= waits_s <= 2.0


@st.composite
def graphs_that_give_way(
    draw: st.DrawFn,
) -> tuple[StepGraph, tuple[float, ...], float]:
    """Random ones, in which copies that nothing waits for give way; and seconds of a chunk."""
    graph, _ = draw(timed_graphs())
    waited_for = {dep for op in graph.ops for dep in op.deps}
    ops = tuple(
        ahead(op.index, *op.deps, lane=op.lane)
        if op.kind == "copy" and op.index not in waited_for and draw(st.booleans())
        else op
        for op in graph.ops
    )
    # sixteenths, so that no sum is rounded
    seconds = tuple(draw(st.integers(0, 160)) / 16 for _ in ops)
    return StepGraph(phase="decode", ops=ops), seconds, draw(st.integers(1, 48)) / 16


@PROPERTY
@given(graphs_that_give_way())
def test_both_passes_give_what_looking_up_in_small_steps_gives(
    drawn: tuple[StepGraph, tuple[float, ...], float],
) -> None:
    graph, seconds, chunk_s = drawn
    expected = tick_by_tick(graph, seconds, chunk_s)
    price = priced(*seconds, chunk_s=chunk_s)

    assert op_times(graph, price) == expected
    with_long = tuple(
        replace(op, kind="dense") if op.lane in ("gpu", "cpu") else replace(op, payload="weights")
        for op in graph.ops
    )
    graph = StepGraph(phase="decode", ops=with_long)
    for found, times in zip(op_times(graph, price, NO_SLOWDOWNS), expected, strict=True):
        assert found == pytest.approx(times)


def tick_by_tick(
    graph: StepGraph, seconds: tuple[float, ...], chunk_s: float
) -> list[tuple[float, float]]:
    """Sixteenths of a second; at each one what can end ends, and what can begin begins."""
    queues = {lane: deque(graph.lane(lane)) for lane in graph.lanes}
    left = [round(16 * each) for each in seconds]
    chunk = round(16 * chunk_s)
    done = [0] * len(left)
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    tick = 0
    while len(ends) < len(graph.ops):
        changed = True
        while changed:
            changed = False
            for queue in queues.values():
                if not queue or not all(dep in ends for dep in queue[0].deps):
                    continue
                op = queue[0]
                starts.setdefault(op.index, tick / 16)
                after = queue[1] if len(queue) > 1 else None
                called = after is not None and all(dep in ends for dep in after.deps)
                looks_up = op.gives_way and called and done[op.index] % chunk == 0
                if left[op.index] == 0 or looks_up:
                    ends[op.index] = tick / 16
                    queue.popleft()
                    changed = True
        for queue in queues.values():
            if queue and queue[0].index in starts:
                left[queue[0].index] -= 1
                done[queue[0].index] += 1
        tick += 1
    return [(starts[op.index], ends[op.index]) for op in graph.ops]

"""Timeline: lanes, critical path and terms that add up."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.simulate import simulate
from planner.step_graph import LANES, Op, StepGraph
from planner.timeline import (
    Excess,
    Span,
    TermComparison,
    Timeline,
    compare,
    lane_orders,
    largest_excess,
)
from tests.planner.graphs import timed_graphs

TimedGraph = tuple[StepGraph, tuple[float, ...]]
PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)

# gpu:  attention 0-2           combine 7-8
# d2h:              copy 2-3
# cpu:                   experts 3-6
# h2d:  copy 0-1                      copy 6-7
OPS = (
    Op(index=0, kind="attention", lane="gpu", layer=0),
    Op(index=1, kind="copy", lane="h2d", payload="batch"),
    Op(index=2, kind="copy", lane="d2h", deps=(0,), payload="routing", layer=0),
    Op(index=3, kind="experts", lane="cpu", deps=(2,), layer=0),
    Op(index=4, kind="copy", lane="h2d", deps=(3,), payload="expert_output", layer=0),
    Op(index=5, kind="combine", lane="gpu", deps=(4,), layer=0),
)
SECONDS = (2.0, 1.0, 1.0, 3.0, 1.0, 1.0)
HYBRID = simulate(StepGraph(phase="decode", ops=OPS), lambda op: SECONDS[op.index])


def measured(*times: tuple[float, float]) -> Timeline:
    return Timeline(
        spans=tuple(
            Span(op=op, start_s=start_s, end_s=end_s)
            for op, (start_s, end_s) in zip(OPS, times, strict=True)
        )
    )


def test_a_hybrid_step_worked_by_hand() -> None:
    assert HYBRID.makespan_s == 8.0
    assert HYBRID.busy_s() == {"gpu": 3.0, "cpu": 3.0, "h2d": 2.0, "d2h": 1.0}
    assert [span.op.index for span in HYBRID.critical_path()] == [0, 2, 3, 4, 5]
    assert HYBRID.bottleneck() == "cpu experts"
    assert HYBRID.overlap() == 1 - 8 / 9
    assert HYBRID.by_term() == {
        "attention": 2.0,
        "router": 0.0,
        "dispatch": 1.0,
        "experts": 3.0,
        "dense": 0.0,
        "head": 0.0,
        "transfer": 2.0,
        "wait": 0.0,
        "host": 0.0,
    }


def test_the_critical_path_goes_through_the_lane_where_that_was_the_last_to_end() -> None:
    """The second copy waits for the first (5 s), not for its dependency (1 s)."""
    ops = (
        Op(index=0, kind="copy", lane="h2d"),
        Op(index=1, kind="router", lane="gpu"),
        Op(index=2, kind="copy", lane="h2d", deps=(1,)),
    )
    timeline = simulate(StepGraph(phase="decode", ops=ops), lambda op: (5.0, 1.0, 2.0)[op.index])

    assert [span.op.index for span in timeline.critical_path()] == [0, 2]


def test_gaps_of_a_measured_timeline_are_waits() -> None:
    """Half a second before the first op, a quarter between the copies and the experts."""
    timeline = measured((0.5, 2), (0.5, 1), (2, 3), (3.25, 6), (6, 7), (7, 8))

    assert timeline.by_term()["wait"] == 0.75
    assert sum(timeline.by_term().values()) == timeline.makespan_s == 8.0


def test_measured_neighbours_that_overlap_by_a_clock_tick_count_each_second_once() -> None:
    timeline = measured((0, 2.5), (0, 1), (2, 3), (3, 6), (6, 7), (7, 8))

    assert timeline.by_term()["transfer"] == 0.5 + 1.0
    assert sum(timeline.by_term().values()) == 8.0


def test_measured_starts_out_of_order_do_not_send_the_walk_in_circles() -> None:
    """The dependent op of one lane starts a clock tick before the op that it depends on."""
    ops = (
        Op(index=0, kind="router", lane="gpu"),
        Op(index=1, kind="dense", lane="gpu", deps=(0,)),
    )
    timeline = Timeline(
        spans=(
            Span(op=ops[0], start_s=1.0, end_s=2.0),
            Span(op=ops[1], start_s=0.9, end_s=2.5),
        )
    )

    assert [span.op.index for span in timeline.critical_path()] == [0, 1]
    assert sum(timeline.by_term().values()) == 2.5


def test_an_empty_timeline_has_no_path() -> None:
    empty = Timeline(spans=())

    assert (empty.makespan_s, empty.critical_path(), empty.overlap()) == (0.0, (), 0.0)
    assert empty.bottleneck() == "none"
    assert set(empty.by_term().values()) == {0.0}


@PROPERTY
@given(timed_graphs())
def test_terms_add_up_to_the_makespan(timed: TimedGraph) -> None:
    """The critical path of a simulated step has no gaps and no overlaps."""
    graph, seconds = timed
    timeline = simulate(graph, lambda op: seconds[op.index])
    terms = timeline.by_term()

    assert sum(terms.values()) == pytest.approx(timeline.makespan_s, abs=1e-9)
    assert terms["wait"] == 0.0
    path = timeline.critical_path()
    assert path[0].start_s == 0.0
    assert path[-1].end_s == timeline.makespan_s
    assert all(a.end_s == b.start_s for a, b in pairwise(path))


@PROPERTY
@given(timed_graphs(), st.lists(st.floats(0.0, 1.0), min_size=12, max_size=12))
def test_terms_of_a_measured_timeline_add_up_too(timed: TimedGraph, delays: list[float]) -> None:
    """Any late start on top of the simulated times is a wait."""
    graph, seconds = timed
    late = simulate(graph, lambda op: seconds[op.index] + delays[op.index])
    timeline = Timeline(
        spans=tuple(
            Span(op=span.op, start_s=span.end_s - seconds[span.op.index], end_s=span.end_s)
            for span in late.spans
        )
    )

    assert sum(timeline.by_term().values()) == pytest.approx(timeline.makespan_s, abs=1e-9)


def test_lanes_are_in_the_order_in_which_they_ran() -> None:
    assert lane_orders(HYBRID) == {
        "gpu": ["attention[0]", "combine[0]"],
        "cpu": ["experts[0]"],
        "h2d": ["copy batch h2d", "copy expert_output[0] h2d"],
        "d2h": ["copy routing[0] d2h"],
    }


def test_predicted_and_measured_are_compared_term_by_term() -> None:
    """Experts take 6 s instead of 3; terms of which neither has any are left out."""
    slower = measured((0, 2), (0, 1), (2, 3), (3, 9), (9, 10), (10, 11))

    assert compare(HYBRID, slower) == (
        TermComparison(term="attention", predicted_s=2.0, measured_s=2.0),
        TermComparison(term="dispatch", predicted_s=1.0, measured_s=1.0),
        TermComparison(term="experts", predicted_s=3.0, measured_s=6.0),
        TermComparison(term="transfer", predicted_s=2.0, measured_s=2.0),
    )
    assert compare(HYBRID, slower)[2].ratio == 2.0
    assert TermComparison(term="wait", predicted_s=0.0, measured_s=1.0).ratio is None
    assert largest_excess(HYBRID, slower) == Excess(lane="cpu", term="experts", seconds=3.0)


def test_what_is_most_of_an_excess() -> None:
    """The second copy takes a second longer, and half a second is waited before the experts."""
    late = measured((0, 2), (0, 1), (2, 3), (3.5, 6.5), (6.5, 8.5), (8.5, 9.5))
    assert largest_excess(HYBRID, late) == Excess(lane="h2d", term="transfer", seconds=1.0)
    waited = measured((0, 2), (0, 1), (2, 3), (3.5, 6.5), (6.5, 7.5), (7.5, 8.5))
    assert largest_excess(HYBRID, waited) == Excess(lane=None, term="wait", seconds=0.5)
    assert largest_excess(HYBRID, HYBRID) is None


def test_bubbles_lie_between_the_ops_of_a_lane() -> None:
    """gpu 0-2 and 7-8, h2d 0-1 and 6-7; the cpu and d2h have one op each."""
    assert HYBRID.idle_s() == {"gpu": 5.0, "cpu": 0.0, "h2d": 5.0, "d2h": 0.0}
    assert Timeline(spans=()).idle_s() == dict.fromkeys(LANES, 0.0)

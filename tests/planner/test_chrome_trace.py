"""The Chrome trace: keeps the format, and has every op of every step where it ran."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import chrome_trace as module
from planner.chrome_trace import TracedStep, chrome_trace
from planner.simulate import simulate
from planner.step_graph import Op, StepGraph
from planner.timeline import Span, Timeline
from planner.workload import decode_shape, prompt_shape
from tests.planner.graphs import timed_graphs
from tests.planner.tiny import ATTENTION, HIDDEN, KV_PER_TOKEN, tiny_spec
from tests.trace_format import of_kind, read_trace, rows

SPEC = tiny_spec("m" * 12)
TimedGraph = tuple[StepGraph, tuple[float, ...]]

# gpu: attention 0-2                combine 7-8
# d2h:               copy 2-3
# cpu:                    experts 3-6
# h2d: copy 0-1                copy 6-7
OPS = (
    Op(index=0, kind="attention", lane="gpu", layer=0, module="attention"),
    Op(index=1, kind="copy", lane="h2d", layer=0, payload="weights", module="attention", buffer=1),
    Op(index=2, kind="copy", lane="d2h", deps=(0,), payload="routing", layer=0),
    Op(index=3, kind="experts", lane="cpu", deps=(2,), layer=0, part="missed", num_resident=9),
    Op(index=4, kind="copy", lane="h2d", deps=(3,), payload="expert_output", layer=0),
    Op(index=5, kind="combine", lane="gpu", deps=(1, 4), layer=0),
)
SECONDS = (2.0, 1.0, 1.0, 3.0, 1.0, 1.0)
GRAPH = StepGraph(phase="decode", ops=OPS)


def timeline(origin_s: float = 0.0, scale: float = 1.0) -> Timeline:
    found = simulate(GRAPH, lambda op: scale * SECONDS[op.index])
    return replace(found, origin_s=origin_s)


def step(number: int, begin_s: float, *, predicted: float = 1.0) -> TracedStep:
    """Takes 8 s, and was predicted to take `predicted` times as long."""
    return TracedStep(
        number=number,
        kind="decode",
        shape=decode_shape(2, 7),
        predicted=timeline(scale=predicted),
        measured=timeline(begin_s),
    )


def test_a_step_worked_by_hand() -> None:
    """It began half a second after the trace; of 2 tokens, each sent to 2 experts of 12 bytes."""
    events = read_trace(chrome_trace([step(1, 10.5)], SPEC, origin_s=10.0, note=" (emulated)"))
    found = rows(events)

    sides = ("predicted (emulated)", "measured (emulated)")
    assert set(found) == {
        (side, row) for side in sides for row in ("step", "gpu", "cpu", "h2d", "d2h")
    }
    (whole,) = found["measured (emulated)", "step"]
    assert (whole["name"], whole["cat"]) == ("decode 1", "decode")
    assert (whole["ts"], whole["dur"]) == (0.5e6, 8e6)
    assert whole["args"] == {
        "num_tokens": 2,
        "num_seqs": 2,
        "num_past_tokens": 7,
        "predicted_us": 8e6,
        "measured_us": 8e6,
        "predicted_overlap": 0.111,  # 1 - 8 / 9
        "measured_overlap": 0.111,
    }
    (experts,) = found["measured (emulated)", "cpu"]
    assert (experts["name"], experts["cat"]) == ("experts missed[0]", "experts")
    assert (experts["ts"], experts["dur"]) == (3.5e6, 3e6)
    assert experts["args"] == {
        **{"num_tokens": 2, "layer": 0, "part": "missed", "num_resident": 9},
        "predicted_us": 3e6,
    }
    weights = found["predicted (emulated)", "h2d"][0]
    assert weights["args"] == {
        **{"num_tokens": 2, "layer": 0, "module": "attention", "buffer": 1},
        "bytes": ATTENTION,
    }
    (routing,) = found["predicted (emulated)", "d2h"]
    assert routing["args"]["bytes"] == 2 * HIDDEN + 2 * 2 * 12


def test_arrows_go_from_an_op_to_those_on_other_lanes_that_need_it() -> None:
    events = read_trace(chrome_trace([step(1, 0.0)], SPEC, origin_s=0.0))
    lanes = {
        event["tid"]: event["args"]["name"]
        for event in of_kind(events, "M")
        if event["name"] == "thread_name"
    }
    ends = {event["id"]: event for event in of_kind(events, "f")}
    arrows = [
        (start["pid"], lanes[start["tid"]], lanes[ends[start["id"]]["tid"]])
        for start in of_kind(events, "s")
    ]
    each = [("gpu", "d2h"), ("d2h", "cpu"), ("cpu", "h2d"), ("h2d", "gpu"), ("h2d", "gpu")]
    assert arrows == [(pid, *pair) for pid in (1, 2) for pair in each]
    # the last moment of the experts, and the first of the copy
    start = next(event for event in of_kind(events, "s") if lanes[event["tid"]] == "cpu")
    assert start["ts"] == pytest.approx(6e6, abs=1.0)
    assert ends[start["id"]]["ts"] == 6e6


def test_arrows_end_at_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ARROWS", 7)
    events = read_trace(chrome_trace([step(1, 0.0), step(2, 9.0)], SPEC, origin_s=0.0))
    assert len(of_kind(events, "s")) == 7
    assert len([event for event in of_kind(events, "X") if event["cat"] != "decode"]) == 4 * len(
        OPS
    )


def test_a_predicted_step_begins_with_the_measured_one() -> None:
    """Where it takes longer than that the next is drawn beside it, on rows of its own."""
    begins = (0.0, 9.0, 18.0, 40.0)
    steps = [step(number, begin, predicted=2.0) for number, begin in enumerate(begins, start=1)]
    found = rows(read_trace(chrome_trace(steps, SPEC, origin_s=0.0)))

    measured = found["measured", "step"]
    assert [(each["ts"], each["dur"]) for each in measured] == [(t * 1e6, 8e6) for t in begins]
    first, second = found["predicted", "step"], found["predicted", "step +1"]
    # 16 s each: the third begins when the first has ended
    assert [(each["name"], each["ts"], each["dur"]) for each in (*first, *second)] == [
        ("decode 1", 0.0, 16e6),
        ("decode 3", 18e6, 16e6),
        ("decode 4", 40e6, 16e6),
        ("decode 2", 9e6, 16e6),
    ]
    assert [each["name"] for each in found["predicted", "cpu +1"]] == ["experts missed[0]"]


def test_steps_that_were_left_out_are_said() -> None:
    events = read_trace(chrome_trace([step(1, 0.0), step(12, 90.0)], SPEC, origin_s=0.0))
    marks = of_kind(events, "i")
    assert [(mark["pid"], mark["name"], mark["ts"]) for mark in marks] == [
        (pid, "10 steps left out", 90e6) for pid in (1, 2)
    ]


def test_a_move_of_a_cache_is_of_its_step() -> None:
    """The cache of 5 tokens, after the step that ended their prompt."""
    copy = Op(index=0, kind="copy", lane="d2h", layer=0, payload="kv")
    ran = Timeline(spans=(Span(op=copy, start_s=0.0, end_s=1.0),), origin_s=9.0)
    move = TracedStep(number=1, kind="kv move", shape=prompt_shape(5), predicted=ran, measured=ran)
    events = read_trace(chrome_trace([step(1, 0.0), move], SPEC, origin_s=0.0))
    found = rows(events)
    assert [each["name"] for each in found["measured", "step"]] == ["decode 1", "kv move 1"]
    assert found["measured", "d2h"][-1]["args"]["bytes"] == 5 * KV_PER_TOKEN
    assert of_kind(events, "i") == []


def test_a_clock_that_is_a_tick_off_makes_no_overlap() -> None:
    """A device's events may end a moment after the next begins, or before they began."""
    ops = tuple(Op(index=index, kind="dense", lane="gpu", layer=index) for index in range(3))
    times = ((-1e-7, 2.0), (1.9999999, 3.0), (3.0, 2.9999999))
    spans = tuple(
        Span(op=op, start_s=start_s, end_s=end_s)
        for op, (start_s, end_s) in zip(ops, times, strict=True)
    )
    ran = Timeline(spans=spans)
    odd = TracedStep(number=1, kind="decode", shape=decode_shape(1, 1), predicted=ran, measured=ran)
    found = rows(read_trace(chrome_trace([odd], SPEC, origin_s=0.0)))
    assert [(each["ts"], each["dur"]) for each in found["measured", "gpu"]] == [
        (0.0, 2e6),
        (2e6, 1e6),
        (3e6, 0.0),
    ]


def test_an_event_is_a_line() -> None:
    lines = chrome_trace([step(1, 0.0)], SPEC, origin_s=0.0).decode().splitlines()
    assert all(json.loads(line.removesuffix(",")) for line in lines[1:-1])


def scaled(graph: StepGraph, seconds: tuple[float, ...], factor: float) -> Timeline:
    return simulate(graph, lambda op: factor * seconds[op.index])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(
        st.tuples(timed_graphs(), st.floats(0.0, 5.0), st.floats(0.1, 4.0)), min_size=1, max_size=5
    )
)
def test_every_trace_keeps_the_format(runs: list[tuple[TimedGraph, float, float]]) -> None:
    """Any graphs, one after the other with pauses, predicted too short or too long."""
    begin_s, steps = 0.0, []
    for number, ((graph, seconds), pause_s, factor) in enumerate(runs, start=1):
        measured, predicted = scaled(graph, seconds, 1.0), scaled(graph, seconds, factor)
        begin_s += pause_s
        steps.append(
            TracedStep(
                number=number,
                kind="decode",
                shape=decode_shape(1, 1),
                predicted=predicted,
                measured=replace(measured, origin_s=begin_s),
            )
        )
        begin_s += measured.makespan_s
    found = rows(read_trace(chrome_trace(steps, SPEC, origin_s=0.0)))
    for side in ("predicted", "measured"):
        slices = [each for (of, _), row in found.items() if of == side for each in row]
        num_ops = sum(len(graph.ops) for (graph, _), _, _ in runs)
        assert len(slices) == num_ops + len(runs)

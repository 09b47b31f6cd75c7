"""Random step graphs with seconds for every op, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from planner.step_graph import LANES, Op, OpKind, StepGraph

_KINDS: tuple[OpKind, ...] = ("attention", "router", "dispatch", "experts", "dense", "head")


@st.composite
def timed_graphs(draw: st.DrawFn, max_num_ops: int = 12) -> tuple[StepGraph, tuple[float, ...]]:
    """A graph of a few ops on any lanes with any earlier ops as dependencies."""
    ops = []
    for index in range(draw(st.integers(1, max_num_ops))):
        earlier = st.sets(st.integers(0, index - 1), max_size=3) if index else st.just(set[int]())
        lane = draw(st.sampled_from(LANES))
        kind: OpKind = "copy" if lane in ("h2d", "d2h") else draw(st.sampled_from(_KINDS))
        deps = tuple(sorted(draw(earlier)))
        ops.append(Op(index=index, kind=kind, lane=lane, deps=deps, layer=index))
    seconds = draw(st.lists(st.floats(0.0, 10.0), min_size=len(ops), max_size=len(ops)).map(tuple))
    return StepGraph(phase="decode", ops=tuple(ops)), seconds

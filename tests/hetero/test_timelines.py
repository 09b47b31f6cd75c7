"""What is predicted is what is run: for every graph the same ops on the same lanes in the same
order, each after what it needs, in the Timelines and in the trace file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from planner import strategies
from planner.cost_model import predict
from planner.model_spec import ModelSpec
from planner.placement import KV_BLOCK_TOKENS, Placement, Runs, Slots, TierPlacement
from planner.step_graph import (
    LANES,
    Op,
    OpKind,
    Part,
    Payload,
    StepGraph,
    build,
    build_kv_move,
    moved_kv_layers,
)
from planner.timeline import Timeline, lane_orders
from planner.workload import BatchShape, Phase
from tests.hetero.test_divided_caches import WHERE as DIVIDED
from tests.hetero.test_divided_dense import divided
from tests.hetero.test_expert_slots import slotted
from tests.hetero.test_mixed_experts import Mix, mixed, placed
from tests.hetero.test_sub_batches import (
    BOTH,
    SUB_BATCHES,
    TIERS,
    many_blocks,
    sub_batches_by_hand,
    with_prefill,
    with_smaller,
)
from tests.tiny_models import save_tiny_model, tiny_model, tiny_spec
from tests.trace_format import read_trace, rows

__all__ = ["many_blocks"]

# Ragged, and of other lengths: sub-batches and tiers change while they run.
PROMPTS: Any = [
    {"prompt_token_ids": [3, 14, 15, 92]},
    {"prompt_token_ids": [65, 35, 89] * 7},
    {"prompt_token_ids": [7]},
    {"prompt_token_ids": [4, 4, 8]},
]
PARAMS = [
    SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True) for count in (3, 5, 4, 2)
]
# Of what the times of a chain of kernels are rounded to when they become seconds.
CLOCK_S = 1e-6

Place = Callable[[ModelSpec], Placement]


def _named(strategy: str, cut: int) -> Place:
    return lambda spec: strategies.placement(spec, strategy, cut)


def _moving(prefill: str, decode: str) -> Place:
    """Another strategy in decode, for which the cache changes device."""

    def place(spec: ModelSpec) -> Placement:
        before = strategies.placement(spec, prefill, 1 if prefill == "split" else 0)
        return replace(before, decode=strategies.placement(spec, decode, 0).decode)

    return place


def _mix(**mix: Any) -> Place:
    return lambda spec: mixed(spec, Mix(**mix), Mix(**mix), seed=2)


def _slotted(slots: Slots, *, prefetch: bool) -> Place:
    return lambda spec: slotted(spec, 2, slots, prefetch=prefetch)


def _caches(place: Callable[[ModelSpec, int], Placement]) -> Place:
    return lambda spec: place(spec, KV_BLOCK_TOKENS)


def _columns(runs: Runs, *, is_streaming: bool) -> Place:
    both: dict[Phase, Runs] = {"prefill": runs, "decode": runs}
    return lambda spec: divided(spec, both, 7, is_streaming=is_streaming)


def _in_two(tier: Callable[[ModelSpec], TierPlacement]) -> Place:
    return lambda spec: with_prefill(tier(spec), spec)


def _tiers(tiers: Callable[[ModelSpec], tuple[TierPlacement, ...]]) -> Place:
    return lambda spec: with_smaller(spec, tiers(spec))


SLOTS: tuple[tuple[Slots, bool], ...] = (("static", True), ("lru", False), ("lru", True))
# Model and placement of every kind of graph.
GRAPHS: dict[str, tuple[str, Place]] = {
    "gpu": ("olmoe", _named("gpu", 0)),
    "cpu": ("olmoe", _named("cpu", 0)),
    **{
        f"{strategy} {cut}": ("olmoe", _named(strategy, cut))
        for strategy in ("offload", "split", "experts-on-cpu")
        for cut in (1, 2)
    },
    "offload of a dense model": ("mistral", _named("offload", 2)),
    **{
        f"{runs} experts, {count} resident": ("qwen3-moe", _mix(runs=runs, num_resident=count))
        for runs in ("cpu", "stream", "split")
        for count in (0, 2)
    },
    **{
        f"{slots} slots{' and copies ahead' if prefetch else ''}": (
            "qwen3-moe",
            _slotted(slots, prefetch=prefetch),
        )
        for slots, prefetch in SLOTS
    },
    **{f"divided caches, {name}": ("olmoe", _caches(place)) for name, place in DIVIDED.items()},
    "cpu columns": ("qwen3", _columns("cpu", is_streaming=False)),
    "stream columns": ("qwen3", _columns("stream", is_streaming=True)),
    **{f"attention on both, {name}": ("olmoe", place) for name, place in BOTH.items()},
    **{f"sub-batches, {name}": ("olmoe", _in_two(tier)) for name, tier in SUB_BATCHES.items()},
    **{f"tiers, {name}": ("olmoe", _tiers(tiers)) for name, tiers in TIERS.items()},
    "caches that go to the cpu": ("llama", _moving("gpu", "cpu")),
    "caches that go to the gpu": ("llama", _moving("cpu", "gpu")),
    "a cache that goes to the gpu": ("llama", _moving("split", "gpu")),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {
        name: tmp_path_factory.mktemp(name) for name in {name for name, _ in GRAPHS.values()}
    }
    for name, folder in folders.items():
        save_tiny_model(name, folder, seed=3)
    return folders


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A graph that was run."""

    graph: StepGraph
    shape: BatchShape
    measured: Timeline
    predicted: Timeline


def runs_of(llm: LLM) -> list[Ran]:
    """Every graph of a job, moves of caches included."""
    found: list[Ran] = []

    def add(graph: StepGraph, shape: BatchShape, measured: Timeline) -> None:
        predicted = predict(graph, llm.spec, llm._costs, shape, llm._backends)
        found.append(Ran(graph=graph, shape=shape, measured=measured, predicted=predicted))

    def watch(step: Any) -> None:
        result = step.result
        add(result.graph, result.batch.shape, result.timeline)
        for move in result.moved:
            if move.graph.ops:
                add(move.graph, move.shape, move.timeline)

    llm.generate(PROMPTS, PARAMS, observe=watch)
    return found


def assert_alike(ran: Ran) -> None:
    """Predicted and measured have the ops of the graph, in the same order on each lane."""
    assert tuple(span.op for span in ran.predicted.spans) == ran.graph.ops
    assert tuple(span.op for span in ran.measured.spans) == ran.graph.ops
    assert lane_orders(ran.measured) == lane_orders(ran.predicted)
    assert lane_orders(ran.measured) == {
        lane: [op.name for op in ran.graph.lane(lane)] for lane in LANES
    }


def assert_possible(timeline: Timeline) -> None:
    """Every op begins after what it needs, and no lane does two things at once."""
    spans = timeline.spans
    for span in spans:
        assert 0.0 <= span.start_s <= span.end_s
        for dep in span.op.deps:
            assert spans[dep].end_s <= span.start_s + CLOCK_S, (spans[dep].op.name, span.op.name)
    for lane in LANES:
        for one, other in pairwise(timeline.lane(lane)):
            assert one.end_s <= other.start_s + CLOCK_S, (one.op.name, other.op.name)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", GRAPHS)
def test_predicted_and_measured_agree_for_every_graph(
    kind: str, overlap: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    """In ops and in the order of each lane; the trace file has all of them, of both."""
    name, place = GRAPHS[kind]
    split = (0, 1, 1, 0) if kind.startswith("sub-batches") else ()
    file = tmp_path / "trace.json"
    with (
        placed(models[name], place, overlap=overlap) as llm,
        sub_batches_by_hand(split),
        llm.trace(file),
    ):
        found = runs_of(llm)

    assert {ran.graph.phase for ran in found} == {"prefill", "decode"}
    in_use = (0, 1) if any(split) else (0,)
    moved = [moved_kv_layers(*llm.plan.placement.tiers[:2], sub_batch=each) for each in in_use]
    moves = [ran for ran in found if ran.graph.ops[0].payload == "kv"]
    assert {len(ran.graph.ops) for ran in moves} == {len(layers) for layers in moved if layers}
    for ran in found:
        assert_alike(ran)
        assert_possible(ran.measured)
        assert_possible(ran.predicted)
        if not overlap:
            in_turn = sorted(ran.measured.spans, key=lambda span: span.start_s)
            for one, other in pairwise(in_turn):
                assert one.end_s <= other.start_s + CLOCK_S
    _check_trace(file, found, is_emulated=kind != "cpu")


def _check_trace(file: Path, found: list[Ran], *, is_emulated: bool) -> None:
    note = " (emulated)" if is_emulated else ""
    drawn = rows(read_trace(file.read_bytes()))
    for lane in LANES:
        ops = [op.name for ran in found for op in ran.graph.lane(lane)]
        measured = drawn.get((f"measured{note}", lane), [])
        assert [event["name"] for event in measured] == ops
        predicted = [
            event
            for (process, row), events in drawn.items()
            if process == f"predicted{note}" and row.split()[0] == lane
            for event in events
        ]
        assert sorted(event["name"] for event in predicted) == sorted(ops)
        # told beside the measured op, and as long as it is drawn
        told = sorted(event["args"]["predicted_us"] for event in measured)
        assert told == pytest.approx(sorted(event["dur"] for event in predicted), abs=2e-3)
    assert len(drawn[f"measured{note}", "step"]) == len(found)


def test_the_kinds_have_whatever_a_graph_can_have() -> None:
    """Every kind of op, every part and every payload: one that is added needs a kind above."""
    ops: set[Op] = set()
    for name, place in GRAPHS.values():
        spec = tiny_spec(tiny_model(name))
        placement = place(spec)
        ops |= {op for tier in placement.tiers for op in build(spec, tier).ops}
        ops |= set(build_kv_move(placement.prefill, placement.decode).ops)

    assert {op.kind for op in ops} == set(get_args(OpKind))
    assert {op.part for op in ops} == set(get_args(Part))
    assert {op.payload for op in ops} - {None} == set(get_args(Payload))
    assert {op.lane for op in ops if op.payload == "kv"} == {"h2d", "d2h"}
    assert {op.sub_batch for op in ops} == {None, 0, 1}

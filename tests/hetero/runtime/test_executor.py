"""The executor: order of issue, dependencies over lanes, errors, the measured Timeline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from hetero.runtime.executor import Executor
from hetero.runtime.issue_order import issue_order, lane_runs, runs_by_itself
from hetero.runtime.lanes import LaneRunner, ThreadLane
from hetero.runtime.step_run import Performer
from planner.step_graph import LANES, Lane, Op, OpKind, StepGraph
from planner.timeline import lane_orders

# cpu waits for gpu's first op and gpu's last op waits for cpu, while a copy goes on beside both.
CROSSING = StepGraph(
    phase="decode",
    ops=(
        Op(index=0, kind="embed", lane="gpu"),
        Op(index=1, kind="copy", lane="d2h", deps=(0,), payload="hidden", layer=0),
        Op(index=2, kind="dense", lane="cpu", deps=(1,), layer=0),
        Op(index=3, kind="copy", lane="h2d", deps=(2,), payload="hidden", layer=1),
        Op(index=4, kind="dense", lane="gpu", deps=(3,), layer=1),
        Op(index=5, kind="copy", lane="h2d", payload="weights", layer=2, module="dense"),
        Op(index=6, kind="sample", lane="cpu", deps=(4,)),
    ),
)


@pytest.fixture
def lanes() -> Iterator[dict[Lane, LaneRunner]]:
    found: dict[Lane, LaneRunner] = {lane: ThreadLane(lane) for lane in LANES if lane != "cpu"}
    yield found
    for lane in found.values():
        lane.close()


def test_what_other_lanes_can_have_is_issued_before_work_that_blocks_the_issuing_thread() -> None:
    """A copy that depends on nothing is not held up by a CPU op before it in the graph."""
    graph = StepGraph(
        phase="decode",
        ops=(
            Op(index=0, kind="embed", lane="cpu"),
            Op(index=1, kind="copy", lane="h2d", payload="weights", layer=0, module="dense"),
        ),
    )

    assert [op.index for op in issue_order(graph)] == [1, 0]


def test_issue_order_keeps_the_order_of_every_lane_and_all_dependencies() -> None:
    order = [op.index for op in issue_order(CROSSING)]

    assert sorted(order) == list(range(7))
    for lane in CROSSING.lanes:
        mine = [op.index for op in CROSSING.lane(lane)]
        assert [index for index in order if index in mine] == mine
    for op in CROSSING.ops:
        assert all(order.index(dep) < order.index(op.index) for dep in op.deps)


@pytest.mark.parametrize("overlap", [True, False])
def test_an_op_begins_after_its_dependencies_have_ended(
    lanes: dict[Lane, LaneRunner], overlap: bool
) -> None:
    ended: set[int] = set()
    broken: list[int] = []

    def perform(op: Op) -> None:
        if not ended.issuperset(op.deps):
            broken.append(op.index)
        ended.add(op.index)

    timeline = Executor(lanes, overlap=overlap).run(CROSSING, perform)

    assert broken == []
    assert ended == set(range(7))
    for span in timeline.spans:
        assert all(timeline.spans[dep].end_s <= span.start_s for dep in span.op.deps)


def test_lanes_really_run_at_the_same_time(lanes: dict[Lane, LaneRunner]) -> None:
    """Two ops that meet at a barrier end only if both run at once."""
    graph = StepGraph(
        phase="decode",
        ops=(Op(index=0, kind="dense", lane="gpu"), Op(index=1, kind="dense", lane="cpu")),
    )
    meeting = threading.Barrier(2, timeout=20)

    def perform(op: Op) -> None:
        meeting.wait()

    Executor(lanes).run(graph, perform)  # or the barrier breaks


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("failing", range(7))
def test_an_error_reaches_the_caller_and_later_ops_do_not_run(
    lanes: dict[Lane, LaneRunner], overlap: bool, failing: int
) -> None:
    performed: set[int] = set()

    def perform(op: Op) -> None:
        if op.index == failing:
            raise ZeroDivisionError(op.name)
        performed.add(op.index)

    executor = Executor(lanes, overlap=overlap)
    with pytest.raises(ZeroDivisionError):
        executor.run(CROSSING, perform)

    depends = {failing}
    for op in CROSSING.ops:
        if depends & set(op.deps):
            depends.add(op.index)
    assert not performed & depends
    executor.run(CROSSING, lambda op: None)  # the lanes are as good as new


def test_the_measured_timeline_has_the_ops_of_the_graph_in_lane_order(
    lanes: dict[Lane, LaneRunner],
) -> None:
    timeline = Executor(lanes).run(CROSSING, lambda op: None)

    assert tuple(span.op for span in timeline.spans) == CROSSING.ops
    assert lane_orders(timeline) == {
        lane: [op.name for op in CROSSING.lane(lane)] for lane in LANES
    }


def test_neighbours_on_the_cpu_lane_are_handed_over_together() -> None:
    """Up to the next op that another lane does, or that waits for one."""
    assert [[op.index for op in run] for run in lane_runs(CROSSING.ops)] == [
        [0],
        [1],
        [2],
        [3],
        [4],
        [5],
        [6],
    ]
    kinds: tuple[OpKind, ...] = ("embed", "attention", "dense", "attention", "dense", "sample")
    chain = tuple(
        Op(index=index, kind=kind, lane="cpu", deps=(index - 1,) if index else ())
        for index, kind in enumerate(kinds)
    )
    assert lane_runs(chain) == (chain,)
    copy = Op(index=6, kind="copy", lane="h2d", payload="weights", layer=1, module="dense")
    waiting = Op(index=7, kind="dense", lane="cpu", deps=(2, 6), layer=1)
    after = Op(index=8, kind="sample", lane="cpu", deps=(7,))
    runs = lane_runs((copy, *chain[:3], waiting, after))
    assert runs == ((copy,), chain[:3], (waiting, after))


def test_a_run_is_of_one_sub_batch() -> None:
    """Each has values of its own, of which another thing performs the ops."""
    ops = tuple(
        Op(index=index, kind="dense", lane="cpu", layer=0, sub_batch=sub_batch)
        for index, sub_batch in enumerate((1, 1, 0, 0, 1))
    )
    assert lane_runs(ops) == (ops[:2], ops[2:4], ops[4:])


def test_a_run_has_the_times_that_it_tells(lanes: dict[Lane, LaneRunner]) -> None:
    """Each op begins where the one before it ended; its dependencies on other lanes are done."""
    graph = StepGraph(
        phase="decode",
        ops=(
            Op(index=0, kind="embed", lane="gpu"),
            Op(index=1, kind="attention", lane="cpu", deps=(0,), layer=0),
            Op(index=2, kind="dense", lane="cpu", deps=(1,), layer=0),
            Op(index=3, kind="sample", lane="cpu", deps=(2,)),
        ),
    )
    single: list[int] = []
    given: list[tuple[Op, ...]] = []

    def perform_run(ops: tuple[Op, ...]) -> list[float]:
        assert single == [0]
        given.append(ops)
        now = time.perf_counter()
        return [now + 1.0, now + 3.0, now + 3.5]

    executor = Executor(lanes)
    spans = executor.run(graph, lambda op: single.append(op.index), perform_run).spans
    single.clear()
    executor.run(graph, lambda op: single.append(op.index), perform_run)

    assert given[0] == graph.ops[1:] and given[1] is given[0]
    assert spans[2].start_s == spans[1].end_s and spans[3].start_s == spans[2].end_s
    assert spans[2].seconds == pytest.approx(2.0) and spans[3].seconds == pytest.approx(0.5)


def test_an_interrupt_in_the_calling_thread_frees_the_lanes_that_wait_for_it(
    lanes: dict[Lane, LaneRunner],
) -> None:
    """The gpu lane waits for a cpu op that is never done."""
    graph = StepGraph(
        phase="decode",
        ops=(
            Op(index=0, kind="dense", lane="cpu", layer=0),
            Op(index=1, kind="dense", lane="gpu", deps=(0,), layer=1),
            Op(index=2, kind="copy", lane="d2h", deps=(1,), payload="logits"),
        ),
    )
    performed: list[str] = []

    def perform(op: Op) -> None:
        performed.append(op.lane)
        if op.lane == "cpu":
            raise KeyboardInterrupt

    executor = Executor(lanes)
    with pytest.raises(KeyboardInterrupt):
        executor.run(graph, perform)
    assert performed == ["cpu"]
    executor.run(graph, lambda op: performed.append(op.lane))
    assert performed == ["cpu", "cpu", "gpu", "d2h"]


def test_a_lane_stops_at_its_first_error(lanes: dict[Lane, LaneRunner]) -> None:
    """What comes after it on the lane may need what it was to give."""
    graph = StepGraph(
        phase="decode",
        ops=tuple(Op(index=at, kind="dense", lane="gpu", layer=at) for at in range(3)),
    )
    performed: list[int] = []

    def perform(op: Op) -> None:
        performed.append(op.index)
        if op.index == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Executor(lanes).run(graph, perform)
    assert performed == [0, 1]


# The cpu lane looks up, the gpu lane works, and the cpu lane samples.
ALONE = StepGraph(
    phase="prefill",
    ops=(
        Op(index=0, kind="embed", lane="cpu"),
        Op(index=1, kind="copy", lane="h2d", deps=(0,), payload="hidden", layer=0),
        Op(index=2, kind="dense", lane="gpu", deps=(1,), layer=0),
        Op(index=3, kind="copy", lane="d2h", deps=(2,), payload="logits"),
        Op(index=4, kind="sample", lane="cpu", deps=(3,)),
    ),
)
ON_CPU = StepGraph(
    phase="decode", ops=tuple(Op(index=at, kind="dense", lane="cpu", layer=at) for at in range(3))
)


def test_a_step_that_needs_the_calling_thread_at_its_ends_only_runs_by_itself() -> None:
    assert runs_by_itself(ALONE) and runs_by_itself(ON_CPU)
    assert not runs_by_itself(CROSSING)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_calling_thread_does_another_step_while_one_is_on_its_way(
    lanes: dict[Lane, LaneRunner], overlap: bool
) -> None:
    """The gpu lane goes on once the other step has been done: each waits for the other."""
    other_is_done = threading.Event()
    performed: list[str] = []

    def perform(op: Op) -> None:
        if op.lane == "gpu":
            assert other_is_done.wait(timeout=20)
        performed.append(op.kind)

    executor = Executor(lanes, overlap=overlap)
    on_its_way = executor.start(ALONE, Performer(perform))
    executor.run(ON_CPU, lambda op: None)
    assert not on_its_way.is_ready
    other_is_done.set()
    timeline = on_its_way.finish()
    assert on_its_way.is_ready
    assert performed == ["embed", "copy", "dense", "copy", "sample"]
    assert tuple(span.op for span in timeline.spans) == ALONE.ops


def test_what_fails_on_its_way_is_raised_at_the_end(lanes: dict[Lane, LaneRunner]) -> None:
    def perform(op: Op) -> None:
        if op.lane == "gpu":
            raise ZeroDivisionError

    run = Executor(lanes).start(ALONE, Performer(perform))
    with pytest.raises(ZeroDivisionError):
        run.finish()
    Executor(lanes).run(ALONE, lambda op: None)

"""Copies that give way: chunk by chunk, and called by the next op of their lane."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from hetero.runtime.executor import Executor
from hetero.runtime.lanes import LaneRunner, ThreadLane
from hetero.runtime.prefetch import Prefetch, chunk_begin
from hetero.runtime.step_run import Performer
from planner.placement import NUM_EXPERT_CHUNKS
from planner.step_graph import LANES, Lane, Op, StepGraph


@pytest.mark.parametrize("num_bytes", [1, 63, 64, 200, 1000, 3 * 4096 + 8])
def test_chunks_of_an_expert_are_all_of_it_in_whole_lines(num_bytes: int) -> None:
    begins = [chunk_begin(num_bytes, chunk) for chunk in range(NUM_EXPERT_CHUNKS + 1)]

    assert begins == sorted(begins) and begins[0] == 0 and begins[-1] == num_bytes
    assert all(begin % 64 == 0 for begin in begins[:-1])
    # none is longer than a third, but for a line at either end
    assert max(b - a for a, b in pairwise(begins)) <= num_bytes / NUM_EXPERT_CHUNKS + 64


@pytest.mark.parametrize("num_looks", range(10))
def test_what_is_urgent_waits_for_one_chunk_at_most(num_looks: int) -> None:
    """Three experts; something is called for while the last chunk before it is copied."""
    prefetch, copied, after = Prefetch((7, 2, 5)), list[tuple[int, int, int]](), list[int]()

    def copy_chunk(expert: int, slot: int, chunk: int) -> None:
        copied.append((expert, slot, chunk))
        if len(copied) > num_looks:
            after.append(expert)

    prefetch.copy(copy_chunk, lambda: len(copied) >= num_looks)

    all_of_them = [(each, slot, chunk) for slot, each in enumerate((7, 2, 5)) for chunk in range(3)]
    assert copied == all_of_them[:num_looks] and not after
    assert prefetch.arrived() == frozenset((7, 2, 5)[: num_looks // 3])
    for at, expert in enumerate((7, 2, 5)):
        assert prefetch.num_chunks(expert) == min(3, max(0, num_looks - 3 * at))
    assert prefetch.num_chunks(4) == 0


@pytest.fixture
def lanes() -> Iterator[dict[Lane, LaneRunner]]:
    found: dict[Lane, LaneRunner] = {lane: ThreadLane(lane) for lane in LANES if lane != "cpu"}
    yield found
    for lane in found.values():
        lane.close()


def graph_of(*, is_followed: bool = True) -> StepGraph:
    """Experts are copied ahead while the GPU works; then what it has found urgent is."""
    ahead = Op(
        index=0, kind="copy", lane="h2d", layer=1, payload="weights", part="prefetched", buffer=0
    )
    router = Op(index=1, kind="router", lane="gpu", layer=1)
    urgent = Op(index=2, kind="copy", lane="h2d", deps=(1,), layer=1, payload="weights")
    sample = Op(index=3, kind="sample", lane="cpu", deps=(2 if is_followed else 1,))
    if is_followed:
        return StepGraph(phase="decode", ops=(ahead, router, urgent, sample))
    return StepGraph(
        phase="decode", ops=(ahead, router, Op(index=2, kind="sample", lane="cpu", deps=(1,)))
    )


def test_an_op_that_gives_way_is_called_when_the_next_of_its_lane_is_ready(
    lanes: dict[Lane, LaneRunner],
) -> None:
    """The GPU ends in the middle of the copy, and not before the copy has looked once."""
    looked, done = threading.Event(), list[int]()

    def perform(op: Op) -> None:
        if op.kind == "router":
            assert looked.wait(timeout=20)
        done.append(op.index)

    def perform_until(op: Op, is_called: Callable[[], bool]) -> None:
        assert not is_called()
        looked.set()
        while not is_called():
            pass  # or the test never ends
        done.append(op.index)

    executor, graph = Executor(lanes), graph_of()
    for _ in range(3):  # the same events again
        looked.clear()
        done.clear()
        timeline = executor.start(graph, Performer(perform, None, perform_until)).finish()
        assert done == [1, 0, 2, 3]
        assert timeline.spans[2].start_s >= timeline.spans[0].end_s


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("is_followed", [True, False])
def test_an_op_that_nothing_urgent_follows_is_not_called(
    lanes: dict[Lane, LaneRunner], overlap: bool, is_followed: bool
) -> None:
    """As the last of its lane; and one op at a time, where the next is not ready before its end."""
    asked, released = list[bool](), threading.Event()

    def perform(op: Op) -> None:
        if op.kind == "router" and overlap:
            assert released.wait(timeout=20)

    def perform_until(op: Op, is_called: Callable[[], bool]) -> None:
        asked.extend(is_called() for _ in range(100))
        released.set()

    Executor(lanes, overlap=overlap).start(
        graph_of(is_followed=is_followed), Performer(perform, None, perform_until)
    ).finish()
    assert asked == [False] * 100


def test_an_error_of_what_calls_ends_the_op_that_gives_way(lanes: dict[Lane, LaneRunner]) -> None:
    """An op whose dependency failed is ready to fail."""
    performed = list[int]()

    def perform(op: Op) -> None:
        performed.append(op.index)
        if op.kind == "router":
            raise ZeroDivisionError

    def perform_until(op: Op, is_called: Callable[[], bool]) -> None:
        while not is_called():
            pass

    with pytest.raises(ZeroDivisionError):
        Executor(lanes).start(graph_of(), Performer(perform, None, perform_until)).finish()
    assert performed == [1]

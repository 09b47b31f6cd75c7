"""What lanes cost each other: the neighbour works while the block does, and ends with it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from hetero.measure.attention import AttentionCase
from hetero.measure.cold_memory import cold_cpu_memory
from hetero.measure.contention import beside_attention, beside_copies, copying, kept_busy
from hetero.measure.experts import experts_sample
from planner.device import Sample
from tests.hetero.measure.tiny_effort import MEMORY_BYTES

CPU = torch.device("cpu")
SHAPE = (128, 128)


def busy_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hetero-busy"]


def nap() -> None:
    time.sleep(1e-3)


def test_work_goes_on_for_the_length_of_a_block() -> None:
    """It has begun when the block does; every repetition in the block is timed."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        nap()

    with kept_busy(work) as seconds:
        at_entry = len(calls)
        while len(calls) < at_entry + 5:
            nap()
        assert len(busy_threads()) == 1
    assert at_entry >= 1
    assert len(seconds) >= 5
    assert all(each > 0 for each in seconds)


def test_the_thread_ends_when_the_block_raises() -> None:
    with pytest.raises(KeyError), kept_busy(nap):
        raise KeyError
    assert busy_threads() == []


@pytest.mark.parametrize("num_good", [0, 2])
def test_what_the_work_raises_reaches_the_block(num_good: int) -> None:
    """At once or later, and nobody waits for ever."""
    calls: list[int] = []

    def work() -> None:
        nap()
        calls.append(1)
        if len(calls) > num_good:
            raise ZeroDivisionError("the work failed")

    with pytest.raises(ZeroDivisionError, match="the work failed"), kept_busy(work):
        while len(calls) <= num_good:
            nap()
    assert busy_threads() == []


def test_a_copy_without_a_gpu_reads_memory_that_was_not_read_for_a_lap() -> None:
    """As the emulated accelerator's link does: from pageable memory."""
    memory = cold_cpu_memory(96 << 20)
    copy, kind = copying(memory, CPU)
    starts = []
    for _ in range(4):
        starts.append(memory._next)
        copy()
    # 32 MiB each, three times in 96
    assert starts == [0, 32 << 20, 64 << 20, 96 << 20]
    assert memory._next == 32 << 20
    assert kind == "pageable"


def experts_alone(num_threads: int) -> Sample:
    return experts_sample(
        cold_cpu_memory(MEMORY_BYTES),
        kind="bfloat16",
        shape=SHAPE,
        num_experts=4,
        tokens_each=1,
        num_threads=num_threads,
        budget_s=0.0,
    )


def test_copies_and_experts_name_each_other() -> None:
    """The same call as alone, with the lane that was busy; and the copies that kept it so."""
    alone = experts_alone(num_threads=2)
    computed, copied = beside_copies(
        cold_cpu_memory(MEMORY_BYTES),
        cold_cpu_memory(64 << 20),
        alone,
        CPU,
        budget_s=0.0,
    )
    assert (computed.call, computed.num_threads) == (alone.call, 2)
    assert (computed.lane, computed.busy) == ("cpu", ("h2d",))
    assert (copied.lane, copied.kernel, copied.busy) == ("h2d", "copy", ("cpu",))
    assert (copied.shape, copied.memory) == ((32 << 20,), "pageable")
    assert computed.seconds > 0 and copied.seconds > 0
    assert busy_threads() == []


@pytest.mark.parametrize(("num_threads", "num_left"), [(1, 1), (3, 2)])
def test_attention_takes_a_thread_of_the_experts(num_threads: int, num_left: int) -> None:
    """One where there are several."""
    alone = experts_alone(num_threads)
    beside = beside_attention(
        cold_cpu_memory(MEMORY_BYTES),
        cold_cpu_memory(MEMORY_BYTES),
        alone,
        case=AttentionCase(heads=(4, 2, 32), context=31),
        budget_s=0.0,
    )
    assert (beside.call, beside.lane, beside.busy) == (alone.call, "cpu", ("cpu",))
    assert beside.num_threads == num_left
    assert beside.seconds > 0
    assert busy_threads() == []

"""Memory over several NUMA nodes: which are in use, what the system is asked, and what is left."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cpu_kernels import numa
from cpu_kernels.numa import interleaved_memory, nodes_in_use, numa_note

linux = pytest.mark.skipif(sys.platform != "linux", reason="nodes are read from Linux's sysfs")
GET, SET = 239, 238  # on x86-64
INTERLEAVE = 3


class System:
    """Answers system calls and remembers them; `policy` is what the thread has."""

    def __init__(self, policy: int = 0, *, refuses: Sequence[int] = ()) -> None:
        self.policy = policy
        self.refuses = refuses
        self.asked: list[tuple[int, list[int], int]] = []

    def __call__(self, number: int, *arguments: Any) -> int:
        if number in self.refuses:
            return -1
        if number == GET:
            arguments[0]._obj.value = self.policy
            return 0
        policy, mask, max_node = arguments
        self.policy = policy
        self.asked.append((policy, list(mask or ()), max_node))
        return 0


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores on two nodes, and a third node of memory alone."""
    for number, cores in enumerate(("0-2,6\n", "3-5,7\n", "\n")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(cores)
    (tmp_path / "online").write_text("0-2\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return tmp_path


@linux
@pytest.mark.parametrize(
    ("cores", "nodes"), [({0, 1}, (0,)), ({7}, (1,)), ({6, 3}, (0, 1)), ({99}, ())]
)
def test_nodes_in_use_are_those_of_the_process_cores(
    two_nodes: Path, monkeypatch: pytest.MonkeyPatch, cores: set[int], nodes: tuple[int, ...]
) -> None:
    """A process bound to one node (numactl) reads that one's memory only."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
    assert nodes_in_use(two_nodes) == nodes


@linux
def test_memory_is_interleaved_inside_and_as_before_after(two_nodes: Path) -> None:
    system = System()
    with interleaved_memory(two_nodes, system) as is_interleaved:
        assert is_interleaved
        assert system.policy == INTERLEAVE
    # bits 0 and 1 of one word; the system reads a bit less than it is told of
    bits = 8 * ctypes.sizeof(ctypes.c_ulong) + 1
    assert system.asked == [(INTERLEAVE, [0b11], bits), (0, [], 0)]


@linux
def test_an_error_inside_leaves_no_policy_behind(two_nodes: Path) -> None:
    system = System()
    with pytest.raises(KeyError), interleaved_memory(two_nodes, system):
        raise KeyError
    assert system.policy == 0


@linux
def test_a_node_of_a_high_number_has_its_bit(two_nodes: Path) -> None:
    (two_nodes / "node1").rename(two_nodes / "node65")
    system = System()
    with interleaved_memory(two_nodes, system):
        pass
    assert system.asked[0][1:] == ([1, 2], 129)


@linux
@pytest.mark.parametrize(
    "system",
    [System(refuses=(GET,)), System(refuses=(SET,)), System(policy=2)],
    ids=["no NUMA in the kernel", "a container", "numactl --membind"],
)
def test_where_memory_is_not_interleaved_it_says_so(two_nodes: Path, system: System) -> None:
    """The policy that was there stays."""
    before = system.policy
    with interleaved_memory(two_nodes, system) as is_interleaved:
        assert not is_interleaved
        assert system.policy == before
    assert system.policy == before
    assert system.asked == []


@linux
def test_one_node_and_other_processors_are_left_alone(
    two_nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with interleaved_memory(two_nodes, system) as is_interleaved:
        assert not is_interleaved
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with interleaved_memory(two_nodes, system) as is_interleaved:
        assert not is_interleaved
    assert system.asked == []


def test_outside_linux_there_are_no_nodes(two_nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert nodes_in_use(two_nodes) == ()
    assert numa_note(two_nodes) is None


@linux
def test_the_note_says_how_many_nodes_and_the_rule(two_nodes: Path) -> None:
    spread = numa_note(two_nodes, System())
    refused = numa_note(two_nodes, System(refuses=(SET,)))
    assert spread == "memory on 2 nodes: packed weights are spread over all of them"
    assert refused is not None and "on 2 nodes: this process may not spread weights" in refused


@linux
@pytest.mark.skipif(platform.machine() not in numa._CALLS, reason="other system calls")
def test_this_system_is_asked_rightly(two_nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real calls: either refused, or the policy is set and taken back."""
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    get_policy = numa._CALLS[platform.machine()][0]

    def policy() -> int:
        found = ctypes.c_int(0)
        numa._system_call(get_policy, ctypes.byref(found), None, 0, None, 0)
        return found.value

    before = policy()
    with interleaved_memory(two_nodes) as is_interleaved:
        assert policy() == (INTERLEAVE if is_interleaved else before)
    assert policy() == before

"""Threads: core counts are those the process may use, and each has its place."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from cpu_kernels import threads
from cpu_kernels.threads import (
    available_cores,
    cgroup_quota_cores,
    physical_cores,
    pin_current_thread,
    placement,
)

_on_linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity and cgroups are Linux's")


def test_cores_are_ordered() -> None:
    """Physical cores do not exceed available ones, which do not exceed the machine's."""
    assert 1 <= physical_cores() <= available_cores() <= (os.cpu_count() or 1)


def test_cgroup_v2_quota_of_a_parent_binds(tmp_path: Path) -> None:
    """150 ms in 100 ms are 1.5 cores, found above the process's own unlimited group."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    of_process = tmp_path / "cgroup"
    of_process.write_text("0::/a/b\n")

    assert cgroup_quota_cores(tmp_path, of_process) == 1.5


def test_cgroup_v1_quota_is_read(tmp_path: Path) -> None:
    """400 ms in 100 ms are 4 cores; a quota of -1 above it is no limit."""
    folder = tmp_path / "cpu" / "job"
    folder.mkdir(parents=True)
    for where, quota in ((tmp_path / "cpu", "-1"), (folder, "400000")):
        (where / "cpu.cfs_quota_us").write_text(quota)
        (where / "cpu.cfs_period_us").write_text("100000")
    of_process = tmp_path / "cgroup"
    of_process.write_text("5:memory:/other\n4:cpu,cpuacct:/job\n")

    assert cgroup_quota_cores(tmp_path, of_process) == 4.0


def test_no_cgroup_is_no_limit(tmp_path: Path) -> None:
    """Without cgroup files the quota is unknown, not zero."""
    assert cgroup_quota_cores(tmp_path, tmp_path / "missing") is None


@_on_linux
def test_a_quota_lowers_available_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota of half a core still leaves one."""
    monkeypatch.setattr(threads, "cgroup_quota_cores", lambda root, of_process: 0.5)

    assert available_cores() == 1


@_on_linux
def test_pinning_binds_only_the_calling_thread() -> None:
    """A pinned thread runs on its core, the thread that started it where it did before."""
    before = os.sched_getaffinity(0)
    core = min(before)
    seen: list[object] = []

    def pinned() -> None:
        seen.append(pin_current_thread([core]))
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()

    assert seen == [True, {core}]
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("siblings", "num_threads", "expected"),
    [
        (["0-1", "0-1", "2-3", "2-3"], 2, [{0, 1}, {2, 3}]),
        (["0,2", "1,3", "0,2", "1,3"], 1, [{0, 2}]),
        (["0-1", "0-1", "2-3", "2-3"], 3, [{0}, {1}, {2}]),
        (["0-1", "0-1", "2-3", "2-3"], 5, [{0, 1, 2, 3}] * 5),
        ([], 2, [{0}, {1}]),  # a machine that does not tell which are siblings
    ],
)
def test_threads_get_a_physical_core_each_while_there_are_enough(
    siblings: list[str],
    num_threads: int,
    expected: list[set[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for core, text in enumerate(siblings):
        (tmp_path / str(core)).write_text(f"{text}\n")
    monkeypatch.setattr(threads, "_TOPOLOGY", str(tmp_path / "{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert placement(num_threads) == expected

"""Threads: core counts are those the process may use, and every parallel call runs to its end."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

import pytest

from cpu_kernels import threads
from cpu_kernels.threads import (
    available_cores,
    cgroup_quota_cores,
    fork_join,
    physical_cores,
    pin_current_thread,
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


_lock = threading.Lock()


def _count_call(argument: int) -> None:
    with _lock:
        ctypes.c_int64.from_address(argument).value += 1


def _calls(num_threads: int) -> int:
    counter = ctypes.c_int64(0)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_count_call)
    body = ctypes.cast(function, ctypes.c_void_p).value
    assert body is not None
    fork_join(body, ctypes.addressof(counter), num_threads)
    return counter.value


def test_one_thread_is_one_call() -> None:
    """With one thread the body runs once, on the caller."""
    assert _calls(1) == 1


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_all_return_before_the_join(num_threads: int) -> None:
    """At least one and at most the asked number of calls have ended when fork_join returns."""
    assert 1 <= _calls(num_threads) <= num_threads


def test_without_openmp_python_threads_run_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback makes every call."""
    monkeypatch.setattr(threads, "openmp_parallel", lambda: None)

    assert _calls(3) == 3

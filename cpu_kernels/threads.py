"""How many cores a process may use, which threads go where, and pinning."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_PR_SET_TIMERSLACK = 29
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_OF_PROCESS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Return how many logical cores this process may keep busy: affinity and cgroup quota, >= 1.

    Returns
    -------
    int
        The smaller of the cores in the affinity mask and the cgroup's CPU quota, rounded down.

    Examples
    --------
    >>> available_cores() >= 1
    True
    """
    if sys.platform == "linux":
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    quota = cgroup_quota_cores(_CGROUP_ROOT, _CGROUP_OF_PROCESS)
    return num_cores if quota is None else max(1, min(num_cores, math.floor(quota)))


def physical_cores() -> int:
    """Return the number of physical cores among those available, >= 1.

    Two logical cores of one physical core share its load ports and caches, so a kernel that reads
    memory gains nothing from the second.

    Returns
    -------
    int
        Never more than `available_cores()`.

    Examples
    --------
    >>> 1 <= physical_cores() <= available_cores()
    True
    """
    machine_cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if sys.platform == "linux":
        machine_cores = len(_sibling_groups(os.sched_getaffinity(0))) or machine_cores
    return min(machine_cores, available_cores())


def pin_current_thread(cores: Iterable[int]) -> bool:
    """Let the calling thread run on these logical cores only.

    Threads inherit the mask of the thread that starts them: one that is to start threads for
    several cores must not be pinned to one before.

    Parameters
    ----------
    cores
        Logical core numbers, as in /proc/cpuinfo.

    Returns
    -------
    bool
        False where the system cannot pin (anything but Linux).

    Raises
    ------
    OSError
        If none of the cores exists or is allowed.

    Examples
    --------
    >>> pin_current_thread(os.sched_getaffinity(0))  # doctest: +SKIP
    True
    """
    if sys.platform != "linux":
        return False
    os.sched_setaffinity(0, cores)  # 0 is the calling thread, not the process
    return True


def sleep_precisely() -> bool:
    """Let sleeps of the calling thread end when they are due: by default up to 50 us later.

    Returns
    -------
    bool
        False where the system has no such setting (anything but Linux).

    Examples
    --------
    >>> sleep_precisely() == (sys.platform == "linux")
    True
    """
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0) == 0)  # 1 ns


def placement(num_threads: int) -> list[frozenset[int]]:
    """Return for each of so many threads the logical cores that it is to keep to.

    A physical core each, both its hyperthreads allowed, as long as there are enough; then a logical
    core each; with more threads than cores, or where the system cannot pin, anywhere.

    Examples
    --------
    >>> len(placement(3))
    3
    """
    if sys.platform != "linux":
        return [frozenset(range(os.cpu_count() or 1))] * num_threads
    cores = sorted(os.sched_getaffinity(os.getpid()))  # the process's: this thread may be pinned
    groups = [group & set(cores) for group in _sibling_groups(cores)]
    for sets in (groups, [{core} for core in cores]):
        if num_threads <= len(sets):
            return [frozenset(each) for each in sets[:num_threads]]
    return [frozenset(cores)] * num_threads


def cgroup_quota_cores(root: Path, of_process: Path) -> float | None:
    """Return the CPU quota in cores of a process's cgroup (v1 or v2), None where unlimited."""
    limits = []
    for folder in _cgroup_folders(root, of_process):
        limit = _quota_v2(folder / "cpu.max") or _quota_v1(folder)
        if limit is not None:
            limits.append(limit)
    return min(limits, default=None)


def _cgroup_folders(root: Path, of_process: Path) -> list[Path]:
    # lines are "0::/a/b" (v2) or "4:cpu,cpuacct:/a/b" (v1); a parent's limit binds its children
    folders = [root, root / "cpu"]
    for line in of_process.read_text().splitlines() if of_process.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        parts = Path(path.lstrip("/")).parts
        folders += [base.joinpath(*parts[: n + 1]) for n in range(len(parts))]
    return folders


def _quota_v2(file: Path) -> float | None:
    if not file.is_file():
        return None
    quota, period = file.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota_file, period_file = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    if not (quota_file.is_file() and period_file.is_file()):
        return None
    quota = int(quota_file.read_text())  # -1: the kernel's word for no limit
    return None if quota <= 0 else quota / int(period_file.read_text())


def _sibling_groups(cores: Iterable[int]) -> list[set[int]]:
    """The logical cores of each physical core, in the order of the first of each."""
    files = [Path(_TOPOLOGY.format(core)) for core in cores]
    texts = dict.fromkeys(file.read_text().strip() for file in files if file.is_file())
    return [core_list(text) for text in texts]


def core_list(text: str) -> set[int]:
    """Return the numbers of a list like "0-3,8", as sysfs writes them.

    Examples
    --------
    >>> sorted(core_list("0-3,8"))
    [0, 1, 2, 3, 8]
    """
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found

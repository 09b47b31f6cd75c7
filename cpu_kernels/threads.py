"""How many cores a process may use, pinning, and running one C function on several threads at once.

Kernels run on the OpenMP runtime that is already in the process: torch brings one and keeps its
threads spinning for a moment after each of its operations, so that ours start on threads that are
awake, and no second set of threads competes with them. `GOMP_parallel` is what a compiled `#pragma
omp parallel` calls, in libgomp and in LLVM's libomp; every calling thread has its own team, so it
may be called from several at once.

Microseconds alone, and added to a torch operation just before, on two busy cores: this 2.7 and 3;
numba's prange 2 and 2 on its OpenMP layer (a second libgomp beside torch's), 31 and 130 on its
default layer, which aborts when two threads use it; Python threads 16 and 23.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import psutil

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
        machine_cores = _num_sibling_groups(os.sched_getaffinity(0)) or machine_cores
    return min(machine_cores, available_cores())


def pin_current_thread(cores: Iterable[int]) -> bool:
    """Let the calling thread run on these logical cores only.

    OpenMP threads inherit the mask of the thread that starts them, so a thread that is to use
    several cores must not be pinned to one before its first parallel call.

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


def fork_join(body_address: int, argument_address: int, num_threads: int) -> None:
    """Call `body(argument)` on up to `num_threads` threads and return when all calls have.

    The body takes its share of the work from a shared counter, so that it is right for any number
    of calls: OpenMP may give fewer threads than asked. With one thread it is a plain call.

    Parameters
    ----------
    body_address
        Address of a C function `void body(void *)`, for instance `numba.cfunc(...).address`.
    argument_address
        What every call gets.
    num_threads
        At least 1.

    Examples
    --------
    >>> counter = (ctypes.c_int64 * 1)()
    >>> @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    ... def body(argument):
    ...     ctypes.c_int64.from_address(argument).value += 1
    >>> fork_join(ctypes.cast(body, ctypes.c_void_p).value, ctypes.addressof(counter), 1)
    >>> counter[0]
    1
    """
    if num_threads == 1:
        _call_body(body_address, argument_address)
        return
    openmp = openmp_parallel()
    if openmp is not None:
        openmp(body_address, argument_address, num_threads, 0)
        return
    others = [
        _python_threads().submit(_call_body, body_address, argument_address)
        for _ in range(num_threads - 1)
    ]
    _call_body(body_address, argument_address)
    for other in others:
        other.result()


@cache
def openmp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Return GOMP_parallel(body, argument, num_threads, flags), None where there is no OpenMP."""
    # None is the process itself: finds the runtime that torch has loaded for everyone
    for library in (None, "libgomp.so.1", "libomp.so.5", "libomp.so"):
        try:
            function = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError, TypeError):  # Windows says TypeError for the process
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


@cache
def openmp_address() -> int:
    """Return the address of GOMP_parallel for compiled code, 0 where there is no OpenMP."""
    function = openmp_parallel()
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


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


def _num_sibling_groups(cores: Iterable[int]) -> int:
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = [Path(topology.format(core)) for core in cores]
    return len({file.read_text() for file in files if file.is_file()})


def _call_body(body_address: int, argument_address: int) -> None:
    # ctypes lets go of the GIL during the call
    _BODY(body_address)(argument_address)


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _python_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="cpu_kernels")

"""What else the machine did while it was measured: cores, neighbours, processes on the GPU."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil
import pynvml

# Below this share of the cores they are the system's own background.
_BUSY_SHARE = 0.1
# A share of the machine's cores, one at least: what ended a minute ago still counts in it.
_LOAD_SHARE = 0.5
_MIN_LOAD = 1.0
# The load average forgets with this time constant.
_LOAD_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Seconds of this process's cores since the system started, and of this process on any."""

    busy_s: float
    stolen_s: float
    own_s: float
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BusyMachine:
    """What was found beside this process: numbers of cores, the load average, processes."""

    num_cores: int
    other_cores: float
    stolen_cores: float
    load_before: float
    num_machine_cores: int
    num_gpu_processes: int

    def notes(self) -> tuple[str, ...]:
        """A sentence for each thing that makes what was measured meanwhile doubtful."""
        found = []
        if self.other_cores >= _BUSY_SHARE * self.num_cores:
            found.append(
                f"measured while other processes kept {self.other_cores:.1f} of {self.num_cores} "
                "cores busy: rates are too low and vary"
            )
        elif self.load_before >= max(_MIN_LOAD, _LOAD_SHARE * self.num_machine_cores):
            found.append(
                f"measured after a minute with a load of {self.load_before:.1f} on "
                f"{self.num_machine_cores} cores: rates may be too low"
            )
        if self.stolen_cores >= _BUSY_SHARE * self.num_cores:
            found.append(
                f"measured while other virtual machines of this host took {self.stolen_cores:.1f} "
                f"of {self.num_cores} cores: rates are too low and vary"
            )
        if self.num_gpu_processes:
            found.append(
                f"measured while {self.num_gpu_processes} other "
                f"process{'es' if self.num_gpu_processes > 1 else ''} had work on the GPU: its "
                "rates may be too low"
            )
        return tuple(found)


class OtherProcesses:
    """What other processes do between its making and `notes`."""

    def __init__(self) -> None:
        self._load = _others_load()
        self._cores = sorted(psutil.Process().cpu_affinity() or range(os.cpu_count() or 1))
        self._gpu_processes = gpu_processes()
        self._before = core_seconds(self._cores)

    def found(self) -> BusyMachine:
        """What they did so far."""
        before, now = self._before, core_seconds(self._cores)
        wall_s = max(now.wall_s - before.wall_s, 1e-6)
        others_s = (now.busy_s - before.busy_s) - (now.own_s - before.own_s)
        return BusyMachine(
            num_cores=len(self._cores),
            other_cores=max(0.0, others_s) / wall_s,
            stolen_cores=max(0.0, now.stolen_s - before.stolen_s) / wall_s,
            load_before=self._load,
            num_machine_cores=os.cpu_count() or 1,
            num_gpu_processes=len(self._gpu_processes | gpu_processes()),
        )

    def notes(self) -> tuple[str, ...]:
        """A sentence for each thing that makes what was measured meanwhile doubtful."""
        return self.found().notes()


def core_seconds(cores: list[int]) -> Cores:
    """Read the counters of some cores.

    The system counts what it runs for a virtual machine of its own twice, as `user` and as `guest`.
    """
    times = psutil.cpu_times(percpu=True)
    busy_s = stolen_s = 0.0
    for core in cores:
        facts = times[core]
        idle_s = facts.idle + getattr(facts, "iowait", 0.0)
        twice_s = getattr(facts, "guest", 0.0) + getattr(facts, "guest_nice", 0.0)
        stolen = getattr(facts, "steal", 0.0)
        busy_s += sum(facts) - idle_s - twice_s - stolen
        stolen_s += stolen
    return Cores(
        busy_s=busy_s,
        stolen_s=stolen_s,
        own_s=time.process_time(),
        wall_s=time.perf_counter(),
    )


def gpu_processes() -> frozenset[int]:
    """Other processes that have a context on a GPU; none without a driver.

    A container sees the numbers that they have outside it, among which it cannot find its own:
    there a number that it does not know is left out.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return frozenset()
    found: set[int] = set()
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except pynvml.NVMLError:
                continue  # one that this process may not use, or that does not tell
            found |= {process.pid for process in processes}
    except pynvml.NVMLError:
        pass
    finally:
        pynvml.nvmlShutdown()
    return frozenset(pid for pid in found if pid != os.getpid() and psutil.pid_exists(pid))


def _others_load() -> float:
    """The load average of the last minute without this process's own share in it.

    It counts what waits for a disk too, which no core is busy with.
    """
    # What this process computed so far weighs in it at most as if it had been this moment.
    return max(0.0, os.getloadavg()[0] - time.process_time() / _LOAD_S)

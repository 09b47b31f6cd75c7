"""How busy other processes keep this process's cores while something is measured."""

from __future__ import annotations

import os
import time

import psutil

# Below this share of the cores they are the system's own background.
_BUSY_SHARE = 0.1


class OtherProcesses:
    """Cores that other processes keep busy between its making and `notes`."""

    def __init__(self) -> None:
        self._cores = sorted(psutil.Process().cpu_affinity() or range(os.cpu_count() or 1))
        self._start = time.perf_counter()
        self._busy_s = self._busy()
        self._own_s = time.process_time()

    def _busy(self) -> float:
        times = psutil.cpu_times(percpu=True)
        return float(
            sum(sum(times[core]) - times[core].idle - times[core].iowait for core in self._cores)
        )

    def notes(self) -> tuple[str, ...]:
        """A note where they took more than a tenth of the cores, empty otherwise."""
        wall_s = time.perf_counter() - self._start
        own_s = time.process_time() - self._own_s
        num_busy = max(0.0, self._busy() - self._busy_s - own_s) / wall_s
        if num_busy < _BUSY_SHARE * len(self._cores):
            return ()
        return (
            f"measured while other processes kept {num_busy:.1f} of {len(self._cores)} cores busy: "
            "rates are too low and vary",
        )

"""Other processes: each kind that spoils a measurement is a sentence."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from hetero.measure import busy
from hetero.measure.busy import (
    BusyMachine,
    Cores,
    OtherProcesses,
    core_seconds,
    gpu_processes,
)

IDLE = BusyMachine(
    num_cores=8,
    other_cores=0.2,
    stolen_cores=0.1,
    load_before=2.0,
    num_machine_cores=16,
    num_gpu_processes=0,
)


def found(**change: float) -> tuple[str, ...]:
    facts = {name: getattr(IDLE, name) for name in BusyMachine.__slots__}
    return BusyMachine(**{**facts, **change}).notes()


def test_an_idle_machine_needs_no_sentence() -> None:
    """The system's own background is below each limit."""
    assert found() == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"other_cores": 1.3}, "other processes kept 1.3 of 8 cores busy"),
        ({"stolen_cores": 0.9}, "other virtual machines of this host took 0.9 of 8 cores"),
        ({"load_before": 9.0}, "a load of 9.0 on 16 cores"),
        ({"num_gpu_processes": 1}, "1 other process had work on the GPU"),
        ({"num_gpu_processes": 3}, "3 other processes had work on the GPU"),
    ],
)
def test_each_thing_that_spoils_a_measurement_is_a_sentence(
    change: dict[str, float], words: str
) -> None:
    """The sentence has the number that was found and the one it is a part of."""
    [note] = found(**change)
    assert words in note


def test_a_small_machine_may_have_run_something_before() -> None:
    """What ended a minute ago is in the load of one core, and no reason to doubt."""
    assert found(load_before=0.9, num_machine_cores=1) == ()


def test_one_cause_is_one_sentence() -> None:
    """Whoever is busy now was in the load before."""
    assert len(found(other_cores=8.0, load_before=9.0)) == 1


def fake_times(**seconds: float) -> SimpleNamespace:
    names = ("user", "system", "idle", "iowait", "steal", "guest", "guest_nice")
    times = {name: 0.0 for name in names} | seconds

    class Times(SimpleNamespace):
        def __iter__(self) -> object:
            return iter(times.values())

    return Times(**times)


def test_steal_waiting_and_guests_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 s of user time hold 3 s of a guest, which are counted again; only our core counts."""
    cores = [
        fake_times(user=8.0, system=1.0, idle=50.0, iowait=5.0, steal=2.0, guest=3.0),
        fake_times(user=99.0, steal=99.0),
    ]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: cores)
    counted = core_seconds([0])
    assert (counted.busy_s, counted.stolen_s) == (9.0, 2.0)


def test_own_work_is_not_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2 s our cores were busy for 5 s, 3 of them ours: the others kept one core busy."""
    readings = [
        Cores(busy_s=100.0, stolen_s=7.0, own_s=40.0, wall_s=1000.0),
        Cores(busy_s=105.0, stolen_s=7.5, own_s=43.0, wall_s=1002.0),
    ]
    monkeypatch.setattr(busy, "core_seconds", lambda cores: readings.pop(0))
    machine = OtherProcesses().found()
    assert (machine.other_cores, machine.stolen_cores) == (1.0, 0.25)


def test_own_share_of_the_load_is_not_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling kernels for a minute on one core is a load of one at most."""
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 1.0, 1.0))
    monkeypatch.setattr(time, "process_time", lambda: 60.0)
    assert OtherProcesses().found().load_before == 1.5


def test_processes_on_the_gpu_are_counted_without_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor those of outside the container, whose numbers mean nothing here."""
    here, parent, outside = os.getpid(), os.getppid(), 2**31 - 2
    assert psutil.pid_exists(parent) and not psutil.pid_exists(outside)

    def processes(index: int) -> list[SimpleNamespace]:
        if index == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return [SimpleNamespace(pid=pid) for pid in (here, parent, outside)]

    for name, fake in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetComputeRunningProcesses": processes,
    }.items():
        monkeypatch.setattr(pynvml, name, fake)
    assert gpu_processes() == {parent}
    assert OtherProcesses().found().num_gpu_processes == 1

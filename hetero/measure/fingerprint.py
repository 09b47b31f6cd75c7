"""Which machine and which versions: a Fingerprint, made without importing torch."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pynvml

import hetero
from cpu_kernels.isa import isa
from cpu_kernels.numa import nodes_in_use
from cpu_kernels.threads import physical_cores
from hetero.measure.memory_limit import memory_limit_bytes
from planner.fingerprint import Fingerprint, HugePages

HUGE_PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CPUINFO = Path("/proc/cpuinfo")
# A kernel update moves the installed memory that a system reports by a few megabytes.
_MEMORY_TOLERANCE = 0.02
_FIELD_NAMES = {
    "cpu": "CPU",
    "instructions": "level of vector instructions",
    "num_cores": "number of cores",
    "num_numa_nodes": "number of NUMA nodes",
    "memory_bytes": "memory",
    "huge_pages": "state of huge pages",
    "gpu": "GPU",
    "gpu_uuid": "GPU UUID",
    "pcie": "GPU's PCIe link",
    "driver": "GPU driver",
    "torch": "torch version",
    "numba": "numba version",
    "hetero": "hetero version",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """One NVIDIA GPU as its driver describes it."""

    name: str
    uuid: str
    driver: str
    memory_bytes: int | None  # None where the GPU has no memory of its own, or will not say
    pcie: str  # as "4.0 x16"


def machine_fingerprint(*, prefer_gpu_uuid: str | None = None) -> Fingerprint:
    """The Fingerprint of this machine as this process sees it.

    Where there are several GPUs it names the one with `prefer_gpu_uuid`, otherwise the first.
    """
    gpus = nvidia_gpus()
    gpu = next((g for g in gpus if g.uuid == prefer_gpu_uuid), gpus[0] if gpus else None)
    return Fingerprint(
        cpu=cpu_model(),
        instructions=instructions_in_use(),
        num_cores=physical_cores(),
        num_numa_nodes=len(nodes_in_use()) or None,
        memory_bytes=memory_limit_bytes(),
        huge_pages=huge_pages(),
        gpu=None if gpu is None else gpu.name,
        gpu_uuid=None if gpu is None else gpu.uuid,
        pcie=None if gpu is None else gpu.pcie,
        driver=None if gpu is None else gpu.driver,
        torch=package_version("torch") or "not installed",
        numba=package_version("numba") or "not installed",
        hetero=hetero.__version__,
    )


def describe_mismatch(measured: Fingerprint, here: Fingerprint) -> str | None:
    """Name the first field in which two fingerprints differ, with both values; None where none.

    What one of them does not know cannot differ.
    """
    for field, words in _FIELD_NAMES.items():
        old, new = getattr(measured, field), getattr(here, field)
        if "unknown" in (old, new) or (field == "num_numa_nodes" and None in (old, new)):
            continue
        if field == "memory_bytes":
            if abs(old - new) > _MEMORY_TOLERANCE * max(old, new):
                return f"the memory was {old / 1e9:.1f} GB and is {new / 1e9:.1f} GB"
        elif old != new:
            return f"the {words} was {old or 'none'} and is {new or 'none'}"
    return None


def instructions_in_use() -> str:
    """The level that kernels are compiled for: HETERO_ISA lowers it, and every rate with it."""
    try:
        return isa().level
    except (ImportError, OSError):  # llvmlite does not load, which hetero doctor reports
        return "unknown"


def huge_pages(file: Path = HUGE_PAGES_FILE) -> HugePages:
    """Whether memory is given in huge pages: always, where asked for (madvise), or never."""
    try:
        words = file.read_text()
    except OSError:
        return "unknown"
    chosen = words.partition("[")[2].partition("]")[0]
    return next((mode for mode in get_args(HugePages) if mode == chosen), "unknown")


def cpu_model(cpuinfo: Path = _CPUINFO) -> str:
    """The CPU's name; the architecture where the system tells no name."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Instruction sets of the CPU by the kernel's names; empty outside Linux."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def nvidia_gpus() -> tuple[GpuFacts, ...]:
    """NVIDIA GPUs in the driver's order; none without a driver, "unknown" for what it hides."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = _told(pynvml.nvmlSystemGetDriverVersion)
        found = []
        for index in range(_told(pynvml.nvmlDeviceGetCount) or 0):
            handle = _told(pynvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                continue  # one that this process may not use, or that fell off the bus
            memory = _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
            found.append(
                GpuFacts(
                    name=str(_told(pynvml.nvmlDeviceGetName, handle) or "unknown"),
                    uuid=str(_told(pynvml.nvmlDeviceGetUUID, handle) or "unknown"),
                    driver=str(driver or "unknown"),
                    memory_bytes=None if memory is None else int(memory.total),
                    pcie=_pcie(handle),
                )
            )
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()


def _pcie(handle: object) -> str:
    """Generation and width of a GPU's link, as "4.0 x16".

    An idle link falls back to an old generation to save power, but keeps the width that it was
    negotiated with: the generation is the best that GPU and slot can do together.
    """
    generation = _told(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
    width = _told(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle)
    return f"{generation}.0 x{width}" if generation and width else "unknown"


def gpu_used_bytes(uuid: str) -> int | None:
    """Memory of a GPU that all processes together use now; None where the driver does not say."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = _told(pynvml.nvmlDeviceGetHandleByUUID, uuid)
        memory = None if handle is None else _told(pynvml.nvmlDeviceGetMemoryInfo, handle)
        return None if memory is None else int(memory.used)
    finally:
        pynvml.nvmlShutdown()


def _told(ask: Callable[..., Any], *arguments: object) -> Any:
    """One fact of the driver; None where it has none, as of the memory of a unified-memory GPU."""
    try:
        return ask(*arguments)
    except pynvml.NVMLError:
        return None


def package_version(name: str) -> str | None:
    """Version of an installed package, read from its metadata; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

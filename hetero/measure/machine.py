"""Measure this machine: every kernel that the engine runs, by thread count -> HardwareProfile."""

from __future__ import annotations

from datetime import UTC, datetime

import torch

from hetero.errors import EnvironmentProblemError
from hetero.measure.busy import OtherProcesses
from hetero.measure.ceilings import raised
from hetero.measure.cold_memory import cold_bytes, cold_cpu_memory, last_level_cache_bytes
from hetero.measure.cpu import Progress, Subject, measure_cpus
from hetero.measure.effort import FULL, QUICK, Effort
from hetero.measure.fingerprint import machine_fingerprint
from hetero.measure.gpu import measure_gpu
from hetero.measure.memory_limit import available_memory_bytes
from hetero.measure.neighbours import measure_contention
from hetero.runtime.devices import cuda_missing
from planner.device import DeviceProfile
from planner.fingerprint import Fingerprint
from planner.hardware import AcceleratorName, HardwareProfile
from planner.model_spec import ModelSpec


def measure_machine(
    *,
    quick: bool,
    progress: Progress | None = None,
    accelerator: AcceleratorName = "auto",
    spec: ModelSpec | None = None,
) -> HardwareProfile:
    """Measure the CPU by thread count, and the GPU with its link where there is one.

    Parameters
    ----------
    quick
        Fewer calls and thread counts: seconds instead of up to a minute and a half.
    progress
        Called with one line before each part.
    accelerator
        "auto" measures a GPU if torch can use one, "cuda" insists on it, "none" and "emulated"
        leave it out: `HardwareProfile.with_emulated_gpu` derives that from the CPU.
    spec
        Measure the products, experts and heads of this model as well, in its formats.

    Raises
    ------
    EnvironmentProblemError
        "cuda" was asked for and torch cannot use a GPU.
    """
    has_cuda = torch.cuda.is_available()
    if accelerator == "cuda" and not has_cuda:
        raise EnvironmentProblemError(cuda_missing())
    return measure_with(
        QUICK if quick else FULL,
        progress=progress or _ignore,
        has_gpu=has_cuda and accelerator in ("auto", "cuda"),
        spec=spec,
        notes=("quick measurement: a full one is made by hetero profile",) if quick else (),
    )


def measure_with(
    effort: Effort,
    *,
    progress: Progress,
    has_gpu: bool,
    spec: ModelSpec | None = None,
    notes: tuple[str, ...] = (),
    memory_bytes: int | None = None,
) -> HardwareProfile:
    """Measure with a given effort; `memory_bytes` overrides the memory that is rotated through."""
    others = OtherProcesses()
    num_bytes, size_notes = _rotated_bytes(memory_bytes)
    progress(f"filling {num_bytes / 1e6:.0f} MB, so that reads miss the caches")
    memory = cold_cpu_memory(num_bytes)
    subjects = [Subject(memory=memory, effort=effort)]
    if spec is not None:
        subjects.append(Subject.of(spec, memory, effort))
    with torch.inference_mode():
        cpu = measure_cpus(subjects, progress)
        found = measure_gpu([each.effort for each in subjects], progress) if has_gpu else None
        # what copies cost the CPU, and the CPU them
        device = torch.device("cpu" if found is None else "cuda")
        beside = measure_contention(memory, effort, cpu, device, progress)
    gpu = None if found is None else found.profile
    devices = tuple(
        raised(each, [s for s in beside if s.lane == "cpu" and s.num_threads == each.num_threads])
        for each in cpu.devices
    )
    fingerprint = machine_fingerprint(prefer_gpu_uuid=None if found is None else found.uuid)
    gpu_notes = () if found is None else found.notes
    model_notes = () if spec is None else (f"measured with the shapes of {spec.name}",)
    busy_notes = others.notes()
    return HardwareProfile(
        name=_machine_name(fingerprint, gpu),
        provenance="measured",
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        confidence="low" if busy_notes else "high",
        num_threads=cpu.num_threads,
        cpu_by_threads=devices,
        gpu=gpu,
        link=None if found is None else found.link,
        fingerprint=fingerprint,
        notes=(*notes, *model_notes, *size_notes, *gpu_notes, *busy_notes),
        samples=(*cpu.samples, *beside, *(() if found is None else found.samples)),
    )


def _rotated_bytes(memory_bytes: int | None) -> tuple[int, tuple[str, ...]]:
    """Bytes to rotate through, and a note where they do not outgrow the caches."""
    if memory_bytes is not None:
        return memory_bytes, ()
    caches = last_level_cache_bytes()
    num_bytes = cold_bytes(available_memory_bytes(), caches)
    if num_bytes < caches:
        return num_bytes, (
            f"measured in {num_bytes / 1e6:.0f} MB, less than the {caches / 1e6:.0f} MB of caches: "
            "too little memory was free, rates of memory are too high",
        )
    return num_bytes, ()


def _machine_name(fingerprint: Fingerprint, gpu: DeviceProfile | None) -> str:
    name = f"{fingerprint.cpu}, {fingerprint.num_cores} cores"
    return name if gpu is None else f"{name}, {gpu.name}"


def _ignore(line: str) -> None:
    pass

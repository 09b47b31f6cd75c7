"""Measure this machine: every kernel that the engine runs, by thread count -> HardwareProfile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from cpu_kernels.threads import physical_cores
from hetero.errors import EnvironmentProblemError
from hetero.measure.attention import decode_sample, prefill_sample, torch_decode_sample
from hetero.measure.busy import OtherProcesses
from hetero.measure.ceilings import cpu_ceilings, gpu_ceilings, raised
from hetero.measure.cold_memory import (
    ColdMemory,
    cold_bytes,
    cold_cpu_memory,
    cold_gpu_memory,
    gpu_cold_bytes,
    last_level_cache_bytes,
)
from hetero.measure.contention import beside_attention, beside_copies
from hetero.measure.effort import FULL, QUICK, Effort, ProductCase
from hetero.measure.elementwise import (
    elementwise_sample,
    norm_sample,
    residual_sample,
    rotary_sample,
    route_sample,
    sampling_sample,
)
from hetero.measure.experts import experts_sample, torch_experts_sample
from hetero.measure.fingerprint import cpu_model, gpu_used_bytes, machine_fingerprint, nvidia_gpus
from hetero.measure.host import host_samples
from hetero.measure.launch import handover_sample, launch_s, link_s
from hetero.measure.linear import linear_sample
from hetero.measure.link import copy_samples, link_profile
from hetero.measure.memory import cpu_read_bytes_per_s, gpu_read_bytes_per_s
from hetero.measure.memory_limit import available_memory_bytes, memory_limit_bytes
from hetero.measure.settling import Probe, settled
from hetero.measure.timing import torch_threads
from hetero.model.products import available_backends, fits_groups
from hetero.model_lookup import find_model
from hetero.runtime.devices import cuda_missing
from planner.device import DeviceProfile, LinkProfile, Sample
from planner.fingerprint import Fingerprint
from planner.hardware import AcceleratorName, HardwareProfile
from planner.model_spec import Dtype, ModelSpec

Progress = Callable[[str], None]

# CUDA context, library workspaces: less than this was never seen.
_MIN_RESERVED_GPU_BYTES = 500_000_000
# Less is what a driver keeps for a display.
_MIN_OTHER_GPU_BYTES = 100_000_000
_TORCH_DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")
_GPU_DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
# Of several thread counts the larger one must win by this share: fewer threads disturb less.
_MORE_THREADS_GAIN = 1.03
_KV_SHARE = 3
# float16 has a fast product on few CPUs and may take 70 times as long as bfloat16.
_FLOAT16_TOKENS = (1, 16)


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
        Measure the products, experts and heads of this model as well, in its formats, and in no
        more memory than its weights take: a model that fits the caches is measured in them.

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
    subjects = [_Subject(memory=memory, effort=effort)]
    if spec is not None:
        subjects.append(_Subject.of(spec, memory, effort))
    with torch.inference_mode():
        cpu = _measure_cpus(subjects, progress)
        found = _measure_gpu(effort, progress) if has_gpu else None
        # what copies cost the CPU, and the CPU them
        device = torch.device("cpu" if found is None else "cuda")
        beside = _measure_contention(memory, effort, cpu, device, progress)
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


def _is_on(sample: Sample, cpu: DeviceProfile) -> bool:
    return sample.lane == "cpu" and sample.num_threads == cpu.num_threads


def thread_counts(num_cores: int, effort: Effort) -> tuple[int, ...]:
    """Thread counts to measure: 1, 2, 4, ... and all; one and all where it must be quick."""
    counts = {1, num_cores}
    if effort.has_all_thread_counts:
        count = 2
        while count < num_cores:
            counts.add(count)
            count *= 2
    return tuple(sorted(counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is measured, and the memory that it is rotated through."""

    memory: ColdMemory
    effort: Effort

    @classmethod
    def of(cls, spec: ModelSpec, memory: ColdMemory, effort: Effort) -> _Subject:
        """A model, in no more memory than its weights take."""
        # one product and one cache of keys must fit whatever the model
        own_bytes = max(spec.total_weight_bytes(), 64 << 20)
        if own_bytes < memory.num_bytes:
            memory = cold_cpu_memory(own_bytes)
        # four of the largest product in float32
        return cls(memory=memory, effort=effort.for_model(spec, memory.num_bytes // 16))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _MeasuredCpu:
    """The CPU by thread count, the count it is used with, and what was measured."""

    devices: tuple[DeviceProfile, ...]
    num_threads: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain:
    """What decides on a number of threads: plain reads and a product of one token."""

    num_threads: int
    read_bytes_per_s: float
    product: Sample


def _measure_cpus(subjects: list[_Subject], progress: Progress) -> _MeasuredCpu:
    """Choose the thread count by what decides decode, then measure every kernel with it.

    One thread is measured too, more briefly: the emulated accelerator has one.
    """
    memory, effort = subjects[0].memory, subjects[0].effort
    plain = [
        _measure_plain(memory, num_threads, effort, progress)
        for num_threads in thread_counts(physical_cores(), effort)
    ]
    chosen = choose_threads({each.num_threads: each.product.seconds for each in plain})
    samples: list[Sample] = [each.product for each in plain]
    devices: list[DeviceProfile] = []
    for each in plain:
        num_threads, found = each.num_threads, [each.product]
        with torch_threads(num_threads):
            if num_threads == chosen:
                for subject in subjects:
                    found += _measure_kernels(subject.memory, subject.effort, num_threads, progress)
            elif num_threads == 1 and effort.has_all_thread_counts:
                brief = replace(QUICK, torch_tokens=effort.torch_tokens, rows=effort.rows)
                found += _measure_kernels(memory, brief, num_threads, progress)
            devices.append(
                cpu_ceilings(
                    found,
                    name=cpu_model(),
                    memory_bytes=memory_limit_bytes(),
                    num_threads=num_threads,
                    read_bytes_per_s=each.read_bytes_per_s,
                    launch_s=link_s(memory, num_threads=num_threads, budget_s=effort.budget_s),
                    torch_launch_s=launch_s(torch.device("cpu"), budget_s=effort.budget_s),
                )
            )
        samples += found[1:]
    unique = {(s.num_threads, s.call): s for s in samples}
    return _MeasuredCpu(devices=tuple(devices), num_threads=chosen, samples=tuple(unique.values()))


def choose_threads(seconds: dict[int, float]) -> int:
    """The number of threads that is fastest; more only where they gain 3 %.

    Examples
    --------
    >>> choose_threads({1: 2.0, 2: 1.0, 4: 0.99})
    2
    """
    chosen = min(seconds)
    for count in sorted(seconds):
        if seconds[count] * _MORE_THREADS_GAIN < seconds[chosen]:
            chosen = count
    return chosen


def _measure_plain(
    memory: ColdMemory, num_threads: int, effort: Effort, progress: Progress
) -> _Plain:
    progress(f"{_threads(num_threads)}: reading memory")
    # longer than a kernel: all other choices hang on it
    budget_s = 4 * effort.budget_s
    with torch_threads(num_threads):
        return _Plain(
            num_threads=num_threads,
            read_bytes_per_s=cpu_read_bytes_per_s(
                memory, num_threads=num_threads, budget_s=budget_s
            ),
            product=linear_sample(
                memory,
                kind="bfloat16",
                num_tokens=1,
                shape=(2048, 2048),
                budget_s=budget_s,
                backend="numba",
            ),
        )


def _threads(num_threads: int) -> str:
    return f"cpu, {num_threads} thread{'s' if num_threads > 1 else ''}"


def _measure_kernels(
    memory: ColdMemory, effort: Effort, num_threads: int, progress: Progress
) -> list[Sample]:
    """Every kernel of the CPU with the threads that torch is set to."""
    who, samples = _threads(num_threads), list[Sample]()
    parts: tuple[tuple[str, list[Probe]], ...] = (
        ("matrix products", _products(memory, effort)),
        ("experts", _experts(memory, effort, num_threads)),
        ("attention", _attention(memory, effort, num_threads)),
        ("small kernels, sampling", _small_kernels(memory, effort, num_threads)),
    )
    for what, probes in parts:
        progress(f"{who}: {what}")
        samples += settled(probes, budget_s=effort.settling_s)
    progress(f"{who}: Python between kernels")
    samples += host_samples(memory, find_model(None, hub_cache=Path()), num_threads=num_threads)
    samples.append(handover_sample(num_threads=num_threads))
    return samples


def _products(memory: ColdMemory, effort: Effort) -> list[Probe]:
    """Ours, and those of torch and of Intel's extension, to choose between."""
    cases = effort.products("numba", effort.kinds)
    for kind in effort.kinds:
        assert kind != "float16"
        for backend, reason in available_backends(kind).items():
            if backend != "numba" and reason is None:
                cases += [
                    case
                    for case in effort.products(backend, (kind,))
                    if kind not in ("int8", "int4") or fits_groups(*case.shape)
                ]
    cases += [
        ProductCase(kind="float16", shape=effort.torch_shapes[0], num_tokens=count, backend="torch")
        for count in _FLOAT16_TOKENS
    ]
    return [
        partial(
            linear_sample,
            memory,
            kind=case.kind,
            num_tokens=case.num_tokens,
            shape=case.shape,
            budget_s=effort.budget_s,
            backend=case.backend,
        )
        for case in cases
    ]


def _experts(memory: ColdMemory, effort: Effort, num_threads: int) -> list[Probe]:
    """Ours, and what a run may choose in their place where weights are not quantised."""
    probes: list[Probe] = [
        partial(
            experts_sample,
            memory,
            kind=case.kind,
            shape=case.shape,
            num_experts=case.num_experts or 1,
            tokens_each=case.num_tokens,
            num_threads=num_threads,
            budget_s=effort.budget_s,
        )
        for case in effort.experts(effort.kinds, memory.num_bytes)
    ]
    probes += [
        partial(
            torch_experts_sample,
            memory,
            dtype=dtype,
            shape=case.shape,
            num_experts=case.num_experts or 1,
            tokens_each=case.num_tokens,
            budget_s=effort.budget_s,
        )
        for dtype in _TORCH_DTYPES
        if dtype in effort.kinds
        for case in effort.torch_experts(dtype, effort.torch_tokens, memory.num_bytes)
        if case.flops <= effort.max_flops
    ]
    return probes


def _attention(memory: ColdMemory, effort: Effort, num_threads: int) -> list[Probe]:
    """Ours over pages and torch's over prompts; with one thread all of torch's, for emulation."""
    budget_s, max_bytes = effort.budget_s, memory.num_bytes // _KV_SHARE
    probes: list[Probe] = [
        partial(decode_sample, memory, case, num_threads=num_threads, budget_s=budget_s)
        for case in effort.decode_cases(max_bytes)
    ]
    probes += [
        # Whatever the model's format: cpu_layers.py widens queries, keys and values for torch.
        partial(prefill_sample, memory, case, compute_dtype="float32", budget_s=budget_s)
        for case in effort.prefill_cases(max_bytes)
    ]
    for dtype in _TORCH_DTYPES if num_threads == 1 else ():
        if dtype not in effort.kinds:
            continue
        each = replace(effort, kv_dtypes=(dtype,), heads=effort.heads[:1])
        probes += [
            partial(torch_decode_sample, memory, case, budget_s=budget_s)
            for case in each.decode_cases(max_bytes)
        ]
        if dtype != "float32":
            probes += [
                partial(prefill_sample, memory, case, compute_dtype=dtype, budget_s=budget_s)
                for case in each.prefill_cases(max_bytes)
            ]
    return probes


def _small_kernels(memory: ColdMemory, effort: Effort, num_threads: int) -> list[Probe]:
    """Between products: ours, torch's, and sampling."""
    probes: list[Probe] = []
    threads, budget_s = {"num_threads": num_threads}, effort.budget_s / 2
    for width, count in _rows(effort):
        probes.append(partial(norm_sample, width, count, **threads, budget_s=budget_s))
        probes.append(partial(residual_sample, width, count, **threads, budget_s=budget_s))
        probes.append(
            partial(
                elementwise_sample, torch.device("cpu"), "bfloat16", width, count, budget_s=budget_s
            )
        )
    for count in effort.rows:
        probes.append(partial(rotary_sample, effort.heads[0], count, **threads, budget_s=budget_s))
        probes.append(partial(route_sample, 64, 8, count, **threads, budget_s=budget_s))
    probes += [
        partial(sampling_sample, memory, vocabulary, count, **threads)
        for vocabulary in effort.vocabularies
        for count in effort.num_seqs
    ]
    return probes


def _rows(effort: Effort) -> Iterator[tuple[int, int]]:
    for width in effort.widths:
        for count in effort.rows:
            yield width, count


def _measure_contention(
    memory: ColdMemory,
    effort: Effort,
    cpu: _MeasuredCpu,
    device: torch.device,
    progress: Progress,
) -> tuple[Sample, ...]:
    """Experts of one token beside copies and beside attention."""
    progress("cpu beside copies and attention")
    kind, shape = effort.kinds[0], (effort.expert_shapes or effort.dense_shapes)[0]
    alone = next(
        (
            sample
            for sample in cpu.samples
            if sample.kernel == "experts"
            and sample.format == kind
            and sample.shape[1:] == shape
            and sample.num_tokens == 1
            and sample.num_threads == cpu.num_threads
        ),
        None,
    )
    if alone is None:
        return ()
    copied = cold_cpu_memory(max(64 << 20, memory.num_bytes // 8))
    budget_s = max(0.1, 2 * effort.budget_s)
    beside = beside_copies(memory, copied, alone, device, kind=kind, shape=shape, budget_s=budget_s)
    case = effort.decode_cases(copied.num_bytes)[0]
    attended = beside_attention(
        memory, copied, alone, kind=kind, shape=shape, case=case, budget_s=budget_s
    )
    # Without other samples of the format this one would be its ceiling.
    is_known = any(_is_on(attended, each) and kind in each.flop_per_s for each in cpu.devices)
    return (*beside, *((attended,) if is_known else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _MeasuredGpu:
    profile: DeviceProfile
    link: LinkProfile
    samples: tuple[Sample, ...]
    uuid: str
    notes: tuple[str, ...]


def _measure_gpu(effort: Effort, progress: Progress) -> _MeasuredGpu:
    # Before torch is asked for anything, which makes the context.
    used_by_uuid = {gpu.uuid: gpu_used_bytes(gpu.uuid) for gpu in nvidia_gpus()}
    device = torch.device("cuda", 0)
    facts = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{facts.uuid}"
    used_before, torch_before = used_by_uuid.get(uuid), torch.cuda.memory_reserved(device)
    budget_s = effort.budget_s
    progress(f"gpu, {facts.name}: reading memory")
    free, _ = torch.cuda.mem_get_info(device)
    memory = cold_gpu_memory(gpu_cold_bytes(free, _largest_gpu_bytes(effort)), device)
    read = gpu_read_bytes_per_s(memory, budget_s=budget_s)
    progress(f"gpu, {facts.name}: matrix products, experts, attention")
    samples = _measure_gpu_kernels(memory, effort)
    small_op_s = launch_s(device, budget_s=budget_s)
    progress("link between cpu and gpu")
    copies = copy_samples(device, effort.copy_bytes, budget_s=budget_s)
    # All libraries are loaded by now: what is taken and is not torch's own is context and others.
    free, total = torch.cuda.mem_get_info(device)
    torch_bytes = torch.cuda.memory_reserved(device)
    taken = total - free - torch_bytes
    reserved = own_context_bytes(used_before, gpu_used_bytes(uuid), torch_bytes - torch_before)
    del memory
    torch.cuda.empty_cache()
    profile = gpu_ceilings(
        samples,
        name=facts.name,
        memory_bytes=total,
        reserved_bytes=reserved,
        read_bytes_per_s=read,
        launch_s=small_op_s,
    )
    return _MeasuredGpu(
        profile=profile,
        link=link_profile(device, copies),
        samples=(*samples, *copies),
        uuid=uuid,
        notes=other_use_notes(taken - reserved, total),
    )


def _largest_gpu_bytes(effort: Effort) -> int:
    """Bytes of the largest product in float32."""
    return 4 * max(rows * columns for rows, columns in (*effort.shapes, *effort.torch_shapes))


def _measure_gpu_kernels(memory: ColdMemory, effort: Effort) -> list[Sample]:
    budget_s, device = effort.budget_s, memory.device
    samples = [
        linear_sample(
            memory,
            kind=dtype,
            num_tokens=count,
            shape=shape,
            budget_s=budget_s,
            backend="torch",
        )
        for dtype in _GPU_DTYPES
        for shape in effort.shapes
        for count in effort.gpu_tokens
    ]
    for dtype in _GPU_DTYPES[:2]:
        samples += [
            torch_experts_sample(
                memory,
                dtype=dtype,
                shape=case.shape,
                num_experts=case.num_experts or 1,
                tokens_each=case.num_tokens,
                budget_s=budget_s,
            )
            for case in effort.torch_experts(dtype, effort.expert_tokens, memory.num_bytes)
        ]
    for case in replace(effort, kv_dtypes=("bfloat16",)).decode_cases(
        memory.num_bytes // _KV_SHARE
    ):
        samples.append(torch_decode_sample(memory, case, budget_s=budget_s))
    for case in effort.prefill_cases(memory.num_bytes // _KV_SHARE):
        samples.append(prefill_sample(memory, case, compute_dtype=case.dtype, budget_s=budget_s))
    samples += [
        elementwise_sample(device, "bfloat16", *case, budget_s=budget_s) for case in _rows(effort)
    ]
    return samples


def own_context_bytes(used_before: int | None, used_after: int | None, torch_bytes: int) -> int:
    """GPU memory that this process took beside torch's tensors, by what all processes use."""
    if used_before is None or used_after is None:
        return _MIN_RESERVED_GPU_BYTES
    return max(_MIN_RESERVED_GPU_BYTES, used_after - used_before - torch_bytes)


def other_use_notes(other_bytes: int, total_bytes: int) -> tuple[str, ...]:
    """A note where other processes hold GPU memory; they may have ended when a plan is made."""
    if other_bytes < _MIN_OTHER_GPU_BYTES:
        return ()
    return (
        f"measured while other processes held {other_bytes / 1e9:.1f} of the GPU's "
        f"{total_bytes / 1e9:.1f} GB: plans count it as free, unless --gpu-mem-gb says less",
    )


def _machine_name(fingerprint: Fingerprint, gpu: DeviceProfile | None) -> str:
    name = f"{fingerprint.cpu}, {fingerprint.num_cores} cores"
    return name if gpu is None else f"{name}, {gpu.name}"


def _ignore(line: str) -> None:
    pass

"""Measure this machine: every probe once per device and thread count -> HardwareProfile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch

from cpu_kernels.threads import physical_cores
from hetero.errors import EnvironmentProblemError
from hetero.measure.attention import (
    AttentionShape,
    cpu_decode_bytes_per_s,
    gpu_decode_bytes_per_s,
    prefill_flop_per_s,
)
from hetero.measure.busy import OtherProcesses
from hetero.measure.cold_memory import (
    ColdMemory,
    cold_bytes,
    cold_cpu_memory,
    cold_gpu_memory,
    gpu_cold_bytes,
    last_level_cache_bytes,
)
from hetero.measure.fingerprint import cpu_model, gpu_used_bytes, machine_fingerprint, nvidia_gpus
from hetero.measure.gemm import CPU_SHAPES, GPU_SHAPES, Shape, linear_sample, model_shapes
from hetero.measure.launch import launch_s, link_s
from hetero.measure.link import measure_link
from hetero.measure.memory import cpu_read_bytes_per_s, gpu_read_bytes_per_s
from hetero.measure.memory_limit import available_memory_bytes, memory_limit_bytes
from hetero.measure.timing import torch_threads
from hetero.model.products import available_backends, fits_groups
from hetero.runtime.devices import cuda_missing
from planner.hardware import (
    AcceleratorName,
    Backend,
    DeviceProfile,
    Fingerprint,
    HardwareProfile,
    LinearSample,
    LinkProfile,
)
from planner.model_spec import Dtype, ModelSpec, WeightKind

Progress = Callable[[str], None]

# CUDA context, library workspaces: less than this was never seen.
_MIN_RESERVED_GPU_BYTES = 500_000_000
# Less is what a driver keeps for a display.
_MIN_OTHER_GPU_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What is measured and for how long: seconds a probe repeats, token counts per format.

    `tokens` are those of our kernels (and of torch where they have not the format), `other_tokens`
    those of the CPU's other backends.
    """

    budget_s: float
    tokens: dict[WeightKind, tuple[int, ...]]
    other_tokens: dict[WeightKind, tuple[int, ...]]
    gpu_tokens: tuple[int, ...]
    has_all_thread_counts: bool


# Prices on two cores, kernels compiled: quick about 5 s, full about 30 s.
QUICK = Effort(
    budget_s=0.03,
    # float16 has a fast product on few CPUs and may take 70 times as long as bfloat16
    tokens={
        "bfloat16": (1, 4, 16, 64, 256),
        "float32": (1, 4, 16, 64, 256),
        "float16": (1, 16),
        "int8": (1, 4, 16, 64, 256),
        "int4": (1, 4, 16, 64, 256),
    },
    # what there is to choose from, in decode and in prefill
    other_tokens={"bfloat16": (1, 256), "float32": (1, 256)},
    gpu_tokens=(1, 16, 64, 512),
    has_all_thread_counts=False,
)
FULL = Effort(
    budget_s=0.2,
    tokens={
        "bfloat16": (1, 2, 4, 8, 16, 32, 64, 128, 512),
        "float32": (1, 2, 4, 8, 16, 32, 64, 128, 512),
        "float16": (1, 16, 64),
        "int8": (1, 2, 4, 8, 16, 32, 64, 128, 512),
        "int4": (1, 2, 4, 8, 16, 32, 64, 128, 512),
    },
    other_tokens={
        "bfloat16": (1, 4, 16, 128, 512),
        "float32": (1, 4, 16, 128, 512),
        "int8": (1, 512),
        "int4": (1, 512),
    },
    gpu_tokens=(1, 4, 16, 64, 128, 256, 512, 2048),
    has_all_thread_counts=True,
)


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
        Fewer token counts and thread counts: seconds instead of up to a minute.
    progress
        Called with one line before each part.
    accelerator
        "auto" measures a GPU if torch can use one, "cuda" insists on it, "none" and "emulated"
        leave it out: `HardwareProfile.with_emulated_gpu` derives that from the CPU.
    spec
        Measure with the products and heads of this model, in its format, and in no more memory
        than its weights take: a model that fits the caches is measured in them.

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
    num_bytes, size_notes = _rotated_bytes(spec, memory_bytes)
    progress(f"filling {num_bytes / 1e6:.0f} MB, so that reads miss the caches")
    memory = cold_cpu_memory(num_bytes)
    subject = _Subject.of(spec, num_bytes)
    with torch.inference_mode():
        cpus = tuple(
            _measure_cpu(memory, num_threads, effort, subject, progress)
            for num_threads in thread_counts(physical_cores(), effort)
        )
        found = _measure_gpu(effort, subject, progress) if has_gpu else None
    gpu = None if found is None else found.profile
    fingerprint = machine_fingerprint(prefer_gpu_uuid=None if found is None else found.uuid)
    gpu_notes = () if found is None else found.notes
    model_notes = () if spec is None else (f"measured with the shapes of {spec.name}",)
    return HardwareProfile(
        name=_machine_name(fingerprint, gpu),
        provenance="measured",
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu_by_threads=cpus,
        gpu=gpu,
        link=None if found is None else found.link,
        fingerprint=fingerprint,
        notes=(*notes, *model_notes, *size_notes, *gpu_notes, *others.notes()),
    )


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
    """What the probes run: shapes, heads and formats."""

    cpu_shapes: tuple[Shape, ...] = CPU_SHAPES
    gpu_shapes: tuple[Shape, ...] = GPU_SHAPES
    attention: AttentionShape = field(default_factory=AttentionShape)
    attention_dtype: Dtype = "bfloat16"

    @classmethod
    def of(cls, spec: ModelSpec | None, num_bytes: int) -> _Subject:
        if spec is None:
            return cls()
        # four of the largest product in float32
        shapes = model_shapes(spec, max_elements=num_bytes // 16)
        return cls(
            cpu_shapes=shapes,
            gpu_shapes=shapes,
            attention=AttentionShape.of(spec),
            attention_dtype=spec.dtype,
        )

    def largest_gpu_bytes(self) -> int:
        """Bytes of the largest product in float32, or of keys or values where they are more."""
        heads = self.attention
        kv_elements = heads.context_len * heads.num_kv_heads * heads.head_dim
        return 4 * max(kv_elements, *(rows * columns for rows, columns in self.gpu_shapes))


def _rotated_bytes(spec: ModelSpec | None, memory_bytes: int | None) -> tuple[int, tuple[str, ...]]:
    """Bytes to rotate through, and a note where they do not outgrow the caches."""
    if memory_bytes is not None:
        return memory_bytes, ()
    caches = last_level_cache_bytes()
    num_bytes = cold_bytes(available_memory_bytes(), caches)
    if spec is not None:
        # one product and one cache of keys must fit whatever the model
        return min(num_bytes, max(spec.total_weight_bytes(), 64 << 20)), ()
    if num_bytes < caches:
        return num_bytes, (
            f"measured in {num_bytes / 1e6:.0f} MB, less than the {caches / 1e6:.0f} MB of caches: "
            "too little memory was free, rates of memory are too high",
        )
    return num_bytes, ()


def _measure_cpu(
    memory: ColdMemory, num_threads: int, effort: Effort, subject: _Subject, progress: Progress
) -> DeviceProfile:
    threads = f"cpu, {num_threads} thread{'s' if num_threads > 1 else ''}"
    budget_s = effort.budget_s
    cpu = torch.device("cpu")
    with torch_threads(num_threads):
        progress(f"{threads}: reading memory")
        read = cpu_read_bytes_per_s(memory, num_threads=num_threads, budget_s=budget_s)
        progress(f"{threads}: matrix products")
        linear = tuple(
            linear_sample(
                memory,
                dtype=dtype,
                num_tokens=num_tokens,
                shapes=subject.cpu_shapes,
                budget_s=budget_s,
                backend=backend,
            )
            for backend, dtype, num_tokens in _cpu_products(effort, subject.cpu_shapes)
        )
        progress(f"{threads}: attention")
        decode = cpu_decode_bytes_per_s(
            memory,
            subject.attention,
            dtype=subject.attention_dtype,
            num_threads=num_threads,
            budget_s=budget_s,
        )
        # Whatever the model's format: cpu_layers.py widens queries, keys and values for torch.
        prefill = prefill_flop_per_s(cpu, subject.attention, dtype="float32", budget_s=budget_s)
        small_op_s = link_s(memory, num_threads=num_threads, budget_s=budget_s)
        torch_op_s = launch_s(cpu, budget_s=budget_s)
    return DeviceProfile(
        name=cpu_model(),
        kind="cpu",
        memory_bytes=memory_limit_bytes(),
        read_bytes_per_s=read,
        attention_bytes_per_s=decode,
        attention_flop_per_s=prefill,
        launch_s=small_op_s,
        linear=linear,
        num_threads=num_threads,
        torch_launch_s=torch_op_s,
    )


def _cpu_products(
    effort: Effort, shapes: Sequence[Shape]
) -> Iterator[tuple[Backend, WeightKind, int]]:
    """Which backend multiplies what, for how many tokens."""
    for dtype, counts in effort.tokens.items():
        for num_tokens in counts:
            yield "torch" if dtype == "float16" else "numba", dtype, num_tokens
    for dtype, counts in effort.other_tokens.items():
        assert dtype != "float16"
        if dtype in ("int8", "int4") and not all(fits_groups(*shape) for shape in shapes):
            continue
        for backend, reason in available_backends(dtype).items():
            if backend != "numba" and reason is None:
                for num_tokens in counts:
                    yield backend, dtype, num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _MeasuredGpu:
    profile: DeviceProfile
    link: LinkProfile
    uuid: str
    notes: tuple[str, ...]


def _measure_gpu(effort: Effort, subject: _Subject, progress: Progress) -> _MeasuredGpu:
    # Before torch is asked for anything, which makes the context.
    used_by_uuid = {gpu.uuid: gpu_used_bytes(gpu.uuid) for gpu in nvidia_gpus()}
    device = torch.device("cuda", 0)
    facts = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{facts.uuid}"
    used_before, torch_before = used_by_uuid.get(uuid), torch.cuda.memory_reserved(device)
    budget_s = effort.budget_s
    progress(f"gpu, {facts.name}: reading memory")
    free, _ = torch.cuda.mem_get_info(device)
    memory = cold_gpu_memory(gpu_cold_bytes(free, subject.largest_gpu_bytes()), device)
    read = gpu_read_bytes_per_s(memory, budget_s=budget_s)
    progress(f"gpu, {facts.name}: matrix products")
    dtypes: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
    linear: list[LinearSample] = [
        linear_sample(
            memory,
            dtype=dtype,
            num_tokens=num_tokens,
            shapes=subject.gpu_shapes,
            budget_s=budget_s,
            backend="torch",
        )
        for dtype in dtypes
        for num_tokens in effort.gpu_tokens
    ]
    progress(f"gpu, {facts.name}: attention")
    dtype = subject.attention_dtype
    decode = gpu_decode_bytes_per_s(memory, subject.attention, dtype=dtype, budget_s=budget_s)
    prefill = prefill_flop_per_s(device, subject.attention, dtype=dtype, budget_s=budget_s)
    small_op_s = launch_s(device, budget_s=budget_s)
    progress("link between cpu and gpu")
    link = measure_link(device, budget_s=budget_s)
    # All libraries are loaded by now: what is taken and is not torch's own is context and others.
    free, total = torch.cuda.mem_get_info(device)
    torch_bytes = torch.cuda.memory_reserved(device)
    taken = total - free - torch_bytes
    reserved = own_context_bytes(used_before, gpu_used_bytes(uuid), torch_bytes - torch_before)
    del memory
    torch.cuda.empty_cache()
    profile = DeviceProfile(
        name=facts.name,
        kind="cuda",
        memory_bytes=total,
        read_bytes_per_s=read,
        attention_bytes_per_s=decode,
        attention_flop_per_s=prefill,
        launch_s=small_op_s,
        linear=tuple(linear),
        reserved_bytes=reserved,
    )
    notes = other_use_notes(taken - reserved, total)
    return _MeasuredGpu(profile=profile, link=link, uuid=uuid, notes=notes)


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

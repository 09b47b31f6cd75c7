"""HardwareProfile: what a machine's devices and links can do, and where each number is from."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from planner.errors import ProfileError
from planner.model_spec import WeightKind
from planner.priors import ASSUMED_FROM, assumed_rates

SCHEMA_VERSION = 1

DeviceKind = Literal["cpu", "cuda", "emulated"]
Provenance = Literal["measured", "datasheet"]
AcceleratorName = Literal["auto", "none", "cuda", "emulated"]
# Who computes a product: our kernels on packed weights, torch on rows, Intel's extension of torch.
Backend = Literal["numba", "torch", "ipex"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# Checked where a profile is read: a rate of 0 would divide by zero far from the file that has it.
PositiveInt = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(gt=0)]
Seconds = Annotated[float, Meta(ge=0)]


class LinearSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rate of `y = x W^T` for `num_tokens` rows of x, with W read from main memory (not cached).

    Profiles from before `backend` was written down hold the rates of our kernels.
    """

    dtype: WeightKind
    num_tokens: PositiveInt
    flop_per_s: Rate
    backend: Backend = "numba"


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates of one compute device.

    `read_bytes_per_s` is a plain sequential read of its memory. `linear` samples the matrix product
    kernel by token count and dtype. `attention_bytes_per_s` is KV bytes per second of the decode
    attention kernel, `attention_flop_per_s` the rate of prefill attention. `launch_s` is the cost
    of one small operation: on a CPU that of a link in a chain of our kernels, where torch's
    operations cost `torch_launch_s` (None: as much). `reserved_bytes` is taken by the runtime
    before any weight (a CUDA context).
    """

    name: str
    kind: DeviceKind
    memory_bytes: Annotated[int, Meta(ge=0)]
    read_bytes_per_s: Rate
    attention_bytes_per_s: Rate
    attention_flop_per_s: Rate
    launch_s: Seconds
    linear: tuple[LinearSample, ...]
    num_threads: PositiveInt = 1
    reserved_bytes: Annotated[int, Meta(ge=0)] = 0
    torch_launch_s: Seconds | None = None

    @property
    def torch_op_s(self) -> float:
        """Seconds of one small operation of torch."""
        return self.launch_s if self.torch_launch_s is None else self.torch_launch_s

    def backends(self, dtype: WeightKind) -> tuple[Backend, ...]:
        """Who has samples of a format, our kernels first."""
        found = {sample.backend for sample in self.linear if sample.dtype == dtype}
        return tuple(backend for backend in BACKENDS if backend in found)

    def linear_flop_per_s(
        self, dtype: WeightKind, num_tokens: float, backend: Backend | None = None
    ) -> float:
        """Rate of the matrix product at a token count: log-log between samples, flat outside.

        Parameters
        ----------
        backend
            Who computes it; None is the first of `backends`.

        Raises
        ------
        ProfileError
            The profile has no sample of this dtype, or none of this backend.
        """
        if backend is None:
            backend = next(iter(self.backends(dtype)), None)
        points = sorted(
            (s.num_tokens, s.flop_per_s)
            for s in self.linear
            if s.dtype == dtype and s.backend == backend
        )
        if not points and self.kind == "cpu" and backend in (None, "numba"):
            known = [
                (s.num_tokens, s.flop_per_s)
                for s in self.linear
                if s.dtype == ASSUMED_FROM and s.backend == "numba"
            ]
            points = assumed_rates(dtype, known)
        if not points:
            raise ProfileError(
                f"the profile of {self.name} has no rates for {dtype}; "
                "measure again with: hetero profile"
            )
        if num_tokens <= points[0][0]:
            # Below the first sample time is what stays constant, not the rate.
            return points[0][1] * num_tokens / points[0][0]
        for (x0, y0), (x1, y1) in pairwise(points):
            if num_tokens <= x1:
                share = math.log(num_tokens / x0) / math.log(x1 / x0)
                return float(y0 * (y1 / y0) ** share)
        return points[-1][1]


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates of the link between host and GPU; `pageable_*` where the host memory is not pinned."""

    name: str
    h2d_bytes_per_s: Rate
    d2h_bytes_per_s: Rate
    latency_s: Seconds
    pageable_h2d_bytes_per_s: Rate | None = None
    pageable_d2h_bytes_per_s: Rate | None = None


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which machine and which versions a measured profile belongs to.

    `instructions` is the level of vector instructions that kernels were compiled for, which is
    "unknown" for profiles from before it was written down.
    """

    cpu: str
    instructions: str = "unknown"
    num_cores: int
    memory_bytes: int
    gpu: str | None
    gpu_uuid: str | None
    driver: str | None
    torch: str
    numba: str
    hetero: str


class Resources(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a machine may be used; None leaves the profile's own value.

    `auto` takes the profile's GPU where it has one. `link_bytes_per_s` is the rate that the
    emulated accelerator's link is throttled to.
    """

    accelerator: AcceleratorName = "auto"
    gpu_bytes: int | None = None
    cpu_bytes: int | None = None
    link_bytes_per_s: float | None = None


class HardwareProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one machine can do: CPU rates by thread count, the GPU and its link where there is one.

    Notes
    -----
    `cpu_by_threads` holds the same CPU measured with different numbers of threads; `cpu` is the
    one that reads weights fastest at one token, which is what decode needs. `notes` are sentences
    on how far the numbers can be trusted.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    provenance: Provenance
    measured_at: str | None = None
    cpu_by_threads: tuple[DeviceProfile, ...]
    gpu: DeviceProfile | None = None
    link: LinkProfile | None = None
    fingerprint: Fingerprint | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {self.schema_version}, this is {SCHEMA_VERSION}")
        if not self.cpu_by_threads:
            raise ValueError("cpu_by_threads is empty")
        if (self.gpu is None) != (self.link is None):
            raise ValueError("gpu and link must be given together")

    @property
    def cpu(self) -> DeviceProfile:
        return max(self.cpu_by_threads, key=_decode_rate)

    @property
    def resources(self) -> Resources:
        """The resources that this profile stands for."""
        gpu, link = self.gpu, self.link
        if gpu is None or link is None:
            return Resources(accelerator="none", cpu_bytes=self.cpu.memory_bytes)
        is_emulated = gpu.kind == "emulated"
        return Resources(
            accelerator="emulated" if is_emulated else "cuda",
            gpu_bytes=gpu.memory_bytes,
            cpu_bytes=self.cpu.memory_bytes,
            link_bytes_per_s=link.h2d_bytes_per_s if is_emulated else None,
        )

    def without_gpu(self) -> HardwareProfile:
        """The same machine, its GPU left out."""
        return replace(self, gpu=None, link=None)

    def with_memory(self, *, cpu_bytes: int | None, gpu_bytes: int | None) -> HardwareProfile:
        """The same machine with less (or more) memory; None leaves a device as it is.

        A stated budget is the caller's own: nothing is taken off it for the runtime.
        """
        cpus, gpu = self.cpu_by_threads, self.gpu
        if cpu_bytes is not None:
            cpus = tuple(replace(cpu, memory_bytes=cpu_bytes, reserved_bytes=0) for cpu in cpus)
        if gpu is not None and gpu_bytes is not None and gpu_bytes != gpu.memory_bytes:
            # What the runtime takes of the whole card cannot be in a budget that nears it.
            usable_bytes = min(gpu_bytes, gpu.memory_bytes - gpu.reserved_bytes)
            gpu = replace(gpu, memory_bytes=usable_bytes, reserved_bytes=0)
        return replace(self, cpu_by_threads=cpus, gpu=gpu)

    def with_emulated_gpu(self, *, memory_bytes: int, link_bytes_per_s: float) -> HardwareProfile:
        """The machine as the emulated accelerator uses it.

        One core becomes the accelerator (its one-thread rates, `memory_bytes` taken from the host's
        memory, a link of `link_bytes_per_s` in each direction); the CPU keeps the other cores, or
        shares the one.
        """
        by_threads = sorted(self.cpu_by_threads, key=lambda cpu: cpu.num_threads)
        one = by_threads[0]
        rest = [cpu for cpu in by_threads if cpu.num_threads < by_threads[-1].num_threads]
        gpu = replace(
            one,
            name=f"emulated on {one.name}",
            kind="emulated",
            memory_bytes=memory_bytes,
            reserved_bytes=0,
            launch_s=one.torch_op_s,
            linear=_rows_products(one),
        )
        link = LinkProfile(
            name="emulated link",
            h2d_bytes_per_s=link_bytes_per_s,
            d2h_bytes_per_s=link_bytes_per_s,
            latency_s=EMULATED_LINK_LATENCY_S,
        )
        return replace(
            self,
            name=f"{self.name} + emulated accelerator",
            cpu_by_threads=tuple(
                replace(cpu, memory_bytes=max(0, cpu.memory_bytes - memory_bytes))
                for cpu in rest or [one]
            ),
            gpu=gpu,
            link=link,
        )

    def to_json(self) -> bytes:
        """The profile as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, source: str) -> HardwareProfile:
        """Read a profile; `source` names it in errors.

        Raises
        ------
        ProfileError
            Not JSON, an unknown or missing key, a wrong type.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ProfileError(f"{source} is not a hardware profile: {error}") from None

    @classmethod
    def load(cls, path: Path) -> HardwareProfile:
        """Read a profile from a file.

        Raises
        ------
        ProfileError
            The file is missing or is not a profile.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from None
        return cls.from_json(data, source=str(path))


# One hand-over to a parked thread; measured 100-200 us on two cores.
EMULATED_LINK_LATENCY_S = 150e-6


def _rows_products(cpu: DeviceProfile) -> tuple[LinearSample, ...]:
    """What a device that only has torch can do: torch's samples of a format where there are any."""
    by_torch = {sample.dtype for sample in cpu.linear if sample.backend == "torch"}
    return tuple(s for s in cpu.linear if s.backend == "torch" or s.dtype not in by_torch)


def _decode_rate(cpu: DeviceProfile) -> tuple[float, int]:
    """How fast a CPU setting decodes: one-token products first, then the read rate."""
    one_token = [s.flop_per_s for s in cpu.linear if s.num_tokens == 1]
    return (max(one_token, default=cpu.read_bytes_per_s), cpu.num_threads)

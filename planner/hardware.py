"""HardwareProfile: what a machine's devices and links can do, and where each number is from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from planner.device import DeviceProfile, LinkProfile, PositiveInt, Sample
from planner.errors import ProfileError
from planner.fingerprint import Fingerprint
from planner.kernels import BACKENDS, Backend
from planner.model_spec import WeightKind
from planner.speed_of_light import speed_of_light
from planner.strict_json import decode_struct

SCHEMA_VERSION = 2

Provenance = Literal["measured", "datasheet"]
Confidence = Literal["high", "low"]
AcceleratorName = Literal["auto", "none", "cuda", "emulated"]

# A sample may be faster than its device's ceilings by what rounding does to them.
_ROUNDING = 1e-6


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
    """What one machine can do: CPU ceilings by thread count, the GPU and its link, and samples.

    Notes
    -----
    `cpu_by_threads` holds the same CPU with different numbers of threads; `num_threads` is the
    number that it is used with, the one that decodes fastest (None: that reads fastest). `notes`
    are sentences on how far the numbers can be trusted; `confidence` is low where the machine was
    busy with other things while it was measured.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    provenance: Provenance
    measured_at: str | None = None
    confidence: Confidence = "high"
    num_threads: PositiveInt | None = None
    cpu_by_threads: tuple[DeviceProfile, ...]
    gpu: DeviceProfile | None = None
    link: LinkProfile | None = None
    fingerprint: Fingerprint | None = None
    notes: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {self.schema_version}, this is {SCHEMA_VERSION}")
        if not self.cpu_by_threads:
            raise ValueError("cpu_by_threads is empty")
        if (self.gpu is None) != (self.link is None):
            raise ValueError("gpu and link must be given together")
        counts = [cpu.num_threads for cpu in self.cpu_by_threads]
        if self.num_threads is not None and self.num_threads not in counts:
            raise ValueError(
                f"num_threads is {self.num_threads}, which cpu_by_threads does not have"
            )

    @property
    def cpu(self) -> DeviceProfile:
        """The CPU with the number of threads that it is used with."""
        for cpu in self.cpu_by_threads:
            if cpu.num_threads == self.num_threads:
                return cpu
        return max(self.cpu_by_threads, key=lambda cpu: (cpu.read_bytes_per_s, cpu.num_threads))

    def backends(self, kind: WeightKind) -> tuple[Backend, ...]:
        """Whose products of a format were measured on the CPU as it is used, our kernels first."""
        num_threads = self.cpu.num_threads
        found = {
            sample.backend
            for sample in self.samples
            if sample.kernel == "linear"
            and sample.lane == "cpu"
            and sample.format == kind
            and sample.num_threads == num_threads
        }
        return tuple(backend for backend in BACKENDS if backend in found)

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

        One core becomes the accelerator (what torch does with one thread, `memory_bytes` taken from
        the host's memory, a link of `link_bytes_per_s` in each direction); the CPU keeps the other
        cores, or shares the one.
        """
        by_threads = sorted(self.cpu_by_threads, key=lambda cpu: cpu.num_threads)
        one = by_threads[0]
        rest = [cpu for cpu in by_threads if cpu.num_threads < by_threads[-1].num_threads] or [one]
        gpu = replace(
            one,
            name=f"emulated on {one.name}",
            kind="emulated",
            memory_bytes=memory_bytes,
            reserved_bytes=0,
            launch_s=one.torch_op_s,
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
            num_threads=rest[-1].num_threads,
            cpu_by_threads=tuple(
                replace(cpu, memory_bytes=max(0, cpu.memory_bytes - memory_bytes)) for cpu in rest
            ),
            gpu=gpu,
            link=link,
            samples=(*self._cpu_samples(), *self._emulated_samples(one.num_threads)),
        )

    def _cpu_samples(self) -> tuple[Sample, ...]:
        return tuple(sample for sample in self.samples if sample.lane == "cpu")

    def _emulated_samples(self, num_threads: int) -> tuple[Sample, ...]:
        """What torch did with one thread, on rows and on panels, as samples of the `gpu` lane.

        A brief measurement has torch with the CPU's own number of threads only: then those, as much
        slower as one thread is.
        """
        by_torch = [each for each in self._cpu_samples() if each.backend in ("torch", "panels")]
        found = [sample for sample in by_torch if sample.num_threads == num_threads]
        if any(sample.kernel == "elementwise" for sample in found):
            return tuple(replace(sample, lane="gpu") for sample in found)
        one = next(cpu for cpu in self.cpu_by_threads if cpu.num_threads == num_threads)
        ratios = [self.cpu.read_bytes_per_s / one.read_bytes_per_s]
        ratios += [
            rate / one.flop_per_s[kind]
            for kind, rate in self.cpu.flop_per_s.items()
            if kind in one.flop_per_s
        ]
        slower = max(1.0, *ratios)
        return tuple(
            replace(sample, lane="gpu", num_threads=num_threads, seconds=slower * sample.seconds)
            for sample in by_torch
            if sample.num_threads == self.cpu.num_threads
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
            Not JSON, a key that is unknown, missing or twice there, a wrong type or value, a number
            that is not finite, a sample faster than the device's ceilings.
        """
        try:
            profile = decode_struct(data, cls)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{source} is not a hardware profile: {error}") from None
        reason = _why_impossible(profile)
        if reason is not None:
            raise ProfileError(f"{source} is not a hardware profile: {reason}")
        return profile

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
# A slow PCIe link: enough to rehearse a plan.
EMULATED_LINK_BYTES_PER_S = 4e9


def _why_impossible(profile: HardwareProfile) -> str | None:
    """The first sample that is faster than its device can be; None where there is none."""
    cpus = {cpu.num_threads: cpu for cpu in profile.cpu_by_threads}
    for index, sample in enumerate(profile.samples):
        if sample.lane in ("h2d", "d2h"):
            continue
        device = profile.gpu if sample.lane == "gpu" else cpus.get(sample.num_threads)
        if device is None:
            what = "the profile has no gpu"
            if sample.lane == "cpu":
                what = f"cpu_by_threads has no {sample.num_threads} threads"
            return f"{what} - at `$.samples[{index}]`"
        try:
            least_s = speed_of_light(sample.call, device).seconds
        except ProfileError as error:
            return f"{error} - at `$.samples[{index}].format`"
        if sample.seconds < least_s * (1 - _ROUNDING):
            return (
                f"{sample.seconds} s are less than the {least_s:.3g} s that the ceilings of "
                f"{device.name} allow - at `$.samples[{index}].seconds`"
            )
    return None

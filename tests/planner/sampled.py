"""Random devices and samples that could have been measured on them, for property tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st
from msgspec.structs import replace

from planner.device import DeviceKind, DeviceProfile, Sample
from planner.kernel_table import KernelTable
from planner.kernels import Backend, HostMemory, Kernel, KernelCall
from planner.model_spec import WeightKind
from planner.speed_of_light import speed_of_light
from planner.step_graph import Lane

# Rows of quantised matrices are whole groups of 128 weights, as models have them: with a part of a
# group a weight takes more bytes in one matrix than in another.
GROUP = 128

_FLOATS: tuple[WeightKind, ...] = ("float32", "bfloat16", "float16")
FORMATS: dict[Kernel, tuple[WeightKind, ...]] = {
    "linear": (*_FLOATS, "int8", "int4"),
    "experts": (*_FLOATS, "int8", "int4"),
    "decode_attention": _FLOATS,
    "prefill_attention": _FLOATS,
    **dict.fromkeys(("read", "norm", "route", "sample", "step", "copy"), ("float32",)),
}
KERNELS = tuple(FORMATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One kernel in one format: all that its calls have in common but rows and size."""

    kernel: Kernel
    format: WeightKind

    @property
    def lane(self) -> Lane:
        return "h2d" if self.kernel == "copy" else "cpu"

    def call(self, rows: int, size: int) -> KernelCall:
        """A call; the kernels without a size are all of one."""
        shapes: dict[Kernel, tuple[int, ...]] = {
            "linear": (size, 2 * GROUP),
            "experts": (3, GROUP, GROUP * size),
            "decode_attention": (8, 2, 64),
            "prefill_attention": (8, 2, 64),
            "route": (size, 1),
            "read": (rows,),
            "copy": (rows,),
            "step": (),
        }
        is_by_seqs = self.kernel in ("decode_attention", "sample", "step")
        memory: HostMemory | None = "pinned" if self.kernel == "copy" else None
        return KernelCall(
            kernel=self.kernel,
            shape=shapes.get(self.kernel, (size,)),
            format=self.format,
            num_tokens=1 if is_by_seqs or self.kernel in ("read", "copy") else rows,
            num_seqs=rows if is_by_seqs else 1,
            context=size if self.kernel == "decode_attention" else 0,
            memory=memory,
        )

    @property
    def has_size(self) -> bool:
        return self.kernel not in ("prefill_attention", "read", "step", "copy")


def sample_of(
    call: KernelCall, seconds: float, lane: Lane = "cpu", backend: Backend = "numba"
) -> Sample:
    """A measurement of a call."""
    return Sample(
        lane=lane,
        kernel=call.kernel,
        format=call.format,
        backend=backend,
        shape=tuple(int(number) for number in call.shape),
        num_tokens=int(call.num_tokens),
        num_seqs=int(call.num_seqs),
        context=int(call.context),
        memory=call.memory,
        seconds=seconds,
    )


rates = st.floats(1e6, 1e15)
# How much longer than a smaller call, or than light: often not at all, as kernels have steps.
factors = st.just(1.0) | st.floats(1.0, 50.0)


@st.composite
def devices(draw: st.DrawFn, kind: DeviceKind | None = None) -> DeviceProfile:
    """A device that computes enough for 1 to 1000 tokens in the time in which it reads a matrix.

    Some unpack weights slowly, some state a rate of elements.
    """
    unpacked: tuple[WeightKind, ...] = ("int8", "int4")
    kinds: tuple[DeviceKind, ...] = ("cpu", "cuda", "emulated") if kind is None else (kind,)
    read_bytes_per_s = draw(rates)
    return DeviceProfile(
        name="a device",
        kind=draw(st.sampled_from(kinds)),
        memory_bytes=0,
        read_bytes_per_s=read_bytes_per_s,
        flop_per_s={
            each: read_bytes_per_s * 2.0 ** draw(st.floats(0, 10)) for each in FORMATS["linear"]
        },
        dequant_per_s={
            each: read_bytes_per_s * 2.0 ** draw(st.floats(-1, 5))
            for each in (unpacked if draw(st.booleans()) else ())
        },
        elements_per_s=draw(st.none() | rates),
        launch_s=draw(st.floats(0.0, 1e-4)),
    )


axes = st.sampled_from(
    [Axis(kernel=kernel, format=each) for kernel in FORMATS for each in FORMATS[kernel]]
)


def grids(max_value: int) -> st.SearchStrategy[list[int]]:
    """A few places on an axis, ascending."""
    return st.sets(st.integers(1, max_value), min_size=1, max_size=4).map(sorted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A device, and samples of one kernel at crossings of some rows and sizes."""

    device: DeviceProfile
    axis: Axis
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    samples: tuple[Sample, ...]

    @property
    def table(self) -> KernelTable:
        return KernelTable(self.device, self.samples, self.axis.lane)


@st.composite
def sampled(draw: st.DrawFn, axis: Axis | None = None) -> Sampled:
    """Samples slower than the speed of light, that take no less for more rows or larger ones."""
    device, axis = draw(devices()), axis or draw(axes)
    rows = draw(grids(512))
    sizes = draw(grids(64)) if axis.has_size else [1]
    found: list[Sample] = []
    for index, size in enumerate(sizes):
        for place, each in enumerate(rows):
            call = axis.call(each, size)
            least_s = max(
                speed_of_light(call, device).seconds,
                found[-1].seconds if place else 0.0,
                found[-len(rows)].seconds if index else 0.0,
            )
            found.append(sample_of(call, least_s * draw(factors), axis.lane))
    return Sampled(
        device=device, axis=axis, rows=tuple(rows), sizes=tuple(sizes), samples=tuple(found)
    )


@st.composite
def staircases(draw: st.DrawFn) -> Sampled:
    """Samples of fewer rows the larger the size, as calls that take long are not measured."""
    full = draw(sampled())
    found: list[Sample] = []
    num_kept = len(full.rows)
    for index in range(len(full.sizes)):
        num_kept = draw(st.integers(1, num_kept))
        start = index * len(full.rows)
        found += full.samples[start : start + num_kept]
    return dataclasses.replace(full, samples=tuple(found))


def sped_up(device: DeviceProfile, factor: float) -> DeviceProfile:
    """The same device with all of its ceilings higher."""
    elements_per_s = device.elements_per_s
    return replace(
        device,
        read_bytes_per_s=factor * device.read_bytes_per_s,
        flop_per_s={kind: factor * rate for kind, rate in device.flop_per_s.items()},
        dequant_per_s={kind: factor * rate for kind, rate in device.dequant_per_s.items()},
        elements_per_s=None if elements_per_s is None else factor * elements_per_s,
        launch_s=device.launch_s / factor,
    )


def sped_up_samples(samples: Sequence[Sample], factor: float) -> tuple[Sample, ...]:
    return tuple(replace(sample, seconds=sample.seconds / factor) for sample in samples)

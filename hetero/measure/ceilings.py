"""Ceilings of a device: the fastest that any of its samples was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from planner.device import DeviceProfile, Sample
from planner.model_spec import WeightKind

# Samples lie on or below their ceilings; what rounding does must not lift one above.
_HEADROOM = 1.0 + 1e-9


def cpu_ceilings(
    samples: Iterable[Sample],
    *,
    name: str,
    memory_bytes: int,
    num_threads: int,
    read_bytes_per_s: float,
    launch_s: float,
    torch_launch_s: float,
) -> DeviceProfile:
    """The CPU with some number of threads, from its samples with as many."""
    found = list(samples)
    return DeviceProfile(
        name=name,
        kind="cpu",
        memory_bytes=memory_bytes,
        num_threads=num_threads,
        read_bytes_per_s=_fastest_read(found, read_bytes_per_s),
        flop_per_s=_fastest_products(found),
        dequant_per_s=_fastest_unpacking(found),
        elements_per_s=_fastest_elements(found),
        launch_s=launch_s,
        torch_launch_s=torch_launch_s,
    )


def raised(device: DeviceProfile, samples: Iterable[Sample]) -> DeviceProfile:
    """The device with ceilings that further samples of it lie below too."""
    found = list(samples)
    return replace(
        device,
        read_bytes_per_s=_fastest_read(found, device.read_bytes_per_s / _HEADROOM),
        flop_per_s=_highest(device.flop_per_s, _fastest_products(found)),
        dequant_per_s=_highest(device.dequant_per_s, _fastest_unpacking(found)),
    )


def filled(device: DeviceProfile, like: DeviceProfile, ratio: float) -> DeviceProfile:
    """The CPU with a number of threads at which few kernels were measured.

    What it lacks is that of `like`, the same CPU with other threads, times `ratio`.
    """
    flop_per_s: dict[WeightKind, float] = {
        kind: rate * ratio for kind, rate in like.flop_per_s.items()
    }
    dequant_per_s: dict[WeightKind, float] = {
        kind: rate * ratio for kind, rate in like.dequant_per_s.items()
    }
    elements_per_s = device.elements_per_s
    if elements_per_s is None and like.elements_per_s is not None:
        elements_per_s = like.elements_per_s * ratio
    return replace(
        device,
        flop_per_s=_highest(flop_per_s, device.flop_per_s),
        dequant_per_s=dequant_per_s | device.dequant_per_s,
        elements_per_s=elements_per_s,
    )


def gpu_ceilings(
    samples: Iterable[Sample],
    *,
    name: str,
    memory_bytes: int,
    reserved_bytes: int,
    read_bytes_per_s: float,
    launch_s: float,
) -> DeviceProfile:
    """A GPU, from its samples."""
    found = list(samples)
    return DeviceProfile(
        name=name,
        kind="cuda",
        memory_bytes=memory_bytes,
        reserved_bytes=reserved_bytes,
        read_bytes_per_s=_fastest_read(found, read_bytes_per_s),
        flop_per_s=_fastest_products(found),
        elements_per_s=_fastest_elements(found),
        launch_s=launch_s,
    )


def _fastest_read(samples: list[Sample], plain: float) -> float:
    """Bytes per second of plain reads, or of a kernel that did better: part of it was cached."""
    rates = (each.call.bytes / each.seconds for each in samples)
    return max([plain, *rates]) * _HEADROOM


def _fastest_products(samples: list[Sample]) -> dict[WeightKind, float]:
    rates = ((each.format, each.call.flops / each.seconds) for each in samples)
    return _highest(*({kind: rate * _HEADROOM} for kind, rate in rates if rate))


def _fastest_unpacking(samples: list[Sample]) -> dict[WeightKind, float]:
    packed = (each for each in samples if each.format in ("int8", "int4"))
    rates = ((each.format, each.call.num_weights / each.seconds) for each in packed)
    return _highest(*({kind: rate * _HEADROOM} for kind, rate in rates if rate))


def _highest(*rates: Mapping[WeightKind, float]) -> dict[WeightKind, float]:
    """Of each format the highest rate."""
    found: dict[WeightKind, float] = {}
    for each in rates:
        for kind, rate in each.items():
            found[kind] = max(rate, found.get(kind, 0.0))
    return found


def _fastest_elements(samples: list[Sample]) -> float | None:
    rates = [each.call.num_elements / each.seconds for each in samples]
    fastest = max(rates, default=0.0)
    return fastest * _HEADROOM if fastest > 0 else None

"""What if: a machine with another memory, link or rate, its samples changed along with it."""

from __future__ import annotations

import math
from typing import Literal

from msgspec.structs import replace

from planner.device import DeviceProfile, LinkProfile, Sample
from planner.errors import PlannerError
from planner.hardware import HardwareProfile
from planner.priors import prior
from planner.speed_of_light import speed_of_light

# What of a machine can be faster by itself.
Rate = Literal["cpu memory", "cpu compute", "gpu memory", "gpu compute", "link"]
RATES: tuple[Rate, ...] = ("cpu memory", "cpu compute", "gpu memory", "gpu compute", "link")

KEYS = ("gpu-mem-gb", "cpu-mem-gb", "link", "cpu-gbps", "gpu-gbps")

# Bytes per second that copies of pinned memory achieve in one direction, by PCIe generation and
# lanes. x16: 11-13, 20-26 and 50-57 GB/s published; x8 of 5.0: the Arc Pro B60's 28.4 GB/s; the
# others in proportion to the lanes.
PCIE_BYTES_PER_S: dict[str, float] = {
    "3.0x4": 3e9,
    "3.0x8": 6e9,
    "3.0x16": 12e9,
    "4.0x4": 6.25e9,
    "4.0x8": 12.5e9,
    "4.0x16": 25e9,
    "5.0x4": 14.2e9,
    "5.0x8": 28.4e9,
    "5.0x16": 53.5e9,
}
_MIN_NUMBER, _MAX_NUMBER = 1e-6, 1e6


def what_if(hardware: HardwareProfile, text: str) -> HardwareProfile:
    """A machine that is another in what a text says of it, as `gpu-mem-gb=24,link=4.0x8`.

    Parameters
    ----------
    hardware : HardwareProfile
        The machine as it is; samples change with the rates (`with_rates`).
    text : str
        `key=value` pairs with commas between them. `gpu-mem-gb` and `cpu-mem-gb`: a device's
        memory in 1e9 bytes, of which the runtime takes as much as before. `link`: a PCIe
        generation and lanes (`3.0`, `4.0` or `5.0` with `x4`, `x8` or `x16`), or a rate in 1e9
        bytes per second; both are what copies of pinned memory achieve, the former published
        figures (`PCIE_BYTES_PER_S`), of which real machines are 10 % away to either side.
        `cpu-gbps` and `gpu-gbps`: the rate at which the memory is read, as the profile states it
        (a datasheet's is nominal), in 1e9 bytes per second.

    Returns
    -------
    HardwareProfile
        Its name, and that of its CPU, say what was changed, so that a plan for it is not taken for
        one of the machine as it is.

    Raises
    ------
    PlannerError
        A key that is unknown, given twice, or of a GPU that the machine lacks; a value that is not
        one. Names the key and the value.

    Examples
    --------
    >>> from pathlib import Path
    >>> machine = HardwareProfile.load(Path("profiles/machines/desktop-rtx4090.json"))
    >>> what_if(machine, "gpu-mem-gb=48").gpu.memory_bytes
    48000000000
    """
    changed, pairs = hardware, _pairs(text)
    for key, value in pairs.items():
        changed = _with_change(changed, key, value)
    said = ", ".join(f"{key}={value}" for key, value in pairs.items())
    cpus = tuple(replace(cpu, name=f"{cpu.name}, what if {said}") for cpu in changed.cpu_by_threads)
    return replace(changed, name=f"{hardware.name}, what if {said}", cpu_by_threads=cpus)


def what_if_keys(text: str) -> tuple[str, ...]:
    """The keys of a text that `what_if` takes, in their order."""
    return tuple(_pairs(text))


def with_rates(hardware: HardwareProfile, rate: Rate, factor: float) -> HardwareProfile:
    """The same machine with one of its rates multiplied, and its samples with it.

    A sample keeps its utilisation: its seconds change as much as the speed of light of its call
    does, so that what another resource binds stays as it was. A copy of pinned memory is faster by
    what the link's rate takes of it and keeps the time that starting it takes; one of pageable
    memory is bound by the core that stages it, and only ever slower. Elements of norms go with the
    memory, unpacking of weights with the products.
    """
    if rate == "link":
        return _with_link_factor(hardware, factor)
    scaled = _with_memory_rate if rate in ("cpu memory", "gpu memory") else _with_compute_rate
    changed = hardware
    if rate in ("cpu memory", "cpu compute"):
        cpus = tuple(scaled(cpu, factor) for cpu in hardware.cpu_by_threads)
        changed = replace(hardware, cpu_by_threads=cpus)
    elif hardware.gpu is not None:
        changed = replace(hardware, gpu=scaled(hardware.gpu, factor))
    samples = tuple(_with_utilisation(each, hardware, changed) for each in hardware.samples)
    return replace(changed, samples=samples)


def with_pageable_copies(hardware: HardwareProfile) -> HardwareProfile | None:
    """The same machine with host memory that cannot be pinned; None where its rates are not known.

    All copies cost what they were measured to cost from and to pageable memory.
    """
    link = hardware.link
    if link is None:
        return None
    h2d_bytes_per_s, d2h_bytes_per_s = link.pageable_h2d_bytes_per_s, link.pageable_d2h_bytes_per_s
    if h2d_bytes_per_s is None or d2h_bytes_per_s is None:
        return None
    samples = tuple(
        replace(sample, memory="pinned") if sample.memory == "pageable" else sample
        for sample in hardware.samples
        if sample.memory != "pinned"
    )
    slower = replace(link, h2d_bytes_per_s=h2d_bytes_per_s, d2h_bytes_per_s=d2h_bytes_per_s)
    return replace(hardware, link=slower, samples=samples)


def with_more_gpu_memory(hardware: HardwareProfile, num_bytes: int) -> HardwareProfile:
    """The same machine with more GPU memory, of which the runtime takes no more than before."""
    assert hardware.gpu is not None
    gpu = replace(hardware.gpu, memory_bytes=hardware.gpu.memory_bytes + num_bytes)
    return replace(hardware, gpu=gpu)


def _with_memory_rate(device: DeviceProfile, factor: float) -> DeviceProfile:
    elements_per_s = device.elements_per_s
    return replace(
        device,
        read_bytes_per_s=factor * device.read_bytes_per_s,
        elements_per_s=None if elements_per_s is None else factor * elements_per_s,
    )


def _with_compute_rate(device: DeviceProfile, factor: float) -> DeviceProfile:
    return replace(
        device,
        flop_per_s={kind: factor * rate for kind, rate in device.flop_per_s.items()},
        dequant_per_s={kind: factor * rate for kind, rate in device.dequant_per_s.items()},
    )


def _device_of(sample: Sample, hardware: HardwareProfile) -> DeviceProfile | None:
    """The device that a sample is of; None where the profile has none like it."""
    if sample.lane == "gpu":
        return hardware.gpu
    cpus = {cpu.num_threads: cpu for cpu in hardware.cpu_by_threads}
    return cpus.get(sample.num_threads) if sample.lane == "cpu" else None


def _with_utilisation(sample: Sample, before: HardwareProfile, after: HardwareProfile) -> Sample:
    """A sample as it would be on the changed machine."""
    device, changed = _device_of(sample, before), _device_of(sample, after)
    if device is None or changed is None or device == changed:
        return sample
    light_s = speed_of_light(sample.call, device).seconds
    return replace(
        sample, seconds=sample.seconds * speed_of_light(sample.call, changed).seconds / light_s
    )


def _with_link_factor(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    link = hardware.link
    if link is None:
        return hardware
    h2d_bytes_per_s = factor * link.h2d_bytes_per_s
    return _with_link(
        hardware,
        replace(
            link,
            h2d_bytes_per_s=h2d_bytes_per_s,
            d2h_bytes_per_s=factor * link.d2h_bytes_per_s,
            pageable_h2d_bytes_per_s=_at_most(link.pageable_h2d_bytes_per_s, h2d_bytes_per_s),
            pageable_d2h_bytes_per_s=_at_most(
                link.pageable_d2h_bytes_per_s, factor * link.d2h_bytes_per_s
            ),
        ),
    )


def _at_most(rate: float | None, limit: float) -> float | None:
    return None if rate is None else min(rate, limit)


def _with_link(hardware: HardwareProfile, changed: LinkProfile) -> HardwareProfile:
    link = hardware.link
    assert link is not None
    factors = {
        "h2d": changed.h2d_bytes_per_s / link.h2d_bytes_per_s,
        "d2h": changed.d2h_bytes_per_s / link.d2h_bytes_per_s,
    }
    rates = {"h2d": link.h2d_bytes_per_s, "d2h": link.d2h_bytes_per_s}
    for sample in hardware.samples:
        if sample.lane in rates:
            # the ceiling of copies, as the cost model has it, is no less than the fastest of them
            rates[sample.lane] = max(rates[sample.lane], sample.shape[0] / sample.seconds)
    samples = tuple(
        _with_link_rate(each, rates[each.lane], factors[each.lane]) if each.lane in rates else each
        for each in hardware.samples
    )
    return replace(hardware, link=changed, samples=samples)


def _with_link_rate(copy: Sample, bytes_per_s: float, factor: float) -> Sample:
    """A copy over a link of `factor` times the rate."""
    light_s = copy.shape[0] / bytes_per_s
    if copy.memory == "pageable":
        return replace(copy, seconds=max(copy.seconds, light_s / factor))
    return replace(copy, seconds=copy.seconds - light_s + light_s / factor)


def _pairs(text: str) -> dict[str, str]:
    """Keys and values as they are written, in their order."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals:
            raise PlannerError(
                f"{part.strip()!r} is no key=value; known keys are {', '.join(KEYS)}"
            )
        if key not in KEYS:
            raise PlannerError(f"{key!r} is not one of {', '.join(KEYS)}")
        if key in pairs:
            raise PlannerError(f"{key} is given twice, as {pairs[key]!r} and {value!r}; keep one")
        pairs[key] = value
    return pairs


def _with_change(hardware: HardwareProfile, key: str, value: str) -> HardwareProfile:
    """The machine with one key changed."""
    if key != "link" and not key.startswith("gpu"):
        if key == "cpu-mem-gb":
            num_bytes = round(1e9 * _number(key, value, "1e9 bytes"))
            cpus = tuple(replace(cpu, memory_bytes=num_bytes) for cpu in hardware.cpu_by_threads)
            return replace(hardware, cpu_by_threads=cpus)
        asked = 1e9 * _number(key, value, "1e9 bytes per second")
        return with_rates(hardware, "cpu memory", asked / hardware.cpu.read_bytes_per_s)
    gpu, link = hardware.gpu, hardware.link
    if gpu is None or link is None:
        raise PlannerError(
            f"{key} is {value!r} but {hardware.name} has no GPU that may be used; leave {key} out"
        )
    if key == "gpu-mem-gb":
        num_bytes = round(1e9 * _number(key, value, "1e9 bytes"))
        return replace(hardware, gpu=replace(gpu, memory_bytes=num_bytes))
    if key == "gpu-gbps":
        asked = 1e9 * _number(key, value, "1e9 bytes per second")
        return with_rates(hardware, "gpu memory", asked / gpu.read_bytes_per_s)
    rate = _link_ceiling(hardware, _link_bytes_per_s(value))
    changed = replace(
        link,
        name=f"PCIe {value.replace('x', ' x')}" if value in PCIE_BYTES_PER_S else f"{value} GB/s",
        h2d_bytes_per_s=rate,
        d2h_bytes_per_s=rate,
        pageable_h2d_bytes_per_s=_at_most(link.pageable_h2d_bytes_per_s, rate),
        pageable_d2h_bytes_per_s=_at_most(link.pageable_d2h_bytes_per_s, rate),
    )
    return _with_link(hardware, changed)


def _link_bytes_per_s(value: str) -> float:
    """The rate that copies achieve, of a PCIe generation and lanes or as it is."""
    known = PCIE_BYTES_PER_S.get(value)
    if known is not None:
        return known
    kinds = ", ".join(PCIE_BYTES_PER_S)
    return 1e9 * _number("link", value, f"1e9 bytes per second, or one of {kinds}")


def _link_ceiling(hardware: HardwareProfile, achieved_bytes_per_s: float) -> float:
    """The profile's rate with which copies achieve a rate.

    A datasheet's is a ceiling of which copies are assumed to reach a share; a measured one, and
    that of an emulated link, is reached.
    """
    assert hardware.gpu is not None
    is_measured = any(sample.lane == "h2d" for sample in hardware.samples)
    if is_measured or hardware.gpu.kind != "cuda":
        return achieved_bytes_per_s
    return achieved_bytes_per_s / prior("copy", "link", "cuda", "float32").utilisation


def _number(key: str, value: str, unit: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    # not `number <= 0`, which a value that is no number passes
    if not _MIN_NUMBER <= number < _MAX_NUMBER:
        raise PlannerError(
            f"{key} is {value!r} but must be a positive number below {_MAX_NUMBER:.0f} of {unit}, "
            f"and {_MIN_NUMBER:g} at least"
        )
    return number

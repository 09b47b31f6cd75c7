"""KernelTable: seconds of a kernel's call, from samples by utilisation, or from documented priors.

The seconds of a call are its speed of light divided by a utilisation. That of a sample is its own
speed of light over its seconds; between samples its logarithm is interpolated over the logarithms
of rows (tokens, sequences) and of size (weights of a matrix, context); outside them the utilisation
of the boundary holds (the recipe of aiconfigurator, which reports 4.9 % median leave-one-out
error for products).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from planner.device import DeviceProfile, Sample
from planner.kernels import Backend, Family, Kernel, KernelCall, Resource
from planner.model_spec import WeightKind
from planner.priors import (
    EMBED_LAUNCHES,
    GPU_HALF_RATE_BYTES,
    HANDOVER_S,
    OP_LAUNCHES,
    P90_SIGMAS,
    STEP_LAUNCHES,
    Prior,
    prior,
)
from planner.speed_of_light import SpeedOfLight, speed_of_light
from planner.step_graph import Lane

# Where an estimate is from, best first: a sample of this very call; between samples; beyond them;
# samples of another thread count, backend, format or head shape; nothing measured at all.
Source = Literal["measured", "interpolated", "extrapolated", "assumed", "prior"]
SOURCES: tuple[Source, ...] = ("measured", "interpolated", "extrapolated", "assumed", "prior")

# Standard deviations of the logarithm of seconds. The same call measured twice on a quiet machine;
# between samples, aiconfigurator's leave-one-out error; for each factor of e beyond them; and where
# samples of something else had to do.
_REPEAT_SIGMA = 0.02
_INSIDE_SIGMA = 0.05
_BEYOND_SIGMA = 0.06
_MAX_BEYOND_SIGMA = 0.5
_ASSUMED_SIGMA = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEstimate:
    """Predicted seconds of a call: the median, and how far it may be off.

    `sigma` is the standard deviation of the logarithm of the seconds.
    """

    seconds: float
    sigma: float
    least_s: float
    resource: Resource
    source: Source

    @property
    def low_s(self) -> float:
        """10th percentile of the seconds, never below the speed of light."""
        return max(self.least_s, self.seconds * math.exp(-P90_SIGMAS * self.sigma))

    @property
    def high_s(self) -> float:
        """90th percentile of the seconds."""
        return self.seconds * math.exp(P90_SIGMAS * self.sigma)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """A sample on its level: rows, and seconds of one piece."""

    rows: float
    seconds: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """Samples of one size on one device, by rising rows; `call` is one of them."""

    size: float
    call: KernelCall
    device: DeviceProfile
    points: tuple[_Point, ...]


_LAUNCHES: dict[Kernel, Prior] = {
    "op": OP_LAUNCHES,
    "step": STEP_LAUNCHES,
    "embed": EMBED_LAUNCHES,
}


class _Key(NamedTuple):
    """What samples must share to be interpolated between."""

    kernel: Kernel
    backend: Backend
    format: WeightKind
    family: Family
    num_threads: int


class KernelTable:
    """Samples of one lane's kernels on one device, for interpolation.

    Parameters
    ----------
    device : DeviceProfile
        Its ceilings; `num_threads` says which samples are its own.
    samples : iterable of Sample
        Those of other lanes, or measured beside other work, are left out.
    lane : {'cpu', 'gpu'}
    others : iterable of DeviceProfile
        The same device with other numbers of threads, whose samples stand in for what it lacks.
    """

    def __init__(
        self,
        device: DeviceProfile,
        samples: Iterable[Sample],
        lane: Lane,
        others: Iterable[DeviceProfile] = (),
    ) -> None:
        self.device = device
        self._threads = device.num_threads if lane == "cpu" else 1
        devices = {other.num_threads: other for other in others} | {self._threads: device}
        self._exact: dict[tuple[object, ...], Sample] = {}
        grouped: dict[_Key, list[Sample]] = {}
        for sample in samples:
            if sample.lane != lane or sample.busy:
                continue
            threads = sample.num_threads if lane == "cpu" else 1
            call = sample.call
            if threads == self._threads:
                self._exact[_identity(call)] = sample
            if threads in devices:
                grouped.setdefault(_key(call, threads), []).append(sample)
        self._levels = {
            key: _make_levels(group, devices[group[0].num_threads if lane == "cpu" else 1])
            for key, group in grouped.items()
        }
        self._found: dict[_Key, tuple[tuple[_Level, ...], bool] | None] = {}
        self._seen: dict[tuple[int, int, float], tuple[float, float, float]] = {}

    def estimate(self, call: KernelCall) -> KernelEstimate:
        """Predict one call.

        Raises
        ------
        ProfileError
            The device has neither samples nor ceilings for the call's format.
        """
        exact = self._exact.get(_identity(call))
        if exact is not None:
            light = speed_of_light(call, self.device)
            return KernelEstimate(
                seconds=exact.seconds,
                sigma=max(_REPEAT_SIGMA, _spread_sigma(exact.spread)),
                least_s=min(exact.seconds, light.seconds),
                resource=light.resource,
                source="measured",
            )
        light = speed_of_light(call, self.device)
        found = self._find(call)
        if found is None:
            return self._from_prior(call, light)
        levels, is_own = found
        seconds, beyond, spread = self._interpolate(levels, call, light.seconds)
        sigma = max(_REPEAT_SIGMA, _spread_sigma(spread), _INSIDE_SIGMA)
        sigma += min(_MAX_BEYOND_SIGMA, _BEYOND_SIGMA * beyond)
        source: Source = "interpolated" if beyond == 0 else "extrapolated"
        if not is_own:
            sigma, source = math.hypot(sigma, _ASSUMED_SIGMA), "assumed"
        return KernelEstimate(
            seconds=seconds,
            sigma=sigma,
            least_s=light.seconds,
            resource=light.resource,
            source=source,
        )

    def _find(self, call: KernelCall) -> tuple[tuple[_Level, ...], bool] | None:
        """Levels to interpolate between, and whether they are the call's own."""
        key = _key(call, self._threads)
        if key not in self._found:
            self._found[key] = self._find_anew(key)
        return self._found[key]

    def _find_anew(self, key: _Key) -> tuple[tuple[_Level, ...], bool] | None:
        if key in self._levels:
            return self._levels[key], True
        # Kernel and backend must be the same; format, heads and threads may be others', in order
        # of what matters least: utilisation is relative to each one's ceilings.
        others = [other for other in self._levels if other[:2] == key[:2]]
        if not others:
            return None

        def distance(other: _Key) -> tuple[bool, bool, float, float]:
            return (
                other.format != key.format,
                other.family != key.family,
                _family_distance(other.family, key.family),
                abs(math.log(other.num_threads / key.num_threads)),
            )

        return self._levels[min(others, key=distance)], False

    def _interpolate(
        self, levels: tuple[_Level, ...], call: KernelCall, light_s: float
    ) -> tuple[float, float, float]:
        """Seconds; how far beyond the samples, as a logarithm; the spread of the nearest."""
        rows, size = call.axes
        utilisations: list[float] = []
        beyonds: list[float] = []
        index = bisect_left([level.size for level in levels], size)
        around = range(max(0, index - 1), min(index + 1, len(levels)))
        for position in around:
            at_s, own_light_s, beyond = self._on_levels(levels, position, rows)
            utilisations.append(own_light_s / at_s)
            beyonds.append(beyond)
        spread = max(point.spread for point in levels[around[-1]].points)
        if 0 < index < len(levels):
            share = math.log(size / levels[index - 1].size)
            share /= math.log(levels[index].size / levels[index - 1].size)
            utilisation = utilisations[-2] ** (1 - share) * utilisations[-1] ** share
            beyond_size, beyond_rows = 0.0, beyonds[-2] * (1 - share) + beyonds[-1] * share
        else:
            nearest = levels[min(index, len(levels) - 1)]
            utilisation = utilisations[-1]
            beyond_size = abs(math.log(size / nearest.size)) if size != nearest.size else 0.0
            beyond_rows = beyonds[-1]
        return light_s / min(1.0, utilisation), beyond_rows + beyond_size, spread

    def _on_levels(
        self, levels: tuple[_Level, ...], index: int, rows: float
    ) -> tuple[float, float, float]:
        """What `_on_level` says of one of these levels, by what it says of the smaller ones.

        Larger matrices take longer: where a sample says otherwise it is noise. Large calls are
        measured for few rows only: for more a level goes on as the next smaller one does.
        """
        key = (id(levels), index, rows)
        found = self._seen.get(key)
        if found is not None:
            return found
        level, smaller = levels[index], levels[:index]
        own_s, light_s, beyond = _on_level(level, rows)
        if smaller:
            smaller_s, _, smaller_beyond = self._on_levels(levels, index - 1, rows)
            last = level.points[-1]
            if rows > last.rows and any(each.points[-1].rows > last.rows for each in smaller):
                there_s, _, _ = self._on_levels(levels, index - 1, last.rows)
                own_s = last.seconds / there_s * smaller_s
                beyond = min(beyond, smaller_beyond + math.log(level.size / smaller[-1].size))
            own_s = max(own_s, smaller_s)
        self._seen[key] = (own_s, light_s, beyond)
        return self._seen[key]

    def _from_prior(self, call: KernelCall, light: SpeedOfLight) -> KernelEstimate:
        """Nothing like it was measured."""
        device = self.device
        if light.resource == "launch":
            if call.kernel == "handover":
                fixed, seconds = HANDOVER_S, HANDOVER_S.utilisation
            else:
                fixed = _LAUNCHES[call.kernel]
                seconds = fixed.utilisation * device.torch_op_s
            return KernelEstimate(
                seconds=seconds,
                sigma=fixed.sigma,
                least_s=0.0,
                resource="launch",
                source="prior",
            )
        # The resource that takes longest at the share that is reached of it: a call with more to
        # compute or to read is then never faster, though the shares of two resources differ.
        assumed = {name: prior(call.kernel, name, device.kind, call.format) for name in light.parts}
        parts = {name: part / assumed[name].utilisation for name, part in light.parts.items()}
        if device.kind == "cuda" and call.num_weights:
            parts["memory"] *= 1.0 + GPU_HALF_RATE_BYTES * call.count / call.bytes
        resource = max(parts, key=lambda name: parts[name])
        return KernelEstimate(
            seconds=parts[resource],
            sigma=assumed[resource].sigma,
            least_s=light.seconds,
            resource=resource,
            source="prior",
        )


def _make_levels(group: list[Sample], device: DeviceProfile) -> tuple[_Level, ...]:
    """Samples by size and rows; those of one place count by their geometric mean.

    Seconds never fall as rows rise: what little they do is noise.
    """
    by_size: dict[float, dict[float, list[Sample]]] = {}
    for sample in group:
        rows, size = sample.call.axes
        by_size.setdefault(size, {}).setdefault(rows, []).append(sample)
    levels = []
    for size, by_rows in sorted(by_size.items()):
        points: list[_Point] = []
        call = next(iter(by_rows.values()))[0].call
        for rows, found in sorted(by_rows.items()):
            seconds = math.exp(
                sum(math.log(_alike_s(each, call, rows, device)) for each in found) / len(found)
            )
            points.append(
                _Point(
                    rows=rows,
                    seconds=max(seconds, points[-1].seconds if points else 0.0),
                    spread=max(each.spread for each in found),
                )
            )
        levels.append(_Level(size=size, call=call, device=device, points=tuple(points)))
    return tuple(levels)


def _alike_s(sample: Sample, call: KernelCall, rows: float, device: DeviceProfile) -> float:
    """Seconds of a piece of a sample, had it the shape and past of `call`: of equal utilisation."""
    own = sample.call
    own_light_s = speed_of_light(own, device).seconds / own.count
    return sample.seconds / own.count * _sized_light_s(call, rows, device) / own_light_s


def _light_s(level: _Level, rows: float) -> float:
    """The least seconds of a piece of a level's size, for so many rows, on the level's device."""
    return _sized_light_s(level.call, rows, level.device)


def _sized_light_s(call: KernelCall, rows: float, device: DeviceProfile) -> float:
    return speed_of_light(call.with_rows(rows), device).seconds / call.count


def _on_level(level: _Level, rows: float) -> tuple[float, float, float]:
    """Seconds and speed of light of a piece of this size; how far beyond its samples."""
    points = level.points
    index = bisect_left([point.rows for point in points], rows)
    here_s = _light_s(level, rows)
    if index == len(points):
        last = points[-1]
        utilisation = _light_s(level, last.rows) / last.seconds
        return here_s / utilisation, here_s, math.log(rows / last.rows)
    after = points[index]
    if index == 0:
        if level.call.kernel == "copy":
            # starting it is all that a small one takes
            return after.seconds, here_s, math.log(after.rows / rows)
        utilisation = _light_s(level, after.rows) / after.seconds
        beyond = math.log(after.rows / rows) if rows < after.rows else 0.0
        return here_s / utilisation, here_s, beyond
    before = points[index - 1]
    share = math.log(rows / before.rows) / math.log(after.rows / before.rows)
    first = _light_s(level, before.rows) / before.seconds
    last_one = _light_s(level, after.rows) / after.seconds
    seconds = here_s / (first ** (1 - share) * last_one**share)
    return min(after.seconds, max(before.seconds, seconds)), here_s, 0.0


def _identity(call: KernelCall) -> tuple[object, ...]:
    return (
        call.kernel,
        call.backend,
        call.format,
        call.shape,
        call.num_tokens,
        call.num_seqs,
        call.context,
        call.memory,
    )


def _key(call: KernelCall, num_threads: int) -> _Key:
    return _Key(call.kernel, call.backend, call.format, call.family, num_threads)


def _family_distance(other: Family, wanted: Family) -> float:
    """How unlike two families of a kernel are: numbers by the logarithm of their ratio."""
    if isinstance(other, float) and isinstance(wanted, float):
        return abs(math.log(other / wanted))
    return 0.0 if other == wanted else 1.0


def _spread_sigma(spread: float) -> float:
    """Standard deviation of the logarithm, from the distance of the 10th and 90th percentile."""
    return math.log1p(spread) / (2 * P90_SIGMAS)

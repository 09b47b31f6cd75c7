"""Measure again what was disturbed: a neighbour's burst lasts longer than one sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.device import Sample
from planner.kernels import Kernel

Probe = Callable[[], Sample]

# A quiet machine repeats a kernel within this; what varies more was disturbed.
_MAX_SPREAD = 0.1
# More rows never take less time; a sample that took so much longer than a larger one was disturbed.
_MAX_EXCESS = 1.03
# Nor do more rows of as large matrices lower the rate by more than this.
_MIN_RATE = 0.85
# A core that another guest of the host shares runs a product at half its rate; one that is alone
# varies by a few percent.
_MAX_PACE = 1.15
_MAX_ROUNDS = 3
# While the machine is slow nothing is gained by measuring.
_WAIT_S = 0.05
# Of few rows measured with cold caches, of many with warm ones: not to be compared.
_COLD_KERNELS: tuple[Kernel, ...] = ("elementwise", "sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """What a probe gave, and the slower pace of those before and after it."""

    sample: Sample
    pace_s: float


class Settling:
    """Runs probes once, and again those that were disturbed. Mutable.

    Disturbed are samples that vary much, those that are slower than others of the same kernel say,
    and those beside which the machine was slow at everything. Neighbours make work slower and never
    faster, so of several samples of a probe the fastest median counts.

    Parameters
    ----------
    pace : callable
        Seconds of the same short work each time it is called.
    """

    def __init__(self, pace: Callable[[], float]) -> None:
        self._pace = pace
        self._last_s = self._fastest_s = pace()
        self._probes: list[Probe] = []
        self._readings: list[_Reading] = []

    def run(self, probes: Sequence[Probe]) -> None:
        """Run every probe once."""
        self._probes += probes
        self._readings += [self._read(probe) for probe in probes]

    def settle(self, budget_s: float) -> list[Sample]:
        """Run the disturbed ones again for so many seconds; the samples in the order of probes."""
        deadline = time.perf_counter() + budget_s
        for _ in range(_MAX_ROUNDS):
            for index in self._disturbed():
                self._await_pace(deadline)
                if time.perf_counter() > deadline:
                    return [reading.sample for reading in self._readings]
                other = self._read(self._probes[index])
                if other.sample.seconds < self._readings[index].sample.seconds:
                    self._readings[index] = other
        return [reading.sample for reading in self._readings]

    def _read(self, probe: Probe) -> _Reading:
        before_s, sample = self._last_s, probe()
        self._last_s = self._pace()
        self._fastest_s = min(self._fastest_s, self._last_s)
        return _Reading(sample=sample, pace_s=max(before_s, self._last_s))

    def _await_pace(self, deadline: float) -> None:
        self._last_s = self._pace()
        while self._is_slow(self._last_s) and time.perf_counter() < deadline:
            time.sleep(_WAIT_S)
            self._last_s = self._pace()

    def _is_slow(self, pace_s: float) -> bool:
        return pace_s > _MAX_PACE * self._fastest_s

    def _disturbed(self) -> list[int]:
        """Positions of the probes to run again: first those beside which everything was slow."""
        slow = {index for index, each in enumerate(self._readings) if self._is_slow(each.pace_s)}
        others = set(disturbed([reading.sample for reading in self._readings])) - slow
        return [*sorted(slow), *sorted(others)]


def disturbed(samples: Sequence[Sample]) -> list[int]:
    """Positions of the samples to measure again.

    Examples
    --------
    >>> one = Sample(lane="cpu", kernel="norm", shape=(8,), num_tokens=1, seconds=2.0)
    >>> two = Sample(lane="cpu", kernel="norm", shape=(8,), num_tokens=2, seconds=1.0)
    >>> disturbed([one, two])
    [0]
    """
    found = {index for index, sample in enumerate(samples) if sample.spread > _MAX_SPREAD}
    families: dict[tuple[object, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        call = sample.call
        if call.kernel in _COLD_KERNELS:
            continue
        key = (sample.lane, call.kernel, call.backend, call.format, call.family)
        families.setdefault((*key, sample.num_threads), []).append(index)
    for members in families.values():
        for index in members:
            others = [samples[other] for other in members]
            if any(_is_slower(samples[index], other) for other in others):
                found.add(index)
    return sorted(found)


def _is_slower(sample: Sample, other: Sample) -> bool:
    """Was a sample slower than another of its kernel says that it is?

    It took longer for less, or it got less done in its seconds though it has more rows of no
    smaller pieces: two threads that share a core for a while halve the rate of products.
    """
    rows, size = sample.call.axes
    other_rows, other_size = other.call.axes
    piece_s, other_s = (each.seconds / each.call.count for each in (sample, other))
    if rows <= other_rows and size == other_size:
        return piece_s > _MAX_EXCESS * other_s
    if rows < other_rows or size < other_size:
        return False
    work, other_work = (_work(each) / each.seconds for each in (sample, other))
    return work < _MIN_RATE * other_work


def _work(sample: Sample) -> float:
    """What a sample got done: FLOPs, bytes or elements."""
    call = sample.call
    return call.flops or call.bytes or call.num_elements

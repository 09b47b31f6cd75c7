"""Measure again what was disturbed: a neighbour's burst lasts longer than one sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from planner.device import Sample

Probe = Callable[[], Sample]

# A quiet machine repeats a kernel within this; what varies more was disturbed.
_MAX_SPREAD = 0.1
# More rows never take less time; a sample that took so much longer than a larger one was disturbed.
_MAX_EXCESS = 1.03
_MAX_ROUNDS = 3


def settled(probes: Sequence[Probe], *, budget_s: float) -> list[Sample]:
    """Run every probe once, and again those that were disturbed; the fastest median of each counts.

    Disturbed are samples that vary much, and those that took longer than the same kernel took for
    more rows. Neighbours make work slower and never faster. Measuring again ends after `budget_s`.
    """
    samples = [probe() for probe in probes]
    deadline = time.perf_counter() + budget_s
    for _ in range(_MAX_ROUNDS):
        for index in disturbed(samples):
            if time.perf_counter() > deadline:
                return samples
            other = probes[index]()
            if other.seconds < samples[index].seconds:
                samples[index] = other
    return samples


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
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        call = sample.call
        key = (sample.lane, call.kernel, call.backend, call.format, call.shape[1:], call.family)
        groups.setdefault((*key, call.axes[1], sample.num_threads), []).append(index)
    for members in groups.values():
        ordered = sorted(members, key=lambda index: samples[index].call.axes[0])
        least_s = float("inf")
        for index in reversed(ordered):
            each_s = samples[index].seconds / samples[index].call.count
            if each_s > _MAX_EXCESS * least_s:
                found.add(index)
            least_s = min(least_s, each_s)
    return sorted(found)

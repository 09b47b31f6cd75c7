"""Measure again what was disturbed: a neighbour's burst lasts longer than one sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from planner.device import Sample
from planner.kernels import Kernel

Probe = Callable[[], Sample]

# A quiet machine repeats a kernel within this; what varies more was disturbed.
_MAX_SPREAD = 0.1
# More rows never take less time; a sample that took so much longer than a larger one was disturbed.
_MAX_EXCESS = 1.03
# Nor do more rows of as large matrices lower the rate by more than this.
_MIN_RATE = 0.85
_MAX_ROUNDS = 3
# Of few rows measured with cold caches, of many with warm ones: not to be compared.
_COLD_KERNELS: tuple[Kernel, ...] = ("elementwise", "sample")


def settled(probes: Sequence[Probe], *, budget_s: float) -> list[Sample]:
    """Run every probe once, and again those that were disturbed; the fastest median of each counts.

    Disturbed are samples that vary much, and those that are slower than others of the same kernel
    say. Neighbours make work slower and never faster. Measuring again ends after `budget_s`.
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

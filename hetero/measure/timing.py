"""Timing: median and spread of a call on a device; torch's thread count for a block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# A kernel of a few microseconds is shorter than its submission: several share a pair of events.
_CUDA_CALLS_PER_EVENT = 8
MIN_CALLS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median seconds, and the 10th to the 90th percentile as a share of it."""

    seconds: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float], *, num_calls: float = 1.0) -> Timing:
        """Of samples that are each `num_calls` calls long."""
        median_s = statistics.median(samples)
        if len(samples) == 1:
            return cls(seconds=median_s / num_calls, spread=0.0)
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(seconds=median_s / num_calls, spread=(tenths[-1] - tenths[0]) / median_s)


def timed(
    call: Callable[[], object],
    *,
    device: torch.device,
    budget_s: float,
    min_calls: int = MIN_CALLS,
) -> Timing:
    """Time a call: one untimed run, then repeat for `budget_s` and at least `min_calls` times."""
    seconds_of = _cuda_seconds if device.type == "cuda" else host_seconds
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < min_calls or time.perf_counter() < deadline:
        samples.append(seconds_of(call))
    return Timing.of(samples)


def median_seconds(
    call: Callable[[], object],
    *,
    device: torch.device,
    budget_s: float,
    min_calls: int = MIN_CALLS,
) -> float:
    """The median of `timed`."""
    return timed(call, device=device, budget_s=budget_s, min_calls=min_calls).seconds


def host_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call as the host sees them."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_CUDA_CALLS_PER_EVENT):
        call()
    end.record()
    end.synchronize()
    milliseconds = float(start.elapsed_time(end))
    return milliseconds / 1e3 / _CUDA_CALLS_PER_EVENT


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Run the block with `num_threads` torch threads and put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

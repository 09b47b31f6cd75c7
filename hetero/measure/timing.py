"""Median seconds of a call on a device, and torch's thread count for the length of a block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# A kernel of a few microseconds is shorter than its submission: several share a pair of events.
_CUDA_CALLS_PER_EVENT = 8


def median_seconds(
    call: Callable[[], object], *, device: torch.device, budget_s: float, min_calls: int = 3
) -> float:
    """Time a call: one untimed run, then repeat for `budget_s` and at least `min_calls` times."""
    seconds_of = _cuda_seconds if device.type == "cuda" else _host_seconds
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < min_calls or time.perf_counter() < deadline:
        samples.append(seconds_of(call))
    return statistics.median(samples)


def _host_seconds(call: Callable[[], object]) -> float:
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

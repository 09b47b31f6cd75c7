"""Rates and latency of the link between host and GPU."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from hetero.measure.timing import median_seconds
from hetero.runtime.devices import EmulatedAccelerator
from planner.hardware import LinkProfile

_COPY_BYTES = 128 << 20
_NUM_LATENCY_COPIES = 200


def measure_link(
    device: torch.device, *, budget_s: float, copy_bytes: int = _COPY_BYTES
) -> LinkProfile:
    """Copy both ways, from pinned and from pageable memory; budget_s is for each of the four."""
    on_gpu = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    pageable = torch.zeros(copy_bytes, dtype=torch.uint8)
    pinned = torch.zeros(copy_bytes, dtype=torch.uint8, pin_memory=True)
    return LinkProfile(
        name="PCIe",
        h2d_bytes_per_s=_copy_bytes_per_s(on_gpu, pinned, device, budget_s),
        d2h_bytes_per_s=_copy_bytes_per_s(pinned, on_gpu, device, budget_s),
        latency_s=_latency_s(on_gpu[:4], pinned[:4], device),
        pageable_h2d_bytes_per_s=_copy_bytes_per_s(on_gpu, pageable, device, budget_s),
        pageable_d2h_bytes_per_s=_copy_bytes_per_s(pageable, on_gpu, device, budget_s),
    )


def emulated_bytes_per_s(
    *, link_bytes_per_s: float, latency_s: float, budget_s: float, copy_bytes: int = _COPY_BYTES
) -> float:
    """Rate that the emulated accelerator's link really has, to compare with what was stated."""
    accelerator = EmulatedAccelerator(
        budget_bytes=copy_bytes, link_bytes_per_s=link_bytes_per_s, latency_s=latency_s
    )
    try:
        target = accelerator.allocate(copy_bytes, "the target of a test copy")
        source = torch.zeros(copy_bytes, dtype=torch.uint8)
        seconds = median_seconds(
            lambda: accelerator.copy_into(target, source),
            device=accelerator.device,
            budget_s=budget_s,
        )
    finally:
        accelerator.close()
    return copy_bytes / seconds


def _copy_bytes_per_s(
    target: Tensor, source: Tensor, device: torch.device, budget_s: float
) -> float:
    seconds = median_seconds(
        lambda: target.copy_(source, non_blocking=True), device=device, budget_s=budget_s
    )
    return source.numel() / seconds


def _latency_s(target: Tensor, source: Tensor, device: torch.device) -> float:
    """Seconds from asking for a copy of a few bytes to knowing that it is done."""
    samples = []
    for _ in range(_NUM_LATENCY_COPIES):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)

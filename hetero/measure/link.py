"""Rates and latency of the link between host and GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hetero.measure.timing import median_seconds, timed
from hetero.runtime.devices import EmulatedAccelerator
from planner.device import LinkProfile, Sample
from planner.kernels import HostMemory
from planner.step_graph import Lane

_COPY_BYTES = 128 << 20
_NUM_LATENCY_COPIES = 200


def copy_samples(
    device: torch.device, sizes: Sequence[int], *, budget_s: float
) -> tuple[Sample, ...]:
    """Copy both ways, from pinned and from pageable memory, each size."""
    samples: list[Sample] = []
    largest = max(sizes)
    on_gpu = torch.empty(largest, dtype=torch.uint8, device=device)
    hosts: dict[HostMemory, Tensor] = {
        "pageable": torch.zeros(largest, dtype=torch.uint8),
        "pinned": torch.zeros(largest, dtype=torch.uint8, pin_memory=True),
    }
    for memory, host in hosts.items():
        for size in sizes:
            ways: dict[Lane, tuple[Tensor, Tensor]] = {
                "h2d": (on_gpu[:size], host[:size]),
                "d2h": (host[:size], on_gpu[:size]),
            }
            for lane, (target, source) in ways.items():
                found = timed(
                    partial(target.copy_, source, non_blocking=True),
                    device=device,
                    budget_s=budget_s,
                )
                samples.append(
                    Sample(
                        lane=lane,
                        kernel="copy",
                        backend="torch",
                        shape=(size,),
                        memory=memory,
                        seconds=found.seconds,
                        spread=found.spread,
                    )
                )
    return tuple(samples)


def link_profile(device: torch.device, copies: Sequence[Sample]) -> LinkProfile:
    """The rates of the largest copies, and the latency of a small one."""
    rates: dict[tuple[str, HostMemory | None], float] = {}
    for copy in sorted(copies, key=lambda copy: copy.shape):
        rates[copy.lane, copy.memory] = copy.shape[0] / copy.seconds
    pinned = torch.zeros(4, dtype=torch.uint8, pin_memory=True)
    return LinkProfile(
        name="PCIe",
        h2d_bytes_per_s=rates["h2d", "pinned"],
        d2h_bytes_per_s=rates["d2h", "pinned"],
        latency_s=_latency_s(torch.empty_like(pinned, device=device), pinned, device),
        pageable_h2d_bytes_per_s=rates.get(("h2d", "pageable")),
        pageable_d2h_bytes_per_s=rates.get(("d2h", "pageable")),
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


def _latency_s(target: Tensor, source: Tensor, device: torch.device) -> float:
    """Seconds from asking for a copy of a few bytes to knowing that it is done."""
    samples = []
    for _ in range(_NUM_LATENCY_COPIES):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)

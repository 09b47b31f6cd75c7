"""Seconds of one small operation, and of handing work from one lane to another."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from cpu_kernels.calls import Chain, Link
from cpu_kernels.elementwise import add_residual_link, rms_norm_link
from cpu_kernels.formats import PANEL_ROWS, WeightFormat
from cpu_kernels.linear import PackedMatrix, linear_link
from cpu_kernels.scratch import Scratch, aligned_bytes
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import Timing, host_seconds, median_seconds
from hetero.model.norm import rms_norm
from hetero.runtime.lanes import LaneRunner, ThreadLane, last_core
from planner.device import Sample

_WIDTH = 1024
_NUM_OPS = 32
_NUM_LINKS = 300
_MIN_RUNS = 3
_NUM_HANDOVERS = 50
# A lane that has just worked is awake; one that waits for a layer of the CPU's is not.
_PARKED_S = 1e-3
# An item of a product is four panels.
_ROWS_PER_THREAD = 4 * PANEL_ROWS
_EPS = 1e-6


def launch_s(device: torch.device, *, budget_s: float) -> float:
    """Seconds of an operation of torch on one row, from a chain of norms, additions and products.

    On a GPU this is the rate at which a thread can submit, which is what bounds a chain of small
    kernels.
    """
    x = torch.full((1, _WIDTH), 0.5, dtype=torch.bfloat16, device=device)
    weight = torch.full((_WIDTH,), 0.25, dtype=torch.bfloat16, device=device)

    def chain() -> None:
        y = x
        for _ in range(_NUM_OPS // 4):
            # a norm is two operations
            y = rms_norm(y, weight, _EPS) * weight + x

    return median_seconds(chain, device=device, budget_s=budget_s, min_calls=20) / _NUM_OPS


def handover_sample(lane: LaneRunner | None = None, *, num_threads: int = 1) -> Sample:
    """Measure an empty piece of work on another lane, from handing it over to knowing it is done.

    `lane` is an accelerator's; None is a thread of this process, as the emulated one has.
    """
    own = ThreadLane("handover", last_core()) if lane is None else None
    target = own or lane
    assert target is not None
    target.begin_step()

    def hand_over() -> None:
        target.submit(_nothing, ()).wait()

    try:
        hand_over()
        samples = []
        for _ in range(_NUM_HANDOVERS):
            time.sleep(_PARKED_S)
            samples.append(host_seconds(hand_over))
    finally:
        if own is not None:
            own.close()
    found = Timing.of(samples)
    return Sample(
        lane="cpu",
        kernel="handover",
        backend="torch",
        num_threads=num_threads,
        seconds=found.seconds,
        spread=found.spread,
    )


def _nothing() -> None:
    pass


def link_s(memory: ColdMemory, *, num_threads: int, budget_s: float) -> float:
    """Seconds of a link of one token in a chain on so many threads, after weights were read.

    A third of the links norm a row, a third add one, and a third multiply a matrix so small that
    the threads, which share its rows, spend their time on handing over to each other. What the
    links are told has left the caches, as in a step of a model that is larger than these.
    """
    x = np.full((1, _WIDTH), 0.5, np.float32)
    y, weight = np.full_like(x, 0.25), np.full(_WIDTH, 0.25, np.float32)
    normed, out, scratch = np.empty_like(x), np.empty_like(x), Scratch()
    rows, columns = num_threads * _ROWS_PER_THREAD, PANEL_ROWS
    stored = WeightFormat(kind="float32")
    matrix = PackedMatrix(
        blob=aligned_bytes(stored.packed_bytes(rows, columns)),
        weight_format=stored,
        num_rows=rows,
        num_columns=columns,
    )
    matrix.blob[:] = 0
    product = np.empty((1, rows), np.float32)
    links: list[Link] = []
    for _ in range(_NUM_LINKS // 3):
        # each its own: a chain sets counters to 0 once, before it begins
        links.append(rms_norm_link(x, weight, _EPS, normed))
        links.append(
            linear_link(
                normed[:, :columns],
                matrix,
                compute="float",
                num_threads=num_threads,
                scratch=scratch,
                out=product,
            )
        )
        links.append(add_residual_link(normed, y, None, out))
    chain = Chain(links, num_threads=num_threads)
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    chain.run()
    while len(samples) < _MIN_RUNS or time.perf_counter() < deadline:
        memory.displace_caches(num_threads)
        samples.append(host_seconds(chain.run))
    return statistics.median(samples) / len(links)

"""Sequential read rate of main memory by thread count, and of GPU memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import median_seconds


def cpu_read_bytes_per_s(memory: ColdMemory, *, num_threads: int, budget_s: float) -> float:
    """Rate of reading a buffer once, a contiguous part per thread.

    The reduction is a maximum of float32, which numpy computes at several times the rate at which
    one core can read (50 GB/s from the cache of an Emerald Rapids Xeon), without the GIL.
    """
    words = memory.whole().numpy()
    parts = np.array_split(words, num_threads)
    with ThreadPoolExecutor(max_workers=num_threads) as threads:
        seconds = median_seconds(
            lambda: list(threads.map(np.maximum.reduce, parts)),
            device=torch.device("cpu"),
            budget_s=budget_s,
        )
    return memory.num_bytes / seconds


def gpu_read_bytes_per_s(memory: ColdMemory, *, budget_s: float) -> float:
    """Rate of a reduction over a buffer in GPU memory."""
    words = memory.whole()
    seconds = median_seconds(lambda: torch.amax(words), device=memory.device, budget_s=budget_s)
    return memory.num_bytes / seconds

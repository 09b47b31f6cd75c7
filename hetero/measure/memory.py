"""Sequential read rate of main memory by thread count, and of GPU memory."""

from __future__ import annotations

import numpy as np
import torch

from cpu_kernels.memory_read import read_memory
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import median_seconds


def cpu_read_bytes_per_s(memory: ColdMemory, *, num_threads: int, budget_s: float) -> float:
    """Rate of reading a buffer once, on the threads that the kernels run on."""
    words = memory.whole().numpy().view(np.uint8)
    seconds = median_seconds(
        lambda: read_memory(words, num_threads=num_threads),
        device=torch.device("cpu"),
        budget_s=budget_s,
    )
    return memory.num_bytes / seconds


def gpu_read_bytes_per_s(memory: ColdMemory, *, budget_s: float) -> float:
    """Rate of a reduction over a buffer in GPU memory."""
    words = memory.whole()
    seconds = median_seconds(lambda: torch.amax(words), device=memory.device, budget_s=budget_s)
    return memory.num_bytes / seconds

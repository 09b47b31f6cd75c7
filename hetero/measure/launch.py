"""Seconds of one small operation, which no operation goes below."""

from __future__ import annotations

import torch

from hetero.measure.timing import median_seconds
from hetero.model.norm import rms_norm

_WIDTH = 1024
_NUM_OPS = 32


def launch_s(device: torch.device, *, budget_s: float) -> float:
    """Seconds of an operation on one row, from a chain of norms, additions and products.

    On a GPU this is the rate at which a thread can submit, which is what bounds a chain of small
    kernels.
    """
    x = torch.full((1, _WIDTH), 0.5, dtype=torch.bfloat16, device=device)
    weight = torch.full((_WIDTH,), 0.25, dtype=torch.bfloat16, device=device)

    def chain() -> None:
        y = x
        for _ in range(_NUM_OPS // 4):
            # a norm is two operations
            y = rms_norm(y, weight, 1e-6) * weight + x

    return median_seconds(chain, device=device, budget_s=budget_s, min_calls=20) / _NUM_OPS

"""Rate of F.linear, the product that runs, by format and token count, with weights read cold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import median_seconds
from hetero.model.families import TORCH_DTYPES
from planner.hardware import LinearSample
from planner.model_spec import Dtype, ModelSpec

Shape = tuple[int, int]  # (out features, in features)

# A projection and the two of a small expert: at few tokens torch reads them at rates that differ
# by up to 1.5x on one machine, so a sample is their mean.
CPU_SHAPES: tuple[Shape, ...] = ((2048, 2048), (768, 2048), (2048, 768))
# Smaller ones last less than their own launch on a GPU, which the cost model adds apart.
GPU_SHAPES: tuple[Shape, ...] = ((4096, 4096),)


def linear_sample(
    memory: ColdMemory, *, dtype: Dtype, num_tokens: int, shapes: Sequence[Shape], budget_s: float
) -> LinearSample:
    """Measure `x W^T` for `num_tokens` rows over some shapes; FLOPs of all over seconds of all."""
    seconds = 0.0
    for shape in shapes:
        seconds += _linear_seconds(memory, dtype, num_tokens, shape, budget_s / len(shapes))
    flops = sum(2.0 * num_tokens * rows * columns for rows, columns in shapes)
    return LinearSample(dtype=dtype, num_tokens=num_tokens, flop_per_s=flops / seconds)


def model_shapes(spec: ModelSpec, *, max_elements: int) -> tuple[Shape, ...]:
    """Products of a model's largest layer: qkv, output, gate and up, down.

    One of more than `max_elements` weights is cut to its first rows: it would neither fit the
    memory that is rotated through, nor be any different.
    """
    layer = max(spec.layers, key=lambda layer: layer.intermediate_size)
    hidden, width = spec.hidden_size, layer.intermediate_size
    shapes = (
        (spec.q_size + 2 * spec.kv_size, hidden),
        (hidden, spec.q_size),
        (2 * width, hidden),
        (hidden, width),
    )
    cut = ((min(rows, max(1, max_elements // columns)), columns) for rows, columns in shapes)
    return tuple(dict.fromkeys(cut))


def _linear_seconds(
    memory: ColdMemory, dtype: Dtype, num_tokens: int, shape: Shape, budget_s: float
) -> float:
    x = torch.full((num_tokens, shape[1]), 0.01, dtype=TORCH_DTYPES[dtype], device=memory.device)
    return median_seconds(
        lambda: F.linear(x, memory.take(dtype, *shape)), device=memory.device, budget_s=budget_s
    )

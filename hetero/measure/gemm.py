"""Rate of the product that runs, by format and token count, with weights read cold.

On the CPU that is the kernel on packed weights, elsewhere F.linear.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from cpu_kernels.formats import WeightFormat
from cpu_kernels.linear import PackedMatrix, linear
from cpu_kernels.microkernels import fastest_compute
from cpu_kernels.scratch import Scratch
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import median_seconds
from hetero.model.families import TORCH_DTYPES
from planner.hardware import LinearSample
from planner.model_spec import QUANTIZATION_GROUP, ModelSpec, WeightKind

Shape = tuple[int, int]  # (out features, in features)

# A projection and the two of a small expert: at few tokens torch reads them at rates that differ
# by up to 1.5x on one machine, so a sample is their mean.
CPU_SHAPES: tuple[Shape, ...] = ((2048, 2048), (768, 2048), (2048, 768))
# Smaller ones last less than their own launch on a GPU, which the cost model adds apart.
GPU_SHAPES: tuple[Shape, ...] = ((4096, 4096),)


def linear_sample(
    memory: ColdMemory,
    *,
    dtype: WeightKind,
    num_tokens: int,
    shapes: Sequence[Shape],
    budget_s: float,
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
    memory: ColdMemory, dtype: WeightKind, num_tokens: int, shape: Shape, budget_s: float
) -> float:
    if memory.device.type == "cpu" and dtype != "float16":
        return _packed_seconds(memory, dtype, num_tokens, shape, budget_s)
    assert dtype != "int8" and dtype != "int4"
    x = torch.full((num_tokens, shape[1]), 0.01, dtype=TORCH_DTYPES[dtype], device=memory.device)
    return median_seconds(
        lambda: F.linear(x, memory.take(dtype, *shape)), device=memory.device, budget_s=budget_s
    )


def _packed_seconds(
    memory: ColdMemory, kind: WeightKind, num_tokens: int, shape: Shape, budget_s: float
) -> float:
    """The CPU's own kernel, on the threads that torch is set to."""
    assert kind != "float16"
    is_quantised = kind == "int8" or kind == "int4"
    stored = WeightFormat(kind=kind, group_size=QUANTIZATION_GROUP if is_quantised else None)
    num_bytes = stored.packed_bytes(*shape)
    compute, num_threads = fastest_compute(stored), torch.get_num_threads()
    x = np.full((num_tokens, shape[1]), 0.01, np.float32)
    out, scratch = np.empty((num_tokens, shape[0]), np.float32), Scratch()

    def multiply() -> None:
        weight = PackedMatrix(
            blob=memory.take_bytes(num_bytes),
            weight_format=stored,
            num_rows=shape[0],
            num_columns=shape[1],
        )
        linear(x, weight, compute=compute, num_threads=num_threads, scratch=scratch, out=out)

    return median_seconds(multiply, device=memory.device, budget_s=budget_s)

"""Rate of a product, by backend, format and token count, with weights read cold.

On the CPU our kernels are timed as the engine runs them, in a chain without Python between them;
torch, on the CPU and elsewhere, call by call.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cpu_kernels.calls import Chain, Link
from cpu_kernels.linear import PackedMatrix, linear_link
from cpu_kernels.microkernels import fastest_compute
from cpu_kernels.scratch import Scratch
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import median_seconds
from hetero.model.families import TORCH_DTYPES
from hetero.model.products import Matrix, matrix_at, matrix_bytes, weight_format
from planner.hardware import Backend, LinearSample
from planner.model_spec import ModelSpec, WeightKind

Shape = tuple[int, int]  # (out features, in features)

# A projection and the two of a small expert: at few tokens torch reads them at rates that differ
# by up to 1.5x on one machine, so a sample is their mean.
CPU_SHAPES: tuple[Shape, ...] = ((2048, 2048), (768, 2048), (2048, 768))
# Smaller ones last less than their own launch on a GPU, which the cost model adds apart.
GPU_SHAPES: tuple[Shape, ...] = ((4096, 4096),)

# Products of every shape before memory is read again; of small models fewer than it holds.
_MAX_ROUNDS = 256
# A median of less says nothing.
_MIN_SAMPLES = 3


def linear_sample(
    memory: ColdMemory,
    *,
    dtype: WeightKind,
    num_tokens: int,
    shapes: Sequence[Shape],
    budget_s: float,
    backend: Backend,
) -> LinearSample:
    """Measure `x W^T` for `num_tokens` rows over some shapes; FLOPs of all over seconds of all.

    On the CPU it uses the threads that torch is set to.
    """
    if memory.device.type != "cpu" or dtype == "float16":
        assert backend == "torch"
        seconds = sum(
            _rows_seconds(memory, dtype, num_tokens, shape, budget_s / len(shapes))
            for shape in shapes
        )
    elif backend == "numba":
        seconds = _chain_seconds(memory, dtype, num_tokens, shapes, budget_s)
    else:
        seconds = _call_seconds(memory, backend, dtype, num_tokens, shapes, budget_s)
    flops = sum(2.0 * num_tokens * rows * columns for rows, columns in shapes)
    return LinearSample(
        dtype=dtype, num_tokens=num_tokens, flop_per_s=flops / seconds, backend=backend
    )


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


def _rows_seconds(
    memory: ColdMemory, dtype: WeightKind, num_tokens: int, shape: Shape, budget_s: float
) -> float:
    """F.linear on a device, or in float16."""
    assert dtype != "int8" and dtype != "int4"
    x = torch.full((num_tokens, shape[1]), 0.01, dtype=TORCH_DTYPES[dtype], device=memory.device)
    return median_seconds(
        lambda: F.linear(x, memory.take(dtype, *shape)), device=memory.device, budget_s=budget_s
    )


def _call_seconds(
    memory: ColdMemory,
    backend: Backend,
    kind: WeightKind,
    num_tokens: int,
    shapes: Sequence[Shape],
    budget_s: float,
) -> float:
    """A round of products on a backend of the CPU, a Python call each."""
    assert kind != "float16"
    num_threads = torch.get_num_threads()
    x_of_width = {columns: _inputs(num_tokens, columns) for _, columns in shapes}

    def matrix(shape: Shape) -> Matrix:
        blob = memory.take_bytes(matrix_bytes(backend, kind, *shape))
        return matrix_at(backend, kind, blob, *shape)

    num_bytes = sum(matrix_bytes(backend, kind, *shape) for shape in shapes)
    rounds = [[matrix(shape) for shape in shapes] for _ in range(_num_rounds(memory, num_bytes))]
    lap = itertools.cycle(rounds)

    def multiply() -> None:
        for (_, columns), each in zip(shapes, next(lap), strict=True):
            each.multiply(x_of_width[columns], num_threads=num_threads)

    return median_seconds(multiply, device=memory.device, budget_s=budget_s)


def _chain_seconds(
    memory: ColdMemory,
    kind: WeightKind,
    num_tokens: int,
    shapes: Sequence[Shape],
    budget_s: float,
) -> float:
    """A round of products by our kernels: chains of some rounds each, one lap through memory.

    A chain lasts a third of the budget or a round.
    """
    assert kind != "float16"
    stored, num_threads, scratch = weight_format(kind), torch.get_num_threads(), Scratch()
    x_of_width = {columns: _inputs(num_tokens, columns) for _, columns in shapes}
    out_of_width = {rows: np.empty((num_tokens, rows), np.float32) for rows, _ in shapes}

    def link(shape: Shape) -> Link:
        weight = PackedMatrix(
            blob=memory.take_bytes(stored.packed_bytes(*shape)),
            weight_format=stored,
            num_rows=shape[0],
            num_columns=shape[1],
        )
        return linear_link(
            x_of_width[shape[1]],
            weight,
            compute=fastest_compute(stored),
            num_threads=num_threads,
            scratch=scratch,
            out=out_of_width[shape[0]],
        )

    num_bytes = sum(stored.packed_bytes(*shape) for shape in shapes)
    rounds = [[link(shape) for shape in shapes] for _ in range(_num_rounds(memory, num_bytes))]

    def chain(count: int, start: int) -> Chain:
        links = itertools.chain.from_iterable(rounds[start : start + count])
        return Chain(tuple(links), num_threads=num_threads)

    chain(1, 0).run()  # loads the kernel
    once_s = _seconds(chain(1, min(1, len(rounds) - 1)).run)
    length = max(1, min(len(rounds), int(budget_s / _MIN_SAMPLES / once_s)))
    starts = range(0, len(rounds) - length + 1, length)
    chains = itertools.cycle([chain(length, start) for start in starts])
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
        samples.append(_seconds(next(chains).run))
    return statistics.median(samples) / length


def _inputs(num_tokens: int, columns: int) -> NDArray[np.float32]:
    return np.full((num_tokens, columns), 0.01, np.float32)


def _num_rounds(memory: ColdMemory, num_bytes: int) -> int:
    """Rounds of so many bytes that memory holds."""
    return max(1, min(_MAX_ROUNDS, memory.num_bytes // num_bytes))


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

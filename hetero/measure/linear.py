"""Seconds of a product, by backend, format, shape and token count, with weights read cold.

On the CPU our kernels are timed as the engine runs them, in a chain without Python between them;
torch, on the CPU and elsewhere, call by call.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.calls import Link
from cpu_kernels.linear import PackedMatrix, linear_link
from cpu_kernels.microkernels import fastest_compute
from cpu_kernels.scratch import Scratch
from hetero.measure.chains import num_rounds, timed_chains
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import Timing, timed
from hetero.model.families import TORCH_DTYPES
from hetero.model.products import Matrix, matrix_at, matrix_bytes, weight_format
from hetero.model.quantised import Panels, multiply, product_method
from planner.device import Sample
from planner.kernels import Backend
from planner.model_spec import ModelSpec, WeightKind
from planner.step_graph import Lane

Shape = tuple[int, int]  # (out features, in features)


def linear_sample(
    memory: ColdMemory,
    *,
    kind: WeightKind,
    num_tokens: int,
    shape: Shape,
    budget_s: float,
    backend: Backend,
) -> Sample:
    """Measure `x W^T` for `num_tokens` rows; on the CPU with the threads that torch is set to."""
    lane: Lane = "gpu" if memory.device.type != "cpu" else "cpu"
    if backend == "panels":
        found = _panels_timing(memory, kind, num_tokens, shape, budget_s)
    elif lane == "gpu" or (backend == "torch" and kind not in ("int8", "int4")):
        assert backend == "torch"
        found = _rows_timing(memory, kind, num_tokens, shape, budget_s)
    elif backend == "numba":
        found = _chain_timing(memory, kind, num_tokens, shape, budget_s)
    else:
        found = _call_timing(memory, backend, kind, num_tokens, shape, budget_s)
    return Sample(
        lane=lane,
        kernel="linear",
        format=kind,
        backend=backend,
        shape=shape,
        num_tokens=num_tokens,
        num_threads=torch.get_num_threads() if lane == "cpu" else 1,
        seconds=found.seconds,
        spread=found.spread,
    )


def model_shapes(spec: ModelSpec, *, max_elements: int) -> tuple[Shape, ...]:
    """Products of a model's layers and its head, each once.

    One of more than `max_elements` weights is cut to its first rows: it would neither fit the
    memory that is rotated through, nor be any different.
    """
    shapes: list[Shape] = []
    for index in range(spec.num_layers):
        for module in spec.layers[index].modules:
            if module == "experts" or (module == "dense" and not spec.has_mlp_bias):
                continue
            shapes += [(rows, columns) for _, rows, columns in spec.matrices(module, index)]
    shapes += [(rows, columns) for _, rows, columns in spec.matrices("head", None)]
    cut = ((min(rows, max(1, max_elements // columns)), columns) for rows, columns in shapes)
    return tuple(dict.fromkeys(cut))


def _rows_timing(
    memory: ColdMemory, kind: WeightKind, num_tokens: int, shape: Shape, budget_s: float
) -> Timing:
    """F.linear, as the engine's torch layers have it."""
    assert kind != "int8" and kind != "int4"
    x = torch.full((num_tokens, shape[1]), 0.01, dtype=TORCH_DTYPES[kind], device=memory.device)
    return timed(
        lambda: F.linear(x, memory.take(kind, *shape)), device=memory.device, budget_s=budget_s
    )


def _panels_timing(
    memory: ColdMemory, kind: WeightKind, num_tokens: int, shape: Shape, budget_s: float
) -> Timing:
    """Products with quantised panels, as the accelerator has them."""
    assert kind != "float16"
    stored, method = weight_format(kind), product_method(memory.device)
    x = torch.full((num_tokens, shape[1]), 0.01, dtype=torch.bfloat16, device=memory.device)

    def multiplied() -> Tensor:
        panels = Panels(
            blobs_EB=memory.take_tensor(stored.packed_bytes(*shape))[None],
            weight_format=stored,
            num_matrices=1,
            num_rows=shape[0],
            num_columns=shape[1],
        )
        return multiply(x, panels, method)

    return timed(multiplied, device=memory.device, budget_s=budget_s)


def _call_timing(
    memory: ColdMemory,
    backend: Backend,
    kind: WeightKind,
    num_tokens: int,
    shape: Shape,
    budget_s: float,
) -> Timing:
    """Products on a backend of the CPU, a Python call each."""
    assert kind != "float16"
    num_threads, x = torch.get_num_threads(), inputs(kind, num_tokens, shape[1])
    size = matrix_bytes(backend, kind, *shape)

    def matrix() -> Matrix:
        return matrix_at(backend, kind, memory.take_bytes(size), *shape)

    lap = itertools.cycle([matrix() for _ in range(num_rounds(memory.num_bytes, size))])
    return timed(
        lambda: next(lap).multiply(x, num_threads=num_threads),
        device=memory.device,
        budget_s=budget_s,
    )


def _chain_timing(
    memory: ColdMemory, kind: WeightKind, num_tokens: int, shape: Shape, budget_s: float
) -> Timing:
    assert kind != "float16"
    stored, num_threads, scratch = weight_format(kind), torch.get_num_threads(), Scratch()
    x = inputs(kind, num_tokens, shape[1])
    out = np.empty((num_tokens, shape[0]), np.float32)
    size = stored.packed_bytes(*shape)

    def link() -> Link:
        weight = PackedMatrix(
            blob=memory.take_bytes(size),
            weight_format=stored,
            num_rows=shape[0],
            num_columns=shape[1],
        )
        return linear_link(
            x,
            weight,
            compute=fastest_compute(stored),
            num_threads=num_threads,
            scratch=scratch,
            out=out,
        )

    rounds = [[link()] for _ in range(num_rounds(memory.num_bytes, size))]
    return timed_chains(rounds, num_threads=num_threads, budget_s=budget_s)


def inputs(kind: WeightKind, num_tokens: int, columns: int) -> NDArray[Any]:
    """Rows of 0.01 as the engine has them: float32 with such weights, else bfloat16's bits."""
    if kind == "float32":
        return np.full((num_tokens, columns), 0.01, np.float32)
    return np.full((num_tokens, columns), 0x3C24, np.uint16)

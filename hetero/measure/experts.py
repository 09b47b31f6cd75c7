"""Seconds of a layer's chosen experts, by format, size and tokens, over more than caches hold."""

# E experts with tokens, k choices a token, D hidden, I expert width

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.calls import Link
from cpu_kernels.experts import PackedExperts, expert_bytes, experts_links
from cpu_kernels.microkernels import fastest_compute
from cpu_kernels.scratch import Scratch
from hetero.measure.chains import num_rounds, timed_chains
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.linear import inputs
from hetero.measure.timing import timed
from hetero.model.families import TORCH_DTYPES
from hetero.model.moe import Routing, dispatch, expert_method, experts
from hetero.model.packed import quantised_experts
from hetero.model.products import weight_format
from planner.device import Sample
from planner.model_spec import Dtype, WeightKind

ExpertShape = tuple[int, int]  # (D, I)

_TOP_K = 8


def choices(num_experts: int, tokens_each: int, first: int = 0) -> NDArray[np.int64]:
    """ids_Tk that give every expert of a range as many tokens; each token chooses different ones.

    Examples
    --------
    >>> choices(2, 3).tolist()
    [[0, 1], [0, 1], [0, 1]]
    """
    top_k = min(_TOP_K, num_experts)
    num_tokens = -(-num_experts * tokens_each // top_k)
    flat = np.arange(num_tokens * top_k, dtype=np.int64) % num_experts + first
    return flat.reshape(num_tokens, top_k)


def ragged_choices(num_experts: int, tokens_each: int) -> NDArray[np.int64]:
    """ids_Tk that give experts 1 to 2 n - 1 tokens, n on average, as a router's choices do.

    What calls a product for each expert takes longest where all have a few tokens: one alone is
    another kernel.

    Examples
    --------
    >>> np.bincount(ragged_choices(3, 2).ravel()).tolist()
    [1, 2, 3]
    """
    counts = np.linspace(1, 2 * tokens_each - 1, num_experts).round().astype(np.int64)
    counts[-1] += num_experts * tokens_each - counts.sum()
    top_k = math.gcd(min(_TOP_K, num_experts), int(counts.sum()))
    return np.repeat(np.arange(num_experts), counts).reshape(top_k, -1).T.copy()


def experts_sample(
    memory: ColdMemory,
    *,
    kind: WeightKind,
    shape: ExpertShape,
    num_experts: int,
    tokens_each: int,
    num_threads: int,
    budget_s: float,
) -> Sample:
    """Measure our kernel: `num_experts` experts with `tokens_each` tokens, weighted and added."""
    rounds = experts_rounds(
        memory,
        kind=kind,
        shape=shape,
        num_experts=num_experts,
        tokens_each=tokens_each,
        num_threads=num_threads,
    )
    found = timed_chains(rounds, num_threads=num_threads, budget_s=budget_s)
    return Sample(
        lane="cpu",
        kernel="experts",
        format=kind,
        shape=(num_experts, *shape),
        num_tokens=tokens_each,
        num_threads=num_threads,
        seconds=found.seconds,
        spread=found.spread,
    )


def experts_rounds(
    memory: ColdMemory,
    *,
    kind: WeightKind,
    shape: ExpertShape,
    num_experts: int,
    tokens_each: int,
    num_threads: int,
) -> list[Sequence[Link]]:
    """Links of rounds, each over experts that the ones before have not read."""
    assert kind != "float16"
    stored, scratch, (hidden, width) = weight_format(kind), Scratch(), shape
    size = expert_bytes(stored, hidden, width)
    count = num_rounds(memory.num_bytes, num_experts * size)
    packed = PackedExperts(
        blob=memory.take_bytes(count * num_experts * size),
        weight_format=stored,
        num_experts=count * num_experts,
        hidden=hidden,
        width=width,
    )
    rounds: list[Sequence[Link]] = []
    for index in range(count):
        ids_Tk = choices(num_experts, tokens_each, index * num_experts)
        x = inputs(kind, len(ids_Tk), hidden)
        rounds.append(
            experts_links(
                x,
                packed,
                ids_Tk,
                np.full(ids_Tk.shape, 1 / ids_Tk.shape[1], np.float32),
                compute=fastest_compute(stored),
                num_threads=num_threads,
                scratch=scratch,
                out=np.empty(x.shape, np.float32),
            )
        )
    return rounds


def torch_experts_sample(
    memory: ColdMemory,
    *,
    kind: WeightKind,
    shape: ExpertShape,
    num_experts: int,
    tokens_each: int,
    budget_s: float,
) -> Sample:
    """Measure torch's form of the same on the memory's device: sort, loop or group, add.

    Of quantised weights on panels, as the accelerator has them.
    """
    device, (hidden, width) = memory.device, shape
    packed = weight_format(kind) if kind == "int8" or kind == "int4" else None
    dtype: Dtype = "bfloat16" if kind == "int8" or kind == "int4" else kind
    ids_Tk = torch.from_numpy(ragged_choices(num_experts, tokens_each)).to(device)
    x_TD = torch.full((len(ids_Tk), hidden), 0.01, dtype=TORCH_DTYPES[dtype], device=device)
    routing = Routing(
        normed_TD=x_TD,
        expert_ids_Tk=ids_Tk,
        expert_weights_Tk=torch.full(
            ids_Tk.shape, 1 / ids_Tk.shape[1], dtype=x_TD.dtype, device=device
        ),
    )
    sorted_tokens = dispatch(routing, num_experts)
    size = 3 * hidden * width * x_TD.element_size()
    if packed is not None:
        size = expert_bytes(packed, hidden, width)

    def layer() -> Mapping[str, Tensor]:
        if packed is not None:
            experts_EB = memory.take_tensor(num_experts * size).view(num_experts, size)
            return quantised_experts(experts_EB, packed, width, hidden)
        return {
            "gate_up": memory.take(dtype, num_experts, 2 * width, hidden),
            "down": memory.take(dtype, num_experts, hidden, width),
        }

    layers = [layer() for _ in range(num_rounds(memory.num_bytes, num_experts * size))]
    lap = itertools.cycle(layers)
    method = expert_method(device, x_TD.dtype, shape)
    found = timed(
        lambda: experts(sorted_tokens, next(lap), method=method), device=device, budget_s=budget_s
    )
    return Sample(
        lane="cpu" if device.type == "cpu" else "gpu",
        kernel="experts",
        format=kind,
        backend="torch" if packed is None else "panels",
        shape=(num_experts, *shape),
        num_tokens=tokens_each,
        num_threads=torch.get_num_threads() if device.type == "cpu" else 1,
        seconds=found.seconds,
        spread=found.spread,
    )

"""Consecutive ops of a decode step in one chain: from layer to layer without Python.

A layer has four ops, and between two of them the processor would spend 30 us in Python, whose code
and data the weights have driven from its caches: a tenth of a step of a small model in 4 bits.
"""

# T tokens (one a sequence), D hidden

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.calls import Link
from hetero.kv_cache import PagedKV
from hetero.model import cpu_layers
from hetero.model.cpu_layers import CpuAttentionStep, CpuRouting
from hetero.model.cpu_workspace import CpuKernels, Program, Steps
from hetero.model.packed import PackedModule
from planner.model_spec import ModelSpec, Module
from planner.step_graph import Op, OpKind

_MODULES: dict[OpKind, Module] = {
    "attention": "attention",
    "router": "router",
    "experts": "experts",
    "dense": "dense",
    "head": "head",
}
# An op of these reads hidden states only, so that a run may begin with it.
_FIRST: tuple[OpKind, ...] = ("attention", "dense", "router", "head")

FindPacked = Callable[[Op, Module], PackedModule | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CpuRun:
    """The chain of some ops, where each ends in it, and what they leave; None: nothing."""

    program: Program
    ends: NDArray[np.intp]
    hidden_TD: NDArray[Any] | None
    routing: CpuRouting | None
    expert_output_TD: NDArray[np.float32] | None
    logits_LV: NDArray[np.float32] | None

    def perform(self, x_TD: NDArray[Any]) -> list[float]:
        """Run it on x; the times (`time.perf_counter`) at which the ops ended."""
        begin_s = time.perf_counter()
        self.program.run(x_TD, x_TD)
        end_s = time.perf_counter()
        seconds = end_s - begin_s
        return [begin_s + share * seconds for share in self.program.chain.shares(self.ends)]


def split_runs(ops: Sequence[Op], find_packed: FindPacked) -> tuple[tuple[Op, ...], ...]:
    """Cut neighbouring ops into those that one chain can do, and single ones."""
    parts: list[list[Op]] = []
    is_open = False
    for op in ops:
        module = _MODULES.get(op.kind)
        if module is not None:
            fits = op.device == "cpu" and find_packed(op, module) is not None
        else:  # between a router and its experts, or after them, in the same run
            fits = op.kind in ("dispatch", "combine") and is_open
            fits = fits and parts[-1][-1].kind in ("router", "experts")
            # torch's experts, beside a router of ours, need what only their own dispatch sorts
            fits = fits and find_packed(op, "experts") is not None
        if fits and is_open:
            parts[-1].append(op)
        else:
            is_open = fits and op.kind in _FIRST
            parts.append([op])
    return tuple(tuple(part) for part in parts)


def build_run(
    ops: Sequence[Op],
    x_TD: NDArray[Any],
    step: CpuAttentionStep,
    kv: PagedKV,
    find_packed: FindPacked,
    kernels: CpuKernels,
    spec: ModelSpec,
) -> CpuRun:
    """Build the chain of a part of `split_runs`, for hidden states like x.

    The first op reads x where `Program.run` says; hidden states stay in one array from then on.
    """
    hidden_TD, has_written = cpu_layers.hidden_array(x_TD, kernels), False
    routing: CpuRouting | None = None
    y_TD: NDArray[np.float32] | None = None
    logits_LV: NDArray[np.float32] | None = None
    links: list[Link] = []
    reads_x: list[Link] = []
    ends: list[int] = []
    for op in ops:
        module = _MODULES.get(op.kind)
        weights = None if module is None else find_packed(op, module)
        found = Steps(links=())
        if op.kind == "attention":
            assert weights is not None and op.layer is not None
            window = spec.layers[op.layer].window
            layer_kv = kv.layer(op.layer)
            found = cpu_layers.attend_steps(
                hidden_TD, weights, layer_kv, step, kernels, spec, window, hidden_TD
            )
        elif op.kind == "dense":
            assert weights is not None
            found = cpu_layers.dense_steps(hidden_TD, weights, kernels, spec, hidden_TD)
        elif op.kind == "router":
            assert weights is not None and op.layer is not None
            top_k = spec.layers[op.layer].num_experts_per_token
            routing = cpu_layers.routing_arrays(x_TD, kernels, top_k)
            found = cpu_layers.route_steps(hidden_TD, weights, kernels, spec, routing)
        elif op.kind == "experts":
            assert weights is not None and routing is not None
            y_TD = cpu_layers.experts_output(x_TD, kernels)
            found = cpu_layers.experts_steps(routing, weights, kernels, y_TD)
        elif op.kind == "combine":
            assert y_TD is not None
            found = cpu_layers.combine_steps(hidden_TD, y_TD, hidden_TD)
        elif op.kind == "head":
            assert weights is not None
            logits_LV = cpu_layers.logits_array(x_TD, weights, kernels)
            found = cpu_layers.head_steps(hidden_TD, weights, kernels, spec.norm_eps)
        links += found.links
        ends.append(len(links))
        if not has_written:
            reads_x += found.reads_x
        if found.writes_out:
            has_written = True
    return CpuRun(
        program=kernels.workspace(len(x_TD)).compose(
            Steps(links=tuple(links), reads_x=tuple(reads_x))
        ),
        ends=np.array(ends),
        hidden_TD=hidden_TD if has_written else None,
        routing=routing,
        expert_output_TD=y_TD,
        logits_LV=logits_LV,
    )

"""Seconds of one op: a roofline on measured rates, with named bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from planner.hardware import Backend, DeviceKind, DeviceProfile, HardwareProfile
from planner.memory import KV_BLOCK_TOKENS
from planner.model_spec import ModelSpec, Module
from planner.simulate import simulate
from planner.step_graph import Op, OpKind, StepGraph
from planner.timeline import Timeline
from planner.workload import BatchShape

Bound = Literal["compute", "memory", "launch", "link"]
# Who computes the products of each module on the CPU, for a whole run: a matrix lies in memory as
# one backend reads it. One that is not named is by the first that has rates of its format.
Backends = Mapping[Module, Backend]
OWN_BACKENDS: Backends = MappingProxyType({})

# Small operations (norms, rotary, writes to the cache, residual adds) of an op, each of which costs
# a launch whatever its size. Counted in hetero/model: tests/planner/test_launch_counts.py.
_NUM_LAUNCHES = {
    "embed": 1,
    "attention": 17,
    "router": 8,
    "dispatch": 8,
    "experts": 4,
    "combine": 1,
    "dense": 7,
    "head": 5,
    "sample": 2,
}
# Links of the CPU's chains, which do more each: hetero/model/cpu_layers.py.
_NUM_CPU_LINKS = {
    "attention": 7,
    "router": 3,
    "dispatch": 0,
    "experts": 2,
    "combine": 1,
    "dense": 4,
    "head": 2,
}
# What a step does in Python outside its kernels, in launches of torch, which is Python too: at 4.2
# us each 1.08 ms where the caches hold weights only, as measured once (0.46 ms with all of it in
# the caches). 0.18 ms are the embedding's. The rest has no op of its own (the scheduler, the batch,
# tokens to text); it is counted to `sample`, which every step has once and a Timeline ends with.
_NUM_STEP_LAUNCHES = {"embed": 40, "sample": 210}
# The module whose backend an op goes by, where it is not the op's own.
_MODULE_OF_KIND: dict[str, Module] = {
    "attention": "attention",
    "router": "router",
    "dispatch": "experts",
    "experts": "experts",
    "combine": "experts",
    "dense": "dense",
    "head": "head",
}
# Gate-up and down. One kernel does a product of all experts at once (`has_grouped_products`), or
# every chosen expert has its own.
_NUM_EXPERT_PRODUCTS = 2
_LOGIT_BYTES = 4
_BATCH_BYTES_PER_TOKEN = 24  # token id, position and slot, int64 each
_ROUTING_ENTRY_BYTES = 12  # an int64 expert id and a float32 weight


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCost:
    """Seconds of an op and what they are made of; `bound` is the largest part."""

    compute_s: float = 0.0
    memory_s: float = 0.0
    launch_s: float = 0.0
    link_s: float = 0.0

    @property
    def seconds(self) -> float:
        """max(compute, memory) + launch + link."""
        return max(self.compute_s, self.memory_s) + self.launch_s + self.link_s

    @property
    def bound(self) -> Bound:
        parts: dict[Bound, float] = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "launch": self.launch_s,
            "link": self.link_s,
        }
        return max(parts, key=lambda name: parts[name])


def copy_bytes(op: Op, spec: ModelSpec, shape: BatchShape) -> float:
    """Bytes that a copy op moves in a step of this shape.

    Weights of experts count whole: which experts a step needs is not known when they are streamed.
    """
    assert op.kind == "copy"
    rows = shape.num_tokens
    if op.payload == "batch":
        table = math.ceil((shape.num_past_tokens + rows / shape.num_seqs) / KV_BLOCK_TOKENS)
        return float(rows * _BATCH_BYTES_PER_TOKEN + shape.num_seqs * table * 4)
    if op.payload == "weights":
        assert op.module is not None
        return float(spec.weight_bytes(op.module, op.layer))
    if op.payload == "logits":
        return float(shape.num_logits * spec.vocab_size * _LOGIT_BYTES)
    if op.payload == "kv":
        assert op.layer is not None
        return float(shape.num_tokens * spec.kv_bytes_per_token(op.layer))
    if op.payload == "hidden" and op.layer is None:
        rows = shape.num_logits
    num_bytes = float(rows * spec.hidden_size * spec.dtype_bytes)
    if op.payload == "routing":
        assert op.layer is not None
        num_bytes += rows * spec.layers[op.layer].num_experts_per_token * _ROUTING_ENTRY_BYTES
    return num_bytes


def op_cost(
    op: Op,
    spec: ModelSpec,
    hardware: HardwareProfile,
    shape: BatchShape,
    backends: Backends = OWN_BACKENDS,
) -> OpCost:
    """Price one op.

    Compute: FLOPs over the device's matrix-product rate at this token count (log-log between
    samples). Memory: bytes over the read rate. The larger counts, plus a launch for every small
    operation (roofline; reference formulas: Williams et al. 2009, eq. 1). Copies: latency + bytes
    over the link's rate. Experts read E(1-(1-k/E)^T) experts' weights.

    Raises
    ------
    ProfileError
        The profile lacks rates for the model's dtype.
    """
    if op.kind == "copy":
        link = hardware.link
        assert link is not None, "a copy needs a link"
        rate = link.h2d_bytes_per_s if op.lane == "h2d" else link.d2h_bytes_per_s
        return OpCost(link_s=link.latency_s + copy_bytes(op, spec, shape) / rate)
    device = hardware.cpu if op.lane == "cpu" else hardware.gpu
    assert device is not None, f"the machine has no {op.lane}"
    backend = _backend(op.kind, spec, device, backends)
    if op.kind == "attention":
        return _attention(op, spec, device, shape, backend)
    if op.kind == "experts":
        return _experts(op, spec, device, shape, backend)
    launch_s = _launch_s(op.kind, device, backend)
    rows = shape.num_logits if op.kind in ("head", "sample") else shape.num_tokens
    if op.kind in ("embed", "dispatch", "combine"):
        # One read and one write of the hidden states; dispatch copies them to each chosen expert.
        moved = 2.0 * rows * spec.hidden_size * spec.dtype_bytes
        if op.kind == "dispatch":
            assert op.layer is not None
            moved *= spec.layers[op.layer].num_experts_per_token
        launch_s += _NUM_STEP_LAUNCHES.get(op.kind, 0) * device.torch_op_s
        return OpCost(memory_s=moved / device.read_bytes_per_s, launch_s=launch_s)
    if op.kind == "sample":
        return OpCost(
            memory_s=rows * spec.vocab_size * _LOGIT_BYTES / device.read_bytes_per_s,
            launch_s=launch_s * max(1, rows) + _NUM_STEP_LAUNCHES["sample"] * device.torch_op_s,
        )
    assert op.module is not None
    if rows == 0:
        return OpCost(launch_s=launch_s)
    return OpCost(
        compute_s=spec.flops(op.module, rows, op.layer)
        / device.linear_flop_per_s(spec.weight_kind(op.module), rows, backend),
        memory_s=spec.weight_bytes(op.module, op.layer) / device.read_bytes_per_s,
        launch_s=launch_s,
    )


def _backend(
    kind: OpKind, spec: ModelSpec, device: DeviceProfile, backends: Backends
) -> Backend | None:
    """Whose products an op is made of; None where the device has no choice."""
    module = _MODULE_OF_KIND.get(kind)
    if module is None or device.kind != "cpu":
        return None
    found = device.backends(spec.weight_kind(module))
    return backends.get(module, found[0] if found else None)


def _launch_s(kind: OpKind, device: DeviceProfile, backend: Backend | None) -> float:
    """Seconds of an op's small operations: links of a chain of our kernels, or torch's."""
    if kind in _NUM_CPU_LINKS and device.kind == "cpu" and backend != "torch":
        return _NUM_CPU_LINKS[kind] * device.launch_s
    return _NUM_LAUNCHES[kind] * device.torch_op_s


def _attention(
    op: Op, spec: ModelSpec, device: DeviceProfile, shape: BatchShape, backend: Backend | None
) -> OpCost:
    """Projections as a product, then scores and values: bytes in decode, FLOPs in prefill."""
    assert op.layer is not None
    tokens = shape.num_tokens
    products_s = spec.flops("attention", tokens, op.layer) / device.linear_flop_per_s(
        spec.weight_kind("attention"), tokens, backend
    )
    weights_s = spec.weight_bytes("attention", op.layer) / device.read_bytes_per_s
    launch_s = _launch_s("attention", device, backend)
    if shape.phase == "decode":
        # Not rounded: the cost is affine in the context, so the mean context gives the mean cost.
        context = shape.num_past_tokens + 1
        window = spec.layers[op.layer].window
        if window is not None:
            context = min(window, context)
        kv_bytes = shape.num_seqs * context * spec.kv_bytes_per_token(op.layer)
        kv_s = kv_bytes / device.attention_bytes_per_s
        return OpCost(compute_s=products_s + kv_s, memory_s=weights_s + kv_s, launch_s=launch_s)
    each = max(1, round(tokens / shape.num_seqs))
    flops = shape.num_seqs * spec.attention_flops(op.layer, each, round(shape.num_past_tokens))
    scores_s = flops / device.attention_flop_per_s
    # Prefill attention is one call per sequence.
    launch_s *= 0.5 + 0.5 * shape.num_seqs
    return OpCost(compute_s=products_s + scores_s, memory_s=weights_s, launch_s=launch_s)


def _experts(
    op: Op, spec: ModelSpec, device: DeviceProfile, shape: BatchShape, backend: Backend | None
) -> OpCost:
    """Distinct experts, each with its share of the tokens."""
    assert op.layer is not None
    layer = spec.layers[op.layer]
    tokens = shape.num_tokens
    distinct = spec.distinct_experts(op.layer, tokens)
    tokens_each = tokens * layer.num_experts_per_token / distinct
    rate = device.linear_flop_per_s(spec.weight_kind("experts"), tokens_each, backend)
    num_calls = 1.0 if has_grouped_products(spec, device.kind) else distinct
    launch_s = _launch_s("experts", device, backend)
    if device.kind != "cpu" or backend == "torch":
        launch_s += num_calls * _NUM_EXPERT_PRODUCTS * device.torch_op_s
    return OpCost(
        compute_s=spec.flops("experts", tokens, op.layer) / rate,
        memory_s=distinct * spec.expert_bytes(op.layer) / device.read_bytes_per_s,
        launch_s=launch_s,
    )


def has_grouped_products(spec: ModelSpec, kind: DeviceKind) -> bool:
    """True where a device multiplies all experts in one kernel.

    CUDA has that kernel for bfloat16 rows of a multiple of 16 bytes; elsewhere each expert with
    tokens is a product of its own.
    """
    widths = {spec.hidden_size, *(layer.intermediate_size for layer in spec.layers if layer.is_moe)}
    is_aligned = all(width % 8 == 0 for width in widths)
    return kind == "cuda" and is_aligned and spec.dtype == "bfloat16"


class Pricer:
    """Op seconds for one (model, machine, batch shape), each distinct price worked out once.

    Layers of one shape cost the same, so a graph of a hundred layers has a handful of prices. The
    cache is the only state.
    """

    def __init__(
        self,
        spec: ModelSpec,
        hardware: HardwareProfile,
        shape: BatchShape,
        backends: Backends = OWN_BACKENDS,
    ) -> None:
        self.spec = spec
        self.hardware = hardware
        self.shape = shape
        self.backends = backends
        kinds = {layer: index for index, layer in enumerate(dict.fromkeys(spec.layers))}
        self._kind_of_layer = [kinds[layer] for layer in spec.layers]
        self._prices: dict[tuple[object, ...], float] = {}

    def __call__(self, op: Op) -> float:
        kind = None if op.layer is None else self._kind_of_layer[op.layer]
        key = (op.kind, op.lane, op.payload, op.module, kind)
        price = self._prices.get(key)
        if price is None:
            price = op_cost(op, self.spec, self.hardware, self.shape, self.backends).seconds
            self._prices[key] = price
        return price


def predict(
    graph: StepGraph,
    spec: ModelSpec,
    hardware: HardwareProfile,
    shape: BatchShape,
    backends: Backends = OWN_BACKENDS,
) -> Timeline:
    """Predicted Timeline of a step: every op priced, then simulated."""
    return simulate(graph, Pricer(spec, hardware, shape, backends))

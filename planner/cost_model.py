"""Seconds of one op, as the kernels that it is made of; with named bounds and a band."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import get_args

from planner.calibration import NO_CORRECTIONS, Corrections
from planner.device import DeviceKind, DeviceProfile, Sample
from planner.hardware import HardwareProfile
from planner.kernel_table import SOURCES, KernelEstimate, KernelTable, Source
from planner.kernels import Backend, Kernel, KernelCall, Resource
from planner.model_spec import LayerSpec, ModelSpec, Module, Quantization
from planner.placement import KV_BLOCK_TOKENS, NUM_EXPERT_CHUNKS
from planner.popularity import Popularity, independent_tokens
from planner.priors import prior
from planner.simulate import Slowdowns, simulate
from planner.split_rules import expected_fetched
from planner.step_graph import Lane, Op, OpKind, Payload, StepGraph
from planner.timeline import Timeline
from planner.workload import BatchShape, decode_shape

# Who computes the products of each module on the CPU, for a whole run: a matrix lies in memory as
# one backend reads it. One that is not named is by the first that has samples of its format.
Backends = Mapping[Module, Backend]
OWN_BACKENDS: Backends = MappingProxyType({})

# Passes over the hidden states (norms, rotary, writes to the cache, residual adds) of an op done by
# torch, its products and attention left out. Counted in hetero/model:
# tests/planner/test_launch_counts.py.
NUM_TORCH_PASSES: dict[OpKind, int] = {
    "embed": 1,
    "attention": 14,
    "qkv": 10,
    "attend": 2,
    "attention_output": 1,
    "router": 7,
    "dispatch": 7,
    "experts": 5,
    "combine": 1,
    "dense": 5,
    "head": 4,
}
# Passes over the scores of the GPU's part of a divided cache: scale, gather, mask, log-sum-exp and
# weights; and over what both devices give, where it is merged.
NUM_FRONT_PASSES = 12
NUM_MERGE_PASSES = 10
# The module whose backend an op goes by, where it is not the op's own.
_MODULE_OF_KIND: dict[str, Module] = {
    "attention": "attention",
    "qkv": "attention",
    "attention_output": "attention",
    "router": "router",
    "dispatch": "experts",
    "experts": "experts",
    "admit": "experts",
    "combine": "experts",
    "dense": "dense",
    "head": "head",
}
# Copies that a payload is made of, each with its own latency: six index tensors of a batch; hidden
# states, ids and weights of a routing; keys and values. Counted in hetero/model/decoder.py:
# tests/planner/test_launch_counts.py.
NUM_COPIES: dict[Payload, int] = {
    "batch": 6,
    "weights": 1,
    "hidden": 1,
    "qkv": 1,
    "attended": 1,
    "routing": 3,
    "guess": 1,
    "expert_output": 1,
    "dense_input": 1,
    "dense_output": 1,
    "logits": 1,
    "kv": 2,
}
_LOGIT_BYTES = 4
_SCORE_BYTES = 4
_LSE_BYTES = 4
_BATCH_BYTES_PER_TOKEN = 24  # token id, position and slot, int64 each
_ROUTING_ENTRY_BYTES = 12  # an int64 expert id and a float32 weight
_GUESS_ENTRY_BYTES = 8  # an int64 expert id
# Of the experts that a gate chooses, so many are among those that it would have chosen a layer
# before: published recalls of Mixtral, guessed so, are 0.8 to 0.9. Used where nothing is measured.
_GUESS_RECALL = 0.8
# A throttled link takes what it is told to; what others reach of their line rate: priors.py.
_EMULATED_COPY_SIGMA = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """Experts that some token chose, and how often tokens chose them; both expected."""

    distinct: float
    choices: float


NO_EXPERTS = ExpertLoad(distinct=0.0, choices=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCost:
    """Predicted seconds of an op.

    Attributes
    ----------
    seconds : float
        The median.
    sigma_s : float
        Standard deviation, as if all kernels of the op were off by as much at once.
    least_s : float
        What the device's ceilings allow.
    by_resource : dict
        What the seconds are made of, by the resource that bounds each kernel.
    source : Source
        The least certain origin of a kernel that takes a tenth of the seconds or more.
    """

    seconds: float = 0.0
    sigma_s: float = 0.0
    least_s: float = 0.0
    by_resource: dict[Resource, float] = field(default_factory=dict)
    source: Source = "measured"

    @property
    def bound(self) -> Resource:
        """The resource that takes most of the seconds."""
        return max(self.by_resource, key=lambda name: self.by_resource[name], default="launch")


def copy_bytes(op: Op, spec: ModelSpec, shape: BatchShape) -> float:
    """Bytes that a copy op moves in a step of this shape.

    Weights count whole, but for residents: which experts a step needs is not known when they are
    streamed.
    """
    assert op.kind == "copy"
    rows = shape.num_tokens
    if op.payload == "batch":
        table = math.ceil((shape.num_past_tokens + rows / shape.num_seqs) / KV_BLOCK_TOKENS)
        return float(rows * _BATCH_BYTES_PER_TOKEN + shape.num_seqs * table * 4)
    if op.payload == "weights":
        assert op.module is not None
        weights = spec.weight_bytes(op.module, op.layer)
        if op.part == "missed":
            assert op.layer is not None
            weights = spec.part_bytes(op.module, op.layer, op.num_resident)[1]
        return float(weights)
    if op.payload == "logits":
        return float(shape.num_logits * spec.vocab_size * _LOGIT_BYTES)
    if op.payload == "kv":
        assert op.layer is not None
        kept = spec.state_bytes(op.layer)  # of the one sequence that a move is of
        on_gpu = min(shape.num_tokens, op.num_gpu_kv_tokens)
        num_tokens = on_gpu if on_gpu and op.lane == "h2d" else shape.num_tokens - on_gpu
        return float(num_tokens * spec.kv_bytes_per_token(op.layer) + kept)
    if op.payload in ("qkv", "attended"):
        width = spec.q_size + (2 * spec.kv_size if op.payload == "qkv" else 0)
        lse = spec.num_heads if op.part == "rest" else 0
        return float(rows * (width * spec.dtype_bytes + lse * _LSE_BYTES))
    if op.payload == "guess":
        assert op.layer is not None
        return float(rows * spec.layers[op.layer].num_experts_per_token * _GUESS_ENTRY_BYTES)
    if op.payload == "hidden" and op.layer is None:
        rows = shape.num_logits
    num_bytes = float(rows * spec.hidden_size * spec.dtype_bytes)
    if op.payload == "routing":
        assert op.layer is not None
        num_bytes += rows * spec.layers[op.layer].num_experts_per_token * _ROUTING_ENTRY_BYTES
    return num_bytes


# A kernel's call, and how many times an op makes it.
_Calls = list[tuple[KernelCall, float]]


class CostModel:
    """Prices of ops on one machine.

    Parameters
    ----------
    hardware : HardwareProfile
        Ceilings, samples, link.
    corrections : Corrections
        What earlier runs say that predictions must be multiplied with.
    popularity : Popularity, optional
        How often each expert is chosen; None: as it usually is.
    """

    def __init__(
        self,
        hardware: HardwareProfile,
        *,
        corrections: Corrections = NO_CORRECTIONS,
        popularity: Popularity | None = None,
    ) -> None:
        self.hardware = hardware
        self.corrections = corrections
        self.popularity = popularity
        self._usual: dict[tuple[int, int], Popularity] = {}
        self._expert_times: dict[tuple[LayerSpec, float], tuple[float, float]] = {}
        self._backends_of_kind: dict[str, tuple[Backend, ...]] = {}
        cpu, gpu, link = hardware.cpu, hardware.gpu, hardware.link
        self._tables: dict[Lane, KernelTable] = {
            "cpu": KernelTable(cpu, hardware.samples, "cpu", hardware.cpu_by_threads)
        }
        if gpu is not None and link is not None:
            self._tables["gpu"] = KernelTable(gpu, hardware.samples, "gpu")
            rates: dict[Lane, float] = {"h2d": link.h2d_bytes_per_s, "d2h": link.d2h_bytes_per_s}
            for lane, rate in rates.items():
                copies = [each for each in hardware.samples if each.lane == lane]
                if copies:
                    self._tables[lane] = _copy_table(gpu, lane, rate, copies)

    def op_cost(
        self,
        op: Op,
        spec: ModelSpec,
        shape: BatchShape,
        backends: Backends = OWN_BACKENDS,
    ) -> OpCost:
        """Price one op, without corrections.

        Each kernel takes its speed of light over its measured utilisation (`KernelTable`); one that
        was never measured also a launch. Copies: a latency, and bytes over the link's rate.
        Experts read the weights of those that some token is expected to choose.

        Raises
        ------
        ProfileError
            The profile lacks rates for the model's format.
        """
        if op.kind == "copy":
            return self._copy_cost(op, spec, shape)
        device = self._tables[op.lane].device
        backend = self._backend(op, spec, backends)
        has_load = op.kind in ("experts", "admit")
        load = self.expert_load(op, spec, shape) if has_load else NO_EXPERTS
        calls = _op_calls(op, spec, shape, backend, device.kind, load)
        if op.lane == "cpu" and _is_of_its_own(op, shape, backend):
            calls.append((KernelCall(kernel="op", backend="torch"), 1.0))
        return self._sum(op.lane, calls)

    def host_cost(self, shape: BatchShape) -> OpCost:
        """What a step takes beside its ops: the scheduler, the batch, tokens to text."""
        call = KernelCall(kernel="step", backend="torch", num_seqs=shape.num_seqs)
        return self._sum("cpu", [(call, 1.0)])

    def _sum(self, lane: Lane, calls: _Calls) -> OpCost:
        table = self._tables[lane]
        by_resource: dict[Resource, float] = {}
        seconds = sigma_s = least_s = 0.0
        parts: list[tuple[float, KernelEstimate]] = []
        for call, times in calls:
            each = table.estimate(call)
            part_s = times * each.seconds
            if each.source == "prior" and each.resource != "launch":
                launch_s = times * _launch_s(call, table.device)
                by_resource["launch"] = by_resource.get("launch", 0.0) + launch_s
                seconds += launch_s
                sigma_s += launch_s * each.sigma
            by_resource[each.resource] = by_resource.get(each.resource, 0.0) + part_s
            seconds += part_s
            sigma_s += part_s * each.sigma
            least_s += times * each.least_s
            parts.append((part_s, each))
        known: list[Source] = [each.source for part_s, each in parts if part_s >= 0.1 * seconds]
        return OpCost(
            seconds=seconds,
            sigma_s=sigma_s,
            least_s=least_s,
            by_resource=by_resource,
            source=max(known, key=SOURCES.index, default="measured"),
        )

    @cached_property
    def slowdowns(self) -> Slowdowns:
        """What lanes that work at the same time cost each other.

        As measured beside each other; otherwise copies and the CPU share the rate of its memory in
        proportion to what each would take alone.
        """
        cpu, link = self.hardware.cpu, self.hardware.link
        if link is None:
            return {}
        both = cpu.read_bytes_per_s + link.h2d_bytes_per_s
        shared = both / cpu.read_bytes_per_s
        found: dict[tuple[Lane, Lane], float] = {("cpu", "h2d"): shared, ("h2d", "cpu"): shared}
        ratios: dict[tuple[Lane, Lane], list[float]] = {}
        for sample in self.hardware.samples:
            for other in sample.busy:
                table = self._tables.get(sample.lane)
                is_used = sample.lane != "cpu" or sample.num_threads == cpu.num_threads
                if table is None or not is_used or other == sample.lane:
                    continue
                alone_s = table.estimate(sample.call).seconds
                ratios.setdefault((sample.lane, other), []).append(sample.seconds / alone_s)
        for lanes, seen in ratios.items():
            found[lanes] = max(1.0, statistics.median(seen))
        return found

    def _copy_cost(self, op: Op, spec: ModelSpec, shape: BatchShape) -> OpCost:
        assert op.payload is not None
        count: float = NUM_COPIES[op.payload]
        num_bytes = copy_bytes(op, spec, shape)
        if op.part == "fetched":
            assert op.layer is not None
            on_gpu = self.expert_load(op, spec, shape).distinct
            if not on_gpu:
                return OpCost()
            ready = self._num_arrived(op, spec, shape) if op.prefetch else 0.0
            count = max(0.0, on_gpu - ready)
            num_bytes = count * spec.expert_bytes(op.layer)
            # and the numbers of the slots
            count = 1.0 + (max(1.0, count) if count else 0.0)
        elif op.gives_way:
            assert op.layer is not None
            count = NUM_EXPERT_CHUNKS * self._num_prefetched(op, spec, shape)
            count = count if op.num_chunks is None else op.num_chunks
            if not count:
                return OpCost()
            num_bytes = count * spec.expert_bytes(op.layer) / NUM_EXPERT_CHUNKS
        return self._copy_s(num_bytes, count, op.lane)

    def _copy_s(self, num_bytes: float, count: float, lane: Lane) -> OpCost:
        """Seconds of some bytes in so many copies."""
        link, num_bytes = self.hardware.link, max(1.0, num_bytes)
        assert link is not None, "a copy needs a link"
        assert self.hardware.gpu is not None
        is_cuda = self.hardware.gpu.kind == "cuda"
        start_s = link.latency_s
        if not is_cuda:
            # a throttled copy waits for its time to pass, and wakes as late as a lane does
            handover = KernelCall(kernel="handover", backend="torch")
            start_s += self._tables["cpu"].estimate(handover).seconds
        if lane in self._tables:
            each = KernelCall(
                kernel="copy", shape=(num_bytes / count,), memory="pinned", backend="torch"
            )
            cost = self._sum(lane, [(each, float(count))])
            seconds = cost.seconds + count * start_s
            return replace(cost, seconds=seconds, by_resource={"link": seconds})
        rate = link.h2d_bytes_per_s if lane == "h2d" else link.d2h_bytes_per_s
        least_s, share, sigma = num_bytes / rate, 1.0, _EMULATED_COPY_SIGMA
        if is_cuda:
            assumed = prior("copy", "link", "cuda", "float32")
            share, sigma = assumed.utilisation, assumed.sigma
        seconds = count * start_s + least_s / share
        return OpCost(
            seconds=seconds,
            sigma_s=sigma * seconds,
            least_s=least_s,
            by_resource={"link": seconds},
            source="prior" if self.hardware.provenance == "datasheet" else "interpolated",
        )

    def _backend(self, op: Op, spec: ModelSpec, backends: Backends) -> Backend:
        """Whose kernels an op is made of."""
        module = _MODULE_OF_KIND.get(op.kind)
        if module is None:
            return "torch"
        if op.lane != "cpu":
            return "panels" if spec.weight_kind(module) in get_args(Quantization) else "torch"
        return self._backend_of(spec, module, backends)

    def _backend_of(self, spec: ModelSpec, module: Module, backends: Backends) -> Backend:
        """Whose kernels the CPU runs a module with."""
        if module in backends:
            return backends[module]
        kind = spec.weight_kind(module)
        if kind not in self._backends_of_kind:
            self._backends_of_kind[kind] = self.hardware.backends(kind)
        found = self._backends_of_kind[kind]
        return found[0] if found else "numba"

    def expert_load(self, op: Op, spec: ModelSpec, shape: BatchShape) -> ExpertLoad:
        """Expected work of the experts of a layer, or of those of an op's part."""
        whole, distinct, share = self._resident_share(op, spec, shape)
        if op.part == "all":
            return whole
        if op.part == "resident":
            return ExpertLoad(distinct=distinct, choices=share * whole.choices)
        missed = self._missed(op, spec, shape)
        if op.part == "missed" or not missed.distinct:
            return missed
        fetched = sum(self._division(op, spec, shape, missed)) / missed.distinct
        part = fetched if op.part == "fetched" else 1.0 - fetched
        return ExpertLoad(distinct=part * missed.distinct, choices=part * missed.choices)

    def _resident_share(
        self, op: Op, spec: ModelSpec, shape: BatchShape
    ) -> tuple[ExpertLoad, float, float]:
        """Expected work of all experts of a layer; of those in its slots how many, and their share.

        Slots that change are priced as if every missed expert were admitted.
        """
        assert op.layer is not None
        layer = spec.layers[op.layer]
        popularity, row = self._popularity_of(layer, op.layer)
        tokens = independent_tokens(shape.num_tokens, shape.num_seqs)
        whole = ExpertLoad(
            distinct=popularity.distinct_experts(row, tokens),
            choices=shape.num_tokens * layer.num_experts_per_token,
        )
        if op.part == "all":
            return whole, 0.0, 0.0
        find = popularity.resident_load if op.slots == "static" else popularity.lru_load
        return (whole, *find(row, tokens, op.num_resident))

    def _missed(self, op: Op, spec: ModelSpec, shape: BatchShape) -> ExpertLoad:
        """Expected work of the experts of a layer that are not resident."""
        whole, distinct, share = self._resident_share(op, spec, shape)
        return ExpertLoad(
            distinct=max(0.0, whole.distinct - distinct), choices=(1.0 - share) * whole.choices
        )

    def _division(
        self, op: Op, spec: ModelSpec, shape: BatchShape, missed: ExpertLoad
    ) -> tuple[float, float]:
        """Expected missed experts of a split layer that were copied ahead, and that are fetched."""
        assert op.layer is not None
        if not missed.distinct:
            return 0.0, 0.0
        ready = self._num_arrived(op, spec, shape) if op.prefetch else 0.0
        cpu_s, fetch_s = self.expert_times(spec, op.layer, missed.choices / missed.distinct)
        room = max(0, op.max_fetched - math.ceil(ready))
        return ready, expected_fetched(missed.distinct - ready, cpu_s, fetch_s, room)

    def _num_prefetched(self, op: Op, spec: ModelSpec, shape: BatchShape) -> float:
        """Expected experts that a layer copies ahead if the link is left to it: as it misses."""
        return min(op.max_fetched, self._missed(op, spec, shape).distinct)

    def _num_arrived(self, op: Op, spec: ModelSpec, shape: BatchShape) -> float:
        """Expected experts that are there before the gate chooses, and chosen by it.

        The link has the time of the layer's attention and router, which the GPU computes (the CPU
        takes longer); of what it brings then as many are wrong as guesses are.
        """
        assert op.layer is not None
        before = (
            Op(index=0, kind="attention", lane="gpu", layer=op.layer),
            Op(index=1, kind="router", lane="gpu", layer=op.layer),
            Op(index=2, kind="copy", lane="d2h", layer=op.layer, payload="routing"),
        )
        window_s = sum(self.op_cost(each, spec, shape).seconds for each in before)
        one_s = self._copy_s(spec.expert_bytes(op.layer), NUM_EXPERT_CHUNKS, "h2d").seconds
        return _GUESS_RECALL * min(window_s / one_s, self._num_prefetched(op, spec, shape))

    def expert_times(self, spec: ModelSpec, layer: int, tokens_each: float) -> tuple[float, float]:
        """Seconds of one expert on the CPU and of copying one, while the other does both.

        By these a step divides its missed experts, whether it is priced or run.
        """
        link = self.hardware.link
        assert link is not None, "a copy needs a link"
        key = (spec.layers[layer], round(math.log2(max(1.0, tokens_each)), 2))
        if key not in self._expert_times:
            # Eight experts are as many as share a call's fixed cost in a step.
            count = 8.0
            call = KernelCall(
                kernel="experts",
                shape=(count, spec.hidden_size, spec.gated_size(layer)),
                format=spec.weight_kind("experts"),
                backend=self._backend_of(spec, "experts", OWN_BACKENDS),
                num_tokens=tokens_each,
            )
            cpu_s = self._tables["cpu"].estimate(call).seconds / count
            copied = self._copy_s(spec.expert_bytes(layer), 1, "h2d").seconds
            slowdowns = self.slowdowns
            self._expert_times[key] = (
                cpu_s * slowdowns.get(("cpu", "h2d"), 1.0),
                copied * slowdowns.get(("h2d", "cpu"), 1.0),
            )
        return self._expert_times[key]

    def _popularity_of(self, layer: LayerSpec, index: int) -> tuple[Popularity, int]:
        """The popularity of a layer's experts, and its row."""
        if self.popularity is not None:
            return self.popularity, index
        key = (layer.num_experts, layer.num_experts_per_token)
        if key not in self._usual:
            self._usual[key] = Popularity.usual(*key)
        return self._usual[key], 0


def _copy_table(
    gpu: DeviceProfile, lane: Lane, rate: float, copies: Iterable[Sample]
) -> KernelTable:
    """Copies in one direction; the link's ceiling is its fastest copy."""
    found = tuple(copies)
    fastest = max(sample.shape[0] / sample.seconds for sample in found)
    link = DeviceProfile(
        name=f"{lane} link of {gpu.name}",
        kind=gpu.kind,
        memory_bytes=0,
        read_bytes_per_s=max(rate, fastest),
        flop_per_s={},
        launch_s=0.0,
    )
    return KernelTable(link, found, lane)


def _launch_s(call: KernelCall, device: DeviceProfile) -> float:
    """Seconds of starting a kernel: a link of a chain of ours, or operations of torch."""
    if call.backend == "numba":
        return device.launch_s
    return device.torch_op_s * (
        1 + (NUM_TORCH_PASSES["experts"] if call.kernel == "experts" else 0)
    )


def _op_calls(
    op: Op,
    spec: ModelSpec,
    shape: BatchShape,
    backend: Backend,
    kind: DeviceKind,
    load: ExpertLoad,
) -> _Calls:
    """The kernels that an op calls."""
    rows = shape.num_logits if op.kind in ("head", "sample") else shape.num_tokens
    if op.kind == "sample":
        call = KernelCall(
            kernel="sample", backend="torch", shape=(spec.vocab_size,), num_seqs=max(1, rows)
        )
        return [(call, 1.0)]
    if rows == 0 or (op.kind == "dispatch" and op.part == "prefetched"):
        return []
    if op.kind == "admit":
        assert op.layer is not None
        # one pass over an expert's matrices, as rows of the hidden size
        admitted = load.distinct * 3 * spec.gated_size(op.layer)
        return [(_rowwise("elementwise", spec.hidden_size, admitted, "torch"), 1.0)] * bool(
            admitted
        )
    if op.kind == "embed" and op.lane == "cpu":
        return [
            (KernelCall(kernel="embed", backend="torch", num_tokens=rows), 1.0),
            (_rowwise("elementwise", spec.hidden_size, rows, "torch"), 1.0),
        ]
    calls = _small_calls(op, spec, rows) if backend == "numba" else _passes(op, spec, shape, rows)
    if op.kind == "experts":
        if not load.distinct:
            return []
        calls.append((_experts_call(op, spec, backend, load), 1.0))
    elif op.kind in ("attention", "qkv", "attention_output", "router", "dense", "head"):
        calls += _product_calls(op, spec, rows, backend)
    if op.kind in ("attention", "attend"):
        calls += _attention_calls(op, spec, shape, backend, kind)
    return calls


def _passes(op: Op, spec: ModelSpec, shape: BatchShape, rows: int) -> _Calls:
    """What torch does beside products, attention and experts."""
    count, width = float(NUM_TORCH_PASSES[op.kind]), spec.hidden_size
    if op.kind == "experts":
        return []  # which were measured with what is around their products
    if op.kind == "attend":
        seen = _seen_tokens(op, spec, shape)
        if not seen:
            return []
        if op.part == "resident":
            scores = _rowwise("elementwise", spec.num_heads * seen, rows, "torch")
            passes = [(scores, float(NUM_FRONT_PASSES))]
            if spec.dtype_bytes < _SCORE_BYTES:  # keys and values are widened
                widened = _rowwise("elementwise", 2 * spec.kv_size * seen, rows, "torch")
                passes.append((widened, 1.0))
            return passes
        # to float32 and back by torch; our kernel writes keys and values into the cache
        qkv = spec.q_size + 2 * spec.kv_size
        return [
            (_rowwise("elementwise", qkv, rows, "torch"), count),
            (_rowwise("rotary", qkv, rows, "numba"), 1.0),
        ]
    if op.kind == "dense" and op.part == "missed":
        count -= 1  # the residual goes with the residents
    if op.kind != "dispatch":
        passes = [(_rowwise("elementwise", width, rows, "torch"), count)]
        if op.kind == "attention_output" and op.num_gpu_kv_tokens:
            merge = _rowwise("elementwise", spec.q_size, rows, "torch")
            passes.append((merge, float(NUM_MERGE_PASSES)))
        return passes
    assert op.layer is not None
    # one pass gathers rows for all choices, the others sort numbers
    choices = rows * spec.layers[op.layer].num_experts_per_token
    return [
        (_rowwise("elementwise", width, 1, "torch"), count - 1),
        (_rowwise("elementwise", width, choices, "torch"), 1.0),
    ]


def _is_of_its_own(op: Op, shape: BatchShape, backend: Backend) -> bool:
    """Is an op called from Python? Chains of a decode step go through layers, others do not."""
    if op.part == "prefetched":
        return True  # the choice of what to copy, by Python alone
    if op.kind == "attend" or (op.kind in ("dense", "experts") and op.part != "all"):
        return True  # what it reads is copied to the CPU for it: it is in no chain
    if op.kind in ("embed", "dispatch", "sample"):
        return False  # nothing is done for our experts, others have their own Python
    return backend == "numba" and shape.phase == "prefill"


def _rowwise(kernel: Kernel, width: float, rows: float, backend: Backend) -> KernelCall:
    return KernelCall(kernel=kernel, shape=(width,), num_tokens=rows, backend=backend)


def _small_calls(op: Op, spec: ModelSpec, rows: int) -> _Calls:
    """Norms and the like of an op by our kernels."""
    hidden = spec.hidden_size
    norm = (_rowwise("norm", hidden, rows, "numba"), 1.0)
    residual = (_rowwise("residual", hidden, rows, "numba"), 1.0)
    if op.kind == "attention":
        qkv = spec.q_size + 2 * spec.kv_size
        return [norm, (_rowwise("rotary", qkv, rows, "numba"), 1.0), residual]
    if op.kind == "router":
        assert op.layer is not None
        layer = spec.layers[op.layer]
        choices = (layer.num_experts, layer.num_experts_per_token)
        route = KernelCall(kernel="route", shape=choices, num_tokens=rows)
        return [norm, (route, 1.0)]
    if op.kind == "dense":
        return [norm, residual] if op.part == "all" else [norm]
    if op.kind == "combine":
        return [residual]
    return [norm] if op.kind == "head" else []


def _product_calls(op: Op, spec: ModelSpec, rows: int, backend: Backend) -> _Calls:
    """The products of a module; a dense feed-forward is one expert that all tokens choose."""
    module = _MODULE_OF_KIND[op.kind]
    weights = spec.weight_kind(module)
    if op.kind == "dense" and backend == "numba":
        assert op.layer is not None
        if not spec.matrices("dense", op.layer):  # an attention that no feed-forward follows
            return []
        gated = spec.gated_size(op.layer, _columns(op, spec))
        shape = (1.0, spec.hidden_size, gated)
        return [(KernelCall(kernel="experts", shape=shape, format=weights, num_tokens=rows), 1.0)]
    matrices = spec.matrices(module, op.layer, _columns(op, spec))
    if op.kind in ("qkv", "attention_output"):
        matrices = matrices[:-1] if op.kind == "qkv" else matrices[-1:]
    return [
        (
            KernelCall(
                kernel="linear",
                shape=(num_rows, num_columns),
                format=weights,
                backend=backend,
                num_tokens=rows,
            ),
            float(count),
        )
        for count, num_rows, num_columns in matrices
    ]


def _columns(op: Op, spec: ModelSpec) -> int | None:
    """Columns of a part of a divided feed-forward; None of whole modules."""
    if op.kind != "dense" or op.part == "all":
        return None
    assert op.layer is not None
    columns = spec.dense_columns(op.layer, op.num_resident)
    return columns if op.part == "resident" else spec.layers[op.layer].intermediate_size - columns


def _attention_calls(
    op: Op, spec: ModelSpec, shape: BatchShape, backend: Backend, kind: DeviceKind
) -> _Calls:
    """Scores and values: one call for a decode step, one for each sequence of a prefill."""
    assert op.layer is not None
    heads = spec.attention_heads(op.layer, shape.phase)
    if shape.phase == "decode":
        # Not rounded: the cost is affine in the context, so the mean context gives the mean cost.
        context = _seen_tokens(op, spec, shape)
        if not context:
            return []
        call = KernelCall(
            kernel="decode_attention",
            shape=heads,
            format=spec.dtype,
            backend="torch" if kind != "cpu" else "numba",
            num_seqs=shape.num_seqs,
            context=context,
        )
        return [(call, 1.0)]
    tokens = max(1.0, shape.num_tokens / shape.num_seqs)
    span, past = tokens, shape.num_past_tokens
    layer = spec.layers[op.layer]
    if layer.window is not None or layer.attention is not None:
        # What a query sees on average; causal calls of a span of tokens with no past see as much
        # where a window or a state keeps it below half of the new tokens.
        flops = spec.attention_flops(op.layer, round(tokens), round(past))
        seen = flops / (4 * heads[0] * heads[2] * round(tokens))
        span = max(1.0, min(tokens, 2 * seen - 1))
        # no past is another kernel: what rounding leaves is none
        past = round(max(0.0, seen - (tokens + 1) / 2), 3)
    call = KernelCall(
        kernel="prefill_attention",
        shape=heads,
        # whatever the model's format: cpu_layers.py widens queries, keys and values for torch
        format="float32" if kind == "cpu" and backend == "numba" else spec.dtype,
        backend="torch",
        num_tokens=span,
        context=past,
    )
    return [(call, shape.num_seqs * tokens / span)]


def _seen_tokens(op: Op, spec: ModelSpec, shape: BatchShape) -> float:
    """Tokens of its context that a query sees in a decode step; of a divided cache, of a part."""
    assert op.layer is not None
    context = shape.num_past_tokens + 1
    seen = spec.seen_tokens(op.layer, context)
    if op.kind != "attend" or not op.num_gpu_kv_tokens:
        return seen
    rest = min(seen, max(0.0, context - op.num_gpu_kv_tokens))
    return rest if op.part == "rest" else seen - rest


def _experts_call(op: Op, spec: ModelSpec, backend: Backend, load: ExpertLoad) -> KernelCall:
    """Distinct experts, each with its share of the tokens; a part of one is one less often."""
    assert op.layer is not None
    return KernelCall(
        kernel="experts",
        shape=(load.distinct, spec.hidden_size, spec.gated_size(op.layer)),
        format=spec.weight_kind("experts"),
        backend=backend,
        num_tokens=load.choices / load.distinct,
    )


def sub_batch_shape(op: Op, shape: BatchShape) -> BatchShape:
    """The part of a decode step that an op of a sub-batch is for."""
    planned, known = op.num_second_seqs, shape.num_second_seqs
    second = min(planned, shape.num_seqs - 1) if known is None else known
    num_seqs = second if op.sub_batch else shape.num_seqs - second
    return decode_shape(num_seqs, shape.num_past_tokens)


class Pricer:
    """Op seconds for one (model, machine, batch shape), each distinct price worked out once.

    Layers of one shape cost the same, so a graph of a hundred layers has a handful of prices. The
    cache is the only state.
    """

    def __init__(
        self,
        spec: ModelSpec,
        costs: CostModel,
        shape: BatchShape,
        backends: Backends = OWN_BACKENDS,
    ) -> None:
        self.spec = spec
        self.costs = costs
        self.shape = shape
        self.backends = backends
        kinds = {layer: index for index, layer in enumerate(dict.fromkeys(spec.layers))}
        by_layer = costs.popularity is not None and costs.popularity.is_by_layer
        self._kind_of_layer = [
            index if by_layer else kinds[layer] for index, layer in enumerate(spec.layers)
        ]
        self._costs: dict[tuple[object, ...], OpCost] = {}
        self._seconds: dict[tuple[object, ...], float] = {}

    def __call__(self, op: Op) -> float:
        """Seconds of an op, corrected by what earlier runs measured."""
        key = self._key(op)
        seconds = self._seconds.get(key)
        if seconds is None:
            factor = self.costs.corrections.factor(op.lane, op.term, self.shape.phase)
            seconds = self._seconds[key] = self.cost(op).seconds * factor
        return seconds

    def _key(self, op: Op) -> tuple[object, ...]:
        """What ops of one price share."""
        kind = None if op.layer is None else self._kind_of_layer[op.layer]
        part = (op.part, op.num_resident, op.max_fetched, op.sub_batch, op.num_second_seqs)
        slots = (op.slots, op.prefetch, op.num_chunks, op.num_gpu_kv_tokens)
        return (op.kind, op.lane, op.payload, op.module, kind, part, slots)

    def cost(self, op: Op) -> OpCost:
        """Price of an op without corrections."""
        key = self._key(op)
        found = self._costs.get(key)
        if found is None:
            shape = self.shape if op.sub_batch is None else sub_batch_shape(op, self.shape)
            found = self.costs.op_cost(op, self.spec, shape, self.backends)
            self._costs[key] = found
        return found

    def sigma(self, op: Op) -> float:
        """Standard deviation of the logarithm of an op's corrected seconds."""
        known = self.costs.corrections.sigma(op.lane, op.term, self.shape.phase)
        cost = self.cost(op)
        if known is not None:
            return known
        return cost.sigma_s / cost.seconds if cost.seconds > 0 else 0.0

    @property
    def host_cost(self) -> OpCost:
        """Price of what a step takes beside its ops, without corrections."""
        return self.costs.host_cost(self.shape)

    @property
    def host_sigma(self) -> float:
        """Standard deviation of the logarithm of `host_s`."""
        known = self.costs.corrections.sigma("host", "host", self.shape.phase)
        cost = self.host_cost
        if known is not None:
            return known
        return cost.sigma_s / cost.seconds if cost.seconds > 0 else 0.0

    @property
    def host_s(self) -> float:
        """Seconds that a step takes beside its ops, corrected."""
        factor = self.costs.corrections.factor("host", "host", self.shape.phase)
        return self.host_cost.seconds * factor


def predict(
    graph: StepGraph,
    spec: ModelSpec,
    costs: CostModel,
    shape: BatchShape,
    backends: Backends = OWN_BACKENDS,
) -> Timeline:
    """Predicted Timeline of a step: every op priced, then simulated."""
    return simulate(graph, Pricer(spec, costs, shape, backends), costs.slowdowns)

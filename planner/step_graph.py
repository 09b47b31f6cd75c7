"""StepGraph: the ops of one step on their lanes, with dependencies; priced and executed alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.model_spec import ModelSpec, Module
from planner.placement import NUM_STREAM_BUFFERS, Device, LayerPlacement, TierPlacement
from planner.workload import Phase

Lane = Literal["gpu", "cpu", "h2d", "d2h"]
Term = Literal["attention", "router", "dispatch", "experts", "dense", "head", "transfer"]
OpKind = Literal[
    "embed",
    "attention",
    "router",
    "dispatch",
    "experts",
    "combine",
    "dense",
    "head",
    "sample",
    "copy",
]
# Which of a layer's experts: those resident on the GPU, the missed ones (all others), and of these,
# where a step's tokens decide, those that are fetched to the GPU and the rest.
Part = Literal["all", "resident", "missed", "fetched", "rest"]
Payload = Literal["batch", "weights", "hidden", "routing", "expert_output", "logits", "kv"]

LANES: tuple[Lane, ...] = ("gpu", "cpu", "h2d", "d2h")

_TERM_OF_KIND: dict[OpKind, Term] = {
    "embed": "dense",
    "attention": "attention",
    "router": "router",
    "dispatch": "dispatch",
    "experts": "experts",
    "combine": "dispatch",
    "dense": "dense",
    "head": "head",
    "sample": "head",
    "copy": "transfer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One piece of work on one lane.

    Attributes
    ----------
    index : int
        Position in the graph; ops of a lane run in this order.
    kind : OpKind
        `dispatch` sorts tokens by expert, and decides what a split layer fetches; `combine` adds
        the outputs of experts, or of their parts, to the hidden states; `embed` looks up token
        embeddings; `copy` moves a `payload` between the memories.
    layer : int or None
        Layer that the op belongs to.
    module : Module or None
        For a copy of weights, the module that is streamed.
    buffer : int or None
        For a copy of weights and the op that reads them, the staging buffer.
    part : Part
        For experts, their dispatch and copies of them, which of the layer's.
    num_resident : int
        For ops of a part, how many of the layer's experts are resident on the GPU.
    max_fetched : int
        For parts that a step decides on, experts that are fetched at most.
    deps : tuple of int
        Ops (of any lane) that must have ended before this one begins.
    """

    index: int
    kind: OpKind
    lane: Lane
    deps: tuple[int, ...] = ()
    layer: int | None = None
    payload: Payload | None = None
    module: Module | None = None
    buffer: int | None = None
    part: Part = "all"
    num_resident: int = 0
    max_fetched: int = 0

    @property
    def term(self) -> Term:
        return _TERM_OF_KIND[self.kind]

    @property
    def device(self) -> Device:
        """The device whose memory holds the result."""
        return "gpu" if self.lane in ("gpu", "h2d") else "cpu"

    @property
    def name(self) -> str:
        """A name that is unique in the graph: `experts[3]`, `copy weights attention[0] h2d`."""
        words = [self.kind if self.payload is None else f"copy {self.payload}"]
        if self.part != "all":
            words.append(self.part)
        if self.module is not None and self.kind == "copy":
            words.append(self.module)
        text = " ".join(words) + ("" if self.layer is None else f"[{self.layer}]")
        return text if self.kind != "copy" else f"{text} {self.lane}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGraph:
    """Ops of one step in a topological order."""

    phase: Phase
    ops: tuple[Op, ...]

    def lane(self, lane: Lane) -> tuple[Op, ...]:
        """Ops of one lane, in the order in which they run."""
        return tuple(op for op in self.ops if op.lane == lane)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """Lanes that have ops."""
        used = {op.lane for op in self.ops}
        return tuple(lane for lane in LANES if lane in used)


class _Builder:
    """Appends ops and remembers which op last produced each thing."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.buffer_readers: dict[int, tuple[int, ...]] = {}
        self.slot_readers: list[int] = []

    def add(
        self,
        kind: OpKind,
        lane: Lane,
        deps: tuple[int, ...],
        *,
        layer: int | None = None,
        payload: Payload | None = None,
        module: Module | None = None,
        buffer: int | None = None,
        part: Part = "all",
        num_resident: int = 0,
        max_fetched: int = 0,
    ) -> int:
        self.ops.append(
            Op(
                index=len(self.ops),
                kind=kind,
                lane=lane,
                deps=deps if len(deps) < 2 else tuple(sorted(set(deps))),
                layer=layer,
                payload=payload,
                module=module,
                buffer=buffer,
                part=part,
                num_resident=num_resident,
                max_fetched=max_fetched,
            )
        )
        return len(self.ops) - 1

    def move(self, payload: Payload, target: Device, after: int, layer: int | None = None) -> int:
        return self.add(
            "copy", "h2d" if target == "gpu" else "d2h", (after,), payload=payload, layer=layer
        )


def build(spec: ModelSpec, tier: TierPlacement) -> StepGraph:
    """Write down one step of a tier.

    The graph holds for every batch shape of the tier: shapes enter when it is priced
    (`cost_model.op_cost`) or executed.

    Parameters
    ----------
    spec : ModelSpec
        The model; only which layers have experts is used.
    tier : TierPlacement
        Where each module lives and runs.
    """
    builder = _Builder()
    copies: dict[tuple[int, Module], int] = {}
    buffers = _stream_buffers(tier)
    streamed_layers = list(buffers)
    max_fetched = tier.num_expert_slots // NUM_STREAM_BUFFERS

    def stream(position: int) -> None:
        """Emit the copies of the `position`-th streamed layer into its buffer."""
        if position >= len(streamed_layers):
            return
        layer = streamed_layers[position]
        free = builder.buffer_readers.get(buffers[layer], ())
        num_resident = tier.layers[layer].ffn.num_resident
        for module in tier.streamed(layer):
            is_part = module == "experts" and num_resident > 0
            copies[layer, module] = builder.add(
                "copy",
                "h2d",
                free,
                layer=layer,
                payload="weights",
                module=module,
                buffer=buffers[layer],
                part="missed" if is_part else "all",
                num_resident=num_resident if is_part else 0,
            )

    # Positions, slots and block tables: every GPU op of the step reads them.
    batch = builder.add("copy", "h2d", (), payload="batch") if tier.uses("gpu") else None
    for position in range(NUM_STREAM_BUFFERS - 1):
        stream(position)
    where: Device = tier.embedding.device
    hidden = builder.add("embed", where, () if batch is None else (batch,))
    for index, layer in enumerate(tier.layers):
        if layer.attention.device != where:
            where = layer.attention.device
            hidden = builder.move("hidden", where, hidden, index)
        buffer = buffers.get(index)
        if buffer is not None:
            # After the hidden states, which would else wait behind weights that are not due yet.
            stream(streamed_layers.index(index) + NUM_STREAM_BUFFERS - 1)

        def weights(module: Module, index: int = index) -> tuple[int, ...]:
            copy = copies.get((index, module))
            return () if copy is None else (copy,)

        readers: list[int] = []
        for module, placement in layer.modules():
            if module == "experts":
                assert layer.router is not None
                if placement.is_mixed:
                    ops = _mixed_experts(
                        builder, index, layer, hidden, weights(module), buffer, max_fetched
                    )
                else:
                    ops = _experts(builder, index, layer, hidden, weights(module), buffer)
                reader, hidden = ops
                readers.append(reader)
                continue
            if placement.device != where:
                hidden = builder.move("hidden", placement.device, hidden, index)
                where = placement.device
            kind: OpKind = module if module in ("attention", "router", "dense") else "dense"
            hidden = builder.add(
                kind, where, (hidden, *weights(module)), layer=index, module=module, buffer=buffer
            )
            readers.append(hidden)
        if buffer is not None:
            builder.buffer_readers[buffer] = tuple(readers)
    if tier.head.device != where:
        hidden = builder.move("hidden", tier.head.device, hidden)
        where = tier.head.device
    logits = builder.add("head", where, (hidden,), module="head")
    if where == "gpu":
        logits = builder.move("logits", "cpu", logits)
    builder.add("sample", "cpu", (logits,))
    return StepGraph(phase=tier.phase, ops=tuple(builder.ops))


def _stream_buffers(tier: TierPlacement) -> dict[int, int]:
    """Staging buffer of each layer that is streamed, in order."""
    streamed = [index for index in range(len(tier.layers)) if tier.streamed(index)]
    return {layer: position % NUM_STREAM_BUFFERS for position, layer in enumerate(streamed)}


def _experts(
    builder: _Builder,
    index: int,
    layer: LayerPlacement,
    routed: int,
    weights: tuple[int, ...],
    buffer: int | None,
) -> tuple[int, int]:
    """Dispatch, experts, and the way there and back; returns (op that reads weights, last op)."""
    assert layer.router is not None
    device, router_device = layer.ffn.device, layer.router.device
    if device == router_device:
        dispatch = builder.add("dispatch", device, (routed,), layer=index)
        experts = builder.add(
            "experts", device, (dispatch, *weights), layer=index, module="experts", buffer=buffer
        )
        combine = builder.add("combine", device, (experts,), layer=index)
        return experts, combine
    there = builder.move("routing", device, routed, index)
    dispatch = builder.add("dispatch", device, (there,), layer=index)
    experts = builder.add(
        "experts", device, (dispatch, *weights), layer=index, module="experts", buffer=buffer
    )
    back = builder.move("expert_output", router_device, experts, index)
    return experts, builder.add("combine", router_device, (back,), layer=index)


def _mixed_experts(
    builder: _Builder,
    index: int,
    layer: LayerPlacement,
    routed: int,
    weights: tuple[int, ...],
    buffer: int | None,
    max_fetched: int,
) -> tuple[int, int]:
    """Experts on both devices, or from two memories: each part by itself, added at the end.

    Returns (op that reads streamed weights, last op). The router is on the GPU.
    """
    num_resident, runs = layer.ffn.num_resident, layer.ffn.runs

    def add(
        kind: OpKind,
        lane: Lane,
        part: Part,
        deps: tuple[int, ...],
        *,
        buffer: int | None = None,
        max_fetched: int = 0,
    ) -> int:
        return builder.add(
            kind,
            lane,
            deps,
            layer=index,
            payload="weights" if kind == "copy" else None,
            module=None if kind == "dispatch" else "experts",
            buffer=buffer,
            part=part,
            num_resident=num_resident,
            max_fetched=max_fetched,
        )

    outputs: list[int] = []
    if num_resident:
        dispatch = add("dispatch", "gpu", "resident", (routed,))
        outputs.append(add("experts", "gpu", "resident", (dispatch,)))
    if runs == "stream":
        dispatch = add("dispatch", "gpu", "missed", (routed,))
        missed = add("experts", "gpu", "missed", (dispatch, *weights), buffer=buffer)
        return missed, builder.add("combine", "gpu", (*outputs, missed), layer=index)
    there = builder.move("routing", "cpu", routed, index)
    part: Part = "rest" if runs == "split" else "missed"
    on_cpu = add("dispatch", "cpu", part, (there,), max_fetched=max_fetched)
    if runs == "split":
        # The slots of the split layer before the last one, free once its fetched experts have run.
        slots = len(builder.slot_readers) % NUM_STREAM_BUFFERS
        free = builder.slot_readers[-NUM_STREAM_BUFFERS:-1]
        fetch = add(
            "copy", "h2d", "fetched", (on_cpu, *free), buffer=slots, max_fetched=max_fetched
        )
        # What is fetched is known with the copy, which brings the slots' numbers too.
        sort = add("dispatch", "gpu", "fetched", (routed, fetch), max_fetched=max_fetched)
        fetched = add("experts", "gpu", "fetched", (sort,), buffer=slots, max_fetched=max_fetched)
        builder.slot_readers.append(fetched)
        outputs.append(fetched)
    missed = add("experts", "cpu", part, (on_cpu,), max_fetched=max_fetched)
    outputs.append(builder.move("expert_output", "gpu", missed, index))
    return missed, builder.add("combine", "gpu", tuple(outputs), layer=index)


def moved_kv_layers(prefill: TierPlacement, decode: TierPlacement) -> tuple[int, ...]:
    """Layers whose KV cache changes device when a sequence goes from prefill to decode."""
    pairs = enumerate(zip(prefill.layers, decode.layers, strict=True))
    return tuple(index for index, (before, after) in pairs if before.kv != after.kv)


def build_kv_move(prefill: TierPlacement, decode: TierPlacement) -> StepGraph:
    """Copies of a sequence's KV cache where prefill and decode keep it on different devices."""
    builder = _Builder()
    for layer in moved_kv_layers(prefill, decode):
        lane: Lane = "h2d" if decode.layers[layer].kv == "gpu" else "d2h"
        builder.add("copy", lane, (), layer=layer, payload="kv")
    return StepGraph(phase="prefill", ops=tuple(builder.ops))

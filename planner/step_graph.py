"""StepGraph: the ops of one step on their lanes, with dependencies; priced and executed alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from planner.model_spec import ModelSpec, Module
from planner.placement import (
    NUM_STREAM_BUFFERS,
    Device,
    LayerPlacement,
    ModulePlacement,
    Slots,
    TierPlacement,
)
from planner.workload import Phase

Lane = Literal["gpu", "cpu", "h2d", "d2h"]
Term = Literal["attention", "router", "dispatch", "experts", "dense", "head", "transfer"]
OpKind = Literal[
    "embed",
    "attention",
    "qkv",
    "attend",
    "attention_output",
    "router",
    "dispatch",
    "experts",
    "admit",
    "combine",
    "dense",
    "head",
    "sample",
    "copy",
]
# Which of a layer's experts: those resident on the GPU, the missed ones (all others), and of these,
# where a step's tokens decide, those that are fetched to the GPU and the rest; and those that are
# guessed a layer before and copied ahead. Of a divided feed-forward: its columns that are resident,
# and the missed ones. Of a divided cache: the first tokens of every sequence, which are on the GPU,
# and the rest.
Part = Literal["all", "resident", "missed", "fetched", "rest", "prefetched"]
Payload = Literal[
    "batch",
    "weights",
    "hidden",
    "qkv",
    "attended",
    "routing",
    "guess",
    "expert_output",
    "dense_input",
    "dense_output",
    "logits",
    "kv",
]

LANES: tuple[Lane, ...] = ("gpu", "cpu", "h2d", "d2h")

_TERM_OF_KIND: dict[OpKind, Term] = {
    "embed": "dense",
    "attention": "attention",
    "qkv": "attention",
    "attend": "attention",
    "attention_output": "attention",
    "router": "router",
    "dispatch": "dispatch",
    "experts": "experts",
    "admit": "dispatch",
    "combine": "dispatch",
    "dense": "dense",
    "head": "head",
    "sample": "head",
    "copy": "transfer",
}


class Op(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One piece of work on one lane.

    Attributes
    ----------
    index : int
        Position in the graph; ops of a lane run in this order.
    kind : OpKind
        `attention` is a layer's whole attention; where the GPU computes its projections and the CPU
        attends over the cache there are three: `qkv`, `attend` and `attention_output`. `router`
        chooses experts; of the part `prefetched` it guesses those of the next layer. `dispatch`
        sorts tokens by expert, and decides what a split layer fetches, or what is copied ahead;
        `admit` puts what was fetched into slots; `combine` adds the outputs of experts, or of the
        parts of a layer, to the hidden states; `embed` looks up token embeddings; `copy` moves a
        `payload` between the memories.
    layer : int or None
        Layer that the op belongs to.
    module : Module or None
        For a copy of weights, the module that is streamed.
    buffer : int or None
        For a copy of weights and the op that reads them, the staging buffer.
    part : Part
        For experts, their dispatch and copies of them, which of the layer's; for a divided
        feed-forward, which of its columns; for attention over a divided cache, which tokens.
    num_resident : int
        For ops of a part, how many of the layer's experts, or shares of its columns, are resident
        on the GPU.
    max_fetched : int
        For parts that a step decides on, experts that are fetched at most, copied ahead or not.
    slots : Slots
        For parts of experts, what decides which of them are resident.
    prefetch : bool
        For parts of experts, whether some of the missed ones are copied ahead.
    num_chunks : int or None
        For experts copied ahead, so many pieces of them; None where the step decides how many.
    sub_batch : int or None
        Which part of the step's sequences the op is of, where they run as two: 0 or 1; copies of
        weights are of both.
    num_second_seqs : int
        For ops of a sub-batch, sequences of the second one in a step of the planned size.
    num_gpu_kv_tokens : int
        For ops of a divided cache, tokens of every sequence that are on the GPU;
        `attention_output` then merges what both devices give.
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
    slots: Slots = "static"
    prefetch: bool = False
    num_chunks: int | None = None
    sub_batch: int | None = None
    num_second_seqs: int = 0
    num_gpu_kv_tokens: int = 0

    @property
    def gives_way(self) -> bool:
        """Does it end early, after one of its chunks, once the next op of its lane is ready?

        Nothing waits for such an op but that one; of what it has done others see as much as there
        is when they look.
        """
        return self.part == "prefetched" and self.kind == "copy" and self.payload == "weights"

    @property
    def term(self) -> Term:
        """What its seconds are told as; the sum of a divided feed-forward is dense too."""
        is_dense = self.kind == "combine" and self.module == "dense"
        return "dense" if is_dense else _TERM_OF_KIND[self.kind]

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
        text += "" if self.sub_batch is None else f"#{self.sub_batch}"
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
    """Appends ops and remembers which op last produced each thing. Mutable."""

    def __init__(self, spec: ModelSpec, tier: TierPlacement) -> None:
        self.tier = tier
        self.ops: list[Op] = []
        self.slot_readers: list[int] = []
        self.max_fetched = tier.num_expert_slots // NUM_STREAM_BUFFERS
        self.num_sub_batches = 2 if tier.num_second_seqs else 1
        streamed = [index for index in range(spec.num_layers) if tier.streamed(index)]
        self._streamed_layers = streamed
        self._buffers = {layer: at % NUM_STREAM_BUFFERS for at, layer in enumerate(streamed)}
        self._copies: dict[tuple[int, Module], int] = {}
        self._num_arrived: dict[int, int] = {}
        self._readers: dict[int, tuple[int, ...]] = {}  # of each buffer, since it was last filled

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
        slots: Slots = "static",
        prefetch: bool = False,
        sub_batch: int | None = None,
        num_gpu_kv_tokens: int = 0,
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
                slots=slots,
                prefetch=prefetch,
                sub_batch=sub_batch,
                num_second_seqs=0 if sub_batch is None else self.tier.num_second_seqs,
                num_gpu_kv_tokens=num_gpu_kv_tokens,
            )
        )
        return len(self.ops) - 1

    def buffer(self, layer: int) -> int | None:
        """Staging buffer of a layer; None where nothing of it is streamed."""
        return self._buffers.get(layer)

    def weights(self, layer: int, module: Module) -> tuple[int, ...]:
        """The copy that brings a module, if it is streamed."""
        copy = self._copies.get((layer, module))
        return () if copy is None else (copy,)

    def slot_half(self) -> tuple[int, tuple[int, ...]]:
        """The half of the slots that the next split layer has, and what must end before it is used.

        These are the readers of the split layer before the last one.
        """
        readers = self.slot_readers
        return len(readers) % NUM_STREAM_BUFFERS, tuple(readers[-NUM_STREAM_BUFFERS:-1])

    def start_streaming(self) -> None:
        """Fill the buffers that the first layer does not have to wait for."""
        for position in range(NUM_STREAM_BUFFERS - 1):
            self._stream(position)

    def arrive(self, layer: int) -> None:
        """A sub-batch begins with a layer. When all have, the next streamed one is copied."""
        self._num_arrived[layer] = self._num_arrived.get(layer, 0) + 1
        if layer in self._buffers and self._num_arrived[layer] == self.num_sub_batches:
            self._stream(self._streamed_layers.index(layer) + NUM_STREAM_BUFFERS - 1)

    def leave(self, layer: int, readers: Sequence[int]) -> None:
        """A sub-batch is done with a layer, whose weights these ops read."""
        if layer in self._buffers:
            buffer = self._buffers[layer]
            self._readers[buffer] = (*self._readers.get(buffer, ()), *readers)

    def _stream(self, position: int) -> None:
        """Copy the `position`-th streamed layer into its buffer, once that is free."""
        if position >= len(self._streamed_layers):
            return
        layer = self._streamed_layers[position]
        buffer = self._buffers[layer]
        free = self._readers.pop(buffer, ())
        num_resident = self.tier.layers[layer].ffn.num_resident
        for module in self.tier.streamed(layer):
            is_part = module in ("experts", "dense") and num_resident > 0
            self._copies[layer, module] = self.add(
                "copy",
                "h2d",
                free,
                layer=layer,
                payload="weights",
                module=module,
                buffer=buffer,
                part="missed" if is_part else "all",
                num_resident=num_resident if is_part else 0,
            )


def build(spec: ModelSpec, tier: TierPlacement) -> StepGraph:
    """Write down one step of a tier.

    The graph holds for every batch shape of the tier: shapes enter when it is priced
    (`cost_model.op_cost`) or executed. Two sub-batches take turns layer by layer, the second one
    first: while the CPU attends for one, the GPU does the other's layer.

    Parameters
    ----------
    spec : ModelSpec
        The model; only which layers have experts is used.
    tier : TierPlacement
        Where each module lives and runs.
    """
    builder = _Builder(spec, tier)
    numbers: tuple[int | None, ...] = (1, 0) if tier.num_second_seqs else (None,)
    chains = [_Chain(builder, number) for number in numbers]
    for chain in chains:
        chain.begin()
    builder.start_streaming()
    turns = deque(chain.run() for chain in chains)
    while turns:
        turn = turns.popleft()
        if next(turn, None) is not None:
            turns.append(turn)
    return StepGraph(phase=tier.phase, ops=tuple(builder.ops))


class _Chain:
    """The ops of the step's sequences, or of one sub-batch of them, in order. Mutable."""

    def __init__(self, builder: _Builder, sub_batch: int | None) -> None:
        self._builder = builder
        self._add = partial(builder.add, sub_batch=sub_batch)
        self._tier = builder.tier
        self._sub_batch = sub_batch
        self._where: Device = builder.tier.embedding.device
        self._hidden = -1
        self._batch: int | None = None

    def begin(self) -> None:
        """Positions, slots and block tables: every GPU op of the step reads them."""
        if self._tier.uses("gpu"):
            self._batch = self._add("copy", "h2d", (), payload="batch")

    def run(self) -> Iterator[int]:
        """Add all ops; what it yields is where another sub-batch may have its turn."""
        tier = self._tier
        self._hidden = self._add(
            "embed", self._where, () if self._batch is None else (self._batch,)
        )
        for index, layer in enumerate(tier.layers):
            self._go_to(layer.attention.device, index)
            readers: list[int] = []
            if self._kv(layer) == layer.attention.device:
                # After the hidden states, which would else wait behind weights not due yet.
                self._builder.arrive(index)
                # Its first layer is what the GPU does while the CPU attends for the other one.
                if self._sub_batch is not None and index > 0:
                    yield index
                readers.append(self._module("attention", self._where, index))
            else:
                yield from self._attention_on_both(index, readers)
            for module, placement in layer.modules()[1:]:
                if module == "router":
                    self._go_to(placement.device, index)
                    readers.append(self._module(module, self._where, index))
                    continue
                if placement.runs != "split":  # which guesses while its experts run
                    self._prefetch(index + 1, self._guess(index + 1))
                if module == "experts":
                    readers.append(self._experts(index, layer))
                elif placement.is_mixed:
                    self._go_to(placement.device, index)
                    readers.append(self._divided_dense(index, placement))
                else:
                    self._go_to(placement.device, index)
                    readers.append(self._module(module, self._where, index))
            self._builder.leave(index, readers)
        self._go_to(tier.head.device, None)
        logits = self._add("head", self._where, (self._hidden,), module="head")
        if self._where == "gpu":
            logits = self._move("logits", "cpu", logits)
        self._add("sample", "cpu", (logits,))

    def _kv(self, layer: LayerPlacement) -> Device:
        return "cpu" if self._sub_batch == 1 else layer.kv

    def _move(self, payload: Payload, target: Device, after: int, layer: int | None = None) -> int:
        lane: Lane = "h2d" if target == "gpu" else "d2h"
        return self._add("copy", lane, (after,), payload=payload, layer=layer)

    def _go_to(self, device: Device, layer: int | None) -> None:
        """Take the hidden states to a device."""
        if device != self._where:
            self._hidden = self._move("hidden", device, self._hidden, layer)
            self._where = device

    def _module(self, module: Module, lane: Device, layer: int) -> int:
        """One op that reads a module's weights and sets the hidden states."""
        kind: OpKind = module if module in ("attention", "router", "dense") else "dense"
        self._hidden = self._add(
            kind,
            lane,
            (self._hidden, *self._builder.weights(layer, module)),
            layer=layer,
            module=module,
            buffer=self._builder.buffer(layer),
        )
        return self._hidden

    def _attention_on_both(self, layer: int, readers: list[int]) -> Iterator[int]:
        """Projections on the GPU, scores and values on the CPU; of a divided cache on both."""
        builder, divided_after = self._builder, self._tier.layers[layer].num_gpu_kv_tokens
        weights, buffer = builder.weights(layer, "attention"), builder.buffer(layer)
        projected = self._add(
            "qkv", "gpu", (self._hidden, *weights), layer=layer, module="attention", buffer=buffer
        )

        def add(kind: OpKind, lane: Lane, part: Part, after: int, payload: Payload | None) -> int:
            return self._add(
                kind,
                lane,
                (after,),
                layer=layer,
                payload=payload,
                part=part,
                num_gpu_kv_tokens=divided_after,
            )

        there = self._move("qkv", "cpu", projected, layer)
        rest: Part = "rest" if divided_after else "all"
        attended = add("attend", "cpu", rest, there, None)
        back = add("copy", "h2d", rest, attended, "attended")
        parts = [back, projected]
        if divided_after:
            parts.append(add("attend", "gpu", "resident", projected, None))
        # After what comes back, which would else wait behind weights not due yet.
        builder.arrive(layer)
        if self._sub_batch is not None:
            yield layer
        self._hidden = self._add(
            "attention_output",
            "gpu",
            tuple(parts),
            layer=layer,
            module="attention",
            buffer=buffer,
            num_gpu_kv_tokens=divided_after,
        )
        readers.append(self._hidden)

    def _experts(self, index: int, layer: LayerPlacement) -> int:
        """Dispatch, experts, and the way there and back; returns the op that reads weights."""
        if layer.ffn.is_mixed:
            return self._mixed_experts(index, layer.ffn)
        assert layer.router is not None
        device, router_device = layer.ffn.device, layer.router.device
        routed = self._hidden
        if device != router_device:
            routed = self._move("routing", device, routed, index)
        dispatch = self._add("dispatch", device, (routed,), layer=index)
        weights = self._builder.weights(index, "experts")
        experts = output = self._add(
            "experts",
            device,
            (dispatch, *weights),
            layer=index,
            module="experts",
            buffer=self._builder.buffer(index),
        )
        if device != router_device:
            output = self._move("expert_output", router_device, experts, index)
        self._hidden = self._add("combine", router_device, (output,), layer=index)
        return experts

    def _mixed_experts(self, index: int, where: ModulePlacement) -> int:
        """Experts on both devices, or from two memories: each part by itself, added at the end.

        Returns the op that reads streamed weights. The router is on the GPU.
        """
        num_resident, max_fetched = where.num_resident, self._builder.max_fetched
        routed = self._hidden

        def add(
            kind: OpKind,
            lane: Lane,
            part: Part,
            deps: tuple[int, ...],
            *,
            buffer: int | None = None,
            max_fetched: int = 0,
        ) -> int:
            return self._add(
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
                slots=where.slots,
                prefetch=where.prefetch,
            )

        outputs: list[int] = []
        if num_resident:
            dispatch = add("dispatch", "gpu", "resident", (routed,))
            outputs.append(add("experts", "gpu", "resident", (dispatch,)))
        if where.runs == "stream":
            dispatch = add("dispatch", "gpu", "missed", (routed,))
            weights, buffer = self._builder.weights(index, "experts"), self._builder.buffer(index)
            missed = add("experts", "gpu", "missed", (dispatch, *weights), buffer=buffer)
            self._hidden = self._add("combine", "gpu", (*outputs, missed), layer=index)
            return missed
        there = self._move("routing", "cpu", routed, index)
        part: Part = "rest" if where.runs == "split" else "missed"
        on_cpu = add("dispatch", "cpu", part, (there,), max_fetched=max_fetched)
        guess: int | None = None
        if where.runs == "split":
            guess = self._guess(index + 1)
            slots, free = self._builder.slot_half()
            fetch = add(
                "copy", "h2d", "fetched", (on_cpu, *free), buffer=slots, max_fetched=max_fetched
            )
            # What is fetched is known with the copy, which brings the slots' numbers too.
            sort = add("dispatch", "gpu", "fetched", (routed, fetch), max_fetched=max_fetched)
            fetched = add(
                "experts", "gpu", "fetched", (sort,), buffer=slots, max_fetched=max_fetched
            )
            reader = fetched
            if where.slots != "static":
                # It overwrites what the residents' experts have read, from what these have.
                read = (*outputs, fetched)
                reader = add("admit", "gpu", "fetched", read, buffer=slots, max_fetched=max_fetched)
            self._builder.slot_readers.append(reader)
            outputs.append(fetched)
        missed = add("experts", "cpu", part, (on_cpu,), max_fetched=max_fetched)
        outputs.append(self._move("expert_output", "gpu", missed, index))
        self._prefetch(index + 1, guess)
        self._hidden = self._add("combine", "gpu", tuple(outputs), layer=index)
        return missed

    def _guess(self, layer: int) -> int | None:
        """What a layer that prefetches would choose for the present hidden states, on the CPU.

        They are one layer too old, which changes few choices (Mixtral-Offloading).
        """
        layers = self._tier.layers
        if layer >= len(layers) or not layers[layer].ffn.prefetch:
            return None
        guess = self._add(
            "router", "gpu", (self._hidden,), layer=layer, module="router", part="prefetched"
        )
        return self._add("copy", "d2h", (guess,), layer=layer, payload="guess", part="prefetched")

    def _prefetch(self, layer: int, guess: int | None) -> None:
        """Copy experts of the next layer ahead, until something urgent follows on the link."""
        if guess is None:
            return
        where, max_fetched = self._tier.layers[layer].ffn, self._builder.max_fetched
        slots, free = self._builder.slot_half()
        add = partial(
            self._add,
            layer=layer,
            part="prefetched",
            num_resident=where.num_resident,
            max_fetched=max_fetched,
            slots=where.slots,
            prefetch=True,
        )
        chosen = add("dispatch", "cpu", (guess,))
        add("copy", "h2d", (chosen, *free), payload="weights", module="experts", buffer=slots)

    def _divided_dense(self, index: int, where: ModulePlacement) -> int:
        """Columns on both devices, or from two memories: each part by itself, added at the end.

        Returns the op of the missed columns, which reads streamed weights where there are any. The
        residual goes with the resident part.
        """

        def add(lane: Lane, part: Part, deps: tuple[int, ...], buffer: int | None = None) -> int:
            return self._add(
                "dense",
                lane,
                deps,
                layer=index,
                module="dense",
                buffer=buffer,
                part=part,
                num_resident=where.num_resident,
            )

        given = self._hidden
        if where.runs == "stream":
            resident = add("gpu", "resident", (given,))
            weights, buffer = self._builder.weights(index, "dense"), self._builder.buffer(index)
            output = missed = add("gpu", "missed", (given, *weights), buffer)
        else:
            # First what the CPU waits for.
            there = self._move("dense_input", "cpu", given, index)
            resident = add("gpu", "resident", (given,))
            missed = add("cpu", "missed", (there,))
            output = self._move("dense_output", "gpu", missed, index)
        self._hidden = self._add("combine", "gpu", (resident, output), layer=index, module="dense")
        return missed


def moved_kv_layers(
    prefill: TierPlacement, decode: TierPlacement, *, sub_batch: int = 0
) -> tuple[int, ...]:
    """Layers whose KV cache changes device when a sequence goes from prefill to decode.

    Of a sequence of the second sub-batch (1): all layers, from the GPU to the CPU. Divided caches
    are among them: one of their parts is computed on the other device.
    """
    pairs = enumerate(zip(prefill.layers, decode.layers, strict=True))
    if sub_batch:
        return tuple(index for index, (before, _) in pairs if before.kv == "gpu")
    return tuple(
        index
        for index, (before, after) in pairs
        if before.kv != after.kv or after.num_gpu_kv_tokens
    )


def build_kv_move(
    prefill: TierPlacement, decode: TierPlacement, *, sub_batch: int = 0
) -> StepGraph:
    """Copies of a sequence's KV cache where prefill and decode keep it on different devices.

    Of a divided cache the part that prefill computes on the other device: the rest goes to the CPU,
    or the first tokens to the GPU.
    """
    ops = [
        Op(
            index=index,
            kind="copy",
            lane="d2h" if prefill.layers[layer].kv == "gpu" else "h2d",
            layer=layer,
            payload="kv",
            num_gpu_kv_tokens=decode.layers[layer].num_gpu_kv_tokens,
        )
        for index, layer in enumerate(moved_kv_layers(prefill, decode, sub_batch=sub_batch))
    ]
    return StepGraph(phase="prefill", ops=tuple(ops))

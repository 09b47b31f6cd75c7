"""Placement: where every module lives and how it runs, per tier."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from planner.model_spec import DENSE_SHARES, ModelSpec, Module
from planner.workload import DEFAULT_CHUNK_TOKENS, Phase

Device = Literal["gpu", "cpu"]

# Tokens of a block of a KV cache.
KV_BLOCK_TOKENS = 16
# Two buffers: one is filled while the other is read.
NUM_STREAM_BUFFERS = 2
# Pieces of an expert that is copied ahead of its layer's gate: what is urgent waits for one at most
# (ProMoE's three).
NUM_EXPERT_CHUNKS = 3

Runs = Literal["gpu", "cpu", "stream", "split"]
# What decides which experts lie in a layer's slots: the policies of `planner/routing`.
Slots = Literal["static", "lru"]
# What tells a tier from the others of its placement: `TierPlacement.key`.
TierKey = tuple[Phase, int]

# What a tier of no named strategy (`strategies.py`) is called.
MIXED = "mixed"


class ModulePlacement(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Where a module's weights live and how it runs.

    Attributes
    ----------
    lives : Device
        The memory that holds the weights.
    runs : Runs
        `stream` copies them to the GPU for each use. `split`, of experts: of those that a step
        needs and the GPU does not hold, some are copied to it and the others run on the CPU, as
        many as let both end together.
    num_resident : int
        Of experts that live on the CPU: so many, the first of the placement's order, live on the
        GPU and run there in its place. Of a dense feed-forward: so many of the `DENSE_SHARES` of
        its columns.
    slots : Slots
        Of experts that run split: `static` residents stay; with `lru` those are only the first
        content of as many slots, in which what a step fetches takes the place of what was used
        longest ago. The CPU then has all experts.
    prefetch : bool
        Of experts that run split: those that the layer's gate would choose for the hidden states of
        the layer before are copied ahead, while the link has nothing else to do.
    """

    lives: Device
    runs: Runs
    num_resident: Annotated[int, Meta(ge=0)] = 0
    slots: Slots = "static"
    prefetch: bool = False

    def __post_init__(self) -> None:
        known = (("gpu", "gpu"), ("cpu", "cpu"), ("cpu", "stream"), ("cpu", "split"))
        if (self.lives, self.runs) not in known:
            raise ValueError(f"a module that lives on {self.lives} cannot run as {self.runs}")
        if self.lives == "gpu" and self.num_resident:
            raise ValueError(
                f"num_resident is {self.num_resident}, but a module that lives on the gpu is there "
                "whole"
            )
        if self.runs != "split" and (self.prefetch or self.slots != "static"):
            what = "prefetch is true" if self.prefetch else f"slots is {self.slots}"
            raise ValueError(f"{what}, but only experts that run split fetch any, not {self.runs}")
        if self.slots != "static" and not self.num_resident:
            raise ValueError(
                f"slots is {self.slots} but num_resident, the number of slots, is 0; it must be 1 "
                "at least"
            )

    @property
    def is_mixed(self) -> bool:
        """Do its weights lie, or run, in two places? Of experts and dense feed-forwards only."""
        return self.runs == "split" or self.num_resident > 0

    @property
    def device(self) -> Device:
        """The device that computes; the one that has the result where both do."""
        return "cpu" if self.runs == "cpu" and not self.num_resident else "gpu"

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices that compute."""
        return ("gpu", "cpu") if self.is_mixed and self.runs != "stream" else (self.device,)


ON_GPU = ModulePlacement(lives="gpu", runs="gpu")
ON_CPU = ModulePlacement(lives="cpu", runs="cpu")
STREAMED = ModulePlacement(lives="cpu", runs="stream")


class LayerPlacement(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One layer.

    Attributes
    ----------
    ffn : ModulePlacement
        The dense feed-forward or the experts.
    router : ModulePlacement or None
        None in dense layers.
    kv_on_cpu : bool
        Of attention that runs on the GPU in decode steps: the KV cache is on the CPU all the same,
        which computes scores and values over it; the GPU computes the projections. Otherwise the
        cache is on the device that computes attention.
    num_gpu_kv_tokens : int
        With `kv_on_cpu`: of every sequence so many tokens, the first ones, in whole blocks, have
        their keys and values on the GPU all the same. Each device attends over its part, at the
        same time, and the GPU merges what both give. Sequences grow on the CPU only.
    """

    attention: ModulePlacement
    ffn: ModulePlacement
    router: ModulePlacement | None = None
    kv_on_cpu: bool = False
    num_gpu_kv_tokens: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.num_gpu_kv_tokens:
            self._check_divided_cache()
        if self.kv_on_cpu and self.attention.device == "cpu":
            raise ValueError("kv_on_cpu is of attention that runs on the gpu, this runs on the cpu")
        if any(where is not None and where.is_mixed for where in (self.attention, self.router)):
            raise ValueError("only a feed-forward or experts can have residents")
        if self.router is None:
            if self.ffn.runs == "split":
                raise ValueError("only experts can run split")
        elif self.ffn.is_mixed and self.router.device != "gpu":
            raise ValueError("experts on both devices need their router on the gpu")
        if self.ffn.prefetch and (self.router is None or self.router.lives != "gpu"):
            raise ValueError("prefetch is true, which needs the router's weights on the gpu")

    def _check_divided_cache(self) -> None:
        count = self.num_gpu_kv_tokens
        if not self.kv_on_cpu:
            raise ValueError(
                f"num_gpu_kv_tokens is {count}, which is of caches on the cpu beside projections "
                "on the gpu: set kv_on_cpu, or leave it out"
            )
        if count % KV_BLOCK_TOKENS:
            below = count - count % KV_BLOCK_TOKENS
            raise ValueError(
                f"num_gpu_kv_tokens is {count}, but a cache is divided after whole blocks of "
                f"{KV_BLOCK_TOKENS} tokens: {below} or {below + KV_BLOCK_TOKENS}"
            )

    @property
    def kv(self) -> Device:
        """The device that holds the KV cache, and computes scores and values over it.

        Of a divided cache, the one that holds what sequences grow by.
        """
        return "cpu" if self.kv_on_cpu else self.attention.device

    @property
    def device_before_ffn(self) -> Device:
        """The device that has the hidden states when the feed-forward or the experts begin."""
        return (self.router or self.attention).device

    def modules(self) -> tuple[tuple[Module, ModulePlacement], ...]:
        """Every module of the layer with its placement, in order of use."""
        if self.router is None:
            return (("attention", self.attention), ("dense", self.ffn))
        return (("attention", self.attention), ("router", self.router), ("experts", self.ffn))


class TierPlacement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The placement of one tier: steps of a phase of up to `max_num_tokens` tokens.

    `strategy` and `cut` say which named placement this is: a strategy counts layers, experts or
    blocks up to its cut (`strategies.py`); `mixed` is none of them. `num_expert_slots` is how many
    experts the GPU has room for beside its residents, for those that split layers copy.

    `num_second_seqs`, of decode: so many of the sequences are a second sub-batch, whose KV cache is
    on the CPU in every layer. Their CPU attention runs beside the GPU's work for the first one
    (NEO; MoE-Lightning where the first has its cache there too).
    """

    phase: Phase
    strategy: str
    cut: Annotated[int, Meta(ge=0)]
    max_num_tokens: Annotated[int, Meta(ge=1)] = DEFAULT_CHUNK_TOKENS
    embedding: ModulePlacement
    layers: tuple[LayerPlacement, ...]
    head: ModulePlacement
    num_expert_slots: Annotated[int, Meta(ge=0)] = 0
    num_second_seqs: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.phase == "prefill":
            if self.num_second_seqs or any(layer.kv_on_cpu for layer in self.layers):
                raise ValueError("num_second_seqs and kv_on_cpu are of decode tiers only")
        elif self.num_second_seqs:
            on_cpu = [at for at, each in enumerate(self.layers) if each.attention.device == "cpu"]
            if on_cpu:
                raise ValueError(
                    f"num_second_seqs is {self.num_second_seqs}, but attention of layer "
                    f"{on_cpu[0]} runs on the cpu: sub-batches need it on the gpu in every layer"
                )
        self._check_divided_caches()
        if self.embedding.is_mixed or self.head.is_mixed:
            raise ValueError("only a feed-forward or experts can have residents")
        is_split = any(layer.ffn.runs == "split" for layer in self.layers)
        if is_split and self.num_expert_slots < NUM_STREAM_BUFFERS:
            raise ValueError(
                f"num_expert_slots is {self.num_expert_slots}, but layers that run split need "
                f"{NUM_STREAM_BUFFERS} at least"
            )
        self._check_slots()

    def _check_slots(self) -> None:
        for index, layer in enumerate(self.layers):
            if self.num_second_seqs and (layer.ffn.slots != "static" or layer.ffn.prefetch):
                raise ValueError(
                    f"num_second_seqs is {self.num_second_seqs}, but layer {index} has slots that "
                    "change or prefetch: these are of steps with one sub-batch"
                )
            if layer.ffn.prefetch and index == 0:
                raise ValueError("layer 0 has prefetch, but no layer before it to guess in")
            if layer.ffn.prefetch and self.layers[index - 1].device_before_ffn != "gpu":
                raise ValueError(
                    f"layer {index} has prefetch, but layer {index - 1} has its hidden states on "
                    "the cpu: guessing needs them on the gpu"
                )

    def _check_divided_caches(self) -> None:
        counts = sorted({each.num_gpu_kv_tokens for each in self.layers} - {0})
        if len(counts) > 1:
            raise ValueError(
                f"num_gpu_kv_tokens is {counts[0]} in one layer and {counts[-1]} in another: the "
                "caches of a tier are divided after the same tokens in all layers that are"
            )
        if counts and self.num_second_seqs:
            raise ValueError(
                f"num_second_seqs is {self.num_second_seqs} and num_gpu_kv_tokens {counts[0]}: "
                "either sequences or their caches are divided between the devices, not both"
            )

    @property
    def num_gpu_kv_tokens(self) -> int:
        """Tokens of every sequence on the GPU in layers whose caches are divided; 0: none is."""
        return max((each.num_gpu_kv_tokens for each in self.layers), default=0)

    def lives_on(self, device: Device) -> frozenset[tuple[Module, int | None]]:
        """Modules (with their layer) whose weights this tier wants on a device, whole or in part.

        Of experts and divided feed-forwards residents are on the GPU and the others on the CPU.
        """
        found: set[tuple[Module, int | None]] = set()
        if self.embedding.lives == device:
            found.add(("embedding", None))
        if self.head.lives == device:
            found.add(("head", None))
        for index, layer in enumerate(self.layers):
            found.update((name, index) for name, where in layer.modules() if where.lives == device)
            if device == "gpu" and layer.ffn.num_resident:
                found.add(("dense" if layer.router is None else "experts", index))
        return frozenset(found)

    def num_resident(self, spec: ModelSpec, layer: int) -> int:
        """Experts of a layer that this tier wants on the GPU; shares of a divided feed-forward."""
        where = self.layers[layer].ffn
        return spec.layers[layer].num_experts if where.lives == "gpu" else where.num_resident

    def uses(self, device: Device) -> bool:
        """True where any module, or attention over a cache, is computed on the device."""
        if device == "cpu" and self.num_second_seqs:
            return True
        if any(layer.kv == device for layer in self.layers):
            return True
        places = [self.embedding, self.head]
        places += [where for layer in self.layers for _, where in layer.modules()]
        return any(device in where.devices for where in places)

    @property
    def key(self) -> TierKey:
        """What tells it from the other tiers of its placement."""
        return (self.phase, self.max_num_tokens)

    def alone(self, sub_batch: int) -> TierPlacement:
        """The tier of steps in which all sequences are of one sub-batch, by its number.

        Of the second one (1), all caches are on the CPU.
        """
        if sub_batch == 0:
            return msgspec.structs.replace(self, num_second_seqs=0)
        layers = tuple(
            msgspec.structs.replace(layer, kv_on_cpu=layer.attention.device == "gpu")
            for layer in self.layers
        )
        return msgspec.structs.replace(self, layers=layers, num_second_seqs=0)

    def streamed(self, layer: int) -> tuple[Module, ...]:
        """Modules of a layer that are copied to the GPU for each use, but for residents."""
        return tuple(n for n, where in self.layers[layer].modules() if where.runs == "stream")


def pair_name(prefill: str, decode: str) -> str:
    """Strategy of both phases, or both strategies joined by a plus."""
    return decode if prefill == decode else f"{prefill}+{decode}"


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tier for prefill and one for decode, and tiers for smaller steps of either.

    Weights that any tier wants on a device are resident there for the whole run; moving tens of
    gigabytes between the phases of each request does not pay. KV moves where the tiers put it on
    different devices, and that copy is charged.

    `smaller` are tiers for smaller steps, of either phase: decode steps of few sequences, prefill
    steps of short prompts. Their weights and caches lie as in the phase's own tier, but modules may
    run otherwise: what pays to be streamed for 64 tokens does not for one.

    `expert_order` has a row for each layer: its experts, those first that are to be resident
    first. Without it they are in the order of their numbers.
    """

    prefill: TierPlacement
    decode: TierPlacement
    smaller: tuple[TierPlacement, ...] = ()
    expert_order: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.prefill.phase != "prefill" or self.decode.phase != "decode":
            raise ValueError("the tiers of a placement are one for prefill and one for decode")
        if len(self.prefill.layers) != len(self.decode.layers):
            raise ValueError(
                f"the prefill tier has {len(self.prefill.layers)} layers, "
                f"the decode tier {len(self.decode.layers)}"
            )
        if self.decode.num_second_seqs:
            self._check_sub_batches()
        for at, tier in enumerate(self.smaller):
            reason = _why_not_beside(tier, self.tier(tier.phase))
            if reason:
                raise ValueError(f"tier {at} of smaller {reason}")
        if len({tier.key for tier in self.tiers}) < len(self.tiers):
            raise ValueError("two tiers of one phase are for steps of the same number of tokens")
        for tier in self.tiers:
            for index, layer in enumerate(tier.layers):
                if layer.ffn.slots != "static":
                    self._check_slots(index)

    def _check_slots(self, index: int) -> None:
        """Where a layer's slots change, all tiers know them so, or have nothing in them."""
        wheres = [(name, tier.layers[index].ffn) for name, tier in self.named_tiers]
        count = next(each.num_resident for _, each in wheres if each.slots != "static")
        for name, where in wheres:
            has_none = where.lives == "cpu" and where.num_resident == 0
            if (where.slots == "static" or where.num_resident != count) and not has_none:
                found = f"num_resident is {where.num_resident}"
                if where.lives == "gpu":
                    found = "all experts are resident"
                elif where.num_resident == count:
                    found = f"slots is {where.slots}"
                raise ValueError(
                    f"layer {index} has {count} slots that change in one tier, but {found} in "
                    f"{name}: a tier must have the same slots there, or no resident experts"
                )

    def _check_sub_batches(self) -> None:
        if any(layer.kv == "cpu" for layer in self.prefill.layers):
            raise ValueError(
                "the decode tier has two sub-batches, which needs all prefill attention on the gpu"
            )
        if len({layer.kv for layer in self.decode.layers}) > 1:
            raise ValueError(
                "the decode tier has two sub-batches: the first one's cache must be on one device"
            )

    def num_resident(self, spec: ModelSpec, layer: int) -> int:
        """Experts of a layer that live on the GPU: as many as either tier wants there.

        Of a dense feed-forward the shares of its columns, where it is divided.
        """
        return max(tier.num_resident(spec, layer) for tier in (self.prefill, self.decode))

    def num_on_cpu(self, spec: ModelSpec, layer: int) -> int:
        """Experts of a layer that live on the CPU: all but those that both tiers have resident.

        Where the slots change, all: what is in one now may be needed on the CPU later.
        """
        assert spec.layers[layer].is_moe
        tiers = (self.prefill, self.decode)
        least = min(tier.num_resident(spec, layer) for tier in tiers)
        changes = any(tier.layers[layer].ffn.slots != "static" for tier in tiers)
        return spec.layers[layer].num_experts - (0 if changes else least)

    def order_of_experts(self, spec: ModelSpec, layer: int) -> tuple[int, ...]:
        """Experts of a layer, those first that are to be resident first."""
        if self.expert_order:
            return self.expert_order[layer]
        return tuple(range(spec.layers[layer].num_experts))

    @property
    def name(self) -> str:
        """`offload` where both phases use one strategy, `offload+split` where they differ."""
        return pair_name(self.prefill.strategy, self.decode.strategy)

    def tier(self, phase: Phase, num_tokens: int | None = None) -> TierPlacement:
        """The tier of a phase; of steps of so many tokens the smallest that holds them."""
        whole = self.prefill if phase == "prefill" else self.decode
        if num_tokens is None:
            return whole
        found = [each for each in self.smaller if each.phase == phase]
        found = [each for each in found if num_tokens <= each.max_num_tokens]
        return min(found, key=lambda each: each.max_num_tokens, default=whole)

    def step_tier(
        self, phase: Phase, num_tokens: int, sub_batches: tuple[int, ...] = (0,)
    ) -> TierPlacement:
        """What a step of so many tokens runs, of sequences of these sub-batches.

        Where it has both, the decode tier: the only one that runs two.
        """
        if len(sub_batches) > 1:
            return self.tier(phase)
        return self.tier(phase, num_tokens).alone(sub_batches[0])

    def with_chunk(self, max_num_tokens: int) -> Placement:
        """The same with prefill steps of so many tokens at most."""
        replace = msgspec.structs.replace
        return replace(
            self,
            prefill=replace(self.prefill, max_num_tokens=max_num_tokens),
            smaller=tuple(
                tier
                for tier in self.smaller
                if tier.phase == "decode" or tier.max_num_tokens < max_num_tokens
            ),
        )

    @property
    def tiers(self) -> tuple[TierPlacement, ...]:
        """All tiers."""
        return (self.prefill, self.decode, *self.smaller)

    @property
    def named_tiers(self) -> tuple[tuple[str, TierPlacement], ...]:
        """All tiers, with where they are in the JSON of a placement."""
        others = [(f"smaller[{at}]", tier) for at, tier in enumerate(self.smaller)]
        return (("prefill", self.prefill), ("decode", self.decode), *others)

    def lives_on(self, device: Device) -> frozenset[tuple[Module, int | None]]:
        """Modules whose weights are resident on a device: the union over the tiers."""
        return self.prefill.lives_on(device) | self.decode.lives_on(device)

    def uses(self, device: Device) -> bool:
        return any(tier.uses(device) for tier in self.tiers)


def _why_not_beside(tier: TierPlacement, whole: TierPlacement) -> str:
    """What a tier for smaller steps does not share with the phase's own; empty where it does."""
    if tier.num_second_seqs:
        return "has two sub-batches, which only the largest decode tier can have"
    if tier.max_num_tokens >= whole.max_num_tokens:
        return (
            f"is for steps of {tier.max_num_tokens} tokens, no fewer than the {tier.phase} tier's "
            f"{whole.max_num_tokens}"
        )
    if len(tier.layers) != len(whole.layers):
        return f"has {len(tier.layers)} layers, the {tier.phase} tier {len(whole.layers)}"
    pairs = [(tier.embedding, whole.embedding), (tier.head, whole.head)]
    for mine, its in zip(tier.layers, whole.layers, strict=True):
        keeps = (mine.kv, mine.num_gpu_kv_tokens) == (its.kv, its.num_gpu_kv_tokens)
        if not keeps or len(mine.modules()) != len(its.modules()):
            return f"keeps other caches than the {tier.phase} tier"
        pairs += zip(
            (where for _, where in mine.modules()),
            (where for _, where in its.modules()),
            strict=True,
        )
    if any((a.lives, a.num_resident) != (b.lives, b.num_resident) for a, b in pairs):
        return f"has weights elsewhere than the {tier.phase} tier"
    return ""


def _why_not_divided(placement: Placement, spec: ModelSpec, layer: int, num_resident: int) -> str:
    """Why a dense feed-forward cannot have so many resident shares; empty where it can."""
    if num_resident and not spec.can_divide(layer, num_resident):
        possible = [count for count in range(DENSE_SHARES) if spec.can_divide(layer, count)]
        way_out = "0 is" if not possible else f"{possible[0]} to {possible[-1]} are"
        return (
            f"the feed-forward of layer {layer} of the model cannot be divided after "
            f"{num_resident} of {DENSE_SHARES} shares of its columns, {way_out} possible"
        )
    residents = {tier.layers[layer].ffn.num_resident for tier in placement.tiers}
    if len(residents) > 1:
        return f"the feed-forward of layer {layer} is divided in more than one way"
    return ""


def check_matches(placement: Placement, spec: ModelSpec) -> str | None:
    """Why a placement cannot be used for a model, or None where it can."""
    for name, tier in placement.named_tiers:
        if len(tier.layers) != spec.num_layers:
            return (
                f"the plan has {len(tier.layers)} layers, the model {spec.num_layers} - at "
                f"`$.placement.{name}.layers`"
            )
        for index, (where, layer) in enumerate(zip(tier.layers, spec.layers, strict=True)):
            path = f"$.placement.{name}.layers[{index}]"
            if (where.router is not None) != layer.is_moe:
                kind = "experts" if layer.is_moe else "a dense feed-forward"
                return (
                    f"layer {index} of the model has {kind}, the plan says otherwise - at "
                    f"`{path}.router`"
                )
            if layer.attention is not None and (where.kv_on_cpu or tier.num_second_seqs):
                return (
                    f"attention of layer {index} of the model cannot run on both devices - at "
                    f"`{path}.kv_on_cpu`"
                )
            if not layer.is_moe:
                why_not = _why_not_divided(placement, spec, index, where.ffn.num_resident)
                if why_not:
                    return f"{why_not} - at `{path}.ffn.num_resident`"
            elif where.ffn.num_resident >= layer.num_experts:
                return (
                    f"layer {index} of the model has {layer.num_experts} experts, the plan has "
                    f"{where.ffn.num_resident} of them beside others - at "
                    f"`{path}.ffn.num_resident`"
                )
    orders = placement.expert_order
    if orders and len(orders) != spec.num_layers:
        return (
            f"expert_order of the plan has {len(orders)} rows, the model {spec.num_layers} layers "
            "- at `$.placement.expert_order`"
        )
    for index, (row, layer) in enumerate(zip(orders, spec.layers, strict=bool(orders))):
        if sorted(row) != list(range(layer.num_experts)):
            return (
                "expert_order of the plan does not have every expert of every layer once - at "
                f"`$.placement.expert_order[{index}]`"
            )
    return None

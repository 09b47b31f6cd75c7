"""Tiers for smaller steps: the same weights and caches, run as pays for fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from itertools import product

from msgspec.structs import replace

from planner.candidate import Candidate
from planner.cost_model import Pricer
from planner.estimate import WavePricer
from planner.memory import staging_bytes
from planner.model_spec import LayerSpec
from planner.placement import (
    MIXED,
    ON_CPU,
    STREAMED,
    LayerPlacement,
    ModulePlacement,
    Runs,
    TierPlacement,
)
from planner.simulate import makespan_s
from planner.step_graph import Op, build
from planner.workload import Phase, decode_shape, prefill_shapes

# Most new tokens of the steps of a tier.
DECODE_TIERS = (1, 4, 16, 64)
PREFILL_TIERS = (256, 512, 1024, 2048, 4096)
# A tier of its own must gain this share over the larger one's way.
_LEAST_GAIN = 0.02
# Layers placed alike of which a step is tried; the whole step is simulated once at the end.
_NUM_ALIKE = 2


def with_smaller_tiers(candidate: Candidate) -> Candidate:
    """A placement with tiers for steps of fewer tokens, where these gain by running otherwise.

    Of a phase that has none yet.
    """
    placement, wave = candidate.placement, candidate.wave
    if wave.costs.hardware.gpu is None:
        return candidate
    found, known = candidate, {tier.phase for tier in placement.smaller}
    sizes: dict[Phase, tuple[int, ...]] = {"prefill": PREFILL_TIERS, "decode": DECODE_TIERS}
    missing = [phase for phase in sizes if phase not in known]
    for tier in (each for phase in missing for each in _tiers(candidate, phase, sizes[phase])):
        smaller = (*found.placement.smaller, tier)
        trial = Candidate(replace(placement, smaller=smaller), wave)
        if trial.lacking_bytes == 0 and trial.times.e2e_s <= found.times.e2e_s:
            found = trial
    return found


def smaller_steps(pricer: WavePricer) -> int:
    """Most tokens of the prefill steps that a tier for smaller ones may run; 0: there are none.

    The largest steps of a workload are never among them.
    """
    largest = max(price.shape.num_tokens for _, price in pricer.steps("prefill"))
    return max((size for size in PREFILL_TIERS if size < largest), default=0)


def has_smaller_steps(pricer: WavePricer) -> bool:
    """Are there prefill steps that a tier for smaller ones may run?"""
    most = smaller_steps(pricer)
    return any(price.shape.num_tokens <= most for _, price in pricer.steps("prefill"))


def _tiers(candidate: Candidate, phase: Phase, sizes: tuple[int, ...]) -> Iterator[TierPlacement]:
    """Tiers of a phase, the largest first; what runs as the next larger one does is left out."""
    wave, larger = candidate.wave, candidate.placement.tier(phase)
    most = wave.num_concurrent if phase == "decode" else smaller_steps(candidate.pricer) + 1
    if larger.num_second_seqs or all(
        len(group.options) == 1 for group in _groups(candidate, larger)
    ):
        return
    for size in reversed([size for size in sizes if size < most]):
        step = _Step(candidate, phase, size)
        tier = replace(step.best(larger), max_num_tokens=size)
        if step.seconds(tier) <= (1.0 - _LEAST_GAIN) * step.seconds(larger):
            yield tier
            larger = tier


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Layers of one shape that a tier places alike, and the ways in which they may run.

    Every other one of them: the copies of some hide behind the others' work on the CPU.
    """

    layers: tuple[int, ...]
    options: tuple[LayerPlacement, ...]


class _Step:
    """A step of so many tokens, as ways to run it are tried."""

    def __init__(self, candidate: Candidate, phase: Phase, num_tokens: int) -> None:
        self._candidate = candidate
        wave = candidate.wave
        if phase == "decode":
            past = wave.sequences.prompt_len + wave.sequences.output_len / 2
            shape = decode_shape(num_tokens, past)
        else:
            one = wave.sequences
            shape = prefill_shapes(one.num_seqs, one.prompt_len, num_tokens)[0]
        self._price = Pricer(wave.spec, wave.costs, shape, candidate.pricer.backends)
        tiers, spec = candidate.placement.tiers, wave.spec
        self._num_slots = max(tier.num_expert_slots for tier in tiers)
        self._staging_bytes = max(staging_bytes(spec, tier) for tier in tiers)

    def seconds(self, tier: TierPlacement) -> float:
        """Of the whole step."""
        spec, costs = self._candidate.wave.spec, self._candidate.wave.costs
        return makespan_s(build(spec, tier), self._price, costs.slowdowns)

    def best(self, tier: TierPlacement) -> TierPlacement:
        """Each group of layers in turn run in the way that is fastest beside the others'."""
        groups = _groups(self._candidate, tier)
        best_s = self._few_s(tier, groups)
        for group in groups:
            for option in group.options:
                trial = self._changed(tier, group, option)
                if staging_bytes(self._candidate.wave.spec, trial) > self._staging_bytes:
                    continue
                trial_s = self._few_s(trial, groups)
                if trial_s < best_s:
                    tier, best_s = trial, trial_s
        return tier

    def _changed(self, tier: TierPlacement, group: _Group, option: LayerPlacement) -> TierPlacement:
        members = frozenset(group.layers)
        layers = tuple(option if at in members else each for at, each in enumerate(tier.layers))
        is_split = any(layer.ffn.runs == "split" for layer in layers)
        slots = is_split * self._num_slots
        return replace(tier, strategy=MIXED, cut=0, layers=layers, num_expert_slots=slots)

    def _few_s(self, tier: TierPlacement, groups: list[_Group]) -> float:
        """Seconds of a step of a few layers of each group."""
        wave = self._candidate.wave
        kept = sorted(layer for group in groups for layer in group.layers[:_NUM_ALIKE])
        spec = replace_fields(wave.spec, layers=tuple(wave.spec.layers[at] for at in kept))
        few = replace(tier, layers=tuple(tier.layers[at] for at in kept))

        def seconds(op: Op) -> float:
            return self._price(op if op.layer is None else replace(op, layer=kept[op.layer]))

        return makespan_s(build(spec, few), seconds, wave.costs.slowdowns)


def _groups(candidate: Candidate, tier: TierPlacement) -> list[_Group]:
    """All layers, and how each could run with its weights and cache where they are."""
    spec, costs = candidate.wave.spec, candidate.wave.costs
    by_layer = costs.popularity is not None and costs.popularity.is_by_layer
    alike: dict[tuple[LayerSpec, int, LayerPlacement], list[int]] = {}
    for index, (layer, where) in enumerate(zip(spec.layers, tier.layers, strict=True)):
        alike.setdefault((layer, index if by_layer else 0, where), []).append(index)
    can_split = any(each.num_expert_slots for each in candidate.placement.tiers)
    return [
        _Group(
            layers=tuple(every_other),
            options=_options(layer, where, tier.phase, can_split=can_split),
        )
        for (layer, _, where), members in alike.items()
        for every_other in (members[::2], members[1::2])
        if every_other
    ]


def _options(
    layer: LayerSpec, where: LayerPlacement, phase: Phase, *, can_split: bool
) -> tuple[LayerPlacement, ...]:
    attentions = [(where.attention, where.kv_on_cpu)]
    is_free = where.kv == where.attention.lives == "cpu" and layer.attention is None
    is_free = is_free and not where.num_gpu_kv_tokens
    if phase == "decode" and is_free:
        attentions = [(ON_CPU, False), (STREAMED, True)]
    routers = [None] if where.router is None else _ways(where.router)
    found = []
    for (attention, kv_on_cpu), router, ffn in product(
        attentions, routers, _ways(where.ffn, can_split=can_split and layer.is_moe)
    ):
        if ffn.is_mixed and router is not None and router.device == "cpu":
            continue
        found.append(
            LayerPlacement(
                attention=attention,
                router=router,
                ffn=ffn,
                kv_on_cpu=kv_on_cpu,
                num_gpu_kv_tokens=where.num_gpu_kv_tokens,
            )
        )
    return tuple(found)


def _ways(where: ModulePlacement, *, can_split: bool = False) -> list[ModulePlacement]:
    """How a module can run that lives where it does."""
    if where.lives == "gpu":
        return [where]
    runs: tuple[Runs, ...] = ("cpu", "stream", "split") if can_split else ("cpu", "stream")
    return [replace(where, runs=each) for each in runs]

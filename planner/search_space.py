"""SearchSpace: all placements of sequences that run together, and the limits that part them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np

from planner.allocation import Problem
from planner.candidate import Wave
from planner.cost_model import Pricer
from planner.kv_blocks import layer_kv_bytes
from planner.layer_menu import (
    LOADS,
    Bools,
    Floats,
    Menu,
    PricedSteps,
    ends_menu,
    layer_menu,
    layer_placements,
)
from planner.memory import available_bytes, step_activation_bytes
from planner.placement import (
    MIXED,
    NUM_STREAM_BUFFERS,
    Device,
    LayerPlacement,
    Placement,
    TierPlacement,
)
from planner.step_graph import Op
from planner.tiers import smaller_steps
from planner.workload import PHASES, Phase

# Bytes that need not be decided on, as a share of the GPU's.
_FEW = 1e-3
# Caches that take less of the GPU's memory stay with the projections.
_LARGE_CACHES = 0.02
# Parts of the sequences that a second sub-batch has.
_SECOND_SHARES = (0.25, 0.5, 0.75)
# Expert slots take no more of the GPU than this.
_MAX_SLOT_SHARE = 0.25

# In each phase: is it so in any layer? None: where it is not decided.
_Either = tuple[bool | None, bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A part of the space, by what competes for memory by its maximum.

    In each phase: `streamed_bytes` is what the layer that streams most does, at least and at most;
    does any layer stream beside the CPU's work, split its experts, divide its feed-forward, compute
    on the GPU, keep its cache there? What is denied no state may do, what is said takes its memory.
    """

    streamed_bytes: tuple[tuple[float, float], tuple[float, float]]
    mixes: _Either = (None, None)
    is_split: _Either = (None, None)
    is_divided: _Either = (None, None)
    uses_gpu: _Either = (None, None)
    keeps_kv: _Either = (None, None)

    def streaming(self, phase: int, least: float, most: float) -> Limits:
        """The same with so many bytes in a phase."""
        first, second = self.streamed_bytes
        bounds = (least, most)
        return replace(self, streamed_bytes=(first, bounds) if phase else (bounds, second))

    def saying(self, name: Flag, phase: int, is_so: bool) -> Limits:
        """The same with one more said or denied; what is divided is so in both phases."""
        first, second = self.flags(name)
        if name == "is_divided":
            return replace(self, is_divided=(is_so, is_so))
        changed: dict[str, Any] = {name: (first, is_so) if phase else (is_so, second)}
        return replace(self, **changed)

    def flags(self, name: Flag) -> _Either:
        """What is said of each phase."""
        return {
            "mixes": self.mixes,
            "is_split": self.is_split,
            "is_divided": self.is_divided,
            "uses_gpu": self.uses_gpu,
            "keeps_kv": self.keeps_kv,
        }[name]


Flag = Literal["mixes", "is_split", "is_divided", "uses_gpu", "keeps_kv"]
FLAGS: tuple[Flag, ...] = ("mixes", "is_split", "is_divided", "uses_gpu", "keeps_kv")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubBatches:
    """How decode steps are divided: into one, or into two with so many sequences in the second.

    `first_on_cpu`: is the first one's cache on the CPU too?
    """

    num_second: int = 0
    first_on_cpu: bool = False


# Tokens of a prefill step, and how decode steps are divided.
SpaceKey = tuple[int, SubBatches]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A column of the whole menus for every layer in order, and one for the model's ends."""

    layers: tuple[int, ...]
    ends: int


class Space:
    """All placements of one wave and chunk: menus, and the limits that part them."""

    def __init__(
        self, wave: Wave, chunk_tokens: int, sub_batches: SubBatches = SubBatches()
    ) -> None:
        spec, hardware = wave.spec, wave.costs.hardware
        self.key = (chunk_tokens, sub_batches)
        self.wave = wave
        self.chunk_tokens = chunk_tokens
        self.has_gpu = hardware.gpu is not None
        pricer = wave.pricer(chunk_tokens)
        by_layer = wave.costs.popularity is not None and wave.costs.popularity.is_by_layer
        keys = [(layer, index if by_layer else 0) for index, layer in enumerate(spec.layers)]
        kinds = list(dict.fromkeys(keys))
        self.layers = [[at for at, key in enumerate(keys) if key == kind] for kind in kinds]
        self.steps: dict[Phase, PricedSteps] = {}
        for phase in PHASES:
            steps = pricer.steps(phase)
            # Steps that a tier of their own may run count for nothing: it may take less than any
            # state does.
            least = smaller_steps(pricer) if phase == "prefill" else 0
            self.steps[phase] = PricedSteps(
                steps=tuple(
                    (wave.num_waves * count * (price.shape.num_tokens > least), price)
                    for count, price in steps
                ),
                max_fetched=self._max_fetched([price for _, price in steps]),
                num_second=sub_batches.num_second if phase == "decode" else 0,
            )
        self.menus = [
            layer_menu(
                spec,
                members[0],
                wave.sequences,
                self.steps,
                has_gpu=self.has_gpu,
                kv_move_s=partial(pricer.kv_layer_move_s, members[0]),
                num_waves=wave.num_waves,
                chunk_tokens=chunk_tokens,
                has_large_caches=_has_large_caches(wave),
                first_on_cpu=sub_batches.first_on_cpu,
            )
            for members in self.layers
        ]
        self.menu_of = {
            index: menu
            for members, menu in zip(self.layers, self.menus, strict=True)
            for index in members
        }
        self.menus.append(ends_menu(spec, self.steps, has_gpu=self.has_gpu))
        self._menus_apart = [
            replace(menu, loads_s=np.repeat(menu.loads_s.max(axis=0)[None], len(LOADS), axis=0))
            for menu in self.menus
        ]
        self._flags = [_flags(menu, is_end=menu is self.menus[-1]) for menu in self.menus]
        self._levels = [
            np.unique(np.concatenate([menu.streamed_bytes[at] for menu in self.menus]))
            for at in (0, 1)
        ]
        sizes = [spec.expert_bytes(at) for at, layer in enumerate(spec.layers) if layer.is_moe]
        self._slot_bytes = min(sizes, default=0)
        self._most_but_experts = max(
            sum(
                float(spec.weight_bytes(module, index))
                for module in layer.modules
                if module != "experts"
            )
            for index, layer in enumerate(spec.layers)
        )
        self.base_s = wave.num_waves * pricer.host_s
        self._activations: dict[tuple[Device, tuple[bool, bool], tuple[bool, bool]], int] = {}
        self._least_kv_bytes = min(
            spec.kv_bytes_per_token(index) for index in range(spec.num_layers)
        )

    def _max_fetched(self, prices: Sequence[Pricer]) -> int:
        """Experts that a step would copy at most: as the rule divides those that it expects."""
        spec, costs = self.wave.spec, self.wave.costs
        moe = [index for index, layer in enumerate(spec.layers) if layer.is_moe]
        if not moe or not self.has_gpu:
            return 0
        layer, most = moe[-1], spec.layers[moe[-1]].num_experts
        budget = _MAX_SLOT_SHARE * available_bytes(costs.hardware, "gpu")
        most = min(most, int(budget / NUM_STREAM_BUFFERS / spec.expert_bytes(layer)))
        op = Op(
            index=0,
            kind="experts",
            lane="gpu",
            layer=layer,
            module="experts",
            part="fetched",
            max_fetched=most,
        )
        fetched = max(costs.expert_load(op, spec, price.shape).distinct for price in prices)
        # a step may miss more than it is expected to
        return min(most, math.ceil(1.25 * fetched)) if fetched >= 0.25 else 0

    def everything(self) -> Limits:
        """All of the space."""
        first, second = (float(levels[-1]) for levels in self._levels)
        return Limits(streamed_bytes=((0.0, first), (0.0, second)))

    def simple_parts(self, used: Limits) -> Iterator[Limits]:
        """Parts that are denied some of what is used, and costs more than sums know."""
        everything = self.everything()
        levels, flags = list[list[float]](), list[list[bool | None]]()
        for phase in (0, 1):
            most, streamed = everything.streamed_bytes[phase][1], used.streamed_bytes[phase][1]
            denied = (0.0, self._most_but_experts) if phase == 0 else (0.0,)
            levels.append([most, *(level for level in denied if level < streamed)])
            flags.append([None, False] if used.is_split[phase] else [None])
        divisions: list[bool | None] = [None, False] if used.is_divided[0] else [None]
        for prefill, decode in product(*levels):
            for first, second, is_divided in product(*flags, divisions):
                yield replace(
                    everything,
                    streamed_bytes=((0.0, prefill), (0.0, decode)),
                    is_split=(first, second),
                    is_divided=(is_divided, is_divided),
                )

    def allowed(self, kind: int, limits: Limits) -> Bools:
        """The columns of a menu that keep to limits."""
        most = np.array([[most] for _, most in limits.streamed_bytes])
        allowed = np.asarray((self.menus[kind].streamed_bytes <= most).all(axis=0))
        for name in FLAGS:
            for phase, is_so in enumerate(limits.flags(name)):
                if is_so is False:
                    allowed &= ~self._flags[kind][name][phase]
        return allowed

    def problem(self, limits: Limits, *, is_apart: bool) -> Problem | None:
        """The choice of states within limits; None where a kind of layer has none.

        With `is_apart` no layer works while another does: a step then takes each layer's largest
        load, where else it may take the largest sum.
        """
        wanted = [self.allowed(kind, limits) for kind in range(len(self.menus))]
        if not all(allowed.any() for allowed in wanted):
            return None
        return Problem(
            counts=(*(len(members) for members in self.layers), 1),
            menus=tuple(
                menu.only(allowed)
                for menu, allowed in zip(
                    self._menus_apart if is_apart else self.menus, wanted, strict=True
                )
            ),
            base_s=self.base_s,
        )

    def used(self, problem: Problem, columns: Sequence[Iterable[int]]) -> Limits:
        """The limits that say all that some states of a problem do, and deny all else."""
        most, flags = np.zeros(2), {name: np.zeros(2, bool) for name in FLAGS}
        for kind, (menu, picked) in enumerate(zip(problem.menus, columns, strict=True)):
            for column in picked:
                most = np.maximum(most, menu.streamed_bytes[:, column])
                at = self.menus[kind].column_of(menu, column)
                for name in FLAGS:
                    flags[name] |= self._flags[kind][name][:, at]
        either: dict[str, Any] = {
            name: (bool(found[0]), bool(found[1])) for name, found in flags.items()
        }
        first, second = most.tolist()
        return Limits(streamed_bytes=((first, first), (second, second)), **either)

    def parts(self, limits: Limits, used: Limits) -> list[Limits]:
        """Two parts of a part, by what takes most memory of what is used and it does not say.

        Where nothing takes memory, by what else is used: sums know too little of some.
        """
        left = self.budgets(limits)[0]
        most_bytes, found, others = _FEW * abs(left), list[Limits](), list[Limits]()

        def weigh(said: Limits, either: list[Limits]) -> None:
            nonlocal most_bytes, found, others
            taken = left - self.budgets(said)[0]
            if taken > most_bytes:
                most_bytes, found = taken, either
            others = others or either

        for name in FLAGS:
            for phase in (1, 0):
                if limits.flags(name)[phase] is None and used.flags(name)[phase]:
                    either = [limits.saying(name, phase, is_so) for is_so in (True, False)]
                    weigh(either[0], either)
        for phase in (1, 0):
            least, most = limits.streamed_bytes[phase]
            top = used.streamed_bytes[phase][1]
            if top > least:
                levels = self._levels[phase]
                at = int(np.searchsorted(levels, (least + top) / 2, side="right"))
                weigh(
                    limits.streaming(phase, top, most),
                    [
                        limits.streaming(phase, least, float(levels[at - 1])),
                        limits.streaming(phase, float(levels[at]), most),
                    ],
                )
        return found or others

    def budgets(self, limits: Limits) -> tuple[float, float]:
        """Bytes that any placement within limits leaves for weights and KV at most, by device."""
        hardware = self.wave.costs.hardware
        gpu = float(available_bytes(hardware, "gpu"))
        if self.has_gpu:
            keeps_kv = (limits.keeps_kv[0] is True, limits.keeps_kv[1] is True)
            computes = (
                keeps_kv[0] or limits.uses_gpu[0] is True,
                keeps_kv[1] or limits.uses_gpu[1] is True,
            )
            gpu -= self._least_staging_bytes(limits)
            gpu -= self._activation_bytes("gpu", computes, keeps_kv)
        nowhere = (False, False)
        cpu = float(available_bytes(hardware, "cpu"))
        return gpu, cpu - self._activation_bytes("cpu", nowhere, nowhere)

    def _activation_bytes(
        self, device: Device, computes: tuple[bool, bool], keeps_kv: tuple[bool, bool]
    ) -> int:
        """What activations of both phases take at least."""
        key = (device, computes, keeps_kv)
        if key not in self._activations:
            self._activations[key] = max(
                step_activation_bytes(
                    self.wave.spec,
                    self.wave.sequences,
                    device,
                    phase,
                    self.chunk_tokens,
                    computes=computes[at],
                    widest_kv_bytes=self._least_kv_bytes if keeps_kv[at] else 0,
                    num_second_seqs=self.steps[phase].num_second,
                )
                for at, phase in enumerate(PHASES)
            )
        return self._activations[key]

    def staging_bytes(self, draft: Draft, place: int, menu: Menu) -> Floats:
        """What buffers and slots take with each column of a menu in one place of a draft."""
        streamed, is_split = np.zeros(2), np.zeros(2, bool)
        for index, column in enumerate(draft.layers):
            if index != place:
                streamed = np.maximum(streamed, self.menu_of[index].streamed_bytes[:, column])
                is_split |= self.menu_of[index].is_split[:, column]
        slots = np.array([self.steps[phase].max_fetched for phase in PHASES]) * self._slot_bytes
        buffers = np.maximum(streamed[:, None], menu.streamed_bytes)
        taken = buffers + slots[:, None] * (is_split[:, None] | menu.is_split)
        found: Floats = NUM_STREAM_BUFFERS * taken.max(axis=0)
        return found

    def _least_staging_bytes(self, limits: Limits) -> float:
        """What buffers and slots of any placement within limits take at least.

        The phases share the memory, so that the larger need counts.
        """
        return NUM_STREAM_BUFFERS * max(
            limits.streamed_bytes[at][0]
            + (limits.is_split[at] is True) * self.steps[phase].max_fetched * self._slot_bytes
            for at, phase in enumerate(PHASES)
        )


def _has_large_caches(wave: Wave) -> bool:
    """Do the caches take so much of the GPU that they are worth keeping elsewhere?"""
    spec, hardware = wave.spec, wave.costs.hardware
    num_bytes = sum(
        layer_kv_bytes(
            spec, wave.sequences, index, "gpu", prefill="gpu", decode="gpu", chunk_tokens=1
        )
        for index in range(spec.num_layers)
    )
    return num_bytes > _LARGE_CACHES * available_bytes(hardware, "gpu") > 0.0


def divisions(wave: Wave) -> Iterator[SubBatches]:
    """Ways to divide decode steps that are tried: not at all, and some in two.

    Two whose caches are both on the CPU are halves, so that each hides the other's attention; a
    first one on the GPU has more or fewer.
    """
    yield SubBatches()
    num_seqs, spec = wave.num_concurrent, wave.spec
    is_ordinary = all(layer.attention is None for layer in spec.layers)
    if not _has_large_caches(wave) or not is_ordinary or wave.workload.output_len == 1:
        return
    counts = {round(share * num_seqs) for share in _SECOND_SHARES}
    for num_second in sorted(counts - {0, num_seqs}):
        yield SubBatches(num_second=num_second)
    if num_seqs > 1:
        yield SubBatches(num_second=num_seqs // 2, first_on_cpu=True)


def _flags(menu: Menu, *, is_end: bool) -> dict[str, Bools]:
    """Of each name of `FLAGS`, (2, S)."""
    picked = np.unravel_index(menu.states, [len(options) for options in menu.choices])
    uses_cpu, keeps_kv, is_divided = np.zeros((3, 2, len(menu.states)), bool)
    phases = list(enumerate(PHASES))
    for options, at in zip(menu.choices, picked, strict=True):
        on_cpu = np.array(
            [
                ["cpu" in each[row].devices or each.kv(phase) == "cpu" for row, phase in phases]
                for each in options
            ]
        )
        uses_cpu |= on_cpu[at].T
    if not is_end:
        for choice in np.unique(picked[0]):
            layers = layer_placements(menu, int(np.argmax(picked[0] == choice)))
            keeps_kv[:, picked[0] == choice] = [[layer.kv == "gpu"] for layer in layers]
        if len(menu.choices) == 2:  # attention and a dense feed-forward
            residents = np.array([choice.decode.num_resident for choice in menu.choices[1]])
            is_divided |= residents[picked[1]] > 0
    return {
        "mixes": (menu.streamed_bytes > 0) & uses_cpu,
        "is_split": menu.is_split,
        "is_divided": is_divided,
        "uses_gpu": menu.uses_gpu,
        "keeps_kv": keeps_kv,
    }


def placement_of(space: Space, draft: Draft) -> Placement:
    spec = space.wave.spec
    known: dict[tuple[int, int], tuple[LayerPlacement, LayerPlacement]] = {}
    layers = list[tuple[LayerPlacement, LayerPlacement]]()
    for index, column in enumerate(draft.layers):
        menu = space.menu_of[index]
        if (id(menu), column) not in known:
            known[id(menu), column] = layer_placements(menu, column)
        layers.append(known[id(menu), column])
    embedding, head = space.menus[-1].picked(draft.ends)
    tiers = []
    for at, phase in enumerate(PHASES):
        placed = tuple(layer[at] for layer in layers)
        is_split = any(layer.ffn.runs == "split" for layer in placed)
        tiers.append(
            TierPlacement(
                phase=phase,
                strategy=MIXED,
                cut=0,
                max_num_tokens=space.chunk_tokens,
                embedding=embedding[at],
                layers=placed,
                head=head[at],
                num_expert_slots=is_split * NUM_STREAM_BUFFERS * space.steps[phase].max_fetched,
                num_second_seqs=space.steps[phase].num_second,
            )
        )
    popularity = space.wave.costs.popularity
    order: tuple[tuple[int, ...], ...] = ()
    if popularity is not None and popularity.is_known:
        order = tuple(
            popularity.order(index) if layer.is_moe else ()
            for index, layer in enumerate(spec.layers)
        )
    return Placement(prefill=tiers[0], decode=tiers[1], expert_order=order)

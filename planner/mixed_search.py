"""The fastest placement of all: module by module, with a bound on what any could reach."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import numpy as np

from planner.allocation import Allocation, Multipliers, Problem, Relaxation, allocate
from planner.candidate import Candidate, Wave
from planner.cost_model import Pricer
from planner.layer_menu import (
    DEVICES,
    Bools,
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
    Placement,
    TierPlacement,
)
from planner.step_graph import Op
from planner.workload import PHASES, Phase

# Parts of a layer's experts that limits on streamed bytes lie at.
_STREAMED_SHARES = (0.25, 0.5, 1.0)
# What a placement could gain at most and is not looked for: the share of its seconds that are left.
_ENOUGH = 0.995
# Allocations of one problem until one fits.
_MAX_TRIES = 12
# Neighbours of the best placement that are simulated: as many as have so many ops in all.
_MAX_SIMULATED_OPS = 12_000
_MIN_SIMULATED, _MAX_SIMULATED = 8, 300
# Placements of a chunk that are all looked at where there are no more.
_MAX_COMBINATIONS = 8000
# Parts of the sequences that a second sub-batch has.
_SECOND_SHARES = (0.25, 0.5, 0.75)
# Expert slots take no more of the GPU than this.
_MAX_SLOT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Placements to choose from, and what no placement of the space is faster than."""

    candidates: tuple[Candidate, ...]
    bound_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    """What all states of a problem keep to: its share of what competes for memory by maximum.

    `streamed_bytes` is what a layer streams at least and at most; `uses_gpu`, `streams` and
    `is_split` are the phases in which any layer does.
    """

    streamed_bytes: tuple[float, float]
    streams: tuple[bool, bool]
    is_split: tuple[bool, bool]
    uses_gpu: tuple[bool, bool]

    def allows(self, menu: Menu) -> Bools:
        """The columns of a menu that keep to them."""
        allowed: Bools = np.asarray((menu.streamed_bytes <= self.streamed_bytes[1]).all(axis=0))
        for phase in (0, 1):
            if not self.streams[phase]:
                allowed &= menu.streamed_bytes[phase] == 0
            if not self.is_split[phase]:
                allowed &= ~menu.is_split[phase]
            if not self.uses_gpu[phase]:
                allowed &= ~menu.uses_gpu[phase]
        return allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class _SubBatches:
    """How decode steps are divided: into one, or into two with so many sequences in the second.

    `first_on_cpu`: is the first one's cache on the CPU too?
    """

    num_second: int = 0
    first_on_cpu: bool = False


class _Space:
    """All placements of one wave and chunk: menus, and the limits that part them."""

    def __init__(
        self, wave: Wave, chunk_tokens: int, sub_batches: _SubBatches = _SubBatches()
    ) -> None:
        spec, hardware = wave.spec, wave.costs.hardware
        self.sub_batches = sub_batches
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
            self.steps[phase] = PricedSteps(
                steps=tuple((wave.num_waves * count, price) for count, price in steps),
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
        self.base_s = wave.num_waves * pricer.host_s

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

    def limits(self) -> Iterator[_Limits]:
        """Every placement keeps to the least of these that it keeps to."""
        either = (False, True)
        pairs = list(product(either, either))
        # those first in which most placements worth having are
        for uses_gpu, streams, is_split in product(reversed(pairs), pairs, pairs):
            is_possible = all(
                (
                    (uses_gpu[at] and self.has_gpu)
                    or not (uses_gpu[at] or streams[at] or is_split[at])
                )
                and (self.steps[phase].max_fetched or not is_split[at])
                for at, phase in enumerate(PHASES)
            )
            if not is_possible:
                continue
            for streamed_bytes in (
                pairwise((0.0, *self._levels())) if any(streams) else [(0.0, 0.0)]
            ):
                yield _Limits(
                    streamed_bytes=streamed_bytes,
                    streams=streams,
                    is_split=is_split,
                    uses_gpu=uses_gpu,
                )

    def _levels(self) -> list[float]:
        """Most bytes of a layer that are streamed: all but experts, and parts of the experts."""
        spec = self.wave.spec
        whole, experts = 0.0, 0.0
        for members in self.layers:
            layer = spec.layers[members[0]]
            others = sum(
                spec.weight_bytes(module, members[0])
                for module in layer.modules
                if module != "experts"
            )
            whole = max(whole, others)
            if layer.is_moe:
                experts = max(experts, spec.weight_bytes("experts", members[0]))
        levels = {whole}
        if experts:
            levels |= {whole + share * experts for share in _STREAMED_SHARES}
        return sorted(levels)

    def budgets(self, limits: _Limits) -> tuple[float, float]:
        """Bytes that any placement within limits leaves for weights and KV at most, by device."""
        spec, hardware, wave = self.wave.spec, self.wave.costs.hardware, self.wave.sequences

        def activations(device: Device) -> int:
            return max(
                step_activation_bytes(
                    spec,
                    wave,
                    device,
                    phase,
                    self.chunk_tokens,
                    computes=device == "gpu" and limits.uses_gpu[at],
                    widest_kv_bytes=0,
                )
                for at, phase in enumerate(PHASES)
            )

        gpu = float(available_bytes(hardware, "gpu"))
        if self.has_gpu:
            gpu -= self._least_staging_bytes(limits) + activations("gpu")
        return gpu, float(available_bytes(hardware, "cpu")) - activations("cpu")

    def _least_staging_bytes(self, limits: _Limits) -> float:
        """What buffers and slots of any placement within limits take at least.

        The phases share the memory, so that the larger need counts: of one that splits its slots,
        of one that streams its buffers beside its slots.
        """
        spec = self.wave.spec
        sizes = [spec.expert_bytes(at) for at, layer in enumerate(spec.layers) if layer.is_moe]
        slots = [
            limits.is_split[at] * NUM_STREAM_BUFFERS * self.steps[phase].max_fetched * min(sizes)
            if sizes
            else 0
            for at, phase in enumerate(PHASES)
        ]
        buffers = NUM_STREAM_BUFFERS * limits.streamed_bytes[0]
        beside = min((slots[at] for at in (0, 1) if limits.streams[at]), default=0)
        return max(*slots, buffers + beside)


def mixed_search(wave: Wave, chunks: Sequence[int], known_s: float) -> Found:
    """Search all placements of a wave.

    Parameters
    ----------
    chunks : sequence of int
        New tokens of a prefill step that are tried.
    known_s : float
        Seconds of a placement that is known to fit, or infinite.

    Notes
    -----
    What competes for memory by its maximum (staging, slots, activations) and the chunk are
    enumerated; for each the layers' states are chosen by prices of memory (`allocation.py`), which
    give a lower bound too, and simulated, unless the bound shows that little is to be gained. The
    bound of all is the least of the bounds.
    """
    bound_s, best_s = math.inf, known_s
    hint: Multipliers | None = None
    candidates: list[Candidate] = []
    best: tuple[_Space, _Draft, Candidate] | None = None
    for chunk_tokens, sub_batches in product(chunks, _divisions(wave)):
        space = _Space(wave, chunk_tokens, sub_batches)
        for limits in space.limits():
            menus = [menu.only(limits.allows(menu)) for menu in space.menus]
            if any(not len(menu.states) for menu in menus):
                continue
            problem = Problem(
                counts=(*(len(members) for members in space.layers), 1),
                menus=tuple(menus),
                base_s=space.base_s,
            )
            budgets = space.budgets(limits)
            if problem.least_bytes > sum(budgets):
                continue
            relaxation = Relaxation(problem, budgets, hint)
            answer = relaxation.solve(_ENOUGH * best_s)
            if answer is None:
                continue
            hint = answer.multipliers
            bound_s = min(bound_s, answer.bound_s)
            if answer.bound_s >= _ENOUGH * best_s:
                continue
            for draft, candidate in _candidates(space, problem, relaxation, budgets, best_s):
                candidates.append(candidate)
                if candidate.times.e2e_s < best_s:
                    best_s, best = candidate.times.e2e_s, (space, draft, candidate)
        for draft, candidate in _all(space, best_s):
            candidates.append(candidate)
            best_s, best = candidate.times.e2e_s, (space, draft, candidate)
    if best is not None:
        candidates += _polished(*best)
        best_s = min(best_s, candidates[-1].times.e2e_s)
    return Found(candidates=tuple(candidates), bound_s=float(min(bound_s, best_s)))


def _divisions(wave: Wave) -> Iterator[_SubBatches]:
    """Ways to divide decode steps that are tried: not at all, and some in two.

    Two whose caches are both on the CPU are halves, so that each hides the other's attention; a
    first one on the GPU has more or fewer.
    """
    yield _SubBatches()
    num_seqs, spec = wave.num_concurrent, wave.spec
    is_ordinary = all(layer.attention is None for layer in spec.layers)
    if wave.costs.hardware.gpu is None or not is_ordinary or wave.workload.output_len == 1:
        return
    counts = {round(share * num_seqs) for share in _SECOND_SHARES}
    for count in sorted(counts - {0, num_seqs}):
        yield _SubBatches(num_second=count)
    if num_seqs > 1:
        yield _SubBatches(num_second=num_seqs // 2, first_on_cpu=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A column of the whole menus for every layer in order, and one for the model's ends."""

    layers: tuple[int, ...]
    ends: int


def _candidates(
    space: _Space,
    problem: Problem,
    relaxation: Relaxation,
    most: tuple[float, float],
    known_s: float,
) -> Iterator[tuple[_Draft, Candidate]]:
    """Placements that fit and may be faster than `known_s`.

    What competes for memory by its maximum is known once there is a placement: budgets begin with
    the most that any leaves, and shrink by what then lacks.
    """
    budgets = np.array(most)
    for _ in range(_MAX_TRIES):
        found = allocate(problem, relaxation, (float(budgets[0]), float(budgets[1])))
        if found is None or found.seconds >= known_s:
            return
        lacking = np.zeros(2)
        for draft in _drafts(space, found, problem.menus):
            candidate = Candidate(_placement(space, draft), space.wave)
            lacking = np.array([candidate.lacking_on(device) for device in DEVICES], float)
            if lacking.any():
                break
            yield draft, candidate
        if not lacking.any():
            return
        budgets -= lacking


def _drafts(space: _Space, allocation: Allocation, menus: Sequence[Menu]) -> Iterator[_Draft]:
    """An allocation's layers in order: like beside like, and what is streamed spread evenly."""
    together: dict[int, int] = {}
    spread: dict[int, int] = {}
    streams = False
    for counts, menu, whole, members in zip(
        allocation.counts, menus, space.menus, space.layers, strict=False
    ):
        columns = {whole.column_of(menu, column): count for column, count in counts.items()}
        streams |= any(whole.streamed_bytes[:, column].any() for column in columns)
        listed = [column for column, count in columns.items() for _ in range(count)]
        together |= zip(members, sorted(listed, key=partial(_depth, whole)), strict=True)
        places = sorted(
            ((at + 0.5) / count, column) for column, count in columns.items() for at in range(count)
        )
        spread |= zip(members, (column for _, column in places), strict=True)
    (ends,) = allocation.counts[-1]
    ends = space.menus[-1].column_of(menus[-1], ends)
    for layers in (together, spread) if streams else (together,):
        yield _Draft(layers=tuple(layers[index] for index in sorted(layers)), ends=ends)


def _all(space: _Space, known_s: float) -> Iterator[tuple[_Draft, Candidate]]:
    """Ever faster placements of a model of so few layers that each can be looked at."""
    menus = [*space.menu_of.values(), space.menus[-1]]
    if math.prod(len(menu.states) for menu in menus) > _MAX_COMBINATIONS:
        return
    columns = np.indices([len(menu.states) for menu in menus]).reshape(len(menus), -1)
    loads_s = np.zeros((3, 2, columns.shape[1]))
    moves_s = np.zeros(columns.shape[1])
    for menu, at in zip(menus, columns, strict=True):
        loads_s += menu.loads_s[:, :, at]
        moves_s += menu.move_s[at]
    seconds = loads_s.max(axis=0).sum(axis=0) + moves_s + space.base_s
    for index in np.argsort(seconds, kind="stable"):
        if seconds[index] >= known_s:
            return
        *layers, ends = columns[:, index].tolist()
        draft = _Draft(layers=tuple(layers), ends=ends)
        candidate = Candidate(_placement(space, draft), space.wave)
        if candidate.lacking_bytes == 0 and candidate.times.e2e_s < known_s:
            known_s = candidate.times.e2e_s
            yield draft, candidate


def _polished(space: _Space, draft: _Draft, candidate: Candidate) -> Iterator[Candidate]:
    """Ever faster placements, each of which gives one layer, or the ends, another state.

    Of all neighbours those are simulated whose sums promise most; sums know nothing of what lanes
    wait for, and allocations nothing of what competes for memory by its maximum.
    """
    num_ops = sum(len(candidate.graphs.of(phase).ops) for phase in PHASES)
    num_left = min(_MAX_SIMULATED, max(_MIN_SIMULATED, _MAX_SIMULATED_OPS // num_ops))
    found: Candidate | None = candidate
    while found is not None:
        found = None
        for other in _neighbours(space, draft, candidate)[:num_left]:
            changed = Candidate(_placement(space, other), space.wave)
            num_left -= 1
            if changed.lacking_bytes:
                continue
            if changed.times.e2e_s < candidate.times.e2e_s:
                draft, candidate, found = other, changed, changed
                yield candidate
                break


def _neighbours(space: _Space, draft: _Draft, candidate: Candidate) -> list[_Draft]:
    """Drafts with one state changed whose sums are below a placement's seconds, the least first.

    Of layers in one state, the first and the last; only states that may fit.
    """
    below_s, memory = candidate.times.e2e_s, candidate.memory
    free = [
        memory[device].available_bytes - memory[device].needed_bytes if device in memory else 0
        for device in DEVICES
    ]
    # another state may need less of it
    free[0] += memory["gpu"].staging_bytes if "gpu" in memory else 0
    slack = np.array(free, float)[:, None]
    menus = [space.menu_of[index] for index in range(len(draft.layers))]
    loads_s = space.menus[-1].loads_s[:, :, draft.ends]
    moves_s = 0.0
    for menu, column in zip(menus, draft.layers, strict=True):
        loads_s = loads_s + menu.loads_s[:, :, column]
        moves_s += float(menu.move_s[column])
    seen: dict[tuple[int, int], list[int]] = {}
    for index, column in enumerate(draft.layers):
        seen.setdefault((id(menus[index]), column), []).append(index)
    places = sorted({index for same in seen.values() for index in (same[0], same[-1])})
    found: list[tuple[float, int, int]] = []
    for place in (*places, len(menus)):
        is_end = place == len(menus)
        menu = space.menus[-1] if is_end else menus[place]
        old = draft.ends if is_end else draft.layers[place]
        changed_s = loads_s[:, :, None] + menu.loads_s - menu.loads_s[:, :, [old]]
        seconds = changed_s.max(axis=0).sum(axis=0) + menu.move_s + space.base_s
        seconds = seconds + moves_s - menu.move_s[old]
        seconds[old] = np.inf
        seconds[(menu.bytes - menu.bytes[:, [old]] > slack).any(axis=0)] = np.inf
        order = np.argsort(seconds, kind="stable")[:_MAX_SIMULATED]
        found += [
            (float(seconds[column]), place, int(column))
            for column in order
            if seconds[column] < below_s
        ]
    drafts = []
    for _, place, column in sorted(found):
        if place == len(menus):
            drafts.append(_Draft(layers=draft.layers, ends=column))
        else:
            layers = (*draft.layers[:place], column, *draft.layers[place + 1 :])
            drafts.append(_Draft(layers=layers, ends=draft.ends))
    return drafts


def _depth(menu: Menu, column: int) -> tuple[object, ...]:
    """Layers on the CPU come first, as in the named strategies, those on the GPU last."""
    picked = menu.picked(column)
    return tuple(
        (choice.decode.device == "gpu", choice.decode.lives == "gpu", choice.decode.num_resident)
        for choice in picked
    )


def _placement(space: _Space, draft: _Draft) -> Placement:
    spec = space.wave.spec
    layers = [
        layer_placements(space.menu_of[index], column) for index, column in enumerate(draft.layers)
    ]
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

"""The fastest placement of all: module by module, with a bound on what any could reach."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from heapq import heappop, heappush
from itertools import count, product
from typing import Any, Literal

import numpy as np

from planner.allocation import Allocation, Bound, Multipliers, Problem, Relaxation, allocate
from planner.candidate import Candidate, Wave
from planner.cost_model import Pricer
from planner.kv_blocks import layer_kv_bytes
from planner.layer_menu import (
    DEVICES,
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
    Placement,
    TierPlacement,
)
from planner.step_graph import Op
from planner.workload import PHASES, Phase

# What a placement could gain at most and is not looked for: the share of its seconds that are left.
_ENOUGH = 0.995
# What is added up as if layers did not overlap may gain so much where they do.
_MARGIN = 1.03
# Parts of the space that are looked at, and allocations of each until one fits.
_MAX_PARTS = 80
_MAX_TRIES = 4
# Bytes that need not be decided on, as a share of the GPU's.
_FEW = 1e-3
# Placements that are simulated in vain after the best, and then neighbours of it: as many as have
# so many ops in all.
_MAX_SIMULATED_OPS = 12_000
_MIN_SIMULATED, _MAX_SIMULATED = 12, 300
# Placements of a chunk are all looked at where there are no more, if so many at most.
_MAX_LOOKED_AT = 400
_MAX_COMBINATIONS = 100_000
# Caches that take less of the GPU's memory stay with the projections.
_LARGE_CACHES = 0.02
# Parts of the sequences that a second sub-batch has.
_SECOND_SHARES = (0.25, 0.5, 0.75)
# Expert slots take no more of the GPU than this.
_MAX_SLOT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Placements to choose from, and what no placement of the space is faster than."""

    candidates: tuple[Candidate, ...]
    bound_s: float


# In each phase: is it so in any layer? None: where it is not decided.
_Either = tuple[bool | None, bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    """A part of the space, by what competes for memory by its maximum.

    In each phase: `streamed_bytes` is what the layer that streams most does, at least and at most;
    does any layer stream beside the CPU's work, split its experts, compute on the GPU, keep its
    cache there? What is denied no state may do, what is said takes its memory.
    """

    streamed_bytes: tuple[tuple[float, float], tuple[float, float]]
    mixes: _Either = (None, None)
    is_split: _Either = (None, None)
    uses_gpu: _Either = (None, None)
    keeps_kv: _Either = (None, None)

    def streaming(self, phase: int, least: float, most: float) -> _Limits:
        """The same with so many bytes in a phase."""
        first, second = self.streamed_bytes
        bounds = (least, most)
        return replace(self, streamed_bytes=(first, bounds) if phase else (bounds, second))

    def saying(self, name: _Flag, phase: int, is_so: bool) -> _Limits:
        """The same with one more said or denied."""
        first, second = self.flags(name)
        changed: dict[str, Any] = {name: (first, is_so) if phase else (is_so, second)}
        return replace(self, **changed)

    def flags(self, name: _Flag) -> _Either:
        """What is said of each phase."""
        return {
            "mixes": self.mixes,
            "is_split": self.is_split,
            "uses_gpu": self.uses_gpu,
            "keeps_kv": self.keeps_kv,
        }[name]


_Flag = Literal["mixes", "is_split", "uses_gpu", "keeps_kv"]
_FLAGS: tuple[_Flag, ...] = ("mixes", "is_split", "uses_gpu", "keeps_kv")


@dataclass(frozen=True, slots=True, kw_only=True)
class _SubBatches:
    """How decode steps are divided: into one, or into two with so many sequences in the second.

    `first_on_cpu`: is the first one's cache on the CPU too?
    """

    num_second: int = 0
    first_on_cpu: bool = False


# Tokens of a prefill step, and how decode steps are divided.
_Key = tuple[int, _SubBatches]


class _Space:
    """All placements of one wave and chunk: menus, and the limits that part them."""

    def __init__(
        self, wave: Wave, chunk_tokens: int, sub_batches: _SubBatches = _SubBatches()
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

    def everything(self) -> _Limits:
        """All of the space."""
        first, second = (float(levels[-1]) for levels in self._levels)
        return _Limits(streamed_bytes=((0.0, first), (0.0, second)))

    def simple_parts(self, used: _Limits) -> Iterator[_Limits]:
        """Parts that are denied some of what is used, and costs more than sums know."""
        everything = self.everything()
        levels, flags = list[list[float]](), list[list[bool | None]]()
        for phase in (0, 1):
            most, streamed = everything.streamed_bytes[phase][1], used.streamed_bytes[phase][1]
            denied = (0.0, self._most_but_experts) if phase == 0 else (0.0,)
            levels.append([most, *(level for level in denied if level < streamed)])
            flags.append([None, False] if used.is_split[phase] else [None])
        for prefill, decode in product(*levels):
            for is_split in product(*flags):
                yield replace(
                    everything,
                    streamed_bytes=((0.0, prefill), (0.0, decode)),
                    is_split=(is_split[0], is_split[1]),
                )

    def allowed(self, kind: int, limits: _Limits) -> Bools:
        """The columns of a menu that keep to limits."""
        most = np.array([[most] for _, most in limits.streamed_bytes])
        allowed = np.asarray((self.menus[kind].streamed_bytes <= most).all(axis=0))
        for name in _FLAGS:
            for phase, is_so in enumerate(limits.flags(name)):
                if is_so is False:
                    allowed &= ~self._flags[kind][name][phase]
        return allowed

    def problem(self, limits: _Limits, *, is_apart: bool) -> Problem | None:
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

    def used(self, problem: Problem, columns: Sequence[Iterable[int]]) -> _Limits:
        """The limits that say all that some states of a problem do, and deny all else."""
        most, flags = np.zeros(2), {name: np.zeros(2, bool) for name in _FLAGS}
        for kind, (menu, picked) in enumerate(zip(problem.menus, columns, strict=True)):
            for column in picked:
                most = np.maximum(most, menu.streamed_bytes[:, column])
                at = self.menus[kind].column_of(menu, column)
                for name in _FLAGS:
                    flags[name] |= self._flags[kind][name][:, at]
        either: dict[str, Any] = {
            name: (bool(found[0]), bool(found[1])) for name, found in flags.items()
        }
        first, second = most.tolist()
        return _Limits(streamed_bytes=((first, first), (second, second)), **either)

    def parts(self, limits: _Limits, used: _Limits) -> list[_Limits]:
        """Two parts of a part, by what takes most memory of what is used and it does not say.

        Where nothing takes memory, by what else is used: sums know too little of some.
        """
        left = self.budgets(limits)[0]
        most_bytes, found, others = _FEW * abs(left), list[_Limits](), list[_Limits]()

        def weigh(said: _Limits, either: list[_Limits]) -> None:
            nonlocal most_bytes, found, others
            taken = left - self.budgets(said)[0]
            if taken > most_bytes:
                most_bytes, found = taken, either
            others = others or either

        for name in _FLAGS:
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

    def budgets(self, limits: _Limits) -> tuple[float, float]:
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

    def staging_bytes(self, draft: _Draft, place: int, menu: Menu) -> Floats:
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

    def _least_staging_bytes(self, limits: _Limits) -> float:
        """What buffers and slots of any placement within limits take at least.

        The phases share the memory, so that the larger need counts.
        """
        return NUM_STREAM_BUFFERS * max(
            limits.streamed_bytes[at][0]
            + (limits.is_split[at] is True) * self.steps[phase].max_fetched * self._slot_bytes
            for at, phase in enumerate(PHASES)
        )


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
    Branch and bound. A part of the space is a chunk and limits of what competes for memory by its
    maximum (staging, slots, activations). The linear relaxation (`allocation.py`) gives each part a
    lower bound and states, which are made whole and simulated. The part of the least bound is
    divided by what takes most memory and is not decided, until none promises more than little. The
    bound of all is the least of the bounds of the parts that are left.

    Sums know nothing of what lanes wait for. Of each part those states are tried too that would be
    best if no layer worked while another does, and first of all parts that do without streaming or
    without splitting experts.
    """
    divisions = list(_divisions(wave))
    best, bound_s = _Best(known_s), math.inf
    # What runs in one batch first: most placements worth having are there.
    for some in (divisions[:1], divisions[1:]):
        spaces = [_Space(wave, chunk_tokens, each) for each in some for chunk_tokens in chunks]
        bound_s = min(bound_s, _searched(spaces, best))
    best.polish()
    return Found(candidates=tuple(best.candidates), bound_s=float(min(bound_s, best.seconds)))


def _searched(spaces: Sequence[_Space], best: _Best) -> float:
    """Look for a faster placement in some spaces; returns the least of their bounds."""
    queue: list[tuple[float, int, _Part]] = []
    numbers, hint = count(), None

    def push(space: _Space, limits: _Limits) -> None:
        nonlocal hint
        part = _Part.of(space, limits, hint, _ENOUGH * best.seconds)
        if part is not None:
            hint = part.bound.multipliers
            heappush(queue, (part.bound.bound_s, next(numbers), part))

    best.try_again()
    for space in spaces:
        push(space, space.everything())
    for least_s, _, part in sorted(queue):
        for limits in part.space.simple_parts(part.used):
            if least_s >= _ENOUGH * best.seconds:
                break
            within = _Part.of(part.space, limits, part.bound.multipliers, _ENOUGH * best.seconds)
            if within is not None:
                best.look(within)
    bound_s = math.inf
    for _ in range(_MAX_PARTS):
        if not queue or queue[0][0] >= _ENOUGH * best.seconds:
            break
        least_s, _, part = heappop(queue)
        best.look(part)
        parts = part.space.parts(part.limits, part.used)
        if not parts:
            bound_s = min(bound_s, least_s)
        hint = part.bound.multipliers
        for limits in parts:
            push(part.space, limits)
    for space in spaces:
        for draft, candidate in _all(space, best.seconds):
            best.add(space, draft, candidate)
    return min([bound_s, *(least_s for least_s, *_ in queue)])


class _Best:
    """The fastest placement so far, and those before it. Mutable."""

    def __init__(self, known_s: float) -> None:
        self.seconds = known_s
        self.candidates: list[Candidate] = []
        self._found: tuple[_Space, _Draft, Candidate] | None = None
        self._num_left = _MAX_SIMULATED
        self._seen: set[tuple[_Key, _Draft]] = set()
        self._tried: set[_Tried] = set()
        # of what a placement uses, the least that one took over its sums
        self._excess: dict[tuple[_Key, bool, _Limits], float] = {}

    def try_again(self) -> None:
        """Simulate as many as at first."""
        self._num_left = _MAX_SIMULATED

    def add(self, space: _Space, draft: _Draft, candidate: Candidate) -> None:
        """Keep a faster one."""
        self.seconds, self._found = candidate.times.e2e_s, (space, draft, candidate)
        self.candidates.append(candidate)
        self._num_left = _num_simulated(candidate)

    def look(self, part: _Part) -> None:
        """Simulate what a part's sums promise, unless others like it kept too little."""
        known_s = self.seconds * (_MARGIN if part.is_apart else _ENOUGH)
        if not self._num_left or part.bound.bound_s >= known_s:
            return
        if (part.space.key, part.is_apart, part.taken, part.used) in self._tried:
            return
        if not part.is_apart and part.taken == (0.0, 0.0):
            apart = _Part.of(
                part.space,
                part.limits,
                part.bound.multipliers,
                _MARGIN * self.seconds,
                is_apart=True,
            )
            if apart is not None:
                self.look(apart)
        promise = part.promise(known_s, self._tried)
        if promise is None:
            return
        key = part.space.key
        pattern = (key, part.is_apart, promise.used)
        for draft in promise.drafts:
            if promise.seconds * self._excess.get(pattern, 1.0) >= known_s:
                break
            if (key, draft) in self._seen:
                continue
            self._seen.add((key, draft))
            candidate = Candidate(_placement(part.space, draft), part.space.wave)
            if candidate.lacking_bytes:
                self._look_within(part, promise, candidate)
                break
            self._num_left -= 1
            found = candidate.times.e2e_s / promise.seconds
            self._excess[pattern] = min(found, self._excess.get(pattern, math.inf))
            if candidate.times.e2e_s >= self.seconds:
                break
            self.add(part.space, draft, candidate)

    def _look_within(self, part: _Part, promise: _Promise, lacking: Candidate) -> None:
        """The same with fewer bytes where one lacks some: what a device does takes memory too."""
        most = part.space.budgets(promise.used)
        taken = list(part.taken)
        for row, device in enumerate(DEVICES):
            lacking_bytes = lacking.lacking_on(device)
            if lacking_bytes:
                taken[row] = most[row] - (float(promise.bytes[row]) - lacking_bytes)
        for limits in dict.fromkeys((promise.used, part.used)):
            within = _Part.of(
                part.space,
                limits,
                part.bound.multipliers,
                _MARGIN * self.seconds,
                is_apart=part.is_apart,
                taken=(taken[0], taken[1]),
            )
            if within is not None:
                self.look(within)

    def polish(self) -> None:
        """Look beside the best for ever faster ones."""
        if self._found is not None:
            self.candidates += _polished(*self._found)
            self.seconds = min(self.seconds, self.candidates[-1].times.e2e_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A part of the space and its relaxation."""

    space: _Space
    limits: _Limits
    problem: Problem
    relaxation: Relaxation
    bound: Bound
    budgets: tuple[float, float]
    used: _Limits
    is_apart: bool
    taken: tuple[float, float]

    @staticmethod
    def of(
        space: _Space,
        limits: _Limits,
        hint: Multipliers | None,
        stop_s: float,
        *,
        is_apart: bool = False,
        taken: tuple[float, float] = (0.0, 0.0),
    ) -> _Part | None:
        """None where nothing fits in what limits leave of the memory, less what is taken.

        `is_apart`: `_Space.problem`. Then, and where more is taken, its bound is none.
        """
        problem = space.problem(limits, is_apart=is_apart)
        gpu_bytes, cpu_bytes = space.budgets(limits)
        budgets = (gpu_bytes - taken[0], cpu_bytes - taken[1])
        if problem is None or problem.least_bytes > sum(budgets):
            return None
        relaxation = Relaxation(problem, budgets)
        bound = relaxation.solve(hint, stop_s)
        if bound is None:
            return None
        return _Part(
            space=space,
            limits=limits,
            problem=problem,
            relaxation=relaxation,
            bound=bound,
            budgets=budgets,
            used=space.used(problem, bound.shares) if bound.shares else limits,
            is_apart=is_apart,
            taken=taken,
        )

    def promise(self, known_s: float, tried: set[_Tried]) -> _Promise | None:
        """What its states give in whole layers, where its sums promise less than `known_s`.

        What does not leave the memory that it uses is looked for again within what is left.
        """
        part, used = self, self.used
        for _ in range(_MAX_TRIES):
            key = (self.space.key, self.is_apart, self.taken, used)
            if key in tried:
                return None
            tried.add(key)
            if (np.array(self.space.budgets(used)) - self.taken < part.budgets).any():
                within = _Part.of(
                    self.space,
                    used,
                    part.bound.multipliers,
                    known_s,
                    is_apart=self.is_apart,
                    taken=self.taken,
                )
                if within is None or within.bound.bound_s >= known_s:
                    return None
                part = within
            found = allocate(part.problem, part.relaxation, part.bound, part.budgets)
            if found is None or found.seconds >= known_s:
                return None
            used = self.space.used(part.problem, found.counts)
            if (found.bytes <= np.array(self.space.budgets(used)) - self.taken).all():
                drafts = _drafts(self.space, found, part.problem.menus)
                return _Promise(seconds=found.seconds, bytes=found.bytes, drafts=drafts, used=used)
        return None


# Chunk, whether apart, bytes taken, and what is used.
_Tried = tuple[_Key, bool, tuple[float, float], _Limits]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promise:
    """Drafts of one allocation, the seconds of their sums, their bytes, and what they use."""

    seconds: float
    bytes: Floats
    drafts: Iterator[_Draft]
    used: _Limits


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


def _divisions(wave: Wave) -> Iterator[_SubBatches]:
    """Ways to divide decode steps that are tried: not at all, and some in two.

    Two whose caches are both on the CPU are halves, so that each hides the other's attention; a
    first one on the GPU has more or fewer.
    """
    yield _SubBatches()
    num_seqs, spec = wave.num_concurrent, wave.spec
    is_ordinary = all(layer.attention is None for layer in spec.layers)
    if not _has_large_caches(wave) or not is_ordinary or wave.workload.output_len == 1:
        return
    counts = {round(share * num_seqs) for share in _SECOND_SHARES}
    for num_second in sorted(counts - {0, num_seqs}):
        yield _SubBatches(num_second=num_second)
    if num_seqs > 1:
        yield _SubBatches(num_second=num_seqs // 2, first_on_cpu=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A column of the whole menus for every layer in order, and one for the model's ends."""

    layers: tuple[int, ...]
    ends: int


def _flags(menu: Menu, *, is_end: bool) -> dict[str, Bools]:
    """Of each name of `_FLAGS`, (2, S)."""
    picked = np.unravel_index(menu.states, [len(options) for options in menu.choices])
    uses_cpu, keeps_kv = np.zeros((2, 2, len(menu.states)), bool)
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
    return {
        "mixes": (menu.streamed_bytes > 0) & uses_cpu,
        "is_split": menu.is_split,
        "uses_gpu": menu.uses_gpu,
        "keeps_kv": keeps_kv,
    }


def _drafts(space: _Space, allocation: Allocation, menus: Sequence[Menu]) -> Iterator[_Draft]:
    """An allocation's layers in order: what is streamed spread evenly, or like beside like."""
    together: dict[int, int] = {}
    left: dict[int, dict[int, int]] = {}
    streams = False
    for counts, menu, whole, members in zip(
        allocation.counts, menus, space.menus, space.layers, strict=False
    ):
        columns = {whole.column_of(menu, column): count for column, count in counts.items()}
        streams |= any(whole.streamed_bytes[:, column].any() for column in columns)
        listed = [column for column, count in columns.items() for _ in range(count)]
        together |= zip(members, sorted(listed, key=partial(_depth, whole)), strict=True)
        left |= dict.fromkeys(members, columns)
    (ends,) = allocation.counts[-1]
    ends = space.menus[-1].column_of(menus[-1], ends)
    in_order = [together[index] for index in sorted(together)]
    for layers in (_evenly(space, left), in_order) if streams else (in_order,):
        yield _Draft(layers=tuple(layers), ends=ends)


def _evenly(space: _Space, left: dict[int, dict[int, int]]) -> list[int]:
    """Layers in an order in which chains and copies grow together, as copies run little ahead."""
    rows = [LOADS.index("chain"), LOADS.index("copies")]
    loads_s = {
        index: {column: space.menu_of[index].loads_s[rows, :, column].ravel() for column in columns}
        for index, columns in left.items()
    }
    total_s = sum(
        count * loads_s[members[0]][column]
        for members in space.layers
        for column, count in left[members[0]].items()
    )
    layers, sum_s = list[int](), np.zeros(2 * len(rows))
    for index in sorted(left):
        wanted_s = (index + 1) / len(left) * total_s
        column = min(
            (column for column, count in left[index].items() if count),
            key=lambda column: float(((sum_s + loads_s[index][column] - wanted_s) ** 2).sum()),
        )
        left[index][column] -= 1
        sum_s = sum_s + loads_s[index][column]
        layers.append(column)
    return layers


def _all(space: _Space, known_s: float) -> Iterator[tuple[_Draft, Candidate]]:
    """Ever faster placements of a model of so few layers that each can be looked at."""
    menus = [*(space.menu_of[index] for index in sorted(space.menu_of)), space.menus[-1]]
    if math.prod(len(menu.states) for menu in menus) > _MAX_COMBINATIONS:
        return
    columns = np.indices([len(menu.states) for menu in menus]).reshape(len(menus), -1)
    held = np.zeros((2, columns.shape[1]))
    for menu, at in zip(menus, columns, strict=True):
        held += menu.bytes[:, at]
    columns = columns[:, (held <= np.array([space.budgets(space.everything())]).T).all(axis=0)]
    loads_s = np.zeros((len(LOADS), 2, columns.shape[1]))
    moves_s = np.zeros(columns.shape[1])
    for menu, at in zip(menus, columns, strict=True):
        loads_s += menu.loads_s[:, :, at]
        moves_s += menu.move_s[at]
    seconds = loads_s.max(axis=0).sum(axis=0) + moves_s + space.base_s
    for index in np.argsort(seconds, kind="stable")[:_MAX_LOOKED_AT]:
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
    num_left = _num_simulated(candidate)
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


def _num_simulated(candidate: Candidate) -> int:
    """How many placements like this one are worth simulating in search of a faster one."""
    num_ops = sum(
        len(candidate.graphs.of(candidate.pricer.steps(phase)[0][1].shape).ops) for phase in PHASES
    )
    return min(_MAX_SIMULATED, max(_MIN_SIMULATED, _MAX_SIMULATED_OPS // num_ops))


def _neighbours(space: _Space, draft: _Draft, candidate: Candidate) -> list[_Draft]:
    """Drafts with one state changed whose sums are below a placement's seconds, the least first.

    Of layers in one state, the first and the last; only states that may fit.
    """
    below_s, memory = candidate.times.e2e_s, candidate.memory
    free = [
        memory[device].available_bytes - memory[device].needed_bytes if device in memory else 0
        for device in DEVICES
    ]
    free[0] += memory["gpu"].staging_bytes
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
        more = menu.bytes - menu.bytes[:, [old]]
        more[0] += space.staging_bytes(draft, place, menu)
        seconds[(more > slack).any(axis=0)] = np.inf
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

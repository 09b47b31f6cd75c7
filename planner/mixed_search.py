"""The fastest placement of all: module by module, with a bound on what any could reach."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

import numpy as np

from planner.allocation import Bound, Multipliers, Problem, Relaxation, allocate
from planner.candidate import Candidate, Wave
from planner.layer_menu import DEVICES, Floats
from planner.layer_order import drafts_of
from planner.neighbours import MAX_SIMULATED, all_placements, num_simulated, polished
from planner.search_space import Draft, Limits, Space, SpaceKey, divisions, placement_of

# What a placement could gain at most and is not looked for: the share of its seconds that are left.
_ENOUGH = 0.995
# How much more is looked at where a bound is below this share of the seconds.
_FAR, _MORE = 0.98, 4
# What is added up as if layers did not overlap may gain so much where they do.
_MARGIN = 1.03
# Parts of the space that are looked at, and allocations of each until one fits.
_MAX_PARTS = 80
_MAX_TRIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Placements to choose from, and what no placement of the space is faster than."""

    candidates: tuple[Candidate, ...]
    bound_s: float


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
    ways = list(divisions(wave))
    best, bound_s = _Best(known_s), math.inf
    # What runs in one batch first: most placements worth having are there.
    for some in (ways[:1], ways[1:]):
        spaces = [Space(wave, chunk_tokens, each) for each in some for chunk_tokens in chunks]
        bound_s = min(bound_s, _searched(spaces, best))
    best.polish()
    return Found(candidates=tuple(best.candidates), bound_s=float(min(bound_s, best.seconds)))


def _searched(spaces: Sequence[Space], best: _Best) -> float:
    """Look for a faster placement in some spaces; returns the least of their bounds."""
    queue: list[tuple[float, int, _Part]] = []
    numbers, hint = count(), None

    def push(space: Space, limits: Limits) -> None:
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
    for num_parts in range((1 + _MORE) * _MAX_PARTS):
        enough = _ENOUGH if num_parts < _MAX_PARTS else _FAR
        if not queue or queue[0][0] >= enough * best.seconds:
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
        for draft, candidate in all_placements(space, best.seconds):
            best.add(space, draft, candidate)
    return min([bound_s, *(least_s for least_s, *_ in queue)])


class _Best:
    """The fastest placement so far, and those before it. Mutable."""

    def __init__(self, known_s: float) -> None:
        self.seconds = known_s
        self.candidates: list[Candidate] = []
        self._found: tuple[Space, Draft, Candidate] | None = None
        # simulated since the fastest was found, and how many may be
        self._num_in_vain, self._num_allowed = 0, MAX_SIMULATED
        self._seen: set[tuple[SpaceKey, Draft]] = set()
        self._tried: set[_Tried] = set()
        # of what a placement uses, the least that one took over its sums
        self._excess: dict[tuple[SpaceKey, bool, Limits], float] = {}

    def try_again(self) -> None:
        """Simulate as many as at first."""
        self._num_in_vain, self._num_allowed = 0, MAX_SIMULATED

    def add(self, space: Space, draft: Draft, candidate: Candidate) -> None:
        """Keep a faster one."""
        self.seconds, self._found = candidate.times.e2e_s, (space, draft, candidate)
        self.candidates.append(candidate)
        self._num_in_vain, self._num_allowed = 0, num_simulated(candidate)

    def look(self, part: _Part) -> None:
        """Simulate what a part's sums promise, unless others like it kept too little."""
        known_s = self.seconds * (_MARGIN if part.is_apart else _ENOUGH)
        is_far = part.bound.bound_s < _FAR * self.seconds
        num_allowed = (1 + _MORE * is_far) * self._num_allowed
        if self._num_in_vain >= num_allowed or part.bound.bound_s >= known_s:
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
            candidate = Candidate(placement_of(part.space, draft), part.space.wave)
            if candidate.lacking_bytes:
                self._look_within(part, promise, candidate)
                break
            self._num_in_vain += 1
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
            self.candidates += polished(*self._found)
            self.seconds = min(self.seconds, self.candidates[-1].times.e2e_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A part of the space and its relaxation."""

    space: Space
    limits: Limits
    problem: Problem
    relaxation: Relaxation
    bound: Bound
    budgets: tuple[float, float]
    used: Limits
    is_apart: bool
    taken: tuple[float, float]

    @staticmethod
    def of(
        space: Space,
        limits: Limits,
        hint: Multipliers | None,
        stop_s: float,
        *,
        is_apart: bool = False,
        taken: tuple[float, float] = (0.0, 0.0),
    ) -> _Part | None:
        """None where nothing fits in what limits leave of the memory, less what is taken.

        `is_apart`: `Space.problem`. Then, and where more is taken, its bound is none.
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
                drafts = drafts_of(self.space, found, part.problem.menus)
                return _Promise(seconds=found.seconds, bytes=found.bytes, drafts=drafts, used=used)
        return None


# Chunk, whether apart, bytes taken, and what is used.
_Tried = tuple[SpaceKey, bool, tuple[float, float], Limits]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promise:
    """Drafts of one allocation, the seconds of their sums, their bytes, and what they use."""

    seconds: float
    bytes: Floats
    drafts: Iterator[Draft]
    used: Limits

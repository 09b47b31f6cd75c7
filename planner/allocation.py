"""Which state each layer takes, so that all fit: a proven bound, and states that come near it."""

# K kinds of layers, each with a menu of S states; two phases p, two devices d

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from planner.layer_menu import Floats, Menu

_NUM_LOADS = 6  # three in each of two phases
# Where a mix is tried to see whether any other than the first load counts.
_NEAR = 0.02
_NUM_MIXES = 4  # that golden section tries of each half
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_MAX_MOVES = 64
_ENOUGH = 1e-6  # of the seconds: what improves less is none
# A move of many layers at once finds what single ones, each a loss, would not.
_STEPS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Layers by kind, and what they must fit in.

    Attributes
    ----------
    counts : tuple of int
        Layers of each kind.
    menus : tuple of Menu
        Their states.
    base_s : float
        Seconds that are spent whatever is chosen.
    """

    counts: tuple[int, ...]
    menus: tuple[Menu, ...]
    base_s: float

    @property
    def least_bytes(self) -> float:
        """Bytes that all layers take at least, on both devices together."""
        pairs = zip(self.counts, self.menus, strict=True)
        return sum(count * float(menu.bytes.sum(axis=0).min()) for count, menu in pairs)


# Of each kind, how many layers are in each column of its menu.
Counts = tuple[dict[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Layers by kind and state, and the seconds that their sums promise."""

    counts: Counts
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Seconds that a byte of each device costs; how much each load counts in each phase.

    `mixes` are points on the path from the first load (0) over the third (0.5) to the second (1).
    """

    per_byte: tuple[float, float]
    mixes: tuple[float, float]

    @cached_property
    def weights(self) -> Floats:
        """Of each load in each phase, (3, 2); those of a phase add up to 1."""
        mixes = np.array(self.mixes)
        shared = 1.0 - np.abs(2.0 * mixes - 1.0)
        return np.stack(
            [np.maximum(0.0, 1.0 - 2.0 * mixes), np.maximum(0.0, 2.0 * mixes - 1.0), shared]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The best states under some multipliers: a lower bound, and what they would take."""

    bound_s: float
    columns: tuple[int, ...]
    bytes: Floats
    multipliers: Multipliers


class Relaxation:
    """The problem with its limits priced instead of kept: every price gives a lower bound.

    Seconds of a phase are at least any mix of the sums over layers of their chains and of their
    copies to the GPU (share a of one, 1 - a of the other), and memory that is over budget costs its
    price a byte. For fixed prices each layer picks its own best state, and what they add up to,
    less the price of the budgets, is no more than the seconds of any placement that fits (Lagrange;
    the best prices give the bound of the linear relaxation over the states of each layer).
    """

    def __init__(
        self,
        problem: Problem,
        budgets: tuple[float, float],
        hint: Multipliers | None = None,
    ) -> None:
        self._problem = problem
        self._hint = hint
        self._budgets = np.array(budgets)
        self._counts = np.array(problem.counts, float)
        self.visited: list[set[int]] = [set() for _ in problem.menus]
        self.fitting: set[tuple[int, ...]] = set()

    def solve(self, stop_s: float = math.inf) -> Bound | None:
        """The best prices; None where nothing fits. Ends early with a bound above `stop_s`."""
        if self._hint is not None:
            known = self.ask(self._hint)
            if known.bound_s >= stop_s:
                return known
        best = self._priced((0.0, 0.0))
        for phase in (1, 0):
            if best is None or best.bound_s >= stop_s:
                return best
            best = self._better_mix(best, phase)
        return best

    def _better_mix(self, best: Bound, phase: int) -> Bound:
        """Golden section over the mix of one phase: the bound is concave in each half."""
        for low, high in ((0.0, 0.5), (0.5, 1.0)):
            if self._mixed(best, phase, low + _NEAR).bound_s < best.bound_s and low == 0.0:
                return best
            answer = self._best_between(best, phase, low, high)
            best = max(best, answer, key=lambda each: each.bound_s)
            if best.multipliers.mixes[phase] < high:
                break
        return best

    def _mixed(self, best: Bound, phase: int, mix: float) -> Bound:
        """The best prices with another mix of one phase."""
        mixes = list(best.multipliers.mixes)
        mixes[phase] = mix
        answer = self._priced((mixes[0], mixes[1]))
        assert answer is not None
        return answer

    def _best_between(self, best: Bound, phase: int, low: float, high: float) -> Bound:
        found: list[Bound] = []

        def bound(mix: float) -> float:
            found.append(self._mixed(best, phase, mix))
            return found[-1].bound_s

        bound(high)
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        left_s, right_s = bound(left), bound(right)
        for _ in range(_NUM_MIXES):
            if left_s >= right_s:
                high, right, right_s = right, left, left_s
                left = high - _GOLDEN * (high - low)
                left_s = bound(left)
            else:
                low, left, left_s = left, right, right_s
                right = low + _GOLDEN * (high - low)
                right_s = bound(right)
        return max(found, key=lambda answer: answer.bound_s)

    def _priced(self, mixes: tuple[float, float]) -> Bound | None:
        """The best price of each device's bytes, one after the other."""
        gpu = self._best_price(mixes, (0.0, 0.0), 0)
        if gpu is None or gpu.bytes[1] <= self._budgets[1]:
            return gpu
        # What does not fit on the CPU must leave it: both prices count.
        best, price = gpu, gpu.multipliers.per_byte
        for _ in range(3):
            cpu = self._best_price(mixes, price, 1)
            if cpu is None:
                break
            best = max(best, cpu, key=lambda answer: answer.bound_s)
            price = cpu.multipliers.per_byte
            gpu = self._best_price(mixes, price, 0)
            if gpu is None:
                break
            best = max(best, gpu, key=lambda answer: answer.bound_s)
            price = gpu.multipliers.per_byte
        return best

    def _best_price(
        self, mixes: tuple[float, float], others: tuple[float, float], device: int
    ) -> Bound | None:
        """The best price of a device's bytes beside the other's; None where nothing fits.

        For one price the relaxation is a multiple-choice knapsack: of each kind the convex hull of
        seconds over bytes, whose steepest steps are taken until the budget is spent. The price is
        the slope of the step that no longer fits.
        """
        start = Multipliers(
            per_byte=(0.0, others[1]) if device == 0 else (others[0], 0.0), mixes=mixes
        )
        left = float(self._budgets[device])
        steps: list[tuple[float, float, int, int]] = []
        columns: list[int] = []
        for kind, (count, menu) in enumerate(
            zip(self._problem.counts, self._problem.menus, strict=True)
        ):
            held = menu.bytes[device]
            hull = _hull(held, self._costs(start, menu))
            left -= count * float(held[hull[0][0]])
            columns.append(hull[0][0])
            for (old, old_s), (new, new_s) in pairwise(hull):
                size = float(held[new] - held[old])
                steps.append(((old_s - new_s) / size, count * size, kind, new))
        if left < 0.0:
            return None
        price = 0.0
        for slope, size, kind, new in sorted(steps, reverse=True):
            self.visited[kind].add(new)
            if size > left:
                price = slope
                break
            left -= size
            columns[kind] = new
        for kind, column in enumerate(columns):
            self.visited[kind].add(column)
        self.fitting.add(tuple(columns))
        per_byte = (price, others[1]) if device == 0 else (others[0], price)
        return self.ask(Multipliers(per_byte=per_byte, mixes=mixes))

    @staticmethod
    def _costs(multipliers: Multipliers, menu: Menu) -> Floats:
        """Seconds of each state, memory priced."""
        found: Floats = multipliers.weights.ravel() @ menu.loads_s.reshape(_NUM_LOADS, -1)
        return found + menu.move_s + np.array(multipliers.per_byte) @ menu.bytes

    def ask(self, multipliers: Multipliers) -> Bound:
        """Each kind's best state under these prices."""
        bound_s = self._problem.base_s - float(np.array(multipliers.per_byte) @ self._budgets)
        columns, held = [], np.zeros(2)
        for kind, menu in enumerate(self._problem.menus):
            costs = self._costs(multipliers, menu)
            column = int(costs.argmin())
            columns.append(column)
            self.visited[kind].add(column)
            bound_s += self._counts[kind] * float(costs[column])
            held += self._counts[kind] * menu.bytes[:, column]
        if (held <= self._budgets).all():
            self.fitting.add(tuple(columns))
        return Bound(bound_s=bound_s, columns=tuple(columns), bytes=held, multipliers=multipliers)


def _hull(held: Floats, seconds: Floats) -> list[tuple[int, float]]:
    """States on the lower convex hull of seconds over bytes, from the fewest bytes on."""
    order = np.lexsort((seconds, held))
    fastest = np.minimum.accumulate(seconds[order])
    is_faster = np.append(True, fastest[1:] < fastest[:-1])
    hull: list[tuple[int, float]] = []
    for state in order[is_faster].tolist():
        point_s, size = float(seconds[state]), held[state]
        while len(hull) > 1:
            (first, first_s), (second, second_s) = hull[-2:]
            # the middle one is above the line from the first to this one
            if (second_s - first_s) * (size - held[first]) < (point_s - first_s) * (
                held[second] - held[first]
            ):
                break
            hull.pop()
        if hull and held[hull[-1][0]] == size:
            hull.pop()
        hull.append((state, point_s))
    return hull


@dataclass(slots=True, kw_only=True)
class _Totals:
    """Sums over all layers. Mutable."""

    loads_s: Floats  # (3, 2)
    move_s: float
    bytes: Floats
    counts: list[dict[int, int]] = field(default_factory=list)


def allocate(
    problem: Problem, relaxation: Relaxation, budgets: tuple[float, float]
) -> Allocation | None:
    """Layers by state that fit, improved move by move until none gains; None: nothing fits.

    Begins with the best that the relaxation saw fit, or with the smallest states. A move gives one
    layer any state, or many one that the relaxation visited.
    """
    limit = np.array(budgets)
    fitting = [_totals(problem, columns) for columns in relaxation.fitting]
    fitting = [each for each in fitting if _over(each.bytes, limit) == 0]
    if fitting:
        totals = min(fitting, key=_total_s)
    else:
        totals = _smallest(problem, limit)
        while _over(totals.bytes, limit) > 0:
            move = _best_repair(problem, totals, limit)
            if move is None:
                return None
            _shift(problem, totals, *move)
    for _ in range(_MAX_MOVES):
        move = _best_move(problem, relaxation.visited, totals, limit)
        if move is None:
            break
        _shift(problem, totals, *move)
    return Allocation(
        counts=tuple(dict(each) for each in totals.counts),
        seconds=problem.base_s + _total_s(totals),
    )


def _total_s(totals: _Totals) -> float:
    return float(totals.loads_s.max(axis=0).sum()) + totals.move_s


def _over(held: Floats, limit: Floats) -> float:
    """Bytes over the limits."""
    return float(np.maximum(0.0, held - limit).sum())


def _smallest(problem: Problem, limit: Floats) -> _Totals:
    """All layers in states of little memory on one device or the other, nearest to the limits."""
    found = []
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        columns = [
            int((menu.bytes[0] * (1 - weight) + menu.bytes[1] * weight).argmin())
            for menu in problem.menus
        ]
        found.append(_totals(problem, columns))
    return min(found, key=lambda each: (_over(each.bytes, limit), _total_s(each)))


def _best_repair(
    problem: Problem, totals: _Totals, limit: Floats
) -> tuple[int, int, int, int] | None:
    """The move of fewest seconds that leaves the fewest bytes over the limits; None: none helps."""
    best, best_rank = None, (_over(totals.bytes, limit) * (1.0 - _ENOUGH), math.inf)
    for kind, menu in enumerate(problem.menus):
        for old, held in totals.counts[kind].items():
            for count in (*(step for step in _STEPS if step < held), held):
                moved = totals.bytes[:, None] + count * (menu.bytes - menu.bytes[:, [old]])
                over = np.maximum(0.0, moved - limit[:, None]).sum(axis=0)
                least = over.min()
                chain_s = menu.loads_s[0].sum(axis=0)
                new = int(np.where(over <= least, chain_s, np.inf).argmin())
                rank = (float(least), count * float(chain_s[new]))
                if rank < best_rank:
                    best, best_rank = (kind, old, new, count), rank
    return best


def _totals(problem: Problem, columns: Sequence[int]) -> _Totals:
    totals = _Totals(loads_s=np.zeros((3, 2)), move_s=0.0, bytes=np.zeros(2))
    for count, menu, column in zip(problem.counts, problem.menus, columns, strict=True):
        totals.loads_s += count * menu.loads_s[:, :, column]
        totals.move_s += count * float(menu.move_s[column])
        totals.bytes += count * menu.bytes[:, column]
        totals.counts.append({column: count})
    return totals


def _best_move(
    problem: Problem, visited: Sequence[set[int]], totals: _Totals, limit: Floats
) -> tuple[int, int, int, int] | None:
    """(kind, old state, new state, layers) of the move that gains most, or None."""
    best, best_s = None, _total_s(totals) * (1.0 - _ENOUGH)
    for kind, menu in enumerate(problem.menus):
        pool = np.array(sorted(visited[kind]), np.int64)
        for old, held in totals.counts[kind].items():
            for count in (*(step for step in _STEPS if step < held), held):
                states: NDArray[np.int64] | slice = slice(None) if count == 1 else pool
                loads_s = totals.loads_s[:, :, None] + count * (
                    menu.loads_s[:, :, states] - menu.loads_s[:, :, [old]]
                )
                move_s = totals.move_s + count * (menu.move_s[states] - menu.move_s[old])
                held_bytes = totals.bytes[:, None] + count * (
                    menu.bytes[:, states] - menu.bytes[:, [old]]
                )
                seconds = loads_s.max(axis=0).sum(axis=0) + move_s
                seconds[(held_bytes > limit[:, None]).any(axis=0)] = np.inf
                at = int(seconds.argmin()) if len(seconds) else 0
                if len(seconds) and seconds[at] < best_s:
                    new = at if count == 1 else int(pool[at])
                    best, best_s = (kind, old, new, count), float(seconds[at])
    return best


def _shift(problem: Problem, totals: _Totals, kind: int, old: int, new: int, count: int) -> None:
    """Give some layers another state."""
    menu, counts = problem.menus[kind], totals.counts[kind]
    totals.loads_s += count * (menu.loads_s[:, :, new] - menu.loads_s[:, :, old])
    totals.move_s += count * float(menu.move_s[new] - menu.move_s[old])
    totals.bytes += count * (menu.bytes[:, new] - menu.bytes[:, old])
    counts[old] -= count
    if not counts[old]:
        del counts[old]
    counts[new] = counts.get(new, 0) + count

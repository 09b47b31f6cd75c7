"""Which state each layer takes, so that all fit: a proven bound, and states that come near it."""

# K kinds of layers, each with a menu of S states; two phases p, two devices d

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from planner.layer_menu import LOADS, Floats, Menu
from planner.workload import PHASES

_NUM_LOADS = len(LOADS) * len(PHASES)
_MAX_PIVOTS = 400
# What the bound may be below the linear relaxation, as a share, and what is rounding.
_PRECISE = 2e-4
_ROUNDING = 1e-9
# What a budget's worth of bytes over the limit costs, in the seconds of the first states: at first,
# and how often so much more where bytes are over nevertheless.
_OVER_BUDGET = 100.0
_MAX_RISES = 3
_MAX_MOVES = 64
_NUM_CHEAPEST = 40
_NUM_PAIRED = 80
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

    def costs(self, kind: int, multipliers: Multipliers) -> Floats:
        """Seconds of each state of a kind, memory priced."""
        menu = self.menus[kind]
        found: Floats = multipliers.mixes.ravel() @ menu.loads_s.reshape(_NUM_LOADS, -1)
        return found + menu.move_s + np.array(multipliers.per_byte) @ menu.bytes


# Of each kind, how many layers are in each column of its menu.
Counts = tuple[dict[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Layers by kind and state, and the seconds that their sums promise."""

    counts: Counts
    seconds: float
    bytes: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Multipliers:
    """Seconds that a byte of each device costs; how much each load counts in each phase.

    `mixes` are (4, 2); those of a phase add up to 1.
    """

    per_byte: tuple[float, float]
    mixes: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A lower bound, the prices that prove it, and of each kind the share of layers by column."""

    bound_s: float
    multipliers: Multipliers
    shares: tuple[dict[int, float], ...]


class Relaxation:
    """The problem in which layers may be divided between states: a linear program.

    Seconds of a phase are at least each of its loads, added up over layers, and memory is within
    budgets. Prices of both (mixes of loads, seconds for bytes over budget) give a lower bound: for
    fixed prices each layer picks its own best state, and what they add up to, less the price of the
    budgets, is no more than the seconds of any placement that fits (Lagrange). The simplex method
    finds the best prices: it knows a few columns of each menu, and asks for the best of all where
    those that it knows gain nothing.
    """

    def __init__(self, problem: Problem, budgets: tuple[float, float]) -> None:
        self._problem = problem
        self._budgets = np.array(budgets)
        self.visited: list[set[int]] = [set() for _ in problem.menus]

    def ask(self, multipliers: Multipliers) -> tuple[float, list[int]]:
        """The bound under some prices, and each kind's best state."""
        bound_s = self._problem.base_s - float(np.array(multipliers.per_byte) @ self._budgets)
        columns = []
        for kind, count in enumerate(self._problem.counts):
            costs = self._problem.costs(kind, multipliers)
            column = int(costs.argmin())
            columns.append(column)
            self.visited[kind].add(column)
            bound_s += count * float(costs[column])
        return bound_s, columns

    def solve(self, hint: Multipliers | None = None, stop_s: float = math.inf) -> Bound | None:
        """The best prices; None where nothing fits. Ends early with a bound above `stop_s`.

        Begins with the best states under the prices of a like problem.
        """
        if hint is None:
            mixes = np.zeros((len(LOADS), len(PHASES)))
            mixes[0] = 1.0
            hint = Multipliers(per_byte=(0.0, 0.0), mixes=mixes)
        multipliers = hint
        bound_s, columns = self.ask(hint)
        best = Bound(bound_s=bound_s, multipliers=hint, shares=())
        if bound_s >= stop_s:
            return best
        table, num_rises = _Simplex(self._problem, self._budgets, columns), 0
        for _ in range(_MAX_PIVOTS):
            if table.pivot():
                continue
            multipliers = table.multipliers()
            bound_s, columns = self.ask(multipliers)
            if bound_s > best.bound_s:
                best = Bound(bound_s=bound_s, multipliers=multipliers, shares=())
            if best.bound_s >= stop_s:
                break
            total_s = self._problem.base_s + table.seconds
            if best.bound_s < total_s * (1.0 - _PRECISE) and table.add(columns):
                continue
            if not table.is_over_budget or self._is_impossible(multipliers):
                break
            if num_rises == _MAX_RISES:
                break
            num_rises += 1
            table.raise_price()
        if best.bound_s < stop_s and table.is_over_budget and self._is_impossible(multipliers):
            return None
        return replace(best, shares=table.shares())

    def _is_impossible(self, multipliers: Multipliers) -> bool:
        """Do the least bytes cost more than the budgets, at these prices? Then nothing fits."""
        prices = np.array(multipliers.per_byte)
        least = sum(
            count * float((prices @ menu.bytes).min())
            for count, menu in zip(self._problem.counts, self._problem.menus, strict=True)
        )
        return least > float(prices @ self._budgets) * (1.0 + _ROUNDING) + _ROUNDING


class _Simplex:
    """A simplex tableau of the columns that are known. Mutable.

    Rows: loads (one of each phase and kind of load), budgets, and for each kind of layer the sum of
    its shares. Columns: seconds of each phase, what each load is below them, bytes that are free,
    bytes over budget, and then states. Seconds are in units of the first states', bytes in budgets.
    """

    def __init__(self, problem: Problem, budgets: Floats, columns: Sequence[int]) -> None:
        self._problem = problem
        self._bytes = np.maximum(1.0, np.abs(budgets))
        num_rows = _NUM_LOADS + 2 + len(problem.menus)
        loads_s, held = np.zeros((len(LOADS), len(PHASES))), np.zeros(2)
        for count, menu, column in zip(problem.counts, problem.menus, columns, strict=True):
            loads_s += count * menu.loads_s[:, :, column]
            held += count * menu.bytes[:, column]
        self._unit_s = max(float(np.max(loads_s, axis=0).sum()), 1e-12)
        self._matrix = np.zeros((num_rows, 64))
        self._costs = np.zeros(64)
        self._states: list[tuple[int, int]] = []
        for phase in range(2):
            self._matrix[phase:_NUM_LOADS:2, phase] = 1.0
            self._costs[phase] = 1.0
        self._matrix[:_NUM_LOADS, 2 : 2 + _NUM_LOADS] = -np.eye(_NUM_LOADS)
        self._free = 2 + _NUM_LOADS
        for row in range(2):
            self._matrix[_NUM_LOADS + row, self._free + row] = 1.0
            self._matrix[_NUM_LOADS + row, self._free + 2 + row] = -1.0
            self._costs[self._free + 2 + row] = _OVER_BUDGET
        self._first_state = self._num = self._free + 4
        right = np.zeros(num_rows)
        right[_NUM_LOADS : _NUM_LOADS + 2] = budgets / self._bytes
        right[_NUM_LOADS + 2 :] = 1.0
        self.add(columns)
        basis = []
        for row in range(_NUM_LOADS):
            load, phase = divmod(row, 2)
            is_largest = load == int(np.argmax(loads_s[:, phase]))
            basis.append(phase if is_largest else 2 + row)
        for row in range(2):
            basis.append(self._free + row + (2 if held[row] > budgets[row] else 0))
        basis += range(self._first_state, self._num)
        self._basis = basis
        self._inverse = np.linalg.inv(self._matrix[:, basis])
        self._values = self._inverse @ right

    def add(self, columns: Sequence[int]) -> bool:
        """Add a state of each kind; is any of them new?"""
        is_new = False
        for kind, (count, menu, column) in enumerate(
            zip(self._problem.counts, self._problem.menus, columns, strict=True)
        ):
            if (kind, column) in self._states:
                continue
            is_new = True
            self._states.append((kind, column))
            if self._num == len(self._costs):
                self._matrix = np.hstack([self._matrix, np.zeros_like(self._matrix)])
                self._costs = np.append(self._costs, np.zeros_like(self._costs))
            self._matrix[:_NUM_LOADS, self._num] = (
                -count / self._unit_s * menu.loads_s[:, :, column].ravel()
            )
            self._matrix[_NUM_LOADS : _NUM_LOADS + 2, self._num] = (
                count * menu.bytes[:, column] / self._bytes
            )
            self._matrix[_NUM_LOADS + 2 + kind, self._num] = 1.0
            self._costs[self._num] = count / self._unit_s * menu.move_s[column]
            self._num += 1
        return is_new

    def pivot(self) -> bool:
        """Bring the column that gains most a unit into the basis; False where none gains."""
        prices = self._costs[self._basis] @ self._inverse
        reduced = self._costs[: self._num] - prices @ self._matrix[:, : self._num]
        entering = int(reduced.argmin())
        if reduced[entering] > -_ROUNDING:
            return False
        rates = self._inverse @ self._matrix[:, entering]
        is_falling = rates > _ROUNDING
        if not is_falling.any():
            return False
        ratios = np.where(is_falling, self._values, np.inf) / np.where(is_falling, rates, 1.0)
        leaving = int(ratios.argmin())
        step = max(0.0, float(ratios[leaving]))
        self._values -= step * rates
        self._values[leaving] = step
        row = self._inverse[leaving] / rates[leaving]
        self._inverse -= np.outer(rates, row)
        self._inverse[leaving] = row
        self._basis[leaving] = entering
        return True

    def raise_price(self) -> None:
        """Let bytes over budget cost more."""
        self._costs[self._free + 2 : self._free + 4] *= _OVER_BUDGET

    def multipliers(self) -> Multipliers:
        """The prices of its rows."""
        prices = self._costs[self._basis] @ self._inverse
        mixes = np.maximum(0.0, prices[:_NUM_LOADS].reshape(len(LOADS), len(PHASES)))
        of_budgets = -prices[_NUM_LOADS : _NUM_LOADS + 2]
        per_byte = np.maximum(0.0, of_budgets) * self._unit_s / self._bytes
        return Multipliers(
            per_byte=(float(per_byte[0]), float(per_byte[1])), mixes=mixes / mixes.sum(axis=0)
        )

    @property
    def seconds(self) -> float:
        return float(self._costs[self._basis] @ self._values) * self._unit_s

    @property
    def is_over_budget(self) -> bool:
        over = range(self._free + 2, self._free + 4)
        return any(
            column in over and value > 1e-6
            for column, value in zip(self._basis, self._values, strict=True)
        )

    def shares(self) -> tuple[dict[int, float], ...]:
        """Of each kind, the share of its layers in each state."""
        found: tuple[dict[int, float], ...] = tuple({} for _ in self._problem.menus)
        for index, value in zip(self._basis, self._values.tolist(), strict=True):
            if index >= self._first_state and value > _ROUNDING:
                kind, column = self._states[index - self._first_state]
                found[kind][column] = value
        return found


@dataclass(slots=True, kw_only=True)
class _Totals:
    """Sums over all layers. Mutable."""

    loads_s: Floats  # (4, 2)
    move_s: float
    bytes: Floats
    counts: list[dict[int, int]] = field(default_factory=list)


def allocate(
    problem: Problem, relaxation: Relaxation, bound: Bound, budgets: tuple[float, float]
) -> Allocation | None:
    """Layers by state that fit, improved move by move until none gains; None: nothing fits.

    Begins with the shares of the relaxation, rounded. A move gives layers of one state another, of
    those that the relaxation visited or that cost least at its prices.
    """
    limit = np.array(budgets)
    pools = [
        np.union1d(
            np.argsort(problem.costs(kind, bound.multipliers), kind="stable")[:_NUM_CHEAPEST],
            sorted(visited),
        ).astype(np.int64)
        for kind, visited in enumerate(relaxation.visited)
    ]
    totals = _rounded(problem, bound.shares)
    while _over(totals.bytes, limit) > 0:
        move = _best_repair(problem, totals, limit)
        if move is None:
            return None
        _shift(problem, totals, *move)
    for _ in range(_MAX_MOVES):
        moves = _Moves(problem, pools, totals, limit)
        picked = moves.best() or moves.best_pair(bound.multipliers)
        for index in picked:
            _shift(problem, totals, *moves.moves[index])
        if not picked:
            break
    return Allocation(
        counts=tuple(dict(each) for each in totals.counts),
        seconds=problem.base_s + _total_s(totals),
        bytes=totals.bytes,
    )


def _rounded(problem: Problem, shares: Sequence[dict[int, float]]) -> _Totals:
    """Whole layers nearest to the shares of each kind."""
    totals = _Totals(
        loads_s=np.zeros((len(LOADS), len(PHASES))),
        move_s=0.0,
        bytes=np.zeros(2),
    )
    for count, menu, share in zip(problem.counts, problem.menus, shares, strict=True):
        exact = {column: count * part / sum(share.values()) for column, part in share.items()}
        whole = {column: math.floor(part + _ENOUGH) for column, part in exact.items()}
        by_rest = sorted(exact, key=lambda column: whole[column] - exact[column])
        for column in by_rest[: count - sum(whole.values())]:
            whole[column] += 1
        totals.counts.append({column: held for column, held in whole.items() if held})
        for column, held in totals.counts[-1].items():
            totals.loads_s += held * menu.loads_s[:, :, column]
            totals.move_s += held * float(menu.move_s[column])
            totals.bytes += held * menu.bytes[:, column]
    return totals


def _total_s(totals: _Totals) -> float:
    return float(totals.loads_s.max(axis=0).sum()) + totals.move_s


def _over(held: Floats, limit: Floats) -> float:
    """Bytes over the limits."""
    return float(np.maximum(0.0, held - limit).sum())


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


class _Moves:
    """All moves of layers of one state to another, and what each changes."""

    def __init__(
        self,
        problem: Problem,
        pools: Sequence[NDArray[np.int64]],
        totals: _Totals,
        limit: Floats,
    ) -> None:
        self._totals, self._limit = totals, limit
        # (kind, old state, new state, layers)
        self.moves: list[tuple[int, int, int, int]] = []
        loads_s, moves_s, held = list[Floats](), list[Floats](), list[Floats]()
        for kind, (menu, pool) in enumerate(zip(problem.menus, pools, strict=True)):
            pairs = [
                (old, count)
                for old, held_count in totals.counts[kind].items()
                for count in (*(step for step in _STEPS if step < held_count), held_count)
            ]
            states = pool.tolist()
            self.moves += [(kind, old, new, count) for old, count in pairs for new in states]
            olds, counts = (np.array(each)[:, None] for each in zip(*pairs, strict=True))
            changed_s = menu.loads_s[:, :, pool][:, :, None, :] - menu.loads_s[:, :, olds]
            loads_s.append((counts * changed_s).reshape(len(LOADS), len(PHASES), -1))
            moves_s.append((counts * (menu.move_s[pool] - menu.move_s[olds])).ravel())
            changed = menu.bytes[:, pool][:, None, :] - menu.bytes[:, olds]
            held.append((counts * changed).reshape(2, -1))
        self._loads_s = np.concatenate(loads_s, axis=2)
        self._moves_s = np.concatenate(moves_s)
        self._bytes = np.concatenate(held, axis=1)

    def best(self) -> list[int]:
        """The move that gains most; none where none gains."""
        seconds = self._seconds(self._loads_s, self._moves_s, self._bytes)
        index = int(seconds.argmin())
        return [index] if self._gains(seconds[index]) else []

    def best_pair(self, multipliers: Multipliers) -> list[int]:
        """The same of two moves, of those that are worth most at some prices."""
        priced = np.tensordot(multipliers.mixes, self._loads_s) + self._moves_s
        priced += np.array(multipliers.per_byte) @ self._bytes
        near = np.argsort(priced, kind="stable")[:_NUM_PAIRED]
        one, other = (near[each] for each in np.triu_indices(len(near), 1))
        seconds = self._seconds(
            self._loads_s[:, :, one] + self._loads_s[:, :, other],
            self._moves_s[one] + self._moves_s[other],
            self._bytes[:, one] + self._bytes[:, other],
        )
        for at in np.argsort(seconds, kind="stable").tolist():
            if not self._gains(seconds[at]):
                break
            pair = [int(one[at]), int(other[at])]
            if self._are_possible(pair):
                return pair
        return []

    def _are_possible(self, pair: Sequence[int]) -> bool:
        """Are there layers enough for both?"""
        (kind, old, _, count), (other_kind, other_old, _, other_count) = (
            self.moves[index] for index in pair
        )
        if (kind, old) != (other_kind, other_old):
            return True
        return count + other_count <= self._totals.counts[kind][old]

    def _gains(self, seconds: float) -> bool:
        return seconds < _total_s(self._totals) * (1.0 - _ENOUGH)

    def _seconds(self, loads_s: Floats, moves_s: Floats, held: Floats) -> Floats:
        """After changes; infinite where it would not fit."""
        totals = self._totals
        found: Floats = (totals.loads_s[:, :, None] + loads_s).max(axis=0).sum(axis=0)
        found = found + totals.move_s + moves_s
        found[(totals.bytes[:, None] + held > self._limit[:, None]).any(axis=0)] = np.inf
        return found


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

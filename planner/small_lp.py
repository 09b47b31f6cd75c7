"""A linear programme of a few variables whose costs are not negative, solved without rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction


def minimize(
    costs: Sequence[float], rows: Sequence[Sequence[float]], limits: Sequence[float]
) -> tuple[float, ...] | None:
    """The x >= 0 of least costs . x with every row . x <= its limit; None where there is none.

    The dual simplex method: as no cost is negative, x = 0 is as cheap as can be, and each step
    mends a row that it breaks at the least extra cost. Of several choices the first variable is
    taken (Bland's rule), so that it ends. In whole numbers, as floats are fractions: seconds beside
    bytes would need care with rounding, and there is none.

    Parameters
    ----------
    costs : sequence of N float
        Not negative.
    rows : M sequences of N float
    limits : sequence of M float

    Examples
    --------
    >>> minimize([1.0, 2.0], [[-1.0, -1.0], [1.0, 0.0]], [-5.0, 3.0])  # x + y >= 5, x <= 3
    (3.0, 2.0)
    >>> minimize([1.0], [[-1.0], [1.0]], [-2.0, 1.0]) is None  # x >= 2, x <= 1
    True
    """
    assert all(cost >= 0 for cost in costs), "x = 0 must be the cheapest"
    num_vars = len(costs)
    # The last row has the costs, the last column the limits; all are over one denominator.
    table = [_whole((*row, limit)) for row, limit in zip(rows, limits, strict=True)]
    table.append(_whole((*costs, 0.0)))
    prices, denominator = table[-1], 1
    # Variables 0 .. N - 1 are x, N + i is the slack of row i; each row states one of them.
    stated = [num_vars + index for index in range(len(rows))]
    free = list(range(num_vars))
    while broken := [index for index in range(len(rows)) if table[index][-1] < 0]:
        row_index = min(broken, key=lambda index: stated[index])
        row = table[row_index]
        costs_of = {
            column: (Fraction(prices[column], -row[column]), free[column])
            for column in range(num_vars)
            if row[column] < 0
        }
        if not costs_of:
            return None
        column = min(costs_of, key=costs_of.__getitem__)
        denominator = _exchange(table, row_index, column, denominator)
        stated[row_index], free[column] = free[column], stated[row_index]
    values = [0.0] * num_vars
    for index, variable in enumerate(stated):
        if variable < num_vars:
            values[variable] = float(Fraction(table[index][-1], denominator))
    return tuple(values)


def _whole(numbers: Iterable[float]) -> list[int]:
    """The numbers times the least number that makes all of them whole."""
    fractions = [Fraction(each) for each in numbers]
    factor = math.lcm(*(each.denominator for each in fractions))
    return [int(each * factor) for each in fractions]


def _exchange(table: list[list[int]], row_index: int, column: int, denominator: int) -> int:
    """Solve a row for a column's variable, put that in everywhere, and give the new denominator.

    Every division by the old one leaves no remainder (Edmonds, Bareiss); the new one is positive.
    """
    row = table[row_index]
    pivot = row[column]
    assert pivot < 0
    for other in table:
        factor = other[column]
        if other is not row:
            for index, solved in enumerate(row):
                other[index] = (factor * solved - other[index] * pivot) // denominator
            other[column] = factor
    row[:] = [-each for each in row]
    row[column] = -denominator
    return -pivot

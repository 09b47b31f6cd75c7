"""Small linear programmes against an exact solver."""

from __future__ import annotations

import highspy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.small_lp import minimize


@st.composite
def programmes(draw: st.DrawFn) -> tuple[list[float], list[list[float]], list[float]]:
    """Up to six variables and ten rows of small whole numbers, many of them degenerate."""
    num_vars = draw(st.integers(1, 6))
    numbers = st.integers(-5, 5).map(float)
    costs = draw(st.lists(st.integers(0, 5).map(float), min_size=num_vars, max_size=num_vars))
    row = st.lists(numbers, min_size=num_vars, max_size=num_vars)
    rows = draw(st.lists(row, max_size=10))
    limits = draw(st.lists(st.integers(-9, 9).map(float), min_size=len(rows), max_size=len(rows)))
    return costs, rows, limits


def exact_cost(costs: list[float], rows: list[list[float]], limits: list[float]) -> float | None:
    """The least cost by HiGHS; None where nothing satisfies the rows."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    xs = [solver.addVariable(lb=0.0) for _ in costs]
    for row, limit in zip(rows, limits, strict=True):
        if any(row):
            solver.addConstr(sum(a * x for a, x in zip(row, xs, strict=True)) <= limit)
        elif limit < 0:
            return None
    solver.minimize(sum(cost * x for cost, x in zip(costs, xs, strict=True)))
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    return float(solver.getObjectiveValue())


@given(programmes())
def test_the_least_cost_is_an_exact_solvers(
    programme: tuple[list[float], list[list[float]], list[float]],
) -> None:
    """And the answer keeps every row; none is found where none is."""
    costs, rows, limits = programme
    found, expected = minimize(costs, rows, limits), exact_cost(costs, rows, limits)
    if found is None or expected is None:
        assert found is None and expected is None
        return
    assert sum(c * x for c, x in zip(costs, found, strict=True)) == pytest.approx(
        expected, abs=1e-6
    )
    assert all(x >= 0 for x in found)
    for row, limit in zip(rows, limits, strict=True):
        assert sum(a * x for a, x in zip(row, found, strict=True)) <= limit + 1e-6


def test_rows_that_x_zero_keeps_need_nothing() -> None:
    assert minimize([1.0, 0.0], [[1.0, 1.0]], [3.0]) == (0.0, 0.0)
    assert minimize([1.0], [], []) == (0.0,)

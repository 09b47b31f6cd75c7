"""Which of a step's missed experts are copied: against all subsets, and FreeToken's share."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.split_rules import (
    expected_fetched,
    link_share,
    num_fetched,
    num_fetched_of_share,
)

# Whole seconds and rates: sums are exact, and equals are equal.
seconds = st.integers(0, 40)


def step_s(cpu_s: list[int], fetched: tuple[int, ...], fetch_s: int) -> int:
    """The later of the copies and of the experts that the CPU keeps."""
    kept = sum(each for index, each in enumerate(cpu_s) if index not in fetched)
    return max(len(fetched) * fetch_s, kept)


@given(st.lists(seconds, max_size=10), seconds, st.integers(0, 10))
def test_no_subset_of_the_experts_is_faster(
    cpu_s: list[int], fetch_s: int, max_fetched: int
) -> None:
    """All 2^m sets of at most 10 experts that the GPU has room for; of equal sizes the smallest."""
    cpu_s = sorted(cpu_s, reverse=True)
    found = num_fetched(cpu_s, fetch_s, max_fetched)
    sizes = range(min(len(cpu_s), max_fetched) + 1)
    by_size = [
        min(step_s(cpu_s, chosen, fetch_s) for chosen in combinations(range(len(cpu_s)), size))
        for size in sizes
    ]
    assert step_s(cpu_s, tuple(range(found)), fetch_s) == min(by_size)
    assert found == by_size.index(min(by_size))


@given(st.integers(0, 30), st.integers(1, 60), st.integers(1, 60))
def test_freetokens_share_is_the_same_rule_where_experts_are_equal(
    num_missed: int, link_rate: int, cpu_rate: int
) -> None:
    """Rates in experts a second; where two numbers end together either may be named."""
    by_share = num_fetched_of_share(num_missed, link_share(link_rate, cpu_rate))
    by_seconds = num_fetched([1 / cpu_rate] * num_missed, 1 / link_rate, num_missed)

    def end_s(count: int) -> Fraction:
        return max(Fraction(count, link_rate), Fraction(num_missed - count, cpu_rate))

    assert end_s(by_share) == min(end_s(count) for count in range(num_missed + 1))
    assert by_share == by_seconds or end_s(by_share) == end_s(by_seconds)


def test_a_share_by_hand() -> None:
    """20 GB/s beside 60: a quarter; of 6 missed 1.5, and one copy of 3 ends before two of 6."""
    assert link_share(20e9, 60e9) == 0.25
    assert num_fetched_of_share(8, 0.25) == 2
    assert num_fetched_of_share(6, 0.25) == 1  # 3 against 5; two: 6 against 4
    assert num_fetched_of_share(7, 0.25) == 1  # 3 against 6; two: 6 against 5, as late
    assert num_fetched_of_share(0, 0.25) == 0


@given(st.integers(0, 12), st.integers(1, 20), st.integers(1, 20), st.integers(0, 12))
def test_a_whole_number_of_missed_experts_is_no_average(
    num_missed: int, cpu_s: int, fetch_s: int, max_fetched: int
) -> None:
    """And half between two numbers is the mean of theirs."""
    whole = [
        num_fetched([cpu_s] * count, fetch_s, max_fetched) for count in (num_missed, num_missed + 1)
    ]
    assert expected_fetched(num_missed, cpu_s, fetch_s, max_fetched) == whole[0]
    between = expected_fetched(num_missed + 0.5, cpu_s, fetch_s, max_fetched)
    assert between == pytest.approx(sum(whole) / 2)

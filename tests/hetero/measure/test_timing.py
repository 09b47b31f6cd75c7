"""Timing: what a median and a spread are of, and that nothing stays changed."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero.measure.timing import Timing, median_seconds, timed, torch_threads

CPU = torch.device("cpu")


def test_thread_count_is_put_back() -> None:
    """Also when the block raises."""
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_first_call_is_not_timed() -> None:
    """One warm-up and three timed calls."""
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(1), device=CPU, budget_s=0.0) >= 0
    assert len(calls) == 4


def test_a_call_is_repeated_at_least_so_often() -> None:
    calls: list[int] = []
    timed(lambda: calls.append(1), device=CPU, budget_s=0.0, min_calls=7)
    assert len(calls) == 8


def test_spread_is_the_middle_eighty_percent_as_a_share_of_the_median() -> None:
    """0 to 10 s: the median is 5, the tenths are 1 and 9; a sample was two calls long."""
    found = Timing.of([float(second) for second in range(11)], num_calls=2)
    assert found == Timing(seconds=2.5, spread=(9 - 1) / 5)


def test_a_single_sample_has_no_spread() -> None:
    assert Timing.of([0.25]) == Timing(seconds=0.25, spread=0.0)


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=30), st.floats(1e-3, 1e3))
def test_spread_does_not_depend_on_the_unit(samples: list[float], factor: float) -> None:
    """The median is the statistics module's; one outlier among many does not widen the spread."""
    found = Timing.of(samples)
    assert found.seconds == statistics.median(samples)
    scaled = Timing.of([factor * each for each in samples])
    assert scaled.spread == pytest.approx(found.spread, rel=1e-6, abs=1e-9)

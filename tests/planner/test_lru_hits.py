"""Hit rates of slots that keep what was used last: by hand, and against drawn choices."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.lru_hits import lru_hit_rates
from planner.popularity import Popularity
from planner.routing import Lru

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
uses = st.lists(st.floats(0.001, 1.0), min_size=2, max_size=24)


def test_two_experts_by_hand() -> None:
    """With rates of l and 2 l and one slot: (1 - x) + (1 - x^2) = 1, so x = (5^0.5 - 1) / 2."""
    rate = 0.5  # of which 1 - e^-0.5 and 1 - e^-1 are the probabilities of a use
    x = (5**0.5 - 1) / 2
    found = lru_hit_rates([1 - 2.718281828459045 ** (-n * rate) for n in (1, 2)], 1)
    assert found == pytest.approx((1 - x, 1 - x * x))


@PROPERTY
@given(uses, st.data())
def test_probabilities_add_up_to_the_slots_and_follow_the_uses(
    each: list[float], data: st.DataObject
) -> None:
    num_slots = data.draw(st.integers(0, len(each) - 1))
    held = lru_hit_rates(each, num_slots)

    assert sum(held) == pytest.approx(num_slots)
    assert all(-1e-9 <= one <= 1 + 1e-9 for one in held)
    ordered = [one for _, one in sorted(zip(each, held, strict=True))]
    assert ordered == pytest.approx(sorted(ordered))


def test_experts_that_are_never_used_hold_no_slot() -> None:
    assert lru_hit_rates([0.0, 0.3, 0.0, 0.6], 3) == (0.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize("num_slots", [2, 4, 8, 12])
def test_they_are_those_of_lru_with_independent_choices(num_slots: int) -> None:
    """16 experts, the r-th most popular chosen in proportion to r^-0.6, 4000 steps drawn."""
    (row,) = Popularity.usual(16, 4).probabilities
    rng, lru, held = random.Random(3), Lru(), list(range(num_slots))
    hits = num_uses = 0
    for _ in range(4000):
        chosen = [expert for expert, p in enumerate(row) if rng.random() < p]
        rng.shuffle(chosen)
        missed = [expert for expert in chosen if expert not in held]
        hits, num_uses = hits + len(chosen) - len(missed), num_uses + len(chosen)
        for expert in chosen:
            lru.on_access(0, expert, is_hit=expert in held)
        for victim, expert in zip(
            lru.victims(0, held, len(missed), kept=chosen), missed, strict=False
        ):
            held[held.index(victim)] = expert

    distinct, share = Popularity.usual(16, 4).lru_load(0, 1, num_slots)
    assert distinct / 4 == pytest.approx(hits / num_uses, abs=0.03)
    assert share == pytest.approx(hits / num_uses, abs=0.03)


@PROPERTY
@given(uses, st.data())
def test_the_most_popular_are_hit_more_often_where_they_are_known(
    row: list[float], data: st.DataObject
) -> None:
    """Independent choices have nothing to learn but who is popular."""
    num_slots = data.draw(st.integers(1, len(row) - 1))
    known = Popularity(probabilities=(tuple(row),))

    _, static = known.resident_load(0, 1, num_slots)
    _, lru = known.lru_load(0, 1, num_slots)
    assert lru <= static + 1e-9

"""How many different experts tokens choose, against choices drawn and choices recorded."""

from __future__ import annotations

import lzma
import random
from pathlib import Path

import numpy as np
import pytest

from planner.errors import PlannerError
from planner.popularity import Popularity, independent_tokens

DATA = Path(__file__).parents[3] / "shared" / "data"


def test_even_choices_by_hand() -> None:
    """8 (1 - (3/4)^T): one token chooses exactly two, many choose all."""
    even = Popularity.even(8, 2)
    assert even.distinct_experts(0, 1) == pytest.approx(2)
    assert even.distinct_experts(0, 2) == pytest.approx(8 * (1 - 0.75**2))
    assert even.distinct_experts(0, 1000) == pytest.approx(8)


def test_usual_popularities_are_probabilities_that_add_up_to_the_choices() -> None:
    for num_experts in (1, 2, 4, 8, 60, 512):
        for chosen in {1, 2, num_experts // 2 or 1, num_experts}:
            if chosen > num_experts:
                continue
            (row,) = Popularity.usual(num_experts, chosen).probabilities
            assert all(0 < each <= 1 for each in row) and len(row) == num_experts
            assert sum(row) == pytest.approx(chosen)
            assert list(row) == sorted(row, reverse=True)


def test_expected_numbers_are_those_of_drawn_choices() -> None:
    """Experts that are chosen independently with their popularity, 4000 draws of 5 tokens."""
    popularity = Popularity.usual(6, 2)
    rng, (row,) = random.Random(0), popularity.probabilities
    draws = [sum(any(rng.random() < each for _ in range(5)) for each in row) for _ in range(4000)]
    assert popularity.distinct_experts(0, 5) == pytest.approx(np.mean(draws), rel=0.01)


def test_counts_that_no_tokens_can_have_are_refused() -> None:
    with pytest.raises(PlannerError, match="expert 1 of layer 0 was chosen 5 times by 4 tokens"):
        Popularity.from_counts([[1, 5]], 4)
    with pytest.raises(PlannerError, match="at least 1"):
        Popularity.from_counts([[0]], 0)


@pytest.mark.parametrize("name", ["routing_gptoss20b", "routing_dsv2lite"])
def test_the_usual_popularity_is_nearer_to_recorded_choices_than_even_ones(name: str) -> None:
    """Tokens of different texts, and tokens in a row as half as many: on the mean."""
    path = DATA / name / "experts.npy.xz"
    if not path.exists():
        pytest.skip("recorded choices of experts are not beside this checkout")
    with lzma.open(path) as file:
        choices = np.load(file)
    num_tokens, num_layers, chosen = choices.shape
    num_experts = int(choices.max()) + 1
    usual, even = Popularity.usual(num_experts, chosen), Popularity.even(num_experts, chosen)
    rng = np.random.default_rng(0)
    errors: dict[str, list[float]] = {"usual": [], "even": []}
    for count in (8, 32):
        apart, in_a_row = [], []
        for _ in range(300):
            layer, start = rng.integers(num_layers), rng.integers(num_tokens - count)
            apart.append(len(np.unique(choices[rng.integers(0, num_tokens, count), layer])))
            in_a_row.append(len(np.unique(choices[start : start + count, layer])))
        for seen, tokens in (
            (np.mean(apart), independent_tokens(count, count)),
            (np.mean(in_a_row), independent_tokens(count, 1)),
        ):
            errors["usual"].append(float(abs(usual.distinct_experts(0, tokens) / seen - 1)))
            errors["even"].append(float(abs(even.distinct_experts(0, count) / seen - 1)))
    assert np.mean(errors["usual"]) < 0.75 * np.mean(errors["even"])

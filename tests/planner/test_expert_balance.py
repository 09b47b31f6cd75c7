"""APTMoE's balance of CPU and link: its published table, and every subset of small layers."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.expert_balance import (
    ExpertTimes,
    layer_s,
    load_ratio,
    num_on_cpu,
    num_on_cpu_by_ratio,
    popularity_skew,
)

# APTMoE's table "S" (hidden 1024, width 4096, FP32; Xeon 6348 and A800), milliseconds.
LOAD_EXPERT_MS = 3.202
LOAD_ATTENTION_MS = 1.690
LOAD_GATE_MS = 0.0484
CPU_MS = {1: 0.197, 8: 0.276, 44: 0.65}


def published_cpu_ms(num_tokens: float) -> float:
    """The table between its points, and on with its last slope."""
    (low, low_ms), (high, high_ms) = (
        ((1, CPU_MS[1]), (8, CPU_MS[8])) if num_tokens < 8 else ((8, CPU_MS[8]), (44, CPU_MS[44]))
    )
    return low_ms + (num_tokens - low) * (high_ms - low_ms) / (high - low)


def published(tokens: list[int]) -> ExpertTimes:
    """A layer whose experts so many tokens chose, ascending; what the GPU takes is not said."""
    return ExpertTimes(
        cpu_s=tuple(published_cpu_ms(count) / 1e3 for count in tokens),
        gpu_s=(0.0,) * len(tokens),
        load_s=LOAD_EXPERT_MS / 1e3,
        first_load_s=(LOAD_ATTENTION_MS + LOAD_GATE_MS) / 1e3,
    )


def all_subsets_s(times: ExpertTimes) -> float:
    """The soonest end over every set of experts on the CPU."""
    indices = range(len(times.cpu_s))
    return min(
        layer_s(times, chosen)
        for size in range(len(times.cpu_s) + 1)
        for chosen in combinations(indices, size)
    )


@st.composite
def layers(draw: st.DrawFn, max_experts: int = 9) -> ExpertTimes:
    """By tokens, ascending; a product on the GPU never takes longer than a load. Whole seconds."""
    tokens = sorted(draw(st.lists(st.integers(0, 30), max_size=max_experts)))
    cpu_s, gpu_s = draw(st.tuples(st.integers(1, 4), st.integers(0, 2)))
    longest = gpu_s * max(tokens, default=0)
    return ExpertTimes(
        cpu_s=tuple(float(cpu_s * count) for count in tokens),
        gpu_s=tuple(float(gpu_s * count) for count in tokens),
        load_s=float(draw(st.integers(max(1, longest), max(1, longest) + 40))),
        first_load_s=float(draw(st.integers(0, 40))),
    )


def test_the_published_loads_are_those_of_their_bytes() -> None:
    """Two matrices of 1024 x 4096 in FP32 are 33.5 MB, at 10.5 GB/s."""
    num_bytes = 2 * 1024 * 4096 * 4
    assert num_bytes == 33_554_432
    assert num_bytes / (LOAD_EXPERT_MS / 1e3) == pytest.approx(10.5e9, rel=0.01)


def test_the_cpu_wins_an_expert_while_it_takes_less_than_its_load() -> None:
    """3.2 ms: by the table's last slope up to 289 tokens; nothing else is to be loaded."""
    for tokens, kept in ((1, 1), (8, 1), (44, 1), (289, 1), (290, 0), (1000, 0)):
        cpu_ms = published_cpu_ms(tokens)
        times = ExpertTimes(cpu_s=(cpu_ms,), gpu_s=(0.0,), load_s=LOAD_EXPERT_MS)
        assert (cpu_ms < LOAD_EXPERT_MS) == bool(kept)
        assert num_on_cpu(times) == kept, tokens


def test_the_published_layer_by_hand() -> None:
    """Eight experts of 44 tokens: 7 on the CPU are 4.55 ms beside 1.738 + 3.202 of loads.

    R is 0.92 there and reaches 1 with all 8, which end at 5.2 ms instead of 4.94.
    """
    times = published([44] * 8)
    assert load_ratio(times, 7) == pytest.approx(4.55 / 4.9404)
    assert load_ratio(times, 8) == pytest.approx(5.2 / 1.7384)
    assert num_on_cpu_by_ratio(times) == 8
    assert num_on_cpu(times) == 7
    assert layer_s(times, range(8)) == pytest.approx(5.2e-3)
    assert layer_s(times, range(7)) == pytest.approx(4.9404e-3)


def test_of_equals_the_cpu_keeps_more() -> None:
    """2 s on either side, or one expert loaded in 2 s beside 1 s."""
    times = ExpertTimes(cpu_s=(1.0, 1.0), gpu_s=(0.0, 0.0), load_s=2.0)
    assert layer_s(times, [0, 1]) == layer_s(times, [0]) == 2.0
    assert num_on_cpu(times) == 2


def test_a_popular_expert_is_loaded_and_the_others_are_not() -> None:
    """1000 tokens are 10.6 ms on the CPU; the seven others have 2 ms beside its load."""
    times = published([8] * 7 + [1000])
    assert num_on_cpu(times) == num_on_cpu_by_ratio(times) - 1 == 7
    assert layer_s(times, range(7)) == pytest.approx(4.9404e-3)


@given(layers())
def test_the_ratio_rises_with_every_expert_and_stops_where_it_reaches_one(
    times: ExpertTimes,
) -> None:
    ratios = [load_ratio(times, count) for count in range(len(times.cpu_s) + 1)]
    assert ratios == sorted(ratios)
    found = num_on_cpu_by_ratio(times)
    assert all(ratio < 1 for ratio in ratios[:found])
    assert ratios[found] >= 1 or found == len(times.cpu_s)


@given(layers())
def test_balancing_seconds_is_never_slower_than_balancing_the_ratio(times: ExpertTimes) -> None:
    by_ratio = layer_s(times, range(num_on_cpu_by_ratio(times)))
    assert layer_s(times, range(num_on_cpu(times))) <= by_ratio


@given(layers())
def test_by_popularity_is_as_good_as_any_subset(times: ExpertTimes) -> None:
    """Exactly where the GPU's products take no time, else within the spread of one product."""
    found_s = layer_s(times, range(num_on_cpu(times)))
    spread_s = max(times.gpu_s, default=0.0) - min(times.gpu_s, default=0.0)
    assert found_s <= all_subsets_s(times) + spread_s


@pytest.mark.parametrize(
    "tokens",
    [[0] * 4 + [1, 1, 2, 3, 5, 8, 200, 600], [20] * 12, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]],
)
def test_twelve_experts_of_the_published_table_against_all_subsets(tokens: list[int]) -> None:
    """2^12 sets; skewed, even, and doubling choices."""
    times = published(tokens)
    found_s = layer_s(times, range(num_on_cpu(times)))
    assert found_s == pytest.approx(all_subsets_s(times), rel=1e-12)


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 9))
def test_no_order_of_loads_ends_sooner(gpu_s: list[int], load_s: int) -> None:
    """All permutations of up to five experts."""
    times = ExpertTimes(
        cpu_s=(0.0,) * len(gpu_s), gpu_s=tuple(map(float, gpu_s)), load_s=float(load_s)
    )
    ends = []
    for order in permutations(gpu_s):
        end = 0.0
        for count, product_s in enumerate(order, start=1):
            end = max(end, count * load_s) + product_s
        ends.append(end)
    assert layer_s(times, ()) == min(ends)


def test_skew_of_even_and_of_single_choices() -> None:
    """1 / E, and 1."""
    assert popularity_skew([[0.125] * 8]) == 0.125
    assert popularity_skew([[0.0, 1.0]]) == 1.0
    assert popularity_skew([[0.5, 0.5], [0.25, 0.75]]) == (0.5 + 0.625) / 2

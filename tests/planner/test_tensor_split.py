"""HeteGen's share of a dense module: its balance, its limits, and its order of residency."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.tensor_split import DenseModule, residency_order, resident_modules

seconds = st.floats(1e-6, 1e3)


def module(cpu_s: float, copy_s: float, gpu_s: float, num_bytes: int = 1) -> DenseModule:
    return DenseModule(num_bytes=num_bytes, cpu_s=cpu_s, copy_s=copy_s, gpu_s=gpu_s)


@st.composite
def knapsacks(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> tuple[list[DenseModule], int]:
    """Up to eight modules of whole seconds, and a budget of bytes."""
    count = draw(st.integers(0, 8))
    modules = [module(float(draw(st.integers(0, 20))), 1.0, 0.0, draw(sizes)) for _ in range(count)]
    return modules, draw(st.integers(0, 40))


def taken_over_s(modules: list[DenseModule], chosen: tuple[int, ...]) -> float:
    return sum(modules[index].cpu_s for index in chosen)


def most_s(modules: list[DenseModule], gpu_bytes: int) -> float:
    """The most CPU seconds that any set of modules within the budget takes over."""
    return max(
        taken_over_s(modules, chosen)
        for size in range(len(modules) + 1)
        for chosen in combinations(range(len(modules)), size)
        if sum(modules[index].num_bytes for index in chosen) <= gpu_bytes
    )


def test_a_share_by_hand() -> None:
    """12 s on the CPU, 3 + 1 s over the link: three quarters to the GPU, both end at 3 s."""
    linear = module(12.0, 3.0, 1.0)
    assert linear.gpu_share == 0.75
    assert linear.split_s == 3.0
    # cpu_s (copy_s + gpu_s) / (cpu_s + copy_s + gpu_s)
    assert linear.split_s == 12.0 * 4.0 / 16.0


@given(seconds, seconds, seconds)
def test_both_sides_end_together(cpu_s: float, copy_s: float, gpu_s: float) -> None:
    linear = module(cpu_s, copy_s, gpu_s)
    share = linear.gpu_share
    assert cpu_s * (1 - share) == pytest.approx(share * (copy_s + gpu_s))
    assert linear.split_s == pytest.approx(cpu_s * (copy_s + gpu_s) / (cpu_s + copy_s + gpu_s))


@given(seconds, seconds, seconds, st.floats(0.0, 1.0))
def test_no_share_is_faster(cpu_s: float, copy_s: float, gpu_s: float, share: float) -> None:
    """The whole on either side among them."""
    linear = module(cpu_s, copy_s, gpu_s)
    assert linear.split_s <= linear.shared_s(share) * (1 + 1e-12)
    assert linear.split_s <= min(linear.cpu_s, linear.offload_s) * (1 + 1e-12)
    assert (linear.shared_s(0.0), linear.shared_s(1.0)) == (cpu_s, copy_s + gpu_s)


@given(seconds, seconds, seconds, st.floats(1.0, 100.0))
def test_a_slower_link_gets_less(cpu_s: float, copy_s: float, gpu_s: float, factor: float) -> None:
    """And a slower CPU more; the module takes longer either way."""
    linear = module(cpu_s, copy_s, gpu_s)
    slow_link, slow_cpu = (
        module(cpu_s, copy_s * factor, gpu_s),
        module(cpu_s * factor, copy_s, gpu_s),
    )
    assert slow_link.gpu_share <= linear.gpu_share <= slow_cpu.gpu_share
    assert min(slow_link.split_s, slow_cpu.split_s) >= linear.split_s * (1 - 1e-9)


@given(seconds, seconds)
def test_without_a_link_all_stays_on_the_cpu(cpu_s: float, gpu_s: float) -> None:
    """The share goes to 0 as the copy's time grows, and is 0 at infinity."""
    shares = [module(cpu_s, 10.0**power, gpu_s).gpu_share for power in (6, 9, 12)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.0, abs=1e-8)
    without = module(cpu_s, math.inf, gpu_s)
    assert (without.gpu_share, without.split_s) == (0.0, cpu_s)
    assert without.shared_s(0.0) == cpu_s


def test_a_module_that_takes_no_time_needs_no_gpu() -> None:
    assert (module(0.0, 0.0, 0.0).gpu_share, module(0.0, 0.0, 0.0).split_s) == (0.0, 0.0)
    assert (module(1.0, 0.0, 0.0).gpu_share, module(1.0, 0.0, 0.0).split_s) == (1.0, 0.0)


def test_residency_goes_to_the_most_seconds_a_byte() -> None:
    """2 s of 1 byte before 3 s of 2; equals in their order."""
    modules = [module(3.0, 1.0, 0.0, 2), module(2.0, 1.0, 0.0, 1), module(6.0, 1.0, 0.0, 4)]
    assert residency_order(modules) == (1, 0, 2)
    assert resident_modules(modules, 3) == (0, 1)
    assert resident_modules(modules, 5) == (0, 1)
    assert resident_modules(modules, 7) == (0, 1, 2)
    assert resident_modules(modules, 0) == ()


@given(knapsacks(sizes=st.just(3)))
def test_the_order_is_optimal_for_modules_of_one_size(
    case: tuple[list[DenseModule], int],
) -> None:
    """Against every set of them."""
    modules, gpu_bytes = case
    chosen = resident_modules(modules, gpu_bytes)
    assert taken_over_s(modules, chosen) == most_s(modules, gpu_bytes)


@given(knapsacks(sizes=st.integers(1, 12)))
def test_the_order_lacks_less_than_the_first_module_passed_over(
    case: tuple[list[DenseModule], int],
) -> None:
    """Against every set of modules of different sizes; the budget is kept."""
    modules, gpu_bytes = case
    chosen = resident_modules(modules, gpu_bytes)
    assert sum(modules[index].num_bytes for index in chosen) <= gpu_bytes
    lacking_s = most_s(modules, gpu_bytes) - taken_over_s(modules, chosen)
    passed = [index for index in residency_order(modules) if index not in chosen]
    if not passed:
        assert lacking_s == 0
    else:
        assert lacking_s < modules[passed[0]].cpu_s or lacking_s == 0


def test_the_order_may_be_a_knapsacks_gap_away() -> None:
    """10 s of 5 bytes first leaves 2 of 7 bytes empty; 6 s of 3 and 8 of 4 would be 14."""
    modules = [module(10.1, 1.0, 0.0, 5), module(6.0, 1.0, 0.0, 3), module(8.0, 1.0, 0.0, 4)]
    assert taken_over_s(modules, resident_modules(modules, 7)) == 10.1
    assert most_s(modules, 7) == 14.0

"""What was disturbed is measured again, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero.measure.settling import Probe, Settling, disturbed
from planner.device import Sample


def product(seconds: float, num_tokens: int = 1, spread: float = 0.0, rows: int = 8) -> Sample:
    return Sample(
        lane="cpu",
        kernel="linear",
        shape=(rows, 8),
        num_tokens=num_tokens,
        seconds=seconds,
        spread=spread,
    )


def test_what_varies_much_is_disturbed() -> None:
    """By more than a tenth."""
    assert disturbed([product(1.0, spread=0.05), product(1.0, 2, spread=0.5)]) == [1]


def test_what_takes_longer_than_more_rows_is_disturbed() -> None:
    """Of the same matrix; wherever the two stand."""
    samples = [product(4.0, 16), product(5.0, 4), product(2.0, 1), product(1.0, 64, rows=16)]
    assert disturbed(samples) == [1]


def test_experts_are_compared_one_by_one() -> None:
    """Sixteen in 4 s are faster than four in 2 s, which have more tokens each."""
    few, many = (
        Sample(
            lane="cpu",
            kernel="experts",
            shape=(count, 8, 8),
            num_tokens=num_tokens,
            seconds=seconds,
        )
        for count, num_tokens, seconds in ((16, 1, 4.0), (4, 8, 2.0))
    )
    assert disturbed([few, many]) == []


@given(st.lists(st.floats(1.0, 2.0), max_size=8))
def test_seconds_that_rise_with_rows_and_no_faster_stand(factors: list[float]) -> None:
    """Twice the rows take as long, twice as long, or anything between."""
    seconds = [1.0]
    for factor in factors:
        seconds.append(seconds[-1] * factor)
    assert disturbed([product(each, 2**index) for index, each in enumerate(seconds)]) == []


def test_what_does_less_in_a_second_than_fewer_rows_is_disturbed() -> None:
    """Twice the rows in four times as long; of a smaller matrix that says nothing."""
    half = product(4.0, 2)
    assert disturbed([product(1.0, 1), half, product(4.0, 4)]) == [1]
    assert disturbed([product(1.0, 1), product(3.0, 2, rows=4)]) == []
    assert disturbed([product(1.0, 1), product(3.0, 2, rows=16)]) == []
    assert disturbed([product(1.0, 1), product(6.0, 2, rows=16)]) == [1]


def probes_of(
    runs: list[list[Sample]],
) -> tuple[list[Callable[[], Sample]], list[int]]:
    """Probes that give the samples of their lists in turn, and how often each has run."""
    counts = [0] * len(runs)

    def probe(index: int) -> Callable[[], Sample]:
        def run() -> Sample:
            counts[index] += 1
            return runs[index][min(counts[index], len(runs[index])) - 1]

        return run

    return [probe(index) for index in range(len(runs))], counts


def settled(
    probes: list[Probe], *, budget_s: float, pace: Callable[[], float] = lambda: 1.0
) -> list[Sample]:
    settling = Settling(pace)
    settling.run(probes[:1])
    settling.run(probes[1:])
    return settling.settle(budget_s)


def test_only_the_disturbed_are_measured_again() -> None:
    """Once, if that settles it; the others keep their first sample."""
    probes, counts = probes_of(
        [[product(1.0)], [product(9.0, 2, spread=2.0), product(2.0, 2)], [product(3.0, 4)]]
    )
    assert settled(probes, budget_s=60.0) == [product(1.0), product(2.0, 2), product(3.0, 4)]
    assert counts == [1, 2, 1]


def test_the_fastest_of_several_counts() -> None:
    """On a machine that never rests it ends after three more rounds."""
    seconds = (5.0, 4.0, 6.0, 7.0, 1.0)
    probes, counts = probes_of([[product(each, spread=0.5) for each in seconds]])
    assert [each.seconds for each in settled(probes, budget_s=60.0)] == [pytest.approx(4.0)]
    assert counts == [4]


def test_what_ran_while_all_was_slow_is_measured_again_once_it_is_not() -> None:
    """The pace is asked before the first probe, after each, and until it is good again."""
    paces = iter([1.0, 1.05, 1.8, 1.7, 1.6, 1.0, 1.0, 1.0])
    probes, counts = probes_of(
        [[product(1.0)], [product(4.0, 2), product(2.0, 2)], [product(3.0, 2, rows=16)]]
    )
    found = settled(probes, budget_s=60.0, pace=lambda: next(paces, 1.0))
    assert [each.seconds for each in found] == [1.0, 2.0, 3.0]
    assert counts[:2] == [1, 2]
    assert counts[2] > 1  # as much slower before it as after


def test_a_machine_that_stays_slow_ends_the_wait() -> None:
    """The first pace was fast; nothing is measured again at a pace that is not."""
    paces = iter([1.0])
    probes, counts = probes_of([[product(1.0)]])
    begin_s = time.perf_counter()
    assert settled(probes, budget_s=0.2, pace=lambda: next(paces, 2.0)) == [product(1.0)]
    assert time.perf_counter() - begin_s < 2.0
    assert counts == [1]

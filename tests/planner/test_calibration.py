"""Calibration: what factors become as runs say so, and what they do not listen to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.calibration import (
    MAX_FACTOR,
    MIN_FACTOR,
    NO_CORRECTIONS,
    CalibrationRecord,
    Corrections,
    TermSeconds,
    corrections,
)
from planner.workload import PHASES, Phase

RATIO = st.floats(min_value=0.55, max_value=1.9)


def at(run: int) -> str:
    """The time of a run; later runs have larger numbers."""
    return f"2026-01-31T12:{run // 60:02}:{run % 60:02}.000000Z"


def record(
    measured_s: float,
    run: int = 0,
    *,
    predicted_s: float = 1.0,
    phase: Phase = "decode",
    model: str = "model",
    profile: str = "machine",
    rates: str = "rates",
    others: tuple[TermSeconds, ...] = (),
) -> CalibrationRecord:
    """A run in which experts on the CPU took so long, and perhaps other terms."""
    experts = TermSeconds(
        lane="cpu", term="experts", predicted_s=predicted_s, measured_s=measured_s
    )
    return CalibrationRecord(
        at=at(run),
        model="tiny",
        model_fingerprint=model,
        profile_fingerprint=profile,
        rates_fingerprint=rates,
        placement="cpu",
        accelerator="none",
        phase=phase,
        num_steps=1,
        num_tokens=1,
        num_seqs=1,
        num_past_tokens=0,
        terms=(experts, *others),
    )


def learned(records: Sequence[CalibrationRecord]) -> Corrections:
    return corrections(
        records,
        model_fingerprint="model",
        profile_fingerprint="machine",
        rates_fingerprint="rates",
    )


def factor(records: Sequence[CalibrationRecord]) -> float:
    return learned(records).factor("cpu", "experts", "decode")


def test_without_runs_nothing_is_corrected() -> None:
    assert learned([]) == NO_CORRECTIONS
    assert NO_CORRECTIONS.factor("host", "host", "prefill") == 1.0
    assert NO_CORRECTIONS.sigma("host", "host", "prefill") is None
    assert NO_CORRECTIONS.num_runs == 0


def left_of_prior(num_runs: int, scatter: float = 0.0, *, past: float | None = None) -> float:
    """The prior's share of a factor, by the formula of `corrections` for runs of equal weight."""
    counted = num_runs if past is None else past
    variance = (2 * 0.12**2 + counted * scatter**2) / (2 + counted - 1)
    prior_runs = variance / 0.07**2
    return prior_runs / (num_runs + prior_runs)


def test_one_run_goes_a_quarter_of_the_way() -> None:
    """It is (0.12 / 0.07)^2 = 2.94 runs that speak for the prior."""
    assert factor([record(1.44)]) == pytest.approx(1.44 ** (1 / 3.939), rel=1e-4)


@given(ratio=RATIO, num_runs=st.integers(1, 60))
def test_runs_that_agree_bring_the_factor_ever_nearer_to_their_ratio(
    ratio: float, num_runs: int
) -> None:
    """The more agree, the less is said against each: of five four fifths are gone."""
    left = math.log(ratio / factor([record(ratio, run) for run in range(num_runs)]))
    weight = math.fsum(0.5 ** (run / 8) for run in range(num_runs))
    expected = left_of_prior(num_runs, past=weight) * math.log(ratio)
    assert left == pytest.approx(expected, abs=1e-9)
    if num_runs >= 5:
        assert abs(left) <= 0.2 * abs(math.log(ratio))


@given(ratio=st.floats(min_value=1.1, max_value=1.9), scatter=st.floats(0.15, 0.4))
def test_runs_that_scatter_are_believed_less(ratio: float, scatter: float) -> None:
    """On a machine whose runs vary more than the model errs, five of them say little."""
    agreeing = [record(ratio, run) for run in range(5)]
    offsets = (-scatter, scatter, 0.0, scatter, -scatter)
    scattered = [record(ratio * math.exp(each), run) for run, each in enumerate(offsets)]
    assert 1.0 < factor(scattered) < math.sqrt(ratio * factor(agreeing)) < ratio
    assert math.log(factor(scattered)) < 0.75 * math.log(factor(agreeing))


@given(
    ratio=RATIO,
    spread=st.floats(min_value=0.0, max_value=0.1),
    seed=st.integers(0, 2**32 - 1),
)
def test_runs_that_scatter_are_averaged(ratio: float, spread: float, seed: int) -> None:
    """40 runs of half-life 8 are worth 23 equal ones: 5 standard errors of a 10 % worse estimate,
    and the 5 % of the way that are the prior's."""
    draw = Random(seed)
    runs = [record(ratio * math.exp(draw.gauss(0, spread)), run) for run in range(40)]
    error = math.log(factor(runs) / ratio)
    assert abs(error) <= 5 * 1.1 * spread / math.sqrt(23) + 0.05 * abs(math.log(ratio)) + 1e-9


@given(st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=12))
def test_factors_stay_within_their_bounds(measured: list[float]) -> None:
    found = learned([record(seconds, run) for run, seconds in enumerate(measured)])
    correction = found.by_key["cpu", "experts", "decode"]
    assert MIN_FACTOR <= correction.factor <= MAX_FACTOR
    if correction.is_bounded:
        assert correction.factor in (MIN_FACTOR, MAX_FACTOR)


@pytest.mark.parametrize(("ratio", "bound"), [(17.0, MAX_FACTOR), (1 / 17, MIN_FACTOR)])
def test_a_bound_that_is_hit_is_said_to_be(ratio: float, bound: float) -> None:
    found = learned([record(ratio)]).by_key["cpu", "experts", "decode"]
    assert (found.factor, found.is_bounded) == (bound, True)
    assert not learned([record(1.9)]).by_key["cpu", "experts", "decode"].is_bounded


@given(
    runs=st.lists(st.tuples(RATIO, st.integers(0, 3)), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_the_log_says_nothing(runs: list[tuple[float, int]], order: Random) -> None:
    """Records are aged by their time, and those of one time alike."""
    records = [record(ratio, run) for ratio, run in runs]
    shuffled = list(records)
    order.shuffle(shuffled)
    assert learned(shuffled) == learned(records)


@settings(max_examples=200)
@given(
    ratio=RATIO,
    outlier=st.floats(min_value=3.0, max_value=1000.0),
    position=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_one_run_of_a_busy_machine_among_five_moves_the_factor_little(
    ratio: float, outlier: float, position: int, seed: int
) -> None:
    """Four runs within 1 %: the fifth, however slow, moves the factor by less than 4 %."""
    draw = Random(seed)
    quiet = [ratio * math.exp(draw.uniform(-0.01, 0.01)) for _ in range(5)]
    busy = [seconds * outlier if run == position else seconds for run, seconds in enumerate(quiet)]
    without, with_one = (
        factor([record(seconds, run) for run, seconds in enumerate(each)]) for each in (quiet, busy)
    )
    assert with_one / without > 0.99
    assert with_one / without < 1.04


def test_newer_runs_count_more() -> None:
    """A machine that became slower: after as many new runs as old ones the new speed prevails."""
    old = [record(1.0, run) for run in range(16)]
    new = [record(1.5, run) for run in range(16, 32)]
    assert factor(old + new) > factor(
        [record(1.0, r + 16) for r in range(16)] + [record(1.5, r) for r in range(16)]
    )
    assert factor(old + new) > 1.25


def test_sigma_falls_as_runs_agree_and_is_as_wide_as_they_scatter() -> None:
    """Against the spread of the runs themselves, from the standard library."""
    agreeing = [learned([record(1.2, run) for run in range(n)]) for n in (1, 4, 16)]
    sigmas = [found.sigma("cpu", "experts", "decode") or 0.0 for found in agreeing]
    assert sigmas[0] > sigmas[1] > sigmas[2]

    draw = Random(0)
    logs = [draw.gauss(0, 0.3) for _ in range(60)]
    found = learned([record(math.exp(each), run) for run, each in enumerate(logs)])
    sigma = found.sigma("cpu", "experts", "decode")
    assert sigma == pytest.approx(statistics.pstdev(logs[-24:]), rel=0.35)


def test_a_term_below_one_percent_of_its_step_is_left_alone() -> None:
    def router(seconds: float, predicted_s: float) -> TermSeconds:
        return TermSeconds(lane="cpu", term="router", predicted_s=predicted_s, measured_s=seconds)

    small = learned([record(1.0, others=(router(0.009, 0.003),))])
    grown = learned([record(1.0, others=(router(0.02, 0.01),))])
    assert small.factor("cpu", "router", "decode") == 1.0
    assert grown.factor("cpu", "router", "decode") > 1.0


def test_what_has_no_prediction_or_no_measurement_is_left_alone() -> None:
    host = TermSeconds(lane="host", term="host", predicted_s=0.0, measured_s=1.0)
    found = learned([record(1.2, others=(host,)), record(0.0, 1)])
    assert set(found.by_key) == {("cpu", "experts", "decode")}
    assert found.by_key["cpu", "experts", "decode"].num_runs == 1


def test_phases_are_corrected_apart() -> None:
    found, gone = learned([record(1.44, phase="prefill"), record(0.81)]), 1 - left_of_prior(1)
    assert found.factors("prefill") == {"cpu experts": pytest.approx(1.44**gone)}
    assert found.factors("decode") == {"cpu experts": pytest.approx(0.81**gone)}
    assert found.num_runs == 1


def test_runs_of_another_model_machine_or_measurement_do_not_count() -> None:
    others = [
        record(1.9, model="another model"),
        record(1.9, profile="another machine"),
        record(1.9, rates="measured before"),
    ]
    assert learned(others) == NO_CORRECTIONS
    assert learned([*others, record(1.44)]) == learned([record(1.44)])


def test_a_record_keeps_what_it_says_as_json() -> None:
    for phase in PHASES:
        made = record(1.3, 7, phase=phase)
        assert msgspec.json.decode(msgspec.json.encode(made), type=CalibrationRecord) == made


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"schema_version":1', b'"schema_version":2'),
        (b'"measured_s":1.3', b'"measured_s":-1.3'),
        (b'"measured_s":1.3', b'"measured_s":1e999'),
        (b'"lane":"cpu"', b'"lane":"disk"'),
        (b'"at":"2026-01-31T12:00:00.000000Z"', b'"at":"yesterday"'),
        (b'"num_steps":1', b'"num_steps":0'),
        (b'"model":"tiny"', b'"model":"tiny","mood":"good"'),
    ],
)
def test_a_record_with_a_value_out_of_range_is_refused(old: bytes, new: bytes) -> None:
    data = msgspec.json.encode(record(1.3))
    assert old in data
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(data.replace(old, new), type=CalibrationRecord)

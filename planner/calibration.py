"""Calibration: what runs say of the cost model, as records, and the factors that correct it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from planner.step_graph import Lane, Term
from planner.workload import Phase

SCHEMA_VERSION = 1

# A ratio beyond these is not a matter of calibration: the machine must be measured anew.
MIN_FACTOR, MAX_FACTOR = 0.5, 2.0

# What the cost model itself is off by before any run, as a standard deviation of the logarithm.
_PRIOR_SIGMA = 0.07
# What single runs are off by, and how many runs that knowledge is worth: on a virtual machine whose
# cores other work shares they scatter so. bench/results/prediction_xeon-2core_202611.md
_RUN_SIGMA = 0.12
_RUN_SIGMA_RUNS = 2.0
# Runs after which an older one counts half: a machine changes (its heat, its other work).
_HALF_LIFE_RUNS = 8.0
# A term of a smaller share of its steps is left alone: a clock tick would be a large ratio of it.
_MIN_SHARE = 0.01
# Huber's constant: 95 % as good as the mean where there are no outliers. The scale has a floor, so
# that runs that agree by chance do not make an outlier of the next.
_HUBER = 1.345
_MIN_SCALE = 0.02
_MAD_TO_SIGMA = 1.4826

Seconds = Annotated[float, Meta(ge=0, le=1e9)]
CorrectedLane = Lane | Literal["host"]
CorrectedTerm = Term | Literal["host"]
Key = tuple[CorrectedLane, CorrectedTerm, Phase]


class TermSeconds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of the ops of one term on one lane, added up over the steps of a record.

    `predicted_s` is the cost model's own, without corrections: a correction of a correction would
    forget what it learned. `host` is what a step takes outside its ops.
    """

    lane: CorrectedLane
    term: CorrectedTerm
    predicted_s: Seconds
    measured_s: Seconds


class CalibrationRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Predicted and measured seconds of one phase of one run; a line of the calibration log.

    Attributes
    ----------
    at : str
        When the run ended, UTC, to the microsecond: `2026-01-31T12:00:00.000000Z`.
    profile_fingerprint : str
        The part of the machine that was planned for (`planner.search.profile_fingerprint`).
    rates_fingerprint : str
        The measurement that the prediction was made from. When the machine is measured anew the
        base of every ratio has changed, and old ones no longer apply.
    num_steps : int
        Steps that were sampled, over which all seconds are added up.
    num_tokens, num_seqs, num_past_tokens : float
        Size of those steps, means.
    """

    schema_version: int = SCHEMA_VERSION
    at: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")]
    model: str
    model_fingerprint: str
    profile_fingerprint: str
    rates_fingerprint: str
    placement: str
    accelerator: Literal["none", "cuda", "emulated"]
    phase: Phase
    num_steps: Annotated[int, Meta(ge=1)]
    num_tokens: float
    num_seqs: float
    num_past_tokens: float
    terms: tuple[TermSeconds, ...]

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {self.schema_version}, this is {SCHEMA_VERSION}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What runs say of one term: multiply its predicted seconds by `factor`.

    `sigma` is the standard deviation of the logarithm of what is then left. `is_bounded` is true
    where the runs ask for a factor beyond `MIN_FACTOR` or `MAX_FACTOR`.
    """

    factor: float
    sigma: float
    is_bounded: bool
    num_runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    """Corrections by (lane, term, phase), and how many runs they are from."""

    by_key: Mapping[Key, Correction]
    num_runs: int

    def factor(self, lane: CorrectedLane, term: CorrectedTerm, phase: Phase) -> float:
        """What to multiply predicted seconds by; 1 where nothing is known."""
        found = self.by_key.get((lane, term, phase))
        return 1.0 if found is None else found.factor

    def sigma(self, lane: CorrectedLane, term: CorrectedTerm, phase: Phase) -> float | None:
        """Log standard deviation of what is left after the factor; None where nothing is known."""
        found = self.by_key.get((lane, term, phase))
        return None if found is None else found.sigma

    def factors(self, phase: Phase) -> dict[str, float]:
        """Factors of a phase by lane and term, as `cpu experts`, in a fixed order."""
        return {
            "host" if lane == "host" else f"{lane} {term}": found.factor
            for (lane, term, of), found in sorted(self.by_key.items())
            if of == phase
        }


NO_CORRECTIONS = Corrections(by_key=MappingProxyType({}), num_runs=0)


def corrections(
    records: Iterable[CalibrationRecord],
    *,
    model_fingerprint: str,
    profile_fingerprint: str,
    rates_fingerprint: str,
) -> Corrections:
    """Learn from a model's runs on one machine, as one measurement of it describes it.

    What is wrong of a prediction is a sample of one format and shape more than a term of all
    models: correcting int4 by runs of bfloat16 made it worse
    (bench/results/prediction_xeon-2core_202611.md).

    Parameters
    ----------
    records : iterable of CalibrationRecord
        In any order; those of other models, machines or measurements are left out.
    model_fingerprint : str
        Shapes and formats of the model.
    profile_fingerprint, rates_fingerprint : str
        The machine as it is to be used, and its measurement.

    Notes
    -----
    Of each (lane, term, phase), with r = log(measured / predicted) of its N runs, newest first
    counting 2^(-age/8): m is the Huber estimate of the middle of r, s^2 the variance of r about it,
    pooled with two runs' worth of 0.12^2, and the correction is exp(m * N / (N + s^2 / 0.07^2)).
    That is the posterior mean of a normal whose prior is centred on no correction, 0.07 wide: runs
    that agree are soon believed, runs that scatter are not. `sigma` is what is then left: each run
    counts with its distance from the correction, and s^2 / 0.07^2 runs with s^2 + 0.07^2.

    Examples
    --------
    >>> corrections((), model_fingerprint="", profile_fingerprint="", rates_fingerprint="").factor(
    ...     "cpu", "experts", "decode")
    1.0
    """
    mine = [
        record
        for record in records
        if record.model_fingerprint == model_fingerprint
        and record.profile_fingerprint == profile_fingerprint
        and record.rates_fingerprint == rates_fingerprint
    ]
    runs: dict[Key, list[tuple[str, float]]] = {}
    for record in mine:
        for key, ratio in _log_ratios(record).items():
            runs.setdefault(key, []).append((record.at, ratio))
    phases = [record.phase for record in mine]
    return Corrections(
        by_key=MappingProxyType({key: _correction(found) for key, found in runs.items()}),
        num_runs=max((phases.count(phase) for phase in set(phases)), default=0),
    )


def _log_ratios(record: CalibrationRecord) -> dict[Key, float]:
    """Log of measured over predicted of each term that is a part of its steps to speak of."""
    predicted_s = sum(term.predicted_s for term in record.terms)
    measured_s = sum(term.measured_s for term in record.terms)
    return {
        (term.lane, term.term, record.phase): math.log(term.measured_s / term.predicted_s)
        for term in record.terms
        if term.predicted_s > 0
        and term.measured_s > 0
        and (
            term.predicted_s >= _MIN_SHARE * predicted_s
            or term.measured_s >= _MIN_SHARE * measured_s
        )
    }


def _correction(runs: Sequence[tuple[str, float]]) -> Correction:
    """The correction of one term from (time, log ratio) of its runs."""
    times = sorted((at for at, _ in runs), reverse=True)
    # Runs of one time are of one age, so that their order in the log says nothing.
    weighted = sorted((ratio, 0.5 ** (times.index(at) / _HALF_LIFE_RUNS)) for at, ratio in runs)
    middle, scale = _middle(weighted)
    weight = math.fsum(weight for _, weight in weighted)
    scatter = _squares(weighted, middle, _HUBER * scale)
    variance = (_RUN_SIGMA_RUNS * _RUN_SIGMA**2 + scatter) / (_RUN_SIGMA_RUNS + weight - 1.0)
    unknown, prior_runs = variance + _PRIOR_SIGMA**2, variance / _PRIOR_SIGMA**2
    wanted = middle * len(runs) / (len(runs) + prior_runs)
    log_factor = min(max(wanted, math.log(MIN_FACTOR)), math.log(MAX_FACTOR))
    left = _squares(weighted, log_factor, abs(middle - log_factor) + _HUBER * scale)
    return Correction(
        factor=min(max(math.exp(log_factor), MIN_FACTOR), MAX_FACTOR),
        sigma=math.sqrt((prior_runs * unknown + left) / (prior_runs + weight)),
        is_bounded=wanted != log_factor,
        num_runs=len(runs),
    )


def _squares(weighted: Sequence[tuple[float, float]], middle: float, reach: float) -> float:
    """Squared distances from the middle; an outlier counts as far as it may pull."""
    return math.fsum(w * min(abs(value - middle), reach) ** 2 for value, w in weighted)


def _middle(weighted: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Middle and scale of ascending (value, weight): one step of Huber's estimate from the median.

    Values beyond 1.345 scales of the median count as if they were there, so that no single run
    pulls further than that (Huber 1964; the scale is the median absolute deviation).
    """
    median = _median(weighted)
    deviations = sorted((abs(value - median), weight) for value, weight in weighted)
    scale = max(_MIN_SCALE, _MAD_TO_SIGMA * _median(deviations))
    reach = _HUBER * scale
    weight = math.fsum(weight for _, weight in weighted)
    pulls = (w * min(max(value - median, -reach), reach) for value, w in weighted)
    return median + math.fsum(pulls) / weight, scale


def _median(weighted: Sequence[tuple[float, float]]) -> float:
    """Weighted median of ascending (value, weight): midway where half the weight is on each side.

    Between the values on both sides of the half it goes in proportion, so that two runs of nearly
    one weight are met nearly midway.
    """
    half = math.fsum(weight for _, weight in weighted) / 2
    below, before = 0.0, None
    for value, weight in weighted:
        centre = below + weight / 2
        if centre >= half:
            if before is None:
                return value
            last_value, last_centre = before
            return last_value + (value - last_value) * (half - last_centre) / (centre - last_centre)
        before, below = (value, centre), below + weight
    return weighted[-1][0]

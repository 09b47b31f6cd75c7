"""Plan: the frozen answer, and its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from planner.errors import PlanError
from planner.hardware import Resources
from planner.kernel_table import Source
from planner.placement import MIXED, Device, Placement
from planner.strategies import STRATEGIES
from planner.strict_json import decode_struct
from planner.timeline import TimelineTerm
from planner.workload import Objective, Phase, Workload

SCHEMA_VERSION = 1

TimeMetric = Literal["ttft_s", "tpot_s", "e2e_s"]

# of a file; numbers that hetero itself computes are not looked at again
_Amount = Annotated[float, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=0)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class Estimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Predicted speed of a workload.

    Attributes
    ----------
    ttft_s : float
        Time to first token, mean over sequences that arrive together.
    tpot_s : float
        Time per output token after the first: (e2e - ttft) / (output_len - 1), as vLLM defines it;
        0 where there is one output token.
    e2e_s : float
        Until the last token of the last sequence.
    prefill_tokens_per_s, decode_tokens_per_s : float
        Prompt tokens over prefill seconds; sequences in flight over the seconds of a decode step.
    num_concurrent_seqs : int
        Sequences that run at once; fewer than the workload's only for the throughput objective.
    terms_by_phase : dict
        Critical-path seconds by term: of all prefill steps, of one decode step at mean context.
    bottleneck_by_phase : dict
        Lane and term that take most of it.
    band_by_metric : dict
        10th and 90th percentile of each of the three times.
    source_by_phase : dict
        Shares of each phase's seconds by where their prices are from: kernels that were measured,
        lie between samples or beyond them, are assumed from others, or from published priors.
    calibrated_runs : int
        Runs on this machine that the prediction was corrected by.
    correction_by_phase : dict
        What they multiplied predicted seconds by, by lane and term, as `cpu experts`.
    """

    ttft_s: _Amount
    tpot_s: _Amount
    e2e_s: _Amount
    prefill_tokens_per_s: _Amount
    decode_tokens_per_s: _Amount
    num_concurrent_seqs: Annotated[int, Meta(ge=1)]
    bytes_by_device: dict[Device, _Count]
    terms_by_phase: dict[Phase, dict[TimelineTerm, _Amount]]
    bottleneck_by_phase: dict[Phase, str]
    band_by_metric: dict[TimeMetric, tuple[_Amount, _Amount]] = {}
    source_by_phase: dict[Phase, dict[Source, _Amount]] = {}
    calibrated_runs: _Count = 0
    correction_by_phase: dict[Phase, dict[str, _Amount]] = {}


class Alternative(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A placement that was not chosen, and why."""

    name: str
    cut_by_phase: dict[Phase, _Count]
    feasible: bool
    ttft_s: _Amount | None
    tpot_s: _Amount | None
    e2e_s: _Amount | None
    reason: str


class TrialTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times of the sequences of a workload that run at once, as in `Estimate`."""

    ttft_s: _Amount
    tpot_s: _Amount
    e2e_s: _Amount


class TrialRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A placement that was tried; `failure` says why nothing was measured."""

    name: str
    cut_by_phase: dict[Phase, _Count]
    predicted: TrialTimes
    measured: TrialTimes | None
    failure: str | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Placements that were really run for a few steps (`workload`), and which one was kept.

    The first row is the placement that was planned without trying.
    """

    workload: Workload
    rows: tuple[TrialRow, ...]
    kept: str


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where everything lives and runs, how fast that will be, and what else was considered.

    `placement` and `estimate` are those of the nearest miss where `feasible` is false. `resources`
    is what of the machine the plan may use.
    `optimality_gap` is the share by which a better plan could be faster: 0 where the search covered
    its whole space. `trial` is what was found where placements were tried before one was kept.
    """

    schema_version: int = SCHEMA_VERSION
    model: str
    model_fingerprint: str
    profile: str
    profile_fingerprint: str
    resources: Resources
    workload: Workload
    objective: Objective
    feasible: bool
    placement: Placement
    estimate: Estimate
    optimality_gap: _Share
    alternatives: tuple[Alternative, ...]
    trial: Trial | None = None

    @property
    def wave(self) -> Workload:
        """The sequences of the workload that run at once."""
        return replace(self.workload, num_seqs=self.estimate.num_concurrent_seqs)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {self.schema_version}, this is {SCHEMA_VERSION} - at "
                "`$.schema_version`"
            )

    def to_json(self) -> bytes:
        """The plan as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, source: str) -> Plan:
        """Read a plan; `source` names it in errors.

        Raises
        ------
        PlanError
            Not JSON, a key that is unknown, missing or twice there, a wrong type or value, a number
            that is not finite, or what contradicts another field.
        """
        try:
            plan = decode_struct(data, cls)
        except ValueError as error:
            raise PlanError(f"{source} is not a plan: {error}") from None
        reason = _contradiction(plan)
        if reason is not None:
            raise PlanError(f"{source} is not a plan: {reason}")
        return plan

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan from a file.

        Raises
        ------
        PlanError
            The file is missing or is not a plan.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from None
        return cls.from_json(data, source=str(path))


def _contradiction(plan: Plan) -> str | None:
    """What of a plan contradicts the rest of it, with its path; None where all agree."""
    running, arriving = plan.estimate.num_concurrent_seqs, plan.workload.num_seqs
    if running > arriving or (running < arriving and plan.objective == "latency"):
        return (
            f"`$.estimate.num_concurrent_seqs` is {running} but `$.workload.num_seqs` is "
            f"{arriving}, and `$.objective` is {plan.objective}: latency runs all at once, "
            "throughput no more than there are"
        )
    for name, tier in plan.placement.named_tiers:
        if tier.strategy not in (*STRATEGIES, MIXED):
            known = ", ".join((*STRATEGIES, MIXED))
            return f"{tier.strategy!r} is not one of {known} - at `$.placement.{name}.strategy`"
        if tier.strategy == MIXED and tier.cut:
            return (
                f"`$.placement.{name}.cut` is {tier.cut} but `$.placement.{name}.strategy` is "
                f"{MIXED}, which has 0"
            )
    tried = plan.trial
    if tried is not None and tried.kept not in [row.name for row in tried.rows]:
        return f"`$.trial.kept` is {tried.kept!r}, which none of `$.trial.rows` is"
    return None

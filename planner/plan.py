"""Plan: the frozen answer, and its JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec.structs import replace

from planner.errors import PlanError
from planner.hardware import Resources
from planner.placement import Device, Placement
from planner.timeline import TimelineTerm
from planner.workload import Objective, Phase, Workload

SCHEMA_VERSION = 1


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
    """

    ttft_s: float
    tpot_s: float
    e2e_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    num_concurrent_seqs: int
    bytes_by_device: dict[Device, int]
    terms_by_phase: dict[Phase, dict[TimelineTerm, float]]
    bottleneck_by_phase: dict[Phase, str]


class Alternative(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A placement that was not chosen, and why."""

    name: str
    cut_by_phase: dict[Phase, int]
    feasible: bool
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    reason: str


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where everything lives and runs, how fast that will be, and what else was considered.

    `placement` and `estimate` are those of the nearest miss where `feasible` is false. `resources`
    is what of the machine the plan may use.
    `optimality_gap` is the share by which a better plan could be faster: 0 where the search covered
    its whole space.
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
    optimality_gap: float
    alternatives: tuple[Alternative, ...]

    @property
    def wave(self) -> Workload:
        """The sequences of the workload that run at once."""
        return replace(self.workload, num_seqs=self.estimate.num_concurrent_seqs)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {self.schema_version}, this is {SCHEMA_VERSION}")

    def to_json(self) -> bytes:
        """The plan as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, source: str) -> Plan:
        """Read a plan; `source` names it in errors.

        Raises
        ------
        PlanError
            Not JSON, an unknown or missing key, a wrong type or value.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise PlanError(f"{source} is not a plan: {error}") from None

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

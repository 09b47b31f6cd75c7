"""Seconds of a whole workload under a placement: its steps priced and added up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from planner.cost_model import op_cost, predict
from planner.hardware import HardwareProfile
from planner.memory import DeviceMemory
from planner.model_spec import ModelSpec
from planner.placement import Device, Placement, TierPlacement
from planner.plan import Estimate
from planner.step_graph import StepGraph, build, build_kv_move
from planner.timeline import TERMS, TimelineTerm
from planner.workload import BatchShape, Workload, decode_shape, prefill_shapes

# Long prompts are priced at this many of their chunks: the cost of a chunk is affine in its past
# as long as one lane binds, so evenly spread samples miss little.
_MAX_PRICED_STEPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCost:
    """Prefill of all sequences of a batch."""

    step_ends_s: tuple[float, ...]
    num_logits: tuple[int, ...]
    terms: dict[TimelineTerm, float]
    bottleneck: str

    @property
    def seconds(self) -> float:
        return self.step_ends_s[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCost:
    """One decode step at mean context."""

    seconds: float
    terms: dict[TimelineTerm, float]
    bottleneck: str


def prefill_cost(
    spec: ModelSpec, tier: TierPlacement, hardware: HardwareProfile, workload: Workload
) -> PrefillCost:
    """Price the prefill steps of a workload under a tier."""
    graph = build(spec, tier)
    shapes = prefill_shapes(workload.num_seqs, workload.prompt_len, tier.max_num_tokens)
    priced: dict[BatchShape, float] = {}
    terms: dict[TimelineTerm, float] = dict.fromkeys(TERMS, 0.0)
    bottleneck = "none"
    sampled = _spread(len(shapes), _MAX_PRICED_STEPS)
    weight = len(shapes) / len(sampled)
    for position in sampled:
        timeline = predict(graph, spec, hardware, shapes[position])
        priced[shapes[position]] = timeline.makespan_s
        for term, seconds in timeline.by_term().items():
            terms[term] += weight * seconds
        bottleneck = timeline.bottleneck()
    ends, clock = [], 0.0
    known = [(position, priced[shapes[position]]) for position in sampled]
    for position, shape in enumerate(shapes):
        clock += priced[shape] if shape in priced else _between(known, position)
        ends.append(clock)
    return PrefillCost(
        step_ends_s=tuple(ends),
        num_logits=tuple(shape.num_logits for shape in shapes),
        terms=terms,
        bottleneck=bottleneck,
    )


def decode_cost(
    spec: ModelSpec, tier: TierPlacement, hardware: HardwareProfile, workload: Workload
) -> DecodeCost:
    """Price one decode step at the mean context of a workload."""
    past = workload.prompt_len + (workload.output_len - 1) / 2
    timeline = predict(build(spec, tier), spec, hardware, decode_shape(workload.num_seqs, past))
    return DecodeCost(
        seconds=timeline.makespan_s,
        terms=timeline.by_term(),
        bottleneck=timeline.bottleneck(),
    )


def kv_move_s(
    spec: ModelSpec,
    graph: StepGraph,
    hardware: HardwareProfile,
    workload: Workload,
) -> float:
    """Seconds to run a KV move graph (`step_graph.build_kv_move`) once for every sequence."""
    shape = BatchShape(
        phase="prefill",
        num_tokens=workload.prompt_len,
        num_seqs=1,
        num_past_tokens=0,
        num_logits=1,
    )
    each = sum(op_cost(op, spec, hardware, shape).seconds for op in graph.ops)
    return workload.num_seqs * each


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """The three times of a workload, and the rates of its phases."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


def latency(
    prefill: PrefillCost, decode: DecodeCost, move_s: float, workload: Workload, num_concurrent: int
) -> Latency:
    """Times of a workload: prefill of those that run together, then their decode, wave by wave."""
    num_waves = -(-workload.num_seqs // num_concurrent)
    firsts = sum(
        end * count for end, count in zip(prefill.step_ends_s, prefill.num_logits, strict=True)
    )
    num_prefilled = sum(prefill.num_logits)
    wave_s = prefill.seconds + move_s + (workload.output_len - 1) * decode.seconds
    # Sequence i of a wave sees its first token when its own prompt ends; later waves wait.
    ttft_s = firsts / num_prefilled + (num_waves - 1) / 2 * wave_s
    rest = workload.output_len - 1
    first_in_wave_s = firsts / num_prefilled
    return Latency(
        ttft_s=ttft_s,
        tpot_s=(wave_s - first_in_wave_s) / rest if rest else 0.0,
        e2e_s=num_waves * wave_s,
    )


def estimate(
    spec: ModelSpec,
    placement: Placement,
    hardware: HardwareProfile,
    workload: Workload,
    memory: dict[Device, DeviceMemory] | None = None,
    *,
    num_concurrent: int | None = None,
) -> Estimate:
    """Predict a workload under a placement.

    Parameters
    ----------
    num_concurrent : int, optional
        Sequences that run at once; all of the workload's where it is left out.
    """
    concurrent = num_concurrent or workload.num_seqs
    wave = Workload(
        prompt_len=workload.prompt_len, output_len=workload.output_len, num_seqs=concurrent
    )
    prefill = prefill_cost(spec, placement.prefill, hardware, wave)
    decode = decode_cost(spec, placement.decode, hardware, wave)
    move_s = kv_move_s(spec, build_kv_move(placement.prefill, placement.decode), hardware, wave)
    return combine(prefill, decode, move_s, workload, concurrent, memory or {})


def combine(
    prefill: PrefillCost,
    decode: DecodeCost,
    move_s: float,
    workload: Workload,
    num_concurrent: int,
    memory: dict[Device, DeviceMemory],
) -> Estimate:
    """The Estimate that follows from priced phases."""
    times = latency(prefill, decode, move_s, workload, num_concurrent)
    prefill_terms = dict(prefill.terms)
    prefill_terms["transfer"] += move_s
    return Estimate(
        ttft_s=times.ttft_s,
        tpot_s=times.tpot_s,
        e2e_s=times.e2e_s,
        prefill_tokens_per_s=num_concurrent * workload.prompt_len / prefill.seconds,
        decode_tokens_per_s=num_concurrent / decode.seconds,
        num_concurrent_seqs=num_concurrent,
        bytes_by_device={device: need.needed_bytes for device, need in memory.items()},
        terms_by_phase={"prefill": prefill_terms, "decode": dict(decode.terms)},
        bottleneck_by_phase={"prefill": prefill.bottleneck, "decode": decode.bottleneck},
    )


def _spread(count: int, limit: int) -> list[int]:
    """Up to `limit` positions spread evenly over 0..count-1, both ends included."""
    if count <= limit:
        return list(range(count))
    return sorted({round(index * (count - 1) / (limit - 1)) for index in range(limit)})


def _between(known: list[tuple[int, float]], position: int) -> float:
    """Linear interpolation over sorted (position, seconds); the ends are always known."""
    for (x0, y0), (x1, y1) in pairwise(known):
        if x0 <= position <= x1:
            return y0 + (y1 - y0) * (position - x0) / (x1 - x0)
    raise AssertionError("positions lie between the first and the last known one")

"""Seconds of a whole workload under a placement: its steps priced and added up."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from planner.backends import cpu_backends
from planner.cost_model import Backends, CostModel, Pricer
from planner.kernel_table import SOURCES, Source
from planner.kv_blocks import num_second_seqs
from planner.memory import DeviceMemory
from planner.model_spec import ModelSpec
from planner.placement import Device, Placement
from planner.plan import Estimate, TimeMetric
from planner.priors import P90_SIGMAS
from planner.simulate import makespan_s, simulate
from planner.step_graph import Lane, Op, StepGraph, build_kv_move
from planner.tier_graphs import TierGraphs
from planner.timeline import TERMS, TimelineTerm
from planner.workload import (
    PHASES,
    BatchShape,
    Phase,
    Workload,
    decode_shape,
    prefill_shapes,
    prompt_shape,
)

# Steps of one size differ in their past only, and the cost of a step is affine in its past as long
# as one lane binds, so a few evenly spread pasts miss little.
_MAX_PRICED_PASTS = 4
# What a step is off by though each of its kernels is priced right: the caches that one kernel
# leaves to the next, the machine's mood. With 0.03 the bands held 42 % of 90 measured times instead
# of 80 %: bench/results/prediction_xeon-2core_202611.json.
_MODEL_SIGMA = 0.09


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStep:
    """A prefill step that is priced, and what its price counts for.

    `num_steps` is how many steps it stands for; `num_awaiting` how many sequences wait for those
    steps before their first token, added up over the steps.
    """

    shape: BatchShape
    num_steps: float
    num_awaiting: float


def prefill_steps(workload: Workload, chunk_tokens: int) -> tuple[PrefillStep, ...]:
    """The prefill steps of a workload; of many that differ in their past only, a few.

    A step between two priced pasts counts for both in proportion (linear interpolation), so that a
    sum over all steps is a weighted sum over the priced ones.

    Examples
    --------
    >>> [(step.shape.num_tokens, step.num_steps, step.num_awaiting)
    ...     for step in prefill_steps(Workload(prompt_len=6, num_seqs=3), 8)]
    [(8, 1.0, 3.0), (8, 1.0, 2.0), (2, 1.0, 1.0)]
    """
    shapes = prefill_shapes(workload.num_seqs, workload.prompt_len, chunk_tokens)
    pasts_by_size: dict[tuple[int, int, int], set[float]] = {}
    for shape in shapes:
        pasts_by_size.setdefault(_size(shape), set()).add(shape.num_past_tokens)
    priced_pasts = {size: _spread(sorted(pasts)) for size, pasts in pasts_by_size.items()}
    num_steps: dict[BatchShape, float] = {}
    num_awaiting: dict[BatchShape, float] = {}
    num_waiting = workload.num_seqs
    for shape in shapes:
        for past, share in _between(priced_pasts[_size(shape)], shape.num_past_tokens):
            like = _with_past(shape, past)
            num_steps[like] = num_steps.get(like, 0.0) + share
            num_awaiting[like] = num_awaiting.get(like, 0.0) + share * num_waiting
        num_waiting -= shape.num_logits
    return tuple(
        PrefillStep(shape=shape, num_steps=num_steps[shape], num_awaiting=num_awaiting[shape])
        for shape in num_steps
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCost:
    """Seconds of a batch's prefill, and the mean time until a sequence's own prompt has ended."""

    seconds: float
    mean_first_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTerms:
    """What a phase's seconds are made of: critical path by term, and what takes most of it.

    `sigmas` are the standard deviations of the seconds of each lane and term, all ops of which are
    off by the same factor; `sources` how many of the seconds are from samples and from elsewhere.
    """

    terms: dict[TimelineTerm, float]
    bottleneck: str
    seconds: dict[str, float]
    sigmas: dict[str, float]
    sources: dict[Source, float]

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm of all seconds: terms are off independently."""
        total = sum(self.seconds.values())
        spread = math.sqrt(sum(sigma * sigma for sigma in self.sigmas.values()))
        return math.hypot(_MODEL_SIGMA, spread / total) if total > 0 else 0.0

    @property
    def source_shares(self) -> dict[Source, float]:
        """Shares of the seconds by where their prices are from."""
        total = sum(self.sources.values())
        return {name: part / total for name, part in self.sources.items() if part > 0}


class WavePricer:
    """Prices steps for sequences that run together; tiers share the prices of equal ops.

    Parameters
    ----------
    wave : Workload
        The sequences that run together.
    chunk_tokens : int
        New tokens of one prefill step at most.
    backends : Backends, optional
        Who computes the CPU's products; chosen for `wave` where it is left out.
    """

    def __init__(
        self,
        spec: ModelSpec,
        costs: CostModel,
        wave: Workload,
        chunk_tokens: int,
        backends: Backends | None = None,
    ) -> None:
        if backends is None:
            backends = cpu_backends(spec, costs, wave)
        self._spec = spec
        self._costs = costs
        self._wave = wave
        self._slowdowns = costs.slowdowns
        self._steps = [
            (step, Pricer(spec, costs, step.shape, backends))
            for step in prefill_steps(wave, chunk_tokens)
        ]
        # Decode steps read prompt_len .. prompt_len + output_len - 2 tokens of past.
        past = wave.prompt_len + max(0, wave.output_len - 2) / 2
        self._decode = Pricer(spec, costs, decode_shape(wave.num_seqs, past), backends)
        self._decode_at: dict[float, Pricer] = {past: self._decode}
        self.backends = backends

    def with_chunk(self, chunk_tokens: int) -> WavePricer:
        """The same with other prefill steps; prices of decode steps are shared."""
        other = WavePricer(self._spec, self._costs, self._wave, chunk_tokens, self.backends)
        other._decode, other._decode_at = self._decode, self._decode_at
        return other

    def steps(self, phase: Phase) -> tuple[tuple[float, Pricer], ...]:
        """Steps of the sequences that run together: how many of each kind, and their prices."""
        if phase == "decode":
            return ((self._wave.output_len - 1.0, self._decode),)
        return tuple((step.num_steps, price) for step, price in self._steps)

    @property
    def host_s(self) -> float:
        """Seconds of all steps beside their ops."""
        return sum(count * price.host_s for phase in PHASES for count, price in self.steps(phase))

    def kv_layer_move_s(self, layer: int, lane: Lane) -> float:
        """Seconds of moving one layer's cache of all sequences in a direction."""
        op = Op(index=0, kind="copy", lane=lane, layer=layer, payload="kv")
        return self.kv_move_s(StepGraph(phase="prefill", ops=(op,)))

    def prefill(self, graphs: TierGraphs) -> PrefillCost:
        """Price the prefill of all sequences."""
        seconds, awaited_s = 0.0, 0.0
        for step, price in self._steps:
            graph = graphs.of(step.shape)
            step_s = makespan_s(graph, price, self._slowdowns) + price.host_s
            seconds += step.num_steps * step_s
            awaited_s += step.num_awaiting * step_s
        return PrefillCost(seconds=seconds, mean_first_s=awaited_s / self._wave.num_seqs)

    def decode_step_s(self, graphs: TierGraphs) -> float:
        """Price one decode step at mean context."""
        return sum(
            share * (makespan_s(graphs.of(price.shape), price, self._slowdowns) + price.host_s)
            for share, price in self._decode_steps(graphs)
        )

    def _decode_steps(self, graphs: TierGraphs) -> list[tuple[float, Pricer]]:
        """Decode steps that stand for all, each with the share of those that it stands for.

        One at mean context; where caches are divided, one of the steps in which the GPU still has
        all and one of the others: only from there on contexts grow on the CPU.
        """
        start, num_steps = self._wave.prompt_len, self._wave.output_len - 1
        num_before = min(graphs.num_gpu_kv_tokens - start, num_steps)
        if not graphs.num_gpu_kv_tokens or not 0 < num_before < num_steps:
            return [(1.0, self._decode)]
        num_after = num_steps - num_before
        return [
            (count / num_steps, self._decode_with_past(first + (count - 1) / 2))
            for first, count in ((start, num_before), (start + num_before, num_after))
        ]

    def _decode_with_past(self, num_past_tokens: float) -> Pricer:
        if num_past_tokens not in self._decode_at:
            shape = decode_shape(self._wave.num_seqs, num_past_tokens)
            self._decode_at[num_past_tokens] = Pricer(self._spec, self._costs, shape, self.backends)
        return self._decode_at[num_past_tokens]

    def placement_move_s(self, placement: Placement) -> float:
        """Seconds of moving the caches of all sequences from prefill's devices to decode's."""
        second = num_second_seqs(placement, self._wave)
        found = 0.0
        for sub_batch, count in enumerate((self._wave.num_seqs - second, second)):
            if count:
                graph = build_kv_move(placement.prefill, placement.decode, sub_batch=sub_batch)
                found += count / self._wave.num_seqs * self.kv_move_s(graph)
        return found

    def kv_move_s(self, graph: StepGraph) -> float:
        """Seconds to run a KV move graph (`step_graph.build_kv_move`) once for every sequence."""
        shape = prompt_shape(self._wave.prompt_len)
        each = sum(self._costs.op_cost(op, self._spec, shape).seconds for op in graph.ops)
        return self._wave.num_seqs * each

    def prefill_terms(self, graphs: TierGraphs) -> PhaseTerms:
        """What the seconds of `prefill` are made of."""
        return self._terms(graphs, [(step.num_steps, price) for step, price in self._steps])

    def decode_terms(self, graphs: TierGraphs) -> PhaseTerms:
        """What the seconds of `decode_step_s` are made of."""
        return self._terms(graphs, self._decode_steps(graphs))

    def _terms(self, graphs: TierGraphs, steps: list[tuple[float, Pricer]]) -> PhaseTerms:
        """Add up steps, each so many times; the bottleneck is the costliest one's."""
        terms: dict[TimelineTerm, float] = dict.fromkeys(TERMS, 0.0)
        found: dict[str, float] = {}
        sigmas: dict[str, float] = {}
        sources: dict[Source, float] = dict.fromkeys(SOURCES, 0.0)
        costliest_s, bottleneck = -1.0, "none"
        for num_steps, price in steps:
            graph = graphs.of(price.shape)
            timeline = simulate(graph, price, self._slowdowns)
            for term, seconds in timeline.by_term().items():
                terms[term] += num_steps * seconds
            for span in timeline.critical_path():
                key, seconds = f"{span.op.lane} {span.op.term}", num_steps * span.seconds
                found[key] = found.get(key, 0.0) + seconds
                sigmas[key] = sigmas.get(key, 0.0) + seconds * price.sigma(span.op)
                sources[price.cost(span.op).source] += seconds
            host, host_s = price.host_cost, num_steps * price.host_s
            terms["host"] += host_s
            found["host"] = found.get("host", 0.0) + host_s
            sigmas["host"] = sigmas.get("host", 0.0) + host_s * price.host_sigma
            sources[host.source] += host_s
            if num_steps * timeline.makespan_s > costliest_s:
                costliest_s = num_steps * timeline.makespan_s
                bottleneck = timeline.bottleneck()
        return PhaseTerms(
            terms=terms, bottleneck=bottleneck, seconds=found, sigmas=sigmas, sources=sources
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """The three times of a workload."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


def latency(
    prefill: PrefillCost, decode_step_s: float, move_s: float, workload: Workload, num_waves: int
) -> Latency:
    """Times of a workload that runs in waves: prefill of a wave, KV moves, then its decode."""
    num_steps = workload.output_len - 1
    wave_s = prefill.seconds + move_s + num_steps * decode_step_s
    return Latency(
        # A sequence sees its first token when its own prompt ends; later waves wait for earlier.
        ttft_s=prefill.mean_first_s + (num_waves - 1) / 2 * wave_s,
        tpot_s=(wave_s - prefill.mean_first_s) / num_steps if num_steps else 0.0,
        e2e_s=num_waves * wave_s,
    )


def num_waves(workload: Workload, num_concurrent: int) -> int:
    """Waves of up to `num_concurrent` sequences; the last one is priced as if it were full."""
    return -(-workload.num_seqs // num_concurrent)


def estimate(
    spec: ModelSpec,
    placement: Placement,
    costs: CostModel,
    workload: Workload,
    memory: dict[Device, DeviceMemory] | None = None,
    *,
    num_concurrent: int | None = None,
    backends: Backends | None = None,
) -> Estimate:
    """Predict a workload under a placement.

    Parameters
    ----------
    num_concurrent : int, optional
        Sequences that run at once; all of the workload's where it is left out.
    backends : Backends, optional
        Who computes the CPU's products, as loaded; chosen for the workload where it is left out.
    """
    concurrent = num_concurrent or workload.num_seqs
    wave = Workload(
        prompt_len=workload.prompt_len, output_len=workload.output_len, num_seqs=concurrent
    )
    graphs = TierGraphs(spec, placement)
    pricer = WavePricer(spec, costs, wave, placement.prefill.max_num_tokens, backends)
    prefill = pricer.prefill(graphs)
    decode_step_s = pricer.decode_step_s(graphs)
    move_s = pricer.placement_move_s(placement)
    times = latency(prefill, decode_step_s, move_s, workload, num_waves(workload, concurrent))
    prefill_terms, decode_terms = (
        pricer.prefill_terms(graphs),
        pricer.decode_terms(graphs),
    )
    prefill_terms.terms["transfer"] += move_s
    by_phase: dict[Phase, PhaseTerms] = {"prefill": prefill_terms, "decode": decode_terms}
    return Estimate(
        ttft_s=times.ttft_s,
        tpot_s=times.tpot_s,
        e2e_s=times.e2e_s,
        prefill_tokens_per_s=concurrent * workload.prompt_len / prefill.seconds,
        decode_tokens_per_s=concurrent / decode_step_s,
        num_concurrent_seqs=concurrent,
        bytes_by_device={device: need.needed_bytes for device, need in (memory or {}).items()},
        terms_by_phase={phase: found.terms for phase, found in by_phase.items()},
        bottleneck_by_phase={phase: found.bottleneck for phase, found in by_phase.items()},
        band_by_metric=_bands(times, by_phase),
        source_by_phase={phase: found.source_shares for phase, found in by_phase.items()},
        calibrated_runs=costs.corrections.num_runs,
        correction_by_phase={
            phase: {
                key: factor
                for key, factor in costs.corrections.factors(phase).items()
                if key in found.seconds
            }
            for phase, found in by_phase.items()
        },
    )


def _bands(
    times: Latency, by_phase: dict[Phase, PhaseTerms]
) -> dict[TimeMetric, tuple[float, float]]:
    """10th and 90th percentile of each time, as if it were log-normal."""
    first, later = (by_phase[phase].sigma for phase in PHASES)
    # what both phases are off by may have one cause: their errors add up
    decode_s = max(0.0, times.e2e_s - times.ttft_s)
    both = (first * times.ttft_s + later * decode_s) / (times.ttft_s + decode_s)
    parts: dict[TimeMetric, tuple[float, float]] = {
        "ttft_s": (times.ttft_s, first),
        "tpot_s": (times.tpot_s, later),
        "e2e_s": (times.e2e_s, both),
    }
    factors = {metric: math.exp(P90_SIGMAS * sigma) for metric, (_, sigma) in parts.items()}
    return {
        metric: (seconds / factors[metric], seconds * factors[metric])
        for metric, (seconds, _) in parts.items()
    }


def _size(shape: BatchShape) -> tuple[int, int, int]:
    """What two steps must share to differ in their past only."""
    return (shape.num_tokens, shape.num_seqs, shape.num_logits)


def _with_past(shape: BatchShape, num_past_tokens: float) -> BatchShape:
    return BatchShape(
        phase=shape.phase,
        num_tokens=shape.num_tokens,
        num_seqs=shape.num_seqs,
        num_past_tokens=num_past_tokens,
        num_logits=shape.num_logits,
    )


def _spread(pasts: list[float]) -> list[float]:
    """A few of some ascending pasts, evenly spread, both ends included."""
    last = len(pasts) - 1
    if last < _MAX_PRICED_PASTS:
        return pasts
    steps = _MAX_PRICED_PASTS - 1
    return [pasts[round(index * last / steps)] for index in range(_MAX_PRICED_PASTS)]


def _between(pasts: list[float], past: float) -> list[tuple[float, float]]:
    """The ascending pasts beside one that lies between them, each with its share."""
    position = bisect_left(pasts, past)
    after = pasts[position]
    if after == past:
        return [(past, 1.0)]
    before = pasts[position - 1]
    share = (past - before) / (after - before)
    return [(before, 1.0 - share), (after, share)]

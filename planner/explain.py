"""Explain: what binds a plan, where its GPU memory goes, what more would gain, what would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from planner.candidate import Candidate
from planner.kernels import Resource
from planner.memory import DeviceMemory, streamed_bytes, weight_bytes_by_module
from planner.model_spec import Module
from planner.nearest_fit import FittingChange, nearest_fits
from planner.placement import NUM_STREAM_BUFFERS
from planner.plan import Plan
from planner.question import Question
from planner.simulate import simulate
from planner.step_graph import Lane, build_kv_move
from planner.timeline import Timeline, TimelineTerm
from planner.what_if import RATES, Rate, what_if, with_more_gpu_memory, with_rates
from planner.workload import PHASES, Phase

__all__ = [
    "Binding",
    "Explanation",
    "FittingChange",
    "Gain",
    "GpuMemory",
    "bindings",
    "explain",
    "gains",
    "gpu_memory",
    "nearest_fits",
    "step_timelines",
    "what_if",
]

# `router` is the router and the experts that every token takes; `slots` are for experts that split
# layers copy; `staging` is for weights that are streamed.
GpuUse = Module | Literal["kv", "activations", "staging", "slots", "free"]
Gained = Rate | Literal["gpu memory size"]

_NUM_BINDINGS = 4
_MORE_BYTES = 1_000_000_000
_MORE_RATE = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """One part of a phase's critical path.

    Attributes
    ----------
    lane : Lane or 'host'
        What works; `host` is what a step takes beside its ops.
    term : TimelineTerm
        What is done.
    resource : Resource
        What bounds most of its seconds.
    seconds : float
        Of all prefill steps of the sequences that run at once and the move of their caches, or of
        one decode step at mean context.
    share : float
        Of the phase's seconds.
    """

    lane: Lane | Literal["host"]
    term: TimelineTerm
    resource: Resource
    seconds: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Where the GPU memory that a plan may use goes; the uses add up to it.

    Attributes
    ----------
    bytes_by_use : dict
        Weights by module (a matrix that embedding and head share counts for the head), caches,
        and what is free, which is below 0 where the plan does not fit.
    available_bytes : int
        What the plan may use in all.
    kept_back_bytes : int
        The rest of the card: the runtime's part and the margin.
    """

    bytes_by_use: dict[GpuUse, int]
    available_bytes: int
    kept_back_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a plan gains where the machine has more of one thing.

    Attributes
    ----------
    of : Gained
        1e9 bytes more GPU memory, or a tenth more of a rate.
    e2e_s, decode_tokens_per_s : float
        As planned anew, or with the same placement where that is faster.
    saved_s, gained_tokens_per_s : float
        What is less, and more, than the plan's.
    placement : str
        Name of the placement.
    """

    of: Gained
    e2e_s: float
    decode_tokens_per_s: float
    saved_s: float
    gained_tokens_per_s: float
    placement: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What binds each phase, where GPU memory goes, what more gains, and what would have fitted.

    `gpu_memory` is None without a GPU, `gains` are empty where nothing fits, and `nearest_fits`
    where something does.
    """

    bindings_by_phase: dict[Phase, tuple[Binding, ...]]
    gpu_memory: GpuMemory | None
    gains: tuple[Gain, ...]
    nearest_fits: tuple[FittingChange, ...]


def explain(plan: Plan, question: Question) -> Explanation:
    """Explain the answer to a question; it takes as many searches as there are gains.

    Examples
    --------
    >>> question = Question(spec=spec, hardware=hardware, workload=workload)  # doctest: +SKIP
    >>> explain(question.plan(), question).gains[0].saved_s  # doctest: +SKIP
    0.41
    """
    return Explanation(
        bindings_by_phase={phase: bindings(plan, question, phase) for phase in PHASES},
        gpu_memory=gpu_memory(plan, question),
        gains=gains(plan, question) if plan.feasible else (),
        nearest_fits=() if plan.feasible else nearest_fits(question),
    )


def bindings(
    plan: Plan, question: Question, phase: Phase, max_number: int = _NUM_BINDINGS
) -> tuple[Binding, ...]:
    """The parts of a phase's critical path that take longest, longest first."""
    found: dict[tuple[Lane | Literal["host"], TimelineTerm], dict[Resource, float]] = {}
    for lane, term, resource, seconds in _critical_parts(question.candidate(plan), phase):
        by_resource = found.setdefault((lane, term), {})
        by_resource[resource] = by_resource.get(resource, 0.0) + seconds
    total_s = sum(sum(by_resource.values()) for by_resource in found.values())
    parts = [
        Binding(
            lane=lane,
            term=term,
            resource=max(by_resource, key=lambda name: by_resource[name]),
            seconds=sum(by_resource.values()),
            share=sum(by_resource.values()) / total_s if total_s > 0 else 0.0,
        )
        for (lane, term), by_resource in found.items()
    ]
    return tuple(sorted(parts, key=lambda part: -part.seconds)[:max_number])


def _critical_parts(
    candidate: Candidate, phase: Phase
) -> Iterator[tuple[Lane | Literal["host"], TimelineTerm, Resource, float]]:
    """Lane, term, resource and seconds of every op on the critical paths of a phase's steps."""
    graphs, slowdowns = candidate.graphs, candidate.wave.costs.slowdowns
    for count, price in candidate.pricer.steps(phase):
        num_steps = 1.0 if phase == "decode" else count
        graph = graphs.of(price.shape)
        for span in simulate(graph, price, slowdowns).critical_path():
            cost = price.cost(span.op)
            for resource, part_s in cost.by_resource.items():
                share = part_s / cost.seconds if cost.seconds > 0 else 0.0
                yield span.op.lane, span.op.term, resource, num_steps * share * span.seconds
        yield "host", "host", price.host_cost.bound, num_steps * price.host_s
    if phase == "prefill" and candidate.move_s > 0:
        placement = candidate.placement
        numbers = (0, 1) if placement.decode.num_second_seqs else (0,)
        moves = [
            op
            for sub_batch in numbers
            for op in build_kv_move(placement.prefill, placement.decode, sub_batch=sub_batch).ops
        ]
        for op in moves:
            yield op.lane, "transfer", "link", candidate.move_s / len(moves)


def step_timelines(plan: Plan, question: Question) -> dict[Phase, Timeline]:
    """The predicted Timeline of the step that takes longest of each phase."""
    candidate = question.candidate(plan)
    slowdowns = candidate.wave.costs.slowdowns
    return {
        phase: max(
            (
                simulate(candidate.graphs.of(price.shape), price, slowdowns)
                for _, price in candidate.pricer.steps(phase)
            ),
            key=lambda timeline: timeline.makespan_s,
        )
        for phase in PHASES
    }


def gpu_memory(plan: Plan, question: Question) -> GpuMemory | None:
    """Where the GPU memory that a plan may use goes; None without a GPU."""
    gpu = question.hardware.gpu
    if gpu is None:
        return None
    need = question.candidate(plan).memory["gpu"]
    weights = weight_bytes_by_module(question.spec, plan.placement, "gpu")
    uses = dict[GpuUse, int](weights.items()) | {
        "kv": need.kv_bytes,
        "activations": need.activation_bytes,
        **_staging_by_use(plan, question, need),
        "free": need.available_bytes - need.needed_bytes,
    }
    return GpuMemory(
        bytes_by_use={use: size for use, size in uses.items() if size or use == "free"},
        available_bytes=need.available_bytes,
        kept_back_bytes=gpu.memory_bytes - need.available_bytes,
    )


def _staging_by_use(plan: Plan, question: Question, need: DeviceMemory) -> dict[GpuUse, int]:
    """Buffers for streamed weights and slots for copied experts, of the tier that takes most."""
    spec, placement = question.spec, plan.placement
    staging = max(
        NUM_STREAM_BUFFERS
        * max(streamed_bytes(spec, tier, each) for each in range(spec.num_layers))
        for tier in placement.tiers
    )
    return {"staging": staging, "slots": need.staging_bytes - staging}


def gains(plan: Plan, question: Question) -> tuple[Gain, ...]:
    """What a plan would gain with 1e9 bytes more GPU memory, and with a tenth more of each rate.

    Each is planned anew; where the search finds nothing faster than the plan's own placement on the
    changed machine, that is what counts. A gain may hold what the search had missed on the machine
    as it is: a share `plan.optimality_gap` at most. Only the link's may be below 0: faster copies
    take more of the host memory's rate from the CPU while they run, also those that nothing waits
    for.
    """
    return tuple(_gain(plan, question, of) for of in _gainable(question))


def _gainable(question: Question) -> tuple[Gained, ...]:
    if question.hardware.gpu is None:
        return ("cpu memory", "cpu compute")
    return ("gpu memory size", *RATES)


def _gain(plan: Plan, question: Question, of: Gained) -> Gain:
    hardware = (
        with_more_gpu_memory(question.hardware, _MORE_BYTES)
        if of == "gpu memory size"
        else with_rates(question.hardware, of, _MORE_RATE)
    )
    changed = dataclasses.replace(question, hardware=hardware)
    anew, same = changed.plan(), changed.candidate(plan)
    e2e_s, tokens_per_s = anew.estimate.e2e_s, anew.estimate.decode_tokens_per_s
    name = anew.placement.name
    if same.times.e2e_s < e2e_s:
        e2e_s, name = same.times.e2e_s, plan.placement.name
        tokens_per_s = plan.estimate.num_concurrent_seqs / same.decode_step_s
    return Gain(
        of=of,
        e2e_s=e2e_s,
        decode_tokens_per_s=tokens_per_s,
        saved_s=plan.estimate.e2e_s - e2e_s,
        gained_tokens_per_s=tokens_per_s - plan.estimate.decode_tokens_per_s,
        placement=name,
    )

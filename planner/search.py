"""Search: the fastest placement that fits, over every named strategy, cut point and phase."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from msgspec.structs import replace

from planner.calibration import NO_CORRECTIONS, Corrections
from planner.cost_model import CostModel
from planner.errors import PlannerError
from planner.estimate import (
    Latency,
    PhaseTerms,
    PrefillCost,
    WavePricer,
    estimate,
    latency,
    num_waves,
)
from planner.hardware import HardwareProfile
from planner.memory import DeviceMemory, ModelBytes, TierFacts, WaveMemory
from planner.model_spec import ModelSpec
from planner.placement import Device, Placement, TierPlacement, pair_name
from planner.plan import Alternative, Plan
from planner.popularity import Popularity
from planner.priors import P90_SIGMAS
from planner.step_graph import StepGraph, build, build_kv_move
from planner.strategies import STRATEGIES, candidates
from planner.workload import DEFAULT_CHUNK_TOKENS, PHASES, Objective, Phase, Workload


class _Tier:
    """A candidate, for either phase; its graph is built when it is first priced."""

    def __init__(self, tier: TierPlacement, spec: ModelSpec, sizes: ModelBytes) -> None:
        self.facts = TierFacts.of(tier, spec, sizes)
        self._spec = spec

    @property
    def strategy(self) -> str:
        return self.facts.tier.strategy

    @property
    def cut(self) -> int:
        return self.facts.tier.cut

    def placement(self, phase: Phase) -> TierPlacement:
        return replace(self.facts.tier, phase=phase)

    @cached_property
    def graph(self) -> StepGraph:
        return build(self._spec, self.facts.tier)


class _Wave:
    """Memory and prices for sequences in waves of one size; every tier is priced at most once."""

    def __init__(
        self,
        spec: ModelSpec,
        sizes: ModelBytes,
        costs: CostModel,
        workload: Workload,
        num_concurrent: int,
        chunk_tokens: int,
    ) -> None:
        wave = replace(workload, num_seqs=num_concurrent)
        self.num_concurrent = num_concurrent
        self.memory = WaveMemory(spec, sizes, wave, costs.hardware)
        self.pricer = WavePricer(spec, costs, wave, chunk_tokens)
        self._workload = workload
        self._num_waves = num_waves(workload, num_concurrent)
        self._prefills: dict[_Tier, PrefillCost] = {}
        self._decode_steps_s: dict[_Tier, float] = {}
        self._moves_s: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}

    def prefill_cost(self, tier: _Tier) -> PrefillCost:
        if tier not in self._prefills:
            self._prefills[tier] = self.pricer.prefill(tier.graph)
        return self._prefills[tier]

    def decode_step_s(self, tier: _Tier) -> float:
        if tier not in self._decode_steps_s:
            self._decode_steps_s[tier] = self.pricer.decode_step_s(tier.graph)
        return self._decode_steps_s[tier]

    def move_s(self, prefill: _Tier, decode: _Tier) -> float:
        """Seconds of moving the KV of all sequences between the phases."""
        before, after = prefill.facts.kv_layers["gpu"], decode.facts.kv_layers["gpu"]
        # How many of each kind of cache go up and how many go down is all that counts.
        ups = self.memory.kv_layer_counts(after & ~before)
        counts = (ups, self.memory.kv_layer_counts(before & ~after))
        if counts not in self._moves_s:
            graph = build_kv_move(prefill.facts.tier, decode.facts.tier)
            self._moves_s[counts] = self.pricer.kv_move_s(graph)
        return self._moves_s[counts]

    def latency(self, prefill: _Tier, decode: _Tier) -> Latency:
        return latency(
            self.prefill_cost(prefill),
            self.decode_step_s(decode),
            self.move_s(prefill, decode),
            self._workload,
            self._num_waves,
        )

    def uncertain_s(
        self, prefill: _Tier, decode: _Tier
    ) -> dict[tuple[str, Phase], tuple[float, float]]:
        """Seconds by lane, term and phase, each with its standard deviation."""
        found: dict[tuple[str, Phase], tuple[float, float]] = {}
        parts: tuple[tuple[Phase, PhaseTerms, int], ...] = (
            ("prefill", self.pricer.prefill_terms(prefill.graph), 1),
            ("decode", self.pricer.decode_terms(decode.graph), self._workload.output_len - 1),
        )
        for phase, terms, num_steps in parts:
            times = self._num_waves * num_steps
            for key, seconds in terms.seconds.items():
                found[key, phase] = (times * seconds, times * terms.sigmas[key])
        return found

    def seconds_by_phase(self, prefill: _Tier, decode: _Tier) -> dict[Phase, float]:
        """Seconds that the workload spends in each phase, KV moves in the first."""
        prefill_s = self.prefill_cost(prefill).seconds + self.move_s(prefill, decode)
        decode_s = (self._workload.output_len - 1) * self.decode_step_s(decode)
        return {"prefill": self._num_waves * prefill_s, "decode": self._num_waves * decode_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A prefill tier and a decode tier for sequences in waves of one size."""

    prefill: _Tier
    decode: _Tier
    wave: _Wave

    @property
    def name(self) -> str:
        return pair_name(self.prefill.strategy, self.decode.strategy)

    @property
    def placement(self) -> Placement:
        return Placement(
            prefill=self.prefill.placement("prefill"), decode=self.decode.placement("decode")
        )

    @property
    def memory(self) -> dict[Device, DeviceMemory]:
        return self.wave.memory.needs(self.prefill.facts, self.decode.facts)

    @property
    def lacking_bytes(self) -> int:
        return self.wave.memory.lacking_bytes(self.prefill.facts, self.decode.facts)

    @property
    def times(self) -> Latency:
        return self.wave.latency(self.prefill, self.decode)

    @property
    def complexity(self) -> int:
        """0 on one device, 1 with one strategy for both phases, 2 with two."""
        if self.prefill.strategy != self.decode.strategy:
            return 2
        return 0 if self.prefill.strategy in ("gpu", "cpu") else 1

    @property
    def uncertain_s(self) -> dict[tuple[str, Phase], tuple[float, float]]:
        """Seconds of the workload by lane, term and phase, each with its standard deviation."""
        return self.wave.uncertain_s(self.prefill, self.decode)

    @property
    def rank(self) -> tuple[float, bool, int, int]:
        """Fastest first; of equals one strategy for both phases, then the smaller cuts."""
        is_mixed = self.prefill.strategy != self.decode.strategy
        return (self.times.e2e_s, is_mixed, self.prefill.cut, self.decode.cut)


def search(
    spec: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    objective: Objective = "latency",
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    strategy: str | None = None,
    corrections: Corrections = NO_CORRECTIONS,
    popularity: Popularity | None = None,
    prefers_simple: bool = True,
) -> Plan:
    """Find the placement with the lowest time for a workload that fits the machine's memory.

    The space is every pair of (prefill tier, decode tier) of the named strategies with all their
    cut points; weights that either tier wants on a device are resident there, KV that changes
    device between the phases is moved and charged. Every pair that fits is priced, which is
    exhaustive.

    Parameters
    ----------
    spec, hardware, workload
        The model, the machine and what is to be run.
    objective : {'latency', 'throughput'}
        `latency` runs all sequences at once. `throughput` may also run them in waves of a half,
        a quarter, ... where that fits a faster placement.
    chunk_tokens : int
        New tokens of one prefill step at most.
    strategy : str, optional
        Only this named strategy, in both phases (its cut points are still searched).
    corrections : Corrections
        What earlier runs say that predictions must be multiplied with.
    popularity : Popularity, optional
        How often each expert is chosen; None: as it usually is.
    prefers_simple : bool
        Take the fastest only where it gains more than the predictions may be off by (the 90th
        percentile of the error of the difference); otherwise the fastest of the simpler ones: one
        device before one strategy before two strategies. `optimality_gap` says what that costs.

    Returns
    -------
    Plan
        `feasible` is false where nothing fits; the placement is then the nearest miss.

    Examples
    --------
    >>> from planner import HardwareProfile, ModelSpec, Workload, search  # doctest: +SKIP
    >>> plan = search(spec, hardware, Workload(prompt_len=512, output_len=128))  # doctest: +SKIP
    >>> plan.placement.name  # doctest: +SKIP
    'experts-on-cpu'
    """
    if strategy is not None and strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise PlannerError(f"strategy {strategy!r} is not one of {known}")
    costs = CostModel(hardware, corrections=corrections, popularity=popularity)
    sizes = ModelBytes(spec)
    names = tuple(STRATEGIES) if strategy is None else (strategy,)
    # Strategies place both phases alike, so one list of candidates serves both.
    tiers = [
        _Tier(tier, spec, sizes)
        for tier in candidates(
            spec,
            "prefill",
            has_gpu=hardware.gpu is not None,
            chunk_tokens=chunk_tokens,
            names=names,
        )
    ]
    if not tiers:
        raise PlannerError(
            f"strategy {strategy!r} does not apply: {_no_candidates(spec, hardware)}"
        )
    waves = [
        _Wave(spec, sizes, costs, workload, num_concurrent, chunk_tokens)
        for num_concurrent in _wave_sizes(workload, objective)
    ]
    fitting, nearest = _candidates(waves, tiers)
    chosen = _preferred(fitting) if fitting and prefers_simple else [*fitting, *nearest][0]
    fastest = fitting[0] if fitting else chosen
    others = [pair for pair in (*fitting, *nearest) if pair is not chosen]
    placement = chosen.placement
    return Plan(
        model=spec.name,
        model_fingerprint=spec.fingerprint,
        profile=hardware.name,
        profile_fingerprint=profile_fingerprint(hardware),
        resources=hardware.resources,
        workload=workload,
        objective=objective,
        feasible=bool(fitting),
        placement=placement,
        estimate=estimate(
            spec,
            placement,
            costs,
            workload,
            chosen.memory,
            num_concurrent=chosen.wave.num_concurrent,
        ),
        optimality_gap=1.0 - fastest.times.e2e_s / chosen.times.e2e_s,
        alternatives=tuple(_alternative(pair, chosen) for pair in others),
    )


def _candidates(waves: list[_Wave], tiers: list[_Tier]) -> tuple[list[_Pair], list[_Pair]]:
    """The best pair of each name: those that fit by rising seconds, and the nearest misses.

    A pair needs at least the memory of either tier in its own phase, so that most pairs of a model
    that is larger than its GPU are seen not to fit without being looked at; they are when nothing
    of their name fits.
    """
    found = [
        _Pair(prefill=prefill, decode=decode, wave=wave)
        for wave in waves
        for decodes in [_that_fit(wave, tiers, "decode")]
        for prefill in _that_fit(wave, tiers, "prefill")
        for decode in decodes
    ]
    fitting, _ = _best_by_name(found)
    names = {pair.name for pair in fitting}
    _, nearest = _best_by_name(
        _Pair(prefill=prefill, decode=decode, wave=wave)
        for wave in waves
        for prefill in tiers
        for decode in tiers
        if pair_name(prefill.strategy, decode.strategy) not in names
    )
    return fitting, nearest


def _that_fit(wave: _Wave, tiers: list[_Tier], phase: Phase) -> list[_Tier]:
    return [tier for tier in tiers if wave.memory.fits_alone(tier.facts, phase)]


def _best_by_name(pairs: Iterable[_Pair]) -> tuple[list[_Pair], list[_Pair]]:
    """Of each name the fastest pair that fits, by price; of the others the nearest miss.

    The nearest miss lacks the fewest bytes and is the fastest of those. Only pairs that fit or are
    nearest are priced.
    """
    fitting: dict[str, _Pair] = {}
    lacking: dict[str, int] = {}
    misses: dict[str, list[_Pair]] = {}
    for pair in pairs:
        name, num_bytes = pair.name, pair.lacking_bytes
        if num_bytes == 0:
            if name not in fitting or pair.rank < fitting[name].rank:
                fitting[name] = pair
        elif name not in lacking or num_bytes < lacking[name]:
            lacking[name], misses[name] = num_bytes, [pair]
        elif num_bytes == lacking[name]:
            misses[name].append(pair)
    missed = [name for name in misses if name not in fitting]
    nearest = {name: min(misses[name], key=lambda pair: pair.rank) for name in missed}
    missed.sort(key=lambda name: (lacking[name], nearest[name].rank))
    return (
        sorted(fitting.values(), key=lambda pair: pair.rank),
        [nearest[name] for name in missed],
    )


def _preferred(fitting: list[_Pair]) -> _Pair:
    """Of pairs by rising seconds the fastest, unless a simpler one may well be as fast."""
    fastest = fitting[0]
    for pair in sorted(fitting, key=lambda pair: (pair.complexity, pair.rank)):
        if pair.complexity >= fastest.complexity:
            return fastest
        if pair.times.e2e_s - fastest.times.e2e_s <= _error_of_gain(pair, fastest):
            return pair
    return fastest


def _error_of_gain(pair: _Pair, fastest: _Pair) -> float:
    """90th percentile of how far the predicted difference of two pairs may be off, in seconds.

    What both do on one lane is off by one factor in both, so that only differences count.
    """
    variance = 0.0
    ours, theirs = pair.uncertain_s, fastest.uncertain_s
    for key in ours.keys() | theirs.keys():
        seconds, sigma_s = ours.get(key, (0.0, 0.0))
        best_s, best_sigma_s = theirs.get(key, (0.0, 0.0))
        relative = max(
            sigma_s / seconds if seconds > 0 else 0.0,
            best_sigma_s / best_s if best_s > 0 else 0.0,
        )
        variance += (relative * (seconds - best_s)) ** 2
    return P90_SIGMAS * math.sqrt(variance)


def _no_candidates(spec: ModelSpec, hardware: HardwareProfile) -> str:
    if hardware.gpu is None:
        return "the machine has no accelerator"
    return f"{spec.name} has no experts"


def profile_fingerprint(hardware: HardwareProfile) -> str:
    """Sixteen hex digits over the machine that a profile describes, rates left out.

    Two measurements of one machine agree; another CPU, GPU, or memory size does not.
    """
    facts: list[object] = [hardware.cpu.name]
    if hardware.fingerprint is not None:
        # A kernel update moves the memory limit by megabytes.
        gibibytes = round(hardware.fingerprint.memory_bytes / 2**30)
        facts += [hardware.fingerprint.num_cores, gibibytes]
    if hardware.gpu is not None:
        facts += [hardware.gpu.name, hardware.gpu.kind]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _wave_sizes(workload: Workload, objective: Objective) -> list[int]:
    """Numbers of sequences that may run at once: all, or halves of them for throughput."""
    sizes = [workload.num_seqs]
    while objective == "throughput" and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _alternative(pair: _Pair, chosen: _Pair) -> Alternative:
    """One row of what was not chosen, with the reason."""
    fits, times = pair.lacking_bytes == 0, pair.times
    return Alternative(
        name=pair.name,
        cut_by_phase={"prefill": pair.prefill.cut, "decode": pair.decode.cut},
        feasible=fits,
        ttft_s=times.ttft_s,
        tpot_s=times.tpot_s,
        e2e_s=times.e2e_s,
        reason=_why_slower(pair, chosen) if fits else _why_not(pair.memory),
    )


def _why_slower(pair: _Pair, chosen: _Pair) -> str:
    """Which phase lost more seconds, by how much all is slower, and what bound that phase."""
    ours = pair.wave.seconds_by_phase(pair.prefill, pair.decode)
    best = chosen.wave.seconds_by_phase(chosen.prefill, chosen.decode)
    phase: Phase = max(PHASES, key=lambda phase: ours[phase] - best[phase])
    pricer = pair.wave.pricer
    terms = (
        pricer.prefill_terms(pair.prefill.graph)
        if phase == "prefill"
        else pricer.decode_terms(pair.decode.graph)
    )
    ratio = pair.times.e2e_s / chosen.times.e2e_s
    if ratio < 0.995:
        return f"{ratio:.2f}x the time, a gain within the error of the prediction"
    if ratio < 1.005:
        return f"as fast within 0.5%; {phase} bound by {terms.bottleneck}"
    return f"{ratio:.2f}x the time; {phase} bound by {terms.bottleneck}"


def _why_not(memory: dict[Device, DeviceMemory]) -> str:
    """What is missing where."""
    parts = [
        f"needs {need.needed_bytes / 1e9:.2f} GB on the {device}, "
        f"{need.available_bytes / 1e9:.2f} GB available"
        for device, need in memory.items()
        if not need.fits
    ]
    return "; ".join(parts)

"""Search: the fastest placement that fits, and a proof of how far from it the best could be."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from msgspec.structs import replace

from planner.cache_fronts import with_fronts
from planner.calibration import NO_CORRECTIONS, Corrections
from planner.candidate import Candidate, Wave
from planner.cost_model import CostModel
from planner.errors import PlannerError
from planner.estimate import estimate
from planner.hardware import HardwareProfile
from planner.memory import DeviceMemory
from planner.model_spec import ModelSpec
from planner.placement import MIXED, Device, Placement
from planner.plan import Alternative, Plan
from planner.popularity import Popularity
from planner.priors import P90_SIGMAS
from planner.rival_placements import ENGINES, Asked
from planner.strategies import STRATEGIES, cuts, placement
from planner.tiers import has_smaller_steps, with_smaller_tiers
from planner.workload import DEFAULT_CHUNK_TOKENS, PHASES, Objective, Phase, Workload

# New tokens of a prefill step that are tried.
CHUNK_TOKENS = (256, 512, 1024, 2048, 4096, 8192)


def search(
    spec: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    objective: Objective = "latency",
    *,
    chunk_tokens: int | None = None,
    strategy: str | None = None,
    corrections: Corrections = NO_CORRECTIONS,
    popularity: Popularity | None = None,
    prefers_simple: bool = True,
) -> Plan:
    """Find the placement with the lowest time for a workload that fits the machine's memory.

    The space is every choice, layer by layer and phase by phase, of where attention (with its KV),
    the router, the dense feed-forward and the experts run, how many experts of each layer are
    resident on the GPU, or how many shares of a dense feed-forward's columns, and of the tokens of
    a prefill step. Where caches take 2 % of the GPU's memory or more they may be on the CPU beside
    projections on the GPU, and decode steps may run as two sub-batches of a few sizes. Weights lie
    where both phases need them; KV that changes device between the phases is moved and charged.
    Named strategies are alternatives, and what is chosen is never slower than the fastest of them.
    At the end caches are divided between the devices where that gains 1 % (`cache_fronts.py`),
    which is outside of the space.

    Parameters
    ----------
    spec, hardware, workload
        The model, the machine and what is to be run.
    objective : {'latency', 'throughput'}
        `latency` runs all sequences at once. `throughput` may also run them in waves of a half,
        a quarter, ... where that fits a faster placement.
    chunk_tokens : int, optional
        New tokens of one prefill step at most; chosen where it is left out.
    strategy : str, optional
        Only this named strategy (its cut point is still searched).
    corrections : Corrections
        What earlier runs say that predictions must be multiplied with.
    popularity : Popularity, optional
        How often each expert is chosen; None: as it usually is.
    prefers_simple : bool
        Take the fastest only where it gains more than the predictions may be off by (the 90th
        percentile of the error of the difference); otherwise the fastest of the simpler ones: one
        device before one strategy before any other placement.

    Returns
    -------
    Plan
        `feasible` is false where nothing fits; the placement is then the nearest miss. No placement
        of the space gains more than the share `optimality_gap` over the one that is chosen, as the
        cost model prices them.

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
    if workload.context_len > spec.max_position_embeddings:
        raise PlannerError(
            f"prompt and output come to {workload.context_len} tokens but {spec.name} has a "
            f"context of {spec.max_position_embeddings}; lower prompt_len or output_len"
        )
    costs = CostModel(hardware, corrections=corrections, popularity=popularity)
    waves = [Wave(spec, costs, workload, each) for each in wave_sizes(workload, objective)]
    chunks = _chunks(workload, hardware) if chunk_tokens is None else (chunk_tokens,)
    named = _named(waves, chunks[-1], strategy)
    if not named:
        raise PlannerError(
            f"strategy {strategy!r} does not apply: {_no_candidates(spec, hardware)}"
        )
    fitting = [each for each in named if each.lacking_bytes == 0]
    if strategy is None and hardware.gpu is not None:
        fitting += _of_other_engines(waves)
    bound_s = min((each.times.e2e_s for each in fitting), default=math.inf)
    if strategy is None and hardware.gpu is not None:
        # Here because it brings numpy, which takes longer to load than all else together.
        from planner.mixed_search import mixed_search

        for wave in waves:
            for some, is_apart in _apart(wave, chunks):
                known_s = min((each.times.e2e_s for each in fitting), default=math.inf)
                found = mixed_search(wave, some, math.inf if is_apart else known_s)
                fitting += found.candidates
                bound_s = min(bound_s, found.bound_s)
                if is_apart and found.candidates:
                    fastest = min(found.candidates, key=lambda each: each.times.e2e_s)
                    fitting.append(with_smaller_tiers(fastest))
    fitting = _best_by_name(fitting)
    # a placement without a name is worth telling of where it is the fastest
    fitting = [each for each in fitting if each.name in STRATEGIES or each is fitting[0]]
    names = {each.name for each in fitting}
    nearest: dict[str, Candidate] = {}
    for each in sorted(named, key=lambda each: each.lacking_bytes):
        if each.lacking_bytes and each.name not in names:
            nearest.setdefault(each.name, each)
    chosen = _preferred(fitting) if fitting and prefers_simple else [*fitting, *nearest.values()][0]
    others = [each for each in (*fitting, *nearest.values()) if each is not chosen]
    if fitting and strategy is None:
        divided = _with_fronts(chosen, prefers_simple=prefers_simple)
        if divided is not chosen or not chosen.placement.smaller:
            chosen = with_smaller_tiers(divided)
    return Plan(
        model=spec.name,
        model_fingerprint=spec.fingerprint,
        profile=hardware.name,
        profile_fingerprint=profile_fingerprint(hardware),
        resources=hardware.resources,
        workload=workload,
        objective=objective,
        feasible=bool(fitting),
        placement=chosen.placement,
        estimate=estimate(
            spec,
            chosen.placement,
            costs,
            workload,
            chosen.memory,
            num_concurrent=chosen.wave.num_concurrent,
        ),
        optimality_gap=max(0.0, 1.0 - bound_s / chosen.times.e2e_s) if fitting else 0.0,
        alternatives=tuple(_alternative(each, chosen) for each in others),
    )


def _apart(wave: Wave, chunks: Sequence[int]) -> list[tuple[tuple[int, ...], bool]]:
    """Chunks that are searched together, and by itself (True) each that leaves smaller steps.

    How fast these are is known when a placement has tiers for them.
    """
    alone = [size for size in chunks if has_smaller_steps(wave.pricer(size))]
    together = tuple(size for size in chunks if size not in alone)
    return [*([(together, False)] if together else []), *(((size,), True) for size in alone)]


def _chunks(workload: Workload, hardware: HardwareProfile) -> tuple[int, ...]:
    """Sizes of prefill steps to try: up to the first that takes all prompts at once.

    Where the CPU does everything larger steps gain nothing that would pay for their memory.
    """
    if hardware.gpu is None:
        return (DEFAULT_CHUNK_TOKENS,)
    num_tokens = workload.num_seqs * workload.prompt_len
    smaller = tuple(size for size in CHUNK_TOKENS if size < num_tokens)
    return CHUNK_TOKENS[: len(smaller) + 1]


def _of_other_engines(waves: Sequence[Wave]) -> list[Candidate]:
    """Where other engines would put the model, where that fits: no plan is slower."""
    found = []
    for wave in waves:
        asked = Asked(spec=wave.spec, hardware=wave.costs.hardware, workload=wave.sequences)
        for engine in ENGINES.values():
            theirs = engine(asked).placement
            if theirs is not None:
                tiers = (replace(each, strategy=MIXED, cut=0) for each in theirs.tiers)
                prefill, decode = tiers
                found.append(Candidate(Placement(prefill=prefill, decode=decode), wave))
    return found


def _named(waves: Sequence[Wave], chunk_tokens: int, strategy: str | None) -> list[Candidate]:
    """Of each named strategy and wave the best cut that fits, or the nearest miss."""
    names = tuple(STRATEGIES) if strategy is None else (strategy,)
    found = []
    for wave in waves:
        has_gpu = wave.costs.hardware.gpu is not None
        for name in names:
            all_cuts = cuts(name, wave.spec, has_gpu=has_gpu)
            if all_cuts:
                found.append(_best_cut(wave, name, all_cuts, chunk_tokens))
    return found


def _best_cut(wave: Wave, name: str, all_cuts: range, chunk_tokens: int) -> Candidate:
    """The least cut that fits: the more layers are as the GPU would have them, the faster.

    Where none fits the one that lacks the fewest bytes.
    """

    def candidate(cut: int) -> Candidate:
        return Candidate(placement(wave.spec, name, cut, chunk_tokens=chunk_tokens), wave)

    tried: dict[int, Candidate] = {}
    low, high = all_cuts.start, all_cuts.stop - 1
    while low < high:
        middle = (low + high) // 2
        tried[middle] = candidate(middle)
        # Beyond what fits on the GPU a larger cut lacks less there, and more on the CPU.
        if tried[middle].lacking_on("gpu"):
            low = middle + 1
        else:
            high = middle
    tried[low] = candidate(low)
    return min(tried.values(), key=lambda each: (each.lacking_bytes, each.placement.prefill.cut))


def _best_by_name(fitting: Sequence[Candidate]) -> list[Candidate]:
    """The fastest of each name, by rising seconds."""
    best: dict[str, Candidate] = {}
    for each in sorted(fitting, key=lambda each: each.rank):
        best.setdefault(each.name, each)
    return list(best.values())


def _preferred(fitting: list[Candidate]) -> Candidate:
    """Of placements by rising seconds the fastest, unless a simpler one may well be as fast."""
    fastest = fitting[0]
    for each in sorted(fitting, key=lambda each: (each.complexity, each.rank)):
        if each.complexity >= fastest.complexity:
            return fastest
        if each.times.e2e_s - fastest.times.e2e_s <= _error_of_gain(each, fastest):
            return each
    return fastest


def _with_fronts(chosen: Candidate, *, prefers_simple: bool) -> Candidate:
    """A plan with divided caches where that is faster, by more than the error if it was simpler."""
    divided = with_fronts(chosen)
    if not prefers_simple or divided.complexity == chosen.complexity:
        return divided
    gain_s = chosen.times.e2e_s - divided.times.e2e_s
    return divided if gain_s > _error_of_gain(chosen, divided) else chosen


def _error_of_gain(simple: Candidate, fastest: Candidate) -> float:
    """90th percentile of how far the predicted difference of two placements may be off, in seconds.

    What both do on one lane is off by one factor in both, so that only differences count.
    """
    variance = 0.0
    ours, theirs = simple.uncertain_s, fastest.uncertain_s
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


def wave_sizes(workload: Workload, objective: Objective) -> list[int]:
    """Numbers of sequences that may run at once: all, or halves of them for throughput."""
    sizes = [workload.num_seqs]
    while objective == "throughput" and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _alternative(other: Candidate, chosen: Candidate) -> Alternative:
    """One row of what was not chosen, with the reason."""
    fits, times = other.lacking_bytes == 0, other.times
    return Alternative(
        name=other.name,
        cut_by_phase={phase: other.placement.tier(phase).cut for phase in PHASES},
        feasible=fits,
        ttft_s=times.ttft_s,
        tpot_s=times.tpot_s,
        e2e_s=times.e2e_s,
        reason=_why_slower(other, chosen) if fits else _why_not(other.memory),
    )


def _why_slower(other: Candidate, chosen: Candidate) -> str:
    """Which phase lost more seconds, by how much all is slower, and what bound that phase."""
    phase: Phase = max(PHASES, key=lambda phase: other.total_s(phase) - chosen.total_s(phase))
    bottleneck = other.terms(phase).bottleneck
    ratio = other.times.e2e_s / chosen.times.e2e_s
    if ratio < 0.995:
        return f"{ratio:.2f}x the time, a gain within the error of the prediction"
    if ratio < 1.005:
        return f"as fast within 0.5%; {phase} bound by {bottleneck}"
    return f"{ratio:.2f}x the time; {phase} bound by {bottleneck}"


def _why_not(memory: dict[Device, DeviceMemory]) -> str:
    """What is missing where."""
    parts = [
        f"needs {need.needed_bytes / 1e9:.2f} GB on the {device}, "
        f"{need.available_bytes / 1e9:.2f} GB available"
        for device, need in memory.items()
        if not need.fits
    ]
    return "; ".join(parts)

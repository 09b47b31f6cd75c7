"""Search: the fastest placement that fits, over every named strategy, cut point and phase."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from msgspec.structs import replace

from planner.errors import PlannerError
from planner.estimate import (
    DecodeCost,
    Latency,
    PrefillCost,
    combine,
    decode_cost,
    kv_move_s,
    latency,
    prefill_cost,
)
from planner.hardware import HardwareProfile
from planner.memory import DeviceMemory, ModelBytes, TierFacts, needs_of_tiers
from planner.model_spec import ModelSpec
from planner.placement import Device, Placement, pair_name
from planner.plan import Alternative, Plan
from planner.step_graph import build_kv_move
from planner.strategies import STRATEGIES, candidates
from planner.workload import DEFAULT_CHUNK_TOKENS, Objective, Phase, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A prefill tier and a decode tier with their price for sequences in waves of one size."""

    prefill: TierFacts
    decode: TierFacts
    prefill_cost: PrefillCost
    decode_cost: DecodeCost
    move_s: float
    num_concurrent: int
    times: Latency

    @property
    def name(self) -> str:
        return pair_name(self.prefill.tier, self.decode.tier)

    @property
    def rank(self) -> tuple[float, bool, int, int]:
        """Fastest first; of equals one strategy for both phases, then the smaller cuts."""
        prefill, decode = self.prefill.tier, self.decode.tier
        return (self.times.e2e_s, prefill.strategy != decode.strategy, prefill.cut, decode.cut)


def search(
    spec: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    objective: Objective = "latency",
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    strategy: str | None = None,
) -> Plan:
    """Find the placement with the lowest time for a workload that fits the machine's memory.

    The space is every pair of (prefill tier, decode tier) of the named strategies with all their
    cut points; weights that either tier wants on a device are resident there, KV that changes
    device between the phases is moved and charged. The search prices each tier once and then
    checks memory in order of price, which is exhaustive: the gap to the best of the space is 0.

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

    Returns
    -------
    Plan
        `feasible` is false where nothing fits; the placement is then the nearest miss.

    Examples
    --------
    >>> from planner import HardwareProfile, ModelSpec, Workload, search  # doctest: +SKIP
    >>> search(spec, hardware, Workload(prompt_len=512, output_len=128)).placement.name
    'experts-on-cpu'
    """
    if strategy is not None and strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise PlannerError(f"strategy {strategy!r} is not one of {known}")
    sizes = ModelBytes(spec)
    pairs = [
        pair
        for num_concurrent in _wave_sizes(workload, objective)
        for pair in _priced_pairs(
            spec, sizes, hardware, workload, num_concurrent, chunk_tokens, strategy
        )
    ]
    if not pairs:
        raise PlannerError(
            f"strategy {strategy!r} does not apply: {_no_candidates(spec, hardware)}"
        )
    pairs.sort(key=lambda pair: pair.rank)

    def memory_of(pair: _Pair) -> dict[Device, DeviceMemory]:
        wave = _wave(workload, pair.num_concurrent)
        return needs_of_tiers(spec, sizes, pair.prefill, pair.decode, wave, hardware)

    fitting: dict[str, _Pair] = {}
    misses: dict[str, tuple[int, _Pair]] = {}
    for pair in pairs:
        if pair.name in fitting:
            continue
        lacking = _lacking_bytes(memory_of(pair))
        if lacking == 0:
            fitting[pair.name] = pair
        elif pair.name not in misses or lacking < misses[pair.name][0]:
            misses[pair.name] = (lacking, pair)
    # Both dictionaries were filled in order of price; the nearest miss lacks the fewest bytes.
    missed = {name: miss for name, miss in misses.items() if name not in fitting}
    nearest = [pair for _, pair in sorted(missed.values(), key=lambda miss: miss[0])]
    chosen, *others = [*fitting.values(), *nearest]
    return Plan(
        model=spec.name,
        model_fingerprint=spec.fingerprint,
        profile=hardware.name,
        profile_fingerprint=profile_fingerprint(hardware),
        resources=hardware.resources,
        workload=workload,
        objective=objective,
        feasible=bool(fitting),
        placement=Placement(prefill=chosen.prefill.tier, decode=chosen.decode.tier),
        estimate=combine(
            chosen.prefill_cost,
            chosen.decode_cost,
            chosen.move_s,
            workload,
            chosen.num_concurrent,
            memory_of(chosen),
        ),
        optimality_gap=0.0,
        alternatives=tuple(_alternative(pair, chosen, memory_of(pair)) for pair in others),
    )


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
        facts += [hardware.fingerprint.num_cores, hardware.fingerprint.memory_bytes]
    if hardware.gpu is not None:
        facts += [hardware.gpu.name, hardware.gpu.kind]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _wave_sizes(workload: Workload, objective: Objective) -> list[int]:
    """Numbers of sequences that may run at once: all, or halves of them for throughput."""
    sizes = [workload.num_seqs]
    while objective == "throughput" and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _priced_pairs(
    spec: ModelSpec,
    sizes: ModelBytes,
    hardware: HardwareProfile,
    workload: Workload,
    num_concurrent: int,
    chunk_tokens: int,
    strategy: str | None,
) -> list[_Pair]:
    """Every pair of tiers, each tier priced once."""
    wave = _wave(workload, num_concurrent)
    names = tuple(STRATEGIES) if strategy is None else (strategy,)

    def tiers(phase: Phase) -> list[TierFacts]:
        found = candidates(
            spec,
            phase,
            has_gpu=hardware.gpu is not None,
            chunk_tokens=chunk_tokens,
            names=names,
        )
        return [TierFacts.of(tier, spec, sizes) for tier in found]

    prefills = [
        (facts, prefill_cost(spec, facts.tier, hardware, wave)) for facts in tiers("prefill")
    ]
    decodes = [(facts, decode_cost(spec, facts.tier, hardware, wave)) for facts in tiers("decode")]
    move_s_by_layers: dict[tuple[int, int], float] = {}
    pairs = []
    for prefill, cost in prefills:
        for decode, step in decodes:
            kv_layers = (prefill.kv_layers["gpu"], decode.kv_layers["gpu"])
            if kv_layers not in move_s_by_layers:
                graph = build_kv_move(prefill.tier, decode.tier)
                move_s_by_layers[kv_layers] = kv_move_s(spec, graph, hardware, wave)
            move_s = move_s_by_layers[kv_layers]
            pairs.append(
                _Pair(
                    prefill=prefill,
                    decode=decode,
                    prefill_cost=cost,
                    decode_cost=step,
                    move_s=move_s,
                    num_concurrent=num_concurrent,
                    times=latency(cost, step, move_s, workload, num_concurrent),
                )
            )
    return pairs


def _wave(workload: Workload, num_concurrent: int) -> Workload:
    return replace(workload, num_seqs=num_concurrent)


def _lacking_bytes(memory: dict[Device, DeviceMemory]) -> int:
    return sum(max(0, need.needed_bytes - need.available_bytes) for need in memory.values())


def _alternative(pair: _Pair, chosen: _Pair, memory: dict[Device, DeviceMemory]) -> Alternative:
    """One row of what was not chosen, with the reason."""
    fits = _lacking_bytes(memory) == 0
    return Alternative(
        name=pair.name,
        cut_by_phase={"prefill": pair.prefill.tier.cut, "decode": pair.decode.tier.cut},
        feasible=fits,
        ttft_s=pair.times.ttft_s,
        tpot_s=pair.times.tpot_s,
        e2e_s=pair.times.e2e_s,
        reason=_why_slower(pair, chosen) if fits else _why_not(memory),
    )


def _why_slower(pair: _Pair, chosen: _Pair) -> str:
    """Which phase lost, by how much, and what bound it."""
    ratio = pair.times.e2e_s / chosen.times.e2e_s
    lost_prefill = pair.prefill_cost.seconds - chosen.prefill_cost.seconds
    lost_decode = pair.decode_cost.seconds - chosen.decode_cost.seconds
    phase = "prefill" if lost_prefill > lost_decode else "decode"
    bottleneck = pair.prefill_cost.bottleneck if phase == "prefill" else pair.decode_cost.bottleneck
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

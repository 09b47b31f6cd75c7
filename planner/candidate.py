"""Candidate: a placement for sequences that run together, priced when it is asked for."""

from __future__ import annotations

from functools import cached_property

from msgspec.structs import replace

from planner.cost_model import CostModel
from planner.estimate import Latency, PhaseTerms, PrefillCost, WavePricer, latency, num_waves
from planner.memory import DeviceMemory, needs
from planner.model_spec import ModelSpec
from planner.placement import Device, Placement
from planner.strategies import STRATEGIES
from planner.tier_graphs import TierGraphs
from planner.workload import PHASES, Phase, Workload


class Wave:
    """Sequences that run together: what prices their steps."""

    def __init__(
        self, spec: ModelSpec, costs: CostModel, workload: Workload, num_concurrent: int
    ) -> None:
        self.spec = spec
        self.costs = costs
        self.workload = workload
        self.sequences = replace(workload, num_seqs=num_concurrent)
        self.num_waves = num_waves(workload, num_concurrent)
        self._pricers: dict[int, WavePricer] = {}

    @property
    def num_concurrent(self) -> int:
        return self.sequences.num_seqs

    def pricer(self, chunk_tokens: int) -> WavePricer:
        """Prices of steps of so many new tokens at most."""
        if chunk_tokens not in self._pricers:
            known = next(iter(self._pricers.values()), None)
            self._pricers[chunk_tokens] = (
                WavePricer(self.spec, self.costs, self.sequences, chunk_tokens)
                if known is None
                else known.with_chunk(chunk_tokens)
            )
        return self._pricers[chunk_tokens]


class Candidate:
    """A placement for sequences in waves of one size; what it costs is worked out once."""

    def __init__(self, placement: Placement, wave: Wave) -> None:
        self.placement = placement
        self.wave = wave

    @property
    def name(self) -> str:
        return self.placement.name

    @cached_property
    def memory(self) -> dict[Device, DeviceMemory]:
        wave = self.wave
        return needs(wave.spec, self.placement, wave.sequences, wave.costs.hardware)

    def lacking_on(self, device: Device) -> int:
        """Bytes over a device's budget."""
        found = self.memory.get(device)
        return 0 if found is None else max(0, found.needed_bytes - found.available_bytes)

    @property
    def lacking_bytes(self) -> int:
        """Bytes over budget, on all devices together; 0 where it fits."""
        return sum(self.lacking_on(device) for device in self.memory)

    @property
    def pricer(self) -> WavePricer:
        return self.wave.pricer(self.placement.prefill.max_num_tokens)

    @cached_property
    def graphs(self) -> TierGraphs:
        return TierGraphs(self.wave.spec, self.placement)

    @cached_property
    def prefill(self) -> PrefillCost:
        return self.pricer.prefill(self.graphs)

    @cached_property
    def decode_step_s(self) -> float:
        return self.pricer.decode_step_s(self.graphs)

    @cached_property
    def move_s(self) -> float:
        """Seconds of moving the KV of a wave between the phases."""
        return self.pricer.placement_move_s(self.placement)

    @cached_property
    def times(self) -> Latency:
        return latency(
            self.prefill,
            self.decode_step_s,
            self.move_s,
            self.wave.workload,
            self.wave.num_waves,
        )

    @property
    def complexity(self) -> int:
        """0 on one device, 1 a named strategy, 2 any other placement."""
        if self.name in ("gpu", "cpu"):
            return 0
        return 1 if self.name in STRATEGIES else 2

    @property
    def rank(self) -> tuple[float, int, int, int]:
        """Fastest first; of equals the simpler one, then the smaller cuts."""
        prefill, decode = self.placement.prefill, self.placement.decode
        return (self.times.e2e_s, self.complexity, prefill.cut, decode.cut)

    @cached_property
    def uncertain_s(self) -> dict[tuple[str, Phase], tuple[float, float]]:
        """Seconds of the workload by lane, term and phase, each with its standard deviation."""
        found: dict[tuple[str, Phase], tuple[float, float]] = {}
        num_steps = {"prefill": 1, "decode": self.wave.workload.output_len - 1}
        for phase in PHASES:
            terms, times = self.terms(phase), self.wave.num_waves * num_steps[phase]
            for key, seconds in terms.seconds.items():
                found[key, phase] = (times * seconds, times * terms.sigmas[key])
        return found

    def terms(self, phase: Phase) -> PhaseTerms:
        """What a phase's seconds are made of."""
        if phase == "prefill":
            return self.pricer.prefill_terms(self.graphs)
        return self.pricer.decode_terms(self.graphs)

    def total_s(self, phase: Phase) -> float:
        """Seconds that the workload spends in a phase, KV moves in the first."""
        if phase == "prefill":
            return self.wave.num_waves * (self.prefill.seconds + self.move_s)
        return self.wave.num_waves * (self.wave.workload.output_len - 1) * self.decode_step_s

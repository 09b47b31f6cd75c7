"""Search against brute force over its whole space, and its reasons against the numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import cache

import highspy
import pytest
from msgspec.structs import replace

from planner import search, strategies
from planner.calibration import Correction, Corrections
from planner.cost_model import CostModel
from planner.errors import PlannerError
from planner.estimate import Latency, estimate
from planner.hardware import HardwareProfile
from planner.memory import needs
from planner.model_spec import ModelSpec
from planner.placement import ON_GPU, Placement
from planner.plan import Plan
from planner.search import _error_of_gain, _preferred, profile_fingerprint
from planner.strategies import STRATEGIES, cuts
from planner.workload import Objective, Phase, Workload
from tests.planner.brute_force import Answer, brute_force
from tests.planner.tiny import EXPERTS, real_machine, tiny_device, tiny_machine, tiny_spec

CHUNK = 8

SPECS = {
    "dense": tiny_spec("ddd"),
    "dense-tied": tiny_spec("dd", is_tied=True),
    "experts": tiny_spec("mmm"),
    "mixed": tiny_spec("dmmd"),
    "mixed-tied": tiny_spec("mdmdm", is_tied=True),
}
# The largest spec needs about 10 kB of weights.
MACHINES = {
    "no-gpu": real_machine(gpu_bytes=None),
    "big-gpu": real_machine(),
    "gpu-6k": real_machine(gpu_bytes=6_000),
    "gpu-10k-slow-link": real_machine(gpu_bytes=10_000, link_bytes_per_s=2e3),
    "gpu-10k-fast-link": real_machine(gpu_bytes=10_000, link_bytes_per_s=1e6),
    "little-host": real_machine(cpu_bytes=7_000, gpu_bytes=8_000),
    "nothing-fits": real_machine(cpu_bytes=2_000, gpu_bytes=2_000),
}
WORKLOADS: dict[str, tuple[Workload, Objective]] = {
    "one": (Workload(prompt_len=6, output_len=5), "latency"),
    "chunks": (Workload(prompt_len=20, output_len=2, num_seqs=2), "latency"),
    "waves": (Workload(prompt_len=5, output_len=9, num_seqs=5), "throughput"),
}
CASES = [
    (spec, machine, workload)
    for number, (spec, machine) in enumerate((s, m) for s in SPECS for m in MACHINES)
    # Each pair of model and machine with one workload or two, in turns.
    for workload in [list(WORKLOADS)[number % 3], list(WORKLOADS)[(number // 3) % 3]]
]


@cache
def answers(spec: str, machine: str, workload: str) -> tuple[Plan, Answer]:
    what, objective = WORKLOADS[workload]
    plan = search(
        SPECS[spec], MACHINES[machine], what, objective, chunk_tokens=CHUNK, prefers_simple=False
    )
    return plan, brute_force(SPECS[spec], MACHINES[machine], what, objective, CHUNK)


@pytest.mark.parametrize(("spec", "machine", "workload"), sorted(set(CASES)))
def test_search_is_as_fast_as_any_pair_of_named_placements(
    spec: str, machine: str, workload: str
) -> None:
    """Within 1 % of the best of all strategies, cuts and pairs of them; its bound is below that."""
    plan, brute = answers(spec, machine, workload)

    if brute.best is None:
        return  # what is no named placement may fit
    assert plan.feasible
    assert plan.estimate.e2e_s <= 1.01 * brute.best.e2e_s
    assert plan.estimate.e2e_s * (1 - plan.optimality_gap) <= brute.best.e2e_s * (1 + 1e-9)


@pytest.mark.parametrize(("spec", "machine", "workload"), sorted(set(CASES)))
def test_named_alternatives_are_priced_at_the_cut_that_they_say(
    spec: str, machine: str, workload: str
) -> None:
    """And fit with it where they say so; no smaller cut would fit on the GPU."""
    plan, _ = answers(spec, machine, workload)
    hardware, (what, _) = MACHINES[machine], WORKLOADS[workload]
    for other in plan.alternatives:
        if other.name not in STRATEGIES or (what.num_seqs > 1 and plan.objective == "throughput"):
            continue
        cut = other.cut_by_phase["prefill"]
        placement = strategies.placement(SPECS[spec], other.name, cut, chunk_tokens=CHUNK)
        priced = estimate(SPECS[spec], placement, CostModel(hardware), what)
        fits = all(need.fits for need in needs(SPECS[spec], placement, what, hardware).values())
        assert other.e2e_s == pytest.approx(priced.e2e_s, rel=1e-12)
        assert other.feasible == fits
        if other.feasible and cut - 1 in cuts(other.name, SPECS[spec], has_gpu=True):
            smaller = strategies.placement(SPECS[spec], other.name, cut - 1, chunk_tokens=CHUNK)
            assert not needs(SPECS[spec], smaller, what, hardware)["gpu"].fits


@pytest.mark.parametrize(("spec", "machine", "workload"), sorted(set(CASES)))
def test_the_estimate_of_a_plan_is_that_of_its_placement(
    spec: str, machine: str, workload: str
) -> None:
    """Priced and measured in bytes again from the plan alone."""
    plan, _ = answers(spec, machine, workload)
    wave = replace(plan.workload, num_seqs=plan.estimate.num_concurrent_seqs)
    memory = needs(SPECS[spec], plan.placement, wave, MACHINES[machine])

    assert plan.feasible == all(need.fits for need in memory.values())
    assert plan.estimate == estimate(
        SPECS[spec],
        plan.placement,
        CostModel(MACHINES[machine]),
        plan.workload,
        memory,
        num_concurrent=plan.estimate.num_concurrent_seqs,
    )


@pytest.mark.parametrize(("spec", "machine", "workload"), sorted(set(CASES)))
def test_every_reason_is_true(spec: str, machine: str, workload: str) -> None:
    """Slower by the ratio of the prices, in the phase that lost; or lacking the bytes it says."""
    plan, brute = answers(spec, machine, workload)
    for other in plan.alternatives:
        if other.feasible:
            assert other.e2e_s is not None
            ratio = other.e2e_s / plan.estimate.e2e_s
            assert ratio >= 1.0
            slower = "as fast within 0.5%" if ratio < 1.005 else f"{ratio:.2f}x the time"
            assert re.fullmatch(
                rf"{re.escape(slower)}; (prefill|decode) bound by \w+ \w+", other.reason
            )
        else:
            sizes = re.findall(
                r"needs ([\d.]+) GB on the [cg]pu, ([\d.]+) GB available", other.reason
            )
            assert sizes
            assert brute.lacking.get(other.name, 1) > 0


def test_the_reason_names_the_phase_that_lost_more_seconds() -> None:
    """All on the CPU, a long output loses in decode and a long prompt in prefill."""
    spec, machine = SPECS["dense"], real_machine(cpu_bytes=1_000_000)
    for workload, phase in (
        (Workload(prompt_len=1, output_len=60), "decode"),
        (Workload(prompt_len=200, output_len=2), "prefill"),
    ):
        plan = search(spec, machine, workload, prefers_simple=False)
        (cpu,) = (other for other in plan.alternatives if other.name == "cpu")
        assert plan.placement.name == "gpu"
        assert f"; {phase} bound by cpu " in cpu.reason


def test_an_infeasible_plan_is_the_nearest_miss() -> None:
    """Nothing fits: no alternative lacks fewer bytes, and none fits."""
    plan, _ = answers("mixed", "nothing-fits", "one")

    def lacking_bytes(placement: Placement) -> int:
        memory = needs(SPECS["mixed"], placement, plan.workload, MACHINES["nothing-fits"])
        return sum(max(0, need.needed_bytes - need.available_bytes) for need in memory.values())

    assert not plan.feasible
    others = [
        strategies.placement(SPECS["mixed"], name, cut, chunk_tokens=CHUNK)
        for other in plan.alternatives
        for name, cut in [(other.name, other.cut_by_phase["decode"])]
    ]
    assert lacking_bytes(plan.placement) <= min(map(lacking_bytes, others))
    assert not any(other.feasible for other in plan.alternatives)


def test_what_fits_is_listed_before_what_does_not_and_by_price() -> None:
    plan, _ = answers("mixed", "gpu-6k", "one")
    feasible = [other for other in plan.alternatives if other.feasible]

    assert plan.feasible
    assert list(plan.alternatives[: len(feasible)]) == feasible
    prices = [other.e2e_s or 0.0 for other in feasible]
    assert prices == sorted(prices)


def test_throughput_runs_in_waves_where_that_frees_memory_for_weights() -> None:
    """16 sequences of 32 tokens take 2 * 16 blocks * 256 bytes for each layer's cache."""
    spec, workload = SPECS["dense"], Workload(prompt_len=4, output_len=28, num_seqs=16)
    machine = real_machine(gpu_bytes=16_000, link_bytes_per_s=1e3, cpu_read_bytes_per_s=4e3)
    at_once = search(spec, machine, workload, "latency", prefers_simple=False)
    in_waves = search(spec, machine, workload, "throughput", prefers_simple=False)

    assert at_once.estimate.num_concurrent_seqs == 16
    assert in_waves.estimate.num_concurrent_seqs < 16
    assert in_waves.estimate.e2e_s < at_once.estimate.e2e_s


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_forced_strategy_is_used_in_both_phases(strategy: str) -> None:
    plan = search(SPECS["mixed"], real_machine(), Workload(prompt_len=6), strategy=strategy)

    assert plan.placement.name == strategy
    assert plan.alternatives == ()


@pytest.mark.parametrize(
    ("spec", "machine", "strategy", "complaint"),
    [
        ("dense", "big-gpu", "fast", r"'fast' is not one of gpu, cpu, offload, split, experts-on-"),
        ("dense", "no-gpu", "gpu", "'gpu' does not apply: the machine has no accelerator"),
        ("dense", "big-gpu", "experts-on-cpu", "does not apply: tiny-ddd has no experts"),
    ],
)
def test_a_strategy_that_does_not_apply_is_refused_with_the_reason(
    spec: str, machine: str, strategy: str, complaint: str
) -> None:
    with pytest.raises(PlannerError, match=complaint):
        search(SPECS[spec], MACHINES[machine], Workload(), strategy=strategy)


def test_a_workload_longer_than_the_context_is_refused_with_both_values() -> None:
    workload = Workload(prompt_len=4096, output_len=4)
    with pytest.raises(PlannerError, match=r"4100 tokens but tiny-dm has a context of 4096"):
        search(tiny_spec("dm"), real_machine(), workload)


def test_a_plan_says_what_it_was_made_for() -> None:
    spec, machine, workload = SPECS["mixed"], MACHINES["gpu-6k"], Workload(prompt_len=6)
    plan = search(spec, machine, workload, "throughput", chunk_tokens=CHUNK)

    assert (plan.model, plan.model_fingerprint) == (spec.name, spec.fingerprint)
    assert (plan.profile, plan.profile_fingerprint) == (machine.name, profile_fingerprint(machine))
    assert (plan.workload, plan.objective) == (workload, "throughput")
    assert plan.resources == machine.resources
    assert plan.placement.prefill.max_num_tokens == CHUNK


def test_two_measurements_of_one_machine_have_one_fingerprint() -> None:
    machine = MACHINES["big-gpu"]
    again = real_machine(cpu_read_bytes_per_s=61e3, link_bytes_per_s=24e3)
    other_gpu = replace(machine, gpu=replace(tiny_device("gpu"), name="another"))

    assert profile_fingerprint(again) == profile_fingerprint(machine)
    assert profile_fingerprint(other_gpu) != profile_fingerprint(machine)
    assert profile_fingerprint(machine.without_gpu()) != profile_fingerprint(machine)


def head_on_gpu_plan(sigma: float) -> Plan:
    """Plan one dense layer for a GPU of twice the CPU's rate that holds the head only.

    All on the CPU a prompt takes 82 s (test_estimate.py), 10 of them for the head; split, the head
    takes 5 s on the GPU. Seconds of the head are off by `sigma` on both. Biases keep the
    feed-forward from being divided.
    """
    spec = dataclasses.replace(tiny_spec("d"), has_mlp_bias=True)
    workload = Workload(prompt_len=8, output_len=1)
    wide = tiny_machine(gpu=tiny_device("emulated"))
    need = needs(spec, strategies.placement(spec, "split", 1), workload, wide)["gpu"].needed_bytes
    gpu = tiny_device("emulated", memory_bytes=need * 100 // 96 + 1, read_bytes_per_s=32.0)
    known = Correction(factor=1.0, sigma=sigma, is_bounded=False, num_runs=1)
    corrections = Corrections(
        by_key={("cpu", "head", "prefill"): known, ("gpu", "head", "prefill"): known}, num_runs=1
    )
    machine = tiny_machine(gpu=gpu, link_bytes_per_s=2.0**60)
    return search(spec, machine, workload, corrections=corrections)


def test_a_gain_beyond_the_error_of_the_prediction_is_taken() -> None:
    """1.2816 * 0.3 * hypot(10, 5) is 4.3 s, less than the 5 s that the GPU gains."""
    plan = head_on_gpu_plan(0.3)

    assert plan.placement.name == "split"
    assert plan.estimate.e2e_s == pytest.approx(77.0, rel=1e-12)
    assert 0.0 <= plan.optimality_gap < 1.0


def test_a_simpler_plan_within_the_error_of_the_prediction_is_taken() -> None:
    """1.2816 * 0.4 * hypot(10, 5) is 5.7 s: the gain may well be none, and the plan says so."""
    plan = head_on_gpu_plan(0.4)

    assert plan.placement.name == "cpu"
    assert plan.estimate.e2e_s == pytest.approx(82.0, rel=1e-12)
    assert plan.optimality_gap >= 1 - 77 / 82 - 1e-9
    (split,) = (other for other in plan.alternatives if other.name == "split")
    assert split.reason == "0.94x the time, a gain within the error of the prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """What the preference looks at of a pair: seconds of experts alone, on a lane of its own."""

    lane: str
    complexity: int
    seconds: float
    sigma_s: float = 0.0

    @property
    def times(self) -> Latency:
        return Latency(ttft_s=0.0, tpot_s=0.0, e2e_s=self.seconds)

    @property
    def rank(self) -> tuple[float, bool, int, int]:
        return (self.seconds, self.complexity == 2, 0, 0)

    @property
    def uncertain_s(self) -> dict[tuple[str, Phase], tuple[float, float]]:
        return {(f"{self.lane} experts", "decode"): (self.seconds, self.sigma_s)}


MIXED = Priced(lane="gpu", complexity=2, seconds=100.0, sigma_s=3.0)


@pytest.mark.parametrize(
    ("one_device_s", "one_strategy_s", "expected_s"),
    [
        (104.9, 101.0, 104.9),  # of those within the error the simplest
        (130.0, 104.9, 104.9),  # 1.2816 * hypot(3, 3) = 5.4 s
        (130.0, 106.0, 100.0),
    ],
)
def test_the_simplest_plan_within_the_error_counts_before_simpler_ones(
    one_device_s: float, one_strategy_s: float, expected_s: float
) -> None:
    """One device before one strategy before two, each compared with the fastest."""
    one_device = Priced(lane="cpu", complexity=0, seconds=one_device_s, sigma_s=3.0)
    one_strategy = Priced(lane="cpu", complexity=1, seconds=one_strategy_s, sigma_s=3.0)
    fitting = sorted((MIXED, one_device, one_strategy), key=lambda pair: pair.rank)

    assert _preferred(fitting).times.e2e_s == expected_s  # type: ignore[arg-type]


def test_of_plans_as_simple_the_fastest_is_taken() -> None:
    """However uncertain both are."""
    slower = replace_seconds(MIXED, 101.0)

    assert _preferred([MIXED, slower]) is MIXED  # type: ignore[list-item, comparison-overlap]


def test_what_two_plans_do_alike_is_off_alike_in_both() -> None:
    """Only the seconds that differ are uncertain: 20 of 120, by 3 in 100."""
    longer = replace_seconds(MIXED, 120.0)
    other = dataclasses.replace(longer, lane="cpu")

    def error_s(first: Priced, second: Priced) -> float:
        return _error_of_gain(first, second)  # type: ignore[arg-type]

    assert error_s(MIXED, MIXED) == 0.0
    assert error_s(longer, MIXED) == pytest.approx(1.2816 * 0.03 * 20)
    assert error_s(other, MIXED) == pytest.approx(1.2816 * math.hypot(0.03 * 120, 0.03 * 100))


def replace_seconds(pair: Priced, seconds: float) -> Priced:
    """The same with other seconds, off by the same share."""
    return dataclasses.replace(pair, seconds=seconds, sigma_s=pair.sigma_s * seconds / pair.seconds)


@pytest.mark.parametrize("num_resident", range(5))
def test_experts_on_the_cpu_are_the_solution_of_the_knapsack(num_resident: int) -> None:
    """Which layers' experts fit on the GPU, by an exact solver over all subsets, not only prefixes.

    Layers are alike, so the search need only count them; the solver does not know that.
    """
    spec = tiny_spec("mmmm")
    workload = Workload(prompt_len=4, output_len=8)
    bare = strategies.placement(spec, "experts-on-cpu", 4)
    need = needs(spec, bare, workload, real_machine())["gpu"]
    memory_bytes = -(-(need.needed_bytes + num_resident * EXPERTS + EXPERTS // 2) * 100 // 96)
    machine = real_machine(gpu_bytes=memory_bytes)
    budget = needs(spec, bare, workload, machine)["gpu"].available_bytes - need.needed_bytes
    plan = search(spec, machine, workload, strategy="experts-on-cpu")
    # Cut 4 less cut 3 is what one layer's experts cost on the CPU and not on the GPU.
    away, home = (e2e_s(spec, machine, workload, cut) for cut in (4, 3))
    num_moved = solve_knapsack([away - home] * 4, [EXPERTS] * 4, budget)

    assert plan.placement.decode.cut == max(1, 4 - num_moved)
    assert plan.estimate.e2e_s == pytest.approx(away - min(3, num_moved) * (away - home), rel=1e-9)


def e2e_s(spec: ModelSpec, machine: HardwareProfile, workload: Workload, cut: int) -> float:
    placement: Placement = strategies.placement(spec, "experts-on-cpu", cut)
    return estimate(spec, placement, CostModel(machine), workload).e2e_s


def solve_knapsack(gains: list[float], sizes: list[int], budget: int) -> int:
    """How many items an exact solver takes to gain the most within a budget."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    take = [solver.addBinary() for _ in gains]
    solver.addConstr(sum(size * x for size, x in zip(sizes, take, strict=True)) <= budget)
    solver.maximize(sum(gain * x for gain, x in zip(gains, take, strict=True)))
    return sum(solver.val(x) > 0.5 for x in take)


def test_a_gpu_that_lacks_only_the_embedding_keeps_all_layers() -> None:
    """The embedding (split at 0) or the head goes to the CPU before any layer does."""
    spec = tiny_spec("dd")
    workload = Workload(prompt_len=4, output_len=4)
    need = needs(spec, strategies.placement(spec, "gpu", 0), workload, real_machine())["gpu"]
    machine = real_machine(gpu_bytes=(need.needed_bytes - 1) * 100 // 96)
    plan = search(spec, machine, workload, prefers_simple=False)

    assert all(layer.attention == layer.ffn == ON_GPU for layer in plan.placement.decode.layers)
    split = next(other for other in plan.alternatives if other.name == "split")
    assert split.cut_by_phase == {"prefill": 0, "decode": 0}


def test_a_machine_without_an_accelerator_is_planned_for_the_cpu() -> None:
    plan = search(SPECS["mixed"], tiny_machine(), Workload(prompt_len=6))

    assert plan.feasible
    assert plan.placement.name == "cpu"
    assert plan.alternatives == ()
    assert list(plan.estimate.bytes_by_device) == ["cpu"]

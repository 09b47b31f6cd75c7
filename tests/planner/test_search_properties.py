"""Properties of any searched plan: never over budget, and better hardware never makes it slower."""

from __future__ import annotations

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner import search
from planner.device import DeviceProfile
from planner.hardware import HardwareProfile
from planner.memory import needs
from planner.model_spec import ModelSpec
from planner.plan import Plan
from planner.strategies import STRATEGIES
from planner.workload import Objective, Workload
from tests.planner.brute_force import all_candidates
from tests.planner.tiny import real_machine, tiny_spec

CHUNK = 8
# Shrinking an example of a search takes minutes.
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    max_examples=20,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
# Equal prices that were added up in another order.
ROUNDING = 1 + 1e-12
# What the search may miss of the fastest placement of a small model.
MISSED = 1.01

specs = st.builds(tiny_spec, st.text("dm", min_size=1, max_size=3), is_tied=st.booleans())
workloads = st.builds(
    Workload,
    prompt_len=st.integers(1, 24),
    output_len=st.integers(1, 24),
    num_seqs=st.integers(1, 4),
)
objectives: st.SearchStrategy[Objective] = st.sampled_from(["latency", "throughput"])
rates = st.sampled_from([1e3, 5e3, 25e3, 100e3, 1e6])
sizes = st.integers(1, 40).map(lambda kilobytes: 1_000 * kilobytes)


@st.composite
def machines(draw: st.DrawFn) -> HardwareProfile:
    """Machines of every proportion; the tiny models take 2 to 6 kB."""
    return real_machine(
        cpu_bytes=draw(sizes),
        gpu_bytes=draw(st.none() | sizes),
        link_bytes_per_s=draw(rates),
        cpu_flop_per_s=draw(rates),
        cpu_read_bytes_per_s=draw(rates),
    )


def plan_of(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload, objective: Objective
) -> Plan:
    """The fastest plan, however little it gains."""
    return search(spec, machine, workload, objective, chunk_tokens=CHUNK, prefers_simple=False)


def is_no_worse(better: Plan, worse: Plan) -> bool:
    """Whether one plan fits if the other does, and is then not slower than the search may miss."""
    if not worse.feasible:
        return True
    return better.feasible and better.estimate.e2e_s <= worse.estimate.e2e_s * MISSED


@PROPERTY
@given(specs, machines(), workloads, objectives)
def test_a_plan_is_never_over_budget_and_gives_up_only_when_nothing_fits(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload, objective: Objective
) -> None:
    plan = plan_of(spec, machine, workload, objective)
    wave = replace(workload, num_seqs=plan.estimate.num_concurrent_seqs)
    memory = needs(spec, plan.placement, wave, machine)

    if plan.feasible:
        assert all(need.needed_bytes <= need.available_bytes for need in memory.values())
    else:
        found = all_candidates(spec, machine, workload, objective, CHUNK)
        assert all(each.lacking_bytes > 0 for each in found)
    assert plan.estimate.bytes_by_device == {
        device: need.needed_bytes for device, need in memory.items()
    }


@PROPERTY
@given(specs, machines(), workloads, objectives, sizes, sizes)
def test_more_memory_is_never_slower(
    spec: ModelSpec,
    machine: HardwareProfile,
    workload: Workload,
    objective: Objective,
    more_gpu_bytes: int,
    more_cpu_bytes: int,
) -> None:
    """On either device; a plan that fitted still fits."""
    gpu_bytes = None if machine.gpu is None else machine.gpu.memory_bytes + more_gpu_bytes
    more = machine.with_memory(
        cpu_bytes=machine.cpu.memory_bytes + more_cpu_bytes, gpu_bytes=gpu_bytes
    )

    assert is_no_worse(
        plan_of(spec, more, workload, objective), plan_of(spec, machine, workload, objective)
    )


@PROPERTY
@given(specs, machines(), workloads, objectives, st.floats(1.0, 100.0))
def test_a_faster_link_is_never_slower(
    spec: ModelSpec,
    machine: HardwareProfile,
    workload: Workload,
    objective: Objective,
    factor: float,
) -> None:
    link = machine.link
    if link is None:
        return
    faster = replace(
        machine,
        link=replace(
            link,
            h2d_bytes_per_s=link.h2d_bytes_per_s * factor,
            d2h_bytes_per_s=link.d2h_bytes_per_s * factor,
            latency_s=link.latency_s / factor,
        ),
    )

    assert is_no_worse(
        plan_of(spec, faster, workload, objective), plan_of(spec, machine, workload, objective)
    )


@PROPERTY
@given(specs, machines(), workloads, objectives, st.floats(1.0, 100.0), st.booleans())
def test_a_faster_device_is_never_slower(
    spec: ModelSpec,
    machine: HardwareProfile,
    workload: Workload,
    objective: Objective,
    factor: float,
    is_gpu: bool,
) -> None:
    if is_gpu and machine.gpu is not None:
        faster = replace(machine, gpu=sped_up(machine.gpu, factor))
    else:
        cpus = tuple(sped_up(cpu, factor) for cpu in machine.cpu_by_threads)
        faster = replace(machine, cpu_by_threads=cpus)

    assert is_no_worse(
        plan_of(spec, faster, workload, objective), plan_of(spec, machine, workload, objective)
    )


def sped_up(device: DeviceProfile, factor: float) -> DeviceProfile:
    return replace(
        device,
        read_bytes_per_s=device.read_bytes_per_s * factor,
        flop_per_s={kind: rate * factor for kind, rate in device.flop_per_s.items()},
        elements_per_s=(device.elements_per_s or device.read_bytes_per_s / 4) * factor,
        launch_s=device.launch_s / factor,
    )


@PROPERTY
@given(specs, machines(), workloads)
def test_throughput_is_never_slower_than_latency(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload
) -> None:
    """All sequences at once is one of its choices."""
    assert is_no_worse(
        plan_of(spec, machine, workload, "throughput"), plan_of(spec, machine, workload, "latency")
    )


@PROPERTY
@given(specs, machines(), workloads, objectives)
def test_no_alternative_that_fits_is_faster_than_the_choice(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload, objective: Objective
) -> None:
    plan = plan_of(spec, machine, workload, objective)
    names = [plan.placement.name, *(other.name for other in plan.alternatives)]

    assert len(set(names)) == len(names)
    for other in plan.alternatives:
        assert other.e2e_s is not None
        assert not other.feasible or (plan.feasible and other.e2e_s >= plan.estimate.e2e_s)


@PROPERTY
@given(specs, machines(), workloads, objectives)
def test_a_simpler_plan_costs_no_more_than_the_optimality_gap_says(
    spec: ModelSpec, machine: HardwareProfile, workload: Workload, objective: Objective
) -> None:
    """It fits where anything does, and is only taken where it is simpler."""
    fastest = plan_of(spec, machine, workload, objective)
    plan = search(spec, machine, workload, objective, chunk_tokens=CHUNK)

    assert plan.feasible == fastest.feasible
    assert 0.0 <= plan.optimality_gap < 1.0
    if plan.feasible:
        bound_s = plan.estimate.e2e_s * (1 - plan.optimality_gap)
        assert bound_s <= fastest.estimate.e2e_s * ROUNDING
    if plan.placement != fastest.placement:
        assert complexity(plan) < complexity(fastest)


def complexity(plan: Plan) -> int:
    """One device, a named strategy, any other placement."""
    name = plan.placement.name
    return 0 if name in ("gpu", "cpu") else 1 if name in STRATEGIES else 2

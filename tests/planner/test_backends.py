"""Who computes the CPU's products, by predicted seconds of the run; our kernels where near."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from planner import strategies
from planner.backends import cpu_backends
from planner.cost_model import OWN_BACKENDS, Backends, CostModel
from planner.device import Sample
from planner.estimate import estimate
from planner.hardware import HardwareProfile
from planner.kernels import Backend
from planner.model_spec import ModelSpec, Module, WeightKind
from planner.workload import Workload
from tests.planner.tiny import tiny_device, tiny_machine, tiny_spec

SPEC = tiny_spec("dm")
MODULES: tuple[Module, ...] = ("attention", "dense", "router", "experts", "head")


Rates = tuple[float, float]


def machine(
    *,
    numba: Rates | None,
    torch: Rates | None,
    launch_s: float = 0.0,
    kind: WeightKind = "bfloat16",
) -> HardwareProfile:
    """FLOP/s of products of 1 and of 64 tokens; all else takes no time but launches."""
    swift = tiny_device("cpu", read_bytes_per_s=2.0**60, launch_s=launch_s)
    rates: dict[Backend, Rates | None] = {"numba": numba, "torch": torch}
    return replace(
        tiny_machine(cpu=swift),
        samples=tuple(
            sample
            for backend, found in rates.items()
            if found is not None
            for tokens, rate in zip((1, 64), found, strict=True)
            for sample in products(backend, tokens, rate, kind)
        ),
    )


def products(
    backend: Backend, num_tokens: int, flop_per_s: float, kind: WeightKind
) -> tuple[Sample, Sample]:
    """A matrix and an expert, each of 8 * 8 weights."""
    linear = Sample(
        lane="cpu",
        kernel="linear",
        format=kind,
        backend=backend,
        shape=(8, 8),
        num_tokens=num_tokens,
        seconds=2 * 8 * 8 * num_tokens / flop_per_s,
    )
    experts = replace(linear, kernel="experts", shape=(1, 8, 8), seconds=3 * linear.seconds)
    return linear, experts


def chosen(hardware: HardwareProfile, wave: Workload, spec: ModelSpec = SPEC) -> Backends:
    return cpu_backends(spec, CostModel(hardware), wave)


@pytest.mark.parametrize(
    ("torch_rate", "winner"), [(105.0, "numba"), (110.0, "numba"), (112.0, "torch"), (50, "numba")]
)
def test_torch_must_win_by_a_tenth(torch_rate: float, winner: Backend) -> None:
    """100 / 112 is 0.89 of the seconds, 100 / 110 is 0.91."""
    hardware = machine(numba=(100.0, 100.0), torch=(torch_rate, torch_rate))
    assert chosen(hardware, Workload()) == dict.fromkeys(MODULES, winner)


def test_long_prompts_and_long_outputs_may_differ() -> None:
    """Ours at 1 token twice as fast, at 64 half: 64 tokens of prompt against 1 or 640 of output.

    Attention: seconds are tokens * FLOPs / rate: 64/100 + 0 by us and 64/200 by torch; with 640
    steps 64/100 + 640/100 against 64/200 + 640/50. The head has one row in both phases.
    """
    hardware = machine(numba=(100.0, 100.0), torch=(50.0, 200.0))
    short = chosen(hardware, Workload(prompt_len=64, output_len=1))
    long = chosen(hardware, Workload(prompt_len=64, output_len=641))

    assert (short["attention"], short["dense"], short["head"]) == ("torch", "torch", "numba")
    assert long == dict.fromkeys(MODULES, "numba")


def test_small_kernels_count() -> None:
    """Torch has 14 passes for our 3 kernels, which twice the rate of products does not pay for."""
    without = machine(numba=(1e6, 1e6), torch=(2e6, 2e6))
    with_launches = machine(numba=(1e6, 1e6), torch=(2e6, 2e6), launch_s=1.0)
    one = Workload(prompt_len=1, output_len=8)

    assert chosen(without, one)["attention"] == "torch"
    assert chosen(with_launches, one)["attention"] == "numba"


def test_there_is_no_choice_of_one_backend() -> None:
    """Profiles of reference machines, and of float16, which only torch multiplies."""
    for hardware in (
        machine(numba=(1.0, 1.0), torch=None),
        machine(numba=None, torch=(9.0, 9.0)),
        machine(numba=None, torch=None),
    ):
        assert chosen(hardware, Workload()) == OWN_BACKENDS


def test_quantised_weights_stay_with_our_kernels() -> None:
    """The engine has no path for torch's products of them; routers are not quantised."""
    kinds: tuple[WeightKind, ...] = ("bfloat16", "int4", "int8")
    machines = [machine(numba=(1.0, 1.0), torch=(9.0, 9.0), kind=kind) for kind in kinds]
    rates: dict[WeightKind, float] = dict.fromkeys(("bfloat16", "float32", *QUANTISED), 2.0**60)
    hardware = replace(
        machines[0],
        cpu_by_threads=(replace(machines[0].cpu, flop_per_s=rates),),
        samples=tuple(sample for each in machines for sample in each.samples),
    )
    spec = dataclasses.replace(SPEC, quantization="int4")

    assert chosen(hardware, Workload(), spec) == {"router": "torch"}


QUANTISED: tuple[WeightKind, ...] = ("int8", "int4")


def test_what_is_chosen_is_what_is_priced() -> None:
    """Torch is 10 times as fast: decode takes a tenth of what our kernels would."""
    costs = CostModel(machine(numba=(10.0, 10.0), torch=(100.0, 100.0)))
    placement, workload = strategies.placement(SPEC, "cpu", 0), Workload(prompt_len=8, output_len=9)
    ours = estimate(SPEC, placement, costs, workload, backends=dict.fromkeys(MODULES, "numba"))
    found = estimate(SPEC, placement, costs, workload)

    assert found.tpot_s == pytest.approx(ours.tpot_s / 10, rel=1e-6)
    assert found.e2e_s == pytest.approx(ours.e2e_s / 10, rel=1e-6)

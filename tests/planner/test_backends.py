"""Who computes the CPU's products, by predicted seconds of the run; our kernels where near."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec.structs import replace

from planner import strategies
from planner.backends import cpu_backends
from planner.cost_model import OWN_BACKENDS
from planner.estimate import estimate
from planner.hardware import Backend, DeviceProfile, HardwareProfile, LinearSample
from planner.model_spec import Module, WeightKind
from planner.workload import Workload
from tests.planner.tiny import tiny_device, tiny_machine, tiny_spec

SPEC = tiny_spec("dm")
MODULES: tuple[Module, ...] = ("attention", "dense", "router", "experts", "head")


def cpu(
    *, numba: tuple[float, float], torch: tuple[float, float], launch_s: float = 0.0
) -> DeviceProfile:
    """Rates at 1 and at 64 tokens; memory and attention take no time."""
    fast = tiny_device(
        "cpu", read_bytes_per_s=2.0**60, attention_bytes_per_s=2.0**60, launch_s=launch_s
    )
    rates: dict[Backend, tuple[float, float]] = {"numba": numba, "torch": torch}
    return replace(
        fast,
        linear=tuple(
            LinearSample(dtype="bfloat16", num_tokens=tokens, flop_per_s=rate, backend=backend)
            for backend, each in rates.items()
            for tokens, rate in zip((1, 64), each, strict=True)
        ),
        torch_launch_s=launch_s,
    )


def machine(device: DeviceProfile) -> HardwareProfile:
    return tiny_machine(cpu=device)


@pytest.mark.parametrize(
    ("torch_rate", "winner"), [(105.0, "numba"), (110.0, "numba"), (112.0, "torch"), (50, "numba")]
)
def test_torch_must_win_by_a_tenth(torch_rate: float, winner: Backend) -> None:
    """100 / 112 is 0.89 of the seconds, 100 / 110 is 0.91."""
    device = cpu(numba=(100.0, 100.0), torch=(torch_rate, torch_rate))
    assert cpu_backends(SPEC, machine(device), Workload()) == dict.fromkeys(MODULES, winner)


def test_long_prompts_and_long_outputs_may_differ() -> None:
    """Ours at 1 token twice as fast, at 64 half: 64 tokens of prompt against 1 or 640 of output.

    Attention: seconds are tokens * FLOPs / rate: 64/100 + 0 by us and 64/200 by torch; with 640
    steps 64/100 + 640/100 against 64/200 + 640/50. The head has one row in both phases.
    """
    device = cpu(numba=(100.0, 100.0), torch=(50.0, 200.0))
    short = cpu_backends(SPEC, machine(device), Workload(prompt_len=64, output_len=1))
    long = cpu_backends(SPEC, machine(device), Workload(prompt_len=64, output_len=641))

    assert (short["attention"], short["dense"], short["head"]) == ("torch", "torch", "numba")
    assert long == dict.fromkeys(MODULES, "numba")


def test_small_operations_count() -> None:
    """Torch has 17 for our 7 of attention, which twice the rate of products does not pay for."""
    rates = {"numba": (1e6, 1e6), "torch": (2e6, 2e6)}
    without = cpu(numba=rates["numba"], torch=rates["torch"])
    with_launches = cpu(numba=rates["numba"], torch=rates["torch"], launch_s=1.0)
    one = Workload(prompt_len=1, output_len=8)

    assert cpu_backends(SPEC, machine(without), one)["attention"] == "torch"
    assert cpu_backends(SPEC, machine(with_launches), one)["attention"] == "numba"


def test_there_is_no_choice_of_one_backend() -> None:
    """Profiles of reference machines, and of float16, which only torch multiplies."""
    device = cpu(numba=(1.0, 1.0), torch=(9.0, 9.0))
    for backend in ("numba", "torch"):
        only = tuple(sample for sample in device.linear if sample.backend == backend)
        found = cpu_backends(SPEC, machine(replace(device, linear=only)), Workload())
        assert found == OWN_BACKENDS


def test_quantised_weights_stay_with_our_kernels() -> None:
    """The engine has no path for torch's products of them; routers are not quantised."""
    device = cpu(numba=(1.0, 1.0), torch=(9.0, 9.0))
    kinds: tuple[WeightKind, ...] = ("int4", "int8")
    rates: dict[Backend, float] = {"numba": 1.0, "torch": 9.0}
    samples = tuple(
        LinearSample(dtype=kind, num_tokens=1, flop_per_s=rate, backend=backend)
        for kind in kinds
        for backend, rate in rates.items()
    )
    device = replace(device, linear=(*device.linear, *samples))
    spec = dataclasses.replace(SPEC, quantization="int4")

    assert cpu_backends(spec, machine(device), Workload()) == {"router": "torch"}


def test_what_is_chosen_is_what_is_priced() -> None:
    """Torch is 10 times as fast: decode takes a tenth of what our kernels would."""
    hardware = machine(cpu(numba=(10.0, 10.0), torch=(100.0, 100.0)))
    placement, workload = strategies.placement(SPEC, "cpu", 0), Workload(prompt_len=8, output_len=9)
    ours = estimate(SPEC, placement, hardware, workload, backends=dict.fromkeys(MODULES, "numba"))
    chosen = estimate(SPEC, placement, hardware, workload)

    assert chosen.tpot_s == pytest.approx(ours.tpot_s / 10, rel=1e-6)
    assert chosen.e2e_s == pytest.approx(ours.e2e_s / 10, rel=1e-6)

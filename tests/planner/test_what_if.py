"""What-if machines: what a text changes, what it may not say, samples that go with the rates."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner.device import Sample
from planner.errors import PlannerError
from planner.hardware import HardwareProfile
from planner.kernels import HostMemory
from planner.search import profile_fingerprint
from planner.speed_of_light import speed_of_light
from planner.what_if import RATES, what_if, what_if_keys, with_more_gpu_memory, with_rates
from tests.machines import toy_machine
from tests.planner.sampled import Sampled, sampled
from tests.planner.tiny import real_machine, tiny_device, tiny_machine

DESKTOP = HardwareProfile.load(
    Path(__file__).parents[2] / "profiles" / "machines" / "desktop-rtx4090.json"
)


def test_memory_is_the_whole_devices() -> None:
    """The runtime takes its part of it as before."""
    machine = what_if(DESKTOP, "gpu-mem-gb=48, cpu-mem-gb=32.5")
    assert machine.gpu is not None and DESKTOP.gpu is not None
    assert machine.gpu.memory_bytes == 48_000_000_000
    assert machine.gpu.reserved_bytes == DESKTOP.gpu.reserved_bytes
    assert {cpu.memory_bytes for cpu in machine.cpu_by_threads} == {32_500_000_000}
    assert what_if_keys("gpu-mem-gb=48, cpu-mem-gb=32.5") == ("gpu-mem-gb", "cpu-mem-gb")


def test_rates_are_those_of_the_profile() -> None:
    """All numbers of threads change in proportion."""
    machine = what_if(DESKTOP, "cpu-gbps=90,gpu-gbps=2000")
    assert machine.gpu is not None
    assert machine.gpu.read_bytes_per_s == pytest.approx(2000e9)
    assert machine.cpu.read_bytes_per_s == pytest.approx(90e9)
    ratios = {
        round(new.read_bytes_per_s / old.read_bytes_per_s, 9)
        for new, old in zip(machine.cpu_by_threads, DESKTOP.cpu_by_threads, strict=True)
    }
    assert len(ratios) == 1


@pytest.mark.parametrize(
    ("value", "achieved"), [("3.0x4", 3e9), ("4.0x8", 12.5e9), ("5.0x16", 53.5e9), ("17.5", 17.5e9)]
)
def test_a_link_is_what_copies_achieve(value: str, achieved: float) -> None:
    """Of a datasheet's ceiling copies are assumed to reach 0.91; an emulated link is reached."""
    machine = what_if(DESKTOP, f"link={value}")
    emulated = what_if(real_machine(), f"link={value}")
    assert machine.link is not None and emulated.link is not None
    assert 0.91 * machine.link.h2d_bytes_per_s == pytest.approx(achieved)
    assert machine.link.d2h_bytes_per_s == machine.link.h2d_bytes_per_s
    assert emulated.link.h2d_bytes_per_s == pytest.approx(achieved)
    assert machine.link.pageable_h2d_bytes_per_s is not None
    assert machine.link.pageable_h2d_bytes_per_s <= machine.link.h2d_bytes_per_s


def test_a_changed_machine_is_another_one() -> None:
    """A plan for it is refused on the machine as it is."""
    machine = what_if(DESKTOP, "link=4.0x8")
    assert machine.name == "desktop-rtx4090, what if link=4.0x8"
    assert profile_fingerprint(machine) != profile_fingerprint(DESKTOP)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu-mem=24", "'gpu-mem' is not one of gpu-mem-gb, cpu-mem-gb, link, cpu-gbps, gpu-gbps"),
        ("gpu-mem-gb", "'gpu-mem-gb' is no key=value; known keys are gpu-mem-gb, cpu-mem-gb"),
        ("", "'' is no key=value"),
        ("link=4.0x8,", "'' is no key=value"),
        ("link=4.0x8,link=5.0x8", "link is given twice, as '4.0x8' and '5.0x8'"),
        ("link=6.0x16", "link is '6.0x16' but must be a positive number below 1000000 of 1e9 byt"),
        ("link=4.0x2", "or one of 3.0x4, 3.0x8, 3.0x16, 4.0x4"),
        ("cpu-gbps=fast", "cpu-gbps is 'fast' but must be a positive number"),
        ("gpu-mem-gb=-3", "gpu-mem-gb is '-3' but must be a positive number"),
        ("gpu-mem-gb=0", "gpu-mem-gb is '0' but must be a positive number"),
        ("gpu-gbps=nan", "gpu-gbps is 'nan' but must be a positive number"),
        ("gpu-gbps=inf", "gpu-gbps is 'inf' but must be a positive number"),
    ],
)
def test_what_cannot_be_is_named(text: str, message: str) -> None:
    with pytest.raises(PlannerError) as error:
        what_if(DESKTOP, text)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["gpu-mem-gb=8", "link=4.0x8", "gpu-gbps=500"])
def test_a_machine_without_a_gpu_has_none_to_change(text: str) -> None:
    key, _, value = text.partition("=")
    with pytest.raises(PlannerError) as error:
        what_if(toy_machine(), text)
    assert str(error.value) == (
        f"{key} is '{value}' but toy machine has no GPU that may be used; leave {key} out"
    )


@settings(deadline=None, derandomize=True, max_examples=100)
@given(sampled(), st.sampled_from(RATES), st.floats(1.0, 10.0))
def test_samples_are_never_slower_on_a_faster_machine_nor_faster_than_light(
    case: Sampled, rate: str, factor: float
) -> None:
    """On either kind of device; those of a resource that did not change keep their seconds."""
    if case.axis.lane != "cpu":
        return
    device = replace(case.device, kind="cpu", num_threads=1)
    machine = replace(toy_machine(), num_threads=1, cpu_by_threads=(device,), samples=case.samples)
    for each in RATES:
        faster = with_rates(machine, each, factor)
        for before, after in zip(case.samples, faster.samples, strict=True):
            light_s = speed_of_light(after.call, faster.cpu).seconds
            assert after.seconds <= before.seconds * (1 + 1e-12)
            assert after.seconds >= light_s * (1 - 1e-9)
            assert after.seconds >= before.seconds / factor * (1 - 1e-9)
            if not each.startswith("cpu"):
                assert after == before


def test_a_sample_changes_with_what_binds_it() -> None:
    """A product of 8 x 8 in bfloat16: 128 bytes for a token, and 128 FLOPs for each token.

    At 16 bytes and 32 FLOPs a second one token takes 8 s of reading, 100 take 400 s of computing.
    """
    device = tiny_device("cpu", flop_per_s=32.0)
    machine = tiny_machine(cpu=device)
    linear = next(sample for sample in machine.samples if sample.kernel == "linear")
    samples = (replace(linear, seconds=10.0), replace(linear, num_tokens=100, seconds=800.0))
    machine = replace(machine, samples=samples)

    memory = with_rates(machine, "cpu memory", 2.0)
    compute = with_rates(machine, "cpu compute", 2.0)
    assert [sample.seconds for sample in memory.samples] == pytest.approx([5.0, 800.0])
    assert [sample.seconds for sample in compute.samples] == pytest.approx([10.0, 400.0])
    # four times the rate of reads, and the 4 s of computing bind: half of the light, not a quarter
    both = with_rates(machine, "cpu memory", 4.0).samples[0]
    assert both.seconds == pytest.approx(5.0)


def copy_sample(num_bytes: int, seconds: float, memory: HostMemory) -> Sample:
    return Sample(
        lane="h2d",
        kernel="copy",
        backend="torch",
        shape=(num_bytes,),
        memory=memory,
        seconds=seconds,
    )


def test_copies_keep_the_time_that_starting_them_takes() -> None:
    """At 10 GB/s 1 GB takes 0.1 s, and 10 us to start; a pageable one is bound by its core."""
    link = tiny_machine(gpu=tiny_device("gpu"), link_bytes_per_s=10e9)
    samples = (
        copy_sample(1_000_000_000, 0.10001, "pinned"),
        copy_sample(100, 10e-6, "pinned"),
        copy_sample(1_000_000_000, 0.4, "pageable"),
    )
    machine = replace(link, samples=samples)

    faster = [sample.seconds for sample in with_rates(machine, "link", 2.0).samples]
    slower = [sample.seconds for sample in with_rates(machine, "link", 0.1).samples]
    assert faster == pytest.approx([0.05001, 10e-6, 0.4], rel=1e-3)
    assert slower == pytest.approx([1.00001, 10e-6, 1.0], rel=1e-1)


def test_more_gpu_memory_is_all_for_plans() -> None:
    more = with_more_gpu_memory(DESKTOP, 1_000)
    assert more.gpu is not None and DESKTOP.gpu is not None
    assert more.gpu.memory_bytes - more.gpu.reserved_bytes == (
        DESKTOP.gpu.memory_bytes - DESKTOP.gpu.reserved_bytes + 1_000
    )


def test_a_changed_machine_is_still_a_profile() -> None:
    """No sample is faster than the changed ceilings allow."""
    machine = tiny_machine(gpu=tiny_device("gpu"))
    # whose hand-over takes no time, which no file may say
    samples = tuple(sample for sample in machine.samples if sample.kernel != "handover")
    machine = replace(machine, samples=samples)
    for rate in RATES:
        for factor in (0.3, 1.1, 7.0):
            changed = with_rates(machine, rate, factor)
            again = HardwareProfile.from_json(changed.to_json(), source="changed")
            assert again == changed

"""HardwareProfile: interpolation, what may be used of a machine, and strict JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from planner.errors import ProfileError
from planner.hardware import (
    EMULATED_LINK_LATENCY_S,
    DeviceProfile,
    HardwareProfile,
    LinearSample,
    Resources,
)
from planner.model_spec import WeightKind
from tests.planner.tiny import tiny_device, tiny_machine

MACHINE = tiny_machine(gpu=tiny_device("gpu", reserved_bytes=7))


def sampled(*points: tuple[int, float]) -> DeviceProfile:
    samples = tuple(
        LinearSample(dtype="bfloat16", num_tokens=tokens, flop_per_s=rate)
        for tokens, rate in points
    )
    return replace(tiny_device("cpu"), linear=samples)


@pytest.mark.parametrize(
    ("num_tokens", "flop_per_s"),
    [
        (4, 100.0),
        (16, 400.0),
        (8, 200.0),  # halfway in the logarithm: the geometric mean of 100 and 400
        (32, 800.0**0.5 * 800.0**0.5),  # halfway to 64 tokens
        (64, 1600.0),
        (1000, 1600.0),  # flat above
        (1, 25.0),  # below, a step takes the time of 4 tokens
        (2, 50.0),
    ],
)
def test_rates_lie_between_the_samples(num_tokens: int, flop_per_s: float) -> None:
    """Log-log between samples; samples in any order."""
    device = sampled((64, 1600.0), (4, 100.0), (16, 400.0))

    assert device.linear_flop_per_s("bfloat16", num_tokens) == pytest.approx(flop_per_s, rel=1e-12)


def test_one_sample_serves_every_token_count() -> None:
    device = sampled((4, 100.0))
    assert [device.linear_flop_per_s("bfloat16", tokens) for tokens in (2, 4, 8)] == [50, 100, 100]


def test_two_samples_of_one_token_count_are_not_a_division_by_zero() -> None:
    device = sampled((4, 100.0), (4, 100.0), (16, 400.0))
    assert device.linear_flop_per_s("bfloat16", 16) == pytest.approx(400.0)


def test_each_backend_has_its_own_rates() -> None:
    """Without a name it is the first of those that there are, our kernels before torch."""
    ours = sampled((1, 100.0), (64, 400.0))
    torch = LinearSample(dtype="bfloat16", num_tokens=8, flop_per_s=70.0, backend="torch")
    both = replace(ours, linear=(torch, *ours.linear))
    alone = replace(ours, linear=(torch,))

    assert (both.backends("bfloat16"), alone.backends("bfloat16")) == (
        ("numba", "torch"),
        ("torch",),
    )
    assert both.linear_flop_per_s("bfloat16", 64) == 400.0
    assert both.linear_flop_per_s("bfloat16", 64, "torch") == 70.0
    assert alone.linear_flop_per_s("bfloat16", 64) == 70.0
    with pytest.raises(ProfileError, match="no rates for bfloat16"):
        alone.linear_flop_per_s("bfloat16", 64, "numba")


def test_profiles_from_before_backends_hold_the_rates_of_our_kernels() -> None:
    """And price every operation of torch as one of ours."""
    document = json.loads(MACHINE.to_json())
    for cpu in document["cpu_by_threads"]:
        del cpu["torch_launch_s"]
        for sample in cpu["linear"]:
            del sample["backend"]
    found = HardwareProfile.from_json(json.dumps(document).encode(), source="old.json")

    assert found == MACHINE
    assert found.cpu.backends("bfloat16") == ("numba",)
    assert found.cpu.torch_op_s == found.cpu.launch_s


def test_the_emulated_accelerator_computes_with_torch() -> None:
    """Its operations cost what torch's do; a format that was measured with torch has that rate."""
    cpu = sampled((1, 100.0))
    samples = (
        *cpu.linear,
        LinearSample(dtype="bfloat16", num_tokens=1, flop_per_s=70.0, backend="torch"),
        LinearSample(dtype="float32", num_tokens=1, flop_per_s=30.0),
    )
    cpu = replace(cpu, linear=samples, launch_s=1.0, torch_launch_s=5.0)
    machine = replace(MACHINE, cpu_by_threads=(cpu,)).with_emulated_gpu(
        memory_bytes=300, link_bytes_per_s=8.0
    )

    assert machine.gpu is not None
    assert machine.gpu.linear_flop_per_s("bfloat16", 1) == 70.0
    assert machine.gpu.linear_flop_per_s("float32", 1) == 30.0
    assert (machine.gpu.launch_s, machine.cpu.launch_s) == (5.0, 1.0)


def test_a_missing_format_is_named_with_what_to_do() -> None:
    with pytest.raises(ProfileError, match=r"tiny cpu has no rates for float16; .*hetero profile"):
        tiny_device("cpu").linear_flop_per_s("float16", 1)


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "flop_per_s"),
    [
        ("int8", 1, 100.0 * 16 / 8.125),  # bytes of a weight and of its share of a scale
        ("int4", 1, 100.0 * 16 / 4.125),
        ("int8", 0.5, 50.0 * 16 / 8.125),
        ("int4", 16, 400.0),  # 300 * 3.88 is more than bfloat16's fastest
        ("int8", 64, 400.0),
        ("int8", 1000, 400.0),
    ],
)
def test_rates_of_quantised_weights_are_assumed_from_those_of_bfloat16(
    dtype: WeightKind, num_tokens: float, flop_per_s: float
) -> None:
    device = sampled((64, 400.0), (1, 100.0), (16, 300.0))
    assert device.linear_flop_per_s(dtype, num_tokens) == pytest.approx(flop_per_s, rel=1e-12)


def test_nothing_is_assumed_where_there_is_a_measured_rate() -> None:
    device = sampled((1, 100.0), (64, 400.0))
    slow = LinearSample(dtype="int4", num_tokens=1, flop_per_s=7.0)
    assert replace(device, linear=(*device.linear, slow)).linear_flop_per_s("int4", 64) == 7.0


def test_nothing_is_assumed_of_a_gpu_of_torch_or_without_bfloat16() -> None:
    """Quantised weights run on the CPU only so far."""
    device = sampled((1, 100.0))
    for lacking in (replace(device, kind="cuda"), replace(device, linear=())):
        with pytest.raises(ProfileError, match="no rates for int4"):
            lacking.linear_flop_per_s("int4", 1)
    with pytest.raises(ProfileError, match="no rates for int4"):
        device.linear_flop_per_s("int4", 1, "torch")


def test_the_cpu_is_the_setting_that_decodes_fastest() -> None:
    """By the product of one token, not by the number of threads."""
    settings = tuple(
        replace(sampled((1, rate), (64, 9999.0 - rate)), num_threads=threads)
        for threads, rate in ((1, 10.0), (4, 30.0), (8, 20.0))
    )
    assert replace(MACHINE, cpu_by_threads=settings).cpu.num_threads == 4


def test_of_equal_settings_the_one_with_more_threads_counts() -> None:
    settings = tuple(replace(sampled((1, 10.0)), num_threads=threads) for threads in (2, 4, 1))
    assert replace(MACHINE, cpu_by_threads=settings).cpu.num_threads == 4


def test_a_machine_can_be_used_without_its_gpu() -> None:
    alone = MACHINE.without_gpu()

    assert (alone.gpu, alone.link) == (None, None)
    assert alone.cpu == MACHINE.cpu
    assert alone.resources == Resources(accelerator="none", cpu_bytes=1_000_000)


def test_a_stated_budget_is_the_callers_own() -> None:
    """Nothing is taken off it for the runtime, on either device; every CPU setting has it."""
    machine = replace(
        MACHINE,
        cpu_by_threads=tuple(tiny_device("cpu", num_threads=n, reserved_bytes=5) for n in (1, 2)),
    )
    less = machine.with_memory(cpu_bytes=1000, gpu_bytes=100)

    assert less.gpu is not None
    assert (less.gpu.memory_bytes, less.gpu.reserved_bytes) == (100, 0)
    assert [(cpu.memory_bytes, cpu.reserved_bytes) for cpu in less.cpu_by_threads] == [
        (1000, 0),
        (1000, 0),
    ]
    assert machine.with_memory(cpu_bytes=None, gpu_bytes=None) == machine


def test_a_gpu_budget_for_a_machine_without_one_changes_nothing() -> None:
    alone = MACHINE.without_gpu()
    assert alone.with_memory(cpu_bytes=None, gpu_bytes=100) == alone


def test_the_emulated_accelerator_is_one_core_with_memory_of_the_host() -> None:
    """One thread's rates and 300 of 1000 bytes; the CPU keeps 700 and fewer threads than all."""
    cpus = tuple(
        replace(
            tiny_device("cpu", memory_bytes=1000, num_threads=threads, reserved_bytes=50),
            read_bytes_per_s=threads * 10.0,
        )
        for threads in (4, 1, 2)
    )
    machine = replace(MACHINE, cpu_by_threads=cpus).with_emulated_gpu(
        memory_bytes=300, link_bytes_per_s=8.0
    )

    assert machine.gpu is not None and machine.link is not None
    assert (machine.gpu.kind, machine.gpu.name) == ("emulated", "emulated on tiny cpu")
    assert (machine.gpu.num_threads, machine.gpu.read_bytes_per_s) == (1, 10.0)
    assert (machine.gpu.memory_bytes, machine.gpu.reserved_bytes) == (300, 0)
    assert [(cpu.num_threads, cpu.memory_bytes) for cpu in machine.cpu_by_threads] == [
        (1, 700),
        (2, 700),
    ]
    assert (machine.link.h2d_bytes_per_s, machine.link.d2h_bytes_per_s) == (8.0, 8.0)
    assert machine.link.latency_s == EMULATED_LINK_LATENCY_S
    assert machine.resources == Resources(
        accelerator="emulated", gpu_bytes=300, cpu_bytes=700, link_bytes_per_s=8.0
    )


def test_a_machine_of_one_core_shares_it_with_the_emulated_accelerator() -> None:
    machine = tiny_machine().with_emulated_gpu(memory_bytes=2_000_000, link_bytes_per_s=8.0)

    assert [(cpu.num_threads, cpu.memory_bytes) for cpu in machine.cpu_by_threads] == [(1, 0)]


def test_resources_name_the_gpu_of_a_profile() -> None:
    assert MACHINE.resources == Resources(
        accelerator="cuda", gpu_bytes=1_000_000, cpu_bytes=1_000_000
    )


def test_a_profile_goes_through_json_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(MACHINE.to_json())

    assert HardwareProfile.load(path) == MACHINE


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"colour": "red"}, "unknown field `colour`"),
        ({"name": 3}, r"Expected `str`, got `int` - at `\$.name`"),
        ({"schema_version": 2}, "schema_version is 2, this is 1"),
        ({"cpu_by_threads": []}, "cpu_by_threads is empty"),
        ({"link": None}, "gpu and link must be given together"),
        ({"gpu": None}, "gpu and link must be given together"),
        ({"provenance": "guessed"}, r"\$.provenance"),
    ],
)
def test_a_profile_that_is_not_one_is_refused_by_name(
    change: dict[str, Any], complaint: str
) -> None:
    text = json.dumps({**json.loads(MACHINE.to_json()), **change}).encode()

    with pytest.raises(ProfileError, match=rf"m\.json is not a hardware profile: .*{complaint}"):
        HardwareProfile.from_json(text, source="m.json")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("gpu", "read_bytes_per_s", 0.0),
        ("gpu", "attention_bytes_per_s", -1.0),
        ("gpu", "attention_flop_per_s", 0.0),
        ("gpu", "launch_s", -1e-6),
        ("gpu", "memory_bytes", -1),
        ("gpu", "num_threads", 0),
        ("link", "h2d_bytes_per_s", 0.0),
        ("link", "d2h_bytes_per_s", 0.0),
        ("link", "latency_s", -1.0),
    ],
)
def test_a_rate_that_no_machine_has_is_refused_where_it_is_read(
    section: str, key: str, value: float
) -> None:
    """Not as a division by zero in the middle of a search."""
    document = json.loads(MACHINE.to_json())
    document[section][key] = value

    with pytest.raises(ProfileError, match=rf"\$\.{section}\.{key}"):
        HardwareProfile.from_json(json.dumps(document).encode(), source="m.json")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(ProfileError, match=r"m\.json is not a hardware profile"):
        HardwareProfile.from_json(text, source="m.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(ProfileError, match=r"cannot read the profile .*none\.json: No such file"):
        HardwareProfile.load(path)

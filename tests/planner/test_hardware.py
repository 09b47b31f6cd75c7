"""HardwareProfile: which of its settings counts, what may be used of it, and strict JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from planner.device import Sample
from planner.errors import ProfileError
from planner.hardware import EMULATED_LINK_LATENCY_S, HardwareProfile, Resources
from tests.planner.tiny import tiny_device, tiny_machine

MACHINE = replace(tiny_machine(gpu=tiny_device("gpu", reserved_bytes=7)), samples=())


ATTENTION = {"kernel": "decode_attention", "shape": [2, 1, 4], "context": 9, "seconds": 99.0}


def product(seconds: float = 1.0, **changes: Any) -> Sample:
    """16 rows of 16 columns for one token: 512 bytes, 512 FLOPs."""
    sample = Sample(lane="cpu", kernel="linear", format="bfloat16", shape=(16, 16), seconds=seconds)
    return replace(sample, **changes)


def test_backends_are_those_with_products_of_a_format_on_the_cpu_as_it_is_used() -> None:
    """Ours first; not those of other threads, lanes, kernels or formats."""
    samples = (
        product(backend="torch"),
        product(),
        product(lane="gpu", backend="ipex"),
        product(num_threads=4, backend="ipex"),
        product(kernel="experts", shape=(1, 16, 16), backend="ipex"),
        product(format="float32", backend="torch"),
    )
    machine = replace(MACHINE, samples=samples)

    assert machine.backends("bfloat16") == ("numba", "torch")
    assert machine.backends("float32") == ("torch",)
    assert machine.backends("int8") == ()


def test_a_cpu_without_a_rate_of_torchs_operations_prices_them_as_ours() -> None:
    cpu = tiny_device("cpu", launch_s=2.0)
    assert (cpu.torch_op_s, replace(cpu, torch_launch_s=5.0).torch_op_s) == (2.0, 5.0)


def test_the_cpu_is_the_setting_that_the_profile_names() -> None:
    """The one that was measured to decode fastest, whatever it reads."""
    settings = tuple(
        tiny_device("cpu", num_threads=threads, read_bytes_per_s=10.0 * threads)
        for threads in (1, 4, 8)
    )
    machine = replace(MACHINE, cpu_by_threads=settings)

    assert replace(machine, num_threads=4).cpu.num_threads == 4
    assert machine.cpu.num_threads == 8


def test_the_cpu_of_a_datasheet_is_the_setting_that_reads_fastest() -> None:
    """Of equals the one with more threads."""
    settings = tuple(
        tiny_device("cpu", num_threads=threads, read_bytes_per_s=rate)
        for threads, rate in ((2, 10.0), (8, 30.0), (4, 30.0), (16, 20.0))
    )
    assert replace(MACHINE, cpu_by_threads=settings).cpu.num_threads == 8


def test_the_emulated_accelerator_computes_as_torch_does_with_one_thread() -> None:
    """Samples of one thread by torch become its own; those of other threads stay the CPU's."""
    cpus = tuple(
        replace(tiny_device("cpu", num_threads=threads, launch_s=1.0), torch_launch_s=5.0)
        for threads in (1, 2)
    )
    by_torch, by_us = product(backend="torch"), product()
    by_two, on_gpu = product(num_threads=2, backend="torch"), product(lane="gpu", backend="torch")
    machine = replace(MACHINE, cpu_by_threads=cpus, samples=(by_torch, by_us, by_two, on_gpu))
    emulated = machine.with_emulated_gpu(memory_bytes=300, link_bytes_per_s=8.0)

    assert emulated.gpu is not None
    assert (emulated.gpu.launch_s, emulated.cpu.launch_s) == (5.0, 1.0)
    assert emulated.samples == (by_torch, by_us, by_two, replace(by_torch, lane="gpu"))


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
    machine = replace(MACHINE, samples=(product(32.0, busy=("h2d",), spread=0.25),))
    path.write_bytes(machine.to_json())

    assert HardwareProfile.load(path) == machine


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"colour": "red"}, "unknown field `colour`"),
        ({"name": 3}, r"Expected `str`, got `int` - at `\$.name`"),
        ({"schema_version": 1}, "schema_version is 1, this is 2"),
        ({"cpu_by_threads": []}, "cpu_by_threads is empty"),
        ({"link": None}, "gpu and link must be given together"),
        ({"gpu": None}, "gpu and link must be given together"),
        ({"provenance": "guessed"}, r"\$.provenance"),
        ({"confidence": "middling"}, r"\$.confidence"),
        ({"num_threads": 3}, "num_threads is 3, which cpu_by_threads does not have"),
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
        ("gpu", "elements_per_s", -1.0),
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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seconds": 0.0}, r"\$\.samples\[1\]\.seconds"),
        ({"seconds": 31.9}, r"31\.9 s are less than the 32 s .* tiny cpu .*\$\.samples\[1\]\.sec"),
        ({"lane": "gpu", "seconds": 31.0}, r"the 32 s that the ceilings of tiny gpu allow"),
        ({"kernel": "guess"}, r"\$\.samples\[1\]\.kernel"),
        ({"shape": [16]}, r"the shape of linear has 2 numbers, this one 1 - at `\$\.samples\[1\]"),
        ({"shape": [16, 0]}, r"\$\.samples\[1\]\.shape"),
        ({"num_tokens": 0}, r"\$\.samples\[1\]\.num_tokens"),
        ({"num_threads": 3}, r"cpu_by_threads has no 3 threads - at `\$\.samples\[1\]"),
        ({"format": "float16"}, r"no rates for float16; .* - at `\$\.samples\[1\]\.format`"),
        ({"lane": "h2d"}, r"linear does not run on the lane h2d - at `\$\.samples\[1\]`"),
        ({"kernel": "copy", "shape": [16]}, r"copy does not run on the lane cpu"),
        ({**ATTENTION, "context": 0}, "the context of decode_attention is 0"),
        ({**ATTENTION, "format": "int8"}, "decode_attention has no format int8"),
        ({"spread": -0.1}, r"\$\.samples\[1\]\.spread"),
        ({"colour": "red"}, r"unknown field `colour`"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_where_it_is_read(
    change: dict[str, Any], complaint: str
) -> None:
    """16 * 16 * 2 bytes take 32 s at 16 bytes a second, whoever measured it."""
    document = json.loads(replace(MACHINE, samples=(product(40.0), product(32.0))).to_json())
    HardwareProfile.from_json(json.dumps(document).encode(), source="m.json")
    document["samples"][1] |= change

    with pytest.raises(ProfileError, match=rf"m\.json is not a hardware profile: .*{complaint}"):
        HardwareProfile.from_json(json.dumps(document).encode(), source="m.json")


def test_a_sample_of_the_gpu_needs_one() -> None:
    machine = replace(MACHINE.without_gpu(), samples=(product(40.0, lane="gpu"),))
    with pytest.raises(ProfileError, match=r"the profile has no gpu - at `\$\.samples\[0\]`"):
        HardwareProfile.from_json(machine.to_json(), source="m.json")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(ProfileError, match=r"m\.json is not a hardware profile"):
        HardwareProfile.from_json(text, source="m.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(ProfileError, match=r"cannot read the profile .*none\.json: No such file"):
        HardwareProfile.load(path)

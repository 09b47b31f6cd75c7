"""Fingerprint: what it reads, and the sentence on the first difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pynvml
import pytest
from msgspec.structs import replace

from cpu_kernels.isa import ENVIRONMENT_VARIABLE, Isa, isa
from hetero.measure import fingerprint
from hetero.measure.fingerprint import (
    GpuFacts,
    cpu_flags,
    cpu_model,
    describe_mismatch,
    gpu_used_bytes,
    huge_pages,
    machine_fingerprint,
    nvidia_gpus,
    package_version,
)
from planner.fingerprint import Fingerprint

ONE = Fingerprint(
    cpu="A CPU",
    instructions="avx512",
    num_cores=8,
    num_numa_nodes=1,
    memory_bytes=32_000_000_000,
    huge_pages="madvise",
    gpu="A GPU",
    gpu_uuid="GPU-1",
    pcie="4.0 x16",
    driver="550",
    torch="2.8.0",
    numba="0.61",
    hetero="0.1.0",
)


def test_same_machine_has_no_mismatch() -> None:
    """Equal fingerprints need no sentence."""
    assert describe_mismatch(ONE, ONE) is None


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("cpu", "B CPU", "the CPU was A CPU and is B CPU"),
        ("instructions", "avx2", "the level of vector instructions was avx512 and is avx2"),
        ("num_cores", 4, "the number of cores was 8 and is 4"),
        ("num_numa_nodes", 2, "the number of NUMA nodes was 1 and is 2"),
        ("huge_pages", "never", "the state of huge pages was madvise and is never"),
        ("pcie", "4.0 x8", "the GPU's PCIe link was 4.0 x16 and is 4.0 x8"),
        ("pcie", None, "the GPU's PCIe link was 4.0 x16 and is none"),
        ("memory_bytes", 16_000_000_000, "the memory was 32.0 GB and is 16.0 GB"),
        ("gpu", None, "the GPU was A GPU and is none"),
        ("gpu_uuid", "GPU-2", "the GPU UUID was GPU-1 and is GPU-2"),
        ("driver", "560", "the GPU driver was 550 and is 560"),
        ("torch", "2.9.0", "the torch version was 2.8.0 and is 2.9.0"),
        ("numba", "0.62", "the numba version was 0.61 and is 0.62"),
        ("hetero", "0.2.0", "the hetero version was 0.1.0 and is 0.2.0"),
    ],
)
def test_mismatch_names_field_and_both_values(field: str, value: object, sentence: str) -> None:
    """Every field is compared."""
    assert describe_mismatch(ONE, replace(ONE, **{field: value})) == sentence


def test_every_field_is_compared() -> None:
    """A field that is added must be named, or a profile of another machine would pass."""
    assert set(fingerprint._FIELD_NAMES) == set(Fingerprint.__struct_fields__)


@pytest.mark.parametrize("field", ["instructions", "num_numa_nodes", "huge_pages", "pcie"])
def test_what_an_old_profile_does_not_know_cannot_differ(field: str) -> None:
    """It was written before the field was, and is read and used as it is."""
    document = json.loads(msgspec.json.encode(ONE))
    del document[field]
    old = msgspec.json.decode(json.dumps(document).encode(), type=Fingerprint)

    assert describe_mismatch(old, ONE) is None
    assert describe_mismatch(ONE, old) is None


def test_lowered_instructions_are_another_machine() -> None:
    """HETERO_ISA decides which kernels run, so rates of another level are not this one's."""
    code = (
        "from hetero.measure.fingerprint import machine_fingerprint as f; print(f().instructions)"
    )
    lowered = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, ENVIRONMENT_VARIABLE: "portable"},
    )
    here = machine_fingerprint()

    assert here.instructions == isa().level
    assert lowered.stdout.split() == ["portable"]


def test_without_llvmlite_the_instructions_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """hetero doctor compares fingerprints and lives to say what is missing."""

    def missing() -> Isa:
        raise ImportError("llvmlite")

    monkeypatch.setattr(fingerprint, "isa", missing)
    assert machine_fingerprint().instructions == "unknown"


def test_memory_may_move_by_a_kernel_update() -> None:
    """A few megabytes of 32 GB are the same machine."""
    assert describe_mismatch(ONE, replace(ONE, memory_bytes=32_010_000_000)) is None


def test_this_machine_equals_itself() -> None:
    """Two readings agree and hold real values."""
    here = machine_fingerprint()
    assert describe_mismatch(here, machine_fingerprint()) is None
    assert here.num_cores >= 1
    assert here.memory_bytes > 0
    assert here.num_numa_nodes is None or here.num_numa_nodes >= 1
    assert here.torch == package_version("torch")


def test_fingerprint_does_not_import_torch() -> None:
    """`hetero plan` compares fingerprints without the import of torch."""
    code = (
        "import sys; from hetero.measure.fingerprint import machine_fingerprint as f; f();"
        "import hetero.measure.store; print('torch' in sys.modules, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_cpu_is_read_from_cpuinfo(tmp_path: Path) -> None:
    """Model and flags are those of the first core."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2 GHz\nflags\t\t: fpu avx2\n")
    assert cpu_model(cpuinfo) == "Some CPU @ 2 GHz"
    assert cpu_flags(cpuinfo) == {"fpu", "avx2"}


def test_cpu_without_a_name_has_its_architecture(tmp_path: Path) -> None:
    """ARM systems tell no model name."""
    assert cpu_model(tmp_path / "missing") != ""
    assert cpu_flags(tmp_path / "missing") == frozenset()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("[always] madvise never\n", "always"),
        ("always [madvise] never\n", "madvise"),
        ("always madvise [never]\n", "never"),
        ("always [sometimes] never\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_huge_pages_are_what_is_in_brackets(tmp_path: Path, words: str, expected: str) -> None:
    """As the kernel's documentation of transparent huge pages says."""
    file = tmp_path / "enabled"
    file.write_text(words)
    assert huge_pages(file) == expected
    assert huge_pages(tmp_path / "missing") == "unknown"


def test_an_idle_link_is_the_one_it_wakes_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generation falls while nothing is copied; the width is that of the slot."""
    for name, fake in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.95",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: "A GPU",
        "nvmlDeviceGetUUID": lambda handle: "GPU-1",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=24_000_000_000),
        "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 1,
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 4,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 8,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
    }.items():
        monkeypatch.setattr(pynvml, name, fake)
    assert machine_fingerprint().pcie == "4.0 x8"


def test_a_gpu_that_hides_a_fact_is_still_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with unified memory has none of its own; one that cannot be opened is left out."""

    def handle(index: int) -> int:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return index

    def not_supported(handle: object) -> SimpleNamespace:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name, fake in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.95",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetHandleByUUID": lambda uuid: 1,
        "nvmlDeviceGetName": lambda handle: "NVIDIA GB10",
        "nvmlDeviceGetUUID": not_supported,
        "nvmlDeviceGetMemoryInfo": not_supported,
        "nvmlDeviceGetMaxPcieLinkGeneration": not_supported,
        "nvmlDeviceGetCurrPcieLinkWidth": not_supported,
    }.items():
        monkeypatch.setattr(pynvml, name, fake)
    expected = GpuFacts(
        name="NVIDIA GB10", uuid="unknown", driver="580.95", memory_bytes=None, pcie="unknown"
    )
    assert nvidia_gpus() == (expected,)
    assert gpu_used_bytes("GPU-1") is None
    assert machine_fingerprint().gpu == "NVIDIA GB10"

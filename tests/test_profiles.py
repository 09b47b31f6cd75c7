"""Shipped machine profiles against datasheets and their own rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from planner.hardware import HardwareProfile

PROFILES = Path(__file__).parents[1] / "profiles"
MACHINES = sorted((PROFILES / "machines").glob("*.json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A datasheet: GiB, GB/s, dense TFLOP/s with float32 accumulation, PCIe generation, lanes."""

    memory: float
    bandwidth: float
    float32: float
    float16: float
    bfloat16: float | None
    pcie: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """A datasheet: cores, base GHz, memory channels and MT/s of all sockets, PCIe generation.

    `flop_per_cycle` is a core's in float32, bfloat16 and int8.
    """

    cores: int
    base: float
    channels: int
    transfers: int
    pcie: int
    flop_per_cycle: tuple[int, int, int]


GPUS = {
    "Tesla T4": Gpu(memory=15, bandwidth=320, float32=8.1, float16=65, bfloat16=None, pcie=(3, 16)),
    "NVIDIA GeForce RTX 2080 Ti": Gpu(
        memory=11, bandwidth=616, float32=13.4, float16=53.8, bfloat16=None, pcie=(3, 16)
    ),
    "NVIDIA GeForce RTX 3060": Gpu(
        memory=12, bandwidth=360, float32=12.7, float16=25.6, bfloat16=25.6, pcie=(4, 16)
    ),
    "NVIDIA GeForce RTX 3090": Gpu(
        memory=24, bandwidth=936, float32=35.6, float16=71, bfloat16=71, pcie=(4, 16)
    ),
    "NVIDIA GeForce RTX 4060 Laptop GPU": Gpu(
        memory=8, bandwidth=256, float32=14.6, float16=29.1, bfloat16=29.1, pcie=(4, 8)
    ),
    "NVIDIA GeForce RTX 4060 Ti": Gpu(
        memory=16, bandwidth=288, float32=22.1, float16=44.1, bfloat16=44.1, pcie=(4, 8)
    ),
    "NVIDIA GeForce RTX 4090": Gpu(
        memory=24, bandwidth=1008, float32=82.6, float16=165.2, bfloat16=165.2, pcie=(4, 16)
    ),
    "NVIDIA GeForce RTX 5070 Ti": Gpu(
        memory=16, bandwidth=896, float32=43.9, float16=87.9, bfloat16=87.9, pcie=(5, 16)
    ),
    "NVIDIA GeForce RTX 5090": Gpu(
        memory=32, bandwidth=1792, float32=104.8, float16=209.5, bfloat16=209.5, pcie=(5, 16)
    ),
    "NVIDIA RTX A5000": Gpu(
        memory=24, bandwidth=768, float32=27.8, float16=111.1, bfloat16=111.1, pcie=(4, 16)
    ),
    "NVIDIA RTX A6000": Gpu(
        memory=48, bandwidth=768, float32=38.7, float16=154.8, bfloat16=154.8, pcie=(4, 16)
    ),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": Gpu(
        memory=96, bandwidth=1792, float32=117, float16=467.8, bfloat16=467.8, pcie=(5, 16)
    ),
    "NVIDIA A10G": Gpu(
        memory=22.5, bandwidth=600, float32=31.2, float16=70, bfloat16=70, pcie=(4, 16)
    ),
    "NVIDIA L4": Gpu(
        memory=22.5, bandwidth=300, float32=30.3, float16=121, bfloat16=121, pcie=(4, 16)
    ),
    "NVIDIA A100-SXM4-40GB": Gpu(
        memory=40, bandwidth=1555, float32=19.5, float16=312, bfloat16=312, pcie=(4, 16)
    ),
    "NVIDIA A100-SXM4-80GB": Gpu(
        memory=80, bandwidth=2039, float32=19.5, float16=312, bfloat16=312, pcie=(4, 16)
    ),
    "NVIDIA H100 PCIe 80GB": Gpu(
        memory=80, bandwidth=2000, float32=51.2, float16=756.5, bfloat16=756.5, pcie=(5, 16)
    ),
    "NVIDIA H100 80GB HBM3": Gpu(
        memory=80, bandwidth=3350, float32=66.9, float16=989, bfloat16=989, pcie=(5, 16)
    ),
    "NVIDIA H200": Gpu(
        memory=141, bandwidth=4800, float32=66.9, float16=989, bfloat16=989, pcie=(5, 16)
    ),
}
AVX2, AVX512, AVX512_VNNI = (32, 32, 64), (64, 64, 128), (64, 64, 256)
ZEN4, ZEN5, AMX = (32, 64, 128), (64, 128, 256), (64, 1024, 2048)
CPUS = {
    "AMD Ryzen 5 3500": Cpu(
        cores=6, base=3.6, channels=2, transfers=2667, pcie=4, flop_per_cycle=AVX2
    ),
    "AMD Ryzen 9 5900X": Cpu(
        cores=12, base=3.7, channels=2, transfers=3200, pcie=4, flop_per_cycle=AVX2
    ),
    "AMD Ryzen 9 7950X": Cpu(
        cores=16, base=4.5, channels=2, transfers=5200, pcie=5, flop_per_cycle=ZEN4
    ),
    "AMD Ryzen 9 9950X": Cpu(
        cores=16, base=4.3, channels=2, transfers=5600, pcie=5, flop_per_cycle=ZEN5
    ),
    "AMD Ryzen 7 7840HS": Cpu(
        cores=8, base=3.8, channels=2, transfers=5600, pcie=4, flop_per_cycle=ZEN4
    ),
    "AMD Ryzen Threadripper PRO 3995WX": Cpu(
        cores=64, base=2.7, channels=8, transfers=3200, pcie=4, flop_per_cycle=AVX2
    ),
    "AMD Ryzen Threadripper PRO 5975WX": Cpu(
        cores=32, base=3.6, channels=8, transfers=3200, pcie=4, flop_per_cycle=AVX2
    ),
    "AMD Ryzen Threadripper PRO 7975WX": Cpu(
        cores=32, base=4.0, channels=8, transfers=5600, pcie=5, flop_per_cycle=ZEN4
    ),
    "AMD EPYC 7343": Cpu(
        cores=16, base=3.2, channels=8, transfers=3200, pcie=4, flop_per_cycle=AVX2
    ),
    "AMD EPYC 7642": Cpu(
        cores=48, base=2.3, channels=8, transfers=3200, pcie=4, flop_per_cycle=AVX2
    ),
    "AMD EPYC 7742": Cpu(
        cores=64, base=2.25, channels=8, transfers=3200, pcie=4, flop_per_cycle=AVX2
    ),
    "AMD EPYC 9354": Cpu(
        cores=32, base=3.25, channels=12, transfers=4800, pcie=5, flop_per_cycle=ZEN4
    ),
    "AMD EPYC 9654": Cpu(
        cores=96, base=2.4, channels=12, transfers=4800, pcie=5, flop_per_cycle=ZEN4
    ),
    "Intel Core i9-10900X": Cpu(
        cores=10, base=3.7, channels=4, transfers=2933, pcie=3, flop_per_cycle=AVX512_VNNI
    ),
    "Intel Xeon Gold 6138": Cpu(
        cores=20, base=2.0, channels=6, transfers=2666, pcie=3, flop_per_cycle=AVX512
    ),
    "Intel Xeon Platinum 8352Y": Cpu(
        cores=32, base=2.2, channels=8, transfers=3200, pcie=4, flop_per_cycle=AVX512_VNNI
    ),
    "2 x Intel Xeon Gold 6454S": Cpu(
        cores=64, base=2.2, channels=16, transfers=4800, pcie=5, flop_per_cycle=AMX
    ),
    "Intel Xeon Platinum 8480+": Cpu(
        cores=56, base=2.0, channels=8, transfers=4800, pcie=5, flop_per_cycle=AMX
    ),
    "Intel Xeon Platinum 8592+": Cpu(
        cores=64, base=1.9, channels=8, transfers=5600, pcie=5, flop_per_cycle=AMX
    ),
    "Intel Xeon 6980P": Cpu(
        cores=128, base=2.0, channels=12, transfers=8800, pcie=5, flop_per_cycle=AMX
    ),
}
# Billions of transfers a second and lane; 128 of 130 bits are data.
PCIE_TRANSFERS = {3: 8, 4: 16, 5: 32}

each_machine = pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)


def published_cpu(profile: HardwareProfile) -> Cpu:
    return CPUS[profile.cpu.name.partition(",")[0]]


def published_gpu(profile: HardwareProfile) -> Gpu | None:
    return None if profile.gpu is None else GPUS[profile.gpu.name]


def test_there_are_machines_with_and_without_a_gpu() -> None:
    """At least sixteen; the names that scripts rely on are among them."""
    names = {path.stem for path in MACHINES}
    assert len(names) >= 16
    assert {
        "desktop-rtx3090",
        "desktop-rtx4090",
        "laptop-rtx4060",
        "rtx4090-epyc9354",
        "server-a100-80gb",
        "workstation-h100-pcie",
    } <= names
    without = {path.stem for path in MACHINES if HardwareProfile.load(path).gpu is None}
    assert without == {name for name in names if name.startswith("cpu-")}
    assert len(without) >= 2


def test_every_published_part_is_in_a_machine() -> None:
    """The tables of this file have no line that nothing is compared with."""
    profiles = [HardwareProfile.load(path) for path in MACHINES]
    assert {profile.gpu.name for profile in profiles if profile.gpu is not None} == set(GPUS)
    assert {profile.cpu.name.partition(",")[0] for profile in profiles} == set(CPUS)


@each_machine
def test_machine_profile_is_a_datasheet_of_its_own_name(path: Path) -> None:
    """Nothing in it pretends to be measured."""
    profile = HardwareProfile.load(path)
    assert profile.name == path.stem == path.stem.lower()
    assert (profile.provenance, profile.fingerprint) == ("datasheet", None)
    assert (profile.samples, profile.measured_at) == ((), None)
    assert profile.num_threads is None


@each_machine
def test_gpu_has_the_published_ceilings(path: Path) -> None:
    """Memory within the 1.5 % that the driver keeps or a maker rounds, rates exactly."""
    profile = HardwareProfile.load(path)
    gpu, published = profile.gpu, published_gpu(profile)
    if gpu is None or published is None:
        assert profile.link is None
        return
    assert gpu.memory_bytes == pytest.approx(published.memory * 2**30, rel=0.015)
    assert gpu.read_bytes_per_s == pytest.approx(published.bandwidth * 1e9)
    assert gpu.dequant_per_s == {}
    assert gpu.flop_per_s == pytest.approx(
        {
            "float32": published.float32 * 1e12,
            "float16": published.float16 * 1e12,
            "bfloat16": (published.bfloat16 or published.float32) * 1e12,
            "int8": published.float16 * 1e12,
            "int4": published.float16 * 1e12,
        }
    )
    has_said = any("no bfloat16" in note for note in profile.notes)
    assert has_said == (published.bfloat16 is None)


@each_machine
def test_cpu_has_the_published_ceilings(path: Path) -> None:
    """8 bytes a transfer and channel; cores times base clock times FLOP per cycle."""
    profile = HardwareProfile.load(path)
    cpu, published = profile.cpu, published_cpu(profile)
    assert cpu.num_threads == published.cores
    nominal = 8 * published.channels * published.transfers * 1e6
    assert cpu.read_bytes_per_s == pytest.approx(nominal, rel=1e-3)
    assert f"{published.channels} x " in cpu.name
    assert cpu.name.endswith(f"-{published.transfers}")
    hertz = published.cores * published.base * 1e9
    float32, bfloat16, int8 = published.flop_per_cycle
    assert cpu.flop_per_s["float32"] == pytest.approx(float32 * hertz)
    assert cpu.flop_per_s["bfloat16"] == pytest.approx(bfloat16 * hertz)
    assert cpu.flop_per_s["int8"] == cpu.flop_per_s["int4"] == pytest.approx(int8 * hertz)
    # Only Granite Rapids has float16 tiles.
    float16 = 1024 if "6980P" in cpu.name else float32
    assert cpu.flop_per_s["float16"] == pytest.approx(float16 * hertz)


@each_machine
def test_fewer_threads_compute_in_proportion_and_read_up_to_20_gb_each(path: Path) -> None:
    """Powers of two and all cores; one CPU throughout."""
    profile = HardwareProfile.load(path)
    cpus, full = profile.cpu_by_threads, profile.cpu
    counts = [cpu.num_threads for cpu in cpus]
    assert counts == [*(2**n for n in range(8) if 2**n < full.num_threads), full.num_threads]
    for cpu in cpus:
        assert (cpu.name, cpu.kind) == (full.name, "cpu")
        assert (cpu.memory_bytes, cpu.reserved_bytes) == (full.memory_bytes, 4 * 2**30)
        expected = min(20e9 * cpu.num_threads, full.read_bytes_per_s)
        assert cpu.read_bytes_per_s == expected
        share = cpu.num_threads / full.num_threads
        assert cpu.flop_per_s == pytest.approx(
            {kind: share * rate for kind, rate in full.flop_per_s.items()}
        )


@each_machine
def test_link_is_the_slower_side_less_the_heads_of_its_packets(path: Path) -> None:
    """PCIe 4.0 x16: 16 GT/s * 16 lanes * 128 / 130 / 8 = 31.5 GB/s, 256 of 284 bytes of it."""
    profile = HardwareProfile.load(path)
    gpu, link = published_gpu(profile), profile.link
    if gpu is None or link is None:
        assert profile.gpu is None
        return
    generation, lanes = min(gpu.pcie[0], published_cpu(profile).pcie), gpu.pcie[1]
    assert link.name == f"PCIe {generation}.0 x{lanes}"
    line_rate = PCIE_TRANSFERS[generation] * 1e9 * lanes * 128 / 130 / 8
    assert link.h2d_bytes_per_s == pytest.approx(line_rate * 256 / 284, rel=2e-3)
    assert link.d2h_bytes_per_s == link.h2d_bytes_per_s
    pageable = min(6e9 if generation == 3 else 12e9, link.h2d_bytes_per_s / 2)
    assert link.pageable_h2d_bytes_per_s == link.pageable_d2h_bytes_per_s == pageable


@each_machine
def test_machine_profile_leaves_memory_to_the_runtime(path: Path) -> None:
    """512 MiB of a GPU and 768 where it also draws a laptop's screen."""
    profile = HardwareProfile.load(path)
    if profile.gpu is not None:
        mebibytes = 768 if path.stem.startswith("laptop") else 512
        assert profile.gpu.reserved_bytes == mebibytes * 2**20
    assert profile.cpu.memory_bytes % 2**30 == 0
    has_said = any("two sockets" in note for note in profile.notes)
    assert has_said == profile.cpu.name.startswith("2 x")

"""Hardware profiles for tests: round numbers, no measuring."""

from __future__ import annotations

from planner.device import DeviceProfile, Sample
from planner.hardware import HardwareProfile
from planner.model_spec import Dtype

_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")


def toy_cpu(num_threads: int = 1, memory_bytes: int = 8_000_000_000) -> DeviceProfile:
    """A CPU of 10 GB/s and 100 GFLOP/s per thread."""
    return DeviceProfile(
        name="toy cpu",
        kind="cpu",
        memory_bytes=memory_bytes,
        read_bytes_per_s=num_threads * 10e9,
        flop_per_s={
            **dict.fromkeys(_DTYPES, num_threads * 100e9),
            "int8": num_threads * 100e9,
            "int4": num_threads * 100e9,
        },
        launch_s=5e-6,
        num_threads=num_threads,
    )


def toy_machine(num_threads: int = 1) -> HardwareProfile:
    """A machine without a GPU, measured with one thread and with all of them.

    One thread by default: the models of the tests are too small to gain from two, and threads that
    wait for each other on a busy machine lose much.
    """
    cpus = tuple(toy_cpu(threads) for threads in sorted({1, num_threads}))
    return HardwareProfile(
        name="toy machine",
        provenance="measured",
        cpu_by_threads=cpus,
        samples=tuple(sample for cpu in cpus for sample in _products(cpu.num_threads)),
    )


def _products(num_threads: int) -> tuple[Sample, ...]:
    """Products of our kernels in each format, of 1, 16 and 512 tokens."""
    return tuple(
        Sample(
            lane="cpu",
            kernel="linear",
            format=dtype,
            shape=(1024, 1024),
            num_tokens=tokens,
            num_threads=num_threads,
            # 2 * 1024 * 1024 FLOPs a token
            seconds=tokens * 2 * 1024**2 / (num_threads * flop_per_s),
        )
        for dtype in _DTYPES
        for tokens, flop_per_s in ((1, 4e9), (16, 50e9), (512, 90e9))
    )

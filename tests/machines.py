"""Hardware profiles for tests: round numbers, no measuring."""

from __future__ import annotations

from planner.hardware import DeviceProfile, HardwareProfile, LinearSample
from planner.model_spec import Dtype


def toy_cpu(num_threads: int = 1, memory_bytes: int = 8_000_000_000) -> DeviceProfile:
    """A CPU of 10 GB/s and 100 GFLOP/s per thread."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
    return DeviceProfile(
        name="toy cpu",
        kind="cpu",
        memory_bytes=memory_bytes,
        read_bytes_per_s=num_threads * 10e9,
        attention_bytes_per_s=num_threads * 5e9,
        attention_flop_per_s=num_threads * 50e9,
        launch_s=5e-6,
        num_threads=num_threads,
        linear=tuple(
            LinearSample(dtype=dtype, num_tokens=tokens, flop_per_s=num_threads * rate)
            for dtype in dtypes
            for tokens, rate in ((1, 5e9), (16, 50e9), (512, 100e9))
        ),
    )


def toy_machine(num_threads: int = 1) -> HardwareProfile:
    """A machine without a GPU, measured with one thread and with all of them.

    One thread by default: the models of the tests are too small to gain from two, and threads that
    wait for each other on a busy machine lose much.
    """
    return HardwareProfile(
        name="toy machine",
        provenance="measured",
        cpu_by_threads=tuple(toy_cpu(threads) for threads in sorted({1, num_threads})),
    )

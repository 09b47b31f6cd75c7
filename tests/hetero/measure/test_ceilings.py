"""Ceilings: what the fastest samples say, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from hetero.measure.ceilings import cpu_ceilings, gpu_ceilings, raised
from planner.device import DeviceProfile, Sample


def sample(**facts: Any) -> Sample:
    """A product of 32 x 128 bfloat16 weights with one token, in a second."""
    return Sample(
        **{"lane": "cpu", "kernel": "linear", "format": "bfloat16", "shape": (32, 128)}
        | {"seconds": 1.0}
        | facts
    )


def ceilings(*samples: Sample, read_bytes_per_s: float = 1.0) -> DeviceProfile:
    return cpu_ceilings(
        samples,
        name="cpu",
        memory_bytes=1,
        num_threads=1,
        read_bytes_per_s=read_bytes_per_s,
        launch_s=1e-6,
        torch_launch_s=2e-6,
    )


def near(value: float) -> object:
    """As it is, but for what keeps samples off their ceilings."""
    return pytest.approx(value, rel=1e-8)


def test_products_are_as_fast_as_the_fastest_of_their_format() -> None:
    """2 * 32 * 128 = 8192 FLOPs a token; experts have three matrices."""
    device = ceilings(
        sample(num_tokens=4, seconds=2.0),  # 16384 a second
        sample(num_tokens=2, seconds=0.5),  # 32768 a second
        sample(kernel="experts", format="float32", shape=(2, 32, 128)),  # 2 * 3 * 8192
    )
    assert device.flop_per_s == {"bfloat16": near(32768), "float32": near(49152)}
    assert device.dequant_per_s == {}


def test_quantised_weights_are_unpacked_as_fast_as_the_fastest_product() -> None:
    """4096 weights in half a second."""
    device = ceilings(sample(format="int4", seconds=0.5), sample(format="int4", num_tokens=8))
    assert device.dequant_per_s == {"int4": near(8192)}


def test_memory_is_as_fast_as_plain_reads_or_a_kernel_that_did_better() -> None:
    """A product of one token reads 32 * 128 * 2 = 8192 bytes."""
    assert ceilings(sample(), read_bytes_per_s=1e6).read_bytes_per_s == near(1e6)
    assert ceilings(sample(seconds=1e-3), read_bytes_per_s=1e6).read_bytes_per_s == near(8.192e6)


def test_small_kernels_have_a_ceiling_of_elements() -> None:
    """3 rows of 100 in a second; none where no such kernel was measured."""
    norm = sample(kernel="norm", shape=(100,), num_tokens=3)
    assert ceilings(sample(), norm).elements_per_s == near(300)
    assert ceilings(sample()).elements_per_s is None


def test_a_gpu_has_the_ceilings_of_its_samples() -> None:
    found = gpu_ceilings(
        [sample(lane="gpu", backend="torch", seconds=0.5)],
        name="gpu",
        memory_bytes=10,
        reserved_bytes=2,
        read_bytes_per_s=1.0,
        launch_s=1e-6,
    )
    assert (found.kind, found.memory_bytes, found.reserved_bytes) == ("cuda", 10, 2)
    assert found.flop_per_s == {"bfloat16": near(16384)}
    assert found.read_bytes_per_s == near(16384)  # 8192 bytes in half a second


def test_ceilings_rise_to_what_was_faster_beside_other_work() -> None:
    """And never fall."""
    device = ceilings(sample(format="int8"), sample(), read_bytes_per_s=1e5)
    slower = sample(busy=("h2d",), seconds=2.0)
    faster = sample(busy=("h2d",), format="int8", seconds=0.5)
    after = raised(device, [slower, faster])
    assert after.flop_per_s == {"bfloat16": near(8192), "int8": near(16384)}
    assert after.dequant_per_s == {"int8": near(8192)}
    assert after.read_bytes_per_s == near(1e5)
    rest = replace(
        after,
        flop_per_s=device.flop_per_s,
        dequant_per_s=device.dequant_per_s,
        read_bytes_per_s=device.read_bytes_per_s,
    )
    assert rest == device

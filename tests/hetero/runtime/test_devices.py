"""Accelerators: memory budgets, copies, lanes; CUDA refused in one sentence where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from hetero.errors import EnvironmentProblemError, MemoryBudgetError
from hetero.runtime.devices import Accelerator, CudaAccelerator, EmulatedAccelerator

KINDS = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
BUDGET_BYTES = 1_000_000_000


@pytest.fixture(params=KINDS)
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    made: Accelerator
    if request.param == "cuda":
        made = CudaAccelerator(budget_bytes=BUDGET_BYTES)
    else:
        made = EmulatedAccelerator(budget_bytes=BUDGET_BYTES, link_bytes_per_s=50e9, latency_s=1e-6)
    yield made
    made.close()


def test_memory_beyond_the_budget_is_refused_with_both_numbers(accelerator: Accelerator) -> None:
    accelerator.allocate(400_000_000, "a buffer")

    with pytest.raises(MemoryBudgetError, match=r"the KV cache .* 1\.100 GB .* 1\.000 GB"):
        accelerator.allocate(700_000_000, "the KV cache")

    accelerator.allocate(600_000_000, "another buffer")
    assert accelerator.used_bytes == BUDGET_BYTES


@pytest.mark.parametrize("shape", [(3, 5), (1 << 20, 6), (0, 4)])
def test_what_is_uploaded_and_downloaded_comes_back_unchanged(
    accelerator: Accelerator, shape: tuple[int, ...]
) -> None:
    source = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    kept: list[torch.Tensor] = []
    up = accelerator.lanes["h2d"].submit(lambda: kept.append(accelerator.upload(source)), ())
    down = accelerator.lanes["d2h"].submit(
        lambda: kept.append(accelerator.download(kept[0])), (up,)
    )
    down.wait()

    assert kept[0].device == accelerator.device
    assert kept[1].device.type == "cpu"
    torch.testing.assert_close(kept[1], source, rtol=0, atol=0)


def test_a_host_buffer_has_exactly_the_bytes_that_were_asked_for(accelerator: Accelerator) -> None:
    buffer = accelerator.host_buffer(2_250_001)

    assert (buffer.dtype, buffer.nbytes) == (torch.uint8, 2_250_001)
    assert buffer.is_pinned() == (accelerator.kind == "cuda")


def test_the_emulated_link_is_no_faster_than_stated() -> None:
    """A lower bound only: 40 MB at 1 GB/s take 40 ms however fast memory is."""
    emulated = EmulatedAccelerator(budget_bytes=10**9, link_bytes_per_s=1e9, latency_s=0.0)
    source, target = torch.zeros(40_000_000, dtype=torch.uint8), torch.empty(40_000_000).byte()
    begin_s = time.perf_counter()
    emulated.lanes["h2d"].submit(lambda: emulated.copy_into(target, source), ()).wait()
    seconds = time.perf_counter() - begin_s
    emulated.close()

    assert seconds >= 0.040


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has CUDA")
def test_cuda_without_a_gpu_is_refused_with_the_fix() -> None:
    with pytest.raises(EnvironmentProblemError, match=r"--accelerator cuda .* --accelerator none"):
        CudaAccelerator(budget_bytes=1)

"""Memory that is rotated through: its pieces, what they hold, and how much of it there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hetero.errors import EnvironmentProblemError
from hetero.measure.cold_memory import (
    cold_bytes,
    cold_cpu_memory,
    cold_gpu_memory,
    gpu_cold_bytes,
    last_level_cache_bytes,
)
from planner.model_spec import Dtype

CPU = torch.device("cpu")


def test_pieces_follow_each_other_and_wrap() -> None:
    """A piece begins where the last one ended, and at the start where it would not fit."""
    small = cold_cpu_memory(4096)
    starts = [small.take("float32", 8, 32).storage_offset() for _ in range(5)]
    assert starts == [0, 256, 512, 768, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pieces_hold_ordinary_numbers(dtype: Dtype) -> None:
    """No zeros, no subnormals: both can be faster or slower than weights."""
    piece = cold_cpu_memory(4096).take(dtype, 3, 5).float()
    assert bool(((piece > 1e-3) & (piece <= 1)).all())


def test_cold_bytes_outgrow_caches_within_an_eighth() -> None:
    """Twice 400 MB of caches, 512 MB with small ones, an eighth of 1 GiB where memory is short."""
    assert cold_bytes(64 << 30, 400 << 20) == 800 << 20
    assert cold_bytes(64 << 30, 16 << 20) == 512 << 20
    assert cold_bytes(1 << 30, 400 << 20) == 128 << 20


def test_last_level_caches_are_summed_once_each(tmp_path: Path) -> None:
    """Two cores share one 32 MB cache, a third has another; smaller levels do not count."""
    for core, shared in ((0, "0-1"), (1, "0-1"), (2, "2")):
        for index, (level, size, cores) in enumerate(((1, "48K", str(core)), (3, "32M", shared))):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            (folder / "level").write_text(f"{level}\n")
            (folder / "size").write_text(f"{size}\n")
            (folder / "shared_cpu_list").write_text(f"{cores}\n")
    # 32 MiB + 32 MiB
    assert last_level_cache_bytes(tmp_path) == 67108864


def test_system_that_hides_its_caches_has_none(tmp_path: Path) -> None:
    """No folder, no bytes."""
    assert last_level_cache_bytes(tmp_path) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gpu_memory_holds_numbers_of_both_signs(dtype: Dtype) -> None:
    """No infinity, no NaN, nothing subnormal, in whatever format it is read."""
    values = cold_gpu_memory(1 << 20, CPU).take(dtype, 1 << 17)
    assert torch.isfinite(values).all()
    assert values.abs().min() > torch.finfo(values.dtype).smallest_normal
    assert 0.2 < float((values < 0).float().mean()) < 0.5


def test_gpu_memory_holds_the_largest_sample_or_says_why_not() -> None:
    """A sixteenth of 1.6 GB; more where a sample needs it; never more than half of what is free."""
    assert gpu_cold_bytes(1_600_000_000, 64_000_000) == 100_000_000
    assert gpu_cold_bytes(160_000_000, 64_000_000) == 64_000_000
    assert cold_gpu_memory(1001, CPU).num_bytes == 1024
    with pytest.raises(EnvironmentProblemError, match=r"needs 128 MB .* but 100 MB are free"):
        gpu_cold_bytes(100_000_000, 64_000_000)

"""Memory larger than the caches, handed out piece by piece, so that every read is a cold one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.memory_read import read_memory
from hetero.errors import EnvironmentProblemError
from hetero.model.families import TORCH_DTYPES
from planner.model_spec import Dtype

_CPU_FOLDER = Path("/sys/devices/system/cpu")
_MIN_COLD_BYTES = 512 << 20
_MAX_SHARE_OF_AVAILABLE = 8
_MAX_GPU_COLD_BYTES = 1 << 30
# 0.0078 as float32 and as bfloat16, 1.0 as float16: never a subnormal, which some CPUs compute
# slowly, and never the shared zero page, which would be read from the caches.
_PATTERN = 0x3C003C00
# A view must start where a vector load may.
_ALIGN_ELEMENTS = 64


class ColdMemory:
    """A buffer that `take` walks through, so that what it returns was last touched a lap ago."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._next = 0  # in bytes

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel() * self._buffer.element_size()

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    def take(self, dtype: Dtype, *shape: int) -> Tensor:
        """The next piece of the buffer with this shape."""
        flat = self._buffer.view(TORCH_DTYPES[dtype])
        count = 1
        for size in shape:
            count *= size
        assert count <= flat.numel(), f"{shape} of {dtype} is larger than {self.num_bytes} bytes"
        start = -(-self._next // flat.element_size() // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
        if start + count > flat.numel():
            start = 0
        self._next = (start + count) * flat.element_size()
        return flat[start : start + count].view(*shape)

    def take_bytes(self, num_bytes: int) -> NDArray[np.uint8]:
        """The next bytes of a buffer in host memory."""
        taken: NDArray[np.uint8] = self.take_tensor(num_bytes).numpy()
        return taken

    def take_tensor(self, num_bytes: int) -> Tensor:
        """The next bytes of a buffer anywhere."""
        return self.take("float32", -(-num_bytes // 4)).view(torch.uint8)[:num_bytes]

    def displace_caches(self, num_threads: int) -> None:
        """Read all of a buffer in host memory: what the caches held of anything else is gone."""
        read_memory(self.whole().numpy().view(np.uint8), num_threads=num_threads)

    def whole(self) -> Tensor:
        """All of the buffer as float32."""
        return self._buffer.view(torch.float32)


def cold_cpu_memory(num_bytes: int) -> ColdMemory:
    """Allocate and touch host memory."""
    # numpy asks for huge pages where the system leaves it to the program, torch does not: 0.2
    # against 1.8 s for 512 MB on an Emerald Rapids Xeon.
    words = np.empty(max(1, num_bytes >> 8) << 6, dtype=np.int32)
    words.fill(_PATTERN)
    return ColdMemory(torch.from_numpy(words))


def cold_gpu_memory(num_bytes: int, device: torch.device) -> ColdMemory:
    """Allocate device memory with random bits: a GPU's clock depends on what it multiplies."""
    words = torch.empty(max(1, -(-num_bytes >> 8)) << 6, dtype=torch.int32, device=device)
    halves = words.view(torch.int16)
    # Magnitudes of 4.7e-10 to 0.0078 as float32 and bfloat16, 0.125 to 1 as float16: no exponent
    # of all ones, which is an infinity or a NaN, nor of all zeros.
    halves.random_(0x3000, 0x3C00)
    halves[::3].bitwise_or_(-0x8000)
    return ColdMemory(words)


def gpu_cold_bytes(free_bytes: int, largest_bytes: int) -> int:
    """How much GPU memory to rotate through: a sixteenth of what is free, and the largest sample.

    Raises
    ------
    EnvironmentProblemError
        The largest sample and its activations do not fit what is free.
    """
    num_bytes = max(largest_bytes, min(_MAX_GPU_COLD_BYTES, free_bytes // 16))
    # As much again for activations and what the libraries take.
    if free_bytes < 2 * num_bytes:
        raise EnvironmentProblemError(
            f"measuring the GPU needs {2 * num_bytes / 1e6:.0f} MB of its memory but "
            f"{free_bytes / 1e6:.0f} MB are free; end what else uses it, or give --accelerator none"
        )
    return num_bytes


def cold_bytes(available_bytes: int, cache_bytes: int) -> int:
    """How much to rotate through: twice the caches, never above an eighth of what is available."""
    wanted = max(_MIN_COLD_BYTES, 2 * cache_bytes)
    return min(wanted, available_bytes // _MAX_SHARE_OF_AVAILABLE)


def last_level_cache_bytes(cpu_folder: Path = _CPU_FOLDER) -> int:
    """Bytes of all last-level caches together; 0 where the system does not say."""
    sizes: dict[str, tuple[int, int]] = {}
    for index in cpu_folder.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((index / "level").read_text())
            size = _cache_size((index / "size").read_text().strip())
            cores = (index / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue  # a virtual machine may hide a cache's size
        sizes[f"{level}:{cores}"] = (level, size)
    last = max((level for level, _ in sizes.values()), default=0)
    return sum(size for level, size in sizes.values() if level == last)


def _cache_size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)

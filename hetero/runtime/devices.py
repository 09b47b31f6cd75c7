"""Accelerators behind one protocol: `cuda`, and `emulated` by a CPU thread."""

from __future__ import annotations

import contextlib
import time
from typing import Literal, Protocol

import torch
from torch import Tensor

from hetero.errors import EnvironmentProblemError, MemoryBudgetError
from hetero.faults import NO_FAULTS, Faults
from hetero.runtime.lanes import CudaClock, CudaLane, LaneRunner, ThreadLane, last_core
from hetero.runtime.pinned import PinnedArena, pieces
from planner.step_graph import Lane

# Copies of the emulated link are paced in pieces of this size, so that a long one is a steady
# stream and not a burst followed by a pause.
_PACED_BYTES = 4 << 20

# cuBLAS keeps 8 to 32 MB per stream, and torch's allocator rounds to 2 MB and takes 20 MB pieces.
_WORKSPACE_BYTES = 256_000_000

# What the system says when it refuses to lock more pages.
_CUDA_ERROR_OUT_OF_MEMORY = 2


class Accelerator(Protocol):
    """Memory with a budget, three lanes, and copies between host and device.

    `upload` and `download` are called from work on the `h2d` and `d2h` lanes and return a tensor
    whose contents are there when that work has ended.
    """

    kind: Literal["cuda", "emulated"]
    device: torch.device
    budget_bytes: int
    used_bytes: int
    lanes: dict[Lane, LaneRunner]

    @property
    def unpinned_bytes(self) -> int:
        """Of host buffers that could not be pinned: copies from there are slower."""

    def allocate(self, num_bytes: int, what: str) -> Tensor:
        """Device memory as flat uint8, counted against the budget.

        Raises
        ------
        MemoryBudgetError
            The budget would be exceeded; names `what`, both numbers and the fix.
        """

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Host memory as flat uint8 from which copies run at the link's full rate.

        Where it cannot be pinned they run slower, and `unpinned_bytes` says so.
        """

    def copy_into(self, target: Tensor, source: Tensor) -> None:
        """Copy within a lane's work, at the link's rate."""

    def copy_now(self, target: Tensor, source: Tensor) -> None:
        """The same, and wait until it has ended: of work that gives way."""

    def upload(self, source: Tensor) -> Tensor: ...

    def download(self, source: Tensor) -> Tensor: ...

    def synchronize(self) -> None: ...

    def trim(self) -> None:
        """Give back what is kept of memory that is not in use."""

    def close(self) -> None: ...


class EmulatedAccelerator:
    """An accelerator made of a CPU thread: own memory budget, throttled link, own core.

    Its arithmetic is the CPU's and its speed is no GPU's; it exists so that every hybrid path runs
    on any machine.

    Parameters
    ----------
    budget_bytes : int
        Memory that weights, KV cache and staging buffers may take.
    link_bytes_per_s : float
        Rate of each copy direction.
    latency_s : float
        Time that a copy takes beyond its bytes.
    faults : Faults
        What is to fail; nothing in a usual run.
    """

    kind: Literal["cuda", "emulated"] = "emulated"

    def __init__(
        self,
        *,
        budget_bytes: int,
        link_bytes_per_s: float,
        latency_s: float,
        faults: Faults = NO_FAULTS,
    ) -> None:
        self._faults = faults
        self.device = torch.device("cpu")
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._unpinned_bytes = 0
        self._bytes_per_s = link_bytes_per_s
        self._latency_s = latency_s
        self.lanes: dict[Lane, LaneRunner] = {
            "gpu": ThreadLane("gpu", last_core()),
            "h2d": ThreadLane("h2d"),
            "d2h": ThreadLane("d2h"),
        }

    def allocate(self, num_bytes: int, what: str) -> Tensor:
        _check_budget(self, num_bytes, what)
        if self._faults.fires("allocate"):
            raise _lacks_memory(what, num_bytes, self.used_bytes, free_bytes=num_bytes // 2)
        self.used_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8)

    @property
    def unpinned_bytes(self) -> int:
        return self._unpinned_bytes

    def host_buffer(self, num_bytes: int) -> Tensor:
        if self._faults.fires("pin"):
            self._unpinned_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy_into(self, target: Tensor, source: Tensor) -> None:
        begin_s = time.perf_counter()
        # Of an empty tensor (a part of a prompt has no logits) torch makes no view in bytes.
        if not (target.is_contiguous() and source.is_contiguous() and source.nbytes):
            target.copy_(source)
            self._pace(begin_s, source.nbytes)
            return
        to, from_ = target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8)
        for start in range(0, source.nbytes, _PACED_BYTES):
            stop = min(start + _PACED_BYTES, source.nbytes)
            to[start:stop].copy_(from_[start:stop])
            self._pace(begin_s, stop)

    def copy_now(self, target: Tensor, source: Tensor) -> None:
        self.copy_into(target, source)

    def upload(self, source: Tensor) -> Tensor:
        target = torch.empty_like(source)
        self.copy_into(target, source)
        return target

    def download(self, source: Tensor) -> Tensor:
        return self.upload(source)

    def synchronize(self) -> None:
        for lane in self.lanes.values():
            lane.submit(lambda: None, ()).wait()

    def trim(self) -> None:
        pass

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.close()

    def _pace(self, begin_s: float, num_bytes: int) -> None:
        due_s = begin_s + self._latency_s + num_bytes / self._bytes_per_s
        remaining_s = due_s - time.perf_counter()
        if remaining_s > 0:
            time.sleep(remaining_s)


class CudaAccelerator:
    """A CUDA device: three streams, exact-size pinned host memory, a hard memory budget."""

    kind: Literal["cuda", "emulated"] = "cuda"

    def __init__(self, *, budget_bytes: int, index: int = 0, faults: Faults = NO_FAULTS) -> None:
        self._faults = faults
        if not torch.cuda.is_available():
            raise EnvironmentProblemError(cuda_missing())
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        # torch refuses beyond this share: the budget holds for activations too. Libraries'
        # workspaces and the rounding of torch's allocator come on top of what a plan counts.
        limit = budget_bytes + _WORKSPACE_BYTES
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self.device)
        self._limit_bytes = min(limit, total)
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        streams = {name: torch.cuda.Stream(self.device) for name in ("gpu", "h2d", "d2h")}
        self._compute = streams["gpu"]
        clock = CudaClock(self._compute)
        self.lanes: dict[Lane, LaneRunner] = {
            "gpu": CudaLane(streams["gpu"], clock, sets_clock=True),
            "h2d": CudaLane(streams["h2d"], clock),
            "d2h": CudaLane(streams["d2h"], clock),
        }
        self.host_memory = PinnedArena(self._register, _unregister)

    def allocate(self, num_bytes: int, what: str) -> Tensor:
        _check_budget(self, num_bytes, what)
        if self._faults.fires("allocate"):
            raise _lacks_memory(what, num_bytes, self.used_bytes, free_bytes=num_bytes // 2)
        try:
            tensor = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError:
            free, _ = torch.cuda.mem_get_info(self.device)
            free = min(free, self._limit_bytes - torch.cuda.memory_reserved(self.device))
            raise _lacks_memory(what, num_bytes, self.used_bytes, free_bytes=free) from None
        self.used_bytes += num_bytes
        return tensor

    @property
    def unpinned_bytes(self) -> int:
        return self.host_memory.unpinned_bytes

    def host_buffer(self, num_bytes: int) -> Tensor:
        return self.host_memory.take(num_bytes)

    def copy_into(self, target: Tensor, source: Tensor) -> None:
        for to, from_ in pieces(target, source, self.host_memory.cuts(source)):
            to.copy_(from_, non_blocking=True)

    def copy_now(self, target: Tensor, source: Tensor) -> None:
        self.copy_into(target, source)
        torch.cuda.current_stream(self.device).synchronize()

    def upload(self, source: Tensor) -> Tensor:
        # Where memory was refused before, it would be refused again, in the middle of a step.
        pinned = torch.empty_like(source, pin_memory=not self.unpinned_bytes)
        pinned.copy_(source)
        target = torch.empty_like(source, device=self.device)
        target.copy_(pinned, non_blocking=True)
        # Allocated on the copy stream, read on the compute stream.
        target.record_stream(self._compute)
        return target

    def download(self, source: Tensor) -> Tensor:
        can_pin = not self.unpinned_bytes
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=can_pin)
        target.copy_(source, non_blocking=True)
        source.record_stream(torch.cuda.current_stream(self.device))
        return target

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def trim(self) -> None:
        self.synchronize()
        torch.cuda.empty_cache()

    def close(self) -> None:
        self.synchronize()
        self.host_memory.close()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def _register(self, address: int, num_bytes: int) -> int:
        """Page-lock memory; CUDA's number of what went wrong, or 0."""
        if self._faults.fires("pin"):
            return _CUDA_ERROR_OUT_OF_MEMORY
        error = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
        if error:
            # CUDA keeps the last error, which torch would take for one of its next kernel's. To be
            # asked for it is to forget it.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.device)
        return error


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


def cuda_missing() -> str:
    """Why CUDA cannot be used, in one sentence."""
    if torch.version.cuda is None:
        return (
            f"--accelerator cuda was asked for but this torch ({torch.__version__}) is built "
            "without CUDA; install a CUDA build of torch or use --accelerator none"
        )
    return (
        f"--accelerator cuda was asked for but torch {torch.__version__} finds no CUDA device; "
        "check the driver with nvidia-smi or use --accelerator none"
    )


def _lacks_memory(
    what: str, num_bytes: int, used_bytes: int, *, free_bytes: int
) -> MemoryBudgetError:
    """Another program has what was free when it was planned."""
    return MemoryBudgetError(
        f"{what} needs {num_bytes / 1e9:.4g} GB on the GPU but {free_bytes / 1e9:.4g} GB is free "
        f"now; plan with --gpu-mem-gb {(used_bytes + free_bytes) / 1e9:.4g} or less"
    )


def _check_budget(accelerator: Accelerator, num_bytes: int, what: str) -> None:
    if accelerator.used_bytes + num_bytes > accelerator.budget_bytes:
        need = accelerator.used_bytes + num_bytes
        raise MemoryBudgetError(
            f"{what} brings the accelerator to {need / 1e9:.3f} GB but its budget is "
            f"{accelerator.budget_bytes / 1e9:.3f} GB; plan again with a smaller workload or "
            "more --gpu-mem-gb"
        )

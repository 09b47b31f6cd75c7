"""What one device was measured to do: its ceilings, its link, and samples of kernels on it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from planner.kernels import SHAPE_LENGTHS, Backend, HostMemory, Kernel, KernelCall
from planner.model_spec import WeightKind
from planner.step_graph import Lane

DeviceKind = Literal["cpu", "cuda", "emulated"]

# Checked where a profile is read: a rate of 0 would divide by zero far from the file that has it.
PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0)]
Seconds = Annotated[float, Meta(ge=0)]


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds that a kernel took on a lane.

    `planner.kernels.Kernel` says what `shape`, `num_tokens`, `num_seqs` and `context` mean for each
    kernel. `num_threads` is for the `cpu` lane. `busy` are the lanes that other work kept busy
    meanwhile; `cpu` on the `cpu` lane is other work on half of its threads. `seconds` is a median,
    `spread` the distance from the 10th to the 90th percentile as a share of it.
    """

    lane: Lane
    kernel: Kernel
    format: WeightKind = "float32"
    backend: Backend = "numba"
    shape: tuple[PositiveInt, ...] = ()
    num_tokens: PositiveInt = 1
    num_seqs: PositiveInt = 1
    context: Count = 0
    num_threads: PositiveInt = 1
    memory: HostMemory | None = None
    busy: tuple[Lane, ...] = ()
    seconds: Rate
    spread: Seconds = 0.0

    def __post_init__(self) -> None:
        if len(self.shape) != SHAPE_LENGTHS[self.kernel]:
            raise ValueError(
                f"the shape of {self.kernel} has {SHAPE_LENGTHS[self.kernel]} numbers, this one "
                f"{len(self.shape)}"
            )
        if (self.kernel == "copy") != (self.lane in ("h2d", "d2h")):
            raise ValueError(f"{self.kernel} does not run on the lane {self.lane}")
        if self.kernel == "decode_attention" and self.context == 0:
            raise ValueError("the context of decode_attention is 0, but a token sees itself")
        if "attention" in self.kernel and self.format in ("int8", "int4"):
            raise ValueError(f"{self.kernel} has no format {self.format}")

    @property
    def call(self) -> KernelCall:
        """What took the seconds."""
        return KernelCall(
            kernel=self.kernel,
            shape=self.shape,
            format=self.format,
            backend=self.backend,
            num_tokens=self.num_tokens,
            num_seqs=self.num_seqs,
            context=self.context,
            memory=self.memory,
        )


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ceilings of one compute device: no kernel is faster than these.

    Attributes
    ----------
    memory_bytes, reserved_bytes : int
        Its memory, and what the runtime takes of it before any weight (a CUDA context).
    read_bytes_per_s : float
        Plain reads of its memory.
    flop_per_s : dict
        Matrix products by the format of the weights.
    dequant_per_s : dict
        Weights that a product unpacks, by format; a format that is left out costs nothing.
    elements_per_s : float, optional
        Elements of norms and the like, from cache to cache; None is one for each 4 bytes read.
    launch_s : float
        One small operation; on a CPU a link in a chain of our kernels, where torch's operations
        cost `torch_launch_s` (None: as much).
    """

    name: str
    kind: DeviceKind
    memory_bytes: Count
    reserved_bytes: Count = 0
    num_threads: PositiveInt = 1
    read_bytes_per_s: Rate
    flop_per_s: dict[WeightKind, Rate]
    dequant_per_s: dict[WeightKind, Rate] = {}
    elements_per_s: Rate | None = None
    launch_s: Seconds
    torch_launch_s: Seconds | None = None

    @property
    def torch_op_s(self) -> float:
        """Seconds of one small operation of torch."""
        return self.launch_s if self.torch_launch_s is None else self.torch_launch_s


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates of the link between host and GPU; `pageable_*` where the host memory is not pinned."""

    name: str
    h2d_bytes_per_s: Rate
    d2h_bytes_per_s: Rate
    latency_s: Seconds
    pageable_h2d_bytes_per_s: Rate | None = None
    pageable_d2h_bytes_per_s: Rate | None = None

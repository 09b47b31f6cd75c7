"""A dense module that the CPU and the link with the GPU share, and which modules stay resident."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseModule:
    """Seconds of a linear module done whole in one place, and its weights.

    Attributes
    ----------
    num_bytes : int
        Of the weights.
    cpu_s : float
        The whole module on the CPU.
    copy_s : float
        Copying all its weights to the GPU; `math.inf` without a link.
    gpu_s : float
        The whole module on the GPU, its weights there.
    """

    num_bytes: int
    cpu_s: float
    copy_s: float
    gpu_s: float

    @property
    def offload_s(self) -> float:
        """Copied whole, then run on the GPU."""
        return self.copy_s + self.gpu_s

    @property
    def gpu_share(self) -> float:
        """The share of the output rows that go to the GPU so that both sides end together.

        HeteGen (MLSys'24): cpu_s (1 - a) = (copy_s + gpu_s) a, so a = cpu_s / (cpu_s + copy_s +
        gpu_s). It assumes that each side's time is in proportion to its rows.

        Examples
        --------
        >>> DenseModule(num_bytes=8, cpu_s=3.0, copy_s=8.0, gpu_s=1.0).gpu_share
        0.25
        """
        total_s = self.cpu_s + self.offload_s
        return self.cpu_s / total_s if total_s > 0 else 0.0

    @property
    def split_s(self) -> float:
        """Seconds with `gpu_share` of the rows on the GPU: never more than either side alone.

        cpu_s (copy_s + gpu_s) / (cpu_s + copy_s + gpu_s).
        """
        if self.cpu_s == 0 or self.offload_s == 0:
            return 0.0
        return self.cpu_s / (1.0 + self.cpu_s / self.offload_s)

    @property
    def gain_s_per_byte(self) -> float:
        """CPU seconds that a byte of GPU memory takes over: HeteGen's T_cpu / M_gpu."""
        return self.cpu_s / self.num_bytes

    def shared_s(self, gpu_share: float) -> float:
        """Seconds with any share of the rows on the GPU, the rest on the CPU at the same time.

        Examples
        --------
        >>> module = DenseModule(num_bytes=8, cpu_s=3.0, copy_s=8.0, gpu_s=1.0)
        >>> module.shared_s(0.0), module.shared_s(0.25), module.shared_s(1.0)
        (3.0, 2.25, 9.0)
        """
        cpu_s = self.cpu_s * (1.0 - gpu_share)
        return max(cpu_s, self.offload_s * gpu_share) if gpu_share > 0 else cpu_s


def residency_order(modules: Sequence[DenseModule]) -> tuple[int, ...]:
    """Indices of the modules in the order in which they should get free GPU memory.

    The largest `gain_s_per_byte` first, of equals the first.
    """
    order = sorted(range(len(modules)), key=lambda index: -modules[index].gain_s_per_byte)
    return tuple(order)


def resident_modules(modules: Sequence[DenseModule], gpu_bytes: int) -> tuple[int, ...]:
    """Indices, ascending, of the modules that `residency_order` makes resident in `gpu_bytes`.

    A module that no longer fits is passed over. The CPU seconds taken over are the most possible
    where all modules are of one size; else what the best choice takes over more is less than the
    first module passed over would.

    Examples
    --------
    >>> small = DenseModule(num_bytes=2, cpu_s=3.0, copy_s=1.0, gpu_s=0.0)
    >>> large = DenseModule(num_bytes=4, cpu_s=4.0, copy_s=1.0, gpu_s=0.0)
    >>> resident_modules([large, small, large], 6)
    (0, 1)
    """
    left, found = gpu_bytes, []
    for index in residency_order(modules):
        if modules[index].num_bytes <= left:
            left -= modules[index].num_bytes
            found.append(index)
    return tuple(sorted(found))

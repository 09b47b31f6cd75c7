"""Which experts of a layer the CPU keeps, by popularity, while the link loads the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTimes:
    """Seconds of each expert of a layer, the least popular first, and of what is loaded before.

    Attributes
    ----------
    cpu_s : tuple of float
        On the CPU with the tokens that chose it; more tokens never take less.
    gpu_s : tuple of float
        On the GPU, once it is there.
    load_s : float
        Copying one, whichever.
    first_load_s : float
        Copying what the layer needs first: attention and gate, where they are not resident.
    """

    cpu_s: tuple[float, ...]
    gpu_s: tuple[float, ...]
    load_s: float
    first_load_s: float = 0.0

    def __post_init__(self) -> None:
        assert len(self.cpu_s) == len(self.gpu_s), "an expert has a time on either side"


def load_ratio(times: ExpertTimes, num_on_cpu: int) -> float:
    """The CPU's seconds over the link's, with the `num_on_cpu` least popular experts on the CPU.

    R of APTMoE (SC'24, equation 1), as printed: the link loads attention, gate and the experts
    that the CPU does not keep.

    Examples
    --------
    >>> load_ratio(ExpertTimes(cpu_s=(1.0, 2.0, 6.0), gpu_s=(0.0,) * 3, load_s=2.0), 2)
    1.5
    """
    link_s = times.first_load_s + (len(times.cpu_s) - num_on_cpu) * times.load_s
    cpu_s = math.fsum(times.cpu_s[:num_on_cpu])
    return cpu_s / link_s if link_s > 0 else math.inf


def num_on_cpu_by_ratio(times: ExpertTimes) -> int:
    """APTMoE's rule: the CPU takes experts, the least popular first, until R reaches 1.

    All of them, where it never does.

    Examples
    --------
    >>> num_on_cpu_by_ratio(ExpertTimes(cpu_s=(1.0, 2.0, 6.0), gpu_s=(0.0,) * 3, load_s=2.0))
    2
    """
    counts = range(len(times.cpu_s) + 1)
    return next((count for count in counts if load_ratio(times, count) >= 1.0), counts[-1])


def layer_s(times: ExpertTimes, on_cpu: Sequence[int]) -> float:
    """Seconds of a layer whose experts `on_cpu` the CPU runs, while the others are loaded and run.

    Both sides work at once. The GPU runs an expert as soon as it is loaded; loaded are first those
    that it takes longest for, which is the order that ends soonest, as all take as long to load
    (Johnson's rule).

    Examples
    --------
    >>> times = ExpertTimes(cpu_s=(1.0, 2.0, 9.0), gpu_s=(0.5, 1.0, 3.0), load_s=2.0)
    >>> layer_s(times, [0, 1]), layer_s(times, [0])  # loads 2 + 3; 2 * 2 + 1 and 2 + 3 + 1
    (5.0, 6.0)
    """
    kept = set(on_cpu)
    loaded_s = times.first_load_s
    gpu_end_s = 0.0
    others = (index for index in range(len(times.gpu_s)) if index not in kept)
    for gpu_s in sorted((times.gpu_s[index] for index in others), reverse=True):
        loaded_s += times.load_s
        gpu_end_s = max(gpu_end_s, loaded_s) + gpu_s
    return max(math.fsum(times.cpu_s[index] for index in kept), loaded_s, gpu_end_s)


def num_on_cpu(times: ExpertTimes) -> int:
    """How many experts the CPU keeps, the least popular first, so that the layer ends soonest.

    Of equals the most, as nothing is copied for them. `num_on_cpu_by_ratio` stops at the first
    number where the CPU is the later one, which may be one too many; this compares the seconds,
    the GPU's after the last load included. With loads longer than products no other set of experts
    ends sooner by more than the longest product less the shortest.

    Examples
    --------
    >>> times = ExpertTimes(cpu_s=(1.0, 2.0, 6.0), gpu_s=(0.0, 0.0, 0.0), load_s=2.0)
    >>> num_on_cpu(times)  # 3 s beside 2 s; one fewer is 1 s beside 4 s
    2
    """
    counts = range(len(times.cpu_s), -1, -1)
    return min(counts, key=lambda count: layer_s(times, range(count)))


def popularity_skew(shares: Sequence[Sequence[float]]) -> float:
    """How unevenly experts are chosen: the sum of squared shares of a layer, on the mean.

    G of APTMoE: 1 / E where all experts are chosen as often, 1 where one is always.

    Parameters
    ----------
    shares : sequence of sequences of float
        For each layer with experts, each one's share of the choices; a row adds up to 1.

    Examples
    --------
    >>> popularity_skew([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    0.625
    """
    return math.fsum(share * share for row in shares for share in row) / len(shares)

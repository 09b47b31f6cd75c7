"""How the missed experts of a step are divided between the link and the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence


def num_fetched(cpu_s: Sequence[float], fetch_s: float, max_fetched: int) -> int:
    """How many of a layer's missed experts to copy to the GPU, while the CPU runs the others.

    Both sides work at the same time, so the larger is made as small as it can be: the f experts
    that would take the CPU longest are fetched, with f minimising
    max(f * fetch_s, sum(cpu_s[f:])); of equals the fewest. A copy takes the same time whatever the
    expert's tokens, so that no other set of f experts is better (the corrected form of Fiddler's
    rule; FreeToken's split where all experts take as long).

    Parameters
    ----------
    cpu_s : sequence of float
        Seconds of each missed expert on the CPU while copies run, descending.
    fetch_s : float
        Seconds of copying one while the CPU works.
    max_fetched : int
        Experts that the GPU has room for.

    Examples
    --------
    >>> num_fetched([1.0] * 8, 3.0, 8)  # 2 copies in 6 s beside 6 experts in 6 s
    2
    >>> num_fetched([9.0, 1.0, 1.0], 3.0, 8)
    1
    """
    left_s = math.fsum(cpu_s)
    best, best_s = 0, left_s
    for count in range(1, min(len(cpu_s), max_fetched) + 1):
        left_s -= cpu_s[count - 1]
        slower_s = max(count * fetch_s, left_s)
        if slower_s < best_s:
            best, best_s = count, slower_s
        elif count * fetch_s >= best_s:
            break
    return best


def expected_fetched(num_missed: float, cpu_s: float, fetch_s: float, max_fetched: int) -> float:
    """`num_fetched` of an expected number of missed experts that all take the CPU `cpu_s`.

    Between two whole numbers of experts it lies in proportion.

    Examples
    --------
    >>> expected_fetched(8.0, 1.0, 3.0, 8), expected_fetched(3.5, 1.0, 1.0, 8)
    (2.0, 1.5)
    """
    low = math.floor(num_missed)
    parts = [
        (weight, num_fetched([cpu_s] * count, fetch_s, max_fetched))
        for count, weight in ((low, 1.0 - (num_missed - low)), (low + 1, num_missed - low))
        if weight > 0
    ]
    return sum(weight * found for weight, found in parts)


def link_share(link_bytes_per_s: float, cpu_bytes_per_s: float) -> float:
    """The share of a step's missed experts that the link should copy while the CPU runs the others.

    FreeToken's q*: both rates as measured while the other side is busy too, in bytes of experts.

    Examples
    --------
    >>> link_share(20e9, 60e9)
    0.25
    """
    return link_bytes_per_s / (link_bytes_per_s + cpu_bytes_per_s)


def num_fetched_of_share(num_missed: int, share: float) -> int:
    """How many of some equal experts to copy: `num_fetched` where all take the CPU as long.

    Of the two whole numbers about `share` * `num_missed` the one that ends first, of equals the
    smaller; a copy takes as long as (1 - share) / share experts on the CPU.

    Examples
    --------
    >>> num_fetched_of_share(8, 0.25), num_fetched([1.0] * 8, 3.0, 8)
    (2, 2)
    """
    low = math.floor(num_missed * share)
    return min(
        (low, low + 1),
        key=lambda count: max(count * (1.0 - share), (num_missed - count) * share),
    )

"""How often experts are found in the slots of a layer that keep what was used last."""

from __future__ import annotations

import math
from collections.abc import Sequence

# A step that certainly uses an expert, as a rate: beyond it e^-x is no longer seen beside 1.
_CERTAIN_RATE = 40.0


def lru_hit_rates(uses: Sequence[float], num_slots: int) -> tuple[float, ...]:
    """Probability that each expert is in a slot, where every missed one takes the oldest's.

    The approximation of Che, Tung and Wang (IEEE JSAC 20(7), 2002, equations 3 to 5) for
    independent references: an expert that steps use at a rate of l is held with probability
    1 - exp(-l t), with the one t for which all probabilities add up to the slots. The rate of one
    that a step uses with probability q is -ln(1 - q).

    Parameters
    ----------
    uses : sequence of float
        Probability that a step uses each expert.
    num_slots : int
        Slots of the layer, fewer than experts.

    Examples
    --------
    >>> lru_hit_rates([0.5, 0.5, 0.5, 0.5], 1)
    (0.25, 0.25, 0.25, 0.25)
    """
    assert 0 <= num_slots < len(uses), "some experts must be missed"
    rates = [min(_CERTAIN_RATE, -math.log1p(-q)) if q < 1.0 else _CERTAIN_RATE for q in uses]
    if sum(rate > 0.0 for rate in rates) <= num_slots:
        return tuple(float(rate > 0.0) for rate in rates)

    def held(steps: float) -> list[float]:
        return [-math.expm1(-rate * steps) for rate in rates]

    low, high = 0.0, 1.0
    while math.fsum(held(high)) < num_slots:
        high *= 2.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if math.fsum(held(middle)) < num_slots else (low, middle)
    found = held(high)
    scale = num_slots / math.fsum(found) if num_slots else 0.0  # what halving leaves
    return tuple(each * scale for each in found)

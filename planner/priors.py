"""Rates that a profile lacks, assumed from those it has."""

from __future__ import annotations

from collections.abc import Sequence

from planner.model_spec import DTYPE_BYTES, QUANTIZATION_GROUP, WeightKind

# Bits of a weight with its share of the group's scale, 16 bits.
_STORED_BITS: dict[WeightKind, float] = {
    "int8": 8 + 16 / QUANTIZATION_GROUP,
    "int4": 4 + 16 / QUANTIZATION_GROUP,
}
# What rates of quantised weights are assumed from.
ASSUMED_FROM: WeightKind = "bfloat16"


def assumed_rates(
    dtype: WeightKind, points: Sequence[tuple[int, float]]
) -> list[tuple[int, float]]:
    """Rates of quantised weights from bfloat16's, as (tokens, FLOP/s) by rising tokens.

    A product of one token reads every weight once, so its rate rises as the bytes shrink; whole
    numbers then count as fast as bfloat16 at its fastest, and no token count is slower than it is
    in bfloat16 (a roofline: Williams et al. 2009, eq. 1). Processors with instructions for int8
    multiply many tokens faster than this, and those without unpack int4 more slowly.

    Examples
    --------
    >>> # 16 / 8.125 bits = 1.97; at four tokens 1.97 * 35 is more than the products' fastest
    >>> [(tokens, round(rate, 1)) for tokens, rate in assumed_rates("int8", [(1, 10.0), (4, 35.0)])]
    [(1, 19.7), (4, 35.0)]
    """
    if dtype not in _STORED_BITS:
        return []
    ratio = 8 * DTYPE_BYTES["bfloat16"] / _STORED_BITS[dtype]
    fastest = max((rate for _, rate in points), default=0.0)
    return [(tokens, min(ratio * rate, fastest)) for tokens, rate in sorted(points)]

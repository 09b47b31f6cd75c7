"""Popularity: how often each expert is chosen, and how many different ones a step then reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.errors import PlannerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Popularity:
    """Probability that a token chooses an expert: a row for each layer with experts.

    `probabilities[layer][expert]` is P(expert in the top k), so that a row adds up to k; a layer
    without experts has an empty row.
    """

    probabilities: tuple[tuple[float, ...], ...]

    @classmethod
    def from_counts(cls, counts: Sequence[Sequence[int]], num_tokens: int) -> Popularity:
        """From how many of `num_tokens` tokens chose each expert, layer by layer.

        Raises
        ------
        PlannerError
            A count is negative or above the number of tokens.

        Examples
        --------
        >>> Popularity.from_counts([[8, 8], [16, 0]], 16).distinct_experts(0, 2)
        1.5
        """
        if num_tokens < 1:
            raise PlannerError(f"num_tokens is {num_tokens} but must be at least 1")
        for layer, row in enumerate(counts):
            for expert, count in enumerate(row):
                if not 0 <= count <= num_tokens:
                    raise PlannerError(
                        f"expert {expert} of layer {layer} was chosen {count} times by "
                        f"{num_tokens} tokens"
                    )
        return cls(probabilities=tuple(tuple(each / num_tokens for each in row) for row in counts))

    @property
    def is_by_layer(self) -> bool:
        """Do layers differ?"""
        return len(set(self.probabilities)) > 1

    def distinct_experts(self, layer: int, num_tokens: float) -> float:
        """Expected number of experts that some of `num_tokens` independent tokens choose.

        sum over e of 1 - (1 - p_e)^T (reference formula of a coupon collector with unequal
        probabilities); one token chooses exactly k.
        """
        return math.fsum(
            1.0 - math.pow(1.0 - each, num_tokens) for each in self.probabilities[layer]
        )

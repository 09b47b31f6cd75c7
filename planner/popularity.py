"""Popularity: how often each expert is chosen, and how many different ones a step then reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from planner.errors import PlannerError
from planner.lru_hits import lru_hit_rates

# Where nothing is known of a model: the r-th most popular expert is chosen in proportion to
# r^-0.6, and a prompt's tokens choose as half as many independent ones would. In recorded choices
# of gpt-oss-20b (32 experts, 4 chosen) and DeepSeek-V2-Lite (64, 6), 16 tokens of different texts
# chose 22.7 and 47.2 experts where uniform choices were 28.2 and 50.8; 32 tokens in a row chose
# 19.9 and 51.4 where 31.6 and 61.3 would be uniform.
_USUAL_EXPONENT = 0.6
_TOKENS_PER_CHOICE = 2.0


def independent_tokens(num_tokens: float, num_seqs: float) -> float:
    """So many tokens of different texts choose as many experts as the tokens of some sequences.

    Examples
    --------
    >>> independent_tokens(4, 4), independent_tokens(33, 1)
    (4.0, 17.0)
    """
    return num_seqs + (num_tokens - num_seqs) / _TOKENS_PER_CHOICE


@dataclass(frozen=True, slots=True, kw_only=True)
class Popularity:
    """Probability that a token chooses an expert: a row for each layer with experts.

    `probabilities[layer][expert]` is P(expert in the top k), so that a row adds up to k; a layer
    without experts has an empty row. Where `is_known` is false only the probabilities are known,
    and not which experts have them.
    """

    probabilities: tuple[tuple[float, ...], ...]
    is_known: bool = True

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

    @classmethod
    def even(cls, num_experts: int, num_chosen: int) -> Popularity:
        """All experts of a layer alike, as that of layer 0: E (1 - (1 - k/E)^T) different ones."""
        row = (num_chosen / num_experts,) * num_experts
        return cls(probabilities=(row,), is_known=False)

    @classmethod
    def usual(cls, num_experts: int, num_chosen: int) -> Popularity:
        """What the popularity of a layer usually is, as that of layer 0."""
        weights = [float(rank) ** -_USUAL_EXPONENT for rank in range(1, num_experts + 1)]
        # none can be chosen more than always: what is cut off goes to the others
        num_certain, scale = 0, num_chosen / math.fsum(weights)
        while num_certain < num_chosen and scale * weights[num_certain] > 1.0:
            num_certain += 1
            left = math.fsum(weights[num_certain:])
            scale = (num_chosen - num_certain) / left if left > 0 else 0.0
        probabilities = [1.0] * num_certain + [scale * each for each in weights[num_certain:]]
        return cls(probabilities=(tuple(probabilities),), is_known=False)

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

    def order(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer, the most popular first."""
        row = self.probabilities[layer]
        return tuple(sorted(range(len(row)), key=lambda expert: (-row[expert], expert)))

    def resident_load(
        self, layer: int, num_tokens: float, num_resident: int
    ) -> tuple[float, float]:
        """What the resident experts of a layer get of some independent tokens.

        The first `num_resident` of `order`, or, where it is not known who is popular, as many as
        any.

        Returns
        -------
        tuple of float
            How many of them are chosen by some token; the share of all choices that are theirs.

        Examples
        --------
        >>> Popularity.from_counts([[16, 4, 4, 8]], 16).resident_load(0, 1, 1)
        (1.0, 0.5)
        """
        row = self.probabilities[layer]
        if not self.is_known:
            share = num_resident / len(row)
            return share * self.distinct_experts(layer, num_tokens), share
        chosen = sorted(row, reverse=True)[:num_resident]
        distinct = math.fsum(1.0 - math.pow(1.0 - each, num_tokens) for each in chosen)
        return distinct, math.fsum(chosen) / math.fsum(row)

    def lru_load(self, layer: int, num_tokens: float, num_slots: int) -> tuple[float, float]:
        """The same of slots that keep what was used last (`lru_hit_rates`), in steps of so many.

        Where it is known who is popular, no slots do better than those of `resident_load`, if
        tokens choose independently; where it is not, these learn it.

        Examples
        --------
        >>> distinct, share = Popularity.even(8, 2).lru_load(0, 1, 4)
        >>> round(distinct, 9), round(share, 9)  # half of two
        (1.0, 0.5)
        """
        row = self.probabilities[layer]
        uses = [1.0 - math.pow(1.0 - each, num_tokens) for each in row]
        held = lru_hit_rates(uses, num_slots)
        distinct = math.fsum(rate * use for rate, use in zip(held, uses, strict=True))
        chosen = math.fsum(rate * each for rate, each in zip(held, row, strict=True))
        return distinct, chosen / math.fsum(row)

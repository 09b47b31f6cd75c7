"""ExpertPolicy: what decides which experts lie in a layer's slots, and what is copied ahead."""

# T tokens of a step, k experts a token

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class ExpertPolicy(Protocol):
    """Decides over the slots of all layers of a model; each layer has its own slots.

    It is told what happens, and asked; which experts are held is told with each question, so that
    an expert that could not be copied after all is no trouble. Mutable, and deterministic.
    """

    def on_gate(self, layer: int, experts_Tk: NDArray[np.int64]) -> None:
        """The gate of a layer has chosen these experts for the tokens of a step."""

    def on_access(self, layer: int, expert: int, *, is_hit: bool) -> None:
        """An expert is used; `is_hit`: it was in a slot."""

    def victims(
        self, layer: int, held: Sequence[int], count: int, kept: Collection[int]
    ) -> tuple[int, ...]:
        """At most `count` of the experts held, whose slots others may take: those to go first.

        `held` are the experts by slot; none of `kept` is among the answers.
        """

    def prefetch(
        self, layer: int, probable: Sequence[int], held: Collection[int]
    ) -> tuple[int, ...]:
        """Which of the experts that a layer will probably use to copy ahead, in that order.

        `probable` begins with the most probable.
        """


def not_held(probable: Sequence[int], held: Collection[int]) -> tuple[int, ...]:
    """The probable experts that are in no slot, in their order."""
    there = frozenset(held)
    return tuple(expert for expert in probable if expert not in there)


def access_order(experts_Tk: NDArray[np.int64]) -> tuple[int, ...]:
    """The different experts of a step, in the order in which each is chosen for the last time.

    A policy that keeps what was used last then has what single accesses in the order of tokens and
    their choices would have given it.

    Examples
    --------
    >>> access_order(np.array([[3, 1], [1, 2], [3, 0]]))
    (1, 2, 3, 0)
    """
    reversed_N = experts_Tk.ravel()[::-1]
    _, first_E = np.unique(reversed_N, return_index=True)
    return tuple(reversed_N[np.sort(first_E)[::-1]].tolist())

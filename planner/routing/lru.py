"""Lru: the slot of the expert that was used longest ago is given up first."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from planner.routing.policy import not_held


class Lru:
    """Least recently used, layer by layer, as Mixtral-Offloading keeps experts.

    Of experts never used the last slot's goes first: slots are filled with the most popular first.

    Examples
    --------
    >>> lru = Lru()
    >>> for expert in (2, 0, 2):
    ...     lru.on_access(5, expert, is_hit=True)
    >>> lru.victims(5, (0, 1, 2, 3), 3, kept=())
    (3, 1, 0)
    """

    def __init__(self) -> None:
        self._clock = 0
        # By layer and expert, the clock at its last use.
        self._last_used: dict[int, dict[int, int]] = {}

    def on_gate(self, layer: int, experts_Tk: NDArray[np.int64]) -> None:
        pass

    def on_access(self, layer: int, expert: int, *, is_hit: bool) -> None:
        self._clock += 1
        self._last_used.setdefault(layer, {})[expert] = self._clock

    def victims(
        self, layer: int, held: Sequence[int], count: int, kept: Collection[int]
    ) -> tuple[int, ...]:
        last_used = self._last_used.get(layer, {})
        free = [(last_used.get(expert, 0), -slot) for slot, expert in enumerate(held)]
        oldest = (held[-slot] for _, slot in sorted(free) if held[-slot] not in kept)
        return tuple(expert for expert, _ in zip(oldest, range(count), strict=False))

    def prefetch(
        self, layer: int, probable: Sequence[int], held: Collection[int]
    ) -> tuple[int, ...]:
        return not_held(probable, held)

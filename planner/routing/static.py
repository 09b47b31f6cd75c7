"""Static: the experts that are in slots at first stay there."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from planner.routing.policy import not_held


class Static:
    """Gives up no slot. What is fetched, or copied ahead, is used once."""

    def on_gate(self, layer: int, experts_Tk: NDArray[np.int64]) -> None:
        pass

    def on_access(self, layer: int, expert: int, *, is_hit: bool) -> None:
        pass

    def victims(
        self, layer: int, held: Sequence[int], count: int, kept: Collection[int]
    ) -> tuple[int, ...]:
        return ()

    def prefetch(
        self, layer: int, probable: Sequence[int], held: Collection[int]
    ) -> tuple[int, ...]:
        return not_held(probable, held)

"""An allocation of layers as placements: which layers of a kind are in which of its states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from planner.allocation import Allocation
from planner.layer_menu import LOADS, Menu
from planner.search_space import Draft, Space


def drafts_of(space: Space, allocation: Allocation, menus: Sequence[Menu]) -> Iterator[Draft]:
    """An allocation's layers in order: what is streamed spread evenly, or like beside like."""
    together: dict[int, int] = {}
    left: dict[int, dict[int, int]] = {}
    streams = False
    for counts, menu, whole, members in zip(
        allocation.counts, menus, space.menus, space.layers, strict=False
    ):
        columns = {whole.column_of(menu, column): count for column, count in counts.items()}
        streams |= any(whole.streamed_bytes[:, column].any() for column in columns)
        listed = [column for column, count in columns.items() for _ in range(count)]
        together |= zip(members, sorted(listed, key=partial(_depth, whole)), strict=True)
        left |= dict.fromkeys(members, columns)
    (ends,) = allocation.counts[-1]
    ends = space.menus[-1].column_of(menus[-1], ends)
    in_order = [together[index] for index in sorted(together)]
    for layers in (_evenly(space, left), in_order) if streams else (in_order,):
        yield Draft(layers=tuple(layers), ends=ends)


def _evenly(space: Space, left: dict[int, dict[int, int]]) -> list[int]:
    """Layers in an order in which chains and copies grow together, as copies run little ahead."""
    rows = [LOADS.index("chain"), LOADS.index("copies")]
    loads_s = {
        index: {column: space.menu_of[index].loads_s[rows, :, column].ravel() for column in columns}
        for index, columns in left.items()
    }
    total_s = sum(
        count * loads_s[members[0]][column]
        for members in space.layers
        for column, count in left[members[0]].items()
    )
    layers, sum_s = list[int](), np.zeros(2 * len(rows))
    for index in sorted(left):
        wanted_s = (index + 1) / len(left) * total_s
        column = min(
            (column for column, count in left[index].items() if count),
            key=lambda column: float(((sum_s + loads_s[index][column] - wanted_s) ** 2).sum()),
        )
        left[index][column] -= 1
        sum_s = sum_s + loads_s[index][column]
        layers.append(column)
    return layers


def _depth(menu: Menu, column: int) -> tuple[object, ...]:
    """Layers on the CPU come first, as in the named strategies, those on the GPU last."""
    picked = menu.picked(column)
    return tuple(
        (choice.decode.device == "gpu", choice.decode.lives == "gpu", choice.decode.num_resident)
        for choice in picked
    )

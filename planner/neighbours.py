"""Placements one by one: all of a small model, and the neighbours of a good one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from planner.candidate import Candidate
from planner.layer_menu import DEVICES, LOADS
from planner.search_space import Draft, Space, placement_of
from planner.workload import PHASES

# Placements that are simulated in vain after the best, and then neighbours of it: as many as have
# so many ops in all.
_MAX_SIMULATED_OPS = 12_000
_MIN_SIMULATED, MAX_SIMULATED = 12, 300
# Placements of a chunk are all looked at where there are no more, if so many at most.
_MAX_LOOKED_AT = 400
_MAX_COMBINATIONS = 100_000


def all_placements(space: Space, known_s: float) -> Iterator[tuple[Draft, Candidate]]:
    """Ever faster placements of a model of so few layers that each can be looked at.

    Or each that divides no feed-forward, where these are few enough.
    """
    kind_of = {index: kind for kind, members in enumerate(space.layers) for index in members}
    kinds = [*(kind_of[index] for index in sorted(kind_of)), len(space.layers)]
    menus, limits = [space.menus[kind] for kind in kinds], space.everything()
    if math.prod(len(menu.states) for menu in menus) > _MAX_COMBINATIONS:
        limits = replace(limits, is_divided=(False, False))
    wanted = [np.flatnonzero(space.allowed(kind, limits)) for kind in kinds]
    if math.prod(map(len, wanted)) > _MAX_COMBINATIONS:
        return
    columns = np.array([each.ravel() for each in np.meshgrid(*wanted, indexing="ij")])
    held = np.zeros((2, columns.shape[1]))
    for menu, at in zip(menus, columns, strict=True):
        held += menu.bytes[:, at]
    columns = columns[:, (held <= np.array([space.budgets(space.everything())]).T).all(axis=0)]
    loads_s = np.zeros((len(LOADS), 2, columns.shape[1]))
    moves_s = np.zeros(columns.shape[1])
    for menu, at in zip(menus, columns, strict=True):
        loads_s += menu.loads_s[:, :, at]
        moves_s += menu.move_s[at]
    seconds = loads_s.max(axis=0).sum(axis=0) + moves_s + space.base_s
    for index in np.argsort(seconds, kind="stable")[:_MAX_LOOKED_AT]:
        if seconds[index] >= known_s:
            return
        *layers, ends = columns[:, index].tolist()
        draft = Draft(layers=tuple(layers), ends=ends)
        candidate = Candidate(placement_of(space, draft), space.wave)
        if candidate.lacking_bytes == 0 and candidate.times.e2e_s < known_s:
            known_s = candidate.times.e2e_s
            yield draft, candidate


def polished(space: Space, draft: Draft, candidate: Candidate) -> Iterator[Candidate]:
    """Ever faster placements, each of which gives one layer, or the ends, another state.

    Of all neighbours those are simulated whose sums promise most; sums know nothing of what lanes
    wait for, and allocations nothing of what competes for memory by its maximum.
    """
    num_left = num_simulated(candidate)
    found: Candidate | None = candidate
    while found is not None:
        found = None
        for other in _neighbours(space, draft, candidate)[:num_left]:
            changed = Candidate(placement_of(space, other), space.wave)
            num_left -= 1
            if changed.lacking_bytes:
                continue
            if changed.times.e2e_s < candidate.times.e2e_s:
                draft, candidate, found = other, changed, changed
                yield candidate
                break


def num_simulated(candidate: Candidate) -> int:
    """How many placements like this one are worth simulating in search of a faster one."""
    num_ops = sum(
        len(candidate.graphs.of(candidate.pricer.steps(phase)[0][1].shape).ops) for phase in PHASES
    )
    return min(MAX_SIMULATED, max(_MIN_SIMULATED, _MAX_SIMULATED_OPS // num_ops))


def _neighbours(space: Space, draft: Draft, candidate: Candidate) -> list[Draft]:
    """Drafts with one state changed whose sums are below a placement's seconds, the least first.

    Of layers in one state, the first and the last; only states that may fit.
    """
    below_s, memory = candidate.times.e2e_s, candidate.memory
    free = [
        memory[device].available_bytes - memory[device].needed_bytes if device in memory else 0
        for device in DEVICES
    ]
    free[0] += memory["gpu"].staging_bytes
    slack = np.array(free, float)[:, None]
    menus = [space.menu_of[index] for index in range(len(draft.layers))]
    loads_s = space.menus[-1].loads_s[:, :, draft.ends]
    moves_s = 0.0
    for menu, column in zip(menus, draft.layers, strict=True):
        loads_s = loads_s + menu.loads_s[:, :, column]
        moves_s += float(menu.move_s[column])
    seen: dict[tuple[int, int], list[int]] = {}
    for index, column in enumerate(draft.layers):
        seen.setdefault((id(menus[index]), column), []).append(index)
    places = sorted({index for same in seen.values() for index in (same[0], same[-1])})
    found: list[tuple[float, int, int]] = []
    for place in (*places, len(menus)):
        is_end = place == len(menus)
        menu = space.menus[-1] if is_end else menus[place]
        old = draft.ends if is_end else draft.layers[place]
        changed_s = loads_s[:, :, None] + menu.loads_s - menu.loads_s[:, :, [old]]
        seconds = changed_s.max(axis=0).sum(axis=0) + menu.move_s + space.base_s
        seconds = seconds + moves_s - menu.move_s[old]
        seconds[old] = np.inf
        more = menu.bytes - menu.bytes[:, [old]]
        more[0] += space.staging_bytes(draft, place, menu)
        seconds[(more > slack).any(axis=0)] = np.inf
        order = np.argsort(seconds, kind="stable")[:MAX_SIMULATED]
        found += [
            (float(seconds[column]), place, int(column))
            for column in order
            if seconds[column] < below_s
        ]
    drafts = []
    for _, place, column in sorted(found):
        if place == len(menus):
            drafts.append(Draft(layers=draft.layers, ends=column))
        else:
            layers = (*draft.layers[:place], column, *draft.layers[place + 1 :])
            drafts.append(Draft(layers=layers, ends=draft.ends))
    return drafts

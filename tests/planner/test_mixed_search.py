"""The search of all placements: sums are lower bounds, and the choice is near the exact optimum."""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from planner import search
from planner.candidate import Candidate, Wave
from planner.cost_model import CostModel
from planner.layer_menu import DEVICES
from planner.mixed_search import _Draft, _placement, _Space
from planner.placement import check_matches
from tests.planner.exact_search import CHUNK_TOKENS, fastest, random_case


@pytest.mark.parametrize("seed", range(30))
def test_no_placement_is_faster_than_its_sums_or_holds_fewer_bytes(seed: int) -> None:
    """Random states of random models: what the bound rests on."""
    draw = Random(seed)
    case = random_case(draw)
    wave = Wave(case.spec, CostModel(case.machine), case.workload, case.workload.num_seqs)
    space = _Space(wave, CHUNK_TOKENS)
    for _ in range(20):
        columns = [
            draw.randrange(len(space.menu_of[index].states))
            for index in range(case.spec.num_layers)
        ]
        menus = [*(space.menu_of[index] for index in range(len(columns))), space.menus[-1]]
        columns.append(draw.randrange(len(space.menus[-1].states)))
        draft = _Draft(layers=tuple(columns[:-1]), ends=columns[-1])
        candidate = Candidate(_placement(space, draft), wave)
        pairs = list(zip(menus, columns, strict=True))
        loads_s = sum(menu.loads_s[:, :, at] for menu, at in pairs)
        moves_s = sum(float(menu.move_s[at]) for menu, at in pairs)
        least_s = float(np.max(loads_s, axis=0).sum()) + moves_s + space.base_s

        assert check_matches(candidate.placement, case.spec) is None
        assert candidate.times.e2e_s >= least_s * (1 - 1e-9)
        assert candidate.move_s * wave.num_waves == pytest.approx(moves_s, abs=1e-12)
        held = np.sum([menu.bytes[:, at] for menu, at in pairs], axis=0)
        for row, device in enumerate(("gpu", "cpu")):
            memory = candidate.memory[device]  # type: ignore[index]
            assert memory.weights_bytes + memory.kv_bytes == held[row]


@pytest.mark.parametrize("seed", range(30))
def test_no_placement_leaves_more_memory_than_the_bound_of_its_limits_assumes(seed: int) -> None:
    """Where one phase streams and the other splits, buffers and slots are the same memory."""
    draw = Random(seed)
    case = random_case(draw)
    wave = Wave(case.spec, CostModel(case.machine), case.workload, case.workload.num_seqs)
    space = _Space(wave, CHUNK_TOKENS)
    all_limits = list(space.limits())
    for _ in range(40):
        menus = [space.menu_of[index] for index in range(case.spec.num_layers)]
        columns = [draw.randrange(len(menu.states)) for menu in menus]
        ends = draw.randrange(len(space.menus[-1].states))
        draft = _Draft(layers=tuple(columns), ends=ends)
        candidate = Candidate(_placement(space, draft), wave)
        pairs = [*zip(menus, columns, strict=True), (space.menus[-1], ends)]
        streamed = max(float(menu.streamed_bytes[:, at].max()) for menu, at in pairs)
        (limits,) = (
            each
            for each in all_limits
            if each.streams == in_phases((m.streamed_bytes[:, at] > 0) for m, at in pairs)
            and each.is_split == in_phases(m.is_split[:, at] for m, at in pairs)
            and each.uses_gpu == in_phases(m.uses_gpu[:, at] for m, at in pairs)
            and (each.streamed_bytes[0] < streamed <= each.streamed_bytes[1] or not streamed)
        )
        for left, device in zip(space.budgets(limits), DEVICES, strict=True):
            memory = candidate.memory[device]
            others = memory.activation_bytes + memory.staging_bytes
            assert memory.available_bytes - others <= left


def in_phases(flags: Iterable[NDArray[np.bool_]]) -> tuple[bool, ...]:
    """Of each phase, whether any layer's flag is set."""
    return tuple(np.any(list(flags), axis=0).tolist())


@pytest.mark.parametrize("seed", range(24))
def test_the_choice_is_within_a_percent_of_the_optimum_and_the_gap_is_true(seed: int) -> None:
    """Models of one and two layers, where the exact search looks at everything."""
    case = random_case(Random(1000 + seed), max_layers=2)
    plan = search(
        case.spec, case.machine, case.workload, chunk_tokens=CHUNK_TOKENS, prefers_simple=False
    )
    known_s = plan.estimate.e2e_s if plan.feasible else math.inf
    exact = fastest(case, known_s)

    assert plan.feasible or exact.seconds == math.inf
    if plan.feasible and exact.is_complete:
        assert plan.estimate.e2e_s <= 1.01 * exact.seconds
        assert plan.estimate.e2e_s * (1 - plan.optimality_gap) <= exact.seconds * (1 + 1e-9)

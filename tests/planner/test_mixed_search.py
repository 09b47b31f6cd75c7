"""The search of all placements: sums are lower bounds, and the choice is near the exact optimum."""

from __future__ import annotations

import math
from itertools import product
from random import Random

import highspy
import numpy as np
import pytest

from planner import search
from planner.allocation import Problem, Relaxation
from planner.candidate import Candidate, Wave
from planner.cost_model import CostModel
from planner.layer_menu import DEVICES, LOADS
from planner.placement import check_matches
from planner.search_space import FLAGS, Draft, Limits, Space, SubBatches, placement_of
from tests.planner.exact_search import CHUNK_TOKENS, Case, fastest, random_case


def a_division(draw: Random, case: Case) -> SubBatches:
    """One batch or two, where the model and the workload let decode run in two."""
    num_seqs = case.workload.num_seqs
    if num_seqs == 1 or any(layer.attention is not None for layer in case.spec.layers):
        return SubBatches()
    first_on_cpu = draw.random() < 0.5
    num_second = num_seqs // 2 if first_on_cpu else draw.randrange(num_seqs)
    return SubBatches(num_second=num_second, first_on_cpu=first_on_cpu)


@pytest.mark.parametrize("seed", range(30))
def test_no_placement_is_faster_than_its_sums_or_holds_fewer_bytes(seed: int) -> None:
    """Random states of random models: what the bound rests on."""
    draw = Random(seed)
    case = random_case(draw)
    wave = Wave(case.spec, CostModel(case.machine), case.workload, case.workload.num_seqs)
    space = Space(wave, CHUNK_TOKENS, a_division(draw, case))
    for _ in range(20):
        columns = [
            draw.randrange(len(space.menu_of[index].states))
            for index in range(case.spec.num_layers)
        ]
        menus = [*(space.menu_of[index] for index in range(len(columns))), space.menus[-1]]
        columns.append(draw.randrange(len(space.menus[-1].states)))
        draft = Draft(layers=tuple(columns[:-1]), ends=columns[-1])
        candidate = Candidate(placement_of(space, draft), wave)
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


@pytest.mark.parametrize("seed", range(60))
def test_layers_of_one_state_are_not_faster_than_their_sums(seed: int) -> None:
    """Where all layers stream beside the same work lanes slow each other down most."""
    draw = Random(seed)
    case = random_case(draw)
    wave = Wave(case.spec, CostModel(case.machine), case.workload, case.workload.num_seqs)
    space = Space(wave, CHUNK_TOKENS, a_division(draw, case))
    for _ in range(20):
        columns = [draw.randrange(len(menu.states)) for menu in space.menus]
        counts = [*(len(members) for members in space.layers), 1]
        layers = {
            index: column
            for members, column in zip(space.layers, columns, strict=False)
            for index in members
        }
        draft = Draft(layers=tuple(layers[index] for index in sorted(layers)), ends=columns[-1])
        candidate = Candidate(placement_of(space, draft), wave)
        least_s = space.base_s
        loads_s = np.zeros((len(LOADS), 2))
        for menu, count, column in zip(space.menus, counts, columns, strict=True):
            loads_s += count * menu.loads_s[:, :, column]
            least_s += count * float(menu.move_s[column])

        assert candidate.times.e2e_s >= (least_s + loads_s.max(axis=0).sum()) * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_each_placement_is_in_one_part_and_leaves_no_more_memory_than_that_assumes(
    seed: int,
) -> None:
    """However far the space is divided by what the placement, or another one, uses."""
    draw = Random(seed)
    case = random_case(draw)
    wave = Wave(case.spec, CostModel(case.machine), case.workload, case.workload.num_seqs)
    space = Space(wave, CHUNK_TOKENS, a_division(draw, case))
    for _ in range(20):
        draft, other = random_draft(space, draw), random_draft(space, draw)
        used, limits = limits_of(space, draft), space.everything()
        candidate = Candidate(placement_of(space, draft), wave)
        others = limits_of(space, other)
        while True:
            for left, device in zip(space.budgets(limits), DEVICES, strict=True):
                memory = candidate.memory[device]
                taken = memory.activation_bytes + memory.staging_bytes
                assert memory.available_bytes - taken <= left
            parts = space.parts(limits, draw.choice((used, others)))
            if not parts:
                break
            (limits,) = (each for each in parts if is_within(used, each))
            for kind, columns in enumerate(columns_of(space, draft)):
                assert space.allowed(kind, limits)[list(columns)].all()


def random_draft(space: Space, draw: Random) -> Draft:
    """Any state for each layer."""
    menus = [space.menu_of[index] for index in range(len(space.menu_of))]
    layers = tuple(draw.randrange(len(menu.states)) for menu in menus)
    return Draft(layers=layers, ends=draw.randrange(len(space.menus[-1].states)))


def columns_of(space: Space, draft: Draft) -> list[set[int]]:
    """The columns of each menu that a draft has."""
    return [*({draft.layers[at] for at in members} for members in space.layers), {draft.ends}]


def limits_of(space: Space, draft: Draft) -> Limits:
    """What a draft uses."""
    problem = space.problem(space.everything(), is_apart=False)
    assert problem is not None
    return space.used(problem, columns_of(space, draft))


def is_within(used: Limits, limits: Limits) -> bool:
    """Does what uses this belong to a part?"""
    bytes_fit = all(
        least <= streamed <= most
        for (streamed, _), (least, most) in zip(
            used.streamed_bytes, limits.streamed_bytes, strict=True
        )
    )
    return bytes_fit and all(
        said in (None, is_so)
        for name in FLAGS
        for is_so, said in zip(used.flags(name), limits.flags(name), strict=True)
    )


@pytest.mark.parametrize("seed", range(24))
def test_the_bound_is_that_of_the_linear_relaxation(seed: int) -> None:
    """Against an exact solver that knows all states at once."""
    case = random_case(Random(seed))
    wave = Wave(case.spec, CostModel(case.machine), case.workload, case.workload.num_seqs)
    space = Space(wave, CHUNK_TOKENS)
    limits = space.everything()
    problem, budgets = space.problem(limits, is_apart=False), space.budgets(limits)
    assert problem is not None
    bound = Relaxation(problem, budgets).solve()
    expected_s = linear_relaxation_s(problem, budgets)

    assert (bound is None) == (expected_s is None)
    if bound is not None and expected_s is not None:
        assert expected_s * (1 - 1e-3) <= bound.bound_s <= expected_s * (1 + 1e-6)


def linear_relaxation_s(problem: Problem, budgets: tuple[float, float]) -> float | None:
    """Seconds where layers may be divided between states; None where nothing fits."""
    lp = highspy.Highs()
    lp.silent()
    phases_s = [lp.addVariable(obj=1.0) for _ in range(2)]
    loads_s = [[-phases_s[phase] for phase in range(2)] for _ in LOADS]
    held = [0.0 * phases_s[0] for _ in range(2)]
    for count, menu in zip(problem.counts, problem.menus, strict=True):
        layers = [lp.addVariable(obj=float(move_s)) for move_s in menu.move_s]
        lp.addConstr(lp.qsum(layers) == count)
        for load, phase in product(range(len(LOADS)), range(2)):
            seconds = menu.loads_s[load, phase].tolist()
            loads_s[load][phase] += lp.qsum(
                each * layer for each, layer in zip(seconds, layers, strict=True)
            )
        for device in range(2):
            size = menu.bytes[device].tolist()
            held[device] += lp.qsum(each * layer for each, layer in zip(size, layers, strict=True))
    for row in loads_s:
        for less_s in row:
            lp.addConstr(less_s <= 0.0)
    for taken, budget in zip(held, budgets, strict=True):
        lp.addConstr(taken <= budget)
    lp.minimize()
    if lp.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    return problem.base_s + float(lp.getInfo().objective_function_value)


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

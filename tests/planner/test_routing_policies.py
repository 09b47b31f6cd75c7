"""Policies of expert slots: against an obvious restatement, on drawn and on recorded choices."""

from __future__ import annotations

import lzma
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.routing import ExpertPolicy, Lru, Static
from planner.routing.policy import access_order

DATA = Path(__file__).parents[3] / "shared" / "data"
PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)

Accesses = Sequence[tuple[int, int]]  # layer and expert


def hits_of(policy: ExpertPolicy, accesses: Accesses, num_slots: int) -> list[bool]:
    """Access by access, each missed expert in the slot that the policy gives up; full at first."""
    held: dict[int, list[int]] = {}
    hits = []
    for layer, expert in accesses:
        slots = held.setdefault(layer, list(range(num_slots)))
        hits.append(expert in slots)
        policy.on_access(layer, expert, is_hit=hits[-1])
        if not hits[-1]:
            for victim in policy.victims(layer, slots, 1, kept=()):
                slots[slots.index(victim)] = expert
    return hits


def naive_lru(accesses: Accesses, num_slots: int) -> list[bool]:
    """By layer a list of experts, the one used last at its end."""
    order: dict[int, OrderedDict[int, None]] = {}
    hits = []
    for layer, expert in accesses:
        used = order.setdefault(layer, OrderedDict.fromkeys(reversed(range(num_slots))))
        hits.append(expert in used)
        if hits[-1]:
            used.move_to_end(expert)
        else:
            used.popitem(last=False)
            used[expert] = None
    return hits


traces = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=120)


@PROPERTY
@given(traces, st.integers(1, 7))
def test_lru_finds_what_an_ordered_list_finds(accesses: Accesses, num_slots: int) -> None:
    assert hits_of(Lru(), accesses, num_slots) == naive_lru(accesses, num_slots)


@PROPERTY
@given(traces, st.integers(1, 7))
def test_static_finds_what_was_there_at_first(accesses: Accesses, num_slots: int) -> None:
    assert hits_of(Static(), accesses, num_slots) == [each < num_slots for _, each in accesses]


@PROPERTY
@given(
    st.lists(st.lists(st.integers(0, 7), min_size=3, max_size=3), min_size=1, max_size=10),
    st.integers(1, 7),
)
def test_a_step_leaves_the_order_of_its_single_accesses(
    tokens: list[list[int]], num_slots: int
) -> None:
    """Token by token, each one's choices in their order."""
    by_step, one_by_one = Lru(), Lru()
    for expert in access_order(np.array(tokens)):
        by_step.on_access(0, expert, is_hit=True)
    for expert in (each for token in tokens for each in token):
        one_by_one.on_access(0, expert, is_hit=True)

    held = range(8)
    assert by_step.victims(0, held, 8, ()) == one_by_one.victims(0, held, 8, ())


@pytest.mark.parametrize("policy", [Lru(), Static()], ids=["lru", "static"])
def test_a_policy_gives_up_nothing_that_is_kept_and_no_more_than_asked(
    policy: ExpertPolicy,
) -> None:
    policy.on_access(0, 4, is_hit=True)
    held = (4, 1, 2, 6)

    assert not {1, 6} & set(policy.victims(0, held, 4, kept=(1, 6)))
    assert len(policy.victims(0, held, 1, kept=())) <= 1
    assert policy.victims(0, held, 4, kept=held) == ()
    assert set(policy.victims(0, held, 9, kept=())) in ({4, 1, 2, 6}, set())
    assert policy.prefetch(0, (6, 3, 4, 0), held) == (3, 0)


@pytest.mark.parametrize("name", ["routing_gptoss20b", "routing_dsv2lite"])
def test_lru_finds_recorded_choices_as_an_ordered_list_does(name: str) -> None:
    """One token after another, a quarter of each layer's experts in slots."""
    path = DATA / name / "experts.npy.xz"
    if not path.exists():
        pytest.skip("recorded choices of experts are not beside this checkout")
    with lzma.open(path) as file:
        choices = np.load(file)[:400]
    accesses = list(flat(choices.tolist()))
    num_slots = (int(choices.max()) + 1) // 4

    found = hits_of(Lru(), accesses, num_slots)
    assert found == naive_lru(accesses, num_slots)
    assert 0.2 < np.mean(found) < 0.9  # neither hopeless nor trivial


def flat(choices: Iterable[list[list[int]]]) -> Iterable[tuple[int, int]]:
    for layers in choices:
        for layer, experts in enumerate(layers):
            yield from ((layer, expert) for expert in experts)


def test_the_planner_imports_without_the_policies() -> None:
    """They need numpy, which takes longer to import than all of the planner."""
    code = "import planner, sys; print('planner.routing' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]

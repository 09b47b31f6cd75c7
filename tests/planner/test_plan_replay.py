"""Stored plans are what the search answers today (see replay.py to store them anew)."""

from __future__ import annotations

import pytest

from tests.planner.replay import (
    MACHINES,
    MODELS,
    PLANS,
    WORKLOADS,
    checked_workload,
    differences,
    digest,
    path_of,
    stored,
)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", MODELS)
def test_the_search_answers_as_it_is_stored(model: str, machine: str) -> None:
    workload = checked_workload(model, machine)
    found = digest(model, machine, workload)
    assert list(differences(found, stored(model)[machine, workload])) == []


def test_every_plan_of_the_grid_is_stored_and_no_other() -> None:
    assert set(PLANS.glob("*.json")) == {path_of(model) for model in MODELS}
    for model in MODELS:
        assert set(stored(model)) == {(machine, each) for machine in MACHINES for each in WORKLOADS}


def test_a_plan_that_differs_shows() -> None:
    known = {"a": [1, {"b": 2.0}], "c": "x"}
    assert list(differences({"a": [1, {"b": 2.0 + 1e-12}], "c": "x"}, known)) == []
    found = list(differences({"a": [1, {"b": 2.1}], "d": None}, known))
    assert found == [".a.1.b: 2.1, stored is 2.0", ".c: None, stored is 'x'"]

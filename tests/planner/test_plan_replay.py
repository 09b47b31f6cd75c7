"""Stored plans are what the search answers today (see replay.py to store them anew)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.planner.replay import PAIRS, PLANS, digests, path_of


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Every leaf of a JSON document by its path."""
    if isinstance(value, dict):
        items = [(f"{where}.{key}", inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{where}[{index}]", inner) for index, inner in enumerate(value)]
    else:
        return {where: value}
    return {
        path: leaf
        for inner_where, inner in items
        for path, leaf in flat(inner, inner_where).items()
    }


@pytest.mark.parametrize(("model", "machine"), PAIRS)
def test_the_search_answers_as_it_is_stored(model: str, machine: str) -> None:
    """Names, cuts and bytes exactly; seconds to 1e-9, as logarithms differ between libraries."""
    stored = flat(json.loads(path_of(model, machine).read_text()))
    found = flat(digests(model, machine))

    assert found.keys() == stored.keys()
    for path, value in stored.items():
        if isinstance(value, float):
            assert found[path] == pytest.approx(value, rel=1e-9), path
        else:
            assert found[path] == value, path


def test_no_stored_plan_is_left_over() -> None:
    assert set(PLANS.glob("*.json")) == {path_of(model, machine) for model, machine in PAIRS}

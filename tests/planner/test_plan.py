"""Plan: strict JSON, and errors that name the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner import search
from planner.errors import PlanError
from planner.plan import Plan
from planner.workload import Workload
from tests.planner.tiny import real_machine, tiny_spec

PLAN = search(tiny_spec("dm"), real_machine(), Workload(prompt_len=8, output_len=4))


def test_a_plan_goes_through_json_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(PLAN.to_json())

    assert Plan.load(path) == PLAN


def test_a_plan_has_the_keys_of_the_contract() -> None:
    """Scripts rely on them: names of the contract."""
    document = json.loads(PLAN.to_json())

    assert document.keys() >= {
        *("schema_version", "model", "profile", "workload", "objective", "feasible"),
        *("placement", "estimate", "optimality_gap", "alternatives"),
    }
    assert document["estimate"].keys() >= {
        *("ttft_s", "tpot_s", "e2e_s", "prefill_tokens_per_s", "decode_tokens_per_s"),
        *("bytes_by_device", "terms_by_phase", "bottleneck_by_phase"),
    }
    assert document["alternatives"][0].keys() >= {
        *("name", "feasible", "ttft_s", "tpot_s", "e2e_s", "reason")
    }


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["colour"], "red", "unknown field `colour`"),
        (["placement", "prefill", "colour"], "red", "unknown field `colour`"),
        (["schema_version"], 2, "schema_version is 2, this is 1"),
        (["feasible"], "yes", r"Expected `bool`, got `str` - at `\$.feasible`"),
        (["model"], None, r"\$.model"),
        (["objective"], "fast", r"\$.objective"),
        (["workload", "num_seqs"], 0, "num_seqs is 0 but must be at least 1"),
        (["placement", "decode", "head"], {"lives": "gpu", "runs": "cpu"}, "cannot run as cpu"),
        (["placement", "decode", "phase"], "prefill", "one for prefill and one for decode"),
        (["placement", "decode", "layers"], [], "the decode tier 0"),
        (["placement", "prefill", "max_num_tokens"], 0, "max_num_tokens"),
        (["optimality_gap"], 1.5, r"<= 1.0 - at `\$.optimality_gap`"),
        (["estimate", "ttft_s"], -1.0, r">= 0.0 - at `\$.estimate.ttft_s`"),
        (["estimate", "bytes_by_device", "gpu"], -1, r"at `\$.estimate.bytes_by_device.gpu`"),
        (["estimate", "num_concurrent_seqs"], 2, r"is 2 but `\$.workload.num_seqs` is 1, and"),
        (["placement", "decode", "strategy"], "magic", "'magic' is not one of gpu, cpu, off"),
    ],
)
def test_a_plan_that_is_not_one_is_refused_by_name(
    path: list[str], value: Any, complaint: str
) -> None:
    document = json.loads(PLAN.to_json())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value

    with pytest.raises(PlanError, match=rf"p\.json is not a plan: .*{complaint}"):
        Plan.from_json(json.dumps(document).encode(), source="p.json")


@pytest.mark.parametrize("key", ["model", "placement", "estimate", "alternatives"])
def test_a_plan_with_a_missing_key_is_refused_by_name(key: str) -> None:
    document = json.loads(PLAN.to_json())
    del document[key]

    with pytest.raises(PlanError, match=f"missing required field `{key}`"):
        Plan.from_json(json.dumps(document).encode(), source="p.json")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(PlanError, match=r"p\.json is not a plan"):
        Plan.from_json(text, source="p.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cannot read the plan .*none\.json: No such file"):
        Plan.load(tmp_path / "none.json")

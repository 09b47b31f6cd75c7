"""Plan files that were edited by hand: refused by file and field, or run as they say."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from hetero.errors import MemoryBudgetError, UsageError
from hetero.model_lookup import find_model, read_model_spec
from planner.errors import PlanError
from planner.memory import needs
from planner.placement import ON_CPU, ON_GPU, STREAMED, LayerPlacement, ModulePlacement
from planner.plan import Plan, Trial, TrialRow, TrialTimes
from planner.search import search
from planner.workload import Workload
from tests.machines import toy_machine

# Keys from the document's root to a field of it.
Field = tuple[str | int, ...]

SPEC = read_model_spec(find_model(None))
MACHINE = toy_machine().with_emulated_gpu(memory_bytes=60_000_000, link_bytes_per_s=2e9)


def _plan() -> Plan:
    """A plan of every kind of layer: residents of split, streamed and CPU experts, an order.

    And in decode a cache on the CPU, and one whose first tokens are on the GPU.
    """
    plan = search(SPEC, MACHINE, Workload(prompt_len=20, output_len=12, num_seqs=2))
    places = (
        *(ModulePlacement(lives="cpu", runs=runs, num_resident=4) for runs in ("split", "cpu")),
        *(ModulePlacement(lives="cpu", runs="stream", num_resident=2), STREAMED, ON_CPU, ON_GPU),
    )
    layers = tuple(
        LayerPlacement(
            attention=ON_GPU if index != 4 else ON_CPU,
            router=ON_GPU if index != 4 else ON_CPU,
            ffn=place,
        )
        for index, place in enumerate(places)
    )
    tiers = {
        phase: replace(
            plan.placement.tier(phase),
            strategy="mixed",
            cut=0,
            embedding=ON_GPU,
            head=ON_GPU,
            layers=layers,
            num_expert_slots=4,
        )
        for phase in ("prefill", "decode")
    }
    decode = tiers["decode"]
    on_cpu = [replace(layer, kv_on_cpu=True) for layer in decode.layers[2:4]]
    on_cpu[1] = replace(on_cpu[1], num_gpu_kv_tokens=16)
    layers = (*decode.layers[:2], *on_cpu, *decode.layers[4:])
    tiers["decode"] = replace(decode, layers=layers)
    order = tuple(tuple(reversed(range(layer.num_experts))) for layer in SPEC.layers)
    times = TrialTimes(ttft_s=1.0, tpot_s=0.5, e2e_s=2.0)
    tried = TrialRow(
        name="mixed", cut_by_phase={"prefill": 0, "decode": 0}, predicted=times, measured=times
    )
    return replace(
        plan,
        placement=replace(plan.placement, **tiers, expert_order=order),
        alternatives=plan.alternatives[:1],
        trial=Trial(workload=plan.workload, rows=(tried,), kept="mixed"),
    )


PLAN = _plan()
DOCUMENT = json.loads(PLAN.to_json())


def paths(value: Any, path: Field = ()) -> Iterator[Field]:
    """Every field of a document, and every item of its lists; of numbers the first."""
    yield path
    if isinstance(value, dict):
        for key, member in value.items():
            yield from paths(member, (*path, key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value[:1] if isinstance(value[0], int | float) else value):
            yield from paths(item, (*path, index))


def at(document: Any, path: Field) -> Any:
    for key in path:
        document = document[key]
    return document


def text(path: Field) -> str:
    """A path as errors write it."""
    return "$" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def edits(path: Field) -> Iterator[tuple[str, Any]]:
    """What was done to the field at a path, and the document with it."""

    def edited(value: Any) -> Any:
        document = copy.deepcopy(DOCUMENT)
        if not path:
            return value
        at(document, path[:-1])[path[-1]] = value
        return document

    old = at(DOCUMENT, path)
    values: list[Any] = [None, True, False, "frobnicate", "gpu", "cpu", "", [], {}, -1, 0, 1, 2]
    values += [15, 16, 10**9, 10**17, 10**30, 1.5, -0.5, 1e-300, 1e300, [old], {"a": old}]
    if isinstance(old, list):
        values += [old[:-1], old + old, old[::-1], old[:1]]
    if isinstance(old, dict):
        values += [{**old, "extra": 1}]
        values += [{key: old[key] for key in old if key != gone} for gone in old]
    for value in values:
        if value != old or type(value) is not type(old):
            yield repr(value)[:60], edited(value)
    if path and isinstance(path[-1], str):
        document = copy.deepcopy(DOCUMENT)
        del at(document, path[:-1])[path[-1]]
        yield "gone", document


class LoadedError(Exception):
    """Everything was checked, and weights would be read now."""


def as_loaded(file: Path, document: Any, monkeypatch: pytest.MonkeyPatch) -> Plan | str:
    """The plan of a file as it comes to be loaded, or why it does not."""
    plans = []

    def load(plan: Plan, *_: object, **__: object) -> None:
        plans.append(plan)
        raise LoadedError

    monkeypatch.setattr("hetero.api.load_engine", load)
    file.write_text(json.dumps(document))
    try:
        LLM(profile=toy_machine(), plan=file)
    except (PlanError, UsageError, MemoryBudgetError) as error:  # exit codes 2 and 4
        return str(error)
    except LoadedError:
        return plans[0]
    raise AssertionError


def names(error: str, path: Field) -> bool:
    """Does an error name the field, what holds it, or something in it?"""
    named = re.findall(r"`(\$[^`]*)`", error)
    whole = re.search(r"(?:missing required|unknown) field `(\w+)`", error)
    if whole is not None and len(named) == 0:  # msgspec names no path where that is the root
        named = [f"$.{whole[1]}"]
    return not path or any(
        text(path).startswith(each) or each.startswith(text(path)) for each in named
    )


@pytest.mark.parametrize("path", list(paths(DOCUMENT)), ids=text)
def test_an_edited_field_is_refused_by_name_or_the_plan_fits(
    path: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken is what the file says, and within both memories."""
    file = tmp_path / "plan.json"
    for edit, document in edits(path):
        found = as_loaded(file, document, monkeypatch)
        if isinstance(found, str):
            assert str(file) in found, edit
            assert names(found, path), (edit, found)
            continue
        assert found == Plan.load(file)
        assert all(
            need.fits for need in needs(SPEC, found.placement, found.wave, MACHINE).values()
        ), edit


TIER = ("placement", "decode")


def _slots(document: Any) -> Any:
    """The plan's split layer with slots that change, and another after it that copies ahead."""
    document = copy.deepcopy(document)
    ahead = {"lives": "cpu", "runs": "split", "num_resident": 4, "slots": "lru", "prefetch": True}
    for tier in ("prefill", "decode"):
        layers = document["placement"][tier]["layers"]
        layers[0]["ffn"]["slots"] = "lru"
        layers[1]["ffn"] = dict(ahead)
    return document


WITH_SLOTS = _slots(DOCUMENT)
AHEAD: Field = ("placement", "decode", "layers", 1, "ffn")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*AHEAD, "slots"), "lfu", "Invalid enum value 'lfu'"),
        ((*AHEAD, "slots"), "static", "4 slots that change in one tier, but slots is static in"),
        ((*AHEAD, "num_resident"), 3, "4 slots that change in one tier, but num_resident is 3 in"),
        ((*AHEAD, "num_resident"), 0, "num_resident, the number of slots, is 0; it must be 1"),
        ((*AHEAD, "prefetch"), 1, "Expected `bool`, got `int`"),
        ((*AHEAD, "runs"), "cpu", "prefetch is true, but only experts that run split fetch any"),
        ((*AHEAD[:-1], "router", "lives"), "cpu", "a module that lives on cpu cannot run as gpu"),
        (
            (*AHEAD[:-1], "router"),
            {"lives": "cpu", "runs": "stream"},
            "prefetch is true, which needs the router's weights on the gpu",
        ),
        (
            (*AHEAD[:-2], 0, "ffn", "prefetch"),
            True,
            "layer 0 has prefetch, but no layer before it to guess in",
        ),
        ((*TIER, "num_expert_slots"), 1, "num_expert_slots is 1, but layers that run split need 2"),
    ],
)
def test_an_edited_plan_with_slots_that_change_is_refused_with_the_reason(
    path: Field, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = copy.deepcopy(WITH_SLOTS)
    at(document, path[:-1])[path[-1]] = value
    assert message in str(as_loaded(tmp_path / "plan.json", document, monkeypatch))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), None),
        ((*AHEAD, "prefetch"), False),
        ((*TIER, "num_expert_slots"), 2),
        ((*TIER, "num_expert_slots"), 16),
        (("placement", "prefill", "layers", 1, "ffn"), {"lives": "cpu", "runs": "stream"}),
    ],
)
def test_an_edited_plan_with_slots_that_change_runs(
    path: Field, value: Any, expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """Within the accelerator's budget, and with the tokens of all-CPU."""
    document = copy.deepcopy(WITH_SLOTS)
    if path:
        at(document, path[:-1])[path[-1]] = value
    assert_runs(tmp_path / "plan.json", document, expected)


PROMPTS: Any = [{"prompt_token_ids": list(range(first, first + 20))} for first in (5, 50)]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    with LLM(profile=toy_machine(), accelerator="none") as llm:
        return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), DOCUMENT),
        ((*TIER, "num_expert_slots"), 2),
        ((*TIER, "num_expert_slots"), 16),
        ((*TIER, "layers"), DOCUMENT["placement"]["decode"]["layers"][::-1]),
        ((*TIER, "layers", 0, "ffn", "runs"), "cpu"),
        ((*TIER, "layers", 0, "ffn", "num_resident"), 15),
        ((*TIER, "layers", 2, "ffn", "num_resident"), 15),
        ((*TIER, "layers", 5, "ffn"), {"lives": "cpu", "runs": "stream"}),
        (("placement", "expert_order"), []),
        (("resources", "cpu_bytes"), None),
        (("workload", "prompt_len"), 1),
        (("workload", "output_len"), 1),
        (("placement", "prefill", "max_num_tokens"), 10**17),
        (("placement", "prefill", "max_num_tokens"), 8),
    ],
    ids=lambda value: text(value) if isinstance(value, tuple) else "",
)
def test_an_edited_plan_that_fits_runs(
    path: Field, value: Any, expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """Within the accelerator's budget, and with the tokens of all-CPU."""
    document = copy.deepcopy(DOCUMENT)
    if path:
        at(document, path[:-1])[path[-1]] = value
    assert_runs(tmp_path / "plan.json", document, expected)


def assert_runs(file: Path, document: Any, expected: list[tuple[int, ...]]) -> None:
    file.write_text(json.dumps(document))
    with LLM(profile=toy_machine(), plan=file) as llm:
        need = needs(SPEC, llm.plan.placement, llm.plan.wave, llm.hardware)["gpu"]
        assert llm.device_bytes()["gpu"] <= need.available_bytes
        outputs = llm.generate(PROMPTS, GREEDY)
    assert [out.outputs[0].token_ids for out in outputs] == expected


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("workload", "prompt_len"), 2000, "come to 2012 tokens but demo has a context of 1024"),
        (("workload", "num_seqs"), 3, "is 2 but `$.workload.num_seqs` is 3"),
        (("placement", "decode", "strategy"), "gpu", "not where gpu with cut 0 has everything"),
        (("placement", "decode", "strategy"), "magic", "'magic' is not one of gpu, cpu"),
        (("placement", "decode", "cut"), 3, "`$.placement.decode.strategy` is mixed, which has 0"),
        (("resources", "gpu_bytes"), 9 * 10**9, "is 9 GB but toy machine has 8 GB"),
        (("resources", "cpu_bytes"), 8 * 10**9, "leaves 7.94 GB of the 8 GB of toy machine"),
        (("resources", "gpu_bytes"), 0, "is 0 but `$.resources.accelerator` is emulated"),
        (("resources", "link_bytes_per_s"), 0, "is 0 GB/s but must be 0.001 GB/s to"),
        (("resources", "accelerator"), "none", "is 0.06 GB but `$.resources.accelerator` is none"),
        (("resources", "gpu_bytes"), 10**6, "may be used; "),
    ],
)
def test_an_edited_plan_is_refused_with_both_values(
    path: Field, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = copy.deepcopy(DOCUMENT)
    at(document, path[:-1])[path[-1]] = value
    assert message in str(as_loaded(tmp_path / "plan.json", document, monkeypatch))


def test_a_plan_for_the_cpu_with_a_module_on_the_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = search(SPEC, toy_machine(), Workload(prompt_len=8, output_len=4))
    document = json.loads(made.to_json())
    for tier in ("prefill", "decode"):
        document["placement"][tier]["strategy"] = "mixed"
    document["placement"]["decode"]["layers"][3]["router"] = {"lives": "gpu", "runs": "gpu"}
    error = str(as_loaded(tmp_path / "plan.json", document, monkeypatch))
    assert "uses the gpu but toy machine is used without one" in error
    assert "`$.placement.decode.layers[3].router`" in error

"""bench_overlap.py and bench_hybrid.py on tiny models: promised keys, sums that add up, order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench import bench_hybrid, bench_overlap
from bench.bench_hybrid import SCALES, SHARES, Bench, tasks
from bench.bench_overlap import ALONE, CASES, MODEL, compared
from bench.hybrid_case import ACCELERATE, CHOSEN, ROW_KEYS, STRATEGIES, lane_rates, measure
from bench.make_model import make_model
from bench.measured_steps import MeasuredStep, names_only
from planner import strategies
from planner.cost_model import CostModel
from planner.model_spec import ModelSpec
from planner.simulate import simulate
from planner.step_graph import build
from planner.timeline import Span, Timeline
from planner.workload import decode_shape
from tests.machines import toy_machine

SMALL = {
    **MODEL,
    "num_hidden_layers": 4,
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
}
SPEC = ModelSpec.from_config(SMALL, name="small")


@pytest.fixture(scope="module")
def overlap(tmp_path_factory: pytest.TempPathFactory) -> bench_overlap.Bench:
    folder = tmp_path_factory.mktemp("overlap")
    make_model(folder / "model", SMALL)
    return bench_overlap.Bench(
        model=folder / "model",
        profile=toy_machine(),
        repetitions=1,
        prompt_tokens=8,
        output_len=3,
        batches=(1, 2),
    )


def steps(op_s: float, *, at_once: bool) -> list[MeasuredStep]:
    """A step of `offload` whose ops take the same seconds each, at once or one after the other."""
    graph = build(SPEC, strategies.offload(SPEC, "decode", 4))
    if at_once:
        timeline = simulate(graph, lambda op: op_s)
    else:
        timeline = Timeline(
            spans=tuple(
                Span(op=op, start_s=op.index * op_s, end_s=(op.index + 1) * op_s)
                for op in graph.ops
            )
        )
    return [
        MeasuredStep(graph=graph, shape=decode_shape(1, 8), timeline=timeline, wall_s=1.0)
        for _ in range(3)
    ]


def costs() -> CostModel:
    hardware = toy_machine(2).with_emulated_gpu(memory_bytes=10**9, link_bytes_per_s=1e9)
    return CostModel(hardware)


def test_a_step_without_gaps_leaves_nothing_to_the_executor() -> None:
    """Op seconds of the step itself, simulated, give its makespan."""
    row = compared(steps(0.01, at_once=True), steps(0.01, at_once=False), SPEC, costs(), {})
    num_ops = len(build(SPEC, strategies.offload(SPEC, "decode", 4)).ops)

    assert row["executor_share"] == pytest.approx(0.0)
    assert row["executor_share_in_turn"] == pytest.approx(0.0)
    assert row["in_turn_s"] == pytest.approx(0.01 * num_ops)
    assert row["overlap_s"] < row["in_turn_s"]
    assert row["measured_ratio"] == pytest.approx(row["replayed_ratio_undisturbed"])


def test_what_lanes_cost_each_other_is_told_by_lane() -> None:
    """Ops that take twice as long at once."""
    row = compared(steps(0.02, at_once=True), steps(0.01, at_once=False), SPEC, costs(), {})

    assert row["slowdowns"] == {lane: pytest.approx(2.0) for lane in ("gpu", "cpu", "h2d", "d2h")}


def test_the_rate_of_a_lane_is_its_weights_over_their_seconds() -> None:
    """Every layer is streamed by three copies of a hundredth of a second."""
    found = lane_rates(steps(0.01, at_once=True), SPEC, costs())["decode"]
    streamed = sum(
        SPEC.weight_bytes(module, index)
        for index, layer in enumerate(SPEC.layers)
        for module in layer.modules
    )

    assert found["h2d"] == pytest.approx(streamed / (4 * 3 * 0.01))


@pytest.mark.parametrize("name", ["cpu-one-core", "experts-split", "sub-batches"])
def test_overlap_tells_of_every_phase_and_batch(name: str, overlap: bench_overlap.Bench) -> None:
    """With the keys that its docstring speaks of; both ways give the same tokens."""
    if name in ALONE:
        rows = bench_overlap.alone_rows(overlap, name)
    else:
        rows = bench_overlap.rows_of(overlap, name, CASES[name])
    batches = (2,) if name == "sub-batches" else (1, 2)

    assert [(row["batch"], row["phase"]) for row in rows] == [
        (batch, phase) for batch in batches for phase in ("prefill", "decode")
    ]
    for row in rows:
        assert row["overlap_s"] > 0
        assert row["predicted_s"] > 0
        if name not in ALONE:
            assert row["tokens_equal"]
            assert {"in_turn_s", "measured_ratio", "predicted_ratio", "replayed_ratio"} <= {*row}


def test_overlap_finds_tokens_equal_to_those_of_the_cpu(overlap: bench_overlap.Bench) -> None:
    assert bench_overlap.equals_cpu(overlap, CASES["experts-beside"])


def hybrid(folder: Path, minutes: float) -> Bench:
    file = folder / "profile.json"
    file.write_bytes(toy_machine().to_json())
    return Bench(
        accelerator="emulated",
        scale=SCALES["tiny"],
        shares=SHARES,
        models=folder / "models",
        profile=file,
        cache=folder / "cache",
        repetitions=1,
        end_s=time.time() + 60 * minutes,
    )


def test_hybrid_gives_the_promised_keys_for_every_placement_and_workload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: what its child processes print."""
    monkeypatch.setattr("hetero.api.base_profile", lambda *args, **rest: toy_machine())
    bench = hybrid(tmp_path, minutes=5)
    task = tasks(bench)[0]
    make_model(Path(task.folder), bench.scale.models[task.model])
    rows: list[Any] = [row for row in measure(task) if "model" in row]

    assert {row["asked"] for row in rows} == {CHOSEN, ACCELERATE, *STRATEGIES}
    assert len(rows) == len(task.placements) * len(task.workloads)
    for row in rows:
        assert {*ROW_KEYS} <= {*row}
        assert row["chosen"] == (row["asked"] == CHOSEN)
        if "left_out" not in row:
            assert row["ttft_s"] > 0
            assert row["tpot_s"] > 0
            assert row["predicted_ttft_s"] > 0
            assert row["predicted_tpot_s"] > 0
            assert 0 <= row["overlap"] < 1
    measured = {row["asked"] for row in rows if "left_out" not in row}
    assert measured >= {CHOSEN, "offload", "experts-on-cpu", "split", "cpu"}


def test_hybrid_begins_nothing_that_it_has_no_time_for(tmp_path: Path) -> None:
    """And says what it left out."""
    bench = hybrid(tmp_path, minutes=0)
    task = tasks(bench)[0]
    make_model(Path(task.folder), bench.scale.models[task.model])
    rows: list[Any] = [row for row in measure(task) if "model" in row]

    assert all("left_out" in row for row in rows)
    assert any(row["left_out"] == "there is no time left" for row in rows)


def test_hybrid_asks_for_half_of_the_model_first_and_for_the_cpu_once(tmp_path: Path) -> None:
    """Accelerate only where the model is at least twice the budget."""
    found = tasks(hybrid(tmp_path, minutes=5))

    assert [task.budget_share for task in found] == [0.5, 0.25, 0.1, 0.75, 1.0]
    assert ["cpu" in task.placements for task in found] == [True, False, False, False, False]
    assert [ACCELERATE in task.placements for task in found] == [True, True, True, False, False]


def row(asked: str, e2e_s: float, **more: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "budget_share": 0.0 if asked == "cpu" else 0.5,
        "workload": "w",
        "placement": "mixed" if asked == CHOSEN else asked,
        "asked": asked,
        "chosen": asked == CHOSEN,
        "e2e_s": e2e_s,
        **more,
    }


def test_the_verdict_compares_the_chosen_plan_with_offload_and_the_fastest() -> None:
    """2 s against 9 s of offload, and 1 s of all-CPU; a link at 3 of 4 bytes a second."""
    rates = {"bytes_per_s": {"decode": {"h2d": 3.0}}, "ceiling_bytes_per_s": {"h2d": 4.0}}
    rows = [row(CHOSEN, 2.0), row("offload", 9.0, **rates), row("cpu", 1.0)]
    found = bench_hybrid.verdict(rows, has_rival_cpu=True)
    emulated = bench_hybrid.verdict(rows, has_rival_cpu=False)

    assert [each["ratio"] for each in found["over_offload"]] == [4.5]
    assert [each["share"] for each in found["link"]] == [0.75]
    assert [(each["fastest"], each["ratio"]) for each in found["choice"]] == [("cpu", 2.0)]
    assert [(each["fastest"], each["ratio"]) for each in emulated["choice"]] == [("mixed", 1.0)]


def test_commands_name_files_without_their_folders() -> None:
    argv = ["--models", "/a/b", "--output=/c/d.json", "--minutes", "3"]

    assert names_only(argv, ("--models", "--output")) == [
        "--models",
        "b",
        "--output=d.json",
        "--minutes",
        "3",
    ]

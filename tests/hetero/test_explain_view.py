"""Explanations as text: bars of lanes, in ASCII where the terminal has no more, and the tables."""

from __future__ import annotations

import dataclasses
from io import BytesIO, TextIOWrapper

import pytest
from rich.console import Console

from hetero.explain_view import (
    bar,
    lane_shares,
    nearest_text,
    print_explanation,
    print_lanes,
    print_rivals,
)
from hetero.model_lookup import find_model, read_model_spec
from planner.explain import GpuMemory, explain, step_timelines
from planner.nearest_fit import FittingChange
from planner.question import Question
from planner.rivals import RivalTimes
from planner.step_graph import Op
from planner.timeline import Span, Timeline
from planner.workload import Workload
from tests.machines import toy_machine

STEP = Timeline(
    spans=(
        Span(op=Op(index=0, kind="copy", lane="h2d", payload="batch"), start_s=0.0, end_s=1.0),
        Span(op=Op(index=1, kind="dense", lane="gpu", deps=(0,)), start_s=1.0, end_s=3.0),
        Span(op=Op(index=2, kind="dense", lane="gpu", deps=(1,)), start_s=3.0, end_s=3.5),
        Span(op=Op(index=3, kind="sample", lane="cpu", deps=(2,)), start_s=3.5, end_s=4.0),
    )
)


@pytest.fixture(scope="module")
def question() -> Question:
    hardware = toy_machine().with_emulated_gpu(memory_bytes=30_000_000, link_bytes_per_s=4e9)
    return Question(
        spec=read_model_spec(find_model()),
        hardware=hardware,
        workload=Workload(prompt_len=64, output_len=16),
        strategy="split",
    )


def console(encoding: str = "utf-8") -> Console:
    file = TextIOWrapper(BytesIO(), encoding=encoding)
    return Console(width=100, file=file, color_system=None, highlight=False)


def printed(of: Console) -> str:
    of.file.flush()
    assert isinstance(of.file, TextIOWrapper) and isinstance(of.file.buffer, BytesIO)
    return of.file.buffer.getvalue().decode(of.encoding)


def test_shares_are_of_each_part_of_a_step() -> None:
    """Four seconds in four parts, in two, and in eight; lanes without ops are left out."""
    assert lane_shares(STEP, 4) == {
        "gpu": [0.0, 1.0, 1.0, 0.5],
        "cpu": [0.0, 0.0, 0.0, 0.5],
        "h2d": [1.0, 0.0, 0.0, 0.0],
    }
    assert lane_shares(STEP, 2)["gpu"] == [0.5, 0.75]
    assert lane_shares(STEP, 8)["cpu"] == [0.0] * 7 + [1.0]
    assert lane_shares(Timeline(spans=()), 4) == {}


@pytest.mark.parametrize(
    ("is_ascii", "text"), [(True, " _-*#"), (False, " \u2581\u2583\u2586\u2588")]
)
def test_bars_rise_with_the_share(is_ascii: bool, text: str) -> None:
    assert bar([0.05, 0.07, 0.4, 0.75, 1.0], is_ascii) == text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_lanes_are_rows_in_what_the_terminal_can_show(encoding: str) -> None:
    screen = console(encoding)
    print_lanes(screen, {"prefill": STEP, "decode": STEP})
    rows = [line.split() for line in printed(screen).splitlines()]

    full = "#" if encoding == "ascii" else "\u2588"
    assert ["one", "prefill", "step", "4.00", "s", "busy"] in rows
    assert ["h2d", full * 15, "25%"] in rows
    # 2.5 s of 4 are 37.5 of 60 parts
    half = "=" if encoding == "ascii" else "\u2584"
    assert ["gpu", full * 37 + half, "62%"] in rows


def test_an_explanation_has_its_tables(question: Question) -> None:
    plan, screen = question.plan(), console()
    print_explanation(screen, plan, explain(plan, question), step_timelines(plan, question))
    text = printed(screen)

    assert "bound by" in text and "memory bandwidth" in text
    assert "runtime and margin" in text
    assert "10% more CPU bandwidth" in text and "1 GB more GPU memory" in text
    assert "what would fit" not in text


def test_what_is_lacking_is_no_negative_number(question: Question) -> None:
    plan, screen = question.plan(), console()
    memory = GpuMemory(
        bytes_by_use={"dense": 3_000_000_000, "free": -1_000_000_000},
        available_bytes=2_000_000_000,
        kept_back_bytes=100_000_000,
    )
    found = dataclasses.replace(explain(plan, question), gpu_memory=memory, gains=())
    print_explanation(screen, plan, found, step_timelines(plan, question))
    rows = [line.split() for line in printed(screen).splitlines()]

    assert ["lacking", "1.00", "GB", "50.0%"] in rows
    assert not any("free" in row for row in rows)


def change(options: str) -> FittingChange:
    return FittingChange(
        change="num_seqs",
        options=options,
        workload=Workload(),
        quantization=None,
        placement="cpu",
        ttft_s=0.5,
        tpot_s=0.1,
        e2e_s=13.2,
        decode_tokens_per_s=10.0,
    )


def test_what_would_fit_ends_an_error_line() -> None:
    assert nearest_text(()) is None
    assert nearest_text((change("--num-seqs 2"), change("--prompt-len 9"))) == (
        "the nearest that fits: --num-seqs 2 (10.0 tokens/s) or --prompt-len 9 (10.0 tokens/s)"
    )


def test_rivals_stand_beside_the_plan(question: Question) -> None:
    """With the ratio of their seconds, or why they have none."""
    plan, screen = question.plan(), console()
    rows = (
        RivalTimes(name="cpu", fits=True, ttft_s=1.0, tpot_s=0.5, e2e_s=8.5, ratio=1.7),
        RivalTimes(name="gpu", fits=False, reason="needs 2.00 GB on the gpu"),
    )
    print_rivals(screen, plan, rows)
    lines = [" ".join(line.split()) for line in printed(screen).splitlines()]

    assert "cpu 1.00 s 500 ms 8.50 s 1.70x" in lines
    assert "gpu - - - - needs 2.00 GB on the gpu" in lines
    assert any(line.startswith("hetero ") and line.endswith(" split") for line in lines)

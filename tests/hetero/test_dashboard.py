"""The live view: what the monitor counts, what a frame shows, and that neither can hurt the run."""

from __future__ import annotations

import json
from collections.abc import Sequence as Sequences
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, Group

from hetero import run_view
from hetero.api import GenerationStep
from hetero.dashboard import frame, plain_line, sparkline
from hetero.engine import StepResult
from hetero.model_lookup import find_model, read_model_spec
from hetero.planning import make_plan
from hetero.run_monitor import (
    REFRESH_S,
    DeviceUse,
    LaneUse,
    LastStep,
    PhaseSpeed,
    RunMonitor,
    Snapshot,
)
from hetero.run_view import LineView, LiveView, Progress, SilentView, json_line, make_view
from hetero.sampler import SamplingParams
from hetero.scheduler import Batch, ScheduledSequence
from hetero.sequence import Sequence
from planner.hardware import HardwareProfile
from planner.plan import Plan
from planner.step_graph import Op, StepGraph
from planner.timeline import Excess, Span, TermComparison, Timeline
from planner.workload import Phase, Workload
from tests.machines import toy_machine

FULL, HALF, BUBBLE = "\u2588", "\u2584", "\u00b7"
SNAPSHOT = Snapshot(
    title="demo as split",
    num_done=3,
    num_requests=12,
    num_prompt_tokens=4096,
    num_output_tokens=640,
    max_output_tokens=1280,
    at_s=20.0,
    eta_s=20.5,
    speeds={
        "prefill": PhaseSpeed(now=None, mean=1615.0),
        "decode": PhaseSpeed(now=48.2, mean=44.8),
    },
    decode_history=(10.0, 20.0, 40.0, 48.2),
    ttft_s=0.317,
    devices=(
        DeviceUse(
            name="cpu",
            used_bytes=9_000_000_000,
            planned_bytes=8_500_000_000,
            limit_bytes=25_000_000_000,
            busy_share=0.97,
        ),
        DeviceUse(
            name="gpu (emulated)",
            used_bytes=None,
            planned_bytes=7_330_000_000,
            limit_bytes=7_680_000_000,
        ),
    ),
    last_step=LastStep(
        phase="decode",
        predicted_s=0.020,
        measured_s=0.026,
        terms=(
            TermComparison(term="attention", predicted_s=0.010, measured_s=0.010),
            TermComparison(term="experts", predicted_s=0.010, measured_s=0.016),
        ),
        lanes=(
            LaneUse(
                lane="gpu",
                predicted_share=0.7,
                busy_share=0.5,
                idle_s=0.0123,
                shares=(0.0,) * 3 + (1.0,) * 6 + (0.0,) * 10 + (0.5,) * 4 + (0.0,),
            ),
            LaneUse(
                lane="cpu", predicted_share=0.9, busy_share=1.0, idle_s=0.0, shares=(1.0,) * 24
            ),
        ),
        predicted_overlap=0.25,
        overlap=0.33,
        excess=Excess(lane="cpu", term="experts", seconds=0.006),
    ),
    text="Once upon a time there was a [bold]king[/bold] \x1b[31m. " * 40,
)


# Work, ten cells of a bubble, work at half the time.
GPU_ROW = f"gpu      {6 * FULL}{10 * BUBBLE}{4 * HALF}    50%   70%   12.3 ms"


def drawn(snapshot: Snapshot, width: int, height: int, *, is_ascii: bool = False) -> list[str]:
    out = Console(width=width, file=StringIO(), color_system=None)
    view = frame(snapshot, 20.0, width=width, height=height, is_ascii=is_ascii)
    lines = out.render_lines(Group(view), out.options, pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.mark.parametrize(
    ("width", "height", "panels"),
    [
        (200, 50, {"job", "speed", "devices", "plan and reality", "last step", "text"}),
        (120, 36, {"job", "speed", "devices", "plan and reality", "last step", "text"}),
        (119, 36, {"job", "speed", "devices", "plan and reality", "last step", "text"}),
        (80, 30, {"job", "speed", "devices", "plan and reality", "last step", "text"}),
        (80, 24, {"job", "speed", "devices", "plan and reality", "text"}),
        (79, 24, set()),
        (60, 50, set()),
    ],
)
@pytest.mark.parametrize("is_ascii", [False, True])
def test_frame_has_the_panels_for_its_size(
    width: int, height: int, panels: set[str], is_ascii: bool
) -> None:
    """It never is larger than the terminal."""
    lines = drawn(SNAPSHOT, width, height, is_ascii=is_ascii)
    text = "\n".join(lines)
    begin = "+- " if is_ascii else "\u256d\u2500 "
    found = {
        name
        for name in ("job", "speed", "devices", "plan and reality", "last step", "text")
        if f"{begin}{name} " in text
    }
    assert found == panels
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    assert "\x1b" not in text
    assert not is_ascii or text.isascii()


def test_full_frame_shows_the_numbers() -> None:
    text = "\n".join(drawn(SNAPSHOT, 120, 36))
    for words in (
        "demo as split",
        "3/12 done",
        "4096 in, 640 out",
        "20.0 s, 20.5 s left",
        "48.2 tokens/s (mean 44.8)",
        "mean 1615 tokens/s",
        "317 ms",
        "97% busy, 9.00 GB/25.0 GB, plan 8.50 GB",
        "gpu (emulated)  plan 7.33 GB of 7.68 GB",
        "1.60x",
        "1.30x",
        "26.0 ms                   busy  plan   bubbles",
        GPU_ROW,
        +10 * "\u00b7" + 4 * "\u2584" + "    50%   70%   12.3 ms",
        "overlap 33% of the work, plan 25%",
        "most of it: cpu experts +6.00 ms",
        "[bold]king[/bold]",
    ):
        assert words in text, words


def test_lanes_are_drawn_in_ascii_too() -> None:
    text = "\n".join(drawn(SNAPSHOT, 120, 36, is_ascii=True))
    assert "gpu      ######::::::::::====    50%" in text


def test_a_small_terminal_without_text_has_room_for_the_lanes() -> None:
    """Where one grows its end comes first."""
    assert "last step" in "\n".join(drawn(replace(SNAPSHOT, text=""), 80, 24))
    assert "last step" not in "\n".join(drawn(SNAPSHOT, 80, 24))


@pytest.mark.parametrize(("measured_s", "words"), [(0.0249, False), (0.0251, True), (0.031, True)])
def test_a_step_is_explained_from_a_quarter_more_than_predicted(
    measured_s: float, words: bool
) -> None:
    """Of 20 ms; in both sizes."""
    assert SNAPSHOT.last_step is not None
    last = replace(SNAPSHOT.last_step, measured_s=measured_s)
    for size in ((120, 36), (80, 24)):
        text = "\n".join(drawn(replace(SNAPSHOT, last_step=last), *size))
        assert ("most of it: cpu experts +6.00 ms" in text) is words


def test_a_wait_is_of_no_lane() -> None:
    assert SNAPSHOT.last_step is not None
    waited = Excess(lane=None, term="wait", seconds=0.002)
    snapshot = replace(SNAPSHOT, last_step=replace(SNAPSHOT.last_step, excess=waited))
    assert "most of it: wait +2.00 ms" in "\n".join(drawn(snapshot, 120, 36))


def test_a_small_terminal_gets_one_line() -> None:
    (line,) = drawn(SNAPSHOT, 60, 10)
    assert line.startswith("3/12 done, 44.8 tokens/s, 4096 tokens in, 640 out, 20.0 s")


def test_a_run_that_has_not_begun_can_be_drawn() -> None:
    """Nothing is known before the first step."""
    empty = Job().monitor.snapshot
    for size in ((120, 36), (80, 24), (60, 10)):
        assert drawn(empty, *size)


def test_the_newest_event_is_in_the_first_line() -> None:
    snapshot = replace(SNAPSHOT, events=("an older one", "memory ran out"))
    first = drawn(snapshot, 200, 50)[0]
    assert first.rstrip().endswith("; memory ran out")
    assert "an older one" not in first


def test_text_panel_shows_the_end() -> None:
    long = replace(SNAPSHOT, text="first\n" + "middle\n" * 500 + "the very last words")
    text = "\n".join(drawn(long, 120, 36))
    assert "the very last words" in text
    assert "first " not in text


@pytest.mark.parametrize(
    ("values", "line"),
    [((), ""), ((0.0, 0.0), ""), ((1, 2, 4), ".=#"), ((8, 1), "#_")],
)
def test_sparkline_rises_with_the_values(values: Sequences[float], line: str) -> None:
    assert sparkline(values, is_ascii=True) == line
    assert len(sparkline(values)) == len(line)


def test_plain_line_says_what_was_predicted() -> None:
    assert plain_line(SNAPSHOT, 20.0) == (
        "3/12 done, 44.8 tokens/s, 4096 tokens in, 640 out, 20.0 s, 20.5 s left, "
        "last decode step 26.0 ms, predicted 20.0 ms"
    )


def test_json_line_has_its_keys() -> None:
    document = json.loads(json_line(SNAPSHOT, 20.0))
    assert set(document) == {
        *("event", "elapsed_s", "eta_s", "num_done", "num_requests", "num_prompt_tokens"),
        *("num_output_tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s"),
        "last_step",
    }
    assert document["last_step"] == {"phase": "decode", "predicted_s": 0.02, "measured_s": 0.026}


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Job:
    """A run of one sequence, step by step, without a model."""

    def __init__(
        self, num_output_tokens: int = 8, max_output_lens: tuple[int, ...] | None = None
    ) -> None:
        self.is_cut = False
        hardware: HardwareProfile = toy_machine()
        spec = read_model_spec(find_model())
        plan: Plan = make_plan(spec, hardware, Workload(prompt_len=5, output_len=8))
        self.clock = Clock()
        self.num_predictions = 0
        params = SamplingParams(max_tokens=num_output_tokens)
        self.sequence = Sequence(
            seq_id="1", prompt_token_ids=[1, 2, 3, 4, 5], params=params, arrival_s=self.clock.now_s
        )
        self.monitor = RunMonitor(
            plan=plan,
            hardware=hardware,
            max_output_lens=max_output_lens or (num_output_tokens,),
            predict=self.predict,
            clock=self.clock,
        )

    def predict(self) -> Timeline:
        self.num_predictions += 1
        return _timeline(0.010)

    def step(self, phase: Phase, seconds: float) -> None:
        """Take `seconds` for a step that gives one token."""
        sequence = self.sequence
        num_tokens = len(sequence.prompt_token_ids) if phase == "prefill" else 1
        item = ScheduledSequence(
            sequence=sequence,
            phase=phase,
            num_tokens=num_tokens,
            num_past_tokens=sequence.num_tokens - num_tokens,
            has_logits=True,
        )
        self.clock.now_s += seconds
        sequence.append(7, self.clock.now_s)
        is_last = self.is_cut or sequence.num_output_tokens == sequence.params.max_tokens
        if is_last:
            sequence.status = "finished"
        self.monitor.observe(
            GenerationStep(
                result=StepResult(
                    batch=Batch(phase=phase, items=(item,)),
                    graph=StepGraph(phase=phase, ops=()),
                    timeline=_timeline(seconds),
                    finished=(sequence,) if is_last else (),
                    seconds=seconds,
                    is_beside=False,
                ),
                text=lambda position: "so far",
                finished=(0,) if is_last else (),
                num_finished=int(is_last),
                num_requests=1,
            )
        )


def _timeline(seconds: float) -> Timeline:
    op = Op(index=0, kind="attention", lane="cpu", layer=0)
    return Timeline(spans=(Span(op=op, start_s=0.0, end_s=seconds),))


def test_monitor_counts_tokens_and_times() -> None:
    """Prefill of 5 tokens in 0.5 s, then a token in 0.25 s: 10 and 4 tokens/s."""
    job = Job()
    job.step("prefill", 0.5)
    job.step("decode", 0.25)
    found = job.monitor.snapshot
    assert (found.num_prompt_tokens, found.num_output_tokens) == (5, 2)
    assert found.ttft_s == 0.5
    assert found.speeds["prefill"].mean == 10.0
    assert found.speeds["decode"] == PhaseSpeed(now=4.0, mean=4.0)
    # one token took 0.25 s since the first, 6 of 8 are left
    assert found.eta_s == 1.5
    assert found.text == "so far"
    last = found.last_step
    assert last is not None
    assert (last.phase, last.predicted_s, last.measured_s) == ("decode", 0.010, 0.25)
    (lane,) = last.lanes
    assert (lane.lane, lane.predicted_share, lane.busy_share, lane.idle_s) == ("cpu", 1.0, 1.0, 0.0)
    assert lane.shares == pytest.approx([1.0] * 24)
    assert last.excess == Excess(lane="cpu", term="attention", seconds=0.24)


def test_monitor_takes_snapshots_at_its_own_pace() -> None:
    """The predicted Timeline is made for a snapshot, not for each step; the last step has one."""
    job = Job(num_output_tokens=41)
    job.step("prefill", 0.01)
    for _ in range(40):
        job.step("decode", REFRESH_S / 10)
    assert job.num_predictions in (5, 6)
    assert job.monitor.snapshot.num_done == 1
    assert job.monitor.snapshot.num_output_tokens == 41


def test_snapshots_slow_down_when_they_cost() -> None:
    """Predictions of 0.1 s: one at once, the next when 1% of the run is half of one (5 s)."""
    job = Job(num_output_tokens=100)

    def slow() -> Timeline:
        job.num_predictions += 1
        job.clock.now_s += 0.1
        return _timeline(0.010)

    job.monitor._predict = slow
    for _ in range(20):
        job.step("decode", 0.4)
    assert job.num_predictions == 2


def test_an_early_end_shortens_what_is_left() -> None:
    """Of two requests of 8 tokens one ends after 2: 8 are left, at 0.5 s each."""
    job = Job(max_output_lens=(8, 8))
    job.step("prefill", 0.5)
    job.sequence.params = SamplingParams(max_tokens=2)
    job.step("decode", 0.5)
    assert job.monitor.snapshot.eta_s == 4.0


def test_a_request_that_ends_at_the_context_leaves_nothing() -> None:
    """Its room was less than max_tokens, and what was never possible is not waited for."""
    job = Job(num_output_tokens=100, max_output_lens=(2, 3))
    job.step("prefill", 0.5)
    job.is_cut = True
    job.step("decode", 0.5)
    assert job.monitor.snapshot.max_output_tokens == 5
    assert job.monitor.snapshot.eta_s == 1.5


def terminal(width: int = 120, height: int = 40) -> Console:
    return Console(
        width=width, height=height, file=StringIO(), force_terminal=True, color_system=None
    )


def written(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("progress", "is_terminal", "kind"),
    [
        ("auto", True, LiveView),
        ("auto", False, LineView),
        ("rich", True, LiveView),
        ("rich", False, LineView),
        ("plain", True, LineView),
        ("json", True, LineView),
        ("none", True, SilentView),
    ],
)
def test_view_follows_the_option_and_the_terminal(
    progress: Progress, is_terminal: bool, kind: type
) -> None:
    console = terminal() if is_terminal else Console(file=StringIO())
    view = make_view(progress, Job().monitor, console)
    assert type(view) is kind
    assert view.shows_text is (kind is LiveView)
    assert ("needs a terminal" in written(console)) is (progress == "rich" and not is_terminal)


def test_dashboard_draws_and_leaves_nothing_behind() -> None:
    """Transient: the terminal ends where it began, its cursor shown again."""
    job, console = Job(), terminal()
    with LiveView(job.monitor, console) as view:
        job.step("prefill", 0.5)
        view.after_step()
    text = written(console)
    assert "plan and reality" in text
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_failing_dashboard_becomes_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on, and is told of in lines."""

    def broken(*args: object, **sizes: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(run_view, "frame", broken)
    job, console = Job(), terminal()
    with LiveView(job.monitor, console) as view:
        job.step("prefill", 0.5)
        view.after_step()
        job.step("decode", 0.5)
        view.after_step()
    text = written(console)
    assert "warning: the dashboard failed (ZeroDivisionError: a bug); lines from here on" in text
    assert "0/1 done, 2.00 tokens/s, 5 tokens in, 2 out, 1.00 s" in text


@pytest.mark.parametrize("as_json", [False, True])
def test_lines_come_every_period_and_at_the_end(as_json: bool) -> None:
    """Steps of 1 s under a period of 2 s: after 2 s, after 4 s, and the end."""
    job, console = Job(num_output_tokens=5), Console(file=StringIO(), width=40)
    with LineView(job.monitor, console, period_s=2.0, as_json=as_json) as view:
        job.step("prefill", 1.0)
        view.after_step()
        for _ in range(4):
            job.step("decode", 1.0)
            view.after_step()
    lines = written(console).splitlines()
    assert len(lines) == 3
    if as_json:
        assert [json.loads(line)["elapsed_s"] for line in lines] == [2.0, 4.0, 5.0]
    else:
        assert lines[-1].startswith("1/1 done, 1.00 tokens/s, 5 tokens in, 5 out, 5.00 s")


def test_lines_wait_for_a_text_on_the_same_terminal() -> None:
    job, console = Job(), terminal()
    with make_view("plain", job.monitor, console, shares_terminal=True) as view:
        job.step("prefill", 60.0)
        view.after_step()
        assert written(console) == ""
    assert written(console).startswith("0/1 done")

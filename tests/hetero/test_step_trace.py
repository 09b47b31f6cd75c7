"""Traces of runs: which steps are kept, and that the file is there however the run ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hetero import LLM, SamplingParams
from hetero.engine import Engine, StepResult
from hetero.errors import EnvironmentProblemError, ExitCode, UsageError
from hetero.model_lookup import find_model, read_model_spec
from hetero.run_monitor import RunMonitor
from hetero.scheduler import Batch, ScheduledSequence
from hetero.sequence import Sequence
from hetero.step_trace import StepTrace
from planner.simulate import simulate
from planner.step_graph import StepGraph, build
from planner.strategies import placement
from planner.timeline import Timeline
from planner.workload import BatchShape
from tests.conftest import Hetero
from tests.machines import toy_machine
from tests.trace_format import of_kind, read_trace, rows

SPEC = read_model_spec(find_model())
GRAPH = build(SPEC, placement(SPEC, "split", 2).decode)
NUM_OPS = len(GRAPH.ops)
QUIET = ("--progress", "none")


def ran(graph: StepGraph = GRAPH) -> StepResult:
    """A step of a token, of which each op took a second."""
    sequence = Sequence(seq_id="1", prompt_token_ids=[1], params=SamplingParams())
    item = ScheduledSequence(
        sequence=sequence, phase="decode", num_tokens=1, num_past_tokens=5, has_logits=True
    )
    return StepResult(
        batch=Batch(phase="decode", items=(item,)),
        graph=graph,
        timeline=predict(graph),
        finished=(),
        seconds=1.0,
        is_beside=False,
    )


def predict(graph: StepGraph, shape: BatchShape | None = None) -> Timeline:
    return simulate(graph, lambda op: 1.0)


def numbers_in(trace: StepTrace) -> list[int]:
    """Numbers of the steps in the file."""
    trace._origin_s = 0.0  # as the steps above began
    assert trace.write(SPEC, predict)
    drawn = rows(read_trace(trace.path.read_bytes()))
    measured = [row for (side, name), row in drawn.items() if side == "measured" and "step" in name]
    return sorted(int(event["name"].split()[1]) for row in measured for event in row)


@pytest.mark.parametrize(
    ("num_steps", "kept", "summary"),
    [
        (1, [1], "1 step"),
        (5, [1, 2, 3, 4, 5], "all 5 steps"),
        (6, [1, 2, 3, 4, 5, 6], "all 6 steps"),
        (7, [1, 2, 3, 5, 6, 7], "the first 3 and the last 3 of 7 steps"),
        (90, [1, 2, 3, 88, 89, 90], "the first 3 and the last 3 of 90 steps"),
    ],
)
def test_the_first_and_the_last_steps_are_kept(
    tmp_path: Path, num_steps: int, kept: list[int], summary: str
) -> None:
    """Each half of the bound holds three steps and a bit."""
    trace = StepTrace(tmp_path / "trace.json", max_ops=2 * (3 * NUM_OPS + 1))
    for _ in range(num_steps):
        trace.watch(ran())
    assert numbers_in(trace) == kept
    assert trace.summary == summary


def test_a_step_of_more_ops_than_may_be_kept_is_kept_alone(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path / "trace.json", max_ops=2)
    for _ in range(3):
        trace.watch(ran())
    assert numbers_in(trace) == [3]


def test_steps_that_were_left_out_are_said_in_the_file(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path / "trace.json", max_ops=4 * NUM_OPS)
    for _ in range(10):
        trace.watch(ran())
    assert numbers_in(trace) == [1, 2, 9, 10]
    marks = of_kind(read_trace(trace.path.read_bytes()), "i")
    assert {mark["name"] for mark in marks} == {"6 steps left out"}


def test_what_ran_before_and_after_is_not_in_a_trace(tmp_path: Path) -> None:
    """Two calls in it, one before, one after; and without a step there is no file."""
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with LLM(profile=toy_machine(), accelerator="none") as llm:
        llm.generate("Once", params)
        with llm.trace(tmp_path / "trace.json"):
            llm.generate("Once", params)
            llm.generate("Once", params)
        llm.generate("Once", params)
        with llm.trace(tmp_path / "none.json"):
            pass
    drawn = rows(read_trace((tmp_path / "trace.json").read_bytes()))
    steps = [event["name"] for event in drawn["measured", "step"]]
    assert steps == ["prefill 1", "decode 2", "prefill 3", "decode 4"]
    assert not (tmp_path / "none.json").exists()


def test_a_trace_that_could_not_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with LLM(profile=toy_machine(), accelerator="none") as llm:
        for path, words in (
            (tmp_path / "nowhere" / "t.json", "does not exist"),
            (tmp_path, "is no plain file"),
            (tmp_path / "link", "is no plain file"),
        ):
            with pytest.raises(UsageError, match=words), llm.trace(path):
                raise AssertionError("it ran")
        twice = (llm.trace(tmp_path / "one.json"), llm.trace(tmp_path / "two.json"))
        with pytest.raises(UsageError, match="already"), twice[0], twice[1]:
            raise AssertionError("it ran")


@pytest.mark.parametrize("options", [(), ("--accelerator", "emulated", "--strategy", "split")])
def test_a_trace_has_every_step_of_the_run(
    hetero: Hetero, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """A prompt, and two more tokens; predicted and measured, the emulated ones called so."""
    file = tmp_path / "trace.json"
    outcome = hetero("run", "--max-tokens", "3", "--trace", file, *options)
    note = " (emulated)" if options else ""
    drawn = rows(read_trace(file.read_bytes()))
    assert {process for process, _ in drawn} == {f"predicted{note}", f"measured{note}"}
    steps = [event["name"] for event in drawn[f"measured{note}", "step"]]
    assert steps == ["prefill 1", "decode 2", "decode 3"]
    assert outcome.stderr.endswith(f"wrote {file}, all 3 steps; https://ui.perfetto.dev opens it\n")


def test_a_trace_of_rows_has_their_steps(hetero: Hetero, tmp_path: Path) -> None:
    """Both prompts are computed in the first of them."""
    rows_in, rows_out, file = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "trace.json"))
    rows_in.write_text('{"prompt": "One"}\n{"prompt": "Two and three"}\n')
    options = ("--max-tokens", "4", "--temperature", "0", "--trace", file, *QUIET)
    assert hetero("run", "--input", rows_in, "--output", rows_out, *options).code == 0
    drawn = rows(read_trace(file.read_bytes()))
    assert len(drawn["measured", "step"]) >= 4
    assert drawn["measured", "step"][0]["args"]["num_seqs"] == 2


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (ZeroDivisionError("a bug"), 1)]
)
def test_a_trace_is_written_when_the_run_ends_early(
    hetero: Hetero,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    """What stopped it is still what the command ends with."""
    file, step = tmp_path / "trace.json", Engine.step
    left = [5]  # two of the warm-up, one that ends it, and two of the run

    def fails(engine: Engine) -> Any:
        if left[0] == 0:
            raise error
        left[0] -= 1
        return step(engine)

    monkeypatch.setattr(Engine, "step", fails)
    outcome = hetero("run", "--max-tokens", "30", "--trace", file)
    drawn = rows(read_trace(file.read_bytes()))
    assert [event["name"] for event in drawn["measured", "step"]] == ["prefill 1", "decode 2"]
    assert outcome.code == code
    assert f"wrote {file}, all 2 steps" in outcome.stderr


def test_a_trace_that_cannot_be_written_does_not_hide_what_went_wrong(
    hetero: Hetero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is there by then; alone it is an error of the environment."""

    def full(*args: object, **options: object) -> None:
        raise EnvironmentProblemError("cannot write trace.json: the disk is full")

    monkeypatch.setattr("hetero.step_trace.write_atomically", full)
    alone = hetero("run", "--max-tokens", "2", "--trace", tmp_path / "trace.json")
    assert alone.code == ExitCode.ENVIRONMENT
    assert alone.stderr.endswith("error: cannot write trace.json: the disk is full\n")

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunMonitor, "observe", stopped)
    both = hetero("run", "--max-tokens", "2", "--trace", tmp_path / "trace.json")
    assert both.code == ExitCode.INTERRUPTED
    assert "warning: cannot write trace.json: the disk is full" in both.stderr

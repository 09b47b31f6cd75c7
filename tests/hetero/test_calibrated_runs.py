"""Runs teach predictions: what is written after a run, and what plan and run make of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from hetero.errors import ExitCode
from hetero.measure.calibration_log import (
    LOG_FILE,
    CalibrationLog,
    append,
    own_corrections,
    rates_fingerprint,
    read,
)
from hetero.model_lookup import find_model
from hetero.planning import spec_as_run
from planner.calibration import CalibrationRecord, TermSeconds
from planner.hardware import HardwareProfile
from planner.model_spec import ModelSpec
from planner.plan import Plan
from planner.search import profile_fingerprint
from tests.conftest import Hetero
from tests.machines import toy_machine

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture
def cache_dir(cache_home: Path) -> Path:
    return cache_home / "hetero"


def demo_spec(profile: HardwareProfile) -> ModelSpec:
    """The shipped model as a machine runs it."""
    return spec_as_run(find_model(), "auto", profile, print)


def slow_experts(profile: HardwareProfile, run: int = 0) -> CalibrationRecord:
    """A run in which experts on the CPU decoded 2.0736 times as long as predicted."""
    return CalibrationRecord(
        at=f"2026-01-31T12:00:00.{run:06}Z",
        model="tiny",
        model_fingerprint=demo_spec(profile).fingerprint,
        profile_fingerprint=profile_fingerprint(profile),
        rates_fingerprint=rates_fingerprint(profile),
        placement="cpu",
        accelerator="none",
        phase="decode",
        num_steps=1,
        num_tokens=1,
        num_seqs=1,
        num_past_tokens=0,
        terms=(TermSeconds(lane="cpu", term="experts", predicted_s=1.0, measured_s=2.0736),),
    )


def predicted_by_term(log: CalibrationLog, index: int) -> dict[str, float]:
    record = log.records[index]
    return {f"{each.lane} {each.term}": each.predicted_s for each in record.terms}


def test_a_run_leaves_a_record_of_each_phase(
    stored_profile: HardwareProfile, cache_dir: Path
) -> None:
    """Of its own steps: what warmed the engine up is no part of it."""
    with LLM(accelerator="none") as llm:
        assert not (cache_dir / LOG_FILE).exists()
        llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY)
    log = read(cache_dir)
    assert [record.phase for record in log.records] == ["prefill", "decode"]
    prefill, decode = log.records
    assert (prefill.num_steps, prefill.num_tokens) == (1, 3)
    # 5 decode steps; the second and the fourth are kept, after 4 and 6 tokens
    assert (decode.num_steps, decode.num_tokens, decode.num_past_tokens) == (2, 1, 5)
    for record in log.records:
        assert record.profile_fingerprint == profile_fingerprint(stored_profile)
        assert {"cpu attention", "cpu head"} <= {f"{t.lane} {t.term}" for t in record.terms}
        assert all(term.measured_s > 0 for term in record.terms)


def test_what_is_recorded_as_predicted_knows_of_no_corrections(
    stored_profile: HardwareProfile, cache_dir: Path
) -> None:
    """The second run is predicted by what the first one taught, and its record is not."""
    factors = []
    for _ in range(2):
        with LLM(accelerator="none") as llm:
            llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY)
            factors.append(llm.corrections.factor("cpu", "attention", "decode"))
    log = read(cache_dir)
    assert factors[0] == 1.0 != factors[1]
    assert predicted_by_term(log, 1) == pytest.approx(predicted_by_term(log, 3))


def test_the_seconds_of_a_step_are_its_ops_and_the_host(
    stored_profile: HardwareProfile, cache_dir: Path
) -> None:
    """One lane, one prefill step: measured terms add up to no more than the time to first token."""
    with LLM(accelerator="none") as llm:
        (out,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=1))
    (prefill,) = read(cache_dir).records
    total_s = sum(term.measured_s for term in prefill.terms)
    assert 0.5 * out.metrics.ttft_s < total_s <= out.metrics.e2e_s * 1.5


@pytest.mark.parametrize("reason", ["not asked", "one op at a time", "another machine's profile"])
def test_a_run_that_would_teach_nothing_leaves_no_record(
    stored_profile: HardwareProfile, cache_dir: Path, reason: str
) -> None:
    with LLM(
        accelerator="none",
        calibrate=reason != "not asked",
        overlap=reason != "one op at a time",
        profile=toy_machine() if reason == "another machine's profile" else None,
    ) as llm:
        llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY)
    assert not (cache_dir / LOG_FILE).exists()


def test_a_log_that_cannot_be_written_is_one_line_and_stops_nothing(
    stored_profile: HardwareProfile, cache_dir: Path
) -> None:
    (cache_dir / LOG_FILE).mkdir()
    said: list[str] = []
    with LLM(accelerator="none", progress=said.append) as llm:
        for _ in range(2):
            (out,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, GREEDY)
            assert len(out.outputs[0].token_ids) == 6
    warnings = [line for line in said if "warning" in line]
    assert len(warnings) == 2
    assert warnings[0].endswith("Is a directory; predictions are not calibrated")
    assert warnings[1].endswith("Is a directory; runs are not recorded for later predictions")


def test_a_plan_says_what_runs_corrected(
    hetero: Hetero, stored_profile: HardwareProfile, cache_dir: Path
) -> None:
    """One run goes 1 / 3.939 of its way: the decode step's experts take 1.2 times as long."""
    plans = []
    arguments = ("plan", "--accelerator", "none", "--json")
    plans.append(Plan.from_json(hetero(*arguments).stdout.encode(), source="before"))
    append(cache_dir, [slow_experts(stored_profile)])
    plans.append(Plan.from_json(hetero(*arguments).stdout.encode(), source="after"))
    before, after = (plan.estimate for plan in plans)

    assert (before.calibrated_runs, after.calibrated_runs) == (0, 1)
    factor = 2.0736 ** (1 / 3.939)
    assert after.correction_by_phase["decode"] == {"cpu experts": pytest.approx(factor, rel=1e-4)}
    experts = [each.terms_by_phase["decode"]["experts"] for each in (before, after)]
    assert experts[1] == pytest.approx(factor * experts[0], rel=1e-4)
    assert after.ttft_s == pytest.approx(before.ttft_s)

    report = hetero("plan", "--accelerator", "none").stdout
    assert "calibrated from 1 run\n" in report
    assert "corrected in decode: cpu experts 1.20x\n" in report
    assert "corrected in prefill" not in report


def test_an_emulated_machine_learns_nothing_from_runs_of_the_whole_cpu(
    hetero: Hetero, stored_profile: HardwareProfile, cache_dir: Path
) -> None:
    append(cache_dir, [slow_experts(stored_profile)])
    document = json.loads(hetero("plan", "--accelerator", "emulated", "--json").stdout)
    assert document["estimate"]["calibrated_runs"] == 0


def test_run_predicts_by_the_log_and_adds_to_it(
    hetero: Hetero, stored_profile: HardwareProfile, cache_dir: Path
) -> None:
    append(cache_dir, [slow_experts(stored_profile)])
    outcome = hetero("run", "-p", "Once", "--max-tokens", "4", "--accelerator", "none")
    assert outcome.code == 0
    assert "calibrated from 1 run\n" in outcome.stderr
    assert [record.phase for record in read(cache_dir).records[1:]] == ["prefill", "decode"]


def test_a_profile_that_was_measured_anew_starts_from_nothing(
    stored_profile: HardwareProfile, cache_dir: Path
) -> None:
    append(cache_dir, [slow_experts(stored_profile)])
    anew = replace(stored_profile, measured_at="2026-02-01T00:00:00Z")
    found = own_corrections(demo_spec(anew), anew, anew, os.environ, print)
    assert found.num_runs == 0


def test_plan_trial_runs_the_placements_and_says_so(
    hetero: Hetero, stored_profile: HardwareProfile, cache_dir: Path
) -> None:
    lengths = ("--prompt-len", "8", "--output-len", "4")
    outcome = hetero("plan", "--accelerator", "emulated", "--trial", "--json", *lengths)
    assert outcome.code == 0
    plan = Plan.from_json(outcome.stdout.encode(), source="stdout")
    assert plan.trial is not None and len(plan.trial.rows) >= 2
    assert plan.trial.kept == plan.placement.name
    assert all(row.measured is not None for row in plan.trial.rows)
    tried = [row.name for row in plan.trial.rows]
    assert [record.placement for record in read(cache_dir).records[::2]] == tried
    assert f"trying {tried[0]} (1 of {len(tried)})" in outcome.stderr


def test_run_trial_generates_under_what_was_kept(hetero: Hetero) -> None:
    """Without an accelerator there is one placement, which is tried alone."""
    outcome = hetero(
        *("run", "-p", "Once", "--max-tokens", "4", "--trial", "--json"),
        *("--accelerator", "none"),
    )
    assert outcome.code == 0
    assert "cpu is the only placement that fits; it is tried alone" in outcome.stderr
    document = json.loads(outcome.stdout)
    assert document["plan"]["trial"]["kept"] == "cpu"
    assert document["num_output_tokens"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("plan", "llama-3.1-8b", "--trial"), ExitCode.MODEL_INVALID, "known by its shapes only"),
        (
            ("plan", "demo", "--trial", "--profile", "desktop-rtx4090"),
            ExitCode.USAGE,
            "is of a reference machine",
        ),
        (
            ("run", "-p", "Once", "--trial", "--plan", "PLAN"),
            ExitCode.USAGE,
            "give --plan or --trial, not both",
        ),
    ],
    ids=["no weights", "no machine", "a plan"],
)
def test_a_trial_that_cannot_be_is_one_clear_line(
    hetero: Hetero, tmp_path: Path, arguments: tuple[str, ...], code: ExitCode, words: str
) -> None:
    file = tmp_path / "plan.json"
    hetero("plan", "-o", file)
    outcome = hetero(*(str(file) if each == "PLAN" else each for each in arguments))
    assert outcome.code == code
    assert outcome.stdout == ""
    assert words in outcome.stderr

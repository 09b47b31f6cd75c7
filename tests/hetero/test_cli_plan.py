"""`hetero plan`: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from hetero.errors import ExitCode
from hetero.measure import machine
from hetero.measure.store import stored_profile as read_stored_profile
from hetero.model_lookup import find_model
from planner.hardware import HardwareProfile
from planner.plan import Plan
from tests.conftest import Hetero
from tests.machines import toy_machine

PLAN_KEYS = {
    *("schema_version", "model", "model_fingerprint", "profile", "profile_fingerprint"),
    *("resources", "workload", "objective", "feasible", "placement", "estimate"),
    *("optimality_gap", "alternatives", "trial"),
}
ESTIMATE_KEYS = {
    *("ttft_s", "tpot_s", "e2e_s", "prefill_tokens_per_s", "decode_tokens_per_s"),
    *("num_concurrent_seqs", "bytes_by_device", "terms_by_phase", "bottleneck_by_phase"),
    *("band_by_metric", "source_by_phase", "calibrated_runs", "correction_by_phase"),
}
ALTERNATIVE_KEYS = {
    *("name", "cut_by_phase", "feasible", "ttft_s", "tpot_s", "e2e_s", "reason"),
}
DESKTOP = ("--profile", "desktop-rtx4090")


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    folder = find_model().folder
    assert folder is not None
    return shutil.copytree(folder, tmp_path / "copy")


def test_json_is_one_document_with_the_keys_of_the_contract(hetero: Hetero) -> None:
    outcome = hetero("plan", "demo", "--accelerator", "emulated", "--json")
    document = json.loads(outcome.stdout)
    assert outcome.code == 0
    assert set(document) == PLAN_KEYS
    assert set(document["estimate"]) == ESTIMATE_KEYS
    assert all(set(other) == ALTERNATIVE_KEYS for other in document["alternatives"])
    assert document["workload"] == {"prompt_len": 512, "output_len": 128, "num_seqs": 1}


def test_default_workload_shrinks_to_the_context(hetero: Hetero, demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    (demo / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    document = json.loads(hetero("plan", demo, "--json").stdout)
    assert document["workload"] == {"prompt_len": 50, "output_len": 50, "num_seqs": 1}


@pytest.mark.parametrize(
    ("arguments", "workload"),
    [
        (("--prompt-len", "1000"), (1000, 24, 1)),
        (("--output-len", "1000"), (24, 1000, 1)),
        (("--prompt-len", "7", "--output-len", "9", "--num-seqs", "3"), (7, 9, 3)),
    ],
)
def test_given_lengths_are_kept(
    hetero: Hetero, arguments: tuple[str, ...], workload: tuple[int, int, int]
) -> None:
    """The demo has a context of 1024; the length that was not given takes what is left."""
    found = json.loads(hetero("plan", "demo", "--json", *arguments).stdout)["workload"]
    assert (found["prompt_len"], found["output_len"], found["num_seqs"]) == workload


def test_report_says_that_the_cpu_does_it_all(hetero: Hetero) -> None:
    outcome = hetero("plan")
    assert outcome.code == 0
    assert "CPU only, no accelerator is used" in outcome.stdout
    assert "fits: cpu" in outcome.stdout
    assert outcome.stderr == ""


def test_emulated_is_always_labelled(hetero: Hetero) -> None:
    outcome = hetero("plan", "--accelerator", "emulated", "--strategy", "gpu")
    assert "EMULATED, its speeds are not a GPU's" in outcome.stdout
    assert "gpu (emulated)" in outcome.stdout


def test_output_is_the_plan_that_was_printed(hetero: Hetero, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    outcome = hetero("plan", "--json", "-o", file)
    assert Plan.load(file) == Plan.from_json(outcome.stdout.encode(), source="stdout")
    assert outcome.stderr == f"wrote {file}\n"


@pytest.mark.parametrize(("quantization", "gain"), [("int8", 1.85), ("int4", 2.95)])
def test_quantised_weights_of_a_reference_machine_take_their_bytes_at_what_is_usual(
    hetero: Hetero, quantization: str, gain: float
) -> None:
    """16 bits a weight against 8.125 or 4.125, of all but the embedding and the KV cache.

    What kernels usually reach of the memory's rate falls from 0.74 to 0.70 and 0.60 of it; the head
    of an int4 model is int8.
    """
    alone = ("llama-3.1-8b", *DESKTOP, "--accelerator", "none", "--json")
    plain, document = hetero("plan", *alone), hetero("plan", *alone, "--quantization", quantization)
    assert plain.stderr.startswith("note: not measured: datasheet rates")
    times = [json.loads(each.stdout)["estimate"]["tpot_s"] for each in (plain, document)]
    assert times[0] / times[1] == pytest.approx(gain, rel=0.05)


def test_quantised_weights_are_planned_for_the_gpu(hetero: Hetero) -> None:
    """30.5 billion weights are 61 GB in bfloat16 and 16.3 in int4, of 24 on the GPU."""
    arguments = ("qwen3-30b-a3b", *DESKTOP, "--json")
    plain = json.loads(hetero("plan", *arguments).stdout)
    outcome = hetero("plan", *arguments, "--quantization", "int4")
    document = json.loads(outcome.stdout)

    assert (outcome.code, document["feasible"]) == (ExitCode.OK, True)
    where = Plan.from_json(outcome.stdout.encode(), source="stdout").placement
    assert where.uses("gpu")
    assert document["estimate"]["e2e_s"] < 0.5 * plain["estimate"]["e2e_s"]


def test_what_quantisation_leaves_of_float16_weights_is_said(hetero: Hetero, demo: Path) -> None:
    """It becomes bfloat16, or float32 where that is asked for."""
    config = json.loads((demo / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (demo / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    warned = hetero("plan", demo, "--quantization", "int8")
    kept = hetero("plan", demo, "--quantization", "int8", "--dtype", "float32")
    assert "warning: what int8 leaves of float16 weights (embedding, rout" in warned.stderr
    assert kept.code == warned.code == 0
    assert "warning" not in kept.stderr


def test_budgets_bound_the_plan(hetero: Hetero) -> None:
    arguments = ("llama-3.1-8b", *DESKTOP, "--gpu-mem-gb", "8", "--cpu-mem-gb", "16", "--json")
    plan = Plan.from_json(hetero("plan", *arguments).stdout.encode(), source="stdout")
    assert plan.feasible
    assert plan.estimate.bytes_by_device["gpu"] <= 8e9
    assert plan.estimate.bytes_by_device["cpu"] <= 16e9


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["report", "json"])
def test_what_does_not_fit_is_printed_and_exits_with_4(
    hetero: Hetero, form: tuple[str, ...]
) -> None:
    arguments = ("llama-3.1-8b", *DESKTOP, "--gpu-mem-gb", "2", "--cpu-mem-gb", "4")
    outcome = hetero("plan", *arguments, *form)
    assert outcome.code == ExitCode.DOES_NOT_FIT
    *notes, error = outcome.stderr.splitlines()
    assert error.startswith("error: llama-3.1-8b as ") and "may be used" in error
    # one document has no place for it
    assert all(note.startswith("note: not measured") for note in notes) and len(notes) == len(form)
    if form:
        assert json.loads(outcome.stdout)["feasible"] is False
    else:
        assert "does not fit; the nearest miss is" in outcome.stdout


def test_a_strategy_that_does_not_fit_names_one_that_does(hetero: Hetero) -> None:
    arguments = ("llama-3.1-8b", *DESKTOP, "--gpu-mem-gb", "8", "--strategy", "gpu")
    outcome = hetero("plan", *arguments)
    assert outcome.code == ExitCode.DOES_NOT_FIT
    assert "needs" in outcome.stderr and "7.68 GB may be used" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nowhere/model",), 5, "model 'nowhere/model' was not found"),
        (("demo", "--accelerator", "cuda"), 6, "the profile of toy machine has no GPU"),
        (("demo", "--gpu-mem-gb", "1"), 2, "--gpu-mem-gb is 1 GB but toy machine has no GPU"),
        (("demo", "--cpu-mem-gb", "nan"), 2, "--cpu-mem-gb is nan but must be a number"),
        (("demo", "--cpu-mem-gb", "-1"), 2, "'--cpu-mem-gb': -1.0 is not in the range"),
        (("demo", "--cpu-mem-gb", "inf"), 2, "'--cpu-mem-gb': inf is not in the range"),
        (("demo", "--cpu-mem-gb", "1e400"), 2, "'--cpu-mem-gb': inf is not in the range"),
        (("demo", "--num-seqs", "9" * 20), 2, "but a plan can be for 100000 at most"),
        (("demo", "--cpu-mem-gb", "900"), 2, "--cpu-mem-gb is 900 GB but toy machine has 8 GB"),
        (("demo", "--profile", "abacus"), 2, "there is no profile 'abacus'"),
        (("demo", "--prompt-len", "2000"), 2, "demo has a context of 1024"),
        (("demo", "--strategy", "gpu"), 2, "the machine has no accelerator"),
        (("demo", "-o", "/nowhere/plan.json"), 2, "the folder /nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_clear_line(
    hetero: Hetero, arguments: tuple[str, ...], code: int, words: str
) -> None:
    outcome = hetero("plan", *arguments)
    assert outcome.code == code
    assert outcome.stdout == ""
    assert words in outcome.stderr


def test_unknown_architecture_is_a_model_error(hetero: Hetero, demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    (demo / "config.json").write_text(json.dumps({**config, "architectures": ["Frobnicator"]}))
    outcome = hetero("plan", demo)
    assert outcome.code == ExitCode.MODEL_INVALID
    assert "Frobnicator" in outcome.stderr


def test_without_a_stored_profile_the_machine_is_measured(
    hetero: Hetero, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so on stderr, and keeps the profile."""
    (cache_home / "hetero" / "machine.json").unlink()

    def measure(*, quick: bool, progress: object) -> HardwareProfile:
        assert quick
        return toy_machine()

    monkeypatch.setattr(machine, "measure_machine", measure)
    outcome = hetero("plan", "--json")
    assert outcome.code == 0
    assert "measuring this machine quickly (about 10 s): it has no stored profile" in outcome.stderr
    assert read_stored_profile(cache_home / "hetero") == toy_machine()
    json.loads(outcome.stdout)


QUESTIONS = ("llama-3.1-8b", *DESKTOP, "--strategy", "split")


def test_explain_and_compare_add_keys_to_the_plan(hetero: Hetero) -> None:
    """The plan itself is what it is without them."""
    plain = json.loads(hetero("plan", *QUESTIONS, "--json").stdout)
    arguments = (*QUESTIONS, "--json", "--explain", "--compare", "llama-fit,cpu")
    document = json.loads(hetero("plan", *arguments).stdout)

    assert set(document) == PLAN_KEYS | {"explanation", "comparison"}
    assert {key: document[key] for key in PLAN_KEYS} == plain
    assert set(document["explanation"]) == {
        *("bindings_by_phase", "gpu_memory", "gains", "nearest_fits"),
    }
    assert set(document["explanation"]["gains"][0]) == {
        *("of", "e2e_s", "decode_tokens_per_s", "saved_s", "gained_tokens_per_s", "placement"),
    }
    assert [row["name"] for row in document["comparison"]] == ["llama-fit", "cpu"]
    assert set(document["comparison"][0]) == {
        *("name", "fits", "ttft_s", "tpot_s", "e2e_s", "ratio", "num_concurrent_seqs", "reason"),
    }


def test_the_report_explains_and_compares(hetero: Hetero) -> None:
    printed = hetero("plan", *QUESTIONS, "--explain", "--compare", "all").stdout
    for heading in (
        *("what binds", "one prefill step", "one decode step", "GPU memory"),
        *("what more would gain", "placed as by"),
    ):
        assert f"\n{heading}" in printed
    assert "accelerate" in printed and "does not apply" in printed


def test_a_what_if_plan_is_of_another_machine(hetero: Hetero, tmp_path: Path) -> None:
    """Half of the memory's rate: decode of a model on the CPU takes nearly twice as long."""
    alone = ("llama-3.1-8b", *DESKTOP, "--accelerator", "none", "--json")
    plain = Plan.from_json(hetero("plan", *alone).stdout.encode(), source="stdout")
    what_if = ("--what-if", "cpu-gbps=41.6")
    changed = Plan.from_json(hetero("plan", *alone, *what_if).stdout.encode(), source="stdout")

    assert changed.estimate.tpot_s / plain.estimate.tpot_s == pytest.approx(2.0, rel=0.02)
    assert changed.profile == "desktop-rtx4090, what if cpu-gbps=41.6"
    assert changed.profile_fingerprint != plain.profile_fingerprint


def test_a_what_if_plan_is_not_run_on_the_machine_as_it_is(hetero: Hetero, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert hetero("plan", "demo", "--what-if", "cpu-gbps=90", "-o", file).code == 0
    outcome = hetero("run", "demo", "--plan", file, "-p", "x", "--max-tokens", "1")
    assert outcome.code == ExitCode.USAGE
    assert "the plan was made for the machine toy machine, what if cpu-gbps=90" in outcome.stderr


@pytest.mark.parametrize("budget", ["0", "1e-12"])
def test_a_gpu_budget_of_none_plans_without_it(hetero: Hetero, budget: str) -> None:
    arguments = ("llama-3.1-8b", *DESKTOP, "--gpu-mem-gb", budget)
    outcome = hetero("plan", *arguments)
    assert outcome.code == 0
    assert "CPU only, no accelerator is used" in outcome.stdout


def test_a_gpu_budget_of_none_agrees_with_no_accelerator(hetero: Hetero) -> None:
    both = ("--gpu-mem-gb", "0", "--accelerator", "none")
    assert hetero("plan", "llama-3.1-8b", *DESKTOP, *both).code == 0


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        # 31.1 MB of the 90 % that may be used
        (("--cpu-mem-gb", "0"), "raise --cpu-mem-gb to 0.0346 where the machine has that"),
        (("--cpu-mem-gb", "0.03"), "the nearest that fits: --prompt-len "),
        (("--cpu-mem-gb", "0.026"), "the nearest that fits: --quantization int8 ("),
    ],
)
def test_a_budget_that_is_too_small_names_what_would_fit(
    hetero: Hetero, arguments: tuple[str, ...], fix: str
) -> None:
    outcome = hetero("plan", "demo", *arguments)
    assert outcome.code == ExitCode.DOES_NOT_FIT
    assert fix in outcome.stderr
    assert ("tokens/s)" in outcome.stderr) == ("nearest" in fix)


def test_of_many_sequences_about_as_many_as_fit_are_named(hetero: Hetero) -> None:
    """To a factor, whatever the order of magnitude."""
    outcome = hetero("plan", "demo", "--cpu-mem-gb", "4", "--num-seqs", "50000")
    found = re.search(r"fits: --num-seqs (\d+) ", outcome.stderr)
    assert found is not None
    for factor, code in ((1, ExitCode.OK), (3, ExitCode.DOES_NOT_FIT)):
        num_seqs = str(factor * int(found[1]))
        again = hetero("plan", "demo", "--cpu-mem-gb", "4", "--num-seqs", num_seqs)
        assert again.code == code


CONTRADICTIONS = [
    (("--accelerator", "none", "--gpu-mem-gb", "4"), "--gpu-mem-gb 4", "--accelerator none"),
    (("--accelerator", "none", "--strategy", "gpu"), "--strategy gpu", "--accelerator none"),
    (("--gpu-mem-gb", "0", "--strategy", "offload"), "--strategy offload", "--gpu-mem-gb 0"),
    (("--gpu-mem-gb", "0", "--accelerator", "cuda"), "--accelerator cuda", "--gpu-mem-gb 0"),
    (("--allow-foreign-profile",), "--allow-foreign-profile", "--profile"),
    (
        ("--accelerator", "emulated", "--gpu-mem-gb", "1", "--cpu-mem-gb", "7.9"),
        "--cpu-mem-gb is 7.9 GB but the emulated accelerator leaves 7 GB",
        "lower it or --gpu-mem-gb",
    ),
]


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("arguments", "first", "second"), CONTRADICTIONS, ids=lambda value: " ".join(value)
)
def test_options_that_contradict_each_other_are_both_named(
    hetero: Hetero, command: str, arguments: tuple[str, ...], first: str, second: str
) -> None:
    """Before a profile is read or a weight is loaded."""
    outcome = hetero(command, *arguments)
    assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
    assert first in outcome.stderr and second in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [
        (
            ("--accelerator", "none", "--what-if", "link=4.0x8"),
            "--what-if link",
            "--accelerator none",
        ),
        (("--gpu-mem-gb", "0", "--what-if", "gpu-gbps=9"), "--what-if gpu-gbps", "--gpu-mem-gb 0"),
        (("--trial", *DESKTOP), "--trial needs", "leave --profile out"),
        (("--profile", "pyproject.toml", "-o", "pyproject.toml"), "--profile", "--output"),
    ],
)
def test_questions_that_contradict_each_other_are_both_named(
    hetero: Hetero, arguments: tuple[str, ...], first: str, second: str
) -> None:
    outcome = hetero("plan", "demo", *arguments)
    assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
    assert first in outcome.stderr and second in outcome.stderr


def test_only_a_plain_file_is_replaced(hetero: Hetero, tmp_path: Path) -> None:
    """A plan that takes the place of a device, as /dev/null, or of a link breaks the machine."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    target.write_text("kept")
    link.symlink_to(target)
    for path in (pipe, link):
        outcome = hetero("plan", "demo", "-o", path)
        assert outcome.code == ExitCode.USAGE
        assert "no plain file, which a new one would replace" in outcome.stderr
    assert pipe.is_fifo() and link.is_symlink() and target.read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--what-if", "gpu=3"), "--what-if: 'gpu' is not one of gpu-mem-gb, cpu-mem-gb, link"),
        (("--compare", "vllm"), "--compare: 'vllm' is not one of llama-fit, flexgen"),
        (
            ("--what-if", "gpu-mem-gb=8", "--gpu-mem-gb", "9"),
            "--gpu-mem-gb is 9.0 and --what-if changes gpu-mem-gb too: gpu-mem-gb=8",
        ),
    ],
)
def test_questions_that_cannot_be_answered_are_usage_errors(
    hetero: Hetero, arguments: tuple[str, ...], message: str
) -> None:
    outcome = hetero("plan", *QUESTIONS, *arguments)
    assert outcome.code == ExitCode.USAGE
    assert message in outcome.stderr
    assert outcome.stdout == ""


def test_a_trial_is_of_the_machine_as_it_is(hetero: Hetero) -> None:
    outcome = hetero("plan", "demo", "--trial", "--what-if", "cpu-gbps=90")
    assert outcome.code == ExitCode.USAGE
    assert "--trial runs on the machine as it is" in outcome.stderr


def test_what_does_not_fit_names_the_nearest_that_does(hetero: Hetero) -> None:
    """8 billion weights in 8.125 bits are 8.6 GB of the 7.2 + 1.9 that may be used."""
    arguments = ("llama-3.1-8b", *DESKTOP, "--gpu-mem-gb", "2", "--cpu-mem-gb", "8")
    outcome = hetero("plan", *arguments)
    explained = hetero("plan", *arguments, "--explain")

    assert outcome.code == explained.code == ExitCode.DOES_NOT_FIT
    fix = "the nearest that fits: --quantization int8 ("
    assert fix in outcome.stderr
    assert outcome.stderr == explained.stderr
    assert "what would fit" in explained.stdout
    again = (*arguments, "--quantization", "int8")
    assert hetero("plan", *again).code == 0

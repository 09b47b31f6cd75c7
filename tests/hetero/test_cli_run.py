"""`hetero run`: the demo, one prompt, rows, plans, and everything it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from hetero import LLM, SamplingParams
from hetero.cli.job import GoodRow, Job
from hetero.cli.rows import OutputExistsError, Row, RowWriter, read_rows
from hetero.cli.run import DEMO_PROMPT, DEMO_SEED, DEMO_TEMPERATURE
from hetero.errors import EnvironmentProblemError, ExitCode, PlanMismatchError, UsageError
from hetero.model_lookup import find_model
from planner.hardware import HardwareProfile
from planner.plan import Plan
from tests.conftest import Hetero, Outcome

SPEED_KEYS = {"ttft_s", "tpot_s", "e2e_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
RUN_KEYS = {
    *("schema_version", "text", "token_ids", "num_prompt_tokens", "num_output_tokens"),
    *("finish_reason", "plan", "measured", "predicted"),
}
QUIET = ("--progress", "none")


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    folder = find_model().folder
    assert folder is not None
    return shutil.copytree(folder, tmp_path / "copy")


def rows_file(folder: Path, *rows: Any) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def refused(outcome: Outcome, code: int, words: str) -> None:
    """One line on stderr, nothing on stdout."""
    assert outcome.code == code, outcome.stderr
    assert outcome.stdout == ""
    assert words in outcome.stderr
    assert len([line for line in outcome.stderr.splitlines() if "rror:" in line]) == 1


def test_demo_continues_its_prompt_the_same_way_each_time(
    hetero: Hetero, stored_profile: HardwareProfile
) -> None:
    """stdout reads as a sentence: the prompt, and what LLM gives for it."""
    outcome = hetero("run", "--max-tokens", "12", *QUIET)
    with LLM(profile=stored_profile) as llm:
        how = SamplingParams(max_tokens=12, temperature=DEMO_TEMPERATURE, seed=DEMO_SEED)
        (expected,) = llm.generate(DEMO_PROMPT, how)
    assert outcome.code == 0
    assert outcome.stdout == f"{DEMO_PROMPT}{expected.outputs[0].text}\n"
    assert outcome.stderr == ""


def test_a_prompt_gives_its_completion_only(
    hetero: Hetero, stored_profile: HardwareProfile
) -> None:
    """Greedy unless asked otherwise."""
    outcome = hetero("run", "-p", "Once upon a time", "--max-tokens", "9", *QUIET)
    with LLM(profile=stored_profile) as llm:
        how = SamplingParams(max_tokens=9, temperature=0.0)
        (expected,) = llm.generate("Once upon a time", how)
    assert outcome.stdout == f"{expected.outputs[0].text}\n"


def test_json_is_one_document_with_the_keys_of_the_contract(hetero: Hetero) -> None:
    outcome = hetero("run", "-p", "Once upon a time", "--max-tokens", "5", "--json")
    document = json.loads(outcome.stdout)
    assert outcome.code == 0
    assert set(document) == RUN_KEYS
    assert set(document["measured"]) == set(document["predicted"]) == SPEED_KEYS
    assert document["schema_version"] == 1
    assert document["num_output_tokens"] == len(document["token_ids"]) == 5
    assert document["finish_reason"] == "length"
    plan = Plan.from_json(json.dumps(document["plan"]).encode(), source="document")
    assert plan.workload.prompt_len == document["num_prompt_tokens"]
    assert plan.workload.output_len == 5


def test_plan_comes_before_and_the_comparison_after(hetero: Hetero) -> None:
    """The lines on stderr, in this order."""
    outcome = hetero("run", "--max-tokens", "4")
    positions = [
        outcome.stderr.index(words)
        for words in (
            "plan: demo, 1 sequence of ",
            "CPU only, no accelerator is used",
            "prefill: cpu",
            "decode: cpu",
            "memory: ",
            "predicted: first token after",
            "loading demo as cpu",
            "1/1 done",
            "this run",
            "\nlast decode step  predicted",
        )
    ]
    assert positions == sorted(positions)


def test_progress_json_is_json_lines(hetero: Hetero) -> None:
    outcome = hetero("run", "--max-tokens", "4", "--progress", "json")
    events = [json.loads(line)["event"] for line in outcome.stderr.splitlines()]
    assert events == ["plan", "message", "progress", "result"]


def test_stop_ends_the_text(hetero: Hetero) -> None:
    whole = hetero("run", "-p", "Once", "--max-tokens", "12", *QUIET).stdout
    stop = whole[4:7]
    cut = hetero("run", "-p", "Once", "--max-tokens", "12", "--stop", stop, *QUIET).stdout
    assert cut == f"{whole[: whole.index(stop)]}\n"


def test_chat_uses_the_template(hetero: Hetero, stored_profile: HardwareProfile) -> None:
    outcome = hetero("run", "--chat", "-p", "Hello", "--max-tokens", "4", "--json", *QUIET)
    with LLM(profile=stored_profile) as llm:
        how = SamplingParams(max_tokens=4, temperature=0.0)
        (expected,) = llm.chat([{"role": "user", "content": "Hello"}], how)
    document = json.loads(outcome.stdout)
    assert document["num_prompt_tokens"] == len(expected.prompt_token_ids)
    assert document["token_ids"] == list(expected.outputs[0].token_ids)


def test_emulated_run_is_labelled_and_gives_the_same_tokens(hetero: Hetero) -> None:
    """No overlap is the reference; every placement gives its tokens."""
    common = ("run", "-p", "Once upon a time", "--max-tokens", "6", "--json", "--dtype", "float32")
    alone = hetero(*common, *QUIET)
    split = hetero(*common, "--accelerator", "emulated", "--strategy", "split")
    serial = hetero(*common, "--accelerator", "emulated", "--strategy", "split", "--no-overlap")
    tokens = [json.loads(each.stdout)["token_ids"] for each in (alone, split, serial)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert "EMULATED, its speeds are not a GPU's" in split.stderr
    assert "this run (emulated)" in split.stderr


def test_a_plan_file_is_followed(hetero: Hetero, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    hetero("plan", "demo", "--accelerator", "emulated", "--strategy", "split", "-o", file)
    outcome = hetero("run", "--plan", file, "--max-tokens", "4", "--json", *QUIET)
    assert json.loads(outcome.stdout)["plan"] == json.loads(file.read_bytes())


@pytest.mark.parametrize(
    "format_", [("--quantization", "int4"), ("--dtype", "float32")], ids=" ".join
)
def test_a_plan_brings_the_format_it_was_made_for(
    hetero: Hetero, tmp_path: Path, format_: tuple[str, ...]
) -> None:
    """To repeat it is allowed and changes nothing."""
    file = tmp_path / "plan.json"
    hetero("plan", "demo", *format_, "--accelerator", "none", "-o", file)
    common = ("run", "-p", "Once upon a time", "--max-tokens", "4", "--json", *QUIET)
    alone = hetero(*common, "--plan", file)
    repeated = hetero(*common, "--plan", file, *format_)
    expected = hetero(*common, *format_)
    tokens = [json.loads(each.stdout)["token_ids"] for each in (alone, repeated, expected)]
    assert tokens[0] == tokens[1] == tokens[2]
    assert json.loads(alone.stdout)["plan"] == json.loads(file.read_bytes())


@pytest.mark.parametrize(
    ("planned", "asked", "words"),
    [
        (
            ("--quantization", "int4"),
            ("--quantization", "int8"),
            "made with quantization int4 but the run has int8; give --quantization int4 (quant",
        ),
        (
            (),
            ("--quantization", "int8"),
            "made with quantization none but the run has int8; leave --quantization out, or plan",
        ),
        (
            ("--dtype", "float32"),
            ("--dtype", "bfloat16"),
            "made with dtype float32 but the run has bfloat16; give --dtype float32 (dtype='float",
        ),
    ],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, tuple) else "",
)
def test_a_plan_for_another_format_says_what_to_give(
    hetero: Hetero, tmp_path: Path, planned: tuple[str, ...], asked: tuple[str, ...], words: str
) -> None:
    file = tmp_path / "plan.json"
    hetero("plan", "demo", *planned, "--accelerator", "none", "-o", file)
    refused(hetero("run", "--plan", file, *asked), ExitCode.USAGE, words)


def test_llm_takes_the_quantization_of_its_plan_and_names_it_where_another_is_asked(
    hetero: Hetero, stored_profile: HardwareProfile, tmp_path: Path
) -> None:
    plan = Plan.from_json(
        hetero("plan", "demo", "--quantization", "int8", "--json").stdout.encode(), source="stdout"
    )
    with pytest.raises(PlanMismatchError, match=r"but the run has int4; .*quantization='int8'"):
        LLM(plan=plan, profile=stored_profile, quantization="int4")
    with LLM(plan=plan, profile=stored_profile) as llm:
        assert llm.spec.quantization == "int8"


def test_rows_are_written_as_they_finish(hetero: Hetero, tmp_path: Path) -> None:
    """A row that the model cannot take is an error row, and exit 3."""
    given = rows_file(
        tmp_path,
        {"custom_id": "a", "prompt": "Once"},
        {"custom_id": "long", "prompt_token_ids": [5] * 2000},
        {"custom_id": "word", "prompt_token_ids": [99999]},
        {"prompt_token_ids": [5, 6, 7]},
    )
    output = tmp_path / "out.jsonl"
    outcome = hetero("run", "--input", given, "--output", output, "--max-tokens", "3")
    rows = {row["custom_id"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert outcome.code == ExitCode.FAILED_ROWS
    assert outcome.stdout == ""
    assert "2 of 4 rows failed" in outcome.stderr
    assert set(rows) == {"a", "long", "word", "line-4"}
    for row in rows.values():
        assert set(row) == {"custom_id", "text", "token_ids", "finish_reason", "error"}
    assert rows["long"]["error"] == (
        "the prompt has 2000 tokens but demo has a context of 1024, with at least 1 to generate; "
        "shorten the prompt"
    )
    assert rows["word"]["error"] == "the prompt has token id 99999 but demo knows 0..4095"
    assert rows["a"]["error"] is None
    assert len(rows["a"]["token_ids"]) == len(rows["line-4"]["token_ids"]) == 3


def test_rows_equal_single_prompts(hetero: Hetero, tmp_path: Path) -> None:
    """A batch changes nothing about a row."""
    prompts = ["Once upon a time", "The sea"]
    given = rows_file(tmp_path, *({"prompt": prompt} for prompt in prompts))
    output = tmp_path / "out.jsonl"
    dtype = ("--dtype", "float32")
    assert (
        hetero("run", "--input", given, "--output", output, "--max-tokens", "4", *dtype).code == 0
    )
    rows = {row["custom_id"]: row for row in map(json.loads, output.read_text().splitlines())}
    for number, prompt in enumerate(prompts, start=1):
        alone = hetero("run", "-p", prompt, "--max-tokens", "4", "--json", *dtype, *QUIET)
        assert json.loads(alone.stdout)["token_ids"] == rows[f"line-{number}"]["token_ids"]


def test_rows_that_all_fail_load_nothing(
    hetero: Hetero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "__init__", None)
    given = rows_file(tmp_path, {"prompt_token_ids": [-1]})
    outcome = hetero("run", "--input", given, "--output", tmp_path / "out.jsonl")
    assert outcome.code == ExitCode.FAILED_ROWS
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_an_output_that_exists_is_kept(hetero: Hetero, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    given = rows_file(tmp_path, {"prompt": "Once"})
    outcome = hetero("run", "--input", given, "--output", output)
    refused(outcome, ExitCode.OUTPUT_LOCKED, f"the output {output} exists already")
    assert output.read_text() == "precious"


def test_all_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"prompt": "fine"}\n'
        "not json\n"
        "\n"
        '["list"]\n'
        '{"prompt": "x", "temperature": 1}\n'
        '{"prompt": "x", "prompt_token_ids": [1]}\n'
        '{"custom_id": "line-1", "prompt": "x"}\n'
        '{"prompt": ""}\n'
        '{"prompt_token_ids": [1.5]}\n'
        '{"custom_id": 7, "prompt": "x"}\n'
        '{"prompt": [1, 2]}\n'
        '{"custom_id": "x"}\n'
    )
    with pytest.raises(UsageError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert f"{path} has 10 bad lines: line 2: not JSON" in message
    for words in (
        "line 4: not a JSON object",
        "line 5: unknown key 'temperature'; known are custom_id, prompt, prompt_token_ids",
        "line 6: give prompt or prompt_token_ids, not both",
        "line 7: custom_id 'line-1' is that of line 1",
        "line 8: the prompt is empty",
        "line 9: prompt_token_ids must be a list of whole numbers",
        "line 10: custom_id must be a string that is not empty",
        "line 11: prompt must be a string",
        "line 12: there is no prompt; give prompt or prompt_token_ids",
    ):
        assert words in message


def test_a_row_is_judged_by_its_own_room() -> None:
    """20 + 100 tokens end at a context of 40; a row of 5 ends after 10 more, beside it."""
    good = tuple(
        GoodRow(row=Row(custom_id=name, prompt="x"), token_ids=(5,) * size)
        for name, size in (("long", 20), ("short", 5))
    )
    job = Job(good=good, bad=())
    assert job.within(39, 39, 100, 40) == job, "the last token is never fed"
    assert job.within(38, 38, 100, 40).good == ()
    found = job.within(25, 25, 10, 40)
    assert [each.row.custom_id for each in found.good] == ["short"]
    assert "come to 29 tokens but the KV cache of this plan holds 25" in str(found.bad[0].error)
    assert job.within(39, 20, 100, 40) == job
    found = job.within(39, 19, 100, 40)
    assert "prompt has 20 tokens but the KV cache of this plan holds 19" in str(found.bad[0].error)


def test_notes_of_the_profile_are_a_warning(
    hetero: Hetero, stored_profile: HardwareProfile, tmp_path: Path
) -> None:
    """Even where progress is not wanted."""
    file = tmp_path / "busy.json"
    file.write_bytes(replace(stored_profile, notes=("one", "two")).to_json())
    outcome = hetero("run", "--max-tokens", "2", "--profile", file, *QUIET)
    assert outcome.stderr == f"warning: the profile of {stored_profile.name}: one; two\n"


def test_one_bad_line_is_one(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("?\n")
    with pytest.raises(UsageError, match=r"has 1 bad line: line 1: not JSON"):
        read_rows(path)


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("?\n" * 30)
    with pytest.raises(UsageError, match=r"has 30 bad lines: .*; and 10 more$"):
        read_rows(path)


def test_rows_have_their_ids(tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"prompt": "a"}, {"custom_id": "b", "prompt_token_ids": [1, 2]})
    assert read_rows(path) == (
        Row(custom_id="line-1", prompt="a"),
        Row(custom_id="b", prompt=(1, 2)),
    )


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """The line that did not fit is taken back."""
    row = Row(custom_id="a", prompt="a")
    with RowWriter(tmp_path / "out.jsonl") as writer:
        writer.write(row, text="first")
        file = writer._file

        class Full:
            """Takes 5 bytes and then no more."""

            def write(self, data: bytes) -> int:
                if len(data) < 5 or not data.startswith(b"{"):
                    raise OSError(28, "No space left on device")
                return file.write(data[:5])

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        writer._file = Full()  # type: ignore[assignment]
        with pytest.raises(EnvironmentProblemError, match=r"No space left .* its 1 rows are comp"):
            writer.write(row, text="second")
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["text"] == "first"


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        RowWriter(tmp_path / "out.jsonl"),
        pytest.raises(OutputExistsError, match="exists already"),
    ):
        RowWriter(tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nowhere",), 2, "there is nothing to generate: give a text with -p"),
        (("nowhere", "-p", "x"), 5, "model 'nowhere' was not found"),
        (("llama-3.1-8b", "-p", "x"), 5, "llama-3.1-8b is known by its shapes only"),
        (("-p", ""), 2, "the prompt is empty; give at least one character"),
        (("-p", "word " * 2000), 2, "demo has a context of 1024, with at least 1 to generate"),
        (("-p", "x", "--input", "f"), 2, "give -p or --input, not both"),
        (("--input", "f"), 2, "--input and --output go together"),
        (("--output", "f"), 2, "--input and --output go together"),
        (("--input", "f", "--output", "g", "--json"), 2, "--json is for one prompt"),
        (("--input", "/nowhere", "--output", "g"), 2, "cannot read /nowhere"),
        (("--accelerator", "cuda"), 6, "the profile of toy machine has no GPU"),
        (("--accelerator", "emulated", "--strategy", "gpu", "--gpu-mem-gb", "0.001"), 4, "needs"),
        (("--cpu-mem-gb", "0.001"), 4, "demo as cpu needs 0.02394 GB on the cpu where 0.0009 GB"),
        (("--strategy", "gpu"), 2, "the machine has no accelerator"),
        (("--plan", "/nowhere.json"), 2, "cannot read the plan /nowhere.json"),
        (("--trace", "/nowhere/t.json"), 2, "the folder /nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_clear_line(
    hetero: Hetero, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """All of it before torch or a weight is loaded."""
    refused(hetero("run", *arguments), code, words)


def test_a_folder_without_tokenizer_takes_token_ids_only(hetero: Hetero, demo: Path) -> None:
    (demo / "tokenizer.json").unlink()
    refused(hetero("run", demo, "-p", "x"), ExitCode.USAGE, "has no tokenizer.json")
    given, output = rows_file(demo, {"prompt_token_ids": [5, 6]}), demo / "out.jsonl"
    outcome = hetero("run", demo, "--input", given, "--output", output, "--max-tokens", "2")
    (row,) = map(json.loads, output.read_text().splitlines())
    assert outcome.code == 0, outcome.stderr
    assert (row["text"], len(row["token_ids"])) == ("", 2)


def test_chat_without_template_is_refused(hetero: Hetero, demo: Path) -> None:
    (demo / "tokenizer_config.json").unlink()
    refused(hetero("run", demo, "--chat", "-p", "x"), ExitCode.USAGE, "has no chat template")


def test_git_lfs_pointer_is_named(hetero: Hetero, demo: Path) -> None:
    (demo / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    refused(
        hetero("run", demo, "-p", "x"), ExitCode.MODEL_INVALID, "is a Git LFS pointer, not the file"
    )


def test_missing_shard_is_named(hetero: Hetero, demo: Path) -> None:
    (demo / "model.safetensors").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (demo / "model.safetensors.index.json").write_text(json.dumps(index))
    outcome = hetero("run", demo, "-p", "x")
    refused(outcome, ExitCode.MODEL_INVALID, "model-00001-of-00002.safetensors")


def test_unknown_architecture_is_a_model_error(hetero: Hetero, demo: Path) -> None:
    config = json.loads((demo / "config.json").read_text())
    (demo / "config.json").write_text(json.dumps({**config, "architectures": ["Frobnicator"]}))
    refused(hetero("run", demo, "-p", "x"), ExitCode.MODEL_INVALID, "Frobnicator")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_fingerprint": "0" * 16, "model": "other"}, "the plan was made for model other"),
        ({"profile_fingerprint": "0" * 16, "profile": "far"}, "made for the machine far"),
    ],
)
def test_a_plan_for_something_else_is_refused(
    hetero: Hetero, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    file = tmp_path / "plan.json"
    hetero("plan", "demo", "-o", file)
    file.write_bytes(replace(Plan.load(file), **change).to_json())
    refused(hetero("run", "--plan", file), ExitCode.USAGE, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--strategy", "cpu"), "--plan or --strategy, not both"),
        (("--cpu-mem-gb", "4"), "--cpu-mem-gb is 4 but memory budgets and link rate are part of"),
        (("--gpu-mem-gb", "0"), "--gpu-mem-gb is 0 but memory budgets and link rate are part of"),
        (("--trial",), "--plan or --trial, not both"),
        (("--quantization", "int8"), "was made with quantization none but the run has int8"),
        (("--profile", "desktop-rtx4090"), "is of a reference machine"),
        (("--accelerator", "emulated"), "accelerator is emulated but the plan is for none"),
    ],
    ids=" ".join,
)
def test_a_plan_is_not_overridden(
    hetero: Hetero, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    file = tmp_path / "plan.json"
    hetero("plan", "demo", "-o", file)
    refused(hetero("run", "--plan", file, *arguments), ExitCode.USAGE, words)


def test_one_file_is_not_for_two_options(hetero: Hetero, tmp_path: Path) -> None:
    """The trace would be written over the rows, or over the plan."""
    plan, rows = tmp_path / "plan.json", rows_file(tmp_path, {"prompt_token_ids": [5]})
    hetero("plan", "demo", "-o", plan)
    before = plan.read_bytes()
    refused(hetero("run", "--plan", plan, "--trace", plan), 2, "--plan and --trace are both")
    output = tmp_path / "out.jsonl"
    both = ("--output", output, "--trace", output)
    refused(hetero("run", "--input", rows, *both), 2, "--output and --trace are both")
    assert plan.read_bytes() == before and not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # 26.6 MB for the whole context, 25.2 MB of 28 may be used
        (("--cpu-mem-gb", "0.028", "--max-tokens", "1000"), "the nearest that fits: --max-tokens "),
        (("--cpu-mem-gb", "0.026"), "the nearest that fits: --quantization int8 ("),
        (("--cpu-mem-gb", "0"), "raise --cpu-mem-gb to 0.0"),
    ],
)
def test_a_budget_that_is_too_small_names_what_would_fit(
    hetero: Hetero, arguments: tuple[str, ...], words: str
) -> None:
    """In options that `hetero run` has."""
    outcome = hetero("run", *arguments)
    refused(outcome, ExitCode.DOES_NOT_FIT, words)
    assert "--output-len" not in outcome.stderr and "--prompt-len" not in outcome.stderr


def test_a_plan_for_a_machine_with_more_memory_is_refused(hetero: Hetero, tmp_path: Path) -> None:
    """By its file and field, with both values."""
    file = tmp_path / "plan.json"
    hetero("plan", "demo", "-o", file)
    plan = Plan.load(file)
    more = replace(plan.resources, cpu_bytes=9 * 10**9)
    file.write_bytes(replace(plan, resources=more).to_json())
    words = f"{file}: `$.resources.cpu_bytes` is 9 GB but toy machine has 8 GB"
    refused(hetero("run", "--plan", file), ExitCode.USAGE, words)


def test_many_rows_run_in_smaller_numbers_where_memory_is_short(
    hetero: Hetero, tmp_path: Path
) -> None:
    """One percent less than 16 sequences need: 8 are planned for, and all rows are served."""
    given = rows_file(tmp_path, *({"prompt_token_ids": [5] * 20} for _ in range(16)))
    arguments = ("--input", given, "--output", tmp_path / "out.jsonl", "--max-tokens", "2")
    whole = hetero("run", *arguments, "--progress", "json")
    bytes_of_16 = json.loads(whole.stderr.splitlines()[0])["plan"]["estimate"]["bytes_by_device"]
    (tmp_path / "out.jsonl").unlink()
    # 10% of the host's memory is kept free.
    budget = ("--cpu-mem-gb", str(0.99 * bytes_of_16["cpu"] / 0.9 / 1e9))
    short = hetero("run", *arguments, *budget, "--progress", "json")
    plan = json.loads(short.stderr.splitlines()[0])["plan"]
    assert short.code == 0
    assert plan["workload"]["num_seqs"] == 8
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 16


def test_terminal_text_is_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model says does not command the terminal; a file gets it as it is."""
    from hetero.cli.run_output import TextStream

    shown: list[str] = []
    monkeypatch.setattr("click.echo", lambda text="\n", nl=True: shown.append(text))
    stream = TextStream("")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    stream.show("a\x1b[2J")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    stream.show("a\x1b[2Jb\x1b")
    assert shown == ["a?[2J", "b\x1b"]


def test_module_runs_as_a_program(stored_profile: HardwareProfile) -> None:
    """stdout of the real program has the text and nothing else."""
    command = [sys.executable, "-m", "hetero", "run", "--max-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(DEMO_PROMPT)
    assert "this run" in done.stderr


def test_a_row_too_long_for_the_plans_cache_is_an_error_row(hetero: Hetero, tmp_path: Path) -> None:
    """The plan holds 32 tokens; the row of 200 fails, the other is served."""
    plan, rows, output = tmp_path / "plan.json", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    hetero(
        "plan",
        "demo",
        "--prompt-len",
        "8",
        "--output-len",
        "8",
        "--cpu-mem-gb",
        "0.0262",
        "-o",
        plan,
    )
    rows.write_text(json.dumps({"prompt": "word " * 200}) + "\n" + json.dumps({"prompt": "A"}))

    outcome = hetero(
        "run", "--plan", plan, "--input", rows, "--output", output, "--max-tokens", "4"
    )

    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert outcome.code == ExitCode.FAILED_ROWS, outcome.stderr
    assert sorted(line["error"] is None for line in lines) == [False, True]
    assert any("KV cache of this plan holds" in (line["error"] or "") for line in lines)

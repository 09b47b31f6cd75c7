"""`hetero`: help, version, exit codes, and one line for whatever goes wrong."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest

import hetero
from cpu_kernels.compiling import FOLDER_VARIABLE
from hetero.cli import main
from hetero.cli.machine import (
    ACCELERATORS,
    DTYPES,
    QUANTIZATIONS,
    RIVALS,
    STRATEGIES,
    use_kernel_cache,
)
from hetero.cli.main import SHORT_HELP, cli, run_command
from hetero.cli.run import PROGRESS_CHOICES
from hetero.errors import ExitCode, HeteroError, ModelFolderError
from hetero.planning import DtypeName
from hetero.run_view import Progress
from hetero.terminal_text import one_line, visible
from planner import rivals, strategies
from planner.errors import ModelSpecError, PlanError, PlannerError, ProfileError
from planner.hardware import AcceleratorName, HardwareProfile
from planner.model_spec import Dtype, Quantization
from tests.conftest import Hetero

SHARED = {
    *("accelerator", "allow_foreign_profile", "cpu_mem_gb", "dtype", "gpu_mem_gb", "profile"),
    *("quantization", "strategy"),
}
OPTIONS = {
    "plan": SHARED
    | {"model", "prompt_len", "output_len", "num_seqs", "objective", "as_json", "output"}
    | {"is_tried", "is_explained", "compare", "what_if"},
    "run": SHARED
    | {
        *("model", "prompt", "input_path", "output", "chat", "max_tokens", "temperature", "top_p"),
        *("top_k", "min_p", "seed", "stop", "plan_path", "no_overlap", "trace", "progress"),
        *("as_json", "is_tried"),
    },
    "profile": {"output", "quick", "model", "is_list", "as_json"},
    "doctor": {"as_json"},
}


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """`hetero doctor` raises what a test puts into `ERROR`."""

    def callback(as_json: bool) -> None:
        raise ERROR[0]

    monkeypatch.setattr(command("doctor"), "callback", callback)
    yield monkeypatch
    ERROR.clear()


ERROR: list[BaseException] = []


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_the_contract(name: str) -> None:
    """Scripts rely on them: a change here is a change of the contract."""
    assert {parameter.name for parameter in command(name).params} == OPTIONS[name]


def test_choices_are_those_of_the_planner() -> None:
    """The command line keeps copies, so that help need not load the planner."""
    assert tuple(strategies.STRATEGIES) == STRATEGIES
    assert rivals.RIVALS == RIVALS
    assert get_args(AcceleratorName) == ACCELERATORS
    assert get_args(Quantization) == QUANTIZATIONS
    assert get_args(Progress) == PROGRESS_CHOICES
    assert get_args(DtypeName) == DTYPES == ("auto", *get_args(Dtype))


@pytest.mark.parametrize("name", SHORT_HELP)
def test_group_help_is_the_first_sentence_of_the_command(name: str) -> None:
    """The group keeps copies, so that it need not load the commands."""
    text = command(name).help
    assert text is not None
    assert " ".join(text.split("\n\n")[0].split()) == SHORT_HELP[name]


def test_help_lists_commands_and_exit_codes(hetero: Hetero) -> None:
    outcome = hetero("--help")
    assert outcome.code == 0
    for name in SHORT_HELP:
        assert f"\n  {name} " in outcome.stdout
    for code in ExitCode:
        assert f"\n    {code.value} " in outcome.stdout


def test_version_is_that_of_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hetero", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"hetero {hetero.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ModelFolderError("no config.json"), 5, "error: no config.json"),
        (HeteroError("two\nlines \x1b[31mred"), 1, "error: two lines ?[31mred"),
        (PlannerError("strategy"), 2, "error: strategy"),
        (PlanError("not a plan"), 2, "error: not a plan"),
        (ModelSpecError("no layers"), 5, "error: no layers"),
        (ProfileError("no rates"), 6, "error: no rates"),
        (OSError(28, "No space left on device"), 6, "error: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (main._Terminated(), 143, "terminated"),
        (
            ModuleNotFoundError("No module named 'rich'", name="rich"),
            6,
            "error: the Python package rich is missing; install hetero again, with pip",
        ),
        (
            ZeroDivisionError("by zero"),
            1,
            "internal error: ZeroDivisionError: by zero; please report; run with HETERO_DEBUG=1 "
            "for the traceback",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_exception_is_a_line_and_an_exit_code(
    failing: pytest.MonkeyPatch, hetero: Hetero, error: BaseException, code: int, line: str
) -> None:
    ERROR.append(error)
    outcome = hetero("doctor")
    assert outcome.code == code
    assert outcome.stdout == ""
    assert outcome.stderr.strip() == line


def test_traceback_only_when_asked_for(
    failing: pytest.MonkeyPatch, hetero: Hetero, monkeypatch: pytest.MonkeyPatch
) -> None:
    ERROR.append(ZeroDivisionError("by zero"))
    assert "Traceback" not in hetero("doctor").stderr
    monkeypatch.setenv("HETERO_DEBUG", "1")
    assert "Traceback" in hetero("doctor").stderr


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["plan", "--prompt-len", "0"], ["run", "--frobnicate"], ["run", "a", "b"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(hetero: Hetero, arguments: list[str]) -> None:
    outcome = hetero(*arguments)
    assert outcome.code == ExitCode.USAGE
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr


def test_options_come_from_the_environment(hetero: Hetero, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETERO_PLAN_NUM_SEQS", "3")
    assert "3 sequences of 512 prompt and 128 output tokens" in hetero("plan").stdout


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_ends_a_run_in_one_line(
    stored_profile: HardwareProfile, number: int, code: int, word: str
) -> None:
    """The first character on stdout says that the run is under way."""
    arguments = ["run", "--max-tokens", "900", "--progress", "none", "--accelerator", "none"]
    with subprocess.Popen(
        [sys.executable, "-m", "hetero", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell starts what is in its background with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"T"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr.decode().split() == [word]


def test_a_closed_pipe_is_no_news(stored_profile: HardwareProfile) -> None:
    """`hetero run | head` prints no traceback."""
    arguments = ["run", "--max-tokens", "900", "--progress", "none", "--accelerator", "none"]
    with subprocess.Popen(
        [sys.executable, "-m", "hetero", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1) == b"T"
        process.stdout.close()
        stderr = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == ExitCode.INTERNAL
    assert stderr == b""


def test_kernels_are_kept_in_a_private_folder(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE)
    use_kernel_cache()
    folder = Path(os.environ[FOLDER_VARIABLE])
    assert folder == cache_home / "hetero" / "kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_set_kernel_cache_is_kept(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, "/elsewhere")
    use_kernel_cache()
    assert os.environ[FOLDER_VARIABLE] == "/elsewhere"


def test_help_needs_no_cache_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A home that cannot be written to is no reason to withhold help."""
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert run_command(["run", "--help"]) == 0
    assert "--max-tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("\x1b]0;title\x07", "?]0;title?"),
        ("\x9b31m", "?31m"),
        ("user\u202egpj.exe", "user?gpj.exe"),
        ("caf\u00e9 \u4e2d", "caf\u00e9 \u4e2d"),
    ],
)
def test_control_characters_do_not_reach_a_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert one_line(text) == " ".join(shown.split())


def test_profile_refuses_a_missing_folder_before_it_measures(
    hetero: Hetero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute of measuring is not thrown away."""
    monkeypatch.setattr("hetero.measure.machine.measure_machine", lambda **options: pytest.fail())
    outcome = hetero("profile", "-o", tmp_path / "missing" / "machine.json")
    assert outcome.code == ExitCode.USAGE
    assert f"the folder {tmp_path / 'missing'} does not exist" in outcome.stderr

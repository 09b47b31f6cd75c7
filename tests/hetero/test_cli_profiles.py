"""Whose profile it is and whether it can be trusted, from the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpu_kernels.compiling import FOLDER_VARIABLE, cache_folder
from hetero.api import LLM
from hetero.cli.machine import use_kernel_cache
from hetero.errors import ExitCode, UsageError
from hetero.measure import machine
from hetero.measure.environment import check_cache, check_stored_profile
from hetero.measure.store import machine_names, store_profile
from planner.hardware import HardwareProfile
from tests.conftest import Hetero, Outcome

RUN = ("run", "-p", "Once upon a time", "--max-tokens", "2", "--progress", "none")
COMMANDS = (("plan",), RUN)
FOREIGN_WORDS = "the CPU was Another CPU and is "
IS_FOREIGN = f"warning: the profile of toy machine is of another machine: {FOREIGN_WORDS}"


@pytest.fixture
def foreign(stored_profile: HardwareProfile) -> HardwareProfile:
    """The profile of a machine that differs from this one in its CPU, and in all that follows."""
    assert stored_profile.fingerprint is not None
    fingerprint = replace(stored_profile.fingerprint, cpu="Another CPU", num_cores=4096)
    return replace(stored_profile, fingerprint=fingerprint)


@pytest.fixture
def foreign_file(foreign: HardwareProfile, tmp_path: Path) -> Path:
    path = tmp_path / "foreign.json"
    path.write_bytes(foreign.to_json())
    return path


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """One line on stderr that has the words, nothing on stdout."""
    assert (outcome.code, outcome.stdout) == (code, ""), outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert all(word in outcome.stderr for word in words), outcome.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_profile_of_another_machine_is_refused(
    hetero: Hetero, foreign_file: Path, command: tuple[str, ...]
) -> None:
    """The first field that differs, both values, and the flag that allows it."""
    outcome = hetero(*command, "--profile", foreign_file)
    refused(outcome, ExitCode.USAGE, FOREIGN_WORDS, "--allow-foreign-profile")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_profile_of_another_machine_can_be_allowed(
    hetero: Hetero, foreign_file: Path, command: tuple[str, ...]
) -> None:
    """It is used, and one line says that it is another machine's."""
    outcome = hetero(*command, "--profile", foreign_file, "--allow-foreign-profile")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout
    lines = outcome.stderr.splitlines()
    assert [line.startswith(IS_FOREIGN) for line in lines if "another machine" in line] == [True]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_measured_profile_of_no_machine_is_refused(
    hetero: Hetero, foreign: HardwareProfile, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Nothing in the file says that it was measured here."""
    path = tmp_path / "nobody.json"
    path.write_bytes(replace(foreign, fingerprint=None).to_json())
    refused(hetero(*command, "--profile", path), ExitCode.USAGE, "says of no machine")


def test_a_datasheet_needs_no_flag(hetero: Hetero) -> None:
    """It is of another machine by what it is."""
    outcome = hetero("plan", "--profile", "desktop-rtx4090", "--json")
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["profile"] == "desktop-rtx4090"
    assert "another machine" not in outcome.stderr


def test_python_refuses_a_profile_of_another_machine(
    foreign: HardwareProfile, foreign_file: Path
) -> None:
    """As a value, as a path, and as its text."""
    for profile in (foreign, foreign_file, str(foreign_file)):
        with pytest.raises(UsageError, match=f"{FOREIGN_WORDS}.*allow_foreign_profile=True"):
            LLM(profile=profile)
    with LLM(profile=foreign, allow_foreign_profile=True) as llm:
        assert llm.hardware.cpu == foreign.cpu


LOW = "predictions have low confidence"


@pytest.fixture
def busy_profile(stored_profile: HardwareProfile, cache_home: Path) -> HardwareProfile:
    """This machine's stored profile, measured while something else ran."""
    busy = replace(stored_profile, confidence="low", notes=("measured while others ran",))
    store_profile(cache_home / "hetero", busy)
    return busy


def test_plan_says_that_its_profile_has_low_confidence(
    hetero: Hetero, busy_profile: HardwareProfile, cache_home: Path
) -> None:
    """Among the notes, on stderr beside JSON, with what to do; nothing is measured again."""
    text, document = hetero("plan"), hetero("plan", "--json")
    for shown in (text.stdout, document.stderr):
        [line] = [line for line in shown.splitlines() if LOW in line]
        assert line.startswith("note: ") and line.endswith("run: hetero profile")
    assert LOW not in document.stdout
    assert "measuring this machine" not in text.stderr + document.stderr
    check = check_stored_profile(cache_home / "hetero")
    assert check.status == "warn" and "low confidence" in check.text


def test_run_says_in_one_line_that_its_profile_has_low_confidence(
    hetero: Hetero, busy_profile: HardwareProfile
) -> None:
    """Why, and what to do."""
    outcome = hetero(*RUN)
    assert outcome.code == 0
    [line] = outcome.stderr.splitlines()
    assert line.startswith(f"warning: the profile of toy machine: measured while others ran; {LOW}")
    assert line.endswith("run: hetero profile")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_profile_that_can_be_trusted_needs_no_word(
    hetero: Hetero, command: tuple[str, ...]
) -> None:
    outcome = hetero(*command)
    assert LOW not in outcome.stdout + outcome.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_hand_edited_profile_is_refused_with_the_path(
    hetero: Hetero, stored_profile: HardwareProfile, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """And with the file's name."""
    path = tmp_path / "edited.json"
    document = json.loads(stored_profile.to_json())
    document["cpu_by_threads"][0]["read_bytes_per_s"] = float("nan")
    path.write_text(json.dumps(document))
    refused(
        hetero(*command, "--profile", path),
        ExitCode.USAGE,
        f"{path} is not a hardware profile",
        "NaN is not a finite number - at `$.cpu_by_threads[0].read_bytes_per_s`",
    )


def test_machines_are_listed_without_measuring(
    hetero: Hetero, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line each, its name first, as --profile takes it."""
    monkeypatch.setattr(machine, "measure_machine", pytest.fail)
    outcome = hetero("profile", "--list")
    assert outcome.code == 0
    assert [line.split()[0] for line in outcome.stdout.splitlines()] == list(machine_names())
    assert all(" GB" in line for line in outcome.stdout.splitlines())


@pytest.mark.parametrize("other", ["--quick", "--json", "--model=demo", "--output=x.json"])
def test_a_list_is_nothing_else(hetero: Hetero, other: str) -> None:
    """An option that would be ignored is refused."""
    outcome = hetero("profile", "--list", other)
    assert outcome.code == ExitCode.USAGE
    assert outcome.stdout == ""
    assert "--list" in outcome.stderr


def test_an_unknown_machine_is_refused_with_the_nearest(hetero: Hetero) -> None:
    refused(
        hetero("plan", "--profile", "desktop-rtx4080"),
        ExitCode.USAGE,
        "nearest first: desktop-rtx4",
        "hetero profile --list",
    )


@pytest.fixture
def read_only_cache(
    cache_home: Path, stored_profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A cache that nobody can make, root included."""
    if not Path("/proc/self").is_dir():
        pytest.skip("needs Linux's /proc")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    return Path("/proc/hetero")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_plan_and_run_go_on_without_a_cache(
    hetero: Hetero,
    read_only_cache: Path,
    stored_profile: HardwareProfile,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    """The machine is measured, and one line says that this is not kept."""

    def measure(*, quick: bool, progress: object) -> HardwareProfile:
        return stored_profile

    monkeypatch.setattr(machine, "measure_machine", measure)
    outcome = hetero(*command)
    assert outcome.code == 0, outcome.stderr
    [line] = [line for line in outcome.stderr.splitlines() if "the profile is not stored" in line]
    assert line.startswith("warning: ") and str(read_only_cache) in line


def test_profile_refuses_a_cache_it_cannot_write_before_it_measures(
    hetero: Hetero, read_only_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "measure_machine", pytest.fail)
    refused(
        hetero("profile", "--quick"),
        ExitCode.ENVIRONMENT,
        f"cannot make the cache folder {read_only_cache}",
        "XDG_CACHE_HOME",
    )


def test_kernels_are_compiled_again_where_they_cannot_be_kept(
    read_only_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes half a minute each time, so it is said, once."""
    monkeypatch.delenv(FOLDER_VARIABLE)
    said: list[str] = []
    use_kernel_cache(said.append)
    use_kernel_cache(said.append)
    assert cache_folder() is None
    [line] = said
    assert line.startswith("warning: compiled kernels are not kept") and "/proc" in line


def test_doctor_warns_of_a_cache_that_cannot_be_written(read_only_cache: Path) -> None:
    """hetero works without it, slowly at the start."""
    for folder in (read_only_cache, Path("/proc/self")):
        check = check_cache(folder)
        assert check.status == "warn"
        assert "cannot be written" in check.text
        assert check.fix is not None and "XDG_CACHE_HOME" in check.fix

"""The cache folder and the profiles in it: safety, atomicity, whose profile it is."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from hetero.errors import EnvironmentProblemError
from hetero.measure import store
from hetero.measure.fingerprint import machine_fingerprint
from hetero.measure.store import (
    default_cache_dir,
    find_profile,
    kernel_cache_dir,
    load_or_measure,
    machine_names,
    measuring,
    private_folder,
    store_profile,
    stored_profile,
    why_foreign,
    write_atomically,
)
from planner.device import DeviceProfile
from planner.errors import ProfileError
from planner.hardware import HardwareProfile

CPU = DeviceProfile(
    name="cpu",
    kind="cpu",
    memory_bytes=1000,
    read_bytes_per_s=10.0,
    flop_per_s={"float32": 10.0},
    launch_s=1e-6,
)
# A folder that nobody can write to, root included, and that belongs to this user alone.
NOT_WRITABLE = Path("/proc/self")


@pytest.fixture
def here() -> HardwareProfile:
    return HardwareProfile(
        name="here",
        provenance="measured",
        cpu_by_threads=(CPU,),
        fingerprint=machine_fingerprint(),
    )


def never() -> HardwareProfile:
    raise AssertionError("must not measure")


def test_cache_dir_follows_xdg() -> None:
    """XDG_CACHE_HOME if it is absolute, otherwise ~/.cache."""
    assert default_cache_dir({"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/hetero")
    assert default_cache_dir({"XDG_CACHE_HOME": "x", "HOME": "/h"}) == Path("/h/.cache/hetero")
    assert default_cache_dir({"HOME": "/h"}) == Path("/h/.cache/hetero")


def test_cache_dir_needs_a_home() -> None:
    """Neither variable: an error that names both."""
    with pytest.raises(EnvironmentProblemError, match="XDG_CACHE_HOME nor HOME"):
        default_cache_dir({})


def test_folders_are_made_for_the_owner_only(tmp_path: Path) -> None:
    """Mode 0700 for the cache and for the kernels' folder in it."""
    folder = kernel_cache_dir(tmp_path / "a" / "hetero")
    for made in (folder, folder.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_folder_that_others_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    """Code is loaded from it; the error says how to fix it."""
    tmp_path.chmod(mode)
    with pytest.raises(EnvironmentProblemError, match=f"mode {mode:04o}.*chmod 700"):
        private_folder(tmp_path)


def test_folder_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both user numbers are named."""
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(EnvironmentProblemError, match=f"user {owner} but this is user {owner + 1}"):
        private_folder(tmp_path)


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A file is not a folder, and nothing is made below it."""
    file = tmp_path / "hetero"
    file.write_text("")
    with pytest.raises(EnvironmentProblemError, match="is not a folder"):
        private_folder(file)
    with pytest.raises(EnvironmentProblemError, match="cannot make"):
        private_folder(file / "below" / "it")


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves what was there, and no temporary file."""
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblemError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_only_files_of_the_cache_are_private(tmp_path: Path) -> None:
    """What the user asked for has the permissions of any new file."""
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "plan.json", b"{}", is_private=False)
        write_atomically(tmp_path / "machine.json", b"{}")
    finally:
        assert os.umask(before) == 0o027
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("plan.json", "machine.json")]
    assert modes == [0o640, 0o600]


def test_profile_is_measured_once(tmp_path: Path, here: HardwareProfile) -> None:
    """The first call measures and stores, the second reads."""
    cache = tmp_path / "hetero"
    said: list[str] = []
    assert load_or_measure(cache, progress=said.append, measure=lambda: here) == (here, "measured")
    assert "no stored profile" in said[0]
    assert load_or_measure(cache, measure=never) == (here, "stored")


def test_foreign_profile_is_measured_again(tmp_path: Path, here: HardwareProfile) -> None:
    """One sentence names the difference."""
    assert here.fingerprint is not None
    old = replace(here, fingerprint=replace(here.fingerprint, torch="1.0"))
    store_profile(tmp_path / "hetero", old)
    said: list[str] = []
    profile, origin = load_or_measure(
        tmp_path / "hetero", progress=said.append, measure=lambda: here
    )
    assert (profile, origin) == (here, "measured")
    assert "the torch version was 1.0" in said[0]


def test_damaged_profile_is_measured_again(tmp_path: Path, here: HardwareProfile) -> None:
    """A file that is no profile is replaced, and named."""
    cache = private_folder(tmp_path / "hetero")
    (cache / store.PROFILE_FILE).write_text("{}")
    said: list[str] = []
    _, origin = load_or_measure(cache, progress=said.append, measure=lambda: here)
    assert origin == "measured"
    assert store.PROFILE_FILE in said[0]
    assert stored_profile(cache) == here


def test_low_confidence_profile_is_used_as_it_is(tmp_path: Path, here: HardwareProfile) -> None:
    """A machine that is always busy would otherwise be measured each time."""
    doubtful = replace(here, confidence="low")
    store_profile(tmp_path / "hetero", doubtful)
    assert load_or_measure(tmp_path / "hetero", measure=never) == (doubtful, "stored")


@pytest.mark.skipif(not NOT_WRITABLE.is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("cache", [NOT_WRITABLE, NOT_WRITABLE / "hetero"])
def test_without_a_writable_cache_a_measurement_is_used(cache: Path, here: HardwareProfile) -> None:
    """One line says that it is not stored, why, and what to do."""
    said: list[str] = []
    assert load_or_measure(cache, progress=said.append, measure=lambda: here) == (here, "measured")
    [warning] = [line for line in said if line.startswith("warning: ")]
    assert "not stored" in warning and str(cache) in warning and "XDG_CACHE_HOME" in warning


@pytest.mark.skipif(not NOT_WRITABLE.is_dir(), reason="needs Linux's /proc")
def test_why_a_stored_profile_is_not_used_is_said_where_none_can_be_stored(
    here: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that came from another machine, and is read-only here."""
    foreign = (None, "the stored profile is not used, the CPU was another")
    monkeypatch.setattr(store, "_usable_profile", lambda cache_dir: foreign)
    said: list[str] = []
    load_or_measure(NOT_WRITABLE, progress=said.append, measure=lambda: here)
    assert said[0] == f"measuring this machine quickly (about 10 s): {foreign[1]}"


def test_what_cannot_be_stored_is_not_measured_twice(
    tmp_path: Path, here: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full after the measurement costs the file, not the numbers."""
    measured: list[HardwareProfile] = []
    said: list[str] = []

    def measure() -> HardwareProfile:
        measured.append(here)
        return here

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    profile, _ = load_or_measure(tmp_path / "hetero", progress=said.append, measure=measure)
    assert (profile, measured) == (here, [here])
    assert said[-1].startswith("warning: ") and "No space left" in said[-1]


@pytest.mark.skipif(not NOT_WRITABLE.is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("cache", [NOT_WRITABLE, NOT_WRITABLE / "hetero"])
def test_measuring_needs_a_writable_cache(cache: Path) -> None:
    """It is refused before the block, which measures for a minute."""
    with (
        pytest.raises(EnvironmentProblemError, match=f"{cache}.*XDG_CACHE_HOME"),
        measuring(cache, pytest.fail),
    ):
        never()


HOLD_LOCK = """
import sys
from pathlib import Path
from hetero.measure.store import measuring
with measuring(Path(sys.argv[1]), print):
    print("measuring", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that measures until its stdin is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "hetero")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "measuring\n"
        yield process


def test_a_second_process_waits_until_the_first_has_measured(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    """It says that it waits, and does not start before the other has ended."""
    order: list[str] = []

    def let_go(line: str) -> None:
        assert other.poll() is None and other.stdin is not None
        order.append(line)
        other.stdin.close()

    with measuring(tmp_path / "hetero", let_go):
        order.append("mine")
    assert order == ["another hetero is measuring this machine: waiting for it", "mine"]


def test_who_waited_takes_what_the_other_has_stored(
    tmp_path: Path, other: subprocess.Popen[str], here: HardwareProfile
) -> None:
    """Two plans at once measure once."""

    def store_and_let_go(line: str) -> None:
        assert other.stdin is not None
        store_profile(tmp_path / "hetero", here)
        other.stdin.close()

    found = load_or_measure(tmp_path / "hetero", progress=store_and_let_go, measure=never)
    assert found == (here, "stored")


def test_unsafe_cache_is_refused_before_measuring(tmp_path: Path) -> None:
    """Not after ten seconds."""
    tmp_path.chmod(0o777)
    with pytest.raises(EnvironmentProblemError, match="chmod 700"):
        load_or_measure(tmp_path, measure=never)


def test_profile_without_fingerprint_is_foreign(here: HardwareProfile) -> None:
    """A datasheet is of no machine in particular."""
    assert why_foreign(here) is None
    assert why_foreign(replace(here, fingerprint=None)) is not None


def test_profile_is_found_by_path(tmp_path: Path, here: HardwareProfile) -> None:
    """Any file that is a profile."""
    path = tmp_path / "mine.json"
    path.write_bytes(here.to_json())
    assert find_profile(str(path)) == here


def test_every_reference_machine_is_found_by_name() -> None:
    """Names are those of the files in profiles/machines."""
    for name in machine_names():
        assert find_profile(name).cpu_by_threads


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("rtx4090", "4090"), ("desktop-rtx4080", "desktop-rtx4"), ("Server-A100", "server-a100")],
)
def test_unknown_profile_names_the_nearest_first(asked: str, nearest: str) -> None:
    """What was asked for, what is like it, and how to list what there is."""
    with pytest.raises(ProfileError) as caught:
        find_profile(asked)
    message = str(caught.value)
    assert message.startswith(f"there is no profile {asked!r}; ")
    found = re.search(r"nearest first: ([a-z0-9-]+), ", message)
    assert found is not None and nearest in found[1]
    assert f"hetero profile --list lists all {len(machine_names())}" in message


def test_missing_profile_file_is_named() -> None:
    """A path is not taken for a name."""
    with pytest.raises(ProfileError, match="No such file"):
        find_profile("no-such-machine.json")

"""The calibration log: whole lines, bounded size, and what cannot be read stops nothing."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from hetero.errors import EnvironmentProblemError
from hetero.measure import calibration_log
from hetero.measure.calibration_log import (
    LOG_FILE,
    MAX_LOG_BYTES,
    append,
    own_corrections,
    own_log,
    rates_fingerprint,
    read,
)
from hetero.measure.fingerprint import machine_fingerprint
from planner.calibration import NO_CORRECTIONS, CalibrationRecord, TermSeconds
from planner.search import profile_fingerprint
from tests.machines import toy_machine
from tests.planner.tiny import tiny_spec

SPEC = tiny_spec("dm")


def record(number: int = 0, *, profile: str = "machine", rates: str = "rates") -> CalibrationRecord:
    """A run in which the CPU took 2.0736 times as long as predicted."""
    return CalibrationRecord(
        at=f"2026-01-31T12:00:00.{number:06}Z",
        model="tiny",
        model_fingerprint=SPEC.fingerprint,
        profile_fingerprint=profile,
        rates_fingerprint=rates,
        placement="cpu",
        accelerator="none",
        phase="decode",
        num_steps=1,
        num_tokens=1,
        num_seqs=1,
        num_past_tokens=0,
        terms=(TermSeconds(lane="cpu", term="dense", predicted_s=1.0, measured_s=2.0736),),
    )


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_what_was_appended_is_read_in_order(cache_dir: Path) -> None:
    append(cache_dir, [record(0), record(1)])
    append(cache_dir, [record(2)])
    found = read(cache_dir)
    assert found.records == (record(0), record(1), record(2))
    assert found.num_skipped == 0


def test_only_its_owner_may_read_the_log(cache_dir: Path) -> None:
    append(cache_dir, [record()])
    assert (cache_dir / LOG_FILE).stat().st_mode & 0o777 == 0o600
    assert cache_dir.stat().st_mode & 0o777 == 0o700


def test_a_folder_without_a_log_has_no_records(cache_dir: Path) -> None:
    assert read(cache_dir).records == ()
    assert not cache_dir.exists()


def test_lines_that_are_no_records_are_counted_and_skipped(cache_dir: Path) -> None:
    append(cache_dir, [record(0)])
    later = msgspec.json.encode(record(1)).replace(b'"schema_version":1', b'"schema_version":99')
    with open(cache_dir / LOG_FILE, "ab") as file:
        file.write(b"\xff\x00 not JSON\n\n[" + b"[" * 100_000 + b"\n" + later + b"\n{}\n")
    append(cache_dir, [record(2)])
    found = read(cache_dir)
    assert found.records == (record(0), record(2))
    assert found.num_skipped == 4


def test_a_line_that_was_cut_off_spoils_no_other(cache_dir: Path) -> None:
    """As a process leaves it that was killed, or a disk that was full."""
    append(cache_dir, [record(0)])
    path = cache_dir / LOG_FILE
    path.write_bytes(path.read_bytes() + msgspec.json.encode(record(1))[:40])
    append(cache_dir, [record(2)])
    found = read(cache_dir)
    assert found.records == (record(0), record(2))
    assert found.num_skipped == 1


def test_of_a_log_that_is_too_long_the_newer_half_is_kept(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(msgspec.json.encode(record())) + 1
    monkeypatch.setattr(calibration_log, "MAX_LOG_BYTES", 20 * size)
    for number in range(21):
        append(cache_dir, [record(number)])
    found = read(cache_dir)
    # 20 lines fit; the 21st leaves the whole lines of the last 10 lines' bytes
    assert [each.at for each in found.records] == [record(n).at for n in range(12, 21)]
    assert found.num_skipped == 0
    assert (cache_dir / LOG_FILE).stat().st_mode & 0o777 == 0o600


def test_of_a_log_of_any_length_only_the_end_is_read(cache_dir: Path) -> None:
    """Whoever made it so long: memory and time are bounded."""
    append(cache_dir, [record(0)])
    path = cache_dir / LOG_FILE
    path.write_bytes(path.read_bytes() + b"x" * (3 * MAX_LOG_BYTES) + b"\n")
    append(cache_dir, [record(1)])
    assert read(cache_dir).records == (record(1),)


def test_a_second_process_waits_for_the_first(cache_dir: Path) -> None:
    """It appends while this one holds the lock: nothing is in the log until that is let go."""
    append(cache_dir, [record(0)])
    code = (
        "import sys, msgspec; from pathlib import Path\n"
        "from hetero.measure.calibration_log import append\n"
        "from planner.calibration import CalibrationRecord\n"
        "made = msgspec.json.decode(sys.stdin.buffer.readline(), type=CalibrationRecord)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "append(Path(sys.argv[1]), [made]); print('done', flush=True)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(cache_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdin is not None and other.stdout is not None
    with other, open(cache_dir / "calibration.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other.stdin.write(msgspec.json.encode(record(1)) + b"\n")
        other.stdin.flush()
        assert other.stdout.readline() == b"ready\n"
        other.stdin.write(b"go\n")
        other.stdin.flush()
        assert read(cache_dir).records == (record(0),)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert other.stdout.readline() == b"done\n"
    assert read(cache_dir).records == (record(0), record(1))


def test_a_log_that_cannot_be_written_is_an_error_that_names_it(cache_dir: Path) -> None:
    (cache_dir / LOG_FILE).mkdir(parents=True)
    os.chmod(cache_dir, 0o700)
    with pytest.raises(EnvironmentProblemError, match=r"cannot write .*calibration\.jsonl: Is a"):
        append(cache_dir, [record()])


def test_a_folder_that_others_may_write_to_is_not_written_to(cache_dir: Path) -> None:
    cache_dir.mkdir()
    cache_dir.chmod(0o777)
    with pytest.raises(EnvironmentProblemError, match="other users may write"):
        append(cache_dir, [record()])
    assert not any(cache_dir.iterdir())


def test_runs_correct_the_measurement_that_they_were_predicted_from(cache_home: Path) -> None:
    """The model, the machine as it is used, and its rates; one run is trusted for a quarter."""
    profile = replace(toy_machine(), fingerprint=machine_fingerprint())
    emulated = profile.with_emulated_gpu(memory_bytes=10**9, link_bytes_per_s=4e9)
    mine = record(profile=profile_fingerprint(profile), rates=rates_fingerprint(profile))
    append(cache_home / "hetero", [mine])
    said: list[str] = []

    found = own_corrections(SPEC, profile, profile, os.environ, said.append)
    assert found.factor("cpu", "dense", "decode") == pytest.approx(1.203, rel=1e-3)
    other = tiny_spec("md")
    assert own_corrections(other, profile, profile, os.environ, said.append) == NO_CORRECTIONS
    assert own_corrections(SPEC, profile, emulated, os.environ, said.append) == NO_CORRECTIONS
    measured_anew = replace(profile, measured_at="2026-02-01T00:00:00Z")
    found = own_corrections(SPEC, measured_anew, measured_anew, os.environ, said.append)
    assert found == NO_CORRECTIONS
    assert not said


def test_only_a_measurement_of_this_machine_has_a_log(cache_home: Path) -> None:
    profile = replace(toy_machine(), fingerprint=machine_fingerprint())
    elsewhere = replace(machine_fingerprint(), cpu="another cpu")
    assert own_log(profile, os.environ) is not None
    assert own_log(replace(profile, provenance="datasheet"), os.environ) is None
    assert own_log(replace(profile, fingerprint=elsewhere), os.environ) is None
    assert own_log(replace(profile, fingerprint=None), os.environ) is None
    assert own_log(profile, {}) is None


def test_what_is_wrong_with_a_log_is_said_in_one_line(cache_home: Path) -> None:
    profile = replace(toy_machine(), fingerprint=machine_fingerprint())
    log = own_log(profile, os.environ)
    assert log is not None
    said: list[str] = []
    log.append([record()])
    with open(log.cache_dir / LOG_FILE, "ab") as file:
        file.write(b"torn\n")
    assert log.corrections(SPEC, profile, said.append) == NO_CORRECTIONS
    (log.cache_dir / LOG_FILE).unlink()
    (log.cache_dir / LOG_FILE).mkdir()
    assert log.corrections(SPEC, profile, said.append) == NO_CORRECTIONS
    assert len(said) == 2
    assert "not used are 1 lines, which are damaged" in said[0]
    assert said[1].endswith("Is a directory; predictions are not calibrated")

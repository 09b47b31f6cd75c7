"""The calibration log: a line of JSON for each phase of each run, beside the stored profile."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hetero.errors import EnvironmentProblemError
from hetero.measure.store import (
    default_cache_dir,
    private_folder,
    why_foreign,
    write_atomically,
)
from planner.calibration import NO_CORRECTIONS, CalibrationRecord, Corrections, corrections
from planner.hardware import HardwareProfile
from planner.model_spec import ModelSpec
from planner.search import profile_fingerprint

LOG_FILE = "calibration.jsonl"
_LOCK_FILE = "calibration.lock"
# About 1500 lines; a run writes two.
MAX_LOG_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationLog:
    """The records of a log in the order of its lines, and how many lines were none."""

    records: tuple[CalibrationRecord, ...] = ()
    num_skipped: int = 0


def rates_fingerprint(profile: HardwareProfile) -> str:
    """Sixteen hex digits over a whole profile: two measurements of one machine differ."""
    return hashlib.sha256(profile.to_json()).hexdigest()[:16]


def append(cache_dir: Path, records: Iterable[CalibrationRecord]) -> None:
    """Add records to the log; of a log that grows too long the newer half is kept.

    Lines of two processes never mix, and a line that a killed process left half written spoils no
    other.

    Raises
    ------
    EnvironmentProblemError
        The cache folder is not safe, or the log cannot be written.
    """
    lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
    path = private_folder(cache_dir) / LOG_FILE
    try:
        with open(cache_dir / _LOCK_FILE, "w", opener=_open_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _append(path, lines)
            if path.stat().st_size > MAX_LOG_BYTES:
                write_atomically(path, _newer_half(path))
    except OSError as error:
        raise EnvironmentProblemError(f"cannot write {path}: {error.strerror}") from None


def read(cache_dir: Path) -> CalibrationLog:
    """The log of a cache folder; empty where there is none.

    Raises
    ------
    EnvironmentProblemError
        The file is there and cannot be read.
    """
    path = cache_dir / LOG_FILE
    try:
        data = _tail(path, 2 * MAX_LOG_BYTES)
    except FileNotFoundError:
        return CalibrationLog()
    except OSError as error:
        raise EnvironmentProblemError(f"cannot read {path}: {error.strerror}") from None
    records: list[CalibrationRecord] = []
    lines = [line for line in data.split(b"\n") if line]
    decoder = msgspec.json.Decoder(CalibrationRecord)
    for line in lines:
        try:
            records.append(decoder.decode(line))
        except (msgspec.DecodeError, RecursionError):
            continue
    return CalibrationLog(records=tuple(records), num_skipped=len(lines) - len(records))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileLog:
    """The part of a log that belongs to one measurement of a machine."""

    cache_dir: Path
    rates_fingerprint: str

    def append(self, records: Iterable[CalibrationRecord]) -> None:
        """Add records (see `append`)."""
        append(self.cache_dir, records)

    def corrections(
        self, spec: ModelSpec, hardware: HardwareProfile, say: Callable[[str], None]
    ) -> Corrections:
        """What a model's runs say of the part of the machine that may be used.

        A log that cannot be read, or lines of it, are told in one line; they stop nothing.
        """
        try:
            log = read(self.cache_dir)
        except EnvironmentProblemError as error:
            say(f"warning: {error}; predictions are not calibrated")
            return NO_CORRECTIONS
        if log.num_skipped:
            say(
                f"warning: of {self.cache_dir / LOG_FILE} not used are {log.num_skipped} lines, "
                "which are damaged or of another version of hetero"
            )
        return corrections(
            log.records,
            model_fingerprint=spec.fingerprint,
            profile_fingerprint=profile_fingerprint(hardware),
            rates_fingerprint=self.rates_fingerprint,
        )


def own_log(profile: HardwareProfile, environ: Mapping[str, str]) -> ProfileLog | None:
    """The log of a measurement of this very machine; None for any other profile.

    None too where the environment names no cache folder.
    """
    if profile.provenance != "measured" or why_foreign(profile) is not None:
        return None
    try:
        cache_dir = default_cache_dir(environ)
    except EnvironmentProblemError:
        return None
    return ProfileLog(cache_dir=cache_dir, rates_fingerprint=rates_fingerprint(profile))


def own_corrections(
    spec: ModelSpec,
    profile: HardwareProfile,
    hardware: HardwareProfile,
    environ: Mapping[str, str],
    say: Callable[[str], None],
) -> Corrections:
    """What a model's runs say of a part of a machine (`hardware`); nothing of any other machine."""
    log = own_log(profile, environ)
    return NO_CORRECTIONS if log is None else log.corrections(spec, hardware, say)


def _append(path: Path, lines: bytes) -> None:
    """Write whole lines in one call, after whatever a killed process left behind."""
    with open(path, "ab", buffering=0, opener=_open_private) as file:
        if file.tell() and _tail(path, 1) != b"\n":
            lines = b"\n" + lines
        if file.write(lines) != len(lines):
            raise OSError(0, "the disk is full")


def _tail(path: Path, num_bytes: int) -> bytes:
    """The last bytes of a file, of one that is longer."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - num_bytes))
        return file.read(num_bytes)


def _newer_half(path: Path) -> bytes:
    """The whole lines in the last half of what a log may hold."""
    _, _, lines = _tail(path, MAX_LOG_BYTES // 2).partition(b"\n")
    return lines


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)

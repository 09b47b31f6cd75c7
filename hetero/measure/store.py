"""Where measured profiles live: the cache folder and its safety, and profiles by name."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from hetero.errors import EnvironmentProblemError
from hetero.measure.fingerprint import describe_mismatch, machine_fingerprint
from planner.errors import ProfileError
from planner.fingerprint import Fingerprint
from planner.hardware import HardwareProfile

Origin = Literal["stored", "measured"]
Progress = Callable[[str], None]
Measure = Callable[[], HardwareProfile]

PROFILE_FILE = "machine.json"
_LOCK_FILE = "machine.lock"
_NUM_NEAREST_NAMES = 3


class CacheNotWritableError(EnvironmentProblemError):
    """The cache folder cannot be made or written; nothing is wrong with what it holds."""


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """The cache folder by the XDG base directory rules; it is not created.

    Raises
    ------
    EnvironmentProblemError
        Neither XDG_CACHE_HOME nor HOME is set.
    """
    xdg = environ.get("XDG_CACHE_HOME", "")
    # The rules say that a relative XDG_CACHE_HOME is to be ignored.
    if xdg.startswith("/"):
        return Path(xdg) / "hetero"
    home = environ.get("HOME", "")
    if not home:
        raise EnvironmentProblemError(
            "neither XDG_CACHE_HOME nor HOME is set, so there is no cache folder; set "
            "XDG_CACHE_HOME to a folder of your own"
        )
    return Path(home) / ".cache" / "hetero"


def kernel_cache_dir(cache_dir: Path) -> Path:
    """Where compiled kernels are kept (HETERO_KERNEL_CACHE); made if missing.

    Code is loaded from there, which is why it must be nobody else's.
    """
    return private_folder(private_folder(cache_dir) / "kernels")


def private_folder(path: Path) -> Path:
    """Make a folder that only its owner may enter; refuse one that others can write to.

    Raises
    ------
    CacheNotWritableError
        It cannot be made.
    EnvironmentProblemError
        It is not a folder, belongs to someone else, or others may write to it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        facts = path.stat()
    except OSError as error:
        raise CacheNotWritableError(
            f"cannot make the cache folder {path}: {error.strerror}; set XDG_CACHE_HOME to a "
            "folder that you can write to"
        ) from None
    fix = "remove it, or set XDG_CACHE_HOME to a folder of your own"
    if not stat.S_ISDIR(facts.st_mode):
        raise EnvironmentProblemError(f"the cache folder {path} is not a folder; {fix}")
    if facts.st_uid != os.geteuid():
        raise EnvironmentProblemError(
            f"the cache folder {path} belongs to user {facts.st_uid} but this is user "
            f"{os.geteuid()}, and compiled code is loaded from it; {fix}"
        )
    mode = stat.S_IMODE(facts.st_mode)
    if mode & 0o022:
        raise EnvironmentProblemError(
            f"other users may write to the cache folder {path} (mode {mode:04o}), and compiled "
            f"code is loaded from it; run: chmod 700 {path}"
        )
    return path


def write_atomically(path: Path, data: bytes, *, is_private: bool = True) -> None:
    """Write a file so that a reader sees the old contents or the new, never a part.

    Parameters
    ----------
    path, data
        The file and its new contents.
    is_private
        True for a file of the cache, which only its owner may read; False for one that the user
        asked for, which gets the permissions of any new file.

    Raises
    ------
    CacheNotWritableError
        A file of the cache cannot be written.
    EnvironmentProblemError
        Another file cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            try:
                file.write(data)
                file.flush()
                if not is_private:
                    os.fchmod(file.fileno(), 0o666 & ~_umask())
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        kind = CacheNotWritableError if is_private else EnvironmentProblemError
        raise kind(f"cannot write {path}: {error.strerror}") from None


def _umask() -> int:
    # The system tells it only by setting another.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def store_profile(cache_dir: Path, profile: HardwareProfile) -> Path:
    """Keep this machine's profile for the next time; returns its file."""
    path = private_folder(cache_dir) / PROFILE_FILE
    write_atomically(path, profile.to_json())
    return path


def stored_profile(cache_dir: Path) -> HardwareProfile | None:
    """The profile that was stored, whatever machine it is of; None where there is none.

    Raises
    ------
    ProfileError
        The file is there and cannot be read as a profile.
    """
    path = cache_dir / PROFILE_FILE
    return HardwareProfile.load(path) if path.exists() else None


def why_foreign(profile: HardwareProfile, here: Fingerprint | None = None) -> str | None:
    """Say why a measured profile is not of this machine and these versions; None where it is."""
    measured = profile.fingerprint
    if measured is None:
        return "it says of no machine that it was measured there"
    if here is None:
        here = machine_fingerprint(prefer_gpu_uuid=measured.gpu_uuid)
    return describe_mismatch(measured, here)


def load_or_measure(
    cache_dir: Path,
    *,
    quick: bool = True,
    progress: Progress | None = None,
    measure: Measure | None = None,
) -> tuple[HardwareProfile, Origin]:
    """The stored profile of this machine, or else a new measurement, which is then stored.

    Where the cache folder cannot be written a new measurement is used and not stored, which is
    said in one line.

    Parameters
    ----------
    cache_dir
        Usually `default_cache_dir(os.environ)`.
    quick
        Whether a new measurement is a quick one.
    progress
        Called with one line before each part, and with the reason of a new measurement.
    measure
        What measures; `hetero.measure.machine.measure_machine` unless a test says otherwise.

    Returns
    -------
    profile, origin
        `origin` says whether it was "stored" or "measured" now.

    Raises
    ------
    EnvironmentProblemError
        The cache folder is not safe.
    """
    say = progress or _ignore
    measured, reason = None, "there is no folder to store a profile in"
    try:
        private_folder(cache_dir)
        stored, reason = _usable_profile(cache_dir)
        if stored is not None:
            return stored, "stored"
        with measuring(cache_dir, say):
            # Whoever held the lock has measured meanwhile.
            stored, reason = _usable_profile(cache_dir)
            if stored is not None:
                return stored, "stored"
            measured = _measured(quick, say, measure, reason)
            say(f"stored the profile in {store_profile(cache_dir, measured)}")
    except CacheNotWritableError as error:
        if measured is None:
            measured = _measured(quick, say, measure, reason)
        say(f"warning: the profile is not stored and will be measured again: {error}")
    return measured, "measured"


@contextlib.contextmanager
def measuring(cache_dir: Path, say: Progress) -> Iterator[None]:
    """Measure alone: two at once would spoil each other's rates, so the second waits.

    Raises
    ------
    CacheNotWritableError
        The cache folder, where the lock lies, cannot be written.
    EnvironmentProblemError
        The cache folder is not safe.
    """
    path = private_folder(cache_dir) / _LOCK_FILE
    try:
        file = open(path, "w", opener=_open_private)  # noqa: SIM115
    except OSError as error:
        raise CacheNotWritableError(
            f"cannot write {path}: {error.strerror}; set XDG_CACHE_HOME to a folder that you can "
            "write to"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another hetero is measuring this machine: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_profile(name_or_path: str) -> HardwareProfile:
    """A reference machine of `profiles/machines` by its name, or a profile by its path.

    Raises
    ------
    ProfileError
        There is neither (the message lists the names), or the file is not a profile.
    """
    machines = _machine_files()
    if name_or_path in machines:
        source = f"profiles/machines/{name_or_path}.json"
        return HardwareProfile.from_json(machines[name_or_path].read_bytes(), source=source)
    path = Path(name_or_path).expanduser()
    if path.suffix == ".json" or path.exists() or "/" in name_or_path:
        return HardwareProfile.load(path)
    near = difflib.get_close_matches(name_or_path, machines, n=_NUM_NEAREST_NAMES, cutoff=0.0)
    raise ProfileError(
        f"there is no profile {name_or_path!r}; give the path of a JSON file, or a reference "
        f"machine, nearest first: {', '.join(near)} (hetero profile --list lists all "
        f"{len(machines)})"
    )


def machine_names() -> tuple[str, ...]:
    """Names of the reference machines that ship in `profiles/machines/`."""
    return tuple(_machine_files())


def _machine_files() -> dict[str, Traversable]:
    files = (resources.files("profiles") / "machines").iterdir()
    found = {file.name.removesuffix(".json"): file for file in files if file.name.endswith(".json")}
    return dict(sorted(found.items()))


def _usable_profile(cache_dir: Path) -> tuple[HardwareProfile | None, str]:
    """The stored profile if it is of this machine, otherwise why there is none to use."""
    try:
        profile = stored_profile(cache_dir)
    except ProfileError as error:
        return None, f"the stored profile is not used, {error}"
    if profile is None:
        return None, "it has no stored profile"
    foreign = why_foreign(profile)
    if foreign is not None:
        return None, f"the stored profile is not used, {foreign}"
    return profile, ""


def _measured(quick: bool, say: Progress, measure: Measure | None, reason: str) -> HardwareProfile:
    say(f"measuring this machine {'quickly (about 10 s)' if quick else '(about 90 s)'}: {reason}")
    if measure is not None:
        return measure()
    # Here and not above: with a stored profile `hetero plan` runs without torch and numba.
    from hetero.measure.machine import measure_machine

    return measure_machine(quick=quick, progress=say)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _ignore(line: str) -> None:
    pass

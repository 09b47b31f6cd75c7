"""Where measured profiles live: the cache folder and its safety, and profiles by name."""

from __future__ import annotations

import contextlib
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
from planner.hardware import Fingerprint, HardwareProfile

Origin = Literal["stored", "measured"]
Progress = Callable[[str], None]
Measure = Callable[[], HardwareProfile]

PROFILE_FILE = "machine.json"
_LOCK_FILE = "machine.lock"


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
    EnvironmentProblemError
        It cannot be made, is not a folder, belongs to someone else, or others may write to it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        facts = path.stat()
    except OSError as error:
        raise EnvironmentProblemError(
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
    EnvironmentProblemError
        The file cannot be written.
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
        raise EnvironmentProblemError(f"cannot write {path}: {error.strerror}") from None


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
        The cache folder is not safe or not writable.
    """
    say = progress or _ignore
    private_folder(cache_dir)
    profile, reason = _usable_profile(cache_dir)
    if profile is not None:
        return profile, "stored"
    with _locked(cache_dir / _LOCK_FILE, say):
        # Whoever held the lock has measured meanwhile; two at once would spoil each other's rates.
        profile, reason = _usable_profile(cache_dir)
        if profile is not None:
            return profile, "stored"
        kind = "quickly (about 10 s)" if quick else "(about 60 s)"
        say(f"measuring this machine {kind}: {reason}")
        profile = measure() if measure is not None else _measure(quick, say)
        path = store_profile(cache_dir, profile)
        say(f"stored the profile in {path}")
    return profile, "measured"


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
    raise ProfileError(
        f"there is no profile {name_or_path!r}; give the path of a JSON file or one of: "
        f"{', '.join(machines) or 'none'}"
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


def _measure(quick: bool, say: Progress) -> HardwareProfile:
    # Here and not above: with a stored profile `hetero plan` runs without torch and numba.
    from hetero.measure.machine import measure_machine

    return measure_machine(quick=quick, progress=say)


@contextlib.contextmanager
def _locked(path: Path, say: Progress) -> Iterator[None]:
    """Hold a lock file for the block; wait for whoever holds it."""
    with open(path, "w", opener=_open_private) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another hetero is measuring this machine: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _ignore(line: str) -> None:
    pass

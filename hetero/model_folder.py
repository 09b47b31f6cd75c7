"""Files of a model folder, which is hostile input: nothing outside it, nothing without a bound."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from hetero.errors import ModelFolderError

MAX_JSON_BYTES = 1 << 20
_MAX_JSON_DEPTH = 64
_GIT_LFS_PREFIX = b"version https://git-lfs"


def printable(name: str) -> str:
    """An untrusted name for a message: quoted, short, without control characters."""
    text = ascii(name)
    return text if len(text) <= 120 else text[:117] + "..."


def open_file(folder: Path, name: str) -> int:
    """Open a file of the folder for reading and return its descriptor.

    Symbolic links may lead only to where the folder itself is, or, in a snapshot of the Hugging
    Face cache (`models--org--name/snapshots/<revision>`), to `blobs/` of the same repository.

    Raises
    ------
    FileNotFoundError
        There is no such file (a dangling link says where it leads).
    ModelFolderError
        The name is not a plain file name, the file lies outside, or is not a regular file.
    """
    if name in ("", ".", "..") or any(char in name for char in "/\\\0") or len(name) > 255:
        raise ModelFolderError(
            f"{printable(name)} is not a plain file name; files must lie inside {folder}"
        )
    path = folder / name
    try:
        home = folder.resolve()
        real = path.resolve()
        if not any(real.is_relative_to(allowed) for allowed in (home, *_blob_folders(home))):
            raise ModelFolderError(f"{path} is a link to {real}, which is outside {folder}")
        # Non-blocking: opening a FIFO would otherwise wait for a writer.
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise ModelFolderError(
                f"{path} is a link to {os.readlink(path)}, which is missing; download it again"
            ) from None
        raise FileNotFoundError(f"{path} is missing") from None
    except OSError as error:
        raise ModelFolderError(f"cannot open {path}: {error.strerror}") from None
    except RuntimeError:  # pathlib before 3.13
        raise ModelFolderError(f"{path} is a link that leads to itself") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelFolderError(f"{path} is not a regular file")
    return descriptor


def _blob_folders(home: Path) -> list[Path]:
    repository = home.parent.parent
    is_snapshot = home.parent.name == "snapshots" and repository.name.startswith("models--")
    return [repository / "blobs"] if is_snapshot else []


def read_bytes(folder: Path, name: str, max_bytes: int) -> bytes | None:
    """Read a whole file of the folder; None where it is missing.

    Raises
    ------
    ModelFolderError
        The file is larger than `max_bytes`, is a Git LFS pointer, or what `open_file` refuses.
    """
    try:
        descriptor = open_file(folder, name)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise ModelFolderError(
                f"{folder / name} has {size} bytes but at most {max_bytes} are read"
            )
        try:
            data = file.read(max_bytes)
        except OSError as error:
            raise ModelFolderError(f"cannot read {folder / name}: {error.strerror}") from None
    if is_git_lfs_pointer(data):
        raise ModelFolderError(git_lfs_sentence(folder / name))
    return data


def is_git_lfs_pointer(data: bytes) -> bool:
    return data.startswith(_GIT_LFS_PREFIX)


def git_lfs_sentence(path: Path) -> str:
    return f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull"


def read_json(folder: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """Read a JSON object of the folder; None where the file is missing.

    Raises
    ------
    ModelFolderError
        Too large, not UTF-8, not JSON, nested deeper than 64, not an object.
    """
    data = read_bytes(folder, name, max_bytes)
    return None if data is None else parse_json(data, folder / name)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Decode a JSON object; `path` names it in errors."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ModelFolderError(_depth_sentence(path)) from None
    except UnicodeDecodeError as error:
        raise ModelFolderError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}"
        ) from None
    except ValueError as error:
        raise ModelFolderError(f"{path} is not JSON: {error}") from None
    if _depth(value) > _MAX_JSON_DEPTH:
        raise ModelFolderError(_depth_sentence(path))
    if not isinstance(value, dict):
        raise ModelFolderError(
            f"{path} holds a JSON {type(value).__name__} but must hold an object"
        )
    return value


def _depth_sentence(path: Path) -> str:
    return f"{path} is nested deeper than {_MAX_JSON_DEPTH} levels"


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        depth += bool(containers)
    return depth

"""Checkpoint: the tensors of a model folder by name; everything is checked before any is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from hetero.errors import ModelFolderError
from hetero.model_folder import open_file, parse_json, printable, read_bytes
from hetero.safetensors_header import TensorInfo, read_header

__all__ = ["Checkpoint", "TensorInfo"]

_INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# One preadv moves at most 2 GiB; smaller parts let Ctrl-C through on a slow disk.
_CHUNK_BYTES = 64 << 20
_MAX_SHOWN = 3
_READABLE_DTYPES = ("F32", "BF16", "F16")


class Checkpoint:
    """Open weight files of a folder.

    Files are read with `pread` into the caller's buffers and never mapped: a file that shrinks
    while mapped kills the process. Reading is safe from several threads; closing is not.
    """

    def __init__(
        self, *, folder: Path, tensors: Mapping[str, TensorInfo], descriptors: dict[str, int]
    ) -> None:
        self.folder = folder
        self.tensors = MappingProxyType(dict(tensors))
        self._descriptors = descriptors
        self._unexpected: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open every weight file of the folder and read its header.

        Raises
        ------
        ModelFolderError
            How much is wrong with the files, and the first of it, in one message.
        """
        if not folder.is_dir():
            raise ModelFolderError(f"{folder} is not a folder")
        problems: list[str] = []
        weight_map = _read_index(folder, problems)
        shards = sorted(set(weight_map.values())) if weight_map is not None else []
        if weight_map is None and not problems:
            shards = [_single_file(folder)]
        descriptors: dict[str, int] = {}
        by_shard: dict[str, dict[str, TensorInfo]] = {}
        try:
            for shard in shards:
                try:
                    descriptors[shard] = open_file(folder, shard)
                    by_shard[shard] = read_header(descriptors[shard], Path(shard))
                except FileNotFoundError:
                    problems.append(f"{shard} is missing; download it again")
                except ModelFolderError as error:
                    problems.append(_inside(folder, error))
                except OSError as error:
                    problems.append(f"cannot read {shard}: {error.strerror}")
            tensors: dict[str, TensorInfo] = {}
            if weight_map is None:
                tensors = {name: t for found in by_shard.values() for name, t in found.items()}
            else:
                tensors = _indexed_tensors(weight_map, by_shard, problems)
            _raise_problems(folder, problems)
            if not tensors:
                raise ModelFolderError(f"{folder}: the weight files hold no tensors")
        except BaseException:
            _close(descriptors)
            raise
        return cls(folder=folder, tensors=tensors, descriptors=descriptors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        _close(self._descriptors)

    @property
    def unexpected_tensors(self) -> tuple[str, ...]:
        """Tensors that `check_tensors` did not expect, such as rotary buffers of old files."""
        return self._unexpected

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with what config.json promises.

        Parameters
        ----------
        expected : mapping
            Shape by tensor name.

        Raises
        ------
        ModelFolderError
            Missing tensors, other shapes, formats that cannot be read: all counted in one message.
        """
        missing = [name for name in expected if name not in self.tensors]
        problems = []
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            problems.append(
                f"{len(missing)} of {len(expected)} tensors that config.json asks for are missing: "
                f"{some}"
            )
        for name, shape in expected.items():
            found = self.tensors.get(name)
            if found is None:
                continue
            if found.shape != tuple(shape):
                problems.append(
                    f"{name} in {found.shard} has shape {list(found.shape)} but config.json says "
                    f"{list(shape)}"
                )
            if found.dtype not in _READABLE_DTYPES:
                problems.append(
                    f"{name} in {found.shard} is {found.dtype}; supported: "
                    f"{', '.join(_READABLE_DTYPES)}"
                )
        self._unexpected = tuple(name for name in self.tensors if name not in expected)
        _raise_problems(self.folder, problems)

    def read_into(self, name: str, buffer: memoryview | bytearray, begin: int = 0) -> None:
        """Read a tensor's bytes, from one of them on, into a writable buffer.

        Raises
        ------
        ModelFolderError
            No such tensor, the file was truncated since it was opened, or reading failed.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelFolderError(f"{self.folder} has no tensor {printable(name)}")
        view = memoryview(buffer)
        end = begin + view.nbytes
        assert end <= tensor.num_bytes, (name, end, tensor.num_bytes)
        if view.nbytes == 0:  # which cast() refuses
            return
        path = self.folder / tensor.shard
        descriptor = self._descriptors[tensor.shard]
        view = view.cast("B")
        done = 0
        while done < view.nbytes:
            part = view[done : done + _CHUNK_BYTES]
            try:
                num_read = os.preadv(descriptor, [part], tensor.offset + begin + done)
            except OSError as error:
                raise ModelFolderError(f"cannot read {path}: {error.strerror}") from None
            if num_read == 0:
                raise ModelFolderError(
                    f"{path} was truncated while reading: {printable(name)} ends at byte "
                    f"{tensor.offset + tensor.num_bytes} but the file ends at "
                    f"{os.fstat(descriptor).st_size}; download it again"
                )
            done += num_read


def _close(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _raise_problems(folder: Path, problems: list[str]) -> None:
    if not problems:
        return
    if len(problems) == 1:
        raise ModelFolderError(f"{folder}: {problems[0]}")
    shown = problems[:_MAX_SHOWN]
    if len(problems) > _MAX_SHOWN:
        shown.append(f"and {len(problems) - _MAX_SHOWN} more")
    raise ModelFolderError(f"{folder} has {len(problems)} problems: {'; '.join(shown)}")


def _inside(folder: Path, error: ModelFolderError) -> str:
    """A problem with a file of the folder, which is named once, before all problems."""
    return str(error).replace(f"{folder}{os.sep}", "", 1)


def _read_index(folder: Path, problems: list[str]) -> dict[str, str] | None:
    """Tensor name -> shard of the index; None where the folder has none or it cannot be used."""
    try:
        data = read_bytes(folder, _INDEX_NAME, _MAX_INDEX_BYTES)
        if data is None:
            return None
        weight_map = parse_json(data, Path(_INDEX_NAME)).get("weight_map")
    except ModelFolderError as error:
        problems.append(_inside(folder, error))
        return None
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{_INDEX_NAME} has no weight_map with entries")
        return None
    usable = {}
    refused: set[str] = set()
    for name, shard in weight_map.items():
        if isinstance(shard, str) and _is_plain_shard_name(shard):
            usable[name] = shard
        else:
            refused.add(printable(shard) if isinstance(shard, str) else type(shard).__name__)
    problems += [
        f"{_INDEX_NAME} names the shard {shard}, which is not the name of a .safetensors file "
        "inside the folder"
        for shard in sorted(refused)
    ]
    return usable


def _is_plain_shard_name(name: str) -> bool:
    is_plain = name.isprintable() and not any(char in name for char in "/\\") and len(name) <= 255
    return is_plain and name.endswith(".safetensors") and not name.startswith(".")


def _indexed_tensors(
    weight_map: Mapping[str, str],
    by_shard: Mapping[str, Mapping[str, TensorInfo]],
    problems: list[str],
) -> dict[str, TensorInfo]:
    tensors = {}
    absent: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if shard not in by_shard:
            continue  # the shard itself is already a problem
        if name in by_shard[shard]:
            tensors[name] = by_shard[shard][name]
        else:
            absent.setdefault(shard, []).append(name)
    problems += [
        f"{shard} lacks {len(names)} tensors that {_INDEX_NAME} places there: "
        f"{', '.join(printable(name) for name in names[:5])}"
        for shard, names in absent.items()
    ]
    return tensors


def _single_file(folder: Path) -> str:
    """The weight file of a folder without an index."""
    names = sorted(entry.name for entry in os.scandir(folder))
    if "model.safetensors" in names:
        return "model.safetensors"
    found = [name for name in names if _is_plain_shard_name(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelFolderError(
            f"{folder} has {len(found)} .safetensors files but no {_INDEX_NAME}; download the index"
        )
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise ModelFolderError(
            f"{folder} has weights only as {printable(pickles[0])}, a pickle, which can run code "
            "when read; convert it: load it where you trust it and save_pretrained(folder, "
            "safe_serialization=True)"
        )
    raise ModelFolderError(
        f"{folder} has no weights (model.safetensors); a folder or name without weights can be "
        "planned but not run"
    )

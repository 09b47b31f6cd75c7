"""The header of a safetensors file: which tensor lies where; read and checked without the weights.

Layout: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}},
then the data. The checks are those of the `safetensors` library (no holes, no overlaps, nothing
after the last tensor) and some it lacks (duplicate keys, a stated number of tensors).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hetero.errors import ModelFolderError
from hetero.model_folder import git_lfs_sentence, is_git_lfs_pointer, printable

MAX_HEADER_BYTES = 100_000_000
_MAX_TENSORS = 1_000_000
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = (1 << 63) - 1
_PREFIX_BYTES = 8

_DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: `offset` counts from the start of the file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    num_bytes: int


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(descriptor: int, path: Path) -> dict[str, TensorInfo]:
    """Read the header of an open safetensors file.

    Raises
    ------
    ModelFolderError
        The first thing that is wrong with the file, which `path` names.
    """
    file_bytes = os.fstat(descriptor).st_size
    if file_bytes == 0:
        raise ModelFolderError(f"{path} is empty; download it again")
    start = os.pread(descriptor, 64, 0)
    if is_git_lfs_pointer(start):
        raise ModelFolderError(git_lfs_sentence(path))
    if file_bytes < _PREFIX_BYTES:
        raise ModelFolderError(
            f"{path} has {file_bytes} bytes but a safetensors file begins with {_PREFIX_BYTES} "
            "bytes of length; download it again"
        )
    header_bytes = int.from_bytes(start[:_PREFIX_BYTES], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ModelFolderError(
            f"{path} says its header has {header_bytes} bytes but at most {MAX_HEADER_BYTES} are "
            "read; this is not a safetensors file"
        )
    data_start = _PREFIX_BYTES + header_bytes
    if data_start > file_bytes:
        raise ModelFolderError(
            f"{path} is truncated inside its header: it has {file_bytes} bytes but the header "
            f"ends at {data_start}; download it again"
        )
    header = os.pread(descriptor, header_bytes, _PREFIX_BYTES)
    if len(header) != header_bytes:
        raise ModelFolderError(
            f"{path}: {len(header)} bytes of header could be read but it has {header_bytes}"
        )
    entries = _decode(header, path)
    tensors = {name: _tensor_info(name, entry, data_start, path) for name, entry in entries.items()}
    _check_coverage(tensors, data_start, file_bytes, path)
    return tensors


def _decode(header: bytes, path: Path) -> dict[str, _Entry]:
    # The typed pass comes first: it stops at the first odd value, so that 100 MB of nested lists
    # never become Python objects.
    if not header.startswith(b"{"):
        raise ModelFolderError(f"{path}: the header is not a JSON object")
    entries: dict[str, _Entry] = {}
    name = ""
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        if len(raw) > _MAX_TENSORS:
            raise ModelFolderError(
                f"{path} lists {len(raw)} tensors but at most {_MAX_TENSORS} are read"
            )
        for name, value in raw.items():
            if name == "__metadata__":
                msgspec.json.decode(value, type=dict[str, str])
            else:
                entries[name] = msgspec.json.decode(value, type=_Entry)
        name = ""
        json.loads(header.decode(), object_pairs_hook=_refuse_duplicates)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        where = f"entry {printable(name)} of the header" if name else "the header"
        raise ModelFolderError(f"{path}: {where} is not valid: {error}") from None
    return entries


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {printable(name)} occurs twice")
            seen.add(name)
    return result


def _tensor_info(name: str, entry: _Entry, data_start: int, path: Path) -> TensorInfo:
    bits = _DTYPE_BITS.get(entry.dtype)
    if bits is None:
        raise ModelFolderError(
            f"{path}: {printable(name)} has the unknown dtype {printable(entry.dtype)}"
        )
    begin, end = entry.data_offsets
    if not 0 <= begin <= end:
        raise ModelFolderError(f"{path}: {printable(name)} begins at {begin} but ends at {end}")
    if len(entry.shape) > _MAX_DIMENSIONS or min(entry.shape, default=0) < 0:
        raise ModelFolderError(
            f"{path}: the shape of {printable(name)} has {len(entry.shape)} dimensions, the "
            f"smallest {min(entry.shape)}; allowed are {_MAX_DIMENSIONS} of at least 0"
        )
    num_elements = 1
    for length in entry.shape:
        num_elements *= length
        if num_elements > _MAX_ELEMENTS:
            raise ModelFolderError(
                f"{path}: the shape of {printable(name)} overflows 63 bits of elements"
            )
    if num_elements * bits != 8 * (end - begin):
        raise ModelFolderError(
            f"{path}: {printable(name)} needs {num_elements * bits / 8:g} bytes for "
            f"{list(entry.shape)} {entry.dtype} but its offsets span {end - begin}"
        )
    return TensorInfo(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        shard=path.name,
        offset=data_start + begin,
        num_bytes=end - begin,
    )


def _check_coverage(
    tensors: dict[str, TensorInfo], data_start: int, file_bytes: int, path: Path
) -> None:
    """The tensors fill the data exactly: no overlap, no hole, nothing after the last one."""
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != position:
            what = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole"
            raise ModelFolderError(
                f"{path}: {printable(tensor.name)} {what}: it begins at byte {tensor.offset} but "
                f"the one before ends at {position}"
            )
        position += tensor.num_bytes
    if position > file_bytes:
        raise ModelFolderError(
            f"{path} is truncated: it has {file_bytes} bytes but its tensors end at {position}; "
            "download it again"
        )
    if position < file_bytes:
        raise ModelFolderError(
            f"{path} has {file_bytes} bytes but its tensors end at {position}; download it again"
        )

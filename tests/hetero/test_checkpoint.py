"""Checkpoint and the header reader: every damage is found before a tensor is read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.checkpoint import Checkpoint
from hetero.errors import ModelFolderError
from hetero.safetensors_header import read_header

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4976698672\n"


def write_file(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def save(folder: Path, name: str, **tensors: Any) -> None:
    safetensors.numpy.save_file(
        {key.replace("__", "."): t for key, t in tensors.items()}, folder / name
    )


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def sharded(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b.weight": np.arange(5, dtype=np.float16),
        "c.weight": np.array(7.0, dtype=np.float32),
    }
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    safetensors.numpy.save_file({"a.weight": tensors["a.weight"]}, folder / first)
    safetensors.numpy.save_file({k: tensors[k] for k in ("b.weight", "c.weight")}, folder / second)
    write_index(folder, {"a.weight": first, "b.weight": second, "c.weight": second})
    return tensors


def open_error(folder: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


def test_shards_are_read_as_the_library_wrote_them(tmp_path: Path) -> None:
    """Names, shapes, formats and bytes of every tensor of an indexed checkpoint."""
    tensors = sharded(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        for name, expected in tensors.items():
            info = checkpoint.tensors[name]
            buffer = bytearray(info.num_bytes)
            checkpoint.read_into(name, buffer)
            assert bytes(buffer) == expected.tobytes()
            assert info.shape == expected.shape
        assert checkpoint.tensors["b.weight"].dtype == "F16"


def test_a_large_tensor_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor larger than one read arrives whole, also into a buffer of another shape."""
    monkeypatch.setattr("hetero.checkpoint._CHUNK_BYTES", 1000)
    expected = np.random.default_rng(0).random((37, 91), dtype=np.float32)
    save(tmp_path, "model.safetensors", w=expected, empty=np.zeros((0, 3), np.float32))
    actual = np.full((37, 91), np.nan, dtype=np.float32)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read_into("w", actual.data)
        checkpoint.read_into("empty", bytearray())
    np.testing.assert_array_equal(actual, expected)


def test_a_single_file_of_another_name_is_found(tmp_path: Path) -> None:
    """One .safetensors file needs no index, whatever it is called."""
    save(tmp_path, "weights.safetensors", w=np.zeros(3, np.float32))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.tensors["w"].shard == "weights.safetensors"


def test_opening_leaves_no_file_open_after_an_error_or_close(tmp_path: Path) -> None:
    """Descriptors do not leak."""
    before = len(os.listdir("/proc/self/fd"))
    sharded(tmp_path)
    Checkpoint.open(tmp_path).close()
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    open_error(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    """A missing shard, an empty one and an LFS pointer appear in one message."""
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"})
    (tmp_path / "2.safetensors").write_bytes(b"")
    (tmp_path / "3.safetensors").write_bytes(LFS_POINTER)
    message = open_error(tmp_path)
    assert "has 3 problems" in message
    assert "1.safetensors is missing" in message
    assert "2.safetensors is empty" in message
    assert "3.safetensors is a Git LFS pointer, not the file itself; run: git lfs pull" in message


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    """Thirty missing shards are counted, three are named."""
    write_index(tmp_path, {str(i): f"{i:02}.safetensors" for i in range(30)})
    message = open_error(tmp_path)
    assert "has 30 problems" in message
    assert message.endswith("02.safetensors is missing; download it again; and 27 more")


@pytest.mark.parametrize(
    "shard",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "../model.safetensors",
        "sub/model.safetensors",
        "a\\b.safetensors",
        "model\0.safetensors",
        "\x1b[31mmodel.safetensors",
        "..",
        "",
        ".safetensors",
        "model.bin",
        "x" * 300 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_a_shard_name_that_is_no_plain_file_name_is_refused(tmp_path: Path, shard: object) -> None:
    """The index cannot lead out of the folder, nor write to the terminal."""
    write_index(tmp_path, {"w": shard})
    message = open_error(tmp_path)
    assert "not the name of a .safetensors file inside the folder" in message
    assert message.isprintable()


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A symbolic link is no way out either."""
    outside, folder = tmp_path / "secret.safetensors", tmp_path / "model"
    folder.mkdir()
    save(tmp_path, outside.name, w=np.zeros(3, np.float32))
    (folder / "model.safetensors").symlink_to(outside)
    assert "which is outside" in open_error(folder)


def test_links_into_blobs_of_the_same_cache_repository_are_followed(tmp_path: Path) -> None:
    """The layout of the Hugging Face cache works; blobs of another repository do not count."""
    for repository in ("models--org--name", "models--evil--twin"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
        save(tmp_path / repository / "blobs", "0123abcd", w=np.zeros(3, np.float32))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    weights = snapshot / "model.safetensors"
    weights.symlink_to("../../blobs/0123abcd")
    with Checkpoint.open(snapshot) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
    weights.unlink()
    weights.symlink_to("../../../models--evil--twin/blobs/0123abcd")
    assert "which is outside" in open_error(snapshot)
    weights.unlink()
    weights.symlink_to("../../blobs/gone")
    assert "is missing; download it again" in open_error(snapshot)
    weights.unlink()
    weights.symlink_to("model.safetensors")
    open_error(snapshot)


def test_a_pipe_does_not_hang_the_reader(tmp_path: Path) -> None:
    """Only regular files are read."""
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in open_error(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl"])
def test_pickles_are_refused_with_a_hint(tmp_path: Path, name: str) -> None:
    """Reading a pickle runs code: hetero says how to convert it."""
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = open_error(tmp_path)
    assert name in message
    assert "safe_serialization=True" in message


def test_folders_without_usable_weights_say_what_is_missing(tmp_path: Path) -> None:
    """No folder, no weights, several files without an index, an index without entries."""
    assert "is not a folder" in open_error(tmp_path / "gone")
    assert "has no weights" in open_error(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save(tmp_path, name, w=np.zeros(1, np.float32))
    assert "2 .safetensors files but no model.safetensors.index.json" in open_error(tmp_path)
    write_index(tmp_path, {})
    assert "no weight_map with entries" in open_error(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is not JSON" in open_error(tmp_path)


def test_a_tensor_of_the_index_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    """The index and the shards agree."""
    save(tmp_path, "one.safetensors", w=np.zeros(1, np.float32))
    write_index(tmp_path, {"w": "one.safetensors", "other": "one.safetensors"})
    assert "one.safetensors lacks 1 tensors" in open_error(tmp_path)
    assert "'other'" in open_error(tmp_path)


def test_truncation_while_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """A file that shrinks after it was checked gives both numbers, not SIGBUS."""
    save(tmp_path, "model.safetensors", w=np.zeros(1000, np.float32))
    path = tmp_path / "model.safetensors"
    with Checkpoint.open(tmp_path) as checkpoint:
        end = path.stat().st_size
        os.truncate(path, 500)
        with pytest.raises(
            ModelFolderError,
            match=rf"model.safetensors was truncated while reading.*{end}.* ends at 500",
        ):
            checkpoint.read_into("w", bytearray(4000))


def test_a_tensor_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """Asking for an unknown name does not end in a KeyError."""
    save(tmp_path, "model.safetensors", w=np.zeros(1, np.float32))
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(ModelFolderError, match="no tensor"),
    ):
        checkpoint.read_into("v", bytearray(4))


# --- the config against the tensors -----------------------------------------------------------


def test_shapes_that_disagree_with_the_config_are_reported_together(tmp_path: Path) -> None:
    """Missing names are counted, each wrong shape shows both shapes."""
    save(
        tmp_path,
        "model.safetensors",
        a=np.zeros((3, 4), np.float32),
        b=np.zeros((2, 2), np.float32),
        c=np.zeros(2, np.int8),
        inv_freq=np.zeros(2, np.float32),
    )
    expected: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (4, 2), "c": (2,)}
    expected |= {f"layers.{i}": (1,) for i in range(7)}
    with Checkpoint.open(tmp_path) as checkpoint:
        with pytest.raises(ModelFolderError) as caught:
            checkpoint.check_tensors(expected)
        message = str(caught.value)
        assert (
            "7 of 10 tensors that config.json asks for are missing: layers.0, layers.1" in message
        )
        assert "layers.5" not in message
        assert "b in model.safetensors has shape [2, 2] but config.json says [4, 2]" in message
        assert "c in model.safetensors is I8; supported: F32, BF16, F16" in message
        assert checkpoint.unexpected_tensors == ("inv_freq",)


def test_a_path_is_named_once(tmp_path: Path) -> None:
    """Before the problem, not again in it."""
    file = tmp_path / "model.safetensors"
    write_file(file, {"w": entry(0, 8, [2])}, bytes(7))
    message = open_error(tmp_path)
    assert message.startswith(f"{tmp_path}: model.safetensors is truncated: it has ")
    assert message.count(str(tmp_path)) == 1
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    assert open_error(tmp_path).startswith(f"{tmp_path}: model.safetensors is a link to ")


# --- damaged headers ---------------------------------------------------------------------------

GOOD = {"w": entry(0, 8, [2]), "v": entry(8, 12, [])}

DAMAGED: dict[str, tuple[object, bytes, str]] = {
    "unknown dtype": ({"w": entry(0, 8, [2], "F33")}, bytes(8), "unknown dtype 'F33'"),
    "size lies": ({"w": entry(0, 8, [3])}, bytes(8), "needs 12 bytes for .* span 8"),
    "end before begin": ({"w": entry(8, 4, [1])}, bytes(8), "begins at 8 but ends at 4"),
    "negative offset": ({"w": entry(-4, 4, [2])}, bytes(8), "begins at -4"),
    "negative length": ({"w": entry(0, 8, [-2])}, bytes(8), "the smallest -2"),
    "two negative lengths": ({"w": entry(0, 8, [-1, -2])}, bytes(8), "the smallest -2"),
    "overflow": ({"w": entry(0, 8, [1 << 40, 1 << 40])}, bytes(8), "overflows 63 bits"),
    "overflow to zero": ({"w": entry(0, 0, [1 << 62, 4, 0])}, b"", "overflows 63 bits"),
    "overlap": ({"w": entry(0, 8, [2]), "v": entry(4, 12, [2])}, bytes(12), "overlaps"),
    "hole": ({"w": entry(0, 8, [2]), "v": entry(12, 16, [1])}, bytes(16), "leaves a hole"),
    "hole at the start": ({"w": entry(4, 12, [2])}, bytes(12), "leaves a hole"),
    "truncated data": (GOOD, bytes(11), "truncated: it has .* but its tensors end at"),
    "trailing data": (GOOD, bytes(13), "but its tensors end at"),
    "not an object": (b"[1]", b"", "not a JSON object"),
    "number": (b"1", b"", "not a JSON object"),
    "not JSON": (b"{", b"", "is not valid"),
    "not text": (b'{"\xff\xff": 1}', b"", "is not valid"),
    "nested": (b'{"w":' * 100_000, b"", "is not valid"),
    "huge number": (b'{"w":{"dtype":"F32","shape":[' + b"9" * 9999 + b"]}}", b"", "is not valid"),
    "entry is a list": ({"w": [1]}, b"", "entry 'w' of the header is not valid"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), "shape"),
    "three offsets": ({"w": entry(0, 4, [1]) | {"data_offsets": [0, 4, 4]}}, bytes(4), "length 2"),
    "fraction": ({"w": entry(0, 4, [1]) | {"shape": [1.0]}}, bytes(4), "float"),
    "true": ({"w": entry(0, 4, [1]) | {"shape": [True]}}, bytes(4), "bool"),
    "unknown field": ({"w": entry(0, 4, [1]) | {"x": 1}}, bytes(4), "unknown field"),
    "metadata is a list": ({"__metadata__": ["x"], "w": entry(0, 4, [1])}, bytes(4), "metadata"),
    "same name twice": (
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"w":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
        "key 'w' occurs twice",
    ),
    "same key twice": (
        b'{"w":{"dtype":"I32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
        "key 'dtype' occurs twice",
    ),
    "65 dimensions": ({"w": entry(0, 4, [1] * 65)}, bytes(4), "65 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "data", "pattern"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_header_is_refused(
    tmp_path: Path, header: object, data: bytes, pattern: str
) -> None:
    """Each damage has its own sentence."""
    write_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelFolderError, match=pattern) as caught:
        Checkpoint.open(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "is empty"),
        (b"abc", "has 3 bytes but a safetensors file begins with 8"),
        (struct.pack("<Q", 1000) + b"{}", "truncated inside its header: it has 10 .* ends at 1008"),
        (struct.pack("<Q", 1 << 63), "says its header has 9223372036854775808 bytes"),
        (struct.pack("<Q", 100_000_001) + b"{}", "at most 100000000 are read"),
        (LFS_POINTER, "is a Git LFS pointer"),
        (b"\x80\x04\x95" + bytes(100), "header"),
        (struct.pack("<Q", 2) + b"{}", "hold no tensors"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(
    tmp_path: Path, content: bytes, pattern: str
) -> None:
    """Lengths that lie, pointers and other formats."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFolderError, match=pattern):
        Checkpoint.open(tmp_path)


def test_a_tensor_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """Names are quoted and cut in messages."""
    name = "\x1b]0;x\x07" + "n" * 1000
    write_file(tmp_path / "model.safetensors", {name: entry(0, 8, [3])}, bytes(8))
    message = open_error(tmp_path)
    assert message.isprintable()
    assert len(message) < 500


# --- differential: our reader against the library ----------------------------------------------


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    with open(path, "rb") as file:
        try:
            found = read_header(file.fileno(), path)
        except ModelFolderError:
            return None
    return {name: (info.dtype, info.shape) for name, info in found.items()}


def theirs(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (safetensors.SafetensorError, OSError):
        return None


_INTEGERS = st.one_of(
    st.integers(-1, 16), st.sampled_from([1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 1 << 70])
)
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "BOOL", "F64", "F4", "X", 3]),
        "shape": st.lists(st.one_of(st.integers(0, 3), _INTEGERS), max_size=4),
        "data_offsets": st.lists(_INTEGERS, min_size=2, max_size=2),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__", "\u00e9", ""]),
        st.one_of(_ENTRIES, st.dictionaries(st.sampled_from("xy"), st.text(max_size=2))),
        max_size=3,
    ),
    num_bytes=st.integers(0, 40),
    padding=st.integers(0, 8),
)
def test_nothing_that_the_library_refuses_is_accepted(
    tmp_path_factory: pytest.TempPathFactory, header: Any, num_bytes: int, padding: int
) -> None:
    """Arbitrary headers: what we read, the library reads the same."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    write_file(path, json.dumps(header).encode() + b" " * padding, bytes(num_bytes))
    found = ours(path)
    if found is not None:
        assert found == theirs(path)


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), max_size=4),
            st.sampled_from(["F32", "F16", "I64", "U8", "BOOL", "F64"]),
        ),
        max_size=5,
    ),
    padding=st.integers(0, 8),
    change=st.one_of(st.none(), st.tuples(st.integers(0, 10**6), st.integers(0, 255))),
    cut=st.integers(-3, 3),
)
def test_valid_files_are_accepted_and_damaged_ones_only_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[list[int], str]],
    padding: int,
    change: tuple[int, int] | None,
    cut: int,
) -> None:
    """A valid file is accepted; with one changed byte or another end, only as the library does."""
    sizes = {"F32": 4, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F64": 8}
    header, end = {}, 0
    for index, (shape, dtype) in enumerate(shapes):
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * sizes[dtype]
        header[f"t{index}"] = entry(begin, end, shape, dtype)
    path = tmp_path_factory.getbasetemp() / "valid.safetensors"
    write_file(path, json.dumps(header).encode() + b" " * padding, bytes(end))
    assert ours(path) == theirs(path) is not None
    content = bytearray(path.read_bytes())
    if change is not None:
        content[change[0] % len(content)] = change[1]
    path.write_bytes(bytes(content[: len(content) + min(cut, 0)]) + bytes(max(cut, 0)))
    found = ours(path)
    assert found is None or found == theirs(path)

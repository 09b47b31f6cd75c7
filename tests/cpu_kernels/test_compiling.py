"""Object code: kept, loaded without numba, compiled again when it must be, refused when unsafe."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels import compiling
from cpu_kernels.compiling import FOLDER_VARIABLE, cache_folder, code_address, code_stamp

# in a fresh process: how many functions it compiled, and whether it needed numba
_RUN = """
import sys
from cpu_kernels.compiling import code_address, listening
names = []
with listening(names.append):
    address = code_address("chain_kernels", "make_enter_chain")
    assert address == code_address("chain_kernels", "make_enter_chain")
print(len(names), "numba" in sys.modules)
"""


def run(folder: Path | str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        env=os.environ | {FOLDER_VARIABLE: str(folder)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "kernels"
    made.mkdir(mode=0o700)
    return made


def test_the_second_process_neither_compiles_nor_imports_numba(folder: Path) -> None:
    assert run(folder) == "1 True"
    assert [file.suffix for file in folder.iterdir()] == [".o"]
    assert run(folder) == "0 False"


@pytest.mark.parametrize("damage", [b"", b"hetero kernel 2\n", b"\0" * 5000])
def test_a_damaged_file_is_compiled_again(folder: Path, damage: bytes) -> None:
    """Empty, cut short, or something else altogether: never loaded, and mended."""
    run(folder)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for contents in (damage, whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(contents)
        assert run(folder) == "1 True"
        assert run(folder) == "0 False"


def test_a_lower_rung_has_code_of_its_own(folder: Path) -> None:
    run(folder)
    assert run(folder, HETERO_ISA="portable") == "1 True"
    assert len(list(folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_a_compilation(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run(file / "kernels") == "1 True"
    assert run(file) == "1 True"


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_folder_that_others_write_to_is_not_used(
    folder: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    assert cache_folder() == folder
    folder.chmod(mode)
    assert cache_folder() is None


def test_the_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative is ignored")
    folder = cache_folder()
    assert folder == tmp_path / ".cache" / "hetero" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "hetero" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    assert cache_folder() is None


def test_a_stamp_follows_the_sources_that_a_module_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed file changes the stamps of those that import it, also through others."""
    package = tmp_path / "cpu_kernels"
    package.mkdir()
    (package / "low.py").write_text("X = 1\n")
    (package / "middle.py").write_text("from cpu_kernels.low import X\n")
    (package / "high.py").write_text("from cpu_kernels.middle import X\n")
    (package / "other.py").write_text("from cpu_kernels.other import X\n")
    monkeypatch.setattr(compiling, "__file__", str(package / "compiling.py"))

    def stamps() -> list[str]:
        code_stamp.cache_clear()
        return [code_stamp(name) for name in ("low", "middle", "high", "other")]

    before = stamps()
    (package / "low.py").write_text("X = 2\n")
    after = stamps()
    monkeypatch.undo()
    code_stamp.cache_clear()
    assert len(set(before)) == 4
    assert [old != new for old, new in zip(before, after, strict=True)] == [True, True, True, False]


def test_what_may_not_be_called_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that needs numba's runtime would crash where numba is not loaded."""
    from cpu_kernels import chain_kernels
    from cpu_kernels.compiling import Source

    def speak(number: int) -> None:
        print(number)

    monkeypatch.setattr(
        chain_kernels, "make_speak", lambda: Source(speak, num_arguments=1), raising=False
    )
    with pytest.raises(RuntimeError, match=r"chain_kernels\.make_speak\(\) calls \w+, which needs"):
        code_address("chain_kernels", "make_speak")


def test_code_is_a_c_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers and addresses in, nothing out."""
    import numpy as np

    from cpu_kernels import chain_kernels
    from cpu_kernels.compiling import Source
    from cpu_kernels.simd import pointer_at

    def subtract(a: int, b: int, out: int) -> None:
        pointer_at(out, np.int64)[0] = a - b

    monkeypatch.setattr(
        chain_kernels, "make_subtract", lambda: Source(subtract, num_arguments=3), raising=False
    )
    monkeypatch.setenv(FOLDER_VARIABLE, "/dev/null/none")
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(
        code_address("chain_kernels", "make_subtract")
    )
    out = ctypes.c_int64(0)
    function(2**40, 5, ctypes.addressof(out))
    assert out.value == 2**40 - 5

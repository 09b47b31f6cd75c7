"""Who may import whom: the floors of the house, read from the source."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("planner", "cpu_kernels", "profiles", "hetero")
# What a distribution is imported as, where that is not its own name.
IMPORT_NAMES = {
    "nvidia-ml-py": "pynvml",
    "intel-extension-for-pytorch": "intel_extension_for_pytorch",
}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "base", "types", "misc"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            # `from hetero import engine` imports hetero.engine.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def declared_dependencies() -> set[str]:
    """Import names of what a user's installation has: dependencies and extras but `test`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra, found in project["optional-dependencies"].items():
        requirements += found if extra != "test" else []
    names = set()
    for requirement in requirements:
        name = requirement.split(";")[0].strip()
        for mark in "=<>!~[":
            name = name.split(mark)[0]
        names.add(IMPORT_NAMES.get(name.strip(), name.strip()))
    return names


def allowed(package: str) -> set[str]:
    beside = {
        "planner": {"msgspec", "numpy"},
        "cpu_kernels": {"numpy", "numba", "llvmlite", "psutil"},
        "profiles": set[str](),
        # torch's builds for CUDA bring triton along; others do without
        "hetero": {"planner", "cpu_kernels", "profiles", "triton"} | declared_dependencies(),
    }
    return set(sys.stdlib_module_names) | {package} | beside[package]


def is_below(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", FLOORS)
def test_a_floor_imports_only_what_is_below_it(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.split(".")[0] not in allowed(package)
    }
    assert not found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("hetero.model", ("hetero.engine", "hetero.scheduler", "hetero.api", "hetero.cli")),
        ("hetero.runtime", ("hetero.engine", "hetero.api", "hetero.cli")),
    ],
)
def test_a_room_does_not_import_what_is_built_on_it(
    package: str, forbidden: tuple[str, ...]
) -> None:
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package.replace(".", "/"))
        for name in imports(path)
        if is_below(name, *forbidden)
    }
    assert not found


def test_nothing_but_the_command_line_imports_the_command_line() -> None:
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("hetero")
        if not is_below(module_name(path), "hetero.cli", "hetero.__main__")
        for name in imports(path)
        if is_below(name, "hetero.cli")
    }
    assert not found


def test_nothing_imports_tests_or_bench() -> None:
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for package in FLOORS
        for path in sources(package)
        for name in imports(path)
        if is_below(name, "tests", "bench")
    }
    assert not found


@pytest.mark.parametrize("package", (*FLOORS, "bench", "tests"))
def test_the_first_line_of_a_file_says_its_concept(package: str) -> None:
    """Only the empty `__init__.py` of a test folder has none."""
    for path in sources(package):
        text = path.read_text()
        if text:
            docstring = ast.get_docstring(ast.parse(text))
            assert docstring, f"{path} has no docstring"
            first = text.splitlines()[0]
            assert first.startswith(('"""', "#!")), f"{path}: the first line is {first!r}"


@pytest.mark.parametrize("package", (*FLOORS, "bench", "tests"))
def test_no_file_is_named_after_nothing(package: str) -> None:
    vague = {str(path) for path in sources(package) if path.stem in VAGUE_NAMES}
    assert not vague

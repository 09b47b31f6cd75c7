"""Commands that need no arithmetic start without torch and numba."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from planner.hardware import HardwareProfile

_CODE = """
import json, sys
from hetero.cli.main import run_command
sys.stdout = open('/dev/null', 'w')
code = run_command(sys.argv[1:])
sys.__stdout__.write(json.dumps({'code': int(code), 'modules': sorted(sys.modules)}))
"""


def loaded(*arguments: str) -> tuple[int, set[str]]:
    """Exit code of a command, and the top-level modules that it left in memory."""
    command = [sys.executable, "-c", _CODE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return found["code"], {name.partition(".")[0] for name in found["modules"]}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["plan", "--help"], ["run", "--help"], ["doctor", "--help"]],
    ids=" ".join,
)
def test_help_loads_click_and_no_more(arguments: list[str]) -> None:
    """The planner, rich and every numerical package wait until there is work."""
    code, modules = loaded(*arguments)
    assert code == 0
    heavy = {"torch", "numba", "numpy", "llvmlite", "rich", "tokenizers", "msgspec", "planner"}
    assert not modules & heavy


def test_profile_help_loads_no_torch() -> None:
    code, modules = loaded("profile", "--help")
    assert code == 0
    assert not modules & {"torch", "numba", "numpy"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "demo", "--json"],
        ["plan"],
        ["plan", "llama-3.1-8b", "--profile", "desktop-rtx4090", "--json"],
    ],
    ids=" ".join,
)
def test_plan_loads_neither_torch_nor_numba(
    stored_profile: HardwareProfile, arguments: list[str]
) -> None:
    """A stored or a named profile is enough; the search has arrays."""
    code, modules = loaded(*arguments)
    assert code == 0
    assert "planner" in modules
    assert not modules & {"torch", "numba", "scipy", "transformers"}


def test_plan_for_a_named_machine_asks_nothing_of_the_processor() -> None:
    """llvmlite, which knows the processor's instructions, takes 0.1 s to load."""
    code, modules = loaded("plan", "llama-3.1-8b", "--profile", "desktop-rtx4090", "--json")
    assert code == 0
    assert "llvmlite" not in modules


def test_run_complains_before_it_loads_torch(stored_profile: HardwareProfile) -> None:
    """What is wrong with a request is said at once."""
    code, modules = loaded("run", "-p", "word " * 2000)
    assert code == 2
    assert not modules & {"torch", "numba", "numpy"}

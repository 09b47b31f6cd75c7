"""The README is true: its commands, its help, its file tree, its results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
INSTALL_AND_RUN = "pip install -e . torch==2.13.0 && hetero run"
INSTALL_AND_TEST = 'pip install -e ".[test]" torch==2.13.0 && pytest'


@pytest.mark.parametrize("command", [INSTALL_AND_RUN, INSTALL_AND_TEST])
def test_each_of_the_two_commands_stands_on_a_line_of_its_own(command: str) -> None:
    assert README.splitlines().count(command) == 1


def test_ci_takes_its_commands_from_the_readme() -> None:
    """The pattern in .ci/run finds the README's test command and nothing else."""
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"sed -n '(.*)' README\.md", script)
    assert pattern is not None
    found = subprocess.run(
        ["sed", "-n", pattern[1], "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert found.stdout.splitlines() == [INSTALL_AND_TEST]


def test_the_help_block_is_what_the_program_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hetero", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "80", "PATH": "", "HOME": "/"},
    )
    help_text = done.stdout.replace("python -m hetero", "hetero").rstrip()

    assert f"```\n{help_text}\n```" in README


def test_every_file_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"\b(?:bench|hetero|planner|cpu_kernels|profiles)/[\w./-]+\w", README))

    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_house_lists_every_file_of_the_planner_and_names_no_other() -> None:
    tree = README.split("planner/           arithmetic")[1].split("cpu_kernels/       loops")[0]
    listed = set(re.findall(r"^  (\w+\.py)", tree, flags=re.MULTILINE))
    actual = {path.name for path in (ROOT / "planner").glob("*.py")} - {"__init__.py", "errors.py"}

    assert listed == actual


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"^[A-Z_]{6,}$", README, flags=re.MULTILINE) == []


def test_the_small_model_and_its_card_are_part_of_the_repository() -> None:
    folder = ROOT / "hetero" / "demo_model"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}

    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) <= 25_000_000

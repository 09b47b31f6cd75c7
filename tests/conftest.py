"""What several tests share: a cache of their own, a stored profile, the command line in process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from cpu_kernels.compiling import FOLDER_VARIABLE
from cpu_kernels.isa import ENVIRONMENT_VARIABLE
from hetero.cli.main import run_command
from hetero.measure.fingerprint import cpu_model, machine_fingerprint
from hetero.measure.store import store_profile
from planner.hardware import HardwareProfile
from tests.machines import toy_machine

# Compiled kernels, and which ones the whole run is about.
_KEPT = (FOLDER_VARIABLE, ENVIRONMENT_VARIABLE)


def pytest_configure(config: pytest.Config) -> None:
    # `hetero run` keeps kernels in the user's cache unless told otherwise; a test must not, and a
    # fresh folder each time would compile for half a minute.
    folder = config.rootpath / ".pytest_cache" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.setdefault(FOLDER_VARIABLE, str(folder))


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (gpu tests skip)"
    return f"torch {torch.__version__}, numba {version('numba')}, CPU {cpu_model()}, GPU {gpu}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty XDG_CACHE_HOME, and no setting of the user's own but those of kernels."""
    for name in os.environ:
        if name.startswith(("HETERO_", "HF_")) and name not in _KEPT:
            monkeypatch.delenv(name)
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def stored_profile(cache_home: Path) -> HardwareProfile:
    """A profile of round numbers, stored as this machine's own, so that nothing is measured."""
    profile = replace(toy_machine(), fingerprint=machine_fingerprint())
    store_profile(cache_home / "hetero", profile)
    return profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


Hetero = Callable[..., Outcome]


@pytest.fixture
def hetero(stored_profile: HardwareProfile, capsys: pytest.CaptureFixture[str]) -> Hetero:
    """Run `hetero` with arguments in this process."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = run_command([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Outcome(code=code, stdout=printed.out, stderr=printed.err)

    return call

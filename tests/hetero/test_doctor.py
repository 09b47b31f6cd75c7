"""`hetero doctor` and `hetero profile` from the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cpu_kernels.formats import WeightKind
from cpu_kernels.isa import Isa, isa
from hetero.cli.doctor import doctor
from hetero.cli.main import run_command
from hetero.cli.profile import profile
from hetero.errors import EnvironmentProblemError, ExitCode
from hetero.measure import machine, settling
from hetero.measure.environment import (
    Check,
    _products_text,
    check_huge_pages,
    check_instructions,
    check_ipex,
    check_products,
    check_stored_profile,
)
from hetero.measure.store import stored_profile
from hetero.model_lookup import find_model, read_model_spec
from planner.hardware import HardwareProfile
from tests.hetero.measure.tiny_effort import MEMORY_BYTES, TINY


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str | None]:
    return {"XDG_CACHE_HOME": str(tmp_path)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure next to nothing."""
    monkeypatch.setattr(machine, "QUICK", TINY)
    monkeypatch.setattr(settling, "_MAX_ROUNDS", 0)
    monkeypatch.setattr(machine, "cold_bytes", lambda available, caches: MEMORY_BYTES)


def test_doctor_json_has_a_status_for_every_check(environ: dict[str, str | None]) -> None:
    """One document; the exit code follows from it; whatever is not ok has a fix."""
    result = CliRunner().invoke(doctor, ["--json"], env=environ)
    document = json.loads(result.stdout)
    checks = {check["name"]: check for check in document["checks"]}
    assert document["schema_version"] == 1
    names = {"python", "torch", "numba", "cpu", "memory", "gpu", "ipex", "products", "profile"}
    assert names | {"model"} <= set(checks)
    assert all(check["fix"] for check in checks.values() if check["status"] != "ok")
    has_failed = any(check["status"] == "fail" for check in checks.values())
    assert result.exit_code == (ExitCode.ENVIRONMENT if has_failed else ExitCode.OK)
    assert document["is_healthy"] is not has_failed


def test_doctor_prints_a_line_for_every_check(environ: dict[str, str | None]) -> None:
    """Status first, so that `grep ^FAIL` works."""
    result = CliRunner().invoke(doctor, [], env=environ)
    words = [line.split()[:2] for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert ["OK", "python"] in words
    assert {status for status, _ in words} <= {"OK", "WARN", "FAIL"}


def test_doctor_fails_on_an_unsafe_cache(tmp_path: Path, environ: dict[str, str | None]) -> None:
    """A folder that others write to is a FAIL, and exit 6."""
    (tmp_path / "hetero").mkdir()
    (tmp_path / "hetero").chmod(0o777)
    result = CliRunner().invoke(doctor, ["--json"], env=environ)
    statuses = {check["name"]: check["status"] for check in json.loads(result.stdout)["checks"]}
    assert statuses["cache"] == "fail"
    assert result.exit_code == ExitCode.ENVIRONMENT


@pytest.mark.parametrize(
    ("ipex", "torch", "status", "text"),
    [
        (None, "2.13.0", "ok", "not installed, not needed"),
        ("2.8.0", "2.13.0+cpu", "warn", "ipex 2.8.0 installed but torch is 2.13.0+cpu: not used"),
        ("2.8.0", "2.8.1+cpu", "ok", "ipex 2.8.0 installed, matches torch 2.8.1+cpu"),
    ],
)
def test_ipex_is_judged_by_versions(
    ipex: str | None, torch: str | None, status: str, text: str
) -> None:
    """Major and minor must agree with torch."""
    check = check_ipex(ipex, torch)
    assert (check.status, check.text) == (status, text)


def test_doctor_says_who_multiplies_and_how_fast(
    tmp_path: Path, environ: dict[str, str | None], tiny: None
) -> None:
    """Which backends there are, and by the stored profile how torch compares with our kernels."""
    before = check_products(tmp_path / "hetero")
    assert CliRunner().invoke(profile, ["--quick"], env=environ).exit_code == ExitCode.OK
    after = check_products(tmp_path / "hetero")

    assert (before.status, after.status) == ("ok", "ok")
    numba, torch, *_ = before.text.split("; ")
    assert numba.startswith("numba ") and numba.endswith(" available")
    assert torch.startswith("torch ")
    compared = r"torch has [0-9.]+x the rate of numba at 1 token, [0-9.]+x at 256"
    assert after.text.startswith(f"{before.text}; bfloat16: torch has ")
    for text in after.text.removeprefix(f"{before.text}; ").split("; "):
        assert re.fullmatch(rf"(bfloat16|float32|int8|int4): {compared}", text)


def test_doctor_names_the_format_that_a_backend_lacks() -> None:
    """A reason for each, or one for all."""
    right: dict[WeightKind, str | None] = {"bfloat16": None, "int8": None}
    assert _products_text("ipex", dict.fromkeys(right, "not installed")) == "ipex not installed"
    assert _products_text("numba", right).endswith(" available")
    lacking = _products_text("torch", {**right, "int8": "AttributeError: no such op"})
    assert lacking.endswith(" available, but int8: AttributeError: no such op")


def test_doctor_says_which_instructions_are_in_use(environ: dict[str, str | None]) -> None:
    """One word after the name, where nothing lowers it."""
    result = CliRunner().invoke(doctor, [], env=environ)
    lines = [line.split() for line in result.stdout.splitlines()]
    [found] = [words[2] for words in lines if words[1:2] == ["instructions"]]
    assert found.rstrip(",") == isa().level


def test_lowered_instructions_are_named_with_those_there_could_be() -> None:
    """Kernels may then be several times slower, so it is a warning."""
    check = check_instructions(lambda: Isa(level="avx2", highest="amx", vendor="intel"))
    assert (check.status, check.text) == ("warn", "avx2, lowered from amx by HETERO_ISA")
    assert check.fix is not None


def test_doctor_outlives_a_compiler_that_does_not_load() -> None:
    """It is one more thing to report."""

    def find() -> Isa:
        raise OSError("libllvmlite.so: cannot open shared object file")

    check = check_instructions(find)
    assert check.status == "fail"
    assert "cannot open" in check.text


@pytest.mark.parametrize("name", ["doctor", "plan", "run", "profile"])
def test_unknown_instructions_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The name that was set and those there are, before anything is measured or loaded."""
    monkeypatch.setenv("HETERO_ISA", "avx3")
    code = run_command([name])
    printed = capsys.readouterr()
    assert (code, printed.out) == (ExitCode.USAGE, "")
    assert printed.err == (
        "error: HETERO_ISA is 'avx3' but must be one of portable, avx2, avx512, avx512-bf16, amx\n"
    )


@pytest.mark.parametrize(
    ("words", "status"),
    [("always [madvise] never\n", "ok"), ("always madvise [never]\n", "warn")],
)
def test_huge_pages_may_be_off(tmp_path: Path, words: str, status: str) -> None:
    """Off costs time, nothing else."""
    file = tmp_path / "enabled"
    file.write_text(words)
    assert check_huge_pages(file).status == status


def test_profile_stores_what_it_prints(
    tmp_path: Path, environ: dict[str, str | None], tiny: None
) -> None:
    """stdout is the profile and nothing else, and so are both files."""
    out = tmp_path / "out.json"
    arguments = ["--quick", "--json", "-o", str(out)]
    result = CliRunner().invoke(profile, arguments, env=environ, catch_exceptions=False)
    printed = HardwareProfile.from_json(result.stdout_bytes, source="stdout")
    assert result.exit_code == ExitCode.OK
    assert HardwareProfile.load(out) == printed
    assert stored_profile(tmp_path / "hetero") == printed
    assert "matrix products" in result.stderr
    check = check_stored_profile(tmp_path / "hetero")
    assert isinstance(check, Check)
    assert str(printed.measured_at) in check.text


def test_profile_prints_a_table(environ: dict[str, str | None], tiny: None) -> None:
    """A row a quantity, a column a thread count, notes below."""
    result = CliRunner().invoke(profile, ["--quick"], env=environ, catch_exceptions=False)
    assert "1 thread" in result.stdout
    assert "bfloat16 products, best, GFLOP/s" in result.stdout
    assert "cpu decode_attention" in result.stdout
    assert "note: quick measurement" in result.stdout


def test_profile_measures_a_model_as_well(
    tmp_path: Path, environ: dict[str, str | None], tiny: None
) -> None:
    """Its own shapes beside those of any machine; a note names it, and the profile is stored."""
    arguments = ["--quick", "--model", "demo", "--json"]
    result = CliRunner().invoke(profile, arguments, env=environ, catch_exceptions=False)
    measured = HardwareProfile.from_json(result.stdout_bytes, source="stdout")
    spec = read_model_spec(find_model("demo"))
    heads = {each.shape for each in measured.samples if each.kernel == "decode_attention"}
    assert heads == {(spec.num_heads, spec.num_kv_heads, spec.head_dim), *TINY.heads}
    assert f"measured with the shapes of {spec.name}" in measured.notes
    assert stored_profile(tmp_path / "hetero") == measured


def test_profile_refuses_an_unsafe_cache_first(
    tmp_path: Path, environ: dict[str, str | None]
) -> None:
    """The error reaches whoever prints errors."""
    (tmp_path / "hetero").mkdir()
    (tmp_path / "hetero").chmod(0o777)
    with pytest.raises(EnvironmentProblemError, match="chmod 700"):
        CliRunner().invoke(profile, ["--quick"], env=environ, catch_exceptions=False)


def test_commands_import_neither_torch_nor_numba() -> None:
    """`hetero --help` stays fast."""
    code = (
        "import sys, hetero.cli.doctor, hetero.cli.profile;"
        "print('torch' in sys.modules, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

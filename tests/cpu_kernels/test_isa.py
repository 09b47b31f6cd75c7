"""The ladder of instruction sets: what a processor gets, what lowers it, and all kernels on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_kernels.isa import ENVIRONMENT_VARIABLE, LEVELS, Isa, IsaLevel, choose_isa, isa

ROOT = Path(__file__).parents[2]
AVX2 = ("avx", "avx2", "fma", "f16c", "bmi", "bmi2")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
BF16 = ("avx512vnni", "avx512bf16")
AMX = ("amx-tile", "amx-bf16", "amx-int8")
# The rungs below this machine's own, on which the other tests run.
LOWERED = [level for level in LEVELS[:3] if isa().highest != level and isa().has(level)]


def features(*names: str) -> dict[str, bool]:
    """As LLVM reports them: what it knows of is there or not."""
    return dict.fromkeys((*AVX2, *AVX512, *BF16, *AMX), False) | dict.fromkeys(names, True)


@pytest.mark.parametrize(
    ("names", "level"),
    [
        ((), "portable"),
        (AVX2, "avx2"),
        ((*AVX2, *AVX512), "avx512"),
        ((*AVX2, *AVX512, *BF16), "avx512-bf16"),
        ((*AVX2, *AVX512, *BF16, *AMX), "amx"),
    ],
)
def test_a_processor_is_on_the_highest_rung_that_it_has(names: tuple[str, ...], level: str) -> None:
    """Each rung needs those below it, and nothing lowers it."""
    found = choose_isa(features(*names), None)

    assert (found.level, found.highest, found.is_lowered) == (level, level, False)
    assert choose_isa(features(*names), "") == found
    assert [found.has(rung) for rung in LEVELS] == [
        number <= LEVELS.index(found.level) for number in range(len(LEVELS))
    ]


@pytest.mark.parametrize("missing", [*AVX2, *AVX512, *BF16, *AMX])
def test_a_gap_stops_the_climb(missing: str) -> None:
    """One feature less ends the ladder below its rung, whatever lies above."""
    rungs = dict(zip(LEVELS[1:], (AVX2, AVX512, BF16, AMX), strict=True))
    below = next(LEVELS[number] for number, names in enumerate(rungs.values()) if missing in names)
    every = {*AVX2, *AVX512, *BF16, *AMX}

    assert choose_isa(features(*every - {missing}), None).level == below


def test_a_processor_of_unknown_features_is_portable() -> None:
    """As on aarch64, where none is asked for."""
    assert choose_isa({}, None).level == "portable"


@pytest.mark.parametrize("wanted", LEVELS)
def test_a_wish_lowers_the_rung_and_never_raises_it(wanted: IsaLevel) -> None:
    """More than the processor has would end in an illegal instruction."""
    found = choose_isa(features(*AVX2, *AVX512), wanted, "amd")

    highest: IsaLevel = "avx512"
    lower = min(wanted, highest, key=lambda level: LEVELS.index(level))
    assert (found.level, found.highest, found.vendor) == (lower, "avx512", "amd")
    assert found.is_lowered is (lower != "avx512")


@pytest.mark.parametrize("wanted", ["avx", "AVX2", "none", "avx512_bf16"])
def test_an_unknown_rung_is_an_error(wanted: str) -> None:
    """The message says what there is."""
    with pytest.raises(ValueError, match=f"HETERO_ISA is '{wanted}'.*portable, avx2, avx512"):
        choose_isa(features(*AVX2), wanted)


def test_llvm_is_told_the_features_of_all_rungs_in_use() -> None:
    """None for portable; a rung above is not named."""

    def told(level: str) -> list[str]:
        found = choose_isa(features(*AVX2, *AVX512, *BF16, *AMX), level)
        return [name for name in found.llvm_features.split(",") if name]

    assert told("portable") == []
    assert told("avx2") == [f"+{name}" for name in AVX2]
    assert told("avx512") == [f"+{name}" for name in (*AVX2, *AVX512)]


def test_this_process_knows_its_vendor_and_may_be_lowered() -> None:
    """Found once: the same value every time."""
    found = isa()

    assert isinstance(found, Isa)
    assert found is isa()
    assert found.vendor in ("intel", "amd", "other")
    assert found.has(found.level)
    assert LEVELS.index(found.level) <= LEVELS.index(found.highest)


@pytest.fixture(scope="module")
def checks() -> Iterator[dict[IsaLevel, subprocess.Popen[str]]]:
    """Every kernel on every lower rung, at once: each compiles for 25 s the first time."""
    running = {
        level: subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.cpu_kernels.every_kernel"],
            env=os.environ | {ENVIRONMENT_VARIABLE: level},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for level in LOWERED
    }
    yield running
    for process in running.values():
        process.kill()
        with process:
            pass  # waits for it and closes its output


@pytest.mark.parametrize("level", LOWERED)
def test_every_kernel_is_right_on_a_lower_rung(
    level: IsaLevel, checks: dict[IsaLevel, subprocess.Popen[str]]
) -> None:
    """In a process of its own, as numba compiles for one processor a process."""
    output, _ = checks[level].communicate()

    lanes = 16 if level == "avx512" else 8
    assert output == f"OK {level} {lanes}\n"
    assert checks[level].returncode == 0


_NO_WIDE_REGISTERS = """
from cpu_kernels.compiling import assembly
print(assembly("memory_read_kernels", "make_read").count("zmm"))
"""


@pytest.mark.skipif("avx2" not in LOWERED, reason="needs a processor with more than AVX2")
def test_whatever_is_compiled_first_is_compiled_for_the_rung() -> None:
    """A read of memory, before any kernel has asked for the rung, uses no AVX-512 either."""
    done = subprocess.run(
        [sys.executable, "-c", _NO_WIDE_REGISTERS],
        env=os.environ | {ENVIRONMENT_VARIABLE: "avx2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout, done.stderr) == ("0\n", "")

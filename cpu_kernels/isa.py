"""Which vector instructions the kernels of this process are compiled for.

The ladder, lowest first: `portable` (no instruction is named; LLVM makes what the processor has in
its base set, aarch64's NEON for one), `avx2` (with FMA), `avx512` (F, BW, DQ, VL), `avx512-bf16`
(the dot products of VNNI and BF16), `amx` (tiles). Found once from the processor; the environment
variable `HETERO_ISA` lowers it, for tests and to work around a fault, and never raises it.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

IsaLevel = Literal["portable", "avx2", "avx512", "avx512-bf16", "amx"]
Vendor = Literal["intel", "amd", "other"]
LEVELS: tuple[IsaLevel, ...] = get_args(IsaLevel)
ENVIRONMENT_VARIABLE = "HETERO_ISA"

# What each rung needs beside the rungs below it, as LLVM names features.
_NEEDS: dict[IsaLevel, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("avx", "avx2", "fma", "f16c", "bmi", "bmi2"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"),
    "avx512-bf16": ("avx512vnni", "avx512bf16"),
    "amx": ("amx-tile", "amx-bf16", "amx-int8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Isa:
    """The rung that kernels are compiled for, the highest that the processor has, its maker."""

    level: IsaLevel
    highest: IsaLevel
    vendor: Vendor

    @property
    def is_lowered(self) -> bool:
        """Was it lowered by the environment?"""
        return self.level != self.highest

    def has(self, level: IsaLevel) -> bool:
        """Is the rung at or below the one in use?"""
        return LEVELS.index(level) <= LEVELS.index(self.level)

    @property
    def llvm_features(self) -> str:
        """The features of this rung and those below, as LLVM reads them: `+avx2,+fma`."""
        rungs = LEVELS[: LEVELS.index(self.level) + 1]
        return ",".join(f"+{feature}" for rung in rungs for feature in _NEEDS[rung])


def choose_isa(features: Mapping[str, bool], wanted: str | None, vendor: Vendor = "other") -> Isa:
    """Pick the rung for a processor with these LLVM features.

    Parameters
    ----------
    features
        As of `llvmlite.binding.get_host_cpu_features()`.
    wanted
        The rung asked for; None or an empty string: the highest.
    vendor
        Who made the processor.

    Returns
    -------
    Isa
        The lower of the processor's rung and the wanted one: asking for more than the processor
        has would end in an illegal instruction.

    Raises
    ------
    ValueError
        If `wanted` is no rung.

    Examples
    --------
    >>> choose_isa({name: True for name in ("avx", "avx2", "fma", "f16c", "bmi", "bmi2")}, None)
    Isa(level='avx2', highest='avx2', vendor='other')
    """
    highest: IsaLevel = "portable"
    for level in LEVELS[1:]:
        if not all(features.get(feature, False) for feature in _NEEDS[level]):
            break
        highest = level
    if not wanted:
        return Isa(level=highest, highest=highest, vendor=vendor)
    if wanted not in LEVELS:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} is {wanted!r} but must be one of {', '.join(LEVELS)}"
        )
    level = min(wanted, highest, key=LEVELS.index)
    return Isa(level=level, highest=highest, vendor=vendor)


@cache
def isa() -> Isa:
    """Return the rung of this process.

    Raises
    ------
    ValueError
        If `HETERO_ISA` is set to something that is no rung.

    Examples
    --------
    >>> isa().has("portable")
    True
    """
    import llvmlite.binding

    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    features = llvmlite.binding.get_host_cpu_features() if is_x86 else {}
    # Read here and not in cli/: every process that compiles must know, a test's or a script's too.
    found = choose_isa(features, os.environ.get(ENVIRONMENT_VARIABLE), _vendor())
    return found


@cache
def configure_numba() -> None:
    """Where the rung is lowered, tell numba, which reads it when it first compiles."""
    found = isa()
    if found.is_lowered:
        import numba

        settings: Any = numba.config
        settings.CPU_NAME = "generic" if found.level == "portable" else "x86-64-v2"
        settings.CPU_FEATURES = found.llvm_features


def _vendor() -> Vendor:
    text = platform.processor()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read(4096)
    lowered = text.lower()
    return "intel" if "intel" in lowered else "amd" if "amd" in lowered else "other"

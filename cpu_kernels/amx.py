"""Whether products run on the tiles of AMX: asked for, allowed, and tested once a process.

`HETERO_AMX_EMULATED=1` compiles the tile kernels with tile_emulator.py in place of the
instructions: slow, for tests on machines without AMX. amx_kernels.py has the kernels.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from typing import Literal

import numpy as np

from cpu_kernels.compiling import code_address
from cpu_kernels.formats import PANEL_ROWS, WeightFormat, pack, to_bfloat16_bits
from cpu_kernels.isa import ENVIRONMENT_VARIABLE, isa

EMULATION_VARIABLE = "HETERO_AMX_EMULATED"
# A unit of x: what one token has in a tile.
UNIT_BYTES = 64

_ARCH_PRCTL = 158  # the number of the system call on x86-64
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@cache
def request_permission() -> bool:
    """Ask Linux to let this process use tiles; once, it holds for all its threads.

    Returns
    -------
    bool
        False where the system refuses, knows no tiles (before 5.16) or is not Linux on x86-64.

    Examples
    --------
    >>> isinstance(request_permission(), bool)
    True
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    system_call = ctypes.CDLL(None).syscall
    system_call.argtypes = [ctypes.c_long] * 3
    system_call.restype = ctypes.c_long
    return bool(system_call(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


def tiles() -> Literal["processor", "emulated"] | None:
    """Return whose tiles the products of this process run on; None: on vectors.

    Examples
    --------
    >>> tiles() in ("processor", "emulated", None)
    True
    """
    if _is_emulated():
        return "emulated"
    return "processor" if why_no_tiles() is None else None


@cache
def why_no_tiles() -> str | None:
    """Return why AMX is not used, for a person to read; None where it is.

    The first call asks the system for permission and multiplies a small matrix on the tiles: a
    virtual machine may claim instructions that it does not do right.

    Examples
    --------
    >>> why_no_tiles() is None or "AMX" in why_no_tiles()
    True
    """
    found = isa()
    if found.highest != "amx":
        return "the processor has no AMX"
    if not found.has("amx"):
        return f"AMX is turned off: {ENVIRONMENT_VARIABLE} is {found.level}"
    if not request_permission():
        return "the system does not let this process use AMX (Linux does from 5.16 on)"
    for weight_format in _TESTED_FORMATS:
        if not multiplies_right(weight_format, is_emulated=False):
            return f"AMX is not used: its products of {weight_format.kind} weights came out wrong"
    return None


@cache
def _is_emulated() -> bool:
    # Read here and not in cli/, as the rung is: whatever process compiles must know.
    return os.environ.get(EMULATION_VARIABLE) == "1"


def tile_kernel_address(
    kind: str, has_zeros: bool, num_tokens: int, *, is_emulated: bool | None = None
) -> int:
    """Return the address of the tile kernel for a kind of weights; the first call compiles it.

    Parameters
    ----------
    kind
        bfloat16, int8 or int4.
    has_zeros
        Does int4 have zero points?
    num_tokens
        1 to 16, or 32.
    is_emulated
        Whether the tiles are emulated; None: as in this process.

    Examples
    --------
    >>> tile_kernel_address("int8", False, 4, is_emulated=True) != 0
    True
    """
    emulated = _is_emulated() if is_emulated is None else is_emulated
    return code_address("amx_kernels", "make_tile_kernel", kind, has_zeros, num_tokens, emulated)


_TESTED_FORMATS = (WeightFormat(kind="bfloat16"), WeightFormat(kind="int8", group_size=32))


def multiplies_right(weight_format: WeightFormat, *, is_emulated: bool) -> bool:
    """Compare a product of whole numbers, which nothing rounds, with numpy's.

    Parameters
    ----------
    weight_format
        bfloat16, or int8 in groups.
    is_emulated
        On emulated tiles?

    Examples
    --------
    >>> multiplies_right(WeightFormat(kind="bfloat16"), is_emulated=True)
    True
    """
    # Whole tiles and a last one of each format, five panels: four at once and one more.
    num_tokens, num_columns, num_panels = 16, 80, 5
    num_rows = num_panels * PANEL_ROWS
    group_size = weight_format.group_size or num_columns
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (num_rows, num_columns)).astype(np.float32)
    weight[:, ::group_size] = 127  # scales of 1
    x = rng.integers(-127, 128, (num_tokens, num_columns)).astype(np.float32)
    coded = x.astype(np.int8) if weight_format.is_quantised else to_bfloat16_bits(x)
    unit = UNIT_BYTES // coded.itemsize
    units = [coded[:, first : first + unit].ravel() for first in range(0, num_columns, unit)]
    block = np.concatenate(units)
    starts = range(0, num_columns, group_size)
    scales = np.ones((len(starts), num_tokens), np.float32)
    sums = np.array([x[:, at : at + group_size].sum(axis=1) for at in starts]).astype(np.int32)
    x_scales = np.concatenate([scales.view(np.int32), sums])
    y = np.full((num_tokens, num_rows), np.nan, np.float32)
    blob = pack(weight, weight_format)
    panels = blob.ctypes.data
    kernel = _KERNEL(
        tile_kernel_address(weight_format.kind, False, num_tokens, is_emulated=is_emulated)
    )
    kernel(
        panels,
        panels + weight_format.scales_at(num_rows, num_columns),
        panels,
        block.ctypes.data,
        x_scales.ctypes.data,
        y.ctypes.data,
        num_rows,
        num_columns,
        group_size,
        num_panels,
    )
    return bool((y == x @ weight.T).all())


_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)

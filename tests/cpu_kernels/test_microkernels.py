"""Every kernel multiplies its number of tokens with any number of panels; which there are."""

# M tokens of a block, K columns, G groups

from __future__ import annotations

import ctypes
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels import microkernels
from cpu_kernels.formats import PANEL_ROWS, WeightFormat, pack
from cpu_kernels.isa import Isa, IsaLevel, Vendor
from cpu_kernels.microkernels import (
    COMPUTE_NUMBERS,
    MAX_BLOCK_TOKENS,
    MIN_TILE_TOKENS,
    Compute,
    block_tokens,
    blocking,
    computes,
    fastest_compute,
    kernel_address,
    uses_tiles,
)
from tests.cpu_kernels.exact_products import KINDS, case_name, cases

Case = tuple[WeightFormat, Compute]
_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)


def block_of(x_MK: NDArray[np.float32], compute: Compute) -> NDArray[np.uint8]:
    """x as the module's docstring lays it out: written out by hand."""
    num_tokens, num_columns = x_MK.shape
    padded = np.zeros((num_tokens, -(-num_columns // 16) * 16), np.float32)
    padded[:, :num_columns] = x_MK
    if compute == "float":
        return np.ascontiguousarray(padded.T).view(np.uint8).ravel()
    halves = (padded.view(np.uint32) >> 16).astype(np.uint16)
    if uses_tiles(compute) and num_tokens >= MIN_TILE_TOKENS:
        codes = padded.astype(np.int8) if compute == "int8" else halves
        unit = 64 // codes.itemsize
        units = [codes[:, at : at + unit].ravel() for at in range(0, padded.shape[1], unit)]
        return np.concatenate(units).view(np.uint8)
    if compute == "bfloat16":
        return halves.reshape(num_tokens, -1, 2).transpose(1, 0, 2).copy().view(np.uint8).ravel()
    codes = padded.astype(np.int8).reshape(num_tokens, -1, 4).transpose(1, 0, 2).copy()
    return codes.view(np.uint8).ravel()


@pytest.mark.parametrize("num_panels", range(1, 10))
@pytest.mark.parametrize("case", cases(KINDS), ids=case_name)
def test_every_kernel_multiplies_whole_numbers_exactly(case: Case, num_panels: int) -> None:
    """Each block size, one panel more than is walked at once, rows of y apart, nothing between."""
    format, compute = case
    group_size = format.group_size or 0
    num_columns, num_rows = 203, num_panels * PANEL_ROWS
    num_groups = format.num_groups(num_columns)
    rng = np.random.default_rng(num_panels)
    weight = rng.integers(-5, 8, (num_rows, num_columns)).astype(np.float32)
    for first in range(0, num_columns, group_size or num_columns):
        # scales of 1: the range is 15, or the largest magnitude the largest code
        weight[:, first], weight[:, first + 1] = {"int8": (127, 0), "int4": (7, -7)}.get(
            format.kind, (7, -7)
        )
        if format.has_zero_point:
            weight[:, first], weight[:, first + 1] = 10, -5
    blob = pack(weight, format)
    for num_tokens in block_tokens(compute):
        x = rng.integers(-127, 128, (num_tokens, num_columns)).astype(np.float32)
        block = block_of(x, compute)
        starts = range(0, num_columns, group_size or num_columns)
        sums = [x[:, first : first + group_size].sum(axis=1) for first in starts]
        scales = np.full((num_groups, num_tokens), 0.5, np.float32).view(np.int32)
        x_scales = np.concatenate([scales, np.array(sums)[:num_groups].astype(np.int32)])
        y_stride = num_rows + 3
        y = np.full((num_tokens, y_stride), np.nan, np.float32)
        start = blob.ctypes.data

        _KERNEL(kernel_address(format, compute, num_tokens))(
            start,
            start + format.scales_at(num_rows, num_columns),
            start + format.zeros_at(num_rows, num_columns),
            block.ctypes.data,
            x_scales.ctypes.data,
            y.ctypes.data,
            y_stride,
            num_columns,
            group_size,
            num_panels,
        )

        expected = x @ weight.T * (0.5 if compute == "int8" else 1)
        np.testing.assert_array_equal(y[:, :num_rows], expected)
        assert np.isnan(y[:-1, num_rows:]).all()


def machine(level: IsaLevel, vendor: Vendor = "intel") -> Isa:
    """A process on such a machine."""
    return Isa(level=level, highest=level, vendor=vendor)


def test_an_arithmetic_needs_its_format_and_its_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float everywhere, int8 for quantised weights, bfloat16 for its own on AVX512_BF16."""
    monkeypatch.setattr(microkernels, "isa", lambda: machine("avx512-bf16"))
    uncached = computes.__wrapped__
    assert [uncached(format) for format in KINDS] == [
        ("float",),
        ("float", "bfloat16"),
        *[("float", "int8")] * 3,
    ]
    monkeypatch.setattr(microkernels, "isa", lambda: machine("avx512"))
    assert uncached(KINDS[1]) == ("float",)
    monkeypatch.setattr(microkernels, "isa", lambda: machine("portable"))
    assert uncached(KINDS[2]) == ("float", "int8")


@pytest.mark.parametrize("format", KINDS, ids=lambda format: format.kind)
def test_the_fastest_arithmetic_is_one_that_the_format_has(format: WeightFormat) -> None:
    """Codes are multiplied as codes; the same answer every time."""
    found = fastest_compute(format)

    assert found in computes(format)
    assert found == fastest_compute(format)
    assert (found == "int8") == format.is_quantised


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512-bf16", "amx"])
@pytest.mark.parametrize("vendor", ["intel", "amd", "other"])
@pytest.mark.parametrize("compute", ["float", "bfloat16", "int8"])
def test_every_number_of_tokens_has_blocks_whose_sums_fit_the_registers(
    monkeypatch: pytest.MonkeyPatch, compute: Compute, vendor: Vendor, level: IsaLevel
) -> None:
    """32 registers of 16 lanes, or 16 of 8; int8 has two sums for each token and panel."""
    monkeypatch.setattr(microkernels, "isa", lambda: machine(level, vendor))
    monkeypatch.setattr(microkernels, "tiles", lambda: None)
    has_avx512 = machine(level).has("avx512")
    registers, lanes = (32, 16) if has_avx512 else (16, 8)
    sizes = block_tokens(compute)

    assert list(sizes) == sorted(sizes, reverse=True)
    assert sizes[0] <= MAX_BLOCK_TOKENS
    assert sizes[-1] == 1
    for num_tokens in sizes:
        walk = blocking(compute, num_tokens)
        sums = num_tokens * max(walk.panels, walk.ways) * (2 if compute == "int8" else 1)
        assert sums * PANEL_ROWS // lanes <= registers, (num_tokens, walk)


def test_tiles_take_blocks_that_vectors_have_no_registers_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of up to 32 tokens, and of one and two as before; "float" stays on vectors."""
    monkeypatch.setattr(microkernels, "isa", lambda: machine("amx"))
    monkeypatch.setattr(microkernels, "tiles", lambda: "processor")
    assert block_tokens("bfloat16") == block_tokens("int8") == (32, 16, 8, 4, 2, 1)
    assert block_tokens("float") == (24, 16, 8, 4, 2, 1)
    assert [COMPUTE_NUMBERS[compute] for compute in get_args(Compute)] == [0, 3, 4]
    monkeypatch.setattr(microkernels, "tiles", lambda: None)
    assert [COMPUTE_NUMBERS[compute] for compute in get_args(Compute)] == [0, 1, 2]

"""Tiles of AMX: the emulator, products on it, the machine code, and when they are used.

Few machines have AMX. The kernels' code runs anywhere with tile_emulator.py in place of the tile
instructions, in processes of their own; the code with the instructions is made in another and read.
Where there is AMX, it runs too, and the tests of products run on it.
"""

# M tokens, N rows of the weights

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels import amx
from cpu_kernels.amx import EMULATION_VARIABLE, multiplies_right, tile_kernel_address
from cpu_kernels.formats import WeightFormat, from_bfloat16_bits, to_bfloat16_bits
from cpu_kernels.isa import Isa
from cpu_kernels.scratch import aligned_bytes
from cpu_kernels.tile_emulator import EMULATED_TILES, STATE_BYTES

ROOT = Path(__file__).parents[2]
KINDS = [("bfloat16", False), ("int8", False), ("int4", False), ("int4", True)]
TOKENS = [4, 8, 16, 32]
FORMATS = [WeightFormat(kind="bfloat16"), WeightFormat(kind="int8", group_size=32)]
needs_amx = pytest.mark.skipif(amx.tiles() != "processor", reason="needs a processor with AMX")

_SUMS, _X, _WEIGHTS = 0, 3, 7


def in_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python from the root of the repository."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


class Emulator:
    """The state of emulated tiles, and arrays that go in and out."""

    def __init__(self, sizes: dict[int, tuple[int, int]], *, palette: int = 1) -> None:
        """Configure tiles of (rows, bytes of a row)."""
        self.memory = aligned_bytes(STATE_BYTES)
        self.state = self.memory.ctypes.data
        config = np.zeros(64, np.uint8)
        config[0] = palette
        for tile, (rows, row_bytes) in sizes.items():
            config[16 + 2 * tile] = row_bytes
            config[48 + tile] = rows
        EMULATED_TILES.configure(self.state, config.ctypes.data)

    def load(self, tile: int, array: NDArray[Any]) -> None:
        """Read the rows of an array."""
        EMULATED_TILES.load(self.state, tile, array.ctypes.data, array.strides[0])

    def sums(self, dtype: Any) -> NDArray[Any]:
        """The sums, 16 x 16, and what was there where the tile has none: 55."""
        found = np.full((16, 16), 55, dtype)
        EMULATED_TILES.store(self.state, _SUMS, found.ctypes.data, 64)
        return found


SHAPES = [(16, 16, 16), (4, 16, 16), (16, 3, 16), (7, 5, 9), (1, 1, 1)]  # rows, steps, words


def emulator(rows: int, steps: int, words: int) -> Emulator:
    """Tiles for one product."""
    sizes = {_SUMS: (rows, 4 * words), _X: (rows, 4 * steps), _WEIGHTS: (steps, 4 * words)}
    return Emulator(sizes)


@pytest.mark.parametrize(("rows", "steps", "words"), SHAPES)
def test_emulated_bytes_are_signed_times_unsigned(rows: int, steps: int, words: int) -> None:
    """Four products a word, added to what was there; nothing outside the tile's size."""
    rng = np.random.default_rng(rows)
    x = rng.integers(-128, 128, (rows, 80)).astype(np.int8)
    weights = rng.integers(0, 256, (steps, 64)).astype(np.uint8)
    before = rng.integers(-(2**31), 2**31, (rows, 16)).astype(np.int32)
    tiles = emulator(rows, steps, words)
    tiles.load(_SUMS, before)
    tiles.load(_X, x)
    tiles.load(_WEIGHTS, weights)

    EMULATED_TILES.multiply_bytes(tiles.state, _SUMS, _X, _WEIGHTS)

    x_fours = x[:, : 4 * steps].reshape(rows, steps, 4).astype(np.int64)
    w_fours = weights[:, : 4 * words].reshape(steps, words, 4).astype(np.int64)
    products = np.einsum("tkq,knq->tn", x_fours, w_fours)
    expected = np.full((16, 16), 55, np.int32)
    expected[:rows, :words] = (before[:, :words] + products).astype(np.int32)
    np.testing.assert_array_equal(tiles.sums(np.int32), expected)


@pytest.mark.parametrize(("rows", "steps", "words"), SHAPES)
def test_emulated_bfloat16_is_summed_in_float32(rows: int, steps: int, words: int) -> None:
    """Two products a word: even and odd columns apart, step by step, then with what was there."""
    rng = np.random.default_rng(rows)
    x = to_bfloat16_bits(rng.standard_normal((rows, 40)).astype(np.float32))
    weights = to_bfloat16_bits(rng.standard_normal((steps, 32)).astype(np.float32))
    before = rng.standard_normal((rows, 16)).astype(np.float32)
    tiles = emulator(rows, steps, words)
    tiles.load(_SUMS, before)
    tiles.load(_X, x)
    tiles.load(_WEIGHTS, weights)

    EMULATED_TILES.multiply_bfloat16(tiles.state, _SUMS, _X, _WEIGHTS)

    wide_x = from_bfloat16_bits(x[:, : 2 * steps]).reshape(rows, steps, 2)
    wide_w = from_bfloat16_bits(weights[:, : 2 * words]).reshape(steps, words, 2)
    sums = np.zeros((rows, words, 2), np.float32)
    for step in range(steps):
        sums += wide_x[:, step, None, :] * wide_w[None, step]
    expected = np.full((16, 16), 55, np.float32)
    expected[:rows, :words] = before[:, :words] + (sums[:, :, 0] + sums[:, :, 1])
    np.testing.assert_array_equal(tiles.sums(np.float32), expected)


def test_emulated_tiles_are_zeroed_and_released() -> None:
    """By `zero` and by a configuration; a released tile stores nothing."""
    tiles = emulator(16, 16, 16)
    assert (tiles.sums(np.int32) == 0).all()
    tiles.load(_SUMS, np.ones((16, 16), np.int32))
    assert (tiles.sums(np.int32) == 1).all()
    EMULATED_TILES.zero(tiles.state, _SUMS)
    assert (tiles.sums(np.int32) == 0).all()
    EMULATED_TILES.release(tiles.state)
    assert (tiles.sums(np.int32) == 55).all()


@pytest.mark.parametrize(
    "sizes",
    [
        {_SUMS: (16, 64), _X: (16, 64)},
        {_SUMS: (16, 64), _X: (15, 64), _WEIGHTS: (16, 64)},
        {_SUMS: (16, 64), _X: (16, 60), _WEIGHTS: (16, 64)},
        {_SUMS: (16, 60), _X: (16, 64), _WEIGHTS: (16, 64)},
    ],
)
def test_what_a_processor_refuses_spoils_emulated_sums(sizes: dict[int, tuple[int, int]]) -> None:
    """Tiles that are not configured or do not fit."""
    for multiply in (EMULATED_TILES.multiply_bfloat16, EMULATED_TILES.multiply_bytes):
        tiles = Emulator(sizes)
        multiply(tiles.state, _SUMS, _X, _WEIGHTS)
        spoilt = tiles.sums(np.float32)[:, :15]
        assert np.isnan(spoilt).all()


@pytest.mark.parametrize(
    "sizes", [{_SUMS: (17, 64)}, {_SUMS: (16, 68)}, {_SUMS: (16, 62)}, {_SUMS: (0, 64)}]
)
def test_an_impossible_configuration_configures_nothing(sizes: dict[int, tuple[int, int]]) -> None:
    """Larger than a tile, half a word, rows without bytes; another palette."""
    assert (Emulator({4: (16, 64)} | sizes).sums(np.int32) == 55).all()
    assert (Emulator({_SUMS: (16, 64)}, palette=2).sums(np.int32) == 55).all()


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.kind)
def test_the_first_product_is_right_on_emulated_tiles(format: WeightFormat) -> None:
    """What a process with AMX multiplies before it relies on it."""
    assert multiplies_right(format, is_emulated=True)


# 600 s: where no kernel is on disk yet, some fifty are compiled first, for 2 s each.
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["tile_products", "test_linear", "test_experts", "test_microkernels"]
)
def test_products_are_right_on_emulated_tiles(name: str) -> None:
    """All tests of products in a process that calls tile kernels."""
    done = in_process(
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"tests/cpu_kernels/{name}.py",
        **{EMULATION_VARIABLE: "1"},
    )

    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


_WITHOUT_NUMBA = """
import sys
from cpu_kernels.amx import multiplies_right, tiles
from cpu_kernels.formats import WeightFormat
assert multiplies_right(WeightFormat(kind="bfloat16"), is_emulated=True)
print(tiles(), "numba" in sys.modules)
"""


def test_kernels_on_disk_need_no_numba() -> None:
    """After the first process has compiled them."""
    assert multiplies_right(FORMATS[0], is_emulated=True)

    done = in_process("-c", _WITHOUT_NUMBA, **{EMULATION_VARIABLE: "1"})

    assert (done.stdout, done.stderr) == ("emulated False\n", "")


_CROSS_COMPILE = """
from cpu_kernels.compiling import assembly
for kind, has_zeros in {kinds}:
    for tokens in {tokens}:
        print("kernel", kind, has_zeros, tokens)
        print(assembly("amx_kernels", "make_tile_kernel", kind, has_zeros, tokens, False))
"""


@pytest.fixture(scope="module")
def machine_code() -> dict[tuple[str, bool, int], Counter[str]]:
    """How often each instruction stands in each kernel's code for a processor with AMX."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the processor to compile for is not of this machine's kind")
    features = Isa(level="amx", highest="amx", vendor="intel").llvm_features
    done = in_process(
        "-c",
        _CROSS_COMPILE.format(kinds=KINDS, tokens=TOKENS),
        NUMBA_CPU_NAME="sapphirerapids",
        NUMBA_CPU_FEATURES=features,
        HETERO_ISA="",
    )
    assert done.returncode == 0, done.stderr
    counts: dict[tuple[str, bool, int], Counter[str]] = {}
    for text in done.stdout.split("kernel ")[1:]:
        first, *lines = text.splitlines()
        kind, has_zeros, tokens = first.split()
        words = [line.split()[0] for line in lines if line.startswith("\t") and line.strip()]
        counts[kind, has_zeros == "True", int(tokens)] = Counter(words)
    return counts


@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize(("kind", "has_zeros"), KINDS)
def test_machine_code_has_the_tile_instructions(
    machine_code: dict[tuple[str, bool, int], Counter[str]],
    kind: str,
    has_zeros: bool,
    num_tokens: int,
) -> None:
    """Cross-compiled, a kernel configures once, multiplies tiles, and spills none."""
    code = machine_code[kind, has_zeros, num_tokens]
    product, other = ("tdpbf16ps", "tdpbsud") if kind == "bfloat16" else ("tdpbsud", "tdpbf16ps")

    assert (code["ldtilecfg"], code["tilerelease"], code["sttilecfg"]) == (1, 1, 0)
    # whole tiles and the last one, four sums each; loops may be unrolled
    assert code[product] >= 8 and code[product] % 4 == 0
    assert code[other] == 0
    assert code["tilezero"] >= 4 and code["tilestored"] >= 4
    assert code["tileloadd"] * 4 >= code[product] * 5
    assert set(code) & {"tdpbssd", "tdpbusd", "tdpbuud"} == set()


@needs_amx
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize(("kind", "has_zeros"), KINDS)
def test_the_processor_gives_the_bits_of_the_emulator(
    kind: str, has_zeros: bool, num_tokens: int
) -> None:
    """Any bytes that are codes, any x in range: what the manual says is what it does."""
    rng = np.random.default_rng(num_tokens)
    num_columns, num_panels, group_size = 202, 5, 64
    panels = rng.integers(0, 256, num_panels * 64 * num_columns).astype(np.uint8)
    x = rng.integers(-127, 128, num_tokens * 512).astype(np.int8).view(np.uint8)
    if kind == "bfloat16":
        values = rng.standard_normal((panels.size + x.size) // 2).astype(np.float32)
        bits = to_bfloat16_bits(values).view(np.uint8)
        panels, x = bits[: panels.size], bits[panels.size :]
    scales = to_bfloat16_bits(rng.uniform(0.1, 1, num_panels * 4 * 16).astype(np.float32))
    zeros = rng.integers(0, 16, num_panels * 4 * 16).astype(np.uint8)
    x_scales = rng.uniform(0.001, 0.1, (8, num_tokens)).astype(np.float32)
    x_scales.view(np.int32)[4:] = rng.integers(-8000, 8000, (4, num_tokens))
    y = np.full((2, num_tokens, 16 * num_panels), np.nan, np.float32)
    for is_emulated in (False, True):
        address = tile_kernel_address(kind, has_zeros, num_tokens, is_emulated=is_emulated)
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)(address)(
            *(array.ctypes.data for array in (panels, scales, zeros, x, x_scales)),
            y[int(is_emulated)].ctypes.data,
            16 * num_panels,
            num_columns,
            group_size,
            num_panels,
        )

    assert not np.isnan(y).any()
    np.testing.assert_array_equal(y[0], y[1])


# without what they remember of this process
_WHY_NO_TILES, _IS_EMULATED = amx.why_no_tiles.__wrapped__, amx._is_emulated.__wrapped__


def machine(monkeypatch: pytest.MonkeyPatch, level: Any, highest: Any) -> None:
    """A process on such a machine, whose permission is not asked for and products are right."""
    monkeypatch.delenv(EMULATION_VARIABLE, raising=False)
    monkeypatch.setattr(amx, "isa", lambda: Isa(level=level, highest=highest, vendor="intel"))
    monkeypatch.setattr(amx, "request_permission", lambda: pytest.fail("asked for permission"))
    monkeypatch.setattr(amx, "multiplies_right", lambda *_, **__: True)
    monkeypatch.setattr(amx, "why_no_tiles", _WHY_NO_TILES)
    monkeypatch.setattr(amx, "_is_emulated", _IS_EMULATED)


def test_a_processor_without_tiles_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that HETERO_ISA has lowered."""
    machine(monkeypatch, "avx512-bf16", "avx512-bf16")
    assert amx.tiles() is None
    assert amx.why_no_tiles() == "the processor has no AMX"
    machine(monkeypatch, "avx512", "amx")
    assert amx.tiles() is None
    assert amx.why_no_tiles() == "AMX is turned off: HETERO_ISA is avx512"


def test_permission_and_a_right_product_turn_tiles_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with tiles is not enough."""
    machine(monkeypatch, "amx", "amx")
    monkeypatch.setattr(amx, "request_permission", lambda: False)
    assert amx.tiles() is None
    assert "does not let this process" in str(amx.why_no_tiles())
    monkeypatch.setattr(amx, "request_permission", lambda: True)
    assert amx.tiles() == "processor"
    assert amx.why_no_tiles() is None


@pytest.mark.parametrize("wrong", ["bfloat16", "int8"])
def test_a_wrong_product_turns_tiles_off(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """And the reason names the format."""
    machine(monkeypatch, "amx", "amx")
    monkeypatch.setattr(amx, "request_permission", lambda: True)
    monkeypatch.setattr(amx, "multiplies_right", lambda format, **_: format.kind != wrong)

    assert amx.tiles() is None
    assert f"products of {wrong} weights" in str(amx.why_no_tiles())


def test_a_kernel_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first product would be where tiles come out as zeros."""

    nothing = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 10)(lambda *_: None)
    address = ctypes.cast(nothing, ctypes.c_void_p).value
    monkeypatch.setattr(amx, "tile_kernel_address", lambda *_, **__: address)

    assert not multiplies_right(FORMATS[0], is_emulated=False)


def test_emulation_is_no_claim_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are chosen as with tiles, and the system is asked for nothing."""
    machine(monkeypatch, "avx2", "avx2")
    monkeypatch.setenv(EMULATION_VARIABLE, "1")

    assert amx.tiles() == "emulated"
    assert amx.why_no_tiles() == "the processor has no AMX"


def test_permission_needs_linux_on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the number of the system call means something else and is not used."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")

    assert not amx.request_permission.__wrapped__()

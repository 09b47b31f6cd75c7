"""The AMX kernels: their source on a model of the tiles, their machine code, and both together.

Few machines have AMX. The Python source of the kernels runs anywhere on `Tiles`, and so does their
code compiled for any machine with calls of `Tiles` in place of tile instructions. The code for such
a processor is made in a process of its own and read; it runs only where it may.
"""

# T tokens, N rows of the weights, K columns, G groups

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpu_kernels import amx, simd, tile_instructions
from cpu_kernels.amx import TOKENS, AmxCompute, AmxFormat, padded_columns
from cpu_kernels.formats import from_bfloat16_bits, to_bfloat16_bits
from cpu_kernels.isa import Isa

KINDS: list[tuple[AmxFormat, bool]] = [
    ("bfloat16", False),
    ("int8", False),
    ("int4", False),
    ("int4", True),
]
needs_amx = pytest.mark.skipif(not amx.is_available(), reason="needs a processor with AMX")


class Tiles:
    """Eight tiles of at most 16 x 64 bytes, and what Intel's manual says of the instructions.

    An access that the processor would refuse, or outside the array, is an error.
    """

    def __init__(self) -> None:
        self.tiles: list[NDArray[np.uint8] | None] = [None] * 8

    def ldtilecfg(self, config: NDArray[np.uint8]) -> None:
        """Give every tile its rows and bytes, and zeros."""
        assert config.size == 64
        row_bytes = config[16:32].view(np.uint16)
        rows = config[48:56]
        assert config[0] == 1, "the palette"
        assert not config[1:16].any() and not config[32:48].any() and not config[56:].any()
        assert rows.min() >= 1 and rows.max() <= 16
        assert row_bytes.min() >= 1 and row_bytes.max() <= 64 and not (row_bytes % 4).any()
        self.tiles = [np.zeros((rows[t], row_bytes[t]), np.uint8) for t in range(8)]

    def tilerelease(self) -> None:
        """Forget tiles and configuration."""
        self.tiles = [None] * 8

    def tile(self, number: int) -> NDArray[np.uint8]:
        """Return a configured tile."""
        tile = self.tiles[number]
        assert tile is not None, "not configured"
        return tile

    def tilezero(self, number: int) -> None:
        """Zero a tile."""
        self.tile(number)[:] = 0

    def _rows(self, number: int, array: NDArray[Any], index: int, stride: int) -> Any:
        tile = self.tile(number)
        memory = array.view(np.uint8)
        starts = index * array.itemsize + stride * np.arange(tile.shape[0])
        assert starts[0] >= 0 and starts[-1] + tile.shape[1] <= memory.size, "outside the array"
        return tile, memory, starts[:, None] + np.arange(tile.shape[1])

    def tileloadd(self, number: int, array: NDArray[Any], index: int, stride: int) -> None:
        """Read rows `stride` bytes apart."""
        tile, memory, places = self._rows(number, array, index, stride)
        tile[:] = memory[places]

    def tilestored(self, number: int, array: NDArray[Any], index: int, stride: int) -> None:
        """Write rows `stride` bytes apart."""
        tile, memory, places = self._rows(number, array, index, stride)
        memory[places] = tile

    def _operands(self, sums: int, x: int, weights: int) -> list[NDArray[np.uint8]]:
        assert len({sums, x, weights}) == 3
        tiles = [self.tile(number) for number in (sums, x, weights)]
        (rows, words), (x_rows, x_bytes), (steps, weight_words) = [t.shape for t in tiles]
        assert (x_rows, 4 * steps, weight_words) == (rows, x_bytes, words)
        return tiles

    def tdpbf16ps(self, sums: int, x: int, weights: int) -> None:
        """Add pairs of bfloat16 products to float32."""
        c, a, b = self._operands(sums, x, weights)
        pairs_a, pairs_b = (
            from_bfloat16_bits(tile.view(np.uint16)).reshape(len(tile), -1, 2) for tile in (a, b)
        )
        c.view(np.float32)[:] += np.einsum("tkp,knp->tn", pairs_a, pairs_b)

    def tdpbsud(self, sums: int, x: int, weights: int) -> None:
        """Add four products of signed by unsigned bytes to int32."""
        c, a, b = self._operands(sums, x, weights)
        signed = a.view(np.int8).reshape(len(a), -1, 4).astype(np.int32)
        unsigned = b.reshape(len(b), -1, 4).astype(np.int32)
        c.view(np.int32)[:] += np.einsum("tkq,knq->tn", signed, unsigned)


INSTRUCTIONS = [name for name in vars(Tiles) if not name.startswith("_") and name != "tile"]


@pytest.fixture(scope="module")
def python_kernels() -> Any:
    """The kernels as plain Python over a model of the tiles."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(vars(amx).items()):
            if isinstance(value, numba.core.registry.CPUDispatcher):
                patch.setattr(amx, name, value.py_func)
        tiles = Tiles()
        for name in INSTRUCTIONS:
            patch.setattr(amx, name, getattr(tiles, name))
        yield amx


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Packed weights, a block of x, and their product in float64."""

    panels: NDArray[np.uint8]
    scales: NDArray[np.uint16]
    zeros: NDArray[np.uint8]
    x: NDArray[np.uint8]
    x_scales: NDArray[np.float32]
    expected: NDArray[np.float64]
    magnitude: NDArray[np.float64]  # what rounding errors are relative to: sums of |x| * |w|
    num_columns: int
    group_size: int
    num_panels: int


def _padded(values: NDArray[Any], multiple: int, fill: Any) -> NDArray[Any]:
    extra = -values.shape[-1] % multiple
    return np.pad(values, [(0, 0), (0, extra)], constant_values=fill)


def _panels(columns: NDArray[Any], step: int) -> NDArray[np.uint8]:
    """(N, K) with K whole steps -> [N/16][K/step][16][step], as bytes."""
    num_rows, num_columns = columns.shape
    steps = columns.reshape(num_rows // 16, 16, num_columns // step, step).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(steps).reshape(-1).view(np.uint8)


def _as_panel_rows(values: NDArray[Any]) -> NDArray[Any]:
    """(N, G) -> [N/16][G][16], flat."""
    num_rows, num_groups = values.shape
    rows = values.reshape(num_rows // 16, 16, num_groups).transpose(0, 2, 1)
    return np.ascontiguousarray(rows).reshape(-1)


def _x_rows(x: NDArray[Any], step: int, compute: AmxCompute) -> NDArray[np.uint8]:
    """Rows of x: zeros to the end of the last step, and behind it what must not be read."""
    whole = _padded(x, step, 0)
    rows = np.full((TOKENS, padded_columns(x.shape[1], compute)), 0x7FC1 if step == 2 else 99)
    rows = rows.astype(x.dtype)
    rows[:, : whole.shape[1]] = whole
    return rows.reshape(-1).view(np.uint8)


def bfloat16_product(num_panels: int, num_columns: int) -> Product:
    """Random bfloat16 weights and x."""
    rng = np.random.default_rng(num_columns)
    w = to_bfloat16_bits(rng.standard_normal((16 * num_panels, num_columns)).astype(np.float32))
    x = to_bfloat16_bits(rng.standard_normal((TOKENS, num_columns)).astype(np.float32))
    wide_w, wide_x = (from_bfloat16_bits(bits).astype(np.float64) for bits in (w, x))
    return Product(
        panels=_panels(_padded(w, 2, 0), 2),
        scales=np.empty(0, np.uint16),
        zeros=np.empty(0, np.uint8),
        x=_x_rows(x, 2, "amx-bfloat16"),
        x_scales=np.empty(0, np.float32),
        expected=wide_x @ wide_w.T,
        magnitude=np.abs(wide_x) @ np.abs(wide_w).T,
        num_columns=num_columns,
        group_size=32,
        num_panels=num_panels,
    )


def codes_product(
    kind: AmxFormat, has_zeros: bool, num_panels: int, num_columns: int, group_size: int
) -> Product:
    """Random codes and scales of weights, random rounded x."""
    rng = np.random.default_rng(num_columns)
    shape = (16 * num_panels, -(-num_columns // group_size))
    columns = np.arange(num_columns) // group_size
    scales = to_bfloat16_bits(rng.uniform(0.1, 1.0, shape).astype(np.float32))
    low, high, zero = {"int8": (1, 256, 128), "int4": (1, 16, 8)}[kind]
    zeros = rng.integers(0, 16, shape) if has_zeros else np.full(shape, zero)
    codes = rng.integers(0 if has_zeros else low, high, (shape[0], num_columns))
    weights = from_bfloat16_bits(scales).astype(np.float64)[:, columns]
    weights = weights * (codes - zeros[:, columns])

    x = rng.integers(-127, 128, (TOKENS, num_columns)).astype(np.int8)
    x_scales = rng.uniform(0.001, 0.1, (shape[1], TOKENS)).astype(np.float32)
    starts = np.arange(0, num_columns, group_size)
    x_sums = np.add.reduceat(x, starts, axis=1, dtype=np.int32).T
    wide_x = x * x_scales.T.astype(np.float64)[:, columns]

    step = 4 if kind == "int8" else 8
    codes = np.pad(codes, [(0, 0), (0, -num_columns % step)])
    codes[:, num_columns:] = zeros[:, -1:]
    if kind == "int4":
        halves = codes.reshape(shape[0], -1, 2, 4)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(shape[0], -1)
    return Product(
        panels=_panels(codes.astype(np.uint8), 4),
        scales=_as_panel_rows(scales),
        zeros=_as_panel_rows(zeros.astype(np.uint8)) if has_zeros else np.empty(0, np.uint8),
        x=_x_rows(x, step, "amx-int8"),
        x_scales=np.concatenate([x_scales.reshape(-1), x_sums.reshape(-1).view(np.float32)]),
        expected=wide_x @ weights.T,
        magnitude=np.abs(wide_x) @ np.abs(weights).T,
        num_columns=num_columns,
        group_size=group_size,
        num_panels=num_panels,
    )


def random_product(
    kind: AmxFormat, has_zeros: bool, num_panels: int, num_columns: int, group_size: int
) -> Product:
    """Random weights of a format and x."""
    if kind == "bfloat16":
        return bfloat16_product(num_panels, num_columns)
    return codes_product(kind, has_zeros, num_panels, num_columns, group_size)


def check_result(product: Product, y: NDArray[np.float32], y_stride: int) -> None:
    """Compare y, NaN before the call, with the product; what lies between its rows stays."""
    rows = y.reshape(TOKENS, y_stride)
    num_rows = 16 * product.num_panels
    # float32 sums: an error of 6e-8 for each of some additions
    error = np.abs(rows[:, :num_rows] - product.expected)
    assert (error <= 1e-6 * product.magnitude).all()
    assert np.isnan(rows[:, num_rows:]).all()


def run_in_python(kernels: Any, kind: AmxFormat, has_zeros: bool, product: Product) -> None:
    """Run a kernel's source on the model of the tiles and check the result."""
    y_stride = 16 * product.num_panels + 3
    y = np.full(TOKENS * y_stride, np.nan, np.float32)
    num_columns, num_panels = product.num_columns, product.num_panels
    if kind == "bfloat16":
        kernels._multiply_bfloat16(product.panels, product.x, y, y_stride, num_columns, num_panels)
    else:
        num_x_scales = product.x_scales.size // 2
        kernels._multiply_codes(
            product.panels,
            product.scales,
            product.zeros,
            product.x,
            product.x_scales[:num_x_scales],
            product.x_scales[num_x_scales:].view(np.int32),
            y,
            y_stride,
            num_columns,
            product.group_size,
            num_panels,
            kind == "int4",
            has_zeros,
        )
    check_result(product, y, y_stride)


# One column, around a step and a tile (32 and 64 columns), around groups, several tiles and a rest.
COLUMNS = [1, 2, 7, 31, 32, 33, 64, 65, 127, 128, 130, 250]
SHAPES = [(1, 32), (2, 64), (3, 128), (5, 32)]  # panels, group size


@pytest.mark.parametrize(("kind", "has_zeros"), KINDS)
@pytest.mark.parametrize("num_columns", COLUMNS)
def test_source_multiplies_on_model_of_tiles(
    python_kernels: Any, kind: AmxFormat, has_zeros: bool, num_columns: int
) -> None:
    """Packed weights times x is the float64 product, for any rest of panels, tiles and groups."""
    for num_panels, group_size in SHAPES:
        product = random_product(kind, has_zeros, num_panels, num_columns, group_size)
        run_in_python(python_kernels, kind, has_zeros, product)


@settings(deadline=None, max_examples=40)
@given(
    kind_and_zeros=st.sampled_from(KINDS),
    num_panels=st.integers(1, 9),
    num_columns=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128]),
)
def test_source_multiplies_any_shape(
    python_kernels: Any,
    kind_and_zeros: tuple[AmxFormat, bool],
    num_panels: int,
    num_columns: int,
    group_size: int,
) -> None:
    """The product is right for shapes nobody chose."""
    product = random_product(*kind_and_zeros, num_panels, num_columns, group_size)
    run_in_python(python_kernels, *kind_and_zeros, product)


def test_largest_codes_do_not_overflow(python_kernels: Any) -> None:
    """128 columns of the largest bytes are summed and centred exactly."""
    x = np.full(TOKENS * 128, -127, np.int8)
    x_scales = np.ones(TOKENS, np.float32)
    x_sums = np.full(TOKENS, -127 * 128, np.int32)
    panels = np.full(16 * 128, 255, np.uint8)
    scales = to_bfloat16_bits(np.ones(16, np.float32))
    y = np.full(TOKENS * 16, np.nan, np.float32)

    python_kernels._multiply_codes(
        panels,
        scales,
        np.empty(0, np.uint8),
        x.view(np.uint8),
        x_scales,
        x_sums,
        y,
        16,
        128,
        128,
        1,
        False,
        False,
    )

    assert set(y.tolist()) == {-127.0 * 127 * 128}


_CROSS_COMPILE = """
from cpu_kernels import amx
for kind, has_zeros in {kinds}:
    kernel = amx._compiled_kernel(kind, has_zeros)
    print("kernel", kind, has_zeros)
    print(kernel._library.get_asm_str())
"""


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Counter[str]]:
    """How often each instruction stands in each kernel's code for a processor with AMX."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the processor to compile for is not of this machine's kind")
    features = Isa(level="amx", highest="amx", vendor="intel").llvm_features
    environment = os.environ | {
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("numba")),
    }
    environment.pop("HETERO_ISA", None)
    finished = subprocess.run(
        [sys.executable, "-c", _CROSS_COMPILE.format(kinds=KINDS)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    counts: dict[tuple[str, bool], Counter[str]] = {}
    for text in finished.stdout.split("kernel ")[1:]:
        first, *lines = text.splitlines()
        kind, has_zeros = first.split()
        words = [line.split()[0] for line in lines if line.startswith("\t") and line.strip()]
        counts[kind, has_zeros == "True"] = Counter(words)
    return counts


@pytest.mark.parametrize(("kind", "has_zeros"), KINDS)
def test_machine_code_has_the_tile_instructions(
    machine_code: dict[tuple[str, bool], Counter[str]], kind: AmxFormat, has_zeros: bool
) -> None:
    """Cross-compiled, a kernel configures once, multiplies tiles, and spills none."""
    code = machine_code[kind, has_zeros]
    product, other = ("tdpbf16ps", "tdpbsud") if kind == "bfloat16" else ("tdpbsud", "tdpbf16ps")

    assert (code["ldtilecfg"], code["tilerelease"], code["sttilecfg"]) == (1, 1, 0)
    # whole tiles and the last one, four panels each; loops may be unrolled
    assert code[product] >= 8 and code[product] % 4 == 0
    assert code[other] == 0
    assert code["tilezero"] >= 4 and code["tilestored"] >= 4
    assert code["tileloadd"] * 4 >= code[product] * 5
    assert set(code) & {"tdpbssd", "tdpbusd", "tdpbuud"} == set()


def run_compiled(address: int, product: Product) -> None:
    """Call a kernel through its address and check the result."""
    kernel: Callable[..., None] = ctypes.CFUNCTYPE(
        None, *[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 4
    )(address)
    y_stride = 16 * product.num_panels + 3
    y = np.full(TOKENS * y_stride, np.nan, np.float32)
    inputs = (product.panels, product.scales, product.zeros, product.x, product.x_scales)
    kernel(
        *(array.ctypes.data for array in inputs),
        y.ctypes.data,
        y_stride,
        product.num_columns,
        product.group_size,
        product.num_panels,
    )
    check_result(product, y, y_stride)


def compile_on_emulated_tiles() -> None:
    """Compile the kernels with calls of `Tiles` for tile instructions, and run them.

    In a process of its own: what numba has compiled stays.
    """
    tiles = Tiles()

    def on_memory(instruction: Callable[..., None]) -> Callable[[int, int, int], None]:
        def act(number: int, start: int, stride: int) -> None:
            rows, row_bytes = tiles.tile(number).shape
            memory = (ctypes.c_uint8 * ((rows - 1) * stride + row_bytes)).from_address(start)
            instruction(number, np.ctypeslib.as_array(memory), 0, stride)

        return act

    def configure(start: int) -> None:
        tiles.ldtilecfg(np.ctypeslib.as_array((ctypes.c_uint8 * 64).from_address(start)))

    number, address, stride = ctypes.c_uint8, ctypes.c_void_p, ctypes.c_int64
    callbacks = {
        "ldtilecfg": ctypes.CFUNCTYPE(None, address)(configure),
        "tilerelease": ctypes.CFUNCTYPE(None)(tiles.tilerelease),
        "tilezero": ctypes.CFUNCTYPE(None, number)(tiles.tilezero),
        "tdpbf16ps": ctypes.CFUNCTYPE(None, *[number] * 3)(tiles.tdpbf16ps),
        "tdpbsud": ctypes.CFUNCTYPE(None, *[number] * 3)(tiles.tdpbsud),
        "tileloadd64": ctypes.CFUNCTYPE(None, number, address, stride)(on_memory(tiles.tileloadd)),
        "tilestored64": ctypes.CFUNCTYPE(None, number, address, stride)(
            on_memory(tiles.tilestored)
        ),
    }
    for name, callback in callbacks.items():
        place = ctypes.cast(callback, ctypes.c_void_p).value
        llvmlite.binding.add_symbol(f"emulated_{name}", place)
    call = simd._call

    def call_emulated(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
        return call(builder, name.replace("llvm.x86.", "emulated_"), result, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_instructions, "_call", call_emulated)
        for kind, has_zeros in KINDS:
            address_of_kernel = amx._compiled_kernel(kind, has_zeros).address
            for num_columns in COLUMNS:
                for num_panels, group_size in SHAPES:
                    product = random_product(kind, has_zeros, num_panels, num_columns, group_size)
                    run_compiled(address_of_kernel, product)


def test_compiled_kernels_multiply_on_emulated_tiles(tmp_path: Path) -> None:
    """All but the tile instructions compiled for this machine, the product is the float64 one."""
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.cpu_kernels import test_amx; test_amx.compile_on_emulated_tiles()",
        ],
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )

    # an error in a callback is printed and nothing else
    assert (finished.returncode, finished.stderr) == (0, "")


@needs_amx
@pytest.mark.parametrize(("kind", "has_zeros"), KINDS)
def test_compiled_kernels_multiply(kind: AmxFormat, has_zeros: bool) -> None:
    """On a processor with AMX the machine code gives the float64 product."""
    compute: AmxCompute = "amx-bfloat16" if kind == "bfloat16" else "amx-int8"
    address = amx.kernel_address(kind, compute, has_zeros)
    for num_columns in COLUMNS:
        for num_panels, group_size in SHAPES:
            product = random_product(kind, has_zeros, num_panels, num_columns, group_size)
            run_compiled(address, product)


def test_lowered_isa_turns_tiles_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below `amx` on the ladder no permission is asked for and no kernel is given out."""
    monkeypatch.setattr(amx, "isa", lambda: Isa(level="avx512-bf16", highest="amx", vendor="intel"))
    monkeypatch.setattr(amx, "request_permission", lambda: pytest.fail("asked for permission"))

    assert not amx.is_available()
    with pytest.raises(RuntimeError, match="is_available"):
        amx.kernel_address("int8", "amx-int8")


def test_refused_permission_turns_tiles_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with tiles is not enough."""
    monkeypatch.setattr(amx, "isa", lambda: Isa(level="amx", highest="amx", vendor="intel"))
    monkeypatch.setattr(amx, "request_permission", lambda: False)

    assert not amx.is_available()


def test_permission_needs_linux_on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the number of the system call means something else and is not used."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")

    assert not amx.request_permission.__wrapped__()


@pytest.mark.parametrize(
    ("kind", "compute", "has_zeros"),
    [
        ("bfloat16", "amx-int8", False),
        ("int4", "amx-bfloat16", False),
        ("int8", "amx-int8", True),
        ("float32", "amx-bfloat16", False),
        ("int8", "int8", False),
    ],
)
def test_kernels_that_do_not_exist_are_refused(kind: Any, compute: Any, has_zeros: bool) -> None:
    """Only formats and computes that go together have kernels."""
    with pytest.raises(ValueError, match="there is no"):
        amx.kernel_address(kind, compute, has_zeros)

"""Quantised panels on the accelerator: products near float64's, the weights those of the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.formats import WeightFormat, WeightKind
from hetero.model import quantised
from hetero.model.quantised import (
    Panels,
    QuantisedWeights,
    multiply,
    product,
    product_method,
    unpack_rows,
)
from tests.hetero.model.panel_products import (
    BOUNDS,
    INTERPRET,
    KINDS,
    SHAPES,
    Case,
    cases,
    random_panels,
    worst_error,
)

ROOT = Path(__file__).parents[3]
EVERY_DTYPE = ("float32", "float16", "bfloat16")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which Linux has"
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_weights_are_the_bits_of_the_cpu_kernels(
    kind: WeightKind, shape: tuple[int, int]
) -> None:
    """All at once, and the panels from the second on."""
    panels, weights_ERK = random_panels(kind, shape)
    for expert, expected_RK in enumerate(weights_ERK):
        for matrix, rows_RK in enumerate(np.split(expected_RK, 2)):
            found = unpack_rows(panels, expert, matrix)
            assert np.array_equal(found.numpy().view(np.uint32), rows_RK.view(np.uint32))
            some = unpack_rows(panels, expert, matrix, first_panel=1, count=1)
            assert np.array_equal(some.numpy(), rows_RK[16:32])


@pytest.mark.parametrize("case", cases(EVERY_DTYPE), ids=lambda case: case.name)
def test_unpacking_first_gives_the_products_of_float64(case: Case) -> None:
    assert worst_error(case, "unpack", torch.device("cpu")) <= BOUNDS[case.dtype]


def test_large_matrices_are_unpacked_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of one panel the same products."""
    panels, _ = random_panels("int4", (44, 300))
    one = Panels(
        blobs_EB=panels.blobs_EB[:1],
        weight_format=panels.weight_format,
        num_matrices=2,
        num_rows=44,
        num_columns=300,
    )
    x_TK = torch.randn(3, 300)
    expected = multiply(x_TK, one, "unpack")
    asked: list[int | None] = []
    unpack = quantised.unpack_rows

    def spy(*arguments: Any) -> torch.Tensor:
        asked.append(arguments[4])
        return unpack(*arguments)

    monkeypatch.setattr(quantised, "_PIECE_BYTES", 1)
    monkeypatch.setattr(quantised, "unpack_rows", spy)

    torch.testing.assert_close(multiply(x_TK, one, "unpack"), expected, rtol=0, atol=1e-5)
    assert asked == [1] * 6  # 3 panels of each matrix


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    """Errors of the kernels in triton's interpreter, by case."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.hetero.model.panel_products"],
        cwd=ROOT,
        env={**os.environ, INTERPRET: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    errors: dict[str, float] = json.loads(found.stdout)
    return errors


@needs_triton
def test_the_kernels_give_the_products_of_float64_in_tritons_interpreter(
    interpreted: dict[str, float],
) -> None:
    """Its products of tiles have no bfloat16: a GPU's are tested by the test below."""
    expected = {case.name: BOUNDS[case.dtype] for case in cases(EVERY_DTYPE)}
    num_left_out = sum(case.num_tokens > 1 for case in cases(("bfloat16",)))

    assert len(interpreted) == len(expected) - num_left_out
    # not(<=): a NaN is none
    wrong = {name: error for name, error in interpreted.items() if not error <= expected[name]}
    assert wrong == {}


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases(EVERY_DTYPE), ids=lambda case: case.name)
def test_the_kernels_give_the_products_of_float64_on_a_gpu(case: Case) -> None:
    assert worst_error(case, "triton", torch.device("cuda", 0)) <= BOUNDS[case.dtype]


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 16, 64])
def test_the_kernels_compile_for_a_gpu_and_read_panels_sixteen_bytes_at_a_time(
    kind: WeightKind, num_tokens: int, tmp_path: Path
) -> None:
    """For an Ampere GPU, whether there is one or not; tiles meet on tensor cores."""
    program = f"""
from tests.hetero.model.compiled_panels import assembly
print(assembly({kind!r}, {num_tokens}))
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    if num_tokens == 1:
        assert "ld.global.v4.b32" in found.stdout
    else:
        # 16 bytes from global to shared memory
        assert ", 0x10, " in found.stdout and "cp.async.cg.shared.global" in found.stdout
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in found.stdout


def test_a_device_without_cuda_unpacks() -> None:
    assert product_method(torch.device("cpu")) == "unpack"


@pytest.mark.gpu
def test_a_gpu_multiplies_with_our_kernels() -> None:
    assert product_method(torch.device("cuda", 0)) == "triton"


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_kernels_that_are_wrong_are_not_used_and_one_warning_says_so(
    error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", object())
    monkeypatch.setattr(quantised, "_probe_error", lambda device, num_tokens: error)
    device = torch.device("cuda", 7)  # is not asked
    with pytest.warns(RuntimeWarning, match="unpacked before each product.* is off by"):
        assert product_method(device) == "unpack"
    assert product_method(device) == "unpack"  # without a second warning
    product_method.cache_clear()


def test_without_triton_weights_are_unpacked_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(RuntimeWarning, match="many times slower: triton does not load"):
        assert product_method(torch.device("cuda", 7)) == "unpack"
    product_method.cache_clear()


def test_a_product_is_of_rows_or_of_panels_and_adds_the_bias() -> None:
    panels, weights_ERK = random_panels("int8", (20, 60))
    one = Panels(
        blobs_EB=panels.blobs_EB[:1],
        weight_format=WeightFormat(kind="int8", group_size=128),
        num_matrices=2,
        num_rows=20,
        num_columns=60,
    )
    bias = torch.randn(40)
    rows = {"qkv": torch.from_numpy(weights_ERK[0]), "qkv_bias": bias}
    packed = QuantisedWeights({"qkv_bias": bias}, {"qkv": one})
    x_TK = torch.randn(5, 60)

    torch.testing.assert_close(product(x_TK, packed, "qkv"), product(x_TK, rows, "qkv"))
    assert dict(packed) == {"qkv_bias": bias}

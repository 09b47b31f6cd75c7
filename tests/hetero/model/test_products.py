"""Products by every backend: against float64, who counts as available, and a fake ipex."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cpu_kernels.formats import WEIGHT_KINDS, WeightKind
from cpu_kernels.scratch import aligned_bytes
from hetero.model import products
from hetero.model.products import (
    ERROR_BOUNDS,
    available_backends,
    fits_groups,
    make_matrix,
    matrix_at,
    matrix_bytes,
    self_test,
    why_not_ipex,
)
from planner.kernels import BACKENDS, Backend

# Rounding a weight moves it by half a step of the largest of its group.
_STEPS: dict[WeightKind, float] = {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 127, "int4": 1 / 7}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was found out once is found out again."""
    available_backends.cache_clear()
    products._ipex.cache_clear()
    yield
    available_backends.cache_clear()
    products._ipex.cache_clear()


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_product_is_that_of_the_rows(backend: Backend, kind: WeightKind, num_tokens: int) -> None:
    """Within the stated bound, and what rounding the weights moves."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((48, 384)).astype(np.float32)
    x = rng.standard_normal((num_tokens, 384)).astype(np.float32)
    found = make_matrix(backend, kind, rows).multiply(x, num_threads=1)
    size = np.abs(x).astype(np.float64) @ np.abs(rows).astype(np.float64).T
    moved = _STEPS[kind] * np.abs(rows).max() * np.abs(x).sum(axis=1, keepdims=True)

    assert found.dtype == np.float32
    error = np.abs(found - x.astype(np.float64) @ rows.astype(np.float64).T)
    assert (error <= ERROR_BOUNDS[kind] * size + moved).all()


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_x_may_be_bfloat16_and_lie_anywhere(backend: Backend, kind: WeightKind) -> None:
    """Two bytes behind a cache line's start, as rows of a larger array may."""
    values = (np.arange(2 * 128) % 7 - 3).astype(np.float32).reshape(2, 128)
    bits = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    odd = aligned_bytes(2 + bits.nbytes)[2:].view(np.uint16).reshape(bits.shape)
    odd[:] = bits
    rows = (np.arange(16 * 128) % 5 - 2).astype(np.float32).reshape(16, 128)
    matrix = make_matrix(backend, kind, rows)

    expected = matrix.multiply(values, num_threads=1)
    np.testing.assert_allclose(matrix.multiply(odd, num_threads=1), expected, rtol=1e-2, atol=1)


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_threads_of_torch_are_put_back(kind: WeightKind) -> None:
    before = torch.get_num_threads()
    matrix = make_matrix("torch", kind, np.ones((16, 128), np.float32))
    matrix.multiply(np.ones((1, 128), np.float32), num_threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_a_matrix_may_be_made_of_any_bytes(backend: Backend, kind: WeightKind) -> None:
    """All zeros are a matrix of zeros, or of codes that scales of zero multiply."""
    blob = aligned_bytes(matrix_bytes(backend, kind, 32, 256))
    blob[:] = 0
    matrix = matrix_at(backend, kind, blob, 32, 256)
    found = matrix.multiply(np.ones((2, 256), np.float32), num_threads=1)
    assert (found == np.zeros((2, 32))).all()


def test_shapes_that_torch_cannot_quantise() -> None:
    """Whole groups of 128 columns, and rows that are stored 16 at a time."""
    shapes = ((16, 128), (48, 384), (8, 128), (16, 96))
    assert [fits_groups(*shape) for shape in shapes] == [True, True, False, False]


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_every_backend_is_there_or_has_a_reason(kind: WeightKind) -> None:
    """Ours always is; torch is in every release that hetero runs with."""
    found = available_backends(kind)
    assert tuple(found) == BACKENDS
    assert found["numba"] is None
    assert found["torch"] is None


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_a_product_that_is_wrong_is_not_available(kind: WeightKind) -> None:
    """One element of a sum that is left out is more than the bound; a NaN is."""
    multiply = products._TorchMatrix.multiply

    def wrong(self: Any, x: NDArray[Any], *, num_threads: int) -> NDArray[np.float32]:
        found = multiply(self, x, num_threads=num_threads)
        found[-1, -1] *= 2
        return found

    def nan(self: Any, x: NDArray[Any], *, num_threads: int) -> NDArray[np.float32]:
        return multiply(self, x, num_threads=num_threads) * np.float32("nan")

    for bad in (wrong, nan):
        with mock.patch.object(products._TorchMatrix, "multiply", bad):
            reason = self_test("torch", kind)
        assert reason is not None and reason.startswith(f"its {kind} product is off by ")


def test_a_backend_that_raises_is_not_available() -> None:
    """Its own words are the reason, the first line of them."""
    error = RuntimeError("no such operator\nlong trace")
    with mock.patch.object(products._TorchMatrix, "multiply", side_effect=error):
        assert available_backends("int4")["torch"] == "RuntimeError: no such operator"


@pytest.mark.parametrize(
    ("ipex", "torch_version", "reason"),
    [
        (None, "2.13.0", "not installed"),
        ("2.8.0", "2.13.0+cpu", "2.8.0 installed but torch is 2.13.0+cpu"),
        ("2.8.0", None, "2.8.0 installed but torch is not installed"),
        ("2.8.0", "2.8.1+cpu", None),
    ],
)
def test_ipex_is_judged_by_its_metadata(
    ipex: str | None, torch_version: str | None, reason: str | None
) -> None:
    with (
        mock.patch.object(sys, "platform", "linux"),
        mock.patch.object(platform, "machine", return_value="x86_64"),
    ):
        assert why_not_ipex(ipex, torch_version) == reason


def test_ipex_is_for_linux_on_x86() -> None:
    with mock.patch.object(platform, "machine", return_value="aarch64"):
        reason = why_not_ipex("2.8.0", "2.8.0")
    assert reason == "2.8.0 installed but this is not Linux on x86-64"


_GOOD = "print('loaded')\ndef optimize(layer, dtype):\n    return layer\n"
# What the real one does beside another torch than its own.
_BAD = "import os\nprint('ERROR! needs torch 2.8')\nos.exit(127)\n"


def install_ipex(folder: Path, version: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = folder / f"intel_extension_for_pytorch-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: intel-extension-for-pytorch\nVersion: {version}\n"
    )
    (folder / "intel_extension_for_pytorch.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "intel_extension_for_pytorch", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def test_ipex_beside_another_torch_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install_ipex(tmp_path, "1.0.0", _BAD, monkeypatch)
    assert available_backends("bfloat16")["ipex"] == (
        f"1.0.0 installed but torch is {products.installed_version('torch')}"
    )
    assert "intel_extension_for_pytorch" not in sys.modules
    assert capfd.readouterr().out == ""


def test_ipex_that_does_not_load_is_a_reason_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install_ipex(tmp_path, str(products.installed_version("torch")), _BAD, monkeypatch)
    reason = available_backends("bfloat16")["ipex"]
    assert reason is not None
    assert reason.startswith("ImportError: ipex does not load: module 'os' has no attribute 'exit'")
    assert capfd.readouterr().out == ""


def test_ipex_that_loads_multiplies_what_is_not_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install_ipex(tmp_path, str(products.installed_version("torch")), _GOOD, monkeypatch)
    assert [available_backends(kind)["ipex"] is None for kind in WEIGHT_KINDS] == [
        True,
        True,
        False,
        False,
    ]
    assert capfd.readouterr().out == ""

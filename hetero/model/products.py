"""Products y = x W^T on the CPU behind one function, whoever computes them.

The engine reaches the same code by shorter ways: our kernels as links of a chain (cpu_layers.py),
torch by F.linear on rows (attention.py, moe.py, mlp.py, head.py). Here the backends stand side by
side, to be tested against each other and to be measured. Of torch's products on quantised weights,
and of all of ipex's, the engine has no path: they are measured and reported, and never chosen.
"""

# T tokens, K columns (the summed dimension), N rows

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.formats import PANEL_ROWS, WeightFormat, WeightKind
from cpu_kernels.linear import PackedMatrix, linear
from cpu_kernels.microkernels import fastest_compute
from cpu_kernels.packing import pack_into
from cpu_kernels.scratch import ALIGNMENT, Scratch, aligned_bytes
from planner.kernels import BACKENDS, Backend
from planner.model_spec import QUANTIZATION_GROUP

IPEX = "intel-extension-for-pytorch"
_IPEX_MODULE = "intel_extension_for_pytorch"

# A product counts as right within this share of the sum of |x||w| of each of its elements: float32
# sums in any order; bfloat16 has 8 bits, to which torch rounds what it gives; quantised weights may
# meet an x that is rounded to int8.
ERROR_BOUNDS: dict[WeightKind, float] = {
    "float32": 1e-5,
    "bfloat16": 1e-2,
    "int8": 2e-2,
    "int4": 2e-2,
}
_CODE_LIMITS: dict[WeightKind, int] = {"int8": 127, "int4": 7}
_TORCH_DTYPES: dict[WeightKind, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    # the format of x
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}


class Matrix(Protocol):
    """A weight matrix as one backend reads it."""

    def multiply(self, x_TK: NDArray[Any], *, num_threads: int) -> NDArray[np.float32]:
        """x W^T; x is float32, or uint16 (the bits of bfloat16)."""
        ...


def weight_format(kind: WeightKind) -> WeightFormat:
    """How our kernels read weights of a kind."""
    is_quantised = kind in ("int8", "int4")
    return WeightFormat(kind=kind, group_size=QUANTIZATION_GROUP if is_quantised else None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _NumbaMatrix:
    weight: PackedMatrix
    scratch: Scratch = field(default_factory=Scratch)

    def multiply(self, x_TK: NDArray[Any], *, num_threads: int) -> NDArray[np.float32]:
        out_TN = np.empty((len(x_TK), self.weight.num_rows), np.float32)
        compute = fastest_compute(self.weight.weight_format)
        linear(
            x_TK,
            self.weight,
            compute=compute,
            num_threads=num_threads,
            scratch=self.scratch,
            out=out_TN,
        )
        return out_TN


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _TorchMatrix:
    """Rows for F.linear; codes and scales for the ops on quantised weights."""

    kind: WeightKind
    weight: Tensor
    scales: Tensor | None = None

    def multiply(self, x_TK: NDArray[Any], *, num_threads: int) -> NDArray[np.float32]:
        x = _as_tensor(x_TK, _TORCH_DTYPES[self.kind])
        with torch.inference_mode(), _torch_threads(num_threads):
            if self.kind == "int8":
                y = torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scales)
            elif self.kind == "int4":
                y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                    x, self.weight, QUANTIZATION_GROUP, self.scales
                )
            else:
                y = F.linear(x, self.weight)
            product: NDArray[np.float32] = y.float().numpy()
        return product


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _IpexMatrix:
    """A layer that ipex has packed."""

    dtype: torch.dtype
    layer: Any

    def multiply(self, x_TK: NDArray[Any], *, num_threads: int) -> NDArray[np.float32]:
        with torch.inference_mode(), _torch_threads(num_threads):
            product: NDArray[np.float32] = self.layer(_as_tensor(x_TK, self.dtype)).float().numpy()
        return product


def fits_groups(num_rows: int, num_columns: int) -> bool:
    """Can torch's products of quantised weights take a matrix of this shape?"""
    return num_rows % PANEL_ROWS == 0 and num_columns % QUANTIZATION_GROUP == 0


def make_matrix(backend: Backend, kind: WeightKind, rows_NK: NDArray[np.float32]) -> Matrix:
    """Rows as a backend reads them, rounded to a kind.

    Quantised weights have a scale for 128 neighbours of a row; torch's int8 one for the row.
    """
    num_rows, num_columns = rows_NK.shape
    blob = aligned_bytes(matrix_bytes(backend, kind, num_rows, num_columns))
    if backend == "numba":
        pack_into(np.ascontiguousarray(rows_NK), weight_format(kind), blob, num_threads=1)
        return matrix_at(backend, kind, blob, num_rows, num_columns)
    weight, scales = _torch_parts(kind, blob, num_rows, num_columns)
    rows = torch.from_numpy(rows_NK)
    if scales is None:
        weight.copy_(rows)
    elif kind == "int8":
        scales.copy_(rows.abs().amax(dim=1) / 127)
        weight.copy_((rows / scales.float()[:, None]).round().clamp(-127, 127))
    else:
        groups = rows.view(num_rows, -1, QUANTIZATION_GROUP)
        scales[..., 0] = (groups.abs().amax(dim=2) / 7).t()
        scales[..., 1] = 0
        each = scales[..., 0].float().t()[..., None]
        codes = (groups / each).round().clamp(-7, 7).view(num_rows, num_columns).int() + 8
        weight.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
    return matrix_at(backend, kind, blob, num_rows, num_columns)


def matrix_bytes(backend: Backend, kind: WeightKind, num_rows: int, num_columns: int) -> int:
    """Bytes of a matrix as a backend reads it."""
    if backend == "numba":
        return weight_format(kind).packed_bytes(num_rows, num_columns)
    num_weights = num_rows * num_columns
    if kind == "int8":
        return _whole_lines(num_weights) + 2 * num_rows
    if kind == "int4":
        # scale and zero point of each group
        return _whole_lines(num_weights // 2) + 4 * num_weights // QUANTIZATION_GROUP
    return num_weights * _TORCH_DTYPES[kind].itemsize


def matrix_at(
    backend: Backend, kind: WeightKind, blob: NDArray[np.uint8], num_rows: int, num_columns: int
) -> Matrix:
    """The matrix that lies in `matrix_bytes` bytes, whatever they hold; ipex takes a copy."""
    if backend == "numba":
        return _NumbaMatrix(
            weight=PackedMatrix(
                blob=blob,
                weight_format=weight_format(kind),
                num_rows=num_rows,
                num_columns=num_columns,
            )
        )
    weight, scales = _torch_parts(kind, blob, num_rows, num_columns)
    if backend == "torch":
        return _TorchMatrix(kind=kind, weight=weight, scales=scales)
    layer = torch.nn.Linear(num_columns, num_rows, bias=False, dtype=weight.dtype).eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return _IpexMatrix(dtype=weight.dtype, layer=_ipex().optimize(layer, dtype=weight.dtype))


def _torch_parts(
    kind: WeightKind, blob: NDArray[np.uint8], num_rows: int, num_columns: int
) -> tuple[Tensor, Tensor | None]:
    """Weights in a blob, and the scales behind them where there are any."""
    memory = torch.from_numpy(blob)
    num_weights = num_rows * num_columns
    if kind == "int8":
        codes = memory[:num_weights].view(torch.int8).view(num_rows, num_columns)
        return codes, memory[_whole_lines(num_weights) :].view(torch.bfloat16)
    if kind == "int4":
        codes = memory[: num_weights // 2].view(num_rows, num_columns // 2)
        scales = memory[_whole_lines(num_weights // 2) :].view(torch.bfloat16)
        return codes, scales.view(-1, num_rows, 2)
    return memory.view(_TORCH_DTYPES[kind]).view(num_rows, num_columns), None


def _as_tensor(x_TK: NDArray[Any], dtype: torch.dtype) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(x_TK))
    x = (x.view(torch.bfloat16) if x.dtype == torch.uint16 else x).to(dtype)
    # torch 2.13's product of int8 weights reads whole cache lines of x, or dies
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@contextlib.contextmanager
def _torch_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == num_threads:
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def available_backends(kind: WeightKind) -> dict[Backend, str | None]:
    """Why a backend cannot multiply weights of a kind here; None where it can.

    A backend counts only after its product of a small matrix was right within `ERROR_BOUNDS`.
    Looked at once; the first call may compile kernels.
    """
    return {backend: _why_not(backend, kind) for backend in BACKENDS}


def _why_not(backend: Backend, kind: WeightKind) -> str | None:
    if backend == "ipex":
        reason = why_not_ipex(installed_version(IPEX), installed_version("torch"))
        if reason is None and kind in ("int8", "int4"):
            reason = f"has no product of {kind} weights that lie as they are read"
        if reason is not None:
            return reason
    try:
        return self_test(backend, kind)
    # whatever a backend raises makes it unavailable; old builds lack the op
    except (ArithmeticError, AttributeError, ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def self_test(backend: Backend, kind: WeightKind) -> str | None:
    """Multiply a small matrix, and compare with float64; what was wrong, or None.

    Its weights are multiples of 1/128 that every kind holds without rounding.
    """
    rng = np.random.default_rng(0)
    limit = _CODE_LIMITS.get(kind, 127)
    codes_NK = rng.integers(-limit, limit + 1, (32, 2 * QUANTIZATION_GROUP))
    codes_NK[:, ::QUANTIZATION_GROUP] = limit
    rows_NK = (codes_NK / 128).astype(np.float32)
    # so does bfloat16
    x_TK = (rng.integers(-64, 65, (2, rows_NK.shape[1])) / 32).astype(np.float32)
    num_threads = torch.get_num_threads()
    found_TN = make_matrix(backend, kind, rows_NK).multiply(x_TK, num_threads=num_threads)
    expected_TN = x_TK.astype(np.float64) @ rows_NK.astype(np.float64).T
    sizes_TN = np.abs(x_TK).astype(np.float64) @ np.abs(rows_NK).astype(np.float64).T
    error = float(np.max(np.abs(found_TN - expected_TN) / sizes_TN))
    if error <= ERROR_BOUNDS[kind]:  # False for NaN
        return None
    return f"its {kind} product is off by {error:.1e} of the sum of |x||w|, above the bound"


def installed_version(name: str) -> str | None:
    """Version of a package by its metadata; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def why_not_ipex(ipex: str | None, torch_version: str | None) -> str | None:
    """Judge ipex by metadata: beside another torch, importing it prints to stdout and raises."""
    if ipex is None:
        return "not installed"
    if torch_version is None or ipex.split(".")[:2] != torch_version.split(".")[:2]:
        return f"{ipex} installed but torch is {torch_version or 'not installed'}"
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"{ipex} installed but this is not Linux on x86-64"
    return None


@cache
def _ipex() -> Any:
    """Import ipex, which `why_not_ipex` has nothing against; it may still print and raise."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return importlib.import_module(_IPEX_MODULE)
        except (Exception, SystemExit) as error:
            raise ImportError(f"ipex does not load: {error}") from error

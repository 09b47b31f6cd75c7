"""Quantised weights on the accelerator: panels as they were copied, multiplied as they lie."""

# T tokens, N rows of tokens sorted by expert, K columns, R rows of a matrix, E experts, B bytes

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cpu_kernels.formats import PANEL_ROWS, STEP_BYTES, WeightFormat, num_panels

# Our kernels for CUDA, or what any device can do: unpack, then multiply.
ProductMethod = Literal["triton", "unpack"]

# Unpacked weights of a piece of a matrix take no more than this.
_PIECE_BYTES = 64 << 20
# Shares of the sum of |x||w| that the first product on a device may be off by: sums of float32, or
# what bfloat16 rounds.
_ERROR_BOUND = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panels:
    """Packed matrices of one shape for each of E experts; what is no expert is one expert.

    Attributes
    ----------
    blobs_EB : Tensor
        Of each expert `num_matrices` blobs, one after the other, that begin at cache lines.
    num_rows, num_columns : int
        Of each matrix.
    """

    blobs_EB: Tensor
    weight_format: WeightFormat
    num_matrices: int
    num_rows: int
    num_columns: int

    def __post_init__(self) -> None:
        num_bytes = self.num_matrices * self.blob_bytes
        assert self.weight_format.is_quantised and not self.weight_format.has_zero_point
        assert self.blobs_EB.dtype == torch.uint8 and self.blobs_EB.shape[1] == num_bytes

    @property
    def blob_bytes(self) -> int:
        """Bytes of one matrix."""
        return self.weight_format.packed_bytes(self.num_rows, self.num_columns)

    @property
    def num_outputs(self) -> int:
        """Rows of all matrices of an expert."""
        return self.num_matrices * self.num_rows


class QuantisedWeights(Mapping[str, Tensor]):
    """The roles of a quantised module: vectors by role, and beside them matrices as panels."""

    def __init__(self, vectors: Mapping[str, Tensor], panels: Mapping[str, Panels]) -> None:
        self._vectors = vectors
        self.panels = panels

    def __getitem__(self, role: str) -> Tensor:
        return self._vectors[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)


def product(x_TK: Tensor, weights: Mapping[str, Tensor], role: str) -> Tensor:
    """x W^T of a role's matrix, in rows or in panels, and its bias where it has one."""
    bias = weights.get(f"{role}_bias")
    if not isinstance(weights, QuantisedWeights):
        return F.linear(x_TK, weights[role], bias)
    y_TR = multiply(x_TK, weights.panels[role], product_method(x_TK.device))
    return y_TR if bias is None else y_TR.add_(bias)


def multiply(x_TK: Tensor, panels: Panels, method: ProductMethod) -> Tensor:
    """x W^T of the matrices of one expert, side by side, in the format of x."""
    if method == "triton":
        from hetero.model.triton_panels import multiply_panels

        return multiply_panels(x_TK, panels)
    out_TR = x_TK.new_empty(len(x_TK), panels.num_outputs)
    _multiply_unpacked(x_TK, panels, 0, out_TR)
    return out_TR


def multiply_by_expert(
    x_NK: Tensor, panels: Panels, ends_E: Tensor, method: ProductMethod
) -> Tensor:
    """Each expert's rows by its matrices: expert e has rows ends[e - 1] to ends[e].

    Rows behind the last end hold anything. Our kernels do not make the host wait.
    """
    if method == "triton":
        from hetero.model.triton_panels import multiply_panels_by_expert

        return multiply_panels_by_expert(x_NK, panels, ends_E)
    out_NR, start = x_NK.new_empty(len(x_NK), panels.num_outputs), 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            _multiply_unpacked(x_NK[start:end], panels, expert, out_NR[start:end])
            start = end
    return out_NR


def _multiply_unpacked(x_TK: Tensor, panels: Panels, expert: int, out_TR: Tensor) -> None:
    """The obvious form: float32 weights, exact, some panels at a time."""
    x_TK = x_TK.float()
    some = max(1, _PIECE_BYTES // (4 * PANEL_ROWS * panels.num_columns))
    for matrix in range(panels.num_matrices):
        for first in range(0, num_panels(panels.num_rows), some):
            rows_RK = unpack_rows(panels, expert, matrix, first, some)
            begin = matrix * panels.num_rows + first * PANEL_ROWS
            out_TR[:, begin : begin + len(rows_RK)] = x_TK @ rows_RK.t()


def unpack_rows(
    panels: Panels, expert: int, matrix: int, first_panel: int = 0, count: int | None = None
) -> Tensor:
    """Weights of a matrix, or of some of its panels, in float32: the bits of `formats.unpack`."""
    format_, num_rows, num_columns = panels.weight_format, panels.num_rows, panels.num_columns
    assert format_.group_size is not None
    begin, end = matrix * panels.blob_bytes, num_panels(num_rows)
    blob_B = panels.blobs_EB[expert, begin : begin + panels.blob_bytes]
    some = slice(first_panel, end if count is None else min(end, first_panel + count))
    scales_at = format_.scales_at(num_rows, num_columns)
    num_groups = format_.num_groups(num_columns)
    # panels, steps, the 16 rows, 4 bytes of each
    bytes_PSR4 = blob_B[:scales_at].view(end, -1, PANEL_ROWS, 4)[some]
    num_steps = format_.panel_bytes(num_columns) // STEP_BYTES
    if format_.kind == "int4":
        halves = torch.stack((bytes_PSR4 & 15, bytes_PSR4 >> 4), dim=3)
        codes_PRSC = halves.flatten(3).transpose(1, 2)
    else:
        codes_PRSC = bytes_PSR4.transpose(1, 2)
    codes_RK = codes_PRSC.reshape(-1, num_steps * format_.columns_per_step)[:, :num_columns]
    scales_PGR = blob_B[scales_at : scales_at + 2 * end * num_groups * PANEL_ROWS]
    scales_PGR = scales_PGR.view(torch.bfloat16).view(end, num_groups, PANEL_ROWS)[some]
    scales_RG = scales_PGR.transpose(1, 2).reshape(-1, num_groups).float()
    scales_RK = scales_RG.repeat_interleave(format_.group_size, dim=1)[:, :num_columns]
    rows_RK = codes_RK.float().sub_(format_.zero_code).mul_(scales_RK)
    return rows_RK[: num_rows - PANEL_ROWS * first_panel]


@cache
def product_method(device: torch.device) -> ProductMethod:
    """Our kernels where a first product with them is right, else what any device can do.

    Looked at once for a device; where CUDA has to do without them, one warning says why.
    """
    if device.type != "cuda":
        return "unpack"
    reason = _why_not_triton(device)
    if reason is None:
        return "triton"
    warnings.warn(
        f"quantised weights are unpacked before each product, many times slower: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "unpack"


def _why_not_triton(device: torch.device) -> str | None:
    """What is wrong with our kernels on a device; None where a small product is right."""
    try:
        import triton  # noqa: F401
    except ImportError as failure:
        return f"triton does not load: {failure}"
    try:
        error = max(_probe_error(device, num_tokens) for num_tokens in (1, 3))
    # whatever a compiler or a driver raises makes them unavailable
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}".splitlines()[0]
    if error <= _ERROR_BOUND:  # False for NaN
        return None
    return f"a product by triton is off by {error:.1e} of the sum of |x||w|, above the bound"


def _probe_error(device: torch.device, num_tokens: int) -> float:
    """How far the kernels' product of a matrix of random codes is from the obvious one."""
    format_, generator = WeightFormat(kind="int4", group_size=128), torch.Generator().manual_seed(0)
    num_rows, num_columns = 2 * PANEL_ROWS, 256
    num_bytes = format_.packed_bytes(num_rows, num_columns)
    blob_B = torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator)
    scales = blob_B[format_.scales_at(num_rows, num_columns) :].view(torch.bfloat16)
    scales.fill_(0.5)
    panels = Panels(
        blobs_EB=blob_B.to(device)[None],
        weight_format=format_,
        num_matrices=1,
        num_rows=num_rows,
        num_columns=num_columns,
    )
    x_TK = torch.randn(num_tokens, num_columns, generator=generator).to(device, torch.bfloat16)
    found, expected = (multiply(x_TK, panels, each).float() for each in ("triton", "unpack"))
    sizes_TR = x_TK.float().abs() @ unpack_rows(panels, 0, 0).abs().t()
    return float(((found - expected).abs() / sizes_TR).max())

"""Products and expert layers in float64, each with a bound of what the kernels may differ.

A value the kernels hold is known as (value, error): the exact one, and how far the kernels' own may
be from it. Every bound follows from how often a kernel rounds, none from what was seen.
"""

# T tokens, K columns, N rows, D hidden, I expert width

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpu_kernels.experts import NO_EXPERT, PackedExperts
from cpu_kernels.formats import (
    WeightFormat,
    from_bfloat16_bits,
    pack,
    to_bfloat16_bits,
    unpack,
)
from cpu_kernels.linear import PackedMatrix
from cpu_kernels.microkernels import Compute, computes

FORMATS = (
    WeightFormat(kind="float32"),
    WeightFormat(kind="bfloat16"),
    *(WeightFormat(kind="int8", group_size=size) for size in (32, 64, 128)),
    *(WeightFormat(kind="int4", group_size=size) for size in (32, 64, 128)),
    *(WeightFormat(kind="int4", group_size=size, has_zero_point=True) for size in (32, 64, 128)),
)
# One of every kind: group sizes share their kernels.
KINDS = (FORMATS[0], FORMATS[1], FORMATS[2], FORMATS[6], FORMATS[10])
# Half a unit in the last place of 1.
ROUNDING = 2.0**-24
# Beside the additions of all columns: those of at most 4 sums kept side by side, and a product that
# is rounded before it is added, where the processor has no fused form.
_MORE_ROUNDINGS = 5
_SMALLEST_NORMAL = 2.0**-126


def cases(formats: tuple[WeightFormat, ...] = FORMATS) -> list[tuple[WeightFormat, Compute]]:
    """Every format with every kind of arithmetic that this process has for it."""
    return [(format, compute) for format in formats for compute in computes(format)]


def case_name(case: tuple[WeightFormat, Compute]) -> str:
    """As pytest shows it."""
    format, compute = case
    zero = "-zero" if format.has_zero_point else ""
    return f"{format.kind}-{format.group_size or 'whole'}{zero}-{compute}"


class Approximate(NamedTuple):
    """Exact values in float64, and how far a kernel's may be from them."""

    value: NDArray[np.float64]
    error: NDArray[np.float64]


def exact(x: NDArray[Any]) -> Approximate:
    """What an array holds, to the last bit; uint16 is bfloat16."""
    value = (from_bfloat16_bits(x) if x.dtype == np.uint16 else x).astype(np.float64)
    return Approximate(value, np.zeros_like(value))


def product(
    x: Approximate, weight_NK: NDArray[np.float64], format: WeightFormat, compute: Compute
) -> Approximate:
    """x W^T."""
    rounding = _rounding_of_x(np.abs(x.value) + x.error, format, compute)
    magnitude = (np.abs(x.value) + x.error + rounding) @ np.abs(weight_NK).T
    # int8: a group's sum is exact in int32 and as float32; its scale is a rounded product
    num_columns = weight_NK.shape[1]
    num_roundings = format.num_groups(num_columns) if compute == "int8" else num_columns
    error = (x.error + rounding) @ np.abs(weight_NK).T
    error += (num_roundings + _MORE_ROUNDINGS) * ROUNDING * magnitude
    # what lies below a normal float32 may be flushed to zero
    return Approximate(x.value @ weight_NK.T, error + (num_columns + 1) * _SMALLEST_NORMAL)


def _rounding_of_x(
    largest_TK: NDArray[np.float64], format: WeightFormat, compute: Compute
) -> NDArray[np.float64]:
    """How far x may move before it is multiplied; its magnitude is at most `largest`."""
    if compute == "float":
        return np.zeros_like(largest_TK)
    if compute == "bfloat16":
        return largest_TK * 2.0**-8
    assert format.group_size is not None
    # q = rint(fl(x * fl(127 / m))), scale s = fl(m / 127): the two roundings in q move it by
    # 127 * 2**-23 at most, rint by 1/2, and 127 * fl(m / 127) is 127 * 2**-24 off m. Together less
    # than s (1/2 + 2**-15). A group below 1e-30 becomes zeros, which is less than s (1/2 + 127).
    error = np.empty_like(largest_TK)
    for first in range(0, largest_TK.shape[1], format.group_size):
        group = slice(first, first + format.group_size)
        most = largest_TK[:, group].max(axis=1, keepdims=True, initial=0)
        error[:, group] = np.where(most > 1e-30, most / 127 * (0.5 + 2.0**-15), most)
    return error


def gated(gate: Approximate, up: Approximate) -> Approximate:
    """silu(gate) * up."""
    with np.errstate(over="ignore"):
        silu = gate.value / (1 + np.exp(-gate.value))
    # The slope of silu is at most 1.1. Of its own arithmetic: 2**x has a relative error of 3e-7
    # (test_simd.py), x = -gate * log2(e) is rounded twice, |x| * 2**-23, which is a relative
    # |gate| * 2**-23 of 2**x; then a sum and a quotient.
    own = np.abs(silu) * (3e-7 + (np.abs(gate.value) + 2) * 2 * ROUNDING)
    silu_error = 1.1 * gate.error + own
    value = silu * up.value
    error = np.abs(silu) * up.error + np.abs(up.value) * silu_error + silu_error * up.error
    return Approximate(value, error + 2 * ROUNDING * np.abs(value) + _SMALLEST_NORMAL)


class Matrix(NamedTuple):
    """A packed matrix and what it stands for."""

    packed: PackedMatrix
    weight_NK: NDArray[np.float64]


def matrix_of(weight_NK: NDArray[np.float32], format: WeightFormat) -> Matrix:
    """Pack a matrix, rounded as its format does."""
    num_rows, num_columns = weight_NK.shape
    blob = pack(weight_NK, format)
    packed = PackedMatrix(
        blob=blob, weight_format=format, num_rows=num_rows, num_columns=num_columns
    )
    return Matrix(packed, unpack(blob, format, num_rows, num_columns).astype(np.float64))


def random_matrix(
    rng: np.random.Generator, num_rows: int, num_columns: int, format: WeightFormat
) -> Matrix:
    """Weights of order 1, rows of different sizes."""
    weight = rng.standard_normal((num_rows, num_columns)) * rng.uniform(0.2, 2, (num_rows, 1))
    return matrix_of(weight.astype(np.float32), format)


class Experts(NamedTuple):
    """Packed experts, and gate, up and down of each as they are packed."""

    packed: PackedExperts
    matrices: list[tuple[Matrix, Matrix, Matrix]]


def experts_of(matrices: list[tuple[Matrix, Matrix, Matrix]]) -> Experts:
    """Join the blobs of gate, up and down of every expert."""
    gate = matrices[0][0].packed
    packed = PackedExperts(
        blob=np.concatenate([matrix.packed.blob for expert in matrices for matrix in expert]),
        weight_format=gate.weight_format,
        num_experts=len(matrices),
        hidden=gate.num_columns,
        width=gate.num_rows,
    )
    return Experts(packed, matrices)


def random_experts(
    rng: np.random.Generator, num_experts: int, hidden: int, width: int, format: WeightFormat
) -> Experts:
    """Experts whose outputs are of order 1."""

    def matrix(rows: int, columns: int) -> Matrix:
        weight = rng.standard_normal((rows, columns)) * columns**-0.5
        return matrix_of(weight.astype(np.float32), format)

    return experts_of(
        [
            (matrix(width, hidden), matrix(width, hidden), matrix(hidden, width))
            for _ in range(num_experts)
        ]
    )


def expert_layer(
    x: NDArray[Any],
    experts: Experts,
    ids_Tk: NDArray[np.int64],
    weights_Tk: NDArray[np.float32],
    compute: Compute,
) -> Approximate:
    """What `run_experts` writes, one choice after the other."""
    format = experts.packed.weight_format
    num_tokens, top_k = ids_Tk.shape
    shape = (num_tokens, experts.packed.hidden)
    value, error, magnitude = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for token in range(num_tokens):
        row = exact(x[token : token + 1])
        for choice in np.flatnonzero(ids_Tk[token] != NO_EXPERT).tolist():
            gate, up, down = experts.matrices[ids_Tk[token, choice]]
            h = gated(
                product(row, gate.weight_NK, format, compute),
                product(row, up.weight_NK, format, compute),
            )
            y = product(h, down.weight_NK, format, compute)
            weight = float(weights_Tk[token, choice])
            value[token] += weight * y.value[0]
            error[token] += abs(weight) * y.error[0]
            magnitude[token] += abs(weight) * (np.abs(y.value[0]) + y.error[0])
    error += (top_k + 1) * ROUNDING * magnitude
    return Approximate(value, error + _SMALLEST_NORMAL)


def stored(x: NDArray[np.float32], x_format: str) -> NDArray[Any]:
    """x as float32, or as the bits of bfloat16."""
    return to_bfloat16_bits(x) if x_format == "bfloat16" else x


def assert_within(actual: NDArray[Any], expected: Approximate) -> None:
    """Every element was written, and lies within its bound."""
    distance = np.abs(exact(actual).value - expected.value)
    # not <=, as NaN must not pass
    wrong = np.argwhere(~(distance <= expected.error))
    assert len(wrong) == 0, (
        f"{len(wrong)} of {actual.size} elements are off, the first at {wrong[0]}: "
        f"{exact(actual).value[tuple(wrong[0])]} is not {expected.value[tuple(wrong[0])]} "
        f"within {expected.error[tuple(wrong[0])]}"
    )

"""Products with quantised panels, and how far each is from float64: the bodies of several tests.

Run as a program it prints them for triton's interpreter, in JSON: whether triton interprets is
decided when it is imported.
"""

# T tokens, N rows of tokens sorted by expert, K columns, R rows of a matrix, M matrices, E experts

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cpu_kernels.formats import WeightFormat, WeightKind, pack, unpack
from hetero.model.quantised import Panels, ProductMethod, multiply, multiply_by_expert
from planner.model_spec import QUANTIZATION_GROUP

INTERPRET = "TRITON_INTERPRET"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Shares of the sum of |x||w|: 300 sums of float32 in any order, and what y is rounded to.
BOUNDS = {"float32": 1e-6, "float16": 2**-11 + 1e-6, "bfloat16": 2**-8 + 1e-6}
NUM_EXPERTS = 3
KINDS: tuple[WeightKind, ...] = ("int8", "int4")
# (rows, columns): less than a panel and a group, whole ones, some and a part
SHAPES = ((20, 60), (64, 256), (44, 300), (7, 129))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Some tokens by the matrices of an expert, or of those whose tokens end so."""

    kind: WeightKind
    shape: tuple[int, int]
    dtype: str
    num_tokens: int
    ends: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        rows, columns = self.shape
        by = "one" if self.ends is None else "-".join(map(str, self.ends))
        return f"{self.kind} {rows}x{columns} {self.dtype} {self.num_tokens} {by}"


def cases(dtypes: tuple[str, ...]) -> list[Case]:
    """One token, a tile in part, several tiles; experts with a token, with many, with none.

    The last rows of some are of no expert here.
    """
    found = [
        Case(kind=kind, shape=shape, dtype=dtype, num_tokens=count)
        for kind in KINDS
        for shape in SHAPES
        for dtype in dtypes
        for count in (1, 3, 17)
    ]
    found += [
        Case(kind=kind, shape=SHAPES[2], dtype=dtype, num_tokens=count, ends=ends)
        for kind in KINDS
        for dtype in dtypes
        for count, ends in (
            (1, (0, 1, 1)),
            (9, (4, 4, 7)),
            (70, (20, 22, 70)),
            (200, (0, 120, 130)),
        )
    ]
    return found


def random_panels(kind: WeightKind, shape: tuple[int, int]) -> tuple[Panels, NDArray[np.float32]]:
    """Two matrices for each expert, and the weights that they stand for, (E, M * R, K)."""
    format_ = WeightFormat(kind=kind, group_size=QUANTIZATION_GROUP)
    rng = np.random.default_rng(sum(shape))
    weights_EMRK = rng.standard_normal((NUM_EXPERTS, 2, *shape)).astype(np.float32)
    blobs = [[pack(rows_RK, format_) for rows_RK in pair] for pair in weights_EMRK]
    panels = Panels(
        blobs_EB=torch.from_numpy(np.stack([np.concatenate(pair) for pair in blobs])),
        weight_format=format_,
        num_matrices=2,
        num_rows=shape[0],
        num_columns=shape[1],
    )
    unpacked = [np.concatenate([unpack(blob, format_, *shape) for blob in pair]) for pair in blobs]
    return panels, np.stack(unpacked)


def worst_error(case: Case, method: ProductMethod, device: torch.device) -> float:
    """The largest distance from float64, as a share of the sum of |x||w|; NaN of what is NaN."""
    given, weights_ERK = random_panels(case.kind, case.shape)
    # one that does not begin at the memory's first byte
    some = slice(1, 2) if case.ends is None else slice(None)
    panels = replace(given, blobs_EB=given.blobs_EB.to(device)[some])
    generator = torch.Generator().manual_seed(case.num_tokens)
    x = torch.randn(case.num_tokens, case.shape[1], generator=generator).to(DTYPES[case.dtype])
    if case.ends is None:
        found = multiply(x.to(device), panels, method)
        parts = [(0, case.num_tokens, weights_ERK[1])]
    else:
        ends_E = torch.tensor(case.ends, dtype=torch.int32, device=device)
        found = multiply_by_expert(x.to(device), panels, ends_E, method)
        starts = (0, *case.ends)
        parts = list(zip(starts, case.ends, weights_ERK, strict=False))
    assert found.dtype == x.dtype and found.shape == (case.num_tokens, 2 * case.shape[0])
    errors = [0.0]
    for start, end, weights_RK in parts:
        x64, w64 = x[start:end].double().numpy(), weights_RK.astype(np.float64)
        distances = np.abs(found[start:end].cpu().double().numpy() - x64 @ w64.T)
        errors.extend((distances / (np.abs(x64) @ np.abs(w64).T)).max(axis=1))
    return float(np.max(errors))


def main() -> None:
    """Print the errors of all cases by the kernels in triton's interpreter."""
    assert os.environ[INTERPRET] == "1"
    # Its products of tiles have no bfloat16.
    all_cases = cases(("float32", "float16"))
    all_cases += [case for case in cases(("bfloat16",)) if case.num_tokens == 1]
    cpu = torch.device("cpu")
    found = {case.name: worst_error(case, "triton", cpu) for case in all_cases}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

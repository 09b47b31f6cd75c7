"""Pace: seconds of a fixed product, which tell how fast the machine is at this moment."""

from __future__ import annotations

import numpy as np

from cpu_kernels.calls import Chain
from cpu_kernels.formats import WeightFormat, pack
from cpu_kernels.linear import PackedMatrix, linear_link
from cpu_kernels.microkernels import fastest_compute
from cpu_kernels.scratch import Scratch
from hetero.measure.timing import host_seconds

# 0.5 GFLOP: some milliseconds of a core, of weights that stay in its second cache.
_ROWS, _TOKENS, _NUM_LINKS = 512, 64, 16
# The fastest of a few: one interrupt is no burst.
_NUM_RUNS = 2


class Pace:
    """A product of bfloat16 weights on some threads, always the same one."""

    def __init__(self, num_threads: int) -> None:
        weights = WeightFormat(kind="bfloat16")
        matrix = PackedMatrix(
            blob=pack(np.full((_ROWS, _ROWS), 0.01, np.float32), weights),
            weight_format=weights,
            num_rows=_ROWS,
            num_columns=_ROWS,
        )
        x, scratch = np.full((_TOKENS, _ROWS), 0x3C00, np.uint16), Scratch()
        links = [
            linear_link(
                x,
                matrix,
                compute=fastest_compute(weights),
                num_threads=num_threads,
                scratch=scratch,
                out=np.empty((_TOKENS, _ROWS), np.float32),
            )
            for _ in range(_NUM_LINKS)
        ]
        self._chain = Chain(links, num_threads=num_threads)
        self._chain.run()

    def __call__(self) -> float:
        """Seconds of the product now."""
        return min(host_seconds(self._chain.run) for _ in range(_NUM_RUNS))

"""Do the CPU's products read their weights at the speed of memory, and beat torch's best op?

Every product reads weights that were last touched more than the caches hold ago; a plain read of
the same amount is measured beside it, in the same round: the ceiling. torch's best op for a format
is F.linear for bfloat16, _weight_int8pack_mm for int8 (beyond 8 tokens the bare _int_mm), and
_weight_int4pack_mm_for_cpu for int4 (groups of 128). What would change our mind: at one token less
than 95 % (bfloat16), 90 % (int8) or 85 % (int4) of the ceiling; from 64 tokens on, a rate below
torch's.

    python bench/bench_kernels.py [--quick] [--check]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import torch

from cpu_kernels.formats import WeightFormat, pack, to_bfloat16_bits, unpack
from cpu_kernels.isa import isa
from cpu_kernels.linear import PackedMatrix, linear
from cpu_kernels.memory_read import read_memory
from cpu_kernels.microkernels import Compute, fastest_compute
from cpu_kernels.scratch import Scratch
from cpu_kernels.threads import available_cores

SHAPES = ((768, 2048), (2048, 768), (1408, 2048), (14336, 4096), (4096, 14336))
QUICK_SHAPES = ((768, 2048), (2048, 768))
TOKENS = (1, 2, 4, 8, 16, 64, 512)
QUICK_TOKENS = (1, 4, 64)
FORMATS = {
    "bf16": WeightFormat(kind="bfloat16"),
    "int8": WeightFormat(kind="int8", group_size=128),
    "int4": WeightFormat(kind="int4", group_size=128),
}
# A pass over so much is one timing: long beside a fork and join, short beside a neighbour's burst.
PASS_BYTES = 64 << 20
# Products of more tokens do not wait for memory: fewer of them are enough.
PASS_OPERATIONS = 2e10
# Beyond, the bare product of bytes is torch's faster one.
_MAX_INT8PACK_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Copies of one packed matrix, together larger than the caches, and torch's form of each."""

    matrices: list[PackedMatrix]
    torch_ops: list[Callable[[torch.Tensor], torch.Tensor]]
    packed_bytes: int
    whole: np.ndarray[Any, np.dtype[np.uint8]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, three token counts")
    parser.add_argument("--check", action="store_true", help="also compare with float64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rotate-mb", type=int, default=0, help="0: eight times the last cache")
    parser.add_argument("--threads", type=int, default=available_cores())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rotate = (args.rotate_mb << 20) or (512 << 20 if args.quick else rotated_bytes())
    say(f"{args.threads} threads, {isa().level}, {rotate >> 20} MB in rotation")
    say(f"{'format':6} {'n':>6} {'k':>6} {'m':>4} {'us':>9} {'GB/s':>6} {'ceiling':>7} "
        f"{'share':>6} {'GOP/s':>6} {'torch':>6}")  # fmt: skip
    rows = []
    for name, (n, k) in itertools.product(FORMATS, QUICK_SHAPES if args.quick else SHAPES):
        rotation = make_rotation(FORMATS[name], n, k, rotate)
        # Memory just written reads slowly until it has been walked once.
        read_memory(rotation.whole, num_threads=args.threads)
        for m in QUICK_TOKENS if args.quick else TOKENS:
            rows.append(measure(name, rotation, n, k, m, args))
    document = {
        "question": __doc__.partition("\n")[0],
        "environment": {
            "cpu": platform.processor() or platform.machine(),
            "isa": isa().level,
            "torch": torch.__version__,
            "numba": numba.__version__,
        },
        "command": ["python", *sys.argv],
        "rotated_bytes": rotate,
        "rows": rows,
    }
    if args.check:
        document["check"] = {name: error(weight_format) for name, weight_format in FORMATS.items()}
        say(f"largest error over the largest output: {document['check']}")
    print(json.dumps(document, indent=2))


def measure(
    name: str, rotation: Rotation, n: int, k: int, m: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Time ours, torch's and a plain read in turn; medians."""
    weight_format = FORMATS[name]
    compute: Compute = fastest_compute(weight_format)
    x = to_bfloat16_bits(np.random.default_rng(m).standard_normal((m, k)).astype(np.float32))
    # A copy in torch's memory: _weight_int8pack_mm of torch 2.13 ends the process (SIGSEGV) where x
    # does not begin at a multiple of 64 bytes.
    x_torch = torch.from_numpy(x).view(torch.bfloat16).clone()
    out, scratch = np.empty((m, n), np.float32), Scratch()
    count = max(1, PASS_BYTES // rotation.packed_bytes)
    count = max(1, min(count, int(PASS_OPERATIONS / (2.0 * n * k * m))))
    matrices, ops = itertools.cycle(rotation.matrices), itertools.cycle(rotation.torch_ops)
    part = max(PASS_BYTES, 1 << 20)
    starts = itertools.cycle(range(0, max(1, rotation.whole.size - part), part))

    def ours() -> None:
        for _ in range(count):
            linear(
                x,
                next(matrices),
                compute=compute,
                num_threads=args.threads,
                scratch=scratch,
                out=out,
            )

    def theirs() -> None:
        for _ in range(count):
            next(ops)(x_torch)

    def read() -> None:
        start = next(starts)
        read_memory(rotation.whole[start : start + part], num_threads=args.threads)

    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "read": []}
    for number in range(args.rounds + 1):
        for which, run in (("ours", ours), ("read", read), ("theirs", theirs)):
            begin = time.perf_counter()
            run()
            if number:
                seconds[which].append(time.perf_counter() - begin)
    ours_s = statistics.median(seconds["ours"]) / count
    theirs_s = statistics.median(seconds["theirs"]) / count
    read_bytes = min(part, rotation.whole.size)
    ceiling = read_bytes / statistics.median(seconds["read"]) / 1e9
    rate = rotation.packed_bytes / ours_s / 1e9
    operations = 2.0 * n * k * m / ours_s / 1e9
    say(
        f"{name:6} {n:6} {k:6} {m:4} {ours_s * 1e6:9.1f} {rate:6.1f} {ceiling:7.1f} "
        f"{rate / ceiling:6.2f} {operations:6.0f} {theirs_s / ours_s:6.2f}"
    )
    return {
        "kernel": f"linear/{compute}",
        "format": name,
        "n": n,
        "k": k,
        "m": m,
        "threads": args.threads,
        "seconds": ours_s,
        "gb_per_s": rate,
        "ceiling_gb_per_s": ceiling,
        "share_of_ceiling": rate / ceiling,
        "gop_per_s": operations,
        "vs_torch": theirs_s / ours_s,
    }


def make_rotation(weight_format: WeightFormat, n: int, k: int, num_bytes: int) -> Rotation:
    """One matrix, packed once and copied; torch's forms are rotated through in the same way."""
    weight = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32) * np.float32(0.02)
    blob = pack(weight, weight_format)
    size = -(-blob.size // 64) * 64
    count = max(2, num_bytes // size)
    whole = np.empty((count, size), np.uint8)
    whole[:, : blob.size] = blob
    matrices = [
        PackedMatrix(blob=row[: blob.size], weight_format=weight_format, num_rows=n, num_columns=k)
        for row in whole
    ]
    return Rotation(
        matrices=matrices,
        torch_ops=torch_forms(weight_format, weight, count),
        packed_bytes=blob.size,
        whole=whole.reshape(-1),
    )


def torch_forms(
    weight_format: WeightFormat, weight: np.ndarray[Any, np.dtype[np.float32]], count: int
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """torch's best op for the format, over copies of the matrix."""
    matrix = torch.from_numpy(weight)
    if weight_format.kind == "bfloat16":
        copies = matrix.bfloat16().expand(count, -1, -1).contiguous()
        return [partial(torch.nn.functional.linear, weight=w) for w in copies]
    if weight_format.kind == "int8":
        scale = (matrix.abs().amax(1) / 127).bfloat16()
        codes = (matrix / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        codes = codes.expand(count, -1, -1).contiguous()
        return [partial(_int8_product, codes=w, scale=scale) for w in codes]
    groups = matrix.view(matrix.shape[0], -1, 128)
    scales = (groups.abs().amax(2) / 7).clamp(min=1e-8)
    codes = (groups / scales[:, :, None]).round().add(8).clamp(0, 15).int().view(matrix.shape)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
    pairs = pairs.bfloat16()
    copies = packed.expand(count, *packed.shape).contiguous()
    return [partial(_int4_product, packed=w, pairs=pairs) for w in copies]


def _int8_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if len(x) > _MAX_INT8PACK_TOKENS:
        # The bare product of bytes, without scales: more than any real layer gets.
        return torch._int_mm(x.to(torch.int8), codes.t())
    return torch._weight_int8pack_mm(x, codes, scale)


def _int4_product(x: torch.Tensor, packed: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, packed, 128, pairs)


def error(weight_format: WeightFormat) -> float:
    """Largest difference from float64 over the same stored weights, over the largest output."""
    rng = np.random.default_rng(1)
    weight, x = rng.standard_normal((130, 300)), rng.standard_normal((5, 300))
    blob = pack(weight.astype(np.float32), weight_format)
    matrix = PackedMatrix(blob=blob, weight_format=weight_format, num_rows=130, num_columns=300)
    out = np.empty((5, 130), np.float32)
    linear(
        x.astype(np.float32),
        matrix,
        compute="float",
        num_threads=2,
        scratch=Scratch(),
        out=out,
    )
    expected = x.astype(np.float32).astype(float) @ unpack(blob, weight_format, 130, 300).T
    return float(np.abs(out - expected).max() / np.abs(expected).max())


def rotated_bytes() -> int:
    """Eight times the last-level cache, at most 3 GB: two copies must fit beside each other."""
    from hetero.measure.cold_memory import last_level_cache_bytes

    return min(8 * last_level_cache_bytes(), 3 << 30)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

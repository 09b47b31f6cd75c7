"""Do the CPU's products read their weights at the speed of memory, and beat torch's best op?

Products run as in a decode step: a chain over many matrices, here all of one shape, which rotate
through more than eight times the last-level cache. A chain that only reads, of memory of its own,
runs before every chain of ours and every loop of torch's: the ceiling. torch's best op for a format
is F.linear for bfloat16, _weight_int8pack_mm for int8 (beyond 8 tokens the bare _int_mm), and
_weight_int4pack_mm_for_cpu for int4 (groups of 128). Rows "experts" are whole MoE layers (64
experts, 8 a token, hidden 2048, width 768), torch's with the same ops expert by expert. "calls" is
what a call costs beside its work. What would change our mind: at one token less than 95 %
(bfloat16), 90 % (int8) or 85 % (int4) of the ceiling; from 64 tokens on, a rate below torch's.

    python bench/bench_kernels.py [--quick] [--check] [--threads 1 2] [--formats bf16 int8 int4]
                                  [--shapes 768x2048 experts]

It takes at most 9 GB of memory, and says how much it took.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from cpu_kernels.calls import Chain, Link
from cpu_kernels.experts import PackedExperts, check_experts, expert_bytes, experts_links
from cpu_kernels.formats import WeightFormat, pack, to_bfloat16_bits, unpack
from cpu_kernels.isa import isa
from cpu_kernels.linear import PackedMatrix, linear, linear_link
from cpu_kernels.memory_read import read_link, read_memory
from cpu_kernels.microkernels import fastest_compute
from cpu_kernels.scratch import Scratch, aligned_bytes
from cpu_kernels.threads import available_cores
from hetero.measure.cold_memory import last_level_cache_bytes
from hetero.measure.fingerprint import cpu_model

EXPERTS = "experts"
SHAPES = ("768x2048", "2048x768", "1408x2048", "14336x4096", "4096x14336", EXPERTS)
QUICK_SHAPES = ("768x2048", "2048x768", EXPERTS)
TOKENS = (1, 2, 4, 8, 16, 64, 512)
EXPERTS_TOKENS = (1, 4, 16, 64, 512)
QUICK_TOKENS = (1, 4, 64)
FORMATS = {
    "bf16": WeightFormat(kind="bfloat16"),
    "int8": WeightFormat(kind="int8", group_size=128),
    "int4": WeightFormat(kind="int4", group_size=128),
}
NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 64, 8, 2048, 768
# A chain over so much is one timing: long beside its start and end, short beside a neighbour's
# burst.
RUN_BYTES = 256 << 20
# Products of more tokens do not wait for memory: fewer of them are enough.
RUN_OPERATIONS = 2e10
QUICK_ROTATED_BYTES = 600 << 20
# Ours, as much of torch's, one matrix or layer more of each, and what is only read: with what
# packing takes beside them 3.2 + 3.2 + 1.2 + 1.1 + 0.3 = 9 GB.
MAX_ROTATED_BYTES = 3 << 30
READ_BYTES = 1 << 30
# Beyond, the bare product of bytes is torch's faster one.
_MAX_INT8PACK_TOKENS = 8
# Links beside the first in the chains of "calls".
FURTHER_LINKS = 8

TorchOp = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True, kw_only=True)
class Rotation:
    """Equal pieces of memory, handed out in turn: one was last read a lap ago. Mutable."""

    pieces: NDArray[np.uint8]  # (pieces, bytes of one)
    position: int = 0

    def take(self, count: int) -> range:
        """The numbers of the next `count` neighbouring pieces; of all if there are fewer."""
        count = min(count, len(self.pieces))
        first = self.position if self.position + count <= len(self.pieces) else 0
        self.position = first + count
        return range(first, first + count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is timed once: a chain of ours, and torch's ops for as many other matrices."""

    chain: Chain
    theirs: Callable[[], object]
    check: Callable[[], None]
    count: int  # matrices, or layers of experts
    num_bytes: int
    operations: float


# A run for so many tokens on so many threads, over the next pieces of a rotation.
NextRun = Callable[[int, int], Run]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, token counts, rounds")
    parser.add_argument("--check", action="store_true", help="also compare with float64")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rotate-mb", type=int, help="default: eight times the last cache")
    parser.add_argument("--threads", type=int, nargs="+", default=[available_cores()])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help=f"or {EXPERTS}")
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 7)
    args.shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    sizes = [(0, 0) if shape == EXPERTS else parse_shape(parser, shape) for shape in args.shapes]
    wanted = QUICK_ROTATED_BYTES if args.quick else 8 * last_level_cache_bytes()
    rotate = min((args.rotate_mb << 20) if args.rotate_mb else wanted, MAX_ROTATED_BYTES)
    say(f"{args.threads} threads, {isa().level}, {rotate >> 20} MB in rotation")
    reads = rotation_of(np.ones(RUN_BYTES, np.uint8), READ_BYTES)
    calls = call_costs(200 if args.quick else 2000)
    say(f"{'kernel':>15} {'format':6} {'n':>6} {'k':>6} {'m':>4} {'thr':>3} {'us':>9} {'GB/s':>6} "
        f"{'ceiling':>7} {'share':>6} {'GOP/s':>6} {'torch':>6}")  # fmt: skip
    rows = []
    for name in args.formats:
        for n, k in sizes:
            rows += measure_shape(name, n, k, rotate, reads, args)
    document = {
        "question": __doc__.partition("\n")[0],
        "environment": {
            "cpu": cpu_model(),
            "cores": available_cores(),
            "isa": isa().level,
            "last_level_cache_bytes": last_level_cache_bytes(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
        },
        "command": ["python", "bench/bench_kernels.py", *sys.argv[1:]],
        "rotated_bytes": rotate,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "calls": calls,
        "rows": rows,
    }
    if args.check:
        document["check"] = {name: error(FORMATS[name]) for name in args.formats}
        say(f"largest error over the largest output: {document['check']}")
    print(json.dumps(document, indent=2))


def parse_shape(parser: argparse.ArgumentParser, shape: str) -> tuple[int, int]:
    """Rows and columns of "768x2048"."""
    n, _, k = shape.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) % 16 == 0 and int(k) % 128 == 0):
        parser.error(
            f"{shape} is no shape: give NxK such as 768x2048, with N a multiple of 16 and K of 128 "
            f"as torch's int4 asks for, or {EXPERTS}"
        )
    return int(n), int(k)


def measure_shape(
    name: str, n: int, k: int, rotate: int, reads: Rotation, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one format and shape; n is 0 for experts. Its memory is given back."""
    weight_format = FORMATS[name]
    rotation, theirs = (experts_rotation if n == 0 else linear_rotation)(
        weight_format, n, k, rotate
    )
    next_run = (next_experts if n == 0 else next_linear)(weight_format, n, k, rotation, theirs)
    tokens = EXPERTS_TOKENS if n == 0 else TOKENS
    compute = fastest_compute(weight_format)
    rows = []
    for num_threads in args.threads:
        torch.set_num_threads(num_threads)
        for m in (m for m in tokens if not args.quick or m in QUICK_TOKENS):
            facts: dict[str, Any] = {
                "kernel": f"linear/{compute}" if n else EXPERTS,
                "format": name,
                "n": n or WIDTH,
                "k": k or HIDDEN,
                "m": m,
                "threads": num_threads,
            }
            found = measure(reads, partial(next_run, m, num_threads), num_threads, args.rounds)
            rows.append({**facts, **found, "compute": compute})
            say(f"{facts['kernel']:>15} {name:6} {facts['n']:6} {facts['k']:6} {m:4} "
                f"{num_threads:3} {found['seconds'] * 1e6:9.1f} {found['gb_per_s']:6.1f} "
                f"{found['ceiling_gb_per_s']:7.1f} {found['share_of_ceiling']:6.2f} "
                f"{found['gop_per_s']:6.0f} {found['vs_torch']:6.2f}")  # fmt: skip
    return rows


def measure(
    reads: Rotation, next_run: Callable[[], Run], num_threads: int, rounds: int
) -> dict[str, Any]:
    """Time ours and torch's in turn, a plain read before each; medians of rates.

    Chains are built outside of the timing, as an engine keeps its own; the first round, which
    compiles and grows buffers, does not count.
    """
    ours: list[tuple[float, Run]] = []
    theirs_s: list[float] = []
    read_rates: list[float] = []
    for number in range(rounds + 1):
        times = []
        run = next_run()
        for candidate in (run.chain.run, run.theirs):
            part = reads.pieces[reads.take(1).start]
            read_s = seconds_of(Chain([read_link(part)], num_threads=num_threads).run)
            times.append(seconds_of(candidate))
            if number:
                read_rates.append(part.size / read_s)
        run.check()
        if number:
            ours.append((times[0] / run.count, run))
            theirs_s.append(times[1] / run.count)
    rate = statistics.median(run.num_bytes / run.count / seconds for seconds, run in ours)
    ceiling = statistics.median(read_rates)
    each_s = statistics.median(seconds for seconds, _ in ours)
    return {
        "gb_per_s": rate / 1e9,
        "ceiling_gb_per_s": ceiling / 1e9,
        "gop_per_s": ours[0][1].operations / ours[0][1].count / each_s / 1e9,
        "vs_torch": statistics.median(theirs_s) / each_s,
        "share_of_ceiling": rate / ceiling,
        "seconds": each_s,
        "matrices_per_run": ours[0][1].count,
    }


def linear_rotation(
    weight_format: WeightFormat, n: int, k: int, rotate: int
) -> tuple[Rotation, list[TorchOp]]:
    """Copies of one packed matrix, and torch's form of each."""
    weight = np.random.default_rng(0).standard_normal((n, k), np.float32) * np.float32(0.02)
    rotation = rotation_of(pack(weight, weight_format), rotate)
    return rotation, torch_forms(weight_format, weight, len(rotation.pieces))


def next_linear(
    weight_format: WeightFormat, n: int, k: int, rotation: Rotation, theirs: list[TorchOp]
) -> NextRun:
    """Runs over the next matrices, all of which multiply one x."""
    num_bytes = weight_format.packed_bytes(n, k)
    matrices = [
        PackedMatrix(blob=piece[:num_bytes], weight_format=weight_format, num_rows=n, num_columns=k)
        for piece in rotation.pieces
    ]
    compute, scratch = fastest_compute(weight_format), Scratch()

    def next_run(m: int, num_threads: int) -> Run:
        x, x_torch = activations(m, k)
        out = np.empty((m, n), np.float32)
        operations = 2.0 * n * k * m
        taken = rotation.take(max(1, min(RUN_BYTES // num_bytes, int(RUN_OPERATIONS / operations))))
        links = [
            linear_link(
                x,
                matrices[index],
                compute=compute,
                num_threads=num_threads,
                scratch=scratch,
                out=out,
            )
            for index in taken
        ]

        def run_theirs() -> None:
            for index in taken:
                theirs[index](x_torch)

        return Run(
            chain=Chain(links, num_threads=num_threads),
            theirs=run_theirs,
            check=lambda: None,
            count=len(taken),
            num_bytes=len(taken) * num_bytes,
            operations=len(taken) * operations,
        )

    return next_run


def experts_rotation(
    weight_format: WeightFormat, n: int, k: int, rotate: int
) -> tuple[Rotation, list[TorchOp]]:
    """Whole layers of experts, and torch's form of each expert: gate with up, then down."""
    rng = np.random.default_rng(0)
    both = rng.standard_normal((2 * WIDTH, HIDDEN), np.float32) * np.float32(0.02)
    down = rng.standard_normal((HIDDEN, WIDTH), np.float32) * np.float32(0.02)
    parts = [pack(part, weight_format) for part in (both[:WIDTH], both[WIDTH:], down)]
    rotation = rotation_of(np.tile(np.concatenate(parts), NUM_EXPERTS), rotate)
    num_experts = NUM_EXPERTS * len(rotation.pieces)
    pairs = zip(
        torch_forms(weight_format, both, num_experts),
        torch_forms(weight_format, down, num_experts),
        strict=True,
    )
    return rotation, [partial(_expert, both=both_op, down=down_op) for both_op, down_op in pairs]


def next_experts(
    weight_format: WeightFormat, n: int, k: int, rotation: Rotation, theirs: list[TorchOp]
) -> NextRun:
    """Runs over the next layers. Tokens choose at random; a lone one goes through all experts."""
    each_bytes = expert_bytes(weight_format, HIDDEN, WIDTH)
    layers = [
        PackedExperts(
            blob=piece[: NUM_EXPERTS * each_bytes],
            weight_format=weight_format,
            num_experts=NUM_EXPERTS,
            hidden=HIDDEN,
            width=WIDTH,
        )
        for piece in rotation.pieces
    ]
    compute, scratch, rng = fastest_compute(weight_format), Scratch(), np.random.default_rng(1)
    decks = [rng.permutation(NUM_EXPERTS).reshape(-1, TOP_K) for _ in layers]
    laps = [0] * len(layers)

    def choose(layer: int, m: int) -> NDArray[np.int64]:
        if m == 1:  # or an expert could come back while the cache still holds it
            laps[layer] += 1
            chosen = [decks[layer][laps[layer] % len(decks[layer])]]
        else:
            chosen = [rng.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(m)]
        return np.array(chosen, np.int64)

    def next_run(m: int, num_threads: int) -> Run:
        x, x_torch = activations(m, HIDDEN)
        weights = np.full((m, TOP_K), 1 / TOP_K, np.float32)
        operations = 2.0 * 3 * WIDTH * HIDDEN * TOP_K * m
        few_bytes = min(m * TOP_K, NUM_EXPERTS) * each_bytes
        count = max(1, min(RUN_BYTES // few_bytes, int(RUN_OPERATIONS / operations)))
        chosen = [(layer, choose(layer, m)) for layer in rotation.take(count)]
        links: list[Link] = []
        for layer, ids in chosen:
            links += experts_links(
                x,
                layers[layer],
                ids,
                weights,
                compute=compute,
                num_threads=num_threads,
                scratch=scratch,
                out=np.empty((m, HIDDEN), np.float32),
            )
        routed = [(NUM_EXPERTS * layer, torch.from_numpy(ids)) for layer, ids in chosen]

        def run_theirs() -> None:
            for first, ids in routed:
                _experts_layer(x_torch, ids, theirs[first : first + NUM_EXPERTS])

        return Run(
            chain=Chain(links, num_threads=num_threads),
            theirs=run_theirs,
            check=lambda: check_experts(links),
            count=len(chosen),
            num_bytes=sum(len(np.unique(ids)) for _, ids in chosen) * each_bytes,
            operations=len(chosen) * operations,
        )

    return next_run


def rotation_of(blob: NDArray[np.uint8], num_bytes: int) -> Rotation:
    """More than `num_bytes` of copies, each at the start of a cache line, walked through once."""
    size = -(-blob.size // 64) * 64
    count = max(2, num_bytes // size + 1)
    pieces = aligned_bytes(count * size).reshape(count, size)
    pieces[:, : blob.size] = blob
    # Memory just written reads slowly until it has been walked once.
    read_memory(pieces.reshape(-1), num_threads=available_cores())
    return Rotation(pieces=pieces)


def activations(m: int, k: int) -> tuple[NDArray[np.uint16], torch.Tensor]:
    """The bits of x in bfloat16, and the same for torch."""
    x = to_bfloat16_bits(np.random.default_rng(m).standard_normal((m, k), np.float32))
    # A copy in torch's memory: _weight_int8pack_mm of torch 2.13 ends the process (SIGSEGV) where x
    # does not begin at a multiple of 64 bytes.
    return x, torch.from_numpy(x).view(torch.bfloat16).clone()


def torch_forms(
    weight_format: WeightFormat, weight: NDArray[np.float32], count: int
) -> list[TorchOp]:
    """torch's best op for the format, over copies of the matrix."""
    matrix = torch.from_numpy(weight)
    if weight_format.kind == "bfloat16":
        copies = _copies(matrix.bfloat16(), count)
        return [partial(torch.nn.functional.linear, weight=w) for w in copies]
    if weight_format.kind == "int8":
        scale = (matrix.abs().amax(1) / 127).bfloat16()
        codes = (matrix / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return [partial(_int8_product, codes=w, scale=scale) for w in _copies(codes, count)]
    groups = matrix.view(matrix.shape[0], -1, 128)
    scales = (groups.abs().amax(2) / 7).clamp(min=1e-8)
    codes = (groups / scales[:, :, None]).round().add(8).clamp(0, 15).int().view(matrix.shape)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    pairs = torch.stack((scales, torch.zeros_like(scales)), -1).transpose(0, 1).contiguous()
    pairs = pairs.bfloat16()
    return [partial(_int4_product, packed=w, pairs=pairs) for w in _copies(packed, count)]


def _copies(matrix: torch.Tensor, count: int) -> Iterable[torch.Tensor]:
    copies = matrix.expand(count, *matrix.shape).contiguous()
    whole = copies.view(-1).view(torch.uint8).numpy()
    read_memory(whole, num_threads=available_cores())  # walked once, as ours are
    return copies.unbind()


def _int8_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if len(x) > _MAX_INT8PACK_TOKENS:
        # The bare product of bytes, without scales: more than any real layer gets.
        return torch._int_mm(x.to(torch.int8), codes.t())
    return torch._weight_int8pack_mm(x, codes, scale)


def _int4_product(x: torch.Tensor, packed: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, packed, 128, pairs)


def _expert(x: torch.Tensor, both: TorchOp, down: TorchOp) -> torch.Tensor:
    gate, up = both(x).to(torch.bfloat16).chunk(2, dim=1)
    return down(torch.nn.functional.silu(gate) * up).to(torch.bfloat16)


def _experts_layer(x: torch.Tensor, ids: torch.Tensor, experts: list[TorchOp]) -> torch.Tensor:
    """Every chosen expert on its tokens, and the sum, as transformers does it."""
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        tokens = (ids == expert).nonzero()[:, 0]
        out.index_add_(0, tokens, experts[expert](x[tokens]) * (1 / TOP_K))
    return out


def call_costs(repetitions: int) -> list[dict[str, Any]]:
    """Microseconds of calls whose work is nothing: 16 rows of 128 columns, one token; medians."""
    weight_format = FORMATS["bf16"]
    blob = pack(np.ones((16, 128), np.float32), weight_format)
    matrix = PackedMatrix(blob=blob, weight_format=weight_format, num_rows=16, num_columns=128)
    x, out, scratch = np.zeros((1, 128), np.uint16), np.empty((1, 16), np.float32), Scratch()
    rows = []
    for num_threads in sorted({1, min(2, available_cores())}):
        product: dict[str, Any] = {
            "compute": fastest_compute(weight_format),
            "num_threads": num_threads,
            "scratch": scratch,
            "out": out,
        }
        links = [linear_link(x, matrix, **product) for _ in range(1 + FURTHER_LINKS)]
        candidates: dict[str, Callable[[], None]] = {
            "linear": partial(linear, x, matrix, **product),
            "chain": Chain(links[:1], num_threads=num_threads).run,
            "chains": Chain(links, num_threads=num_threads).run,
        }
        seconds: dict[str, list[float]] = {key: [] for key in candidates}
        for _ in range(repetitions):
            for key, candidate in candidates.items():
                seconds[key].append(seconds_of(candidate))
        us = {key: statistics.median(times) * 1e6 for key, times in seconds.items()}
        rows.append(
            {
                "threads": num_threads,
                "linear_call_us": us["linear"],
                "chain_run_us": us["chain"],
                "further_link_us": (us["chains"] - us["chain"]) / FURTHER_LINKS,
            }
        )
        say(", ".join(f"{key} {value:.2f}" for key, value in rows[-1].items()))
    return rows


def seconds_of(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


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


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

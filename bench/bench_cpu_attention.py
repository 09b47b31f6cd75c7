"""How fast is decode attention on the CPU, beside torch's best form and a plain read of the cache?

Decode attention reads every cached key and value once, so a plain read of as many bytes
(`read_memory`) is its ceiling. What would change our mind about having our own kernel: torch's best
form (the query heads of a KV head as rows of one query, over contiguous keys and values) within
1.3x of it at long contexts. Ours reads blocks in random order, torch contiguous memory. The caches
of a case together are larger than the last-level cache unless --cache-mb says otherwise.

python bench/bench_cpu_attention.py [--quick] [--check]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numba
import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from cpu_kernels.attention import decode_attention
from cpu_kernels.formats import from_bfloat16_bits, to_bfloat16_bits
from cpu_kernels.memory_read import read_memory
from cpu_kernels.scratch import Scratch
from cpu_kernels.threads import available_cores

OURS, ROWS, GQA, READ = "cpu_kernels", "torch sdpa, heads as rows", "torch sdpa, enable_gqa", "read"
BLOCK_SIZE = 16
# bfloat16 values that are repeated: a gigabyte of new ones would take half a minute
NUM_RANDOM = (1 << 20) + 1
# above, torch's enable_gqa takes a second and more
MAX_GQA_TOKENS = 1 << 15


class Case:
    """Caches of several layers, which together are larger than the last-level cache."""

    def __init__(
        self, args: argparse.Namespace, context: int, batch: int, num_threads: int
    ) -> None:
        heads, kv_heads, width = args.heads, args.kv_heads, args.head_dim
        self.num_threads = num_threads
        self.layer_bytes = 2 * batch * context * kv_heads * width * 2  # K and V, 2 bytes
        cache_bytes = min(args.cache_mb, args.max_cache_mb_a_token * batch * context) * 1e6
        self.num_layers = max(1, round(cache_bytes / self.layer_bytes))
        blocks_each = -(-context // BLOCK_SIZE)
        rng = np.random.default_rng(0)
        shape = (self.num_layers, 2, batch * blocks_each, kv_heads, BLOCK_SIZE, width)
        some = to_bfloat16_bits(rng.standard_normal(NUM_RANDOM, dtype=np.float32))
        self.caches = np.resize(some, shape)
        tables = rng.permutation(batch * blocks_each).astype(np.int32)
        self.tables = tables.reshape(batch, blocks_each)
        self.context_lens = np.full(batch, context, np.int32)
        # the queries hold bfloat16 values, so that torch's rounding of its query changes nothing
        self.q = from_bfloat16_bits(
            to_bfloat16_bits(rng.standard_normal((batch, heads, width), dtype=np.float32))
        )
        self.out = np.empty((batch, heads, width), np.float32)
        self.lse = np.empty((batch, heads), np.float32)
        self.scratch = Scratch()
        layer_shape = (2, batch, kv_heads, blocks_each * BLOCK_SIZE, width)
        self.contiguous = [
            torch.from_numpy(
                cache[:, self.tables]
                .transpose(0, 1, 3, 2, 4, 5)
                .reshape(layer_shape)
                .view(np.int16)
            ).view(torch.bfloat16)[:, :, :, :context]
            for cache in self.caches
        ]
        self.torch_q = torch.from_numpy(self.q).bfloat16()[:, :, None]
        self.torch_q_rows = self.torch_q.view(batch, kv_heads, heads // kv_heads, width)

    def attend(self) -> None:
        for cache in self.caches:
            decode_attention(
                self.q,
                cache[0],
                cache[1],
                self.tables,
                self.context_lens,
                scale=self.q.shape[-1] ** -0.5,
                window=None,
                num_threads=self.num_threads,
                out=self.out,
                lse=self.lse,
                scratch=self.scratch,
            )

    def attend_rows(self) -> torch.Tensor:
        for keys, values in self.contiguous:
            out = scaled_dot_product_attention(self.torch_q_rows, keys, values)
        return out.reshape(self.q.shape)

    def attend_gqa(self) -> torch.Tensor:
        for keys, values in self.contiguous[:1]:  # far slower: one layer is enough
            out = scaled_dot_product_attention(self.torch_q, keys, values, enable_gqa=True)
        return out.reshape(self.q.shape)

    def read(self) -> None:
        read_memory(self.caches.reshape(-1).view(np.uint8), num_threads=self.num_threads)

    def error(self) -> float:
        """Return the largest difference from float64 attention, over the largest output."""
        self.attend()
        largest, difference = 0.0, 0.0
        for seq in range(len(self.q)):
            keys, values = self.contiguous[-1][:, seq].double()
            q = torch.from_numpy(self.q[seq]).double().view(keys.shape[0], -1, keys.shape[-1])
            weights = torch.softmax(q @ keys.mT * keys.shape[-1] ** -0.5, dim=-1)
            expected = (weights @ values).reshape(self.out.shape[1:]).numpy()
            largest = max(largest, float(np.abs(expected).max()))
            difference = max(difference, float(np.abs(self.out[seq] - expected).max()))
        return difference / largest


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time every candidate once a round, after one untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(
    args: argparse.Namespace, context: int, batch: int, num_threads: int
) -> list[dict[str, Any]]:
    """Return the rows of one context, batch and thread count."""
    torch.set_num_threads(num_threads)
    case = Case(args, context, batch, num_threads)
    candidates: dict[str, Callable[[], Any]] = {OURS: case.attend, ROWS: case.attend_rows}
    if batch * context <= MAX_GQA_TOKENS:
        candidates[GQA] = case.attend_gqa
    candidates[READ] = case.read
    seconds = interleaved(candidates, args.rounds)
    layers = dict.fromkeys(candidates, case.num_layers) | {GQA: 1}
    layer_s = {name: statistics.median(seconds[name]) / layers[name] for name in candidates}
    best_torch_s = min(layer_s[name] for name in (ROWS, GQA) if name in layer_s)
    error = case.error() if args.check else None
    return [
        {
            "context": context,
            "batch": batch,
            "num_threads": num_threads,
            "kernel": name,
            "layer_us": layer_s[name] * 1e6,
            "bytes_per_s": case.layer_bytes / layer_s[name],
            "share_of_ceiling": layer_s[READ] / layer_s[name],
            "times_torch_best": best_torch_s / layer_s[name],
            "cache_mb": case.caches.nbytes / 1e6,
            "relative_error": error if name == OURS else None,
        }
        for name in candidates
    ]


def compile_seconds() -> float:
    """Return how long the first call takes: a compilation, or a read of numba's disk cache."""
    start = time.perf_counter()
    cache = np.zeros((1, 1, 1, 1), np.uint16)
    q = np.zeros((1, 1, 1), np.float32)
    decode_attention(
        q,
        cache,
        cache,
        np.zeros((1, 1), np.int32),
        np.ones(1, np.int32),
        scale=1.0,
        window=None,
        num_threads=1,
        out=np.empty_like(q),
        lse=np.empty((1, 1), np.float32),
    )
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="16,512,4096,8192,32768")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--threads", default=",".join(map(str, sorted({1, available_cores()}))))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--cache-mb", type=float, default=512.0)
    # short contexts would take thousands of layers: 16 tokens 8 MB, 1024 all of --cache-mb
    parser.add_argument("--max-cache-mb-a-token", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller caches")
    parser.add_argument("--check", action="store_true", help="compare with float64 attention")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.cache_mb = 3, 300.0
        args.contexts, args.batches = "16,512,4096,32768", "1,4"
    return args


def main() -> None:
    args = parse()
    first_call_s = compile_seconds()
    rows = []
    header = ("context", "batch", "threads", "kernel", "us/layer", "GB/s", "of read", "x torch")
    print(("{:>8} {:>5} {:>7} {:>26} {:>10} {:>6} {:>8} {:>8}").format(*header), file=sys.stderr)
    sizes = list(product(map(int, args.contexts.split(",")), map(int, args.batches.split(","))))
    for (context, batch), num_threads in product(sizes, map(int, args.threads.split(","))):
        for row in measure(args, context, batch, num_threads):
            rows.append(row)
            print(
                f"{context:8} {batch:5} {num_threads:7} {row['kernel']:>26} "
                f"{row['layer_us']:10.1f} {row['bytes_per_s'] / 1e9:6.1f} "
                f"{row['share_of_ceiling']:8.0%} {row['times_torch_best']:8.2f}",
                file=sys.stderr,
            )
    errors = [row["relative_error"] for row in rows if row["relative_error"] is not None]
    if args.check:
        print(f"largest relative error against float64: {max(errors):.1e}", file=sys.stderr)
    document = {
        "question": __doc__.splitlines()[0],
        "environment": {
            "machine": platform.processor() or platform.machine(),
            "cores": available_cores(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
            "first_call_s": first_call_s,
        },
        "command": sys.argv,
        "rows": rows,
    }
    print(json.dumps(document, indent=2))
    if args.check and max(errors) > 1e-5:
        sys.exit(f"relative error {max(errors):.1e} is above 1e-5")


if __name__ == "__main__":
    main()

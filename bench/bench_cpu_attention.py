"""How fast is decode attention on the CPU, beside torch's best form and a plain read of the cache?

Decode attention reads every cached key and value once, so a plain read is its floor. What would
change our mind about having our own kernel: torch's best form (the query heads of a KV head as rows
of one query, over contiguous keys and values) within 1.3x of it at long contexts. Ours reads blocks
in random order, torch contiguous memory.

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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from cpu_kernels.attention import decode_attention
from cpu_kernels.formats import from_bfloat16_bits, to_bfloat16_bits
from cpu_kernels.threads import available_cores, openmp_parallel

OURS, ROWS, GQA, READ = "cpu_kernels", "torch sdpa, heads as rows", "torch sdpa, enable_gqa", "read"
BLOCK_SIZE = 16


@numba.njit(nogil=True)
def read_words(words: Any) -> int:
    """Return the xor of all words: loads and nothing else."""
    total = 0
    for i in range(words.size):
        total ^= words[i]
    return total


class Case:
    """Caches of several layers, which together are larger than the last-level cache."""

    def __init__(self, args: argparse.Namespace, context: int, num_threads: int) -> None:
        heads, kv_heads, width = args.heads, args.kv_heads, args.head_dim
        self.num_threads = num_threads
        self.layer_bytes = 2 * context * kv_heads * width * 2  # K and V, 2 bytes
        self.num_layers = max(1, round(args.cache_mb * 1e6 / self.layer_bytes))
        num_blocks = -(-context // BLOCK_SIZE)
        rng = np.random.default_rng(0)
        shape = (2, num_blocks, kv_heads, BLOCK_SIZE, width)
        one_layer = to_bfloat16_bits(rng.standard_normal(shape, dtype=np.float32))
        self.caches = [one_layer.copy() for _ in range(self.num_layers)]
        self.table = rng.permutation(num_blocks).astype(np.int32)[None]
        self.context_lens = np.array([context], np.int32)
        # the queries hold bfloat16 values, so that torch's rounding of its query changes nothing
        self.q = from_bfloat16_bits(
            to_bfloat16_bits(rng.standard_normal((1, heads, width), dtype=np.float32))
        )
        self.out = np.empty((1, heads, width), np.float32)
        self.lse = np.empty((1, heads), np.float32)
        in_order = one_layer[:, self.table[0]].transpose(0, 2, 1, 3, 4)
        in_order = in_order.reshape(2, 1, kv_heads, -1, width)[:, :, :, :context]
        contiguous = torch.from_numpy(np.ascontiguousarray(in_order).view(np.int16))
        self.contiguous = [contiguous.view(torch.bfloat16).clone() for _ in range(self.num_layers)]
        self.torch_q = torch.from_numpy(self.q).bfloat16()[:, :, None]
        self.torch_q_rows = self.torch_q.view(1, kv_heads, heads // kv_heads, width)
        self.pool = ThreadPoolExecutor(num_threads)

    def attend(self) -> None:
        for cache in self.caches:
            decode_attention(
                self.q,
                cache[0],
                cache[1],
                self.table,
                self.context_lens,
                scale=self.q.shape[-1] ** -0.5,
                window=None,
                num_threads=self.num_threads,
                out=self.out,
                lse=self.lse,
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
        parts = [
            part
            for cache in self.caches
            for part in np.array_split(cache.reshape(-1).view(np.int64), self.num_threads)
        ]
        share = [parts[i :: self.num_threads] for i in range(self.num_threads)]
        list(self.pool.map(lambda mine: [read_words(part) for part in mine], share))

    def error(self) -> float:
        """Return the largest difference from float64 attention, over the largest output."""
        self.attend()
        keys, values = self.contiguous[-1][:, 0].double()
        kv_heads = keys.shape[0]
        q = torch.from_numpy(self.q).double().view(kv_heads, -1, keys.shape[-1])
        weights = torch.softmax(q @ keys.mT * keys.shape[-1] ** -0.5, dim=-1)
        expected = (weights @ values).reshape(self.out.shape).numpy()
        return float(np.abs(self.out - expected).max() / np.abs(expected).max())


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


def measure(args: argparse.Namespace, context: int, num_threads: int) -> list[dict[str, Any]]:
    """Return the rows of one context and thread count."""
    torch.set_num_threads(num_threads)
    case = Case(args, context, num_threads)
    candidates = {
        OURS: case.attend,
        ROWS: case.attend_rows,
        GQA: case.attend_gqa,
        READ: case.read,
    }
    seconds = interleaved(candidates, args.rounds)
    layers = dict.fromkeys(candidates, case.num_layers) | {GQA: 1}
    layer_s = {name: statistics.median(seconds[name]) / layers[name] for name in candidates}
    best_torch_s = min(layer_s[ROWS], layer_s[GQA])
    error = case.error() if args.check else None
    return [
        {
            "context": context,
            "num_threads": num_threads,
            "kernel": name,
            "layer_us": layer_s[name] * 1e6,
            "bytes_per_s": case.layer_bytes / layer_s[name],
            "share_of_read": layer_s[READ] / layer_s[name],
            "times_torch_best": best_torch_s / layer_s[name],
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
    parser.add_argument("--contexts", default="16,512,4096,32768")
    parser.add_argument("--threads", default=f"1,{available_cores()}")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--cache-mb", type=float, default=512.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller caches")
    parser.add_argument("--check", action="store_true", help="compare with float64 attention")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.cache_mb = 3, 256.0
    return args


def main() -> None:
    args = parse()
    first_call_s = compile_seconds()
    rows = []
    header = ("context", "threads", "kernel", "us/layer", "GB/s", "of read", "x torch")
    print(("{:>8} {:>7} {:>26} {:>10} {:>6} {:>8} {:>8}").format(*header), file=sys.stderr)
    for context in map(int, args.contexts.split(",")):
        args.cache_mb, wanted = min(args.cache_mb, context * 0.5), args.cache_mb
        for num_threads in dict.fromkeys(map(int, args.threads.split(","))):
            for row in measure(args, context, num_threads):
                rows.append(row)
                print(
                    f"{context:8} {num_threads:7} {row['kernel']:>26} {row['layer_us']:10.1f} "
                    f"{row['bytes_per_s'] / 1e9:6.1f} {row['share_of_read']:8.0%} "
                    f"{row['times_torch_best']:8.2f}",
                    file=sys.stderr,
                )
        args.cache_mb = wanted
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
            "openmp": openmp_parallel() is not None,
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

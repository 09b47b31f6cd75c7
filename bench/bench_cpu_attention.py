"""How fast is decode attention on the CPU, beside torch's best form and a plain read of the cache?

Decode attention reads every cached key and value once, so a chain that only reads as many bytes is
its ceiling; it runs before every candidate. Ours runs as in a decode step: one chain over the
caches of several layers, which together are larger than the last-level cache. What would change our
mind about having our own kernel: torch's best form (the query heads of a KV head as rows of one
query, over contiguous keys and values) within 1.3x of it at long contexts. Ours reads blocks in
random order, torch contiguous memory.

    python bench/bench_cpu_attention.py [--quick] [--check] [--heads 32/4x128 32/8x128 8/8x128]

Cases whose keys and values, ours and torch's, take more than 4 GB are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import numba
import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from cpu_kernels.attention import check_attention, decode_attention, decode_attention_links
from cpu_kernels.calls import Chain, Link
from cpu_kernels.formats import from_bfloat16_bits, to_bfloat16_bits
from cpu_kernels.memory_read import read_link
from cpu_kernels.scratch import Scratch, aligned_bytes
from cpu_kernels.threads import available_cores
from hetero.measure.cold_memory import last_level_cache_bytes
from hetero.measure.fingerprint import cpu_model

OURS, ROWS, GQA = "cpu_kernels", "torch sdpa, heads as rows", "torch sdpa, enable_gqa"
BLOCK_SIZE = 16
# bfloat16 values that are repeated: a gigabyte of new ones would take half a minute
NUM_RANDOM = (1 << 20) + 1
# above, torch's enable_gqa takes a second and more
MAX_GQA_TOKENS = 1 << 15
MAX_CASE_BYTES = 4e9
# layers together, in last-level caches: more would leave out more cases
CACHES_IN_ROTATION = 3
MAX_CACHE_MB = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Query heads, KV heads and their width."""

    num_heads: int
    num_kv_heads: int
    width: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        """Read "32/4x128".

        Raises
        ------
        ValueError
            If it is no such text, or the heads do not divide.
        """
        heads, _, rest = text.partition("/")
        kv_heads, _, width = rest.partition("x")
        found = cls(num_heads=int(heads), num_kv_heads=int(kv_heads), width=int(width))
        if found.num_heads % found.num_kv_heads:
            raise ValueError(f"{heads} query heads do not divide by {kv_heads} KV heads")
        return found


class Case:
    """Caches of several layers, which together are larger than the last-level cache."""

    def __init__(
        self, args: argparse.Namespace, heads: Heads, context: int, batch: int, num_threads: int
    ) -> None:
        num_heads, kv_heads, width = heads.num_heads, heads.num_kv_heads, heads.width
        self.num_threads = num_threads
        self.layer_bytes = layer_bytes(heads, context, batch)
        self.num_layers = num_layers(args, heads, context, batch)
        blocks_each = -(-context // BLOCK_SIZE)
        rng = np.random.default_rng(0)
        shape = (self.num_layers, 2, batch * blocks_each, kv_heads, BLOCK_SIZE, width)
        some = to_bfloat16_bits(rng.standard_normal(NUM_RANDOM, dtype=np.float32))
        num_bytes = 2 * int(np.prod(shape))
        self.caches = aligned_bytes(num_bytes).view(np.uint16).reshape(shape)
        for cache in self.caches:
            cache[:] = np.resize(some, shape[1:])
        tables = rng.permutation(batch * blocks_each).astype(np.int32)
        self.tables = tables.reshape(batch, blocks_each)
        self.context_lens = np.full(batch, context, np.int32)
        # the queries hold bfloat16 values, so that torch's rounding of its query changes nothing
        self.q = from_bfloat16_bits(
            to_bfloat16_bits(rng.standard_normal((batch, num_heads, width), dtype=np.float32))
        )
        self.out = np.empty((batch, num_heads, width), np.float32)
        self.lse = np.empty((batch, num_heads), np.float32)
        self.pairs = self.links_of_layers()
        links: list[Link] = [link for pair in self.pairs for link in pair]
        self.chain = Chain(links, num_threads=num_threads)
        whole = self.caches.reshape(-1).view(np.uint8)
        self.read = Chain([read_link(whole)], num_threads=num_threads)
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
        self.torch_q_rows = self.torch_q.view(batch, kv_heads, num_heads // kv_heads, width)
        self.gqa_layers = cycle(self.contiguous)

    def links_of_layers(self) -> list[tuple[Link, Link]]:
        """The links of every layer's cache."""
        scratch = Scratch()
        return [
            decode_attention_links(
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
                scratch=scratch,
            )
            for cache in self.caches
        ]

    def attend_rows(self) -> torch.Tensor:
        for keys, values in self.contiguous:
            out = scaled_dot_product_attention(self.torch_q_rows, keys, values)
        return out.reshape(self.q.shape)

    def attend_gqa(self) -> torch.Tensor:
        keys, values = next(self.gqa_layers)  # far slower: one layer a round is enough
        out = scaled_dot_product_attention(self.torch_q, keys, values, enable_gqa=True)
        return out.reshape(self.q.shape)

    def error(self) -> float:
        """Return the largest difference from float64 attention, over the largest output."""
        self.chain.run()
        for pair in self.pairs:
            check_attention(pair)
        largest, difference = 0.0, 0.0
        for seq in range(len(self.q)):
            keys, values = self.contiguous[-1][:, seq].double()
            q = torch.from_numpy(self.q[seq]).double().view(keys.shape[0], -1, keys.shape[-1])
            weights = torch.softmax(q @ keys.mT * keys.shape[-1] ** -0.5, dim=-1)
            expected = (weights @ values).reshape(self.out.shape[1:]).numpy()
            largest = max(largest, float(np.abs(expected).max()))
            difference = max(difference, float(np.abs(self.out[seq] - expected).max()))
        return difference / largest


def layer_bytes(heads: Heads, context: int, batch: int) -> int:
    """Bytes of keys and values that one layer's attention reads: 2 (K and V) of 2 bytes each."""
    return 2 * 2 * batch * context * heads.num_kv_heads * heads.width


def num_layers(args: argparse.Namespace, heads: Heads, context: int, batch: int) -> int:
    """How many layers are larger together than --cache-mb."""
    return int(args.cache_mb * 1e6) // layer_bytes(heads, context, batch) + 1


def interleaved(
    candidates: dict[str, Callable[[], Any]], read: Callable[[], None], rounds: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Time every candidate once a round, each after a read, after one untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    read_s: list[float] = []
    for number in range(rounds + 1):
        for name, candidate in candidates.items():
            times = [seconds_of(run) for run in (read, candidate)]
            if number:
                read_s.append(times[0])
                seconds[name].append(times[1])
    return seconds, read_s


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    args: argparse.Namespace, heads: Heads, context: int, batch: int, num_threads: int
) -> list[dict[str, Any]]:
    """Return the rows of one shape of heads, context, batch and thread count."""
    torch.set_num_threads(num_threads)
    case = Case(args, heads, context, batch, num_threads)
    candidates: dict[str, Callable[[], Any]] = {OURS: case.chain.run, ROWS: case.attend_rows}
    if batch * context <= MAX_GQA_TOKENS:
        candidates[GQA] = case.attend_gqa
    seconds, read_s = interleaved(candidates, case.read.run, args.rounds)
    layers = dict.fromkeys(candidates, case.num_layers) | {GQA: 1}
    layer_s = {name: statistics.median(seconds[name]) / layers[name] for name in candidates}
    ceiling = case.caches.nbytes / statistics.median(read_s)
    best_torch_s = min(layer_s[name] for name in (ROWS, GQA) if name in layer_s)
    # 2 * D for the scores and 2 * D for the values of a head
    operations = 4 * heads.num_heads * heads.width * batch * context
    error = case.error() if args.check else None
    return [
        {
            "context": context,
            "batch": batch,
            "num_heads": heads.num_heads,
            "num_kv_heads": heads.num_kv_heads,
            "head_dim": heads.width,
            "num_threads": num_threads,
            "kernel": name,
            "layer_us": layer_s[name] * 1e6,
            "gb_per_s": case.layer_bytes / layer_s[name] / 1e9,
            "ceiling_gb_per_s": ceiling / 1e9,
            "share_of_ceiling": case.layer_bytes / layer_s[name] / ceiling,
            "gflop_per_s": operations / layer_s[name] / 1e9,
            "times_torch_best": best_torch_s / layer_s[name],
            "num_layers": case.num_layers,
            "cache_mb": case.caches.nbytes / 1e6,
            "relative_error": error if name == OURS else None,
        }
        for name in candidates
    ]


def compile_seconds() -> float:
    """Return how long the first call takes: a compilation, or a read of object code from disk."""
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
    parser.add_argument("--contexts", help="default: 512,2048,4096,8192,32768")
    parser.add_argument("--batches", help="default: 1,4,16")
    parser.add_argument("--threads", default=str(available_cores()))
    parser.add_argument(
        "--heads",
        nargs="+",
        type=Heads.parse,
        default=[Heads.parse(text) for text in ("32/4x128", "32/8x128", "8/8x128")],
        help="query heads/KV heads x width",
    )
    parser.add_argument(
        "--cache-mb", type=float, help="of all layers; default: three times the last-level cache"
    )
    parser.add_argument("--rounds", type=int, help="default: 7")
    parser.add_argument("--quick", action="store_true", help="fewer cases, rounds, smaller caches")
    parser.add_argument("--check", action="store_true", help="compare with float64 attention")
    args = parser.parse_args()
    args.contexts = args.contexts or ("512,4096" if args.quick else "512,2048,4096,8192,32768")
    args.batches = args.batches or ("1,4" if args.quick else "1,4,16")
    args.rounds = args.rounds or (3 if args.quick else 7)
    several_mb = CACHES_IN_ROTATION * last_level_cache_bytes() / 1e6
    args.cache_mb = args.cache_mb or (300.0 if args.quick else min(several_mb, MAX_CACHE_MB))
    return args


def main() -> None:
    args = parse()
    first_call_s = compile_seconds()
    rows = []
    header = "heads context batch threads kernel us/layer GB/s ceiling share GFLOP/s xtorch"
    form = "{:>9} {:>7} {:>5} {:>7} {:>26} {:>10} {:>6} {:>7} {:>5} {:>7} {:>7}"
    say(form.format(*header.split()))
    numbers = [map(int, text.split(",")) for text in (args.contexts, args.batches, args.threads)]
    for heads, context, batch, num_threads in product(args.heads, *numbers):
        shape = f"{heads.num_heads}/{heads.num_kv_heads}x{heads.width}"
        layers = num_layers(args, heads, context, batch)
        # ours and torch's contiguous ones
        case_bytes = 2 * layers * layer_bytes(heads, context, batch)
        if case_bytes > MAX_CASE_BYTES:
            say(f"{shape:>9} {context:7} {batch:5} left out: {case_bytes / 1e9:.1f} GB")
            continue
        for row in measure(args, heads, context, batch, num_threads):
            rows.append(row)
            say(
                f"{shape:>9} {context:7} {batch:5} {num_threads:7} {row['kernel']:>26} "
                f"{row['layer_us']:10.1f} {row['gb_per_s']:6.1f} {row['ceiling_gb_per_s']:7.1f} "
                f"{row['share_of_ceiling']:5.2f} {row['gflop_per_s']:7.0f} "
                f"{row['times_torch_best']:7.2f}"
            )
    errors = [row["relative_error"] for row in rows if row["relative_error"] is not None]
    if args.check:
        say(f"largest relative error against float64: {max(errors):.1e}")
    document = {
        "question": __doc__.splitlines()[0],
        "environment": {
            "machine": cpu_model(),
            "cores": available_cores(),
            "last_level_cache_bytes": last_level_cache_bytes(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
            "first_call_s": first_call_s,
        },
        "command": ["python", "bench/bench_cpu_attention.py", *sys.argv[1:]],
        "rows": rows,
    }
    print(json.dumps(document, indent=2))
    if args.check and max(errors) > 1e-5:
        sys.exit(f"relative error {max(errors):.1e} is above 1e-5")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

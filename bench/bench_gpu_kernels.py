"""How near to the GPU's memory do products with quantised weights come, beside torch's in bfloat16?

A matrix and a layer of experts, for a token, a few and many, weights read cold; bytes of weights a
second against the rate of a plain read, and against the link, which copies what is streamed. What
would change our mind about reading the CPU's layout as it is: less than half of the read rate for
one token, or int4 that is no faster than bfloat16 anywhere.

    python bench/bench_gpu_kernels.py [--quick] [--check] [--reference]

Without a CUDA device there are no rows. --reference times on the CPU what an emulated accelerator
does: weights unpacked before each product, which says nothing of a GPU. --check compares the
products of both with float64.

Prints JSON to stdout, a table to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import numpy as np
import torch

from cpu_kernels.formats import WeightFormat, pack, unpack
from hetero.measure.cold_memory import ColdMemory, cold_cpu_memory, cold_gpu_memory
from hetero.measure.experts import torch_experts_sample
from hetero.measure.fingerprint import cpu_model
from hetero.measure.linear import linear_sample
from hetero.measure.link import copy_samples
from hetero.measure.memory import gpu_read_bytes_per_s
from hetero.measure.timing import torch_threads
from hetero.model.quantised import Panels, multiply, product_method
from planner.device import Sample
from planner.model_spec import QUANTIZATION_GROUP, Quantization, WeightKind

KINDS: tuple[WeightKind, ...] = ("bfloat16", "int8", "int4")
# Qwen3-30B-A3B's queries, keys and values; a dense model's gate; a head.
SHAPES = ((5120, 2048), (14336, 4096), (32768, 4096))
EXPERT_SHAPES = ((2048, 768), (4096, 14336))
TOKENS = (1, 4, 16, 64, 512)
EXPERT_TOKENS = (1, 16, 64)
_GPU_COLD_BYTES, _CPU_COLD_BYTES = 2 << 30, 1 << 28
_COPY_BYTES = 256 << 20
# float32 sums of a product, and its rounding to bfloat16, as shares of the sum of |x||w|
_BOUND = 2.0**-8 + 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape of each, two token counts")
    parser.add_argument("--check", action="store_true", help="compare products with float64")
    parser.add_argument("--reference", action="store_true", help="time the CPU's unpacking instead")
    parser.add_argument("--budget-s", type=float, default=0.2, help="seconds for each case")
    args = parser.parse_args()
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if has_cuda and not args.reference else torch.device("cpu")
    document: dict[str, Any] = {
        "question": __doc__.partition("\n")[0],
        "environment": environment(device),
        "command": ["python", "bench/bench_gpu_kernels.py", *sys.argv[1:]],
        "rows": [],
    }
    if has_cuda or args.reference:
        with torch.inference_mode(), torch_threads(1):
            document |= measured(device, args.quick or args.reference, args.budget_s)
            if args.check:
                document["worst_errors"] = check(device)
    else:
        say("no CUDA device: nothing was measured (--reference times what emulation does)")
    print(json.dumps(document, indent=2))


def environment(device: torch.device) -> dict[str, Any]:
    """Who multiplies, and on what."""
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else cpu_model(),
        "method": f"{product_method(device)}{'' if is_cuda else ' (reference: no GPU)'}",
        "torch": torch.__version__,
        "triton": triton,
    }


def measured(device: torch.device, is_quick: bool, budget_s: float) -> dict[str, Any]:
    """Ceilings and rows."""
    ceilings: dict[str, float] = {}
    if device.type == "cuda":
        memory = cold_gpu_memory(_GPU_COLD_BYTES, device)
        ceilings["read_bytes_per_s"] = gpu_read_bytes_per_s(memory, budget_s=budget_s)
        for copy in copy_samples(device, (_COPY_BYTES,), budget_s=budget_s):
            if copy.memory == "pinned":
                ceilings[f"{copy.lane}_bytes_per_s"] = _COPY_BYTES / copy.seconds
    else:
        memory = cold_cpu_memory(_CPU_COLD_BYTES)
    rows: list[dict[str, Any]] = []
    for samples in cases(memory, is_quick, budget_s):
        bfloat16_s = samples[0].seconds
        for sample in samples:
            rows.append(row_of(sample, bfloat16_s, ceilings))
            say_row(rows[-1])
    return {"ceilings": ceilings, "rows": rows}


def cases(memory: ColdMemory, is_quick: bool, budget_s: float) -> list[list[Sample]]:
    """Samples of each case in all formats, bfloat16 first."""
    shapes, expert_shapes = (SHAPES[:1], EXPERT_SHAPES[:1]) if is_quick else (SHAPES, EXPERT_SHAPES)
    found = [
        [
            linear_sample(
                memory,
                kind=kind,
                shape=shape,
                num_tokens=count,
                backend="torch" if kind == "bfloat16" else "panels",
                budget_s=budget_s,
            )
            for kind in KINDS
        ]
        for shape in shapes
        for count in (TOKENS[::4] if is_quick else TOKENS)
    ]
    found += [
        [
            torch_experts_sample(
                memory,
                kind=kind,
                shape=shape,
                num_experts=8 if shape[1] < 4096 else 2,
                tokens_each=count,
                budget_s=budget_s,
            )
            for kind in KINDS
        ]
        for shape in expert_shapes
        for count in (EXPERT_TOKENS[::2] if is_quick else EXPERT_TOKENS)
    ]
    return found


def row_of(sample: Sample, bfloat16_s: float, ceilings: dict[str, float]) -> dict[str, Any]:
    """A case in one format."""
    rate = sample.call.bytes / sample.seconds
    row = {
        "kernel": sample.kernel,
        "format": sample.format,
        "shape": list(sample.shape),
        "num_tokens": sample.num_tokens,
        "seconds": sample.seconds,
        "spread": sample.spread,
        "bytes_per_s": rate,
        "flop_per_s": sample.call.flops / sample.seconds,
        "times_bfloat16": bfloat16_s / sample.seconds,
    }
    if "read_bytes_per_s" in ceilings:
        row["share_of_read"] = rate / ceilings["read_bytes_per_s"]
        row["times_link"] = rate / ceilings["h2d_bytes_per_s"]
    return row


def check(device: torch.device) -> dict[str, float]:
    """Largest distance of a product from float64, by format; fails above the bound."""
    found: dict[str, float] = {}
    rng = np.random.default_rng(0)
    for quantization in get_args(Quantization):
        format_ = WeightFormat(kind=quantization, group_size=QUANTIZATION_GROUP)
        blob = pack(rng.standard_normal((1000, 1100)).astype(np.float32), format_)
        weights = unpack(blob, format_, 1000, 1100).astype(np.float64)
        panels = Panels(
            blobs_EB=torch.from_numpy(blob).to(device)[None],
            weight_format=format_,
            num_matrices=1,
            num_rows=1000,
            num_columns=1100,
        )
        errors = []
        for count in TOKENS:
            x = torch.randn(count, 1100).to(torch.bfloat16)
            y = multiply(x.to(device), panels, product_method(device)).cpu().double().numpy()
            x64 = x.double().numpy()
            errors.append(np.max(np.abs(y - x64 @ weights.T) / (np.abs(x64) @ np.abs(weights).T)))
        worst = found[quantization] = float(np.max(errors))
        assert worst <= _BOUND, f"{quantization} is off by {worst}"
    return found


def say_row(row: dict[str, Any]) -> None:
    share = f", {row['share_of_read']:.0%} of a read" if "share_of_read" in row else ""
    say(
        f"{row['kernel']} {row['shape']} {row['num_tokens']} tokens {row['format']}: "
        f"{row['seconds'] * 1e6:.0f} us, {row['bytes_per_s'] / 1e9:.1f} GB/s{share}, "
        f"{row['times_bfloat16']:.2f} times as fast as bfloat16"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

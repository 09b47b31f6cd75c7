"""Seconds of the small kernels between products: norms, rotary, residual adds, routing.

They go from cache to cache, so they are timed over the same arrays again and again.
"""

# T tokens, D hidden, H query heads, G KV heads, K head dim, E experts

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from cpu_kernels.calls import Link
from cpu_kernels.elementwise import (
    add_residual_link,
    prepare_qkv_link,
    rms_norm_link,
    rotary_tables,
    route_link,
)
from hetero.kv_cache import BLOCK_SIZE
from hetero.measure.attention import Heads
from hetero.measure.chains import repeated, timed_chains
from hetero.measure.cold_memory import ColdMemory
from hetero.measure.timing import Timing, host_seconds, timed
from hetero.model.norm import rms_norm
from hetero.model.rotary import rotary_frequencies
from hetero.sampler import SamplingParams, SamplingRow, sample
from planner.device import Sample
from planner.kernels import Kernel
from planner.kv_blocks import num_blocks_for
from planner.model_spec import Dtype, RopeSpec

_EPS = 1e-6
_NUM_ROUNDS = 64
_NUM_COLD_CALLS = 5
_NUM_COLD_PASSES = 8
_MAX_COLD_ROWS = 16
# Operations of `elementwise_sample`'s chain: a norm is two.
_NUM_PASSES = 32


def norm_sample(width: int, num_tokens: int, *, num_threads: int, budget_s: float) -> Sample:
    """Measure the norm of bfloat16 rows."""
    x, weight = _bits(num_tokens, width), _bits(width)
    out = np.empty_like(x)
    return _small_sample(
        "norm",
        (width,),
        num_tokens,
        lambda: (rms_norm_link(x, weight, _EPS, out),),
        num_threads,
        budget_s,
    )


def residual_sample(width: int, num_tokens: int, *, num_threads: int, budget_s: float) -> Sample:
    """Measure the addition of float32 rows to bfloat16 ones."""
    x, y = _bits(num_tokens, width), np.full((num_tokens, width), 0.01, np.float32)
    return _small_sample(
        "residual",
        (width,),
        num_tokens,
        # the engine's prefill writes each sum to fresh memory, which the system then provides
        lambda: (add_residual_link(x, y, None, np.empty_like(x)),),
        num_threads,
        budget_s,
    )


def rotary_sample(heads: Heads, num_tokens: int, *, num_threads: int, budget_s: float) -> Sample:
    """Measure queries and keys being rotated, and keys and values written to their pages."""
    num_heads, num_kv_heads, head_dim = heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = np.full((num_tokens, width), 0.01, np.float32)
    rope = RopeSpec(theta=1e4)
    inv_freq_F = rotary_frequencies(rope, head_dim, torch.device("cpu")).numpy()
    cos, sin = (np.empty((num_tokens, head_dim // 2), np.float32) for _ in range(2))
    rotary_tables(np.arange(num_tokens), inv_freq_F, cos, sin)
    num_blocks = num_blocks_for(num_tokens)
    keys, values = (_bits(num_blocks, num_kv_heads, BLOCK_SIZE, head_dim) for _ in range(2))
    q_out = np.empty((num_tokens, num_heads, head_dim), np.float32)

    def links() -> Sequence[Link]:
        link = prepare_qkv_link(
            qkv,
            cos,
            sin,
            np.arange(num_tokens),
            qk_norm="none",
            q_norm=None,
            k_norm=None,
            norm_eps=_EPS,
            clip=None,
            q_out=q_out,
            key_cache=keys,
            value_cache=values,
        )
        return (link,)

    return _small_sample("rotary", (width,), num_tokens, links, num_threads, budget_s)


def route_sample(
    num_experts: int, top_k: int, num_tokens: int, *, num_threads: int, budget_s: float
) -> Sample:
    """Measure the softmax over experts and the choice of the best ones."""
    logits = np.random.default_rng(0).standard_normal((num_tokens, num_experts), np.float32)
    ids = np.empty((num_tokens, top_k), np.int64)
    weights = np.empty((num_tokens, top_k), np.float32)
    return _small_sample(
        "route",
        (num_experts, top_k),
        num_tokens,
        lambda: (route_link(logits, top_k, True, ids, weights),),
        num_threads,
        budget_s,
    )


def _small_sample(
    kernel: Kernel,
    shape: tuple[int, ...],
    num_tokens: int,
    make: Callable[[], Sequence[Link]],
    num_threads: int,
    budget_s: float,
) -> Sample:
    rounds = repeated(make, _NUM_ROUNDS)
    found = timed_chains(rounds, num_threads=num_threads, budget_s=budget_s)
    return Sample(
        lane="cpu",
        kernel=kernel,
        shape=shape,
        num_tokens=num_tokens,
        num_threads=num_threads,
        seconds=found.seconds,
        spread=found.spread,
    )


def elementwise_sample(
    device: torch.device,
    dtype: Dtype,
    width: int,
    num_tokens: int,
    *,
    budget_s: float,
    cold: ColdMemory | None = None,
) -> Sample:
    """Measure one pass of torch over rows: the mean of norms, products and additions.

    On a GPU the passes over few rows take as long as a thread needs to submit them. On a CPU they
    take as long as torch's code does to come back to the caches, from which weights drove it:
    `cold` is read before them.
    """
    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    x = torch.full((num_tokens, width), 0.5, dtype=torch_dtype, device=device)
    weight = torch.full((width,), 0.25, dtype=torch_dtype, device=device)

    is_cold = cold is not None and num_tokens <= _MAX_COLD_ROWS
    num_passes = _NUM_COLD_PASSES if is_cold else _NUM_PASSES

    def passes() -> None:
        y = x
        for _ in range(num_passes // 4):
            y = rms_norm(y, weight, _EPS) * weight + x

    if is_cold:
        assert cold is not None
        found = _timed_cold(passes, cold, torch.get_num_threads())
    else:
        found = timed(passes, device=device, budget_s=budget_s)
    return Sample(
        lane="cpu" if device.type == "cpu" else "gpu",
        kernel="elementwise",
        backend="torch",
        shape=(width,),
        num_tokens=num_tokens,
        num_threads=torch.get_num_threads() if device.type == "cpu" else 1,
        seconds=found.seconds / num_passes,
        spread=found.spread,
    )


def sampling_sample(
    memory: ColdMemory, vocab_size: int, num_seqs: int, *, num_threads: int
) -> Sample:
    """Measure the choice of the likeliest token of each row, after weights were read.

    Weights drive the code of the interpreter and of torch out of the caches.
    """
    logits_RV = torch.randn(num_seqs, vocab_size)
    rows = [SamplingRow(params=SamplingParams(temperature=0.0))] * num_seqs
    sample(logits_RV, rows)
    found = _timed_cold(partial(sample, logits_RV, rows), memory, num_threads)
    return Sample(
        lane="cpu",
        kernel="sample",
        backend="torch",
        shape=(vocab_size,),
        num_seqs=num_seqs,
        num_threads=num_threads,
        seconds=found.seconds,
        spread=found.spread,
    )


def _timed_cold(call: Callable[[], object], memory: ColdMemory, num_threads: int) -> Timing:
    """Time a call of Python whose code weights have driven from the caches."""
    samples: list[float] = []
    for _ in range(_NUM_COLD_CALLS):
        memory.displace_caches(num_threads)
        samples.append(host_seconds(call))
    return Timing.of(samples)


def _bits(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """bfloat16 numbers of 0.0078, as their bits."""
    return np.full(shape, 0x3C00, np.uint16)

"""The decoder's layers on packed weights, by the CPU kernels: what attention.py, moe.py, mlp.py and
head.py do with torch."""

# T new tokens, S sequences, D hidden, H query heads, G KV heads, K head dim, L rows of the head

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.attention import decode_attention
from cpu_kernels.elementwise import (
    add_residual,
    prepare_qkv,
    rms_norm,
    rotary_tables,
    route,
    silu_multiply,
)
from cpu_kernels.experts import run_experts
from cpu_kernels.linear import PackedMatrix, linear
from cpu_kernels.microkernels import fastest_compute
from cpu_kernels.scratch import Scratch
from hetero.model.attention import LayerKV, PromptReads, attend_pages, prompt_reads
from hetero.model.batch import BatchTensors
from hetero.model.moe import Routing
from hetero.model.packed import PackedModule
from planner.model_spec import ModelSpec


@dataclass(slots=True, kw_only=True)
class CpuKernels:
    """How the CPU computes: threads, and memory that calls use again. One step at a time."""

    num_threads: int
    inv_freq_F: NDArray[np.float32]
    scratch: Scratch = field(default_factory=Scratch)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuAttentionStep:
    """What the attention of all layers shares in a step on the CPU."""

    cos_TF: NDArray[np.float32]
    sin_TF: NDArray[np.float32]
    slots_T: NDArray[np.int64]
    block_tables_SB: NDArray[np.int32]
    context_lens_S: NDArray[np.int32]
    prompts: dict[int | None, tuple[PromptReads, ...]]  # by window; prefill only


def cpu_attention_step(
    batch: BatchTensors,
    kernels: CpuKernels,
    *,
    block_size: int,
    windows: Collection[int | None],
) -> CpuAttentionStep:
    """Rotations, indices and masks of a step, for layers with any of `windows`."""
    positions_T = batch.positions_T.numpy()
    shape = (len(positions_T), len(kernels.inv_freq_F))
    cos_TF, sin_TF = np.empty(shape, np.float32), np.empty(shape, np.float32)
    rotary_tables(positions_T, kernels.inv_freq_F, cos_TF, sin_TF)
    prompts: dict[int | None, tuple[PromptReads, ...]] = {}
    if batch.phase == "prefill":
        for window in set(windows):
            prompts[window] = tuple(
                prompt_reads(batch, index, window, block_size, torch.float32, from_pages=True)
                for index in range(batch.num_seqs)
            )
    return CpuAttentionStep(
        cos_TF=cos_TF,
        sin_TF=sin_TF,
        slots_T=batch.slots_T.numpy(),
        block_tables_SB=batch.block_tables_SB.numpy(),
        context_lens_S=batch.context_lens_S.numpy(),
        prompts=prompts,
    )


def attention_layer(
    x_TD: Tensor,
    weights: PackedModule,
    kv: LayerKV,
    step: CpuAttentionStep,
    kernels: CpuKernels,
    spec: ModelSpec,
    window: int | None,
) -> Tensor:
    """x + attention of the normed x; writes the new keys and values into their pages."""
    num_tokens, num_threads = x_TD.shape[0], kernels.num_threads
    x = bits(x_TD)
    normed = np.empty_like(x)
    rms_norm(x, weights.vectors["input_norm"], spec.norm_eps, normed, num_threads=num_threads)
    qkv = product(normed, weights.matrices["qkv"], kernels)
    if "qkv_bias" in weights.vectors:
        qkv += weights.vectors["qkv_bias"]
    q_THK = np.empty((num_tokens, spec.num_heads, spec.head_dim), np.float32)
    key_cache, value_cache = bits(kv.key), bits(kv.value)
    prepare_qkv(
        qkv,
        step.cos_TF,
        step.sin_TF,
        step.slots_T,
        qk_norm=spec.qk_norm,
        q_norm=weights.vectors.get("q_norm"),
        k_norm=weights.vectors.get("k_norm"),
        norm_eps=spec.norm_eps,
        clip=spec.clip_qkv,
        q_out=q_THK,
        key_cache=key_cache,
        value_cache=value_cache,
        num_threads=num_threads,
    )
    if step.prompts:
        q = torch.from_numpy(q_THK)
        parts = [attend_pages(q, kv, reads) for reads in step.prompts[window]]
        attended = (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()
    else:
        out_THK = np.empty_like(q_THK)
        decode_attention(
            q_THK,
            key_cache,
            value_cache,
            step.block_tables_SB,
            step.context_lens_S,
            scale=spec.head_dim**-0.5,
            window=window,
            num_threads=num_threads,
            out=out_THK,
            lse=np.empty(q_THK.shape[:2], np.float32),
        )
        attended = out_THK.reshape(num_tokens, -1)
    y_TD = product(attended, weights.matrices["o"], kernels)
    return _residual(x, y_TD, weights.vectors.get("o_bias"), x_TD.dtype, num_threads)


def route_layer(
    x_TD: Tensor, weights: PackedModule, kernels: CpuKernels, spec: ModelSpec, top_k: int
) -> Routing:
    """The `top_k` most probable experts of each token of the normed x."""
    x = bits(x_TD)
    normed = np.empty_like(x)
    rms_norm(x, weights.vectors["norm"], spec.norm_eps, normed, num_threads=kernels.num_threads)
    logits_TE = product(normed, weights.matrices["gate"], kernels)
    ids_Tk = np.empty((x.shape[0], top_k), np.int64)
    weights_Tk = np.empty((x.shape[0], top_k), np.float32)
    route(
        logits_TE,
        top_k,
        spec.norm_topk_prob,
        ids_Tk,
        weights_Tk,
        num_threads=kernels.num_threads,
    )
    return Routing(
        normed_TD=as_tensor(normed, x_TD.dtype),
        expert_ids_Tk=torch.from_numpy(ids_Tk),
        expert_weights_Tk=torch.from_numpy(weights_Tk),
    )


def experts_layer(routing: Routing, weights: PackedModule, kernels: CpuKernels) -> Tensor:
    """y_TD: what the chosen experts give, weighted and added in the order of choice."""
    assert weights.experts is not None
    x = bits(routing.normed_TD)
    out = np.empty_like(x)
    run_experts(
        x,
        weights.experts,
        routing.expert_ids_Tk.numpy(),
        routing.expert_weights_Tk.float().numpy(),
        compute=fastest_compute(weights.experts.weight_format),
        num_threads=kernels.num_threads,
        scratch=kernels.scratch,
        out=out,
    )
    return as_tensor(out, routing.normed_TD.dtype)


def dense_layer(
    x_TD: Tensor, weights: PackedModule, kernels: CpuKernels, spec: ModelSpec
) -> Tensor:
    """x + down(silu(gate) * up) of the normed x."""
    x, num_threads = bits(x_TD), kernels.num_threads
    normed = np.empty_like(x)
    rms_norm(x, weights.vectors["norm"], spec.norm_eps, normed, num_threads=num_threads)
    if weights.experts is not None:
        y_TD = np.empty(x.shape, np.float32)
        run_experts(
            normed,
            weights.experts,
            np.zeros((x.shape[0], 1), np.int64),
            np.ones((x.shape[0], 1), np.float32),
            compute=fastest_compute(weights.experts.weight_format),
            num_threads=num_threads,
            scratch=kernels.scratch,
            out=y_TD,
        )
        return _residual(x, y_TD, None, x_TD.dtype, num_threads)
    gate_up = product(normed, weights.matrices["gate_up"], kernels)
    gate_up += weights.vectors["gate_up_bias"]
    h_TI = np.empty((x.shape[0], gate_up.shape[1] // 2), np.float32)
    silu_multiply(gate_up, h_TI, num_threads=num_threads)
    y_TD = product(h_TI, weights.matrices["down"], kernels)
    return _residual(x, y_TD, weights.vectors["down_bias"], x_TD.dtype, num_threads)


def head_layer(x_LD: Tensor, weights: PackedModule, kernels: CpuKernels, norm_eps: float) -> Tensor:
    """Final norm and output matrix: float32 logits_LV."""
    x = bits(x_LD)
    normed = np.empty_like(x)
    rms_norm(x, weights.vectors["norm"], norm_eps, normed, num_threads=kernels.num_threads)
    return torch.from_numpy(product(normed, weights.matrices["weight"], kernels))


def product(x: NDArray[Any], matrix: PackedMatrix, kernels: CpuKernels) -> NDArray[np.float32]:
    """x W^T in float32."""
    out = np.empty((x.shape[0], matrix.num_rows), np.float32)
    linear(
        x,
        matrix,
        compute=fastest_compute(matrix.weight_format),
        num_threads=kernels.num_threads,
        scratch=kernels.scratch,
        out=out,
    )
    return out


def bits(tensor: Tensor) -> NDArray[Any]:
    """A CPU tensor as the kernels take it: float32, or bfloat16 as uint16; nothing is copied."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def as_tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """The same memory as a tensor."""
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


def _residual(
    x: NDArray[Any],
    y_TD: NDArray[np.float32],
    bias_D: NDArray[np.float32] | None,
    dtype: torch.dtype,
    num_threads: int,
) -> Tensor:
    out = np.empty_like(x)
    add_residual(x, y_TD, bias_D, out, num_threads=num_threads)
    return as_tensor(out, dtype)

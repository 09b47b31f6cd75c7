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
from hetero.model.attention import LayerKV, PromptReads, as_array, attend_pages, prompt_reads
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
    pages: dict[int, tuple[LayerKV, NDArray[Any], NDArray[Any]]] = field(default_factory=dict)

    def pages_of(self, kv: LayerKV) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values of a layer as arrays, made once: a view costs 10 us."""
        if id(kv) not in self.pages:
            self.pages[id(kv)] = (kv, as_array(kv.key), as_array(kv.value))
        return self.pages[id(kv)][1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuRouting:
    """Which experts every token chose and how much each counts; `normed_TD` is what they read."""

    normed_TD: NDArray[Any]
    expert_ids_Tk: NDArray[np.int64]
    expert_weights_Tk: NDArray[np.float32]

    @classmethod
    def of(cls, routing: Routing) -> CpuRouting:
        """The same of tensors."""
        return cls(
            normed_TD=as_array(routing.normed_TD),
            expert_ids_Tk=routing.expert_ids_Tk.numpy(),
            expert_weights_Tk=routing.expert_weights_Tk.float().numpy(),
        )

    def tensors(self) -> Routing:
        """The same as tensors."""
        return Routing(
            normed_TD=as_tensor(self.normed_TD),
            expert_ids_Tk=torch.from_numpy(self.expert_ids_Tk),
            expert_weights_Tk=torch.from_numpy(self.expert_weights_Tk),
        )


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
    x_TD: NDArray[Any],
    weights: PackedModule,
    kv: LayerKV,
    step: CpuAttentionStep,
    kernels: CpuKernels,
    spec: ModelSpec,
    window: int | None,
) -> NDArray[Any]:
    """x + attention of the normed x; writes the new keys and values into their pages."""
    num_tokens, num_threads = x_TD.shape[0], kernels.num_threads
    normed_TD = _normed(x_TD, weights.vectors["input_norm"], spec.norm_eps, num_threads)
    qkv = product(normed_TD, weights.matrices["qkv"], kernels)
    if "qkv_bias" in weights.vectors:
        qkv += weights.vectors["qkv_bias"]
    q_THK = np.empty((num_tokens, spec.num_heads, spec.head_dim), np.float32)
    key_cache, value_cache = kernels.pages_of(kv)
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
            scratch=kernels.scratch,
            out=out_THK,
            lse=np.empty(q_THK.shape[:2], np.float32),
        )
        attended = out_THK.reshape(num_tokens, -1)
    y_TD = product(attended, weights.matrices["o"], kernels)
    return _residual(x_TD, y_TD, weights.vectors.get("o_bias"), num_threads)


def route_layer(
    x_TD: NDArray[Any], weights: PackedModule, kernels: CpuKernels, spec: ModelSpec, top_k: int
) -> CpuRouting:
    """The `top_k` most probable experts of each token of the normed x."""
    num_tokens, num_threads = x_TD.shape[0], kernels.num_threads
    normed_TD = _normed(x_TD, weights.vectors["norm"], spec.norm_eps, num_threads)
    logits_TE = product(normed_TD, weights.matrices["gate"], kernels)
    ids_Tk = np.empty((num_tokens, top_k), np.int64)
    weights_Tk = np.empty((num_tokens, top_k), np.float32)
    route(logits_TE, top_k, spec.norm_topk_prob, ids_Tk, weights_Tk, num_threads=num_threads)
    return CpuRouting(normed_TD=normed_TD, expert_ids_Tk=ids_Tk, expert_weights_Tk=weights_Tk)


def experts_layer(
    routing: CpuRouting, weights: PackedModule, kernels: CpuKernels
) -> NDArray[np.float32]:
    """y_TD: what the chosen experts give, weighted and added in the order of choice."""
    assert weights.experts is not None
    y_TD = np.empty(routing.normed_TD.shape, np.float32)
    run_experts(
        routing.normed_TD,
        weights.experts,
        routing.expert_ids_Tk,
        routing.expert_weights_Tk,
        compute=fastest_compute(weights.experts.weight_format),
        num_threads=kernels.num_threads,
        scratch=kernels.scratch,
        out=y_TD,
    )
    return y_TD


def combine(x_TD: NDArray[Any], y_TD: NDArray[np.float32], kernels: CpuKernels) -> NDArray[Any]:
    """Add what the experts gave to the residual."""
    return _residual(x_TD, y_TD, None, kernels.num_threads)


def dense_layer(
    x_TD: NDArray[Any], weights: PackedModule, kernels: CpuKernels, spec: ModelSpec
) -> NDArray[Any]:
    """x + down(silu(gate) * up) of the normed x."""
    num_tokens, num_threads = x_TD.shape[0], kernels.num_threads
    normed_TD = _normed(x_TD, weights.vectors["norm"], spec.norm_eps, num_threads)
    if weights.experts is not None:
        everything = CpuRouting(
            normed_TD=normed_TD,
            expert_ids_Tk=np.zeros((num_tokens, 1), np.int64),
            expert_weights_Tk=np.ones((num_tokens, 1), np.float32),
        )
        return _residual(x_TD, experts_layer(everything, weights, kernels), None, num_threads)
    gate_up = product(normed_TD, weights.matrices["gate_up"], kernels)
    gate_up += weights.vectors["gate_up_bias"]
    h_TI = np.empty((num_tokens, gate_up.shape[1] // 2), np.float32)
    silu_multiply(gate_up, h_TI, num_threads=num_threads)
    y_TD = product(h_TI, weights.matrices["down"], kernels)
    return _residual(x_TD, y_TD, weights.vectors["down_bias"], num_threads)


def head_layer(
    x_LD: NDArray[Any], weights: PackedModule, kernels: CpuKernels, norm_eps: float
) -> Tensor:
    """Final norm and output matrix: float32 logits_LV."""
    normed_LD = _normed(x_LD, weights.vectors["norm"], norm_eps, kernels.num_threads)
    return torch.from_numpy(product(normed_LD, weights.matrices["weight"], kernels))


def _normed(x: NDArray[Any], weight: NDArray[Any], eps: float, num_threads: int) -> NDArray[Any]:
    out = np.empty_like(x)
    rms_norm(x, weight, eps, out, num_threads=num_threads)
    return out


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


def as_tensor(array: NDArray[Any]) -> Tensor:
    """The same memory as a tensor; uint16 is bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def _residual(
    x_TD: NDArray[Any],
    y_TD: NDArray[np.float32],
    bias_D: NDArray[np.float32] | None,
    num_threads: int,
) -> NDArray[Any]:
    out = np.empty_like(x_TD)
    add_residual(x_TD, y_TD, bias_D, out, num_threads=num_threads)
    return out

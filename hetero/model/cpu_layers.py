"""The decoder's layers on packed weights, by the CPU kernels: what attention.py, moe.py, mlp.py and
head.py do with torch."""

# T new tokens, S sequences, D hidden, H query heads, G KV heads, K head dim, L rows of the head

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.attention import decode_attention_links
from cpu_kernels.calls import Link
from cpu_kernels.elementwise import (
    add_residual_link,
    prepare_qkv_link,
    rms_norm_link,
    rotary_tables,
    route_link,
    silu_multiply_link,
)
from cpu_kernels.experts import experts_links
from cpu_kernels.linear import PackedMatrix, linear_link
from cpu_kernels.microkernels import fastest_compute
from hetero.model.attention import LayerKV, PromptReads, as_array, attend_pages, prompt_reads
from hetero.model.batch import BatchTensors
from hetero.model.cpu_workspace import CpuKernels, Steps
from hetero.model.moe import Routing
from hetero.model.packed import PackedModule
from planner.model_spec import ModelSpec

# Of more elements at once torch makes threads of its own, which then spin beside ours: attention of
# 32 sequences with 32 heads took 3.4 ms with them and 1.9 without, on two cores.
_PIECE = 1 << 14

# Block tables grow by so many blocks at a time: the chains of all layers are built anew for it.
_TABLE_STEP = 32


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
    """What the attention of all layers shares in a step on the CPU; the next step overwrites it."""

    cos_TF: NDArray[np.float32]
    sin_TF: NDArray[np.float32]
    slots_T: NDArray[np.int64]
    block_tables_SB: NDArray[np.int32]
    context_lens_S: NDArray[np.int32]
    prompts: dict[int | None, tuple[PromptReads, ...]]  # by window; prefill only

    @property
    def places(self) -> tuple[NDArray[Any], ...]:
        """What tells a chain where its tokens stand: other arrays where a step has other sizes."""
        return (self.cos_TF, self.sin_TF, self.slots_T)

    @property
    def contexts(self) -> tuple[NDArray[Any], ...]:
        """What tells the chain of a decode step where its contexts lie."""
        return (self.block_tables_SB, self.context_lens_S)


def cpu_attention_step(
    batch: BatchTensors,
    kernels: CpuKernels,
    *,
    block_size: int,
    windows: Collection[int | None],
    name: str = "",
) -> CpuAttentionStep:
    """Rotations, indices and masks of a step, for layers with any of `windows`.

    `name` is of their memory: a step may have more than one set of them.
    """
    space, num_tokens = kernels.workspace(batch.num_tokens), batch.num_tokens
    shape = (num_tokens, len(kernels.inv_freq_F))
    cos_TF, sin_TF = (space.array(name + which, shape, np.float32) for which in ("cos", "sin"))
    rotary_tables(batch.positions_T.numpy(), kernels.inv_freq_F, cos_TF, sin_TF)
    slots_T = space.array(f"{name}slots", (num_tokens,), np.int64)
    slots_T[:] = batch.slots_T.numpy()
    lens_S, tables_SB = batch.context_lens_S.numpy(), batch.block_tables_SB.numpy()
    prompts: dict[int | None, tuple[PromptReads, ...]] = {}
    if batch.phase == "decode":
        lens, tables = lens_S, tables_SB
        lens_S = space.array(f"{name}lens", lens.shape, np.int32)
        lens_S[:] = lens
        width = -(-tables.shape[1] // _TABLE_STEP) * _TABLE_STEP
        tables_SB = space.array(f"{name}tables", (batch.num_seqs, width), np.int32)
        tables_SB[:, : tables.shape[1]] = tables
    else:
        for window in set(windows):
            prompts[window] = tuple(
                prompt_reads(batch, index, window, block_size, torch.float32, from_pages=True)
                for index in range(batch.num_seqs)
            )
    return CpuAttentionStep(
        cos_TF=cos_TF,
        sin_TF=sin_TF,
        slots_T=slots_T,
        block_tables_SB=tables_SB,
        context_lens_S=lens_S,
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
    space, out_TD = kernels.workspace(len(x_TD)), np.empty_like(x_TD)
    like_TD = hidden_array(x_TD, kernels)
    key = (id(weights), x_TD.dtype.num)
    keeps = (weights, kv, *step.places)
    if not step.prompts:
        return space.program(
            ("attend", *key),
            (*keeps, *step.contexts),
            lambda: attend_steps(like_TD, weights, kv, step, kernels, spec, window, like_TD),
        ).run(x_TD, out_TD)

    def before() -> Steps:
        links, _ = _project(like_TD, weights, kv, step, kernels, spec)
        return Steps(links=links, reads_x=links[:1])

    space.program(("project", *key), keeps, before).run(x_TD, out_TD)
    q = torch.from_numpy(_queries(len(x_TD), kernels, spec))
    parts = [attend_pages(q, kv, reads) for reads in step.prompts[window]]
    joined = (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()
    attended = space.array("attended", joined.shape, np.float32)
    np.copyto(attended, joined)

    def after() -> Steps:
        product, add = _output(like_TD, attended, weights, kernels, like_TD)
        return Steps(links=(product, add), reads_x=(add,), writes_out=(add,))

    return space.program(("output", *key), (weights, attended), after).run(x_TD, out_TD)


def hidden_array(x_TD: NDArray[Any], kernels: CpuKernels) -> NDArray[Any]:
    """Hidden states like x: where a chain keeps them, and what layers' programs are built over.

    Built over x itself, they would hold the memory of a prefill step's for every layer.
    """
    return kernels.workspace(len(x_TD)).array("hidden", x_TD.shape, x_TD.dtype)


def attend_steps(
    x_TD: NDArray[Any],
    weights: PackedModule,
    kv: LayerKV,
    step: CpuAttentionStep,
    kernels: CpuKernels,
    spec: ModelSpec,
    window: int | None,
    out_TD: NDArray[Any],
) -> Steps:
    """The attention of a decode step."""
    project, q_THK = _project(x_TD, weights, kv, step, kernels, spec)
    attend, attended = _attend(q_THK, kv, step, kernels, window)
    product, add = _output(x_TD, attended, weights, kernels, out_TD)
    return Steps(
        links=(*project, *attend, product, add), reads_x=(project[0], add), writes_out=(add,)
    )


def attend_projected(
    qkv_THK: Tensor,
    kv: LayerKV,
    step: CpuAttentionStep,
    kernels: CpuKernels,
    spec: ModelSpec,
    window: int | None,
) -> Tensor:
    """Attention of a decode step for what another device has projected and rotated.

    Writes the new keys and values into their pages; the result has its heads joined.
    """
    return attend_projected_part(qkv_THK, kv, step, kernels, spec, window)[0]


def attend_projected_part(
    qkv_THK: Tensor,
    kv: LayerKV,
    step: CpuAttentionStep,
    kernels: CpuKernels,
    spec: ModelSpec,
    window: int | None,
) -> tuple[Tensor, NDArray[np.float32]]:
    """The same and the log-sum-exp of every head's scores, until the next layer's are written."""
    num_tokens = len(qkv_THK)
    space = kernels.workspace(num_tokens)
    qkv = space.array("qkv", (num_tokens, spec.q_size + 2 * spec.kv_size), np.float32)
    _convert(qkv_THK, torch.from_numpy(qkv))
    q_THK = _queries(num_tokens, kernels, spec)
    attended = space.array("attended", (num_tokens, spec.q_size), np.float32)

    def links() -> Steps:
        angles = (num_tokens, len(kernels.inv_freq_F))
        store = prepare_qkv_link(
            qkv,
            *space.kept("not rotated", (), lambda: _no_rotation(angles)),
            step.slots_T,
            qk_norm="none",
            q_norm=None,
            k_norm=None,
            norm_eps=spec.norm_eps,
            clip=None,
            q_out=q_THK,
            key_cache=kernels.pages_of(kv)[0],
            value_cache=kernels.pages_of(kv)[1],
        )
        return Steps(links=(store, *_attend(q_THK, kv, step, kernels, window)[0]))

    key, keeps = ("attend projected", id(kv)), (kv, qkv, attended, *step.places, *step.contexts)
    space.program(key, keeps, links).run(qkv, attended)
    found = torch.empty(attended.shape, dtype=qkv_THK.dtype)
    _convert(torch.from_numpy(attended), found)
    return found, _lse_array(num_tokens, kernels, spec.num_heads)


def _convert(source: Tensor, target: Tensor) -> None:
    """Copy to another format in this thread."""
    to, from_ = target.view(-1), source.view(-1)
    for start in range(0, len(to), _PIECE):
        to[start : start + _PIECE].copy_(from_[start : start + _PIECE])


def _no_rotation(shape: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The cosines and sines of no rotation: x * 1 + y * 0 is x to the last bit."""
    return np.ones(shape, np.float32), np.zeros(shape, np.float32)


def _attend(
    q_THK: NDArray[np.float32],
    kv: LayerKV,
    step: CpuAttentionStep,
    kernels: CpuKernels,
    window: int | None,
) -> tuple[tuple[Link, ...], NDArray[np.float32]]:
    """From queries to values by their scores, heads joined."""
    num_tokens, num_heads, head_dim = q_THK.shape
    space = kernels.workspace(num_tokens)
    attended = space.array("attended", (num_tokens, num_heads * head_dim), np.float32)
    links = decode_attention_links(
        q_THK,
        *kernels.pages_of(kv),
        step.block_tables_SB,
        step.context_lens_S,
        scale=head_dim**-0.5,
        window=window,
        num_threads=kernels.num_threads,
        scratch=space.scratch,
        out=attended.reshape(q_THK.shape),
        lse=_lse_array(num_tokens, kernels, num_heads),
    )
    return links, attended


def _lse_array(num_tokens: int, kernels: CpuKernels, num_heads: int) -> NDArray[np.float32]:
    return kernels.workspace(num_tokens).array("lse", (num_tokens, num_heads), np.float32)


def _project(
    x_TD: NDArray[Any],
    weights: PackedModule,
    kv: LayerKV,
    step: CpuAttentionStep,
    kernels: CpuKernels,
    spec: ModelSpec,
) -> tuple[tuple[Link, ...], NDArray[np.float32]]:
    """From x to queries, and to keys and values in their pages."""
    norm, normed_TD = _norm(x_TD, weights, "input_norm", kernels, spec.norm_eps)
    product, qkv = _product(normed_TD, weights.matrices["qkv"], "qkv", kernels)
    q_THK = _queries(len(x_TD), kernels, spec)
    key_cache, value_cache = kernels.pages_of(kv)
    prepare = prepare_qkv_link(
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
        bias=weights.vectors.get("qkv_bias"),
    )
    return (norm, product, prepare), q_THK


def _queries(num_tokens: int, kernels: CpuKernels, spec: ModelSpec) -> NDArray[np.float32]:
    shape = (num_tokens, spec.num_heads, spec.head_dim)
    return kernels.workspace(num_tokens).array("q", shape, np.float32)


def _output(
    x_TD: NDArray[Any],
    attended: NDArray[np.float32],
    weights: PackedModule,
    kernels: CpuKernels,
    out_TD: NDArray[Any],
) -> tuple[Link, Link]:
    product, y_TD = _product(attended, weights.matrices["o"], "y", kernels)
    return product, add_residual_link(x_TD, y_TD, weights.vectors.get("o_bias"), out_TD)


def route_layer(
    x_TD: NDArray[Any], weights: PackedModule, kernels: CpuKernels, spec: ModelSpec, top_k: int
) -> CpuRouting:
    """The `top_k` most probable experts of each token of the normed x; for this layer only.

    The next layer's routing is written to the same memory.
    """
    space, routing = kernels.workspace(len(x_TD)), routing_arrays(x_TD, kernels, top_k)
    like_TD = hidden_array(x_TD, kernels)
    key = ("route", id(weights), x_TD.dtype.num)
    space.program(
        key,
        (weights, routing.normed_TD, routing.expert_ids_Tk),
        lambda: route_steps(like_TD, weights, kernels, spec, routing),
    ).run(x_TD, x_TD)
    return routing


def routing_arrays(x_TD: NDArray[Any], kernels: CpuKernels, top_k: int) -> CpuRouting:
    """Where a layer's routing is written."""
    space, shape = kernels.workspace(len(x_TD)), (len(x_TD), top_k)
    return CpuRouting(
        normed_TD=space.array("routed", x_TD.shape, x_TD.dtype),
        expert_ids_Tk=space.array("ids", shape, np.int64),
        expert_weights_Tk=space.array("weights", shape, np.float32),
    )


def route_steps(
    x_TD: NDArray[Any],
    weights: PackedModule,
    kernels: CpuKernels,
    spec: ModelSpec,
    routing: CpuRouting,
) -> Steps:
    """The choice of experts, written to `routing`."""
    norm = rms_norm_link(x_TD, weights.vectors["norm"], spec.norm_eps, routing.normed_TD)
    product, logits_TE = _product(routing.normed_TD, weights.matrices["gate"], "gate", kernels)
    choose = route_link(
        logits_TE,
        routing.expert_ids_Tk.shape[1],
        spec.norm_topk_prob,
        routing.expert_ids_Tk,
        routing.expert_weights_Tk,
    )
    return Steps(links=(norm, product, choose), reads_x=(norm,))


def experts_layer(
    routing: CpuRouting, weights: PackedModule, kernels: CpuKernels
) -> NDArray[np.float32]:
    """y_TD: what the chosen experts give, weighted and added in the order of choice.

    For this layer only: the next layer's is written to the same memory.
    """
    x_TD = routing.normed_TD
    own = routing_arrays(x_TD, kernels, routing.expert_ids_Tk.shape[1])
    for kept, given in (
        (own.normed_TD, x_TD),
        (own.expert_ids_Tk, routing.expert_ids_Tk),
        (own.expert_weights_Tk, routing.expert_weights_Tk),
    ):
        if kept is not given:  # from another device or under other numbers: a chain reads one place
            np.copyto(kept, given)
    y_TD = experts_output(x_TD, kernels)
    key = ("experts", id(weights), x_TD.dtype.num)
    keeps = (weights, own.normed_TD, own.expert_ids_Tk, own.expert_weights_Tk, y_TD)
    program = kernels.workspace(len(x_TD)).program(
        key, keeps, lambda: experts_steps(own, weights, kernels, y_TD)
    )
    return program.run(own.normed_TD, y_TD)


def experts_output(x_TD: NDArray[Any], kernels: CpuKernels) -> NDArray[np.float32]:
    """Where what a layer's experts give is written."""
    return kernels.workspace(len(x_TD)).array("expert_output", x_TD.shape, np.float32)


def experts_steps(
    routing: CpuRouting, weights: PackedModule, kernels: CpuKernels, y_TD: NDArray[np.float32]
) -> Steps:
    """The experts that were chosen."""
    assert weights.experts is not None
    links = experts_links(
        routing.normed_TD,
        weights.experts,
        routing.expert_ids_Tk,
        routing.expert_weights_Tk,
        compute=fastest_compute(weights.experts.weight_format),
        num_threads=kernels.num_threads,
        scratch=kernels.workspace(len(y_TD)).scratch,
        out=y_TD,
    )
    return Steps(links=links)


def combine(x_TD: NDArray[Any], y_TD: NDArray[np.float32], kernels: CpuKernels) -> NDArray[Any]:
    """Add what the experts gave to the residual."""
    space, out_TD = kernels.workspace(len(x_TD)), np.empty_like(x_TD)
    like_TD = hidden_array(x_TD, kernels)
    key = ("combine", x_TD.dtype.num)
    program = space.program(key, (y_TD,), lambda: combine_steps(like_TD, y_TD, like_TD))
    return program.run(x_TD, out_TD)


def combine_steps(x_TD: NDArray[Any], y_TD: NDArray[np.float32], out_TD: NDArray[Any]) -> Steps:
    """The sum of the residual and what the experts gave."""
    add = add_residual_link(x_TD, y_TD, None, out_TD)
    return Steps(links=(add,), reads_x=(add,), writes_out=(add,))


def dense_layer(
    x_TD: NDArray[Any], weights: PackedModule, kernels: CpuKernels, spec: ModelSpec
) -> NDArray[Any]:
    """x + down(silu(gate) * up) of the normed x."""
    out_TD, like_TD = np.empty_like(x_TD), hidden_array(x_TD, kernels)
    key = ("dense", id(weights), x_TD.dtype.num)
    program = kernels.workspace(len(x_TD)).program(
        key, (weights,), lambda: dense_steps(like_TD, weights, kernels, spec, like_TD)
    )
    return program.run(x_TD, out_TD)


def dense_columns(
    x_TD: NDArray[Any], weights: PackedModule, kernels: CpuKernels, spec: ModelSpec
) -> NDArray[np.float32]:
    """What some columns of a dense layer add to x: as one expert that all tokens choose.

    For this layer only: the next layer's is written to the same memory.
    """
    y_TD, like_TD = experts_output(x_TD, kernels), hidden_array(x_TD, kernels)

    def steps() -> Steps:
        norm, normed_TD = _norm(like_TD, weights, "norm", kernels, spec.norm_eps)
        links = experts_steps(_one_expert(normed_TD), weights, kernels, y_TD).links
        return Steps(links=(norm, *links), reads_x=(norm,))

    key = ("dense columns", id(weights), x_TD.dtype.num)
    program = kernels.workspace(len(x_TD)).program(key, (weights, y_TD), steps)
    return program.run(x_TD, y_TD)


def _one_expert(normed_TD: NDArray[Any]) -> CpuRouting:
    """A routing in which all tokens choose the only expert."""
    shape = (len(normed_TD), 1)
    return CpuRouting(
        normed_TD=normed_TD,
        expert_ids_Tk=np.zeros(shape, np.int64),
        expert_weights_Tk=np.ones(shape, np.float32),
    )


def dense_steps(
    x_TD: NDArray[Any],
    weights: PackedModule,
    kernels: CpuKernels,
    spec: ModelSpec,
    out_TD: NDArray[Any],
) -> Steps:
    """The dense layer, as one expert that all choose unless it has biases."""
    space, num_tokens = kernels.workspace(len(x_TD)), len(x_TD)
    norm, normed_TD = _norm(x_TD, weights, "norm", kernels, spec.norm_eps)
    links: tuple[Link, ...]
    if weights.experts is not None:
        y_TD = space.array("y", x_TD.shape, np.float32)
        links = experts_steps(_one_expert(normed_TD), weights, kernels, y_TD).links
    else:
        gate_up, both = _product(normed_TD, weights.matrices["gate_up"], "gate_up", kernels)
        h_TI = space.array("h", (num_tokens, both.shape[1] // 2), np.float32)
        activate = silu_multiply_link(both, h_TI, bias=weights.vectors["gate_up_bias"])
        down, y_TD = _product(h_TI, weights.matrices["down"], "y", kernels)
        links = (gate_up, activate, down)
    add = add_residual_link(x_TD, y_TD, weights.vectors.get("down_bias"), out_TD)
    return Steps(links=(norm, *links, add), reads_x=(norm, add), writes_out=(add,))


def head_layer(
    x_LD: NDArray[Any], weights: PackedModule, kernels: CpuKernels, norm_eps: float
) -> Tensor:
    """Final norm and output matrix: float32 logits_LV, until the next step's are written."""
    logits_LV, like_LD = logits_array(x_LD, weights, kernels), hidden_array(x_LD, kernels)
    key = ("head", id(weights), x_LD.dtype.num)
    program = kernels.workspace(len(x_LD)).program(
        key, (weights, logits_LV), lambda: head_steps(like_LD, weights, kernels, norm_eps)
    )
    return torch.from_numpy(program.run(x_LD, logits_LV))


def logits_array(
    x_LD: NDArray[Any], weights: PackedModule, kernels: CpuKernels
) -> NDArray[np.float32]:
    """Where logits are written."""
    shape = (len(x_LD), weights.matrices["weight"].num_rows)
    return kernels.workspace(len(x_LD)).array("logits", shape, np.float32)


def head_steps(
    x_LD: NDArray[Any], weights: PackedModule, kernels: CpuKernels, norm_eps: float
) -> Steps:
    """Final norm and output matrix, written to `logits_array`."""
    norm, normed_LD = _norm(x_LD, weights, "norm", kernels, norm_eps)
    product, _ = _product(normed_LD, weights.matrices["weight"], "logits", kernels)
    return Steps(links=(norm, product), reads_x=(norm,))


def _norm(
    x: NDArray[Any], weights: PackedModule, name: str, kernels: CpuKernels, eps: float
) -> tuple[Link, NDArray[Any]]:
    normed = kernels.workspace(len(x)).array("normed", x.shape, x.dtype)
    return rms_norm_link(x, weights.vectors[name], eps, normed), normed


def _product(
    x: NDArray[Any], matrix: PackedMatrix, name: str, kernels: CpuKernels
) -> tuple[Link, NDArray[np.float32]]:
    """x W^T in float32, in the array `name`."""
    space = kernels.workspace(len(x))
    out = space.array(name, (len(x), matrix.num_rows), np.float32)
    link = linear_link(
        x,
        matrix,
        compute=fastest_compute(matrix.weight_format),
        num_threads=kernels.num_threads,
        scratch=space.scratch,
        out=out,
    )
    return link, out


def as_tensor(array: NDArray[Any]) -> Tensor:
    """The same memory as a tensor; uint16 is bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor

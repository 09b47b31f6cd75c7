"""DecoderStep: performs the ops of one step's StepGraph with the model functions."""

# T new tokens, D hidden, L rows that reach the head, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hetero.kv_cache import BLOCK_SIZE, PagedKV
from hetero.model.attention import AttentionKernel, AttentionStep, attention_layer, attention_step
from hetero.model.batch import BatchTensors
from hetero.model.head import embed, head
from hetero.model.mlp import dense_layer
from hetero.model.moe import (
    Dispatch,
    ExpertMethod,
    Routing,
    combine,
    dispatch,
    experts,
    route,
)
from hetero.model.rotary import rotary_frequencies
from hetero.runtime.devices import Accelerator
from hetero.runtime.weights import ModuleWeights, Weights
from planner.cost_model import has_grouped_products
from planner.model_spec import ModelSpec
from planner.placement import Device, TierPlacement
from planner.step_graph import Op


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKernels:
    """How one device computes: kernels, threads, and constants in its memory."""

    attention: AttentionKernel
    experts: ExpertMethod
    num_threads: int
    inv_freq_F: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A loaded model: weights, and how each device computes."""

    spec: ModelSpec
    weights: Weights
    accelerator: Accelerator | None
    kernels: dict[Device, DeviceKernels]

    @classmethod
    def create(
        cls,
        spec: ModelSpec,
        weights: Weights,
        accelerator: Accelerator | None,
        *,
        num_threads: int,
    ) -> Decoder:
        """Choose each device's kernels; the CPU's decode attention uses `num_threads` threads."""
        cpu = torch.device("cpu")
        kernels: dict[Device, DeviceKernels] = {
            "cpu": DeviceKernels(
                attention="numba",
                experts="loop",
                num_threads=num_threads,
                inv_freq_F=rotary_frequencies(spec.rope, spec.head_dim, cpu),
            )
        }
        if accelerator is not None:
            kernels["gpu"] = DeviceKernels(
                attention="torch",
                experts=_expert_method(spec, accelerator),
                num_threads=1,
                inv_freq_F=rotary_frequencies(spec.rope, spec.head_dim, accelerator.device),
            )
        return cls(spec=spec, weights=weights, accelerator=accelerator, kernels=kernels)


def _expert_method(spec: ModelSpec, accelerator: Accelerator) -> ExpertMethod:
    """One kernel for all experts where the device has it, by the rule that prices it."""
    if not has_grouped_products(spec, accelerator.kind):
        return "loop"
    is_ampere = torch.cuda.get_device_capability(accelerator.device) >= (8, 0)
    return "grouped" if is_ampere and hasattr(torch.nn.functional, "grouped_mm") else "loop"


class DecoderStep:
    """The values that flow through one step. Mutable: each op reads some and sets some.

    One value travels along the chain of ops (`hidden_TD`, then an expert layer's routing, dispatch
    and output), so that ops on different lanes never write what another still reads.

    Parameters
    ----------
    decoder : Decoder
        The model.
    tier : TierPlacement
        The tier whose graph is run.
    kv : PagedKV
        The cache of this tier's phase.
    batch : BatchTensors
        The step's indices, on the CPU.
    sample : callable
        Given logits_LV on the CPU; its result is kept by the caller.
    """

    def __init__(
        self,
        decoder: Decoder,
        tier: TierPlacement,
        kv: PagedKV,
        batch: BatchTensors,
        sample: Callable[[Tensor], None],
    ) -> None:
        self._decoder = decoder
        self._tier = tier
        self._kv = kv
        self._sample = sample
        self._batches: dict[Device, BatchTensors] = {"cpu": batch}
        self._attention: dict[Device, AttentionStep] = {}
        self._hidden_TD: Tensor | None = None
        self._routing: Routing | None = None
        self._dispatch: Dispatch | None = None
        self._expert_output_TD: Tensor | None = None
        self._logits_LV: Tensor | None = None

    def perform(self, op: Op) -> None:
        """Do one op; called on its lane once its dependencies have ended."""
        if op.kind == "copy":
            self._copy(op)
        elif op.kind == "embed":
            batch = self._batches[op.device]
            weights = self._decoder.weights.resident(op.device, "embedding")
            self._hidden_TD = embed(batch.token_ids_T, weights)
        elif op.kind == "attention":
            self._hidden_TD = self._attend(op)
        elif op.kind == "dense":
            spec = self._decoder.spec
            self._hidden_TD = dense_layer(self._hidden(), self._weights(op), spec.norm_eps)
        elif op.kind in ("router", "dispatch", "experts", "combine"):
            self._expert_layer(op)
        elif op.kind == "head":
            self._head(op)
        else:
            assert self._logits_LV is not None
            self._sample(self._logits_LV)

    def _hidden(self) -> Tensor:
        assert self._hidden_TD is not None
        return self._hidden_TD

    def _weights(self, op: Op) -> ModuleWeights:
        """Weights of the op's module: resident, or staged by a copy that has ended."""
        assert op.module is not None and op.layer is not None
        weights, streamed = self._decoder.weights, self._tier.streamed(op.layer)
        if op.module in streamed:
            assert op.buffer is not None
            return weights.staged(op.module, op.layer, op.buffer, streamed)[1]
        return weights.resident(op.device, op.module, op.layer)

    def _attend(self, op: Op) -> Tensor:
        assert op.layer is not None
        spec, kernels = self._decoder.spec, self._decoder.kernels[op.device]
        step = self._attention.get(op.device)
        if step is None:
            step = self._attention[op.device] = attention_step(
                self._batches[op.device],
                inv_freq_F=kernels.inv_freq_F,
                dtype=self._hidden().dtype,
                block_size=BLOCK_SIZE,
                windows={layer.window for layer in spec.layers},
                kernel=kernels.attention,
            )
        return attention_layer(
            self._hidden(),
            self._weights(op),
            self._kv.layer(op.layer),
            step,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            norm_eps=spec.norm_eps,
            qk_norm=spec.qk_norm,
            clip_qkv=spec.clip_qkv,
            window=spec.layers[op.layer].window,
            num_threads=kernels.num_threads,
        )

    def _expert_layer(self, op: Op) -> None:
        assert op.layer is not None
        spec = self._decoder.spec
        layer = spec.layers[op.layer]
        if op.kind == "router":
            self._routing = route(
                self._hidden(),
                self._weights(op),
                norm_eps=spec.norm_eps,
                top_k=layer.num_experts_per_token,
                norm_topk_prob=spec.norm_topk_prob,
            )
        elif op.kind == "dispatch":
            assert self._routing is not None
            self._dispatch = dispatch(self._routing, layer.num_experts)
        elif op.kind == "experts":
            assert self._dispatch is not None
            method = self._decoder.kernels[op.device].experts
            self._expert_output_TD = experts(self._dispatch, self._weights(op), method=method)
        else:
            assert self._expert_output_TD is not None
            self._hidden_TD = combine(self._hidden(), self._expert_output_TD)

    def _head(self, op: Op) -> None:
        spec, batch = self._decoder.spec, self._batches[op.device]
        rows_LD = self._hidden()
        if rows_LD.shape[0] == batch.num_tokens:
            rows_LD = rows_LD.index_select(0, batch.logit_rows_L)
        weights = self._decoder.weights.resident(op.device, "head")
        self._logits_LV = head(rows_LD, weights, spec.norm_eps)

    def _copy(self, op: Op) -> None:
        accelerator = self._decoder.accelerator
        assert accelerator is not None
        move = accelerator.upload if op.lane == "h2d" else accelerator.download
        if op.payload == "batch":
            self._batches["gpu"] = self._batches["cpu"].map(move)
        elif op.payload == "weights":
            assert op.module is not None and op.layer is not None and op.buffer is not None
            weights = self._decoder.weights
            streamed = self._tier.streamed(op.layer)
            staged, _ = weights.staged(op.module, op.layer, op.buffer, streamed)
            accelerator.copy_into(staged, weights.host_flat(op.module, op.layer))
        elif op.payload == "hidden":
            hidden = self._hidden()
            if op.layer is None:
                # On the way to the head only the rows that need logits travel.
                source: Device = "cpu" if op.lane == "h2d" else "gpu"
                hidden = hidden.index_select(0, self._batches[source].logit_rows_L)
            self._hidden_TD = move(hidden)
        elif op.payload == "routing":
            assert self._routing is not None
            self._routing = replace(
                self._routing,
                normed_TD=move(self._routing.normed_TD),
                expert_ids_Tk=move(self._routing.expert_ids_Tk),
                expert_weights_Tk=move(self._routing.expert_weights_Tk),
            )
        elif op.payload == "expert_output":
            assert self._expert_output_TD is not None
            self._expert_output_TD = move(self._expert_output_TD)
        else:
            assert op.payload == "logits" and self._logits_LV is not None
            self._logits_LV = move(self._logits_LV)


class KVMove:
    """Performs the copies of a sequence's KV cache from the prefill tier's device to decode's."""

    def __init__(
        self, accelerator: Accelerator, before: PagedKV, after: PagedKV, block_table: list[int]
    ) -> None:
        self._accelerator = accelerator
        self._before = before
        self._after = after
        self._blocks = torch.tensor(block_table)

    def perform(self, op: Op) -> None:
        """Copy one layer's blocks."""
        assert op.payload == "kv" and op.layer is not None
        move = self._accelerator.upload if op.lane == "h2d" else self._accelerator.download
        source, target = self._before.layer(op.layer), self._after.layer(op.layer)
        at_source = self._blocks.to(source.key.device)
        at_target = self._blocks.to(target.key.device)
        target.key[at_target] = self._land(move(source.key[at_source]), target.key)
        target.value[at_target] = self._land(move(source.value[at_source]), target.value)

    def _land(self, moved: Tensor, target: Tensor) -> Tensor:
        if target.device.type == "cpu" and moved.is_pinned():
            # The copy is asynchronous; the scatter into the cache runs on the host.
            torch.cuda.current_stream().synchronize()
        return moved

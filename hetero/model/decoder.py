"""DecoderStep: performs the ops of one step's StepGraph with the model functions."""

# T new tokens, D hidden, L rows that reach the head, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetero.kv_cache import BLOCK_SIZE, MovedPages, PagedKV
from hetero.model import cpu_layers
from hetero.model.attention import (
    AttentionKernel,
    AttentionStep,
    as_array,
    attention_layer,
    attention_output,
    attention_step,
    project,
)
from hetero.model.batch import BatchTensors
from hetero.model.cpu_layers import CpuAttentionStep, as_tensor
from hetero.model.cpu_run import FindPacked, build_run, split_runs
from hetero.model.cpu_workspace import CpuKernels
from hetero.model.divided_cache import DividedCacheStep
from hetero.model.expert_step import ExpertDevices, ExpertStep, ExpertTimes
from hetero.model.families import TORCH_DTYPES
from hetero.model.head import embed, head
from hetero.model.mlp import dense_columns, dense_layer
from hetero.model.moe import ExpertMethod, combine, expert_method, route
from hetero.model.packed import PackedModule, embedding_rows
from hetero.model.rotary import rotary_frequencies, rotary_rows
from hetero.runtime.devices import Accelerator
from hetero.runtime.host_copies import ModuleWeights
from hetero.runtime.weights import Weights
from planner.model_spec import ModelSpec, Module
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
    """A loaded model: weights, and how each device computes; `cpu_kernels` on packed weights.

    Each sub-batch has CPU kernels of its own: what one left in their memory may still be on its way
    to the GPU while the other's run. `expert_times` say what split layers fetch; None where there
    are none.
    """

    spec: ModelSpec
    weights: Weights
    accelerator: Accelerator | None
    kernels: dict[Device, DeviceKernels]
    cpu_kernels: tuple[CpuKernels, CpuKernels]
    expert_times: ExpertTimes | None
    _runs: dict[int, tuple[tuple[Op, ...], tuple[tuple[Op, ...], ...]]] = field(
        default_factory=dict
    )

    def runs(self, ops: tuple[Op, ...], find_packed: FindPacked) -> tuple[tuple[Op, ...], ...]:
        """What `split_runs` makes of ops that an executor gives in every step, kept."""
        if id(ops) not in self._runs:
            self._runs[id(ops)] = (ops, split_runs(ops, find_packed))
        return self._runs[id(ops)][1]

    def expert_devices(self, sub_batch: int) -> ExpertDevices:
        """What the ops of expert layers need of it."""
        return ExpertDevices(
            spec=self.spec,
            weights=self.weights,
            accelerator=self.accelerator,
            methods={device: kernels.experts for device, kernels in self.kernels.items()},
            cpu_kernels=self.cpu_kernels[sub_batch],
            times=self.expert_times,
        )

    @classmethod
    def create(
        cls,
        spec: ModelSpec,
        weights: Weights,
        accelerator: Accelerator | None,
        *,
        num_threads: int,
        expert_times: ExpertTimes | None = None,
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
        frequencies_F = kernels["cpu"].inv_freq_F.numpy()
        return cls(
            spec=spec,
            weights=weights,
            accelerator=accelerator,
            kernels=kernels,
            cpu_kernels=(
                CpuKernels(num_threads=num_threads, inv_freq_F=frequencies_F),
                CpuKernels(num_threads=num_threads, inv_freq_F=frequencies_F),
            ),
            expert_times=expert_times,
        )


def _expert_method(spec: ModelSpec, accelerator: Accelerator) -> ExpertMethod:
    widths = {spec.hidden_size, *(layer.intermediate_size for layer in spec.layers if layer.is_moe)}
    return expert_method(accelerator.device, TORCH_DTYPES[spec.dtype], widths)


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherPages:
    """Layers that have the sequences of a step in pages of their own, and its indices there."""

    layers: frozenset[int]
    batch: BatchTensors


class DecoderStep:
    """The values that flow through one step, or through one of its sub-batches. Mutable.

    One value travels along the chain of ops (`hidden_TD`; what expert layers and parts of divided
    feed-forwards add to it has its own place), so that ops on different lanes never write what
    another still reads.

    Parameters
    ----------
    decoder : Decoder
        The model.
    tier : TierPlacement
        The tier whose graph is run.
    kv : PagedKV
        The cache that the sequences are in.
    batch : BatchTensors
        The step's indices, on the CPU.
    sample : callable
        Given logits_LV on the CPU; its result is kept by the caller.
    sub_batch : int
        Which sub-batch's.
    others : sequence of OtherPages
        Layers that have the sequences in other pages than `batch` says.
    divided : DividedCacheStep, optional
        What layers share whose caches are divided, in decode.
    """

    def __init__(
        self,
        decoder: Decoder,
        tier: TierPlacement,
        kv: PagedKV,
        batch: BatchTensors,
        sample: Callable[[Tensor], None],
        sub_batch: int = 0,
        *,
        others: Sequence[OtherPages] = (),
        divided: DividedCacheStep | None = None,
    ) -> None:
        self._decoder = decoder
        self._tier = tier
        self._kv = kv
        self._sample = sample
        self._batches: dict[Device, BatchTensors] = {"cpu": batch}
        self._divided = divided
        # Pages by number: 0 those of the batch, then the others; layers that have these.
        self._pages: list[dict[Device, BatchTensors]] = [self._batches]
        self._pages += [{"cpu": each.batch} for each in others]
        self._pages_of_layer = {
            layer: number for number, each in enumerate(others, start=1) for layer in each.layers
        }
        self._cpu_kernels = decoder.cpu_kernels[sub_batch]
        self._rotations: dict[Device, tuple[Tensor, Tensor]] = {}
        # By device and by the number of the pages.
        self._attention: dict[tuple[Device, int], AttentionStep] = {}
        self._cpu_attention: dict[int, CpuAttentionStep] = {}
        self._rest_attention: CpuAttentionStep | None = None
        # Arrays between ops of the CPU's kernels, tensors elsewhere: from one to the other takes
        # 10 us, as long as a kernel.
        self._hidden_TD: Tensor | NDArray[Any] | None = None
        # What the rows that reach the head were selected from, until the step ends.
        self._unselected_TD: Tensor | None = None
        # Queries, keys and values, the same on the CPU, and what it gives for them.
        self._projected_THK: Tensor | None = None
        self._qkv_THK: Tensor | None = None
        self._attended: Tensor | None = None
        # Of a divided feed-forward: what goes to the CPU, the residual with the resident columns,
        # and what the others add.
        self._dense_input: Tensor | None = None
        self._resident_TD: Tensor | None = None
        self._missed_TD: Tensor | NDArray[Any] | None = None
        self._experts = ExpertStep(decoder.expert_devices(sub_batch), tier)
        self._logits_LV: Tensor | None = None

    def perform(self, op: Op) -> None:
        """Do one op; called on its lane once its dependencies have ended."""
        if op.kind == "copy":
            self._copy(op)
        elif op.kind == "embed":
            self._embed(op)
        elif op.kind == "attention":
            self._hidden_TD = self._attention_layer(op)
        elif op.kind == "qkv":
            self._projected_THK = self._project(op)
        elif op.kind == "attend":
            self._attend(op)
        elif op.kind == "attention_output":
            self._hidden_TD = self._attention_output(op)
        elif op.kind == "dense":
            self._dense(op)
        elif op.kind == "router":
            self._route(op)
        elif op.kind == "dispatch":
            self._experts.dispatch(op)
        elif op.kind == "experts":
            self._experts.run(op)
        elif op.kind == "admit":
            self._experts.admit(op)
        elif op.kind == "combine":
            self._combine(op)
        elif op.kind == "head":
            self._head(op)
        else:
            assert self._logits_LV is not None
            self._sample(self._logits_LV)

    def perform_until(self, op: Op, is_called: Callable[[], bool]) -> None:
        """Do an op that gives way, asking now and then."""
        self._experts.prefetch(op, is_called)

    def perform_run(self, ops: tuple[Op, ...]) -> list[float]:
        """Do neighbouring ops of the `cpu` lane; the times at which each of them ended.

        In a decode step whole layers on packed weights are one chain of kernels (cpu_run.py).
        """
        parts: tuple[tuple[Op, ...], ...] = tuple((op,) for op in ops)
        if self._batches["cpu"].phase == "decode":
            parts = self._decoder.runs(ops, self._chained)
        ends: list[float] = []
        for part in parts:
            if len(part) > 1:
                ends += self._perform_chain(part)
            else:
                self.perform(part[0])
                ends.append(time.perf_counter())
        return ends

    def _perform_chain(self, ops: tuple[Op, ...]) -> list[float]:
        decoder, step = self._decoder, self._cpu_step()
        kernels, x_TD = self._cpu_kernels, self._hidden_array()
        run = kernels.workspace(len(x_TD)).kept(
            (ops[0].index, len(ops), x_TD.dtype.num),
            (ops, self._kv, *step.places, *step.contexts),
            lambda: build_run(ops, x_TD, step, self._kv, self._packed, kernels, decoder.spec),
        )
        ends = run.perform(x_TD)
        if run.hidden_TD is not None:
            self._hidden_TD = run.hidden_TD
        if run.routing is not None:
            self._experts.set_routing("cpu", run.routing)
        if run.expert_output_TD is not None:
            self._experts.set_output(run.expert_output_TD)
        if run.logits_LV is not None:
            self._logits_LV = torch.from_numpy(run.logits_LV)
        return ends

    def _hidden(self) -> Tensor:
        assert self._hidden_TD is not None
        if not isinstance(self._hidden_TD, Tensor):
            self._hidden_TD = as_tensor(self._hidden_TD)
        return self._hidden_TD

    def _hidden_array(self) -> NDArray[Any]:
        assert self._hidden_TD is not None
        return as_array(self._hidden_TD) if isinstance(self._hidden_TD, Tensor) else self._hidden_TD

    def _weights(self, op: Op) -> ModuleWeights:
        """Weights of the op's module: resident, or staged by a copy that has ended."""
        assert op.module is not None and op.layer is not None
        weights = self._decoder.weights
        if op.module in self._tier.streamed(op.layer) and op.part != "resident":
            assert op.buffer is not None
            return weights.staging(self._tier).weights(op.module, op.layer, op.buffer)
        return weights.resident(op.device, op.module, op.layer)

    def _packed(self, op: Op, module: Module) -> PackedModule | None:
        """Packed weights of a module of the op's layer, where the CPU has them."""
        return self._decoder.weights.packed(module, op.layer) if op.device == "cpu" else None

    def _chained(self, op: Op, module: Module) -> PackedModule | None:
        """The same where a chain can read it: a router of the CPU knows experts by their number."""
        packed = self._packed(op, module)
        if module == "dense" and op.part != "all":
            return None  # its hidden states come from the GPU, and go back
        if packed is None or module != "experts":
            return packed
        assert op.layer is not None
        local = self._decoder.weights.local_experts(op.layer, op.part, "cpu", op.num_resident)
        return packed if local.dispatch_E is None else None

    def _embed(self, op: Op) -> None:
        token_ids_T = self._batches[op.device].token_ids_T
        spec, weights = self._decoder.spec, self._decoder.weights
        packed_head = self._packed(op, "head")
        if packed_head is not None and spec.shares_head:
            self._hidden_TD = embedding_rows(packed_head.matrices["weight"], token_ids_T)
        else:
            self._hidden_TD = embed(token_ids_T, weights.resident(op.device, "embedding"))

    def _dense(self, op: Op) -> None:
        spec, packed = self._decoder.spec, self._packed(op, "dense")
        if op.part != "all":
            self._dense_part(op, packed)
        elif packed is not None:
            x_TD = self._hidden_array()
            self._hidden_TD = cpu_layers.dense_layer(x_TD, packed, self._cpu_kernels, spec)
        else:
            self._hidden_TD = dense_layer(self._hidden(), self._weights(op), spec.norm_eps)

    def _dense_part(self, op: Op, packed: PackedModule | None) -> None:
        """Some columns of a divided feed-forward; the residual goes with the resident ones."""
        spec = self._decoder.spec
        given_TD = self._hidden() if op.device == "gpu" else self._dense_input
        assert given_TD is not None
        if op.part == "resident":
            self._resident_TD = dense_layer(given_TD, self._weights(op), spec.norm_eps)
        elif packed is None:
            self._missed_TD = dense_columns(given_TD, self._weights(op), spec.norm_eps)
        else:
            x_TD = as_array(given_TD)
            self._missed_TD = cpu_layers.dense_columns(x_TD, packed, self._cpu_kernels, spec)

    def _attention_layer(self, op: Op) -> Tensor | NDArray[Any]:
        assert op.layer is not None
        packed = self._packed(op, "attention")
        if packed is not None:
            return self._attend_packed(op.layer, packed)
        spec = self._decoder.spec
        return attention_layer(
            self._hidden(),
            self._weights(op),
            self._kv.layer(op.layer),
            *self._rotation(op.device),
            self._attention_step(op.device, self._pages_of_layer.get(op.layer, 0)),
            spec,
            window=spec.layers[op.layer].window,
            num_threads=self._decoder.kernels[op.device].num_threads,
        )

    def _project(self, op: Op) -> Tensor:
        """Queries, keys and values side by side: one copy takes them to the CPU."""
        rotation = self._rotation(op.device)
        parts = project(self._hidden(), self._weights(op), *rotation, self._decoder.spec)
        return torch.cat(parts, dim=1)

    def _attend(self, op: Op) -> None:
        assert op.layer is not None
        if op.part == "resident":
            assert self._divided is not None and self._projected_THK is not None
            self._divided.attend_front(op.layer, self._projected_THK, self._batches["gpu"])
            return
        spec, kv, qkv_THK = self._decoder.spec, self._kv.layer(op.layer), self._qkv_THK
        assert qkv_THK is not None
        kernels, window = self._cpu_kernels, spec.layers[op.layer].window
        if op.part == "all":
            self._attended = cpu_layers.attend_projected(
                qkv_THK, kv, self._cpu_step(), kernels, spec, window
            )
            return

        def attend(rows_THK: Tensor) -> tuple[Tensor, Tensor]:
            step = self._rest_step()
            found, lse = cpu_layers.attend_projected_part(rows_THK, kv, step, kernels, spec, window)
            return found, torch.from_numpy(lse)

        assert self._divided is not None
        self._attended = self._divided.attend_rest(qkv_THK, attend)

    def _attention_output(self, op: Op) -> Tensor:
        attended = self._attended
        assert attended is not None
        if op.num_gpu_kv_tokens:
            assert self._divided is not None
            attended = self._divided.merge(attended)
        return attention_output(attended, self._hidden(), self._weights(op))

    def _rotation(self, device: Device) -> tuple[Tensor, Tensor]:
        """Rotary rows of the step's positions."""
        if device not in self._rotations:
            self._rotations[device] = rotary_rows(
                self._batches[device].positions_T,
                self._decoder.kernels[device].inv_freq_F,
                self._dtype,
            )
        return self._rotations[device]

    def _attention_step(self, device: Device, pages: int) -> AttentionStep:
        if (device, pages) not in self._attention:
            self._attention[device, pages] = attention_step(
                self._pages[pages][device],
                dtype=self._dtype,
                block_size=BLOCK_SIZE,
                windows={layer.window for layer in self._decoder.spec.layers},
                kernel=self._decoder.kernels[device].attention,
            )
        return self._attention[device, pages]

    @property
    def _dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self._decoder.spec.dtype]

    def _attend_packed(self, layer: int, weights: PackedModule) -> NDArray[Any]:
        spec, kernels = self._decoder.spec, self._cpu_kernels
        return cpu_layers.attention_layer(
            self._hidden_array(),
            weights,
            self._kv.layer(layer),
            self._cpu_step(self._pages_of_layer.get(layer, 0)),
            kernels,
            spec,
            spec.layers[layer].window,
        )

    def _cpu_step(self, pages: int = 0) -> CpuAttentionStep:
        if pages not in self._cpu_attention:
            name = f"pages {pages} " if pages else ""
            self._cpu_attention[pages] = self._new_cpu_step(self._pages[pages]["cpu"], name)
        return self._cpu_attention[pages]

    def _rest_step(self) -> CpuAttentionStep:
        """Of the sequences that have tokens on the CPU, where caches are divided."""
        if self._rest_attention is None:
            assert self._divided is not None and self._divided.rest.batch is not None
            self._rest_attention = self._new_cpu_step(self._divided.rest.batch, "rest ")
        return self._rest_attention

    def _new_cpu_step(self, batch: BatchTensors, name: str) -> CpuAttentionStep:
        return cpu_layers.cpu_attention_step(
            batch,
            self._cpu_kernels,
            block_size=BLOCK_SIZE,
            windows={each.window for each in self._decoder.spec.layers},
            name=name,
        )

    def _route(self, op: Op) -> None:
        assert op.layer is not None
        spec, packed = self._decoder.spec, self._packed(op, "router")
        top_k = spec.layers[op.layer].num_experts_per_token
        if packed is not None:
            kernels, x_TD = self._cpu_kernels, self._hidden_array()
            self._experts.set_routing(
                op.device, cpu_layers.route_layer(x_TD, packed, kernels, spec, top_k)
            )
            return
        routing = route(
            self._hidden(),
            self._weights(op),
            norm_eps=spec.norm_eps,
            top_k=top_k,
            norm_topk_prob=spec.norm_topk_prob,
        )
        if op.part == "prefetched":
            self._experts.set_guess(op.layer, routing.expert_ids_Tk)
        else:
            self._experts.set_routing(op.device, routing)

    def _combine(self, op: Op) -> None:
        assert op.layer is not None
        if not self._decoder.spec.layers[op.layer].is_moe:
            assert self._resident_TD is not None and self._missed_TD is not None
            self._hidden_TD = combine(self._resident_TD, self._experts.as_tensor(self._missed_TD))
            return
        first, *others = self._experts.take_outputs(op.layer)
        if isinstance(first, np.ndarray) and op.device == "cpu":
            x_TD = self._hidden_array()
            self._hidden_TD = cpu_layers.combine(x_TD, first, self._cpu_kernels)
            return
        y_TD = self._experts.as_tensor(first)
        for each in others:
            y_TD = combine(y_TD, self._experts.as_tensor(each))
        self._hidden_TD = combine(self._hidden(), y_TD)

    def _head(self, op: Op) -> None:
        spec, batch = self._decoder.spec, self._batches[op.device]
        packed = self._packed(op, "head")
        if packed is not None:
            x_LD = self._hidden_array()
            if len(x_LD) == batch.num_tokens:
                x_LD = x_LD[batch.logit_rows_L.numpy()]
            kernels = self._cpu_kernels
            self._logits_LV = cpu_layers.head_layer(x_LD, packed, kernels, spec.norm_eps)
        else:
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
            batch = self._batches["gpu"] = self._batches["cpu"].map(move)
            for pages in self._pages[1:]:
                pages["gpu"] = replace(
                    batch,
                    slots_T=move(pages["cpu"].slots_T),
                    block_tables_SB=move(pages["cpu"].block_tables_SB),
                )
        elif op.part == "fetched":
            self._experts.fetch(op)
        elif op.gives_way:
            self._experts.prefetch(op, lambda: False)
        elif op.payload == "guess":
            assert op.layer is not None
            self._experts.copy_guess(op.layer, move)
        elif op.payload == "weights":
            assert op.module is not None and op.layer is not None and op.buffer is not None
            staging = self._decoder.weights.staging(self._tier)
            target = staging.target(op.module, op.layer, op.buffer)
            accelerator.copy_into(target, staging.source(op.module, op.layer))
        elif op.payload == "hidden":
            hidden = self._hidden()
            if op.layer is None:
                # On the way to the head only the rows that need logits travel.
                source: Device = "cpu" if op.lane == "h2d" else "gpu"
                # Read on a copy's stream: let go of now, it would be written to on another.
                self._unselected_TD = hidden
                hidden = hidden.index_select(0, self._batches[source].logit_rows_L)
            self._hidden_TD = move(hidden)
        elif op.payload == "qkv":
            assert self._projected_THK is not None
            self._qkv_THK = move(self._projected_THK)
        elif op.payload == "attended":
            assert self._attended is not None
            self._attended = move(self._attended)
        elif op.payload == "dense_input":
            self._dense_input = move(self._hidden())
        elif op.payload == "dense_output":
            assert self._missed_TD is not None
            self._missed_TD = move(self._experts.as_tensor(self._missed_TD))
        elif op.payload == "routing":
            self._experts.copy_routing(op.device, move)
        elif op.payload == "expert_output":
            assert op.layer is not None
            self._experts.copy_output(op.layer, move)
        else:
            assert op.payload == "logits" and self._logits_LV is not None
            self._logits_LV = move(self._logits_LV)


class SubBatchSteps:
    """Gives every op of a step with two sub-batches to the DecoderStep of its own.

    Copies of weights are of both: whichever performs one, both read them.
    """

    def __init__(self, first: DecoderStep, second: DecoderStep) -> None:
        self._steps = (first, second)

    def perform(self, op: Op) -> None:
        """Do one op; called on its lane once its dependencies have ended."""
        self._steps[op.sub_batch or 0].perform(op)

    def perform_until(self, op: Op, is_called: Callable[[], bool]) -> None:
        """Do an op that gives way."""
        self._steps[op.sub_batch or 0].perform_until(op, is_called)

    def perform_run(self, ops: tuple[Op, ...]) -> list[float]:
        """Do neighbouring ops of the `cpu` lane, all of one sub-batch."""
        return self._steps[ops[0].sub_batch or 0].perform_run(ops)


class KVMove:
    """Performs the copies of a sequence's KV cache from the prefill tier's device to decode's.

    `pages` says for a layer where it lies before, and after.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pages: Callable[[int], MovedPages],
    ) -> None:
        self._accelerator = accelerator
        self._pages = pages

    def perform(self, op: Op) -> None:
        """Copy one layer's blocks."""
        assert op.payload == "kv" and op.layer is not None
        move = self._accelerator.upload if op.lane == "h2d" else self._accelerator.download
        pages = self._pages(op.layer)
        source, target = pages.source, pages.target
        if not pages.at_source:
            return
        at_source = torch.tensor(pages.at_source).to(source.key.device)
        at_target = torch.tensor(pages.at_target).to(target.key.device)
        target.key[at_target] = self._land(move(source.key[at_source]), target.key)
        target.value[at_target] = self._land(move(source.value[at_source]), target.value)

    def _land(self, moved: Tensor, target: Tensor) -> Tensor:
        if target.device.type == "cpu" and moved.is_pinned():
            # The copy is asynchronous; the scatter into the cache runs on the host.
            torch.cuda.current_stream().synchronize()
        return moved

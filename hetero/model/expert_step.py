"""ExpertStep: performs the ops of one step's expert layers, each part of the experts by itself."""

# T new tokens, k experts a token, D hidden, E experts

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.experts import NO_EXPERT
from hetero.model import cpu_layers
from hetero.model.cpu_layers import CpuRouting
from hetero.model.cpu_workspace import CpuKernels
from hetero.model.families import TORCH_DTYPES
from hetero.model.moe import Dispatch, ExpertMethod, Routing, dispatch, experts
from hetero.model.packed import PackedModule
from hetero.runtime.devices import Accelerator
from hetero.runtime.homes import ExpertPlace, LocalExperts, dispatch_numbers
from hetero.runtime.host_copies import ModuleWeights
from hetero.runtime.weights import Weights
from planner.model_spec import ModelSpec
from planner.placement import Device, TierPlacement
from planner.split_rules import num_fetched
from planner.step_graph import Op, Part

# In this order their outputs are added, so that a step gives the same bits every time.
_PARTS: tuple[Part, ...] = ("all", "resident", "missed", "fetched", "rest")

# Arrays where the CPU's kernels computed them, tensors elsewhere.
ExpertOutput = Tensor | NDArray[np.float32]

# (layer, tokens) -> seconds of one of its experts with so many tokens on the CPU, and of copying
# one to the GPU, while the other does both: `CostModel.expert_times`.
FindExpertTimes = Callable[[int, int], tuple[float, float]]


class ExpertTimes:
    """By what a layer's missed experts are divided between the link and the CPU.

    Mutable: it keeps what it has found, as a step asks for every expert of every layer.

    Parameters
    ----------
    spec
        The model; layers of one shape have the same times.
    find
        The times.
    """

    def __init__(self, spec: ModelSpec, find: FindExpertTimes) -> None:
        self._find = find
        self._alike = [spec.layers.index(layer) for layer in spec.layers]
        self._found: dict[tuple[int, int], tuple[float, float]] = {}

    def __call__(self, layer: int, num_tokens: int) -> tuple[float, float]:
        """Seconds of one expert with so many tokens on the CPU, and of copying one."""
        key = (self._alike[layer], num_tokens)
        if key not in self._found:
            self._found[key] = self._find(*key)
        return self._found[key]


def choose_fetched(
    tokens_of: Mapping[int, int], layer: int, times: ExpertTimes, max_fetched: int
) -> tuple[int, ...]:
    """Missed experts to copy to the GPU in a step, those first that would take the CPU longest.

    Parameters
    ----------
    tokens_of
        Tokens of each missed expert that has any.
    layer, times, max_fetched
        Whose experts they are, what each of them takes, and how many the GPU has room for.
    """
    if not tokens_of:
        return ()
    seconds = {expert: times(layer, count) for expert, count in tokens_of.items()}
    slowest = sorted(seconds, key=lambda expert: -seconds[expert][0])
    fetch_s = seconds[slowest[0]][1]
    count = num_fetched([seconds[each][0] for each in slowest], fetch_s, max_fetched)
    return tuple(slowest[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDevices:
    """What computes experts: the model, its weights, and how each device does it."""

    spec: ModelSpec
    weights: Weights
    accelerator: Accelerator | None
    methods: Mapping[Device, ExpertMethod]
    cpu_kernels: CpuKernels
    times: ExpertTimes | None


class ExpertStep:
    """The values that flow through the expert layers of one step. Mutable.

    Parts run on different lanes at the same time, so each has a value of its own: the routing one
    for each device, the sorted tokens and the output one for each part.
    """

    def __init__(self, devices: ExpertDevices, tier: TierPlacement) -> None:
        self._devices = devices
        self._tier = tier
        self._routings: dict[Device, Routing | CpuRouting] = {}
        # What the CPU's kernels are given, which sort the tokens themselves, or what torch is.
        self._sorted: dict[Part, Dispatch | CpuRouting] = {}
        self._outputs: dict[Part, ExpertOutput] = {}
        self._fetched: tuple[int, ...] = ()
        self._fetched_E: Tensor | None = None

    def set_routing(self, device: Device, routing: Routing | CpuRouting) -> None:
        """The choice of a layer's experts that a device has made."""
        self._routings[device] = routing

    def set_output(self, output: ExpertOutput) -> None:
        """What all of a layer's experts gave on one device."""
        self._outputs["all"] = output

    def take_outputs(self, layer: int) -> list[ExpertOutput]:
        """What the parts of a layer's experts gave, in a fixed order."""
        is_mixed = self._tier.layers[layer].ffn.is_mixed
        parts = [part for part in _PARTS if part in self._outputs and (part != "all") == is_mixed]
        return [self._outputs.pop(part) for part in parts]

    def as_tensor(self, output: ExpertOutput) -> Tensor:
        """An output in the model's format."""
        if isinstance(output, Tensor):
            return output
        return torch.from_numpy(output).to(TORCH_DTYPES[self._devices.spec.dtype])

    def copy_routing(self, device: Device, move: Callable[[Tensor], Tensor]) -> None:
        """Copy the routing to a device; the other keeps its own."""
        source = self._routing("cpu" if device == "gpu" else "gpu")
        self._routings[device] = replace(
            source,
            normed_TD=move(source.normed_TD),
            expert_ids_Tk=move(source.expert_ids_Tk),
            expert_weights_Tk=move(source.expert_weights_Tk),
        )

    def copy_output(self, layer: int, move: Callable[[Tensor], Tensor]) -> None:
        """Copy what a layer's experts gave to where it is added: of a mixed layer the CPU's."""
        where = self._tier.layers[layer].ffn
        part: Part = "all"
        if where.is_mixed:
            part = "rest" if where.runs == "split" else "missed"
        self._outputs[part] = move(self.as_tensor(self._outputs[part]))

    def fetch(self, op: Op) -> None:
        """Copy the experts that the step has chosen into their slots, and their slots' numbers."""
        accelerator, layer, buffer = self._devices.accelerator, op.layer, op.buffer
        assert accelerator is not None and layer is not None and buffer is not None
        staging = self._devices.weights.staging(self._tier)
        on_cpu_E = self._local(op, "cpu").numbers_E
        for slot, expert in enumerate(self._fetched):
            source = staging.expert_source(layer, int(on_cpu_E[expert]))
            accelerator.copy_into(staging.slot(layer, buffer, slot), source)
        if self._fetched:
            slots_E = np.full(len(on_cpu_E), NO_EXPERT, np.int64)
            slots_E[list(self._fetched)] = np.arange(len(self._fetched))
            self._fetched_E = accelerator.upload(dispatch_numbers(slots_E, len(self._fetched)))

    def dispatch(self, op: Op) -> None:
        """Sort the tokens of a part by expert; of the rest of a split layer after dividing it."""
        if op.part == "fetched":
            if self._fetched:
                count = len(self._fetched)
                self._sorted[op.part] = dispatch(self._routing("gpu"), count, self._fetched_E)
            return
        local = self._local(op, self._place(op))
        if op.part == "rest":
            local = self._without_fetched(op, local)
        if op.device == "cpu" and self._packed(op) is not None:
            self._sorted[op.part] = self._cpu_routing(local)
        else:
            routing = self._routing(op.device)
            self._sorted[op.part] = dispatch(routing, local.count, local.dispatch_E)

    def run(self, op: Op) -> None:
        """Run the experts of a part; of those that are fetched there may be none in a step."""
        if op.part == "fetched" and not self._fetched:
            return
        # Taken out: the sorted tokens of a prompt are the largest values of a step.
        given, packed = self._sorted.pop(op.part), self._packed(op)
        if isinstance(given, CpuRouting):
            assert packed is not None
            kernels = self._devices.cpu_kernels
            self._outputs[op.part] = cpu_layers.experts_layer(given, packed, kernels)
        else:
            method = self._devices.methods[op.device]
            self._outputs[op.part] = experts(given, self._weights(op), method=method)

    def _routing(self, device: Device) -> Routing:
        """The routing on a device as tensors."""
        routing = self._routings[device]
        if isinstance(routing, CpuRouting):
            routing = self._routings[device] = routing.tensors()
        return routing

    def _cpu_routing(self, local: LocalExperts) -> CpuRouting:
        """The routing on the CPU as arrays, with the numbers that its experts have there."""
        routing = self._routings["cpu"]
        if isinstance(routing, Routing):
            routing = CpuRouting.of(routing)
        if local.dispatch_E is None:
            return routing
        return replace(routing, expert_ids_Tk=local.numbers_E[routing.expert_ids_Tk])

    def _place(self, op: Op) -> ExpertPlace:
        """The memory that has the experts of an op's part."""
        assert op.layer is not None
        is_streamed = "experts" in self._tier.streamed(op.layer)
        return "staging" if is_streamed and op.part != "resident" else op.device

    def _local(self, op: Op, place: ExpertPlace) -> LocalExperts:
        """The experts of an op's part, or of the missed ones of which these are some."""
        assert op.layer is not None
        part: Part = "missed" if op.part in ("fetched", "rest") else op.part
        return self._devices.weights.local_experts(op.layer, part, place, op.num_resident)

    def _packed(self, op: Op) -> PackedModule | None:
        """The layer's experts as the CPU's kernels read them, for an op that these do."""
        weights = self._devices.weights
        return weights.packed("experts", op.layer) if op.device == "cpu" else None

    def _weights(self, op: Op) -> ModuleWeights:
        """The experts of an op's part as torch reads them."""
        weights, layer, buffer = self._devices.weights, op.layer, op.buffer
        assert layer is not None
        if op.part == "fetched":
            assert buffer is not None
            return weights.staging(self._tier).fetched(layer, buffer, len(self._fetched))
        if self._place(op) == "staging":
            assert buffer is not None
            return weights.staging(self._tier).weights("experts", layer, buffer)
        return weights.resident(op.device, "experts", layer)

    def _without_fetched(self, op: Op, local: LocalExperts) -> LocalExperts:
        """Choose which missed experts are fetched; what is left to the CPU."""
        times = self._devices.times
        assert op.layer is not None and times is not None, "a split layer needs expert times"
        ids_Tk = self._routings["cpu"].expert_ids_Tk
        ids = ids_Tk.numpy() if isinstance(ids_Tk, Tensor) else ids_Tk
        counts_E = np.bincount(ids.ravel(), minlength=len(local.numbers_E))
        is_missed_E = (local.numbers_E != NO_EXPERT) & (counts_E > 0)
        tokens_of = {each: int(counts_E[each]) for each in np.flatnonzero(is_missed_E).tolist()}
        self._fetched = choose_fetched(tokens_of, op.layer, times, op.max_fetched)
        numbers_E = local.numbers_E.copy()
        numbers_E[list(self._fetched)] = NO_EXPERT
        return replace(
            local, numbers_E=numbers_E, dispatch_E=dispatch_numbers(numbers_E, local.count)
        )

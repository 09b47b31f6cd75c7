"""ExpertStep: performs the ops of one step's expert layers, each part of the experts by itself."""

# T new tokens, k experts a token, D hidden, E experts

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from hetero.model.moe import Dispatch, ExpertMethod, Routing, dispatch, experts, put_expert
from hetero.model.packed import PackedModule
from hetero.runtime.devices import Accelerator
from hetero.runtime.expert_slots import Admission, SlotCounts
from hetero.runtime.homes import ExpertPlace, LocalExperts, dispatch_numbers
from hetero.runtime.host_copies import ModuleWeights
from hetero.runtime.prefetch import Prefetch, chunk_begin
from hetero.runtime.weights import Weights
from planner.model_spec import ModelSpec
from planner.placement import Device, TierPlacement
from planner.routing.policy import not_held
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
        # Of the split layer at work: what is copied after the gate; where that and what came ahead
        # is staged, as the host and as the GPU see it; what of it gets slots, and its tensors.
        self._fetched: tuple[int, ...] = ()
        self._places: dict[int, int] = {}
        self._places_E: Tensor | None = None
        self._admission: Admission | None = None
        self._admitted_E: Tensor | None = None
        self._staged: ModuleWeights = {}
        # By layer, what the layer before it guesses and copies ahead.
        self._guesses: dict[int, Tensor] = {}
        self._prefetches: dict[int, Prefetch] = {}

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

    def set_guess(self, layer: int, guess_Tk: Tensor) -> None:
        """What the gate of the next layer would choose for the hidden states of this one."""
        self._guesses[layer] = guess_Tk

    def copy_guess(self, layer: int, move: Callable[[Tensor], Tensor]) -> None:
        """Copy that to the host."""
        self._guesses[layer] = move(self._guesses[layer])

    def prefetch(self, op: Op, is_called: Callable[[], bool]) -> None:
        """Copy experts of the next layer into their slots, until something urgent is ready."""
        accelerator, layer, buffer = self._devices.accelerator, op.layer, op.buffer
        assert accelerator is not None and layer is not None and buffer is not None
        staging, on_cpu_E = self._devices.weights.staging(self._tier), self._on_cpu(op)

        def copy_chunk(expert: int, slot: int, chunk: int) -> None:
            source_B = staging.expert_source(layer, int(on_cpu_E[expert]))
            target_B = staging.slot(layer, buffer, slot)
            begin, end = (chunk_begin(len(source_B), each) for each in (chunk, chunk + 1))
            accelerator.copy_now(target_B[begin:end], source_B[begin:end])

        self._prefetches[layer].copy(copy_chunk, is_called)

    def fetch(self, op: Op) -> None:
        """Copy the experts that the step has chosen into their slots, and their slots' numbers.

        What has come of one ahead is not copied again.
        """
        accelerator, layer, buffer = self._devices.accelerator, op.layer, op.buffer
        assert accelerator is not None and layer is not None and buffer is not None
        staging, on_cpu_E = self._devices.weights.staging(self._tier), self._on_cpu(op)
        prefetch = self._prefetches.get(layer)
        for expert in self._fetched:
            source_B = staging.expert_source(layer, int(on_cpu_E[expert]))
            num_chunks = 0 if prefetch is None else prefetch.num_chunks(expert)
            begin = chunk_begin(len(source_B), num_chunks)
            if begin < len(source_B):
                target_B = staging.slot(layer, buffer, self._places[expert])
                accelerator.copy_into(target_B[begin:], source_B[begin:])
        if not self._places:
            return
        places_E = np.full(len(on_cpu_E), NO_EXPERT, np.int64)
        places_E[list(self._places)] = list(self._places.values())
        tables = [dispatch_numbers(places_E, self._num_places)]
        if self._admission is not None:
            tables.append(self._admission.numbers(len(on_cpu_E)))
        self._places_E, *others = accelerator.upload(torch.stack(tables)).unbind()
        self._admitted_E = others[0] if others else None

    def admit(self, op: Op) -> None:
        """Put fetched experts into the slots that they got, and let the GPU find them there."""
        assert op.layer is not None
        if self._admission is None:
            return
        assert self._admitted_E is not None
        weights = self._devices.weights
        held = weights.resident("gpu", "experts", op.layer)
        for place, slot in self._admission.moves:
            put_expert(held, slot, self._staged, place)
        weights.expert_slots.admit(self._admission, self._admitted_E)
        self._staged = {}

    def dispatch(self, op: Op) -> None:
        """Sort the tokens of a part by expert; of the rest of a split layer after dividing it."""
        if op.part == "prefetched":
            self._choose_prefetched(op)
            return
        if op.part == "fetched":
            if self._places:
                routing, count = self._routing("gpu"), self._num_places
                self._sorted[op.part] = dispatch(routing, count, self._places_E)
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
        if op.part == "fetched" and not self._places:
            return
        # Taken out: the sorted tokens of a prompt are the largest values of a step.
        given, packed = self._sorted.pop(op.part), self._packed(op)
        if isinstance(given, CpuRouting):
            assert packed is not None
            kernels = self._devices.cpu_kernels
            self._outputs[op.part] = cpu_layers.experts_layer(given, packed, kernels)
        else:
            method, weights = self._devices.methods[op.device], self._weights(op)
            self._outputs[op.part] = experts(given, weights, method=method)
            if op.part == "fetched" and self._admission is not None:
                self._staged = weights  # packed ones are turned into rows once

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
        weights = self._devices.weights
        part: Part = "missed" if op.part in ("fetched", "rest", "prefetched") else op.part
        if op.slots != "static":
            if op.part == "resident":
                return weights.expert_slots.local(op.layer)
            part = "all"  # any of them may be missed
        return weights.local_experts(op.layer, part, place, op.num_resident)

    def _on_cpu(self, op: Op) -> NDArray[np.int64]:
        """The number that each expert of a layer has on the CPU."""
        return self._local(op, "cpu").numbers_E

    @property
    def _num_places(self) -> int:
        """Staged experts, from the first place to the last one taken."""
        return max(self._places.values(), default=-1) + 1

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
            return weights.staging(self._tier).fetched(layer, buffer, self._num_places)
        if self._place(op) == "staging":
            assert buffer is not None
            return weights.staging(self._tier).weights("experts", layer, buffer)
        return weights.resident(op.device, "experts", layer)

    def _without_fetched(self, op: Op, local: LocalExperts) -> LocalExperts:
        """Choose which missed experts are fetched; what is left to the CPU."""
        times, slots = self._devices.times, self._devices.weights.expert_slots
        layer = op.layer
        assert layer is not None and times is not None, "a split layer needs expert times"
        ids_Tk = self._routings["cpu"].expert_ids_Tk
        ids_Tk = ids_Tk.numpy() if isinstance(ids_Tk, Tensor) else ids_Tk
        counts_E = np.bincount(ids_Tk.ravel(), minlength=len(local.numbers_E))
        chosen = np.flatnonzero(counts_E).tolist()
        held = slots.held(layer, op.slots, op.num_resident)
        slots.access(layer, op.slots, held, ids_Tk)
        missed = not_held(chosen, held)
        ahead = self._prefetches.get(layer)
        arrived = frozenset[int]() if ahead is None else ahead.arrived()
        ready = [expert for expert in missed if expert in arrived]
        tokens_of = {each: int(counts_E[each]) for each in missed if each not in arrived}
        most = op.max_fetched - len(ready)
        self._fetched = choose_fetched(tokens_of, layer, times, most)
        self._places = _places(ready, self._fetched, ahead, op.max_fetched)
        self._admission = slots.admission(layer, op.slots, self._places, chosen)
        slots.count(
            layer,
            SlotCounts(
                num_hits=len(chosen) - len(missed),
                num_misses=len(missed),
                num_fetched=len(self._fetched),
                num_prefetched=len(arrived),
                num_used=len(ready),
            ),
        )
        numbers_E = local.numbers_E.copy()
        numbers_E[[*held, *self._places]] = NO_EXPERT
        return replace(
            local, numbers_E=numbers_E, dispatch_E=dispatch_numbers(numbers_E, local.count)
        )

    def _choose_prefetched(self, op: Op) -> None:
        """Choose what is copied ahead of the next layer's gate."""
        assert op.layer is not None
        slots, guess_Tk = self._devices.weights.expert_slots, self._guesses.pop(op.layer)
        experts = slots.choose_prefetched(
            op.layer, op.slots, op.num_resident, guess_Tk.numpy(), op.max_fetched
        )
        self._prefetches[op.layer] = Prefetch(experts)


def _places(
    ready: Sequence[int], fetched: Sequence[int], ahead: Prefetch | None, num_places: int
) -> dict[int, int]:
    """Where missed experts are staged: where they are or were to come ahead, or anywhere else."""
    slots = {} if ahead is None else ahead.slots
    taken = {expert: slots[expert] for expert in (*ready, *fetched) if expert in slots}
    free = iter(sorted(frozenset(range(num_places)).difference(taken.values())))
    return {
        expert: taken[expert] if expert in taken else next(free) for expert in (*ready, *fetched)
    }

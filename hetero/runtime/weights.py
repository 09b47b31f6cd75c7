"""Weights: each module one flat buffer where it lives, and what is copied from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor

from cpu_kernels.scratch import aligned_bytes
from hetero.checkpoint import Checkpoint
from hetero.model.families import TORCH_DTYPES, ModuleLayout, TensorSlot, module_layout, views
from hetero.model.packed import (
    Allocate,
    PackedLayout,
    PackedModule,
    is_packable,
    pack_module,
    quantised_module,
)
from hetero.model.quantised import product_method
from hetero.runtime.devices import Accelerator
from hetero.runtime.expert_slots import ExpertSlots
from hetero.runtime.homes import ExpertPlace, Homes, LocalExperts
from hetero.runtime.host_copies import (
    HostCopies,
    HostCopy,
    HostExperts,
    ModuleKey,
    ModuleWeights,
)
from hetero.runtime.staging import Staging, allocate_staging
from planner.cost_model import OWN_BACKENDS, Backends
from planner.model_spec import ModelSpec, Module, Quantization
from planner.placement import Device, Placement, TierKey, TierPlacement
from planner.step_graph import Part

_STORED_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}

# Two readers keep a disk busy; more only compete with the page cache's own copies.
_NUM_READERS = 2

DEVICES: tuple[Device, ...] = ("cpu", "gpu")


class Weights:
    """Where every module's tensors are; made by `load_weights`.

    One host copy serves CPU compute and copying. Modules resident on the accelerator only are not
    kept on the host. `expert_slots` knows which experts are where they may change.
    """

    def __init__(
        self,
        spec: ModelSpec,
        homes: Homes,
        resident: Mapping[Device, Mapping[ModuleKey, Tensor]],
        packed: Mapping[ModuleKey, PackedModule],
        on_gpu: Mapping[ModuleKey, PackedLayout],
        staging: Mapping[TierKey, Staging],
        accelerator: Accelerator | None,
        expert_slots: ExpertSlots,
    ) -> None:
        self.expert_slots = expert_slots
        self._spec = spec
        self._homes = homes
        self._resident = resident
        self._packed = packed
        # Quantised modules on the GPU lie there as the CPU's kernels would read them.
        self._on_gpu = on_gpu
        self._staging = staging
        cpu = torch.device("cpu")
        self._devices = {"cpu": cpu, "gpu": cpu if accelerator is None else accelerator.device}
        # Filled as steps run.
        self._locals: dict[tuple[int, Part, ExpertPlace, int], LocalExperts] = {}
        self._views: dict[tuple[Device, ModuleKey], ModuleWeights] = {
            (device, key): self._viewed(device, key, flat)
            for device, flats in resident.items()
            for key, flat in flats.items()
        }

    def resident(self, device: Device, module: Module, layer: int | None = None) -> ModuleWeights:
        """Tensors of a module that lives on a device; of experts and columns those that do."""
        return self._views[device, (module, layer)]

    def packed(self, module: Module, layer: int | None = None) -> PackedModule | None:
        """A module on the CPU as its kernels read it; None where torch computes it, or nobody."""
        return self._packed.get((module, layer))

    def staging(self, tier: TierPlacement) -> Staging:
        """What a tier copies to the accelerator."""
        return self._staging[tier.key]

    def host_flat(self, module: Module, layer: int) -> Tensor:
        """The host copy of a module in rows as one flat tensor."""
        return self._resident["cpu"][module, layer]

    def local_experts(
        self, layer: int, part: Part, place: ExpertPlace, num_resident: int
    ) -> LocalExperts:
        """The experts of a part in a place, for a tier with so many residents."""
        key = (layer, part, place, num_resident)
        if key not in self._locals:
            device = self._devices["cpu" if place == "cpu" else "gpu"]
            self._locals[key] = LocalExperts.of(
                self._homes.experts[layer], part, place, num_resident, device
            )
        return self._locals[key]

    def experts_in_order(self, layer: int) -> tuple[int, ...]:
        """A layer's experts, those first that are resident on the GPU first."""
        return self._homes.experts[layer].order

    def _viewed(self, device: Device, key: ModuleKey, flat: Tensor) -> ModuleWeights:
        if device == "gpu" and key in self._on_gpu:
            return quantised_module(self._on_gpu[key], flat, TORCH_DTYPES[self._spec.dtype])
        layout = _layout(self._spec, key, device, self._resident[device], self._homes)
        found = dict(views(layout, flat))
        if key[0] == "head" and "weight" not in found:
            embedding = self._resident[device]["embedding", None]
            layout = module_layout(self._spec, "embedding")
            found["weight"] = views(layout, embedding)["weight"]
        return found


def _layout(
    spec: ModelSpec, key: ModuleKey, device: Device, beside: Collection[ModuleKey], homes: Homes
) -> ModuleLayout:
    """Layout of a module on a device, which has those beside it.

    A tied head beside the embedding shares its matrix; of experts there are those at home there,
    and of a divided feed-forward the columns.
    """
    module, layer = key
    if layer is not None and module == "experts":
        home = homes.experts[layer]
        here = home.on_gpu if device == "gpu" else home.on_cpu
        return module_layout(spec, module, layer, experts=here)
    if layer is not None and module == "dense":
        return module_layout(spec, module, layer, columns=homes.columns(layer, device))
    shares = module == "head" and spec.is_tied and ("embedding", None) in beside
    return module_layout(spec, module, layer, with_matrix=not shares)


def load_weights(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    placement: Placement,
    accelerator: Accelerator | None,
    progress: Callable[[int, int], None] | None = None,
    *,
    backends: Backends = OWN_BACKENDS,
) -> Weights:
    """Read every module to where the placement wants it.

    Parameters
    ----------
    progress : callable, optional
        Called with (bytes read, bytes in all) after each module.
    backends : Backends
        Who computes each module on the CPU: what torch does stays in rows.

    Raises
    ------
    ModelFolderError
        A tensor is missing, or a shard ends early.
    MemoryBudgetError
        The accelerator's budget is too small.
    """
    dtype = TORCH_DTYPES[spec.dtype]
    uses = _CpuUses.of(placement)
    quantised = _quantised(spec, placement)
    packable = _packable(spec, uses, backends) | quantised
    homes = Homes.of(spec, placement)
    places = {"cpu": placement.lives_on("cpu"), "gpu": placement.lives_on("gpu")}
    jobs: list[tuple[Device, ModuleKey]] = [
        (device, key)
        for device in DEVICES
        for key in sorted(places[device], key=_in_order)
        if not (device == "cpu" and _is_read_from_head(spec, key, packable))
    ]
    total = sum(_num_bytes(spec, device, key, homes) for device, key in jobs)
    resident: dict[Device, dict[ModuleKey, Tensor]] = {"cpu": {}, "gpu": {}}
    packed: dict[ModuleKey, PackedModule] = {}
    on_gpu: dict[ModuleKey, PackedLayout] = {}

    def read(device: Device, key: ModuleKey) -> Tensor | PackedModule:
        pinned_for = accelerator if device == "cpu" and key in uses.copied else None
        if key in (packable if device == "cpu" else quantised):
            # A packed head has its matrix, whatever is beside it.
            layout, allocate = _layout(spec, key, device, (), homes), _allocator(pinned_for)
            # One thread: the readers are as many as pack at a time.
            return pack_module(spec, key[0], layout, stored, num_threads=1, allocate=allocate)
        layout = _layout(spec, key, device, places[device], homes)
        flat = _host_flat(layout, dtype, pinned_for)
        fill(checkpoint, layout, flat)
        return flat

    def stored(slot: TensorSlot) -> NDArray[Any]:
        return read_stored(checkpoint, slot)

    done = 0
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        # A bounded look-ahead: few modules bound for the accelerator are on the host at once.
        ahead: deque[tuple[Device, ModuleKey, Future[Tensor | PackedModule]]] = deque()
        waiting = deque(jobs)
        while waiting or ahead:
            while waiting and len(ahead) <= _NUM_READERS:
                device, key = waiting.popleft()
                ahead.append((device, key, readers.submit(read, device, key)))
            device, key, future = ahead.popleft()
            found = future.result()
            if device == "gpu":
                assert accelerator is not None
                what = key[0] if key[1] is None else f"{key[0]} of layer {key[1]}"
                if isinstance(found, PackedModule):
                    on_gpu[key], found = found.layout, torch.from_numpy(found.flat)
                resident[device][key] = _onto(accelerator, found, what)
            elif isinstance(found, PackedModule):
                packed[key] = found
            else:
                resident[device][key] = found
            done += _num_bytes(spec, device, key, homes)
            if progress is not None:
                progress(done, total)
    copies = HostCopies(spec, homes, resident["cpu"], packed)
    staging = {tier.key: _staging(copies, tier) for tier in placement.tiers}
    allocate_staging(list(staging.values()), accelerator)
    if quantised and accelerator is not None:
        product_method(accelerator.device)  # looked at here: no step waits for it
    gpu = torch.device("cpu") if accelerator is None else accelerator.device
    slots = ExpertSlots(homes, placement, gpu)
    return Weights(spec, homes, resident, packed, on_gpu, staging, accelerator, slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class _CpuUses:
    """Modules on the CPU that some tier computes there, and those that some tier copies."""

    computed: frozenset[ModuleKey]
    copied: frozenset[ModuleKey]

    @classmethod
    def of(cls, placement: Placement) -> _CpuUses:
        computed: set[ModuleKey] = set()
        copied: set[ModuleKey] = set()
        for tier in placement.tiers:
            ends: tuple[Module, Module] = ("embedding", "head")
            computed.update((name, None) for name in ends if getattr(tier, name).runs == "cpu")
            for index, layer in enumerate(tier.layers):
                for module, where in layer.modules():
                    if where.runs in ("cpu", "split"):
                        computed.add((module, index))
                    if where.runs in ("stream", "split"):
                        copied.add((module, index))
        return cls(computed=frozenset(computed), copied=frozenset(copied))


def _packable(spec: ModelSpec, uses: _CpuUses, backends: Backends) -> frozenset[ModuleKey]:
    """Modules that the CPU's kernels read; what torch computes, or nobody there, is in rows."""
    if not is_packable(spec):
        return frozenset()
    return frozenset(
        key for key in uses.computed if key[0] != "embedding" and backends.get(key[0]) != "torch"
    )


def _quantised(spec: ModelSpec, placement: Placement) -> frozenset[ModuleKey]:
    """Modules that are rounded while loading: they are packed wherever they are."""
    if spec.quantization is None:
        return frozenset()
    keys = placement.lives_on("cpu") | placement.lives_on("gpu")
    return frozenset(key for key in keys if spec.weight_kind(key[0]) in get_args(Quantization))


def _num_bytes(spec: ModelSpec, device: Device, key: ModuleKey, homes: Homes) -> int:
    """Bytes of a module on a device."""
    module, layer = key
    if module == "experts" and layer is not None:
        home = homes.experts[layer]
        count = home.num_on_gpu if device == "gpu" else home.num_on_cpu
        return count * spec.expert_bytes(layer)
    if layer is not None and layer in homes.shares and module == "dense":
        parts = spec.part_bytes(module, layer, homes.shares[layer])
        return parts[0] if device == "gpu" else parts[1]
    return spec.weight_bytes(module, layer)


def _allocator(pinned_for: Accelerator | None) -> Allocate:
    """Host memory for a packed module; pinned where it will be copied."""
    if pinned_for is None:
        return aligned_bytes

    def pinned(num_bytes: int) -> NDArray[Any]:
        memory: NDArray[Any] = pinned_for.host_buffer(num_bytes).numpy()
        return memory

    return pinned


def _is_read_from_head(spec: ModelSpec, key: ModuleKey, packable: Collection[ModuleKey]) -> bool:
    """Is this the embedding of a tied and packed head, which holds its rows too?"""
    return key[0] == "embedding" and spec.shares_head and ("head", None) in packable


def _in_order(key: ModuleKey) -> tuple[int, str]:
    """Modules outside layers first, then layer by layer: the order of most checkpoints."""
    module, layer = key
    return (-1 if layer is None else layer, module)


def _onto(accelerator: Accelerator, flat: Tensor, what: str) -> Tensor:
    """Copy a module to the accelerator's memory."""
    target = accelerator.allocate(flat.nbytes, what).view(flat.dtype)
    target.copy_(flat)
    return target


def fill(checkpoint: Checkpoint, layout: ModuleLayout, flat: Tensor) -> None:
    """Read the checkpoint's tensors of a module into its flat buffer, converting the dtype."""
    for slot in layout.slots:
        info = checkpoint.tensors[slot.name]
        target = flat[slot.offset : slot.offset + slot.num_elements].view(slot.shape)
        if _STORED_DTYPES[info.dtype] == flat.dtype and slot.axis == 0:
            _read_rows(checkpoint, slot, target)
        else:
            target.copy_(_stored_tensor(checkpoint, slot))


def read_stored(checkpoint: Checkpoint, slot: TensorSlot) -> NDArray[Any]:
    """A checkpoint tensor, or a part of one, as it is stored; bfloat16 as its bits."""
    stored = _stored_tensor(checkpoint, slot)
    if stored.dtype == torch.bfloat16:
        stored = stored.view(torch.uint16)
    array: NDArray[Any] = stored.numpy()
    return array


def _stored_tensor(checkpoint: Checkpoint, slot: TensorSlot) -> Tensor:
    info = checkpoint.tensors[slot.name]
    dtype = _STORED_DTYPES[info.dtype]
    if slot.axis == 0:
        stored = torch.empty(slot.shape, dtype=dtype)
        _read_rows(checkpoint, slot, stored)
        return stored
    whole = torch.empty(info.shape, dtype=dtype)
    checkpoint.read_into(slot.name, _bytes_of(whole))
    return whole.narrow(slot.axis, slot.begin, slot.shape[slot.axis]).contiguous()


def _read_rows(checkpoint: Checkpoint, slot: TensorSlot, target: Tensor) -> None:
    """Read a tensor, or some of its rows, which lie in the file one after another."""
    row_bytes = target[:1].nbytes
    checkpoint.read_into(slot.name, _bytes_of(target), slot.begin * row_bytes)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _host_flat(layout: ModuleLayout, dtype: torch.dtype, pinned_for: Accelerator | None) -> Tensor:
    """Host memory of a module; pinned where it will be streamed."""
    if pinned_for is None:
        return torch.empty(layout.num_elements, dtype=dtype)
    return pinned_for.host_buffer(layout.num_elements * dtype.itemsize).view(dtype)


def _staging(copies: HostCopies, tier: TierPlacement) -> Staging:
    """What a tier copies to the accelerator."""
    streamed: dict[int, dict[Module, HostCopy]] = {}
    split: dict[int, HostExperts] = {}
    for index, layer in enumerate(tier.layers):
        if layer.ffn.runs == "split":
            split[index] = copies.experts(index)
        modules, num_resident = tier.streamed(index), layer.ffn.num_resident
        if modules:
            streamed[index] = {name: copies.copy(name, index, num_resident) for name in modules}
    return Staging(streamed, split, tier.num_expert_slots)

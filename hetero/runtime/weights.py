"""Weights: each module one flat buffer where it lives, and staging buffers for streamed ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hetero.checkpoint import Checkpoint
from hetero.model.families import TORCH_DTYPES, ModuleLayout, TensorSlot, module_layout, views
from hetero.model.packed import PackedModule, is_packable, pack_module
from hetero.runtime.devices import Accelerator
from planner.cost_model import OWN_BACKENDS, Backends
from planner.model_spec import ModelSpec, Module
from planner.placement import Device, Placement
from planner.step_graph import NUM_STREAM_BUFFERS
from planner.workload import PHASES

_STORED_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}

# Two readers keep a disk busy; more only compete with the page cache's own copies.
_NUM_READERS = 2

DEVICES: tuple[Device, ...] = ("cpu", "gpu")

ModuleKey = tuple[Module, int | None]
ModuleWeights = Mapping[str, Tensor]


class Weights:
    """Where every module's tensors are; made by `load_weights`.

    One host copy serves CPU compute and streaming. Modules resident on the accelerator only are not
    kept on the host.
    """

    def __init__(
        self,
        spec: ModelSpec,
        resident: Mapping[Device, Mapping[ModuleKey, Tensor]],
        packed: Mapping[ModuleKey, PackedModule],
        staging: list[Tensor],
    ) -> None:
        self._spec = spec
        self._resident = resident
        self._packed = packed
        self._staging = staging
        # Filled as steps run: a layout of 128 experts takes a millisecond to work out.
        self._staged: dict[
            tuple[Module, int, int, tuple[Module, ...]], tuple[Tensor, ModuleWeights]
        ] = {}
        self._views: dict[tuple[Device, ModuleKey], ModuleWeights] = {
            (device, key): self._viewed(device, key, flat)
            for device, flats in resident.items()
            for key, flat in flats.items()
        }

    def resident(self, device: Device, module: Module, layer: int | None = None) -> ModuleWeights:
        """Tensors of a module that lives on a device."""
        return self._views[device, (module, layer)]

    def packed(self, module: Module, layer: int | None = None) -> PackedModule | None:
        """A module on the CPU as its kernels read it; None where it is also streamed, as rows."""
        return self._packed.get((module, layer))

    def staged(
        self, module: Module, layer: int, buffer: int, streamed: tuple[Module, ...]
    ) -> tuple[Tensor, ModuleWeights]:
        """Staging memory (flat) of one of a layer's streamed modules, and the tensors in it."""
        key = (module, layer, buffer, streamed)
        if key not in self._staged:
            offset = 0
            for name in streamed[: streamed.index(module)]:
                offset += module_layout(self._spec, name, layer).num_elements
            layout = module_layout(self._spec, module, layer)
            flat = self._staging[buffer][offset : offset + layout.num_elements]
            self._staged[key] = (flat, views(layout, flat))
        return self._staged[key]

    def host_flat(self, module: Module, layer: int) -> Tensor:
        """The host copy of a module as one flat tensor."""
        return self._resident["cpu"][module, layer]

    def _viewed(self, device: Device, key: ModuleKey, flat: Tensor) -> ModuleWeights:
        layout = _layout(self._spec, key, self._resident[device])
        found = dict(views(layout, flat))
        if key[0] == "head" and "weight" not in found:
            embedding = self._resident[device]["embedding", None]
            layout = module_layout(self._spec, "embedding")
            found["weight"] = views(layout, embedding)["weight"]
        return found


def _layout(spec: ModelSpec, key: ModuleKey, beside: Collection[ModuleKey]) -> ModuleLayout:
    """Layout of a module on a device; a tied head beside the embedding shares its matrix."""
    module, layer = key
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
    streamed: set[ModuleKey] = set()
    for phase in PHASES:
        tier = placement.tier(phase)
        for index in range(spec.num_layers):
            streamed.update((module, index) for module in tier.streamed(index))
    packable = _packable(spec, placement, streamed, backends)
    homes = {"cpu": placement.lives_on("cpu"), "gpu": placement.lives_on("gpu")}
    jobs: list[tuple[Device, ModuleKey]] = [
        (device, key)
        for device in DEVICES
        for key in sorted(homes[device], key=_in_order)
        if not (device == "cpu" and _is_read_from_head(spec, key, packable))
    ]
    total = sum(spec.weight_bytes(*key) for _, key in jobs)
    resident: dict[Device, dict[ModuleKey, Tensor]] = {"cpu": {}, "gpu": {}}
    packed: dict[ModuleKey, PackedModule] = {}

    def read(device: Device, key: ModuleKey) -> Tensor | PackedModule:
        if device == "cpu" and key in packable:
            # One thread: the readers are as many as pack at a time.
            return pack_module(spec, key[0], module_layout(spec, *key), stored, num_threads=1)
        layout = _layout(spec, key, homes[device])
        pinned_for = accelerator if device == "cpu" and key in streamed else None
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
            if isinstance(found, PackedModule):
                packed[key] = found
            elif device == "gpu":
                assert accelerator is not None
                what = key[0] if key[1] is None else f"{key[0]} of layer {key[1]}"
                resident[device][key] = _onto(accelerator, found, what)
            else:
                resident[device][key] = found
            done += spec.weight_bytes(*key)
            if progress is not None:
                progress(done, total)
    return Weights(spec, resident, packed, _staging(spec, placement, dtype, accelerator))


def _packable(
    spec: ModelSpec,
    placement: Placement,
    streamed: Collection[ModuleKey],
    backends: Backends,
) -> frozenset[ModuleKey]:
    """Modules on the CPU that its kernels read: but for what is streamed, or torch's, in rows."""
    if not is_packable(spec):
        return frozenset()
    on_cpu = {key for key in placement.lives_on("cpu") if key not in streamed}
    return frozenset(
        key for key in on_cpu if key[0] != "embedding" and backends.get(key[0]) != "torch"
    )


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
        count = 1
        for size in slot.shape:
            count *= size
        target = flat[slot.offset : slot.offset + count]
        stored = _STORED_DTYPES[info.dtype]
        if stored == flat.dtype:
            checkpoint.read_into(slot.name, _bytes_of(target))
            continue
        raw = torch.empty(count, dtype=stored)
        checkpoint.read_into(slot.name, _bytes_of(raw))
        target.copy_(raw)


def read_stored(checkpoint: Checkpoint, slot: TensorSlot) -> NDArray[Any]:
    """A checkpoint tensor as it is stored; bfloat16 as its bits."""
    stored = torch.empty(slot.shape, dtype=_STORED_DTYPES[checkpoint.tensors[slot.name].dtype])
    checkpoint.read_into(slot.name, _bytes_of(stored))
    if stored.dtype == torch.bfloat16:
        stored = stored.view(torch.uint16)
    array: NDArray[Any] = stored.numpy()
    return array


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _host_flat(layout: ModuleLayout, dtype: torch.dtype, pinned_for: Accelerator | None) -> Tensor:
    """Host memory of a module; pinned where it will be streamed."""
    if pinned_for is None:
        return torch.empty(layout.num_elements, dtype=dtype)
    return pinned_for.host_buffer(layout.num_elements * dtype.itemsize).view(dtype)


def _staging(
    spec: ModelSpec, placement: Placement, dtype: torch.dtype, accelerator: Accelerator | None
) -> list[Tensor]:
    """Buffers that hold the largest layer that is streamed, each."""
    largest = 0
    for phase in PHASES:
        tier = placement.tier(phase)
        for index in range(spec.num_layers):
            layouts = [module_layout(spec, name, index) for name in tier.streamed(index)]
            largest = max(largest, sum(layout.num_elements for layout in layouts))
    if not largest:
        return []
    assert accelerator is not None
    num_bytes = largest * dtype.itemsize
    return [
        accelerator.allocate(num_bytes, "the staging buffers").view(dtype)
        for _ in range(NUM_STREAM_BUFFERS)
    ]

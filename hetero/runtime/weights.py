"""Weights: each module one flat buffer where it lives, and staging buffers for streamed ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hetero.checkpoint import Checkpoint
from hetero.model.families import TORCH_DTYPES, ModuleLayout, module_layout, views
from hetero.runtime.devices import Accelerator
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
        staging: list[Tensor],
    ) -> None:
        self._spec = spec
        self._resident = resident
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
) -> Weights:
    """Read every module to where the placement wants it.

    Parameters
    ----------
    progress : callable, optional
        Called with (bytes read, bytes in all) after each module.

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
    homes = {"cpu": placement.lives_on("cpu"), "gpu": placement.lives_on("gpu")}
    jobs: list[tuple[Device, ModuleKey]] = [
        (device, key) for device in DEVICES for key in sorted(homes[device], key=_in_order)
    ]
    total = sum(spec.weight_bytes(*key) for _, key in jobs)
    resident: dict[Device, dict[ModuleKey, Tensor]] = {"cpu": {}, "gpu": {}}

    def read(device: Device, key: ModuleKey) -> Tensor:
        layout = _layout(spec, key, homes[device])
        pinned_for = accelerator if device == "cpu" and key in streamed else None
        flat = _host_flat(layout, dtype, pinned_for)
        fill(checkpoint, layout, flat)
        return flat

    done = 0
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        # A bounded look-ahead: few modules bound for the accelerator are on the host at once.
        ahead: deque[tuple[Device, ModuleKey, Future[Tensor]]] = deque()
        waiting = deque(jobs)
        while waiting or ahead:
            while waiting and len(ahead) <= _NUM_READERS:
                device, key = waiting.popleft()
                ahead.append((device, key, readers.submit(read, device, key)))
            device, key, future = ahead.popleft()
            flat = future.result()
            if device == "gpu":
                assert accelerator is not None
                flat = _onto(accelerator, flat, f"{key[0]} of layer {key[1]}" if key[1] else key[0])
            resident[device][key] = flat
            done += spec.weight_bytes(*key)
            if progress is not None:
                progress(done, total)
    return Weights(spec, resident, _staging(spec, placement, dtype, accelerator))


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

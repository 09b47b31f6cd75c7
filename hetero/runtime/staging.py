"""Staging: the accelerator's memory for weights on their way to it.

A streamed layer lies in one of two buffers, a fetched expert in a slot behind them. All tiers use
the same memory: no two steps run at once.
"""

# B bytes, S slots

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from hetero.runtime.devices import Accelerator
from hetero.runtime.host_copies import HostCopy, HostExperts, ModuleWeights
from planner.model_spec import Module
from planner.placement import NUM_STREAM_BUFFERS

# Where modules begin in a buffer: whole cache lines, as the CPU's kernels and CUDA's loads want it.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingSizes:
    """Bytes of a tier's staging memory: of a buffer and of a slot, and how many slots it has."""

    buffer_bytes: int
    slot_bytes: int
    num_slots: int

    @property
    def num_bytes(self) -> int:
        return NUM_STREAM_BUFFERS * self.buffer_bytes + self.num_slots * self.slot_bytes


class Staging:
    """What a tier copies to the accelerator, and where to.

    Parameters
    ----------
    streamed
        By layer, the modules that are copied for each use, in the order in which they lie.
    split
        By layer, the experts of which some are fetched.
    num_slots
        Slots for these.
    """

    def __init__(
        self,
        streamed: Mapping[int, Mapping[Module, HostCopy]],
        split: Mapping[int, HostExperts],
        num_slots: int,
    ) -> None:
        self._streamed = streamed
        self._split = split
        self.sizes = _sizes(streamed, split, num_slots)
        self._memory: Tensor | None = None
        # Filled as steps run: views take longer to make than to use.
        self._views: dict[tuple[Module, int, int], ModuleWeights] = {}
        # By buffer, the rows that a module was turned into since it was last copied there.
        self._rows: dict[tuple[Module, int], ModuleWeights] = {}

    def use(self, memory_B: Tensor) -> None:
        """Stage in this memory from now on; it holds what `sizes` says."""
        self._memory = memory_B

    def source(self, module: Module, layer: int) -> Tensor:
        """The host's copy of a streamed module."""
        return self._streamed[layer][module].flat_B

    def target(self, module: Module, layer: int, buffer: int) -> Tensor:
        """Where a streamed module is to be copied to; what was copied there before is over."""
        self._rows.pop((module, buffer), None)
        return self._place(module, layer, buffer)

    def _place(self, module: Module, layer: int, buffer: int) -> Tensor:
        assert self._memory is not None
        start = buffer * self.sizes.buffer_bytes
        for name, copy in self._streamed[layer].items():
            if name == module:
                return self._memory[start : start + copy.flat_B.nbytes]
            start += _aligned(copy.flat_B.nbytes)
        raise AssertionError(f"{module} of layer {layer} is not streamed")

    def weights(self, module: Module, layer: int, buffer: int) -> ModuleWeights:
        """The tensors of a streamed module whose copy has ended, until the next into its buffer."""
        copy = self._streamed[layer][module]
        if copy.is_turned:
            if (module, buffer) not in self._rows:
                self._rows[module, buffer] = copy.weights(self._place(module, layer, buffer))
            return self._rows[module, buffer]
        key = (module, layer, buffer)
        if key not in self._views:
            self._views[key] = copy.weights(self._place(module, layer, buffer))
        return self._views[key]

    def expert_source(self, layer: int, local: int) -> Tensor:
        """The host's copy of an expert, by its number on the CPU."""
        return self._split[layer].experts_EB[local]

    def slot(self, layer: int, buffer: int, number: int) -> Tensor:
        """Where an expert is copied to, in one of the halves of the slots."""
        return self._slots(layer, buffer)[number]

    def fetched(self, layer: int, buffer: int, count: int) -> ModuleWeights:
        """The tensors of the first `count` experts of a half of the slots, for their one use."""
        return self._split[layer].weights_of(self._slots(layer, buffer)[:count])

    def _slots(self, layer: int, buffer: int) -> Tensor:
        assert self._memory is not None
        sizes = self.sizes
        first = NUM_STREAM_BUFFERS * sizes.buffer_bytes
        slots_SB = self._memory[first : sizes.num_bytes].view(sizes.num_slots, sizes.slot_bytes)
        half = sizes.num_slots // NUM_STREAM_BUFFERS
        begin = buffer * half
        return slots_SB[begin : begin + half, : self._split[layer].expert_bytes]


def _sizes(
    streamed: Mapping[int, Mapping[Module, HostCopy]],
    split: Mapping[int, HostExperts],
    num_slots: int,
) -> StagingSizes:
    """What the largest streamed layer and the largest split expert take."""
    layers = (
        sum(_aligned(copy.flat_B.nbytes) for copy in one.values()) for one in streamed.values()
    )
    experts = (_aligned(each.expert_bytes) for each in split.values())
    return StagingSizes(
        buffer_bytes=max(layers, default=0),
        slot_bytes=max(experts, default=0),
        num_slots=num_slots if split else 0,
    )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def allocate_staging(tiers: Collection[Staging], accelerator: Accelerator | None) -> None:
    """Give all tiers the same memory, enough for each."""
    num_bytes = max(tier.sizes.num_bytes for tier in tiers)
    if not num_bytes:
        return
    assert accelerator is not None
    num_slots = max(tier.sizes.num_slots for tier in tiers)
    buffers = "the staging buffers" if any(tier.sizes.buffer_bytes for tier in tiers) else ""
    what = " and ".join(filter(None, (buffers, "the expert slots" if num_slots else "")))
    memory = accelerator.allocate(num_bytes, what)
    for tier in tiers:
        tier.use(memory)

"""KV cache: blocks of tokens, who holds them, and the tensors they lie in."""

# N blocks, G KV heads, P positions of a block (BLOCK_SIZE), K head dim

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hetero.model.families import TORCH_DTYPES
from planner.kv_blocks import KV_BLOCK_TOKENS
from planner.model_spec import ModelSpec
from planner.placement import Device

BLOCK_SIZE = KV_BLOCK_TOKENS


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens of one sequence."""
    return -(-num_tokens // BLOCK_SIZE)


def block_bytes(spec: ModelSpec, layers: Iterable[int]) -> int:
    """Bytes of one block in the given layers.

    Examples
    --------
    >>> from planner import LayerSpec, RopeSpec
    >>> spec = ModelSpec(name="toy", architecture="LlamaForCausalLM", dtype="bfloat16",
    ...     hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=10,
    ...     max_position_embeddings=32, layers=(LayerSpec(intermediate_size=16),) * 3,
    ...     rope=RopeSpec(theta=1e4), is_tied=True)
    >>> block_bytes(spec, [0, 2])  # 2 layers * 16 tokens * 2 (K and V) * 1 head * 4 * 2 bytes
    512
    """
    return BLOCK_SIZE * sum(spec.kv_bytes_per_token(layer) for layer in layers)


class BlockAllocator:
    """Hands out block numbers 0..num_blocks-1. Mutable; O(1) per block.

    One allocator serves every layer: a block number means the same tokens in each of them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take `num_blocks` blocks, or none of them (None) where fewer are free."""
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._is_free[block] = 0
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back."""
        for block in blocks:
            assert not self._is_free[block], f"block {block} is freed twice"
            self._is_free[block] = 1
            self._free.append(block)

    def check_integrity(self) -> None:
        """Assert that the free list names every free block once."""
        free = sorted(self._free)
        assert free == [b for b in range(self.num_blocks) if self._is_free[b]], "free list differs"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """Keys and values of one layer on one device."""

    key: Tensor  # NGPK
    value: Tensor  # NGPK


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedKV:
    """The KV cache of a model: for each layer a key and a value tensor on that layer's device."""

    layers: tuple[LayerKV, ...]
    num_blocks: int

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        layer_device: Sequence[Device],
        num_blocks: int,
        empty: Callable[[Device, int], Tensor],
    ) -> PagedKV:
        """Carve every layer's cache from one buffer per device.

        Parameters
        ----------
        spec : ModelSpec
            Shapes and dtype.
        layer_device : sequence of Device
            Where each layer's cache lies.
        num_blocks : int
            Blocks per layer.
        empty : callable
            `empty(device, num_bytes)` gives a flat uint8 tensor, counted in that device's budget;
            it is called once per device that holds a layer. It must be zeroed: pads of a block
            table are read and then masked, and a NaN survives a mask.
        """
        assert len(layer_device) == spec.num_layers
        found: dict[int, LayerKV] = {}
        # Sorted, so that the order of allocations does not depend on hashing.
        for device in sorted(set(layer_device)):
            indices = [i for i, where in enumerate(layer_device) if where == device]
            flat = empty(device, num_blocks * block_bytes(spec, indices))
            # Every layer has the same KV shape: one view cut along layer and key or value.
            shape = (len(indices), 2, num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
            pairs = flat.view(TORCH_DTYPES[spec.dtype]).view(shape)
            for index, pair in zip(indices, pairs, strict=True):
                found[index] = LayerKV(key=pair[0], value=pair[1])
        return cls(layers=tuple(found[i] for i in range(spec.num_layers)), num_blocks=num_blocks)

    def layer(self, index: int) -> LayerKV:
        return self.layers[index]

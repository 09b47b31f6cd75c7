"""KV cache: blocks of tokens, who holds them, and the tensors they lie in."""

# N blocks, G KV heads, P positions of a block (BLOCK_SIZE), K head dim

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from hetero.model.families import TORCH_DTYPES
from planner.kv_blocks import KV_BLOCK_TOKENS, KVBlocks, num_blocks_for
from planner.model_spec import ModelSpec
from planner.placement import Device, Placement
from planner.step_graph import moved_kv_layers
from planner.workload import Phase

BLOCK_SIZE = KV_BLOCK_TOKENS


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
    """Hands out `num_blocks` block numbers from `first_block` on. Mutable; O(1) per block.

    One allocator serves every layer: a block number means the same tokens in each of them.
    """

    def __init__(self, num_blocks: int, first_block: int = 0) -> None:
        self.num_blocks = num_blocks
        self._first_block = first_block
        self._free = list(range(first_block + num_blocks - 1, first_block - 1, -1))
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
            self._is_free[block - self._first_block] = 0
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back."""
        for block in blocks:
            at = block - self._first_block
            assert not self._is_free[at], f"block {block} is freed twice"
            self._is_free[at] = 1
            self._free.append(block)

    def check_integrity(self) -> None:
        """Assert that the free list names every free block once."""
        free = [block - self._first_block for block in sorted(self._free)]
        assert free == [b for b in range(self.num_blocks) if self._is_free[b]], "free list differs"


def moved_layers(placement: Placement, blocks: KVBlocks) -> tuple[tuple[int, ...], ...]:
    """Layers whose cache moves when a prompt ends, for the sequences of each sub-batch.

    A second sub-batch without blocks is none: all sequences are of the first.
    """
    return tuple(
        moved_kv_layers(placement.prefill, placement.decode, sub_batch=number)
        for number in range(2 if blocks.second else 1)
    )


def _prompts_follow(moved: Sequence[Sequence[int]]) -> bool:
    """Do prompt pages lie behind the first sub-batch's, whose own prompts need none of them?

    Then all prompts of a step are in one tensor, and have one set of block tables.
    """
    return not moved[0] and any(moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPools:
    """Who hands out which blocks.

    Attributes
    ----------
    decode : tuple of BlockAllocator
        By sub-batch, what its sequences decode from.
    prompts : BlockAllocator or None
        Blocks in which prompts are computed whose cache moves when they end.
    moving : frozenset of int
        The sub-batches of those prompts.
    """

    decode: tuple[BlockAllocator, ...]
    prompts: BlockAllocator | None = None
    moving: frozenset[int] = frozenset()

    @classmethod
    def create(cls, placement: Placement, blocks: KVBlocks) -> BlockPools:
        """All blocks of a placement, free."""
        moved = moved_layers(placement, blocks)
        decode = [BlockAllocator(blocks.first)]
        if blocks.second:
            decode.append(BlockAllocator(blocks.second))
        prompts = None
        if any(moved):
            prompts = BlockAllocator(blocks.prompts, blocks.first if _prompts_follow(moved) else 0)
        return cls(
            decode=tuple(decode),
            prompts=prompts,
            moving=frozenset(number for number, layers in enumerate(moved) if layers),
        )

    @property
    def max_num_tokens(self) -> int:
        """Most tokens of one sequence."""
        return max(pool.num_blocks for pool in self.decode) * BLOCK_SIZE

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens of one prompt."""
        most = 0
        for number, pool in enumerate(self.decode):
            prompts = self.prompts_of(number) or pool
            most = max(most, min(pool.num_blocks, prompts.num_blocks))
        return most * BLOCK_SIZE

    def prompts_of(self, sub_batch: int) -> BlockAllocator | None:
        """Where prompts of a sub-batch are computed; None where it is where they are decoded."""
        return self.prompts if sub_batch in self.moving else None

    def fits(self, sub_batch: int, *, num_tokens: int, num_prefilled: int) -> bool:
        """Could all blocks hold one sequence of so many tokens, so many of them in prefill?"""
        if num_blocks_for(num_tokens) > self.decode[sub_batch].num_blocks:
            return False
        prompts = self.prompts_of(sub_batch)
        return prompts is None or num_blocks_for(num_prefilled) <= prompts.num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """Keys and values of one layer on one device."""

    key: Tensor  # NGPK
    value: Tensor  # NGPK


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedKV:
    """The KV cache of a model: for each layer a key and a value tensor on that layer's device."""

    layers: tuple[LayerKV, ...]

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
        return cls(layers=tuple(found[i] for i in range(spec.num_layers)))

    def layer(self, index: int) -> LayerKV:
        return self.layers[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """The caches of a placement.

    Attributes
    ----------
    prefill : PagedKV
        Layers that keep their device have the pages that the first sub-batch decodes from.
    decode : tuple of PagedKV
        By sub-batch.
    """

    prefill: PagedKV
    decode: tuple[PagedKV, ...]

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        placement: Placement,
        blocks: KVBlocks,
        empty: Callable[[Device, int], Tensor],
    ) -> Caches:
        """Pages for all blocks; `empty` as in `PagedKV.allocate`."""

        def devices(phase: Phase) -> list[Device]:
            return [layer.kv for layer in placement.tier(phase).layers]

        moved = moved_layers(placement, blocks)
        num_first = blocks.first + (blocks.prompts if _prompts_follow(moved) else 0)
        first = PagedKV.allocate(spec, devices("decode"), num_first, empty)
        decode = [first]
        if blocks.second:
            on_cpu: list[Device] = ["cpu"] * spec.num_layers
            decode.append(PagedKV.allocate(spec, on_cpu, blocks.second, empty))
        if not moved[0]:
            return cls(prefill=first, decode=tuple(decode))
        prompts = PagedKV.allocate(
            replace(spec, layers=tuple(spec.layers[index] for index in moved[0])),
            [devices("prefill")[index] for index in moved[0]],
            blocks.prompts,
            empty,
        )
        own = dict(zip(moved[0], prompts.layers, strict=True))
        layers = tuple(own.get(index, layer) for index, layer in enumerate(first.layers))
        return cls(prefill=PagedKV(layers=layers), decode=tuple(decode))

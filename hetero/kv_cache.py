"""KV cache: blocks of tokens, who holds them, and the tensors they lie in."""

# N blocks, G KV heads, P positions of a block (BLOCK_SIZE), K head dim

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from hetero.model.families import TORCH_DTYPES
from planner.kv_blocks import (
    BlockSpan,
    KVBlocks,
    num_blocks_for,
    num_front_blocks,
    num_pages,
    prompt_span,
)
from planner.model_spec import ModelSpec
from planner.placement import KV_BLOCK_TOKENS, Device, Placement
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
    prompt_span : BlockSpan
        The blocks of such a prompt that are among them.
    fronts : BlockAllocator or None
        Where caches are divided: of the first `num_front_blocks` blocks of every sequence.
    """

    decode: tuple[BlockAllocator, ...]
    prompts: BlockAllocator | None = None
    moving: frozenset[int] = frozenset()
    prompt_span: BlockSpan = field(default_factory=BlockSpan)
    fronts: BlockAllocator | None = None
    num_front_blocks: int = 0

    @classmethod
    def create(cls, placement: Placement, blocks: KVBlocks) -> BlockPools:
        """All blocks of a placement, free."""
        moved = moved_layers(placement, blocks)
        decode = [BlockAllocator(blocks.first, blocks.fronts)]
        if blocks.second:
            decode.append(BlockAllocator(blocks.second))
        prompts = None
        if any(moved):
            prompts = BlockAllocator(blocks.prompts, blocks.first if _prompts_follow(moved) else 0)
        return cls(
            decode=tuple(decode),
            prompts=prompts,
            moving=frozenset(number for number, layers in enumerate(moved) if layers),
            prompt_span=prompt_span(placement) or BlockSpan(),
            fronts=BlockAllocator(blocks.fronts) if blocks.fronts else None,
            num_front_blocks=num_front_blocks(placement),
        )

    @property
    def allocators(self) -> tuple[BlockAllocator, ...]:
        """All of them."""
        others = (self.prompts, self.fronts)
        return (*self.decode, *(pool for pool in others if pool is not None))

    def _max_blocks(self, sub_batch: int) -> int:
        """Most blocks of one sequence: none has more in its front than there are."""
        return self.num_front_blocks + self.decode[sub_batch].num_blocks

    @property
    def max_num_tokens(self) -> int:
        """Most tokens of one sequence."""
        return max(map(self._max_blocks, range(len(self.decode)))) * BLOCK_SIZE

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens of one prompt."""
        most = 0
        for number in range(len(self.decode)):
            blocks, prompts = self._max_blocks(number), self.prompts_of(number)
            in_prompts = None if prompts is None else self.prompt_span.most(prompts.num_blocks)
            most = max(most, blocks if in_prompts is None else min(blocks, in_prompts))
        return most * BLOCK_SIZE

    def num_prompt_blocks(self, num_blocks: int) -> int:
        """Blocks of its own that a prompt of so many blocks has while it is computed."""
        return self.prompt_span.count(num_blocks)

    def has_room(self, sub_batch: int, num_held: int, num_more: int) -> bool:
        """Are so many blocks free for a sequence that has some?"""
        num_front = self._num_in_front(num_held + num_more) - self._num_in_front(num_held)
        has_front = self.fronts is None or num_front <= self.fronts.num_free
        return has_front and num_more - num_front <= self.decode[sub_batch].num_free

    def take(self, sub_batch: int, num_held: int, num_more: int) -> list[int]:
        """Blocks for a sequence that has some, of which there is room for these."""
        num_front = self._num_in_front(num_held + num_more) - self._num_in_front(num_held)
        front = self.fronts.allocate(num_front) if self.fronts is not None else []
        rest = self.decode[sub_batch].allocate(num_more - num_front)
        assert front is not None and rest is not None
        return front + rest

    def give_back(self, sub_batch: int, blocks: Sequence[int]) -> None:
        """Free all blocks of a sequence."""
        if self.fronts is not None:
            self.fronts.free(blocks[: self.num_front_blocks])
        self.decode[sub_batch].free(blocks[self.num_front_blocks :])

    def _num_in_front(self, num_blocks: int) -> int:
        return min(num_blocks, self.num_front_blocks)

    def prompts_of(self, sub_batch: int) -> BlockAllocator | None:
        """Where prompts of a sub-batch are computed; None where it is where they are decoded."""
        return self.prompts if sub_batch in self.moving else None

    def fits(self, sub_batch: int, *, num_tokens: int, num_prefilled: int) -> bool:
        """Could all blocks hold one sequence of so many tokens, so many of them in prefill?"""
        if num_blocks_for(num_tokens) > self._max_blocks(sub_batch):
            return False
        prompts = self.prompts_of(sub_batch)
        num_prompt_blocks = self.num_prompt_blocks(num_blocks_for(num_prefilled))
        return prompts is None or num_prompt_blocks <= prompts.num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """Keys and values of one layer on one device."""

    key: Tensor  # NGPK
    value: Tensor  # NGPK


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedPages:
    """Pages of a layer that a prompt leaves when it ends, and as many that it comes to."""

    source: LayerKV
    at_source: list[int]
    target: LayerKV
    at_target: list[int]


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
        By sub-batch. Of divided caches what is on the CPU.
    fronts : Mapping of int to LayerKV
        Of divided caches what is on the GPU, by layer.
    """

    prefill: PagedKV
    decode: tuple[PagedKV, ...]
    fronts: Mapping[int, LayerKV] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls,
        spec: ModelSpec,
        placement: Placement,
        blocks: KVBlocks,
        empty: Callable[[Device, int], Tensor],
    ) -> Caches:
        """Pages for all blocks; `empty` as in `PagedKV.allocate`."""
        if placement.decode.num_gpu_kv_tokens:
            return _allocate_divided(spec, placement, blocks, empty)

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


def _allocate_divided(
    spec: ModelSpec,
    placement: Placement,
    blocks: KVBlocks,
    empty: Callable[[Device, int], Tensor],
) -> Caches:
    """Pages where caches are divided: a layer has some on each device that has a part of it."""
    pairs = tuple(zip(placement.prefill.layers, placement.decode.layers, strict=True))
    found: dict[tuple[Device, int], LayerKV] = {}
    devices: tuple[Device, ...] = ("cpu", "gpu")
    for device in devices:
        counts = [num_pages(*pair, blocks, device) for pair in pairs]
        flat = empty(device, sum(n * block_bytes(spec, [at]) for at, n in enumerate(counts)))
        elements, start = flat.view(TORCH_DTYPES[spec.dtype]), 0
        for index, count in enumerate(counts):
            shape = (2, count, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
            stop = start + count * block_bytes(spec, [index]) // spec.dtype_bytes
            key, value = elements[start:stop].view(shape)
            found[device, index] = LayerKV(key=key, value=value)
            start = stop
    prefill = tuple(found[before.kv, at] for at, (before, _) in enumerate(pairs))
    decode = tuple(found[after.kv, at] for at, (_, after) in enumerate(pairs))
    return Caches(
        prefill=PagedKV(layers=prefill),
        decode=(PagedKV(layers=decode),),
        fronts={at: found["gpu", at] for at, pair in enumerate(pairs) if pair[1].num_gpu_kv_tokens},
    )

"""KV cache: blocks are handed out once, and every layer has its own memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor

from hetero.kv_cache import (
    BLOCK_SIZE,
    BlockAllocator,
    BlockPools,
    Caches,
    PagedKV,
    block_bytes,
)
from planner import strategies
from planner.kv_blocks import (
    KVBlocks,
    bytes_per_block,
    kv_blocks,
    kv_bytes,
    moves_prompts,
    num_blocks_for,
)
from planner.model_spec import Dtype, LayerSpec, ModelSpec, RopeSpec
from planner.placement import Device, Placement, TierPlacement
from planner.workload import Workload

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def make_spec(num_layers: int = 3, dtype: Dtype = "bfloat16") -> ModelSpec:
    return ModelSpec(
        name="toy",
        architecture="LlamaForCausalLM",
        dtype=dtype,
        hidden_size=8,
        num_heads=6,
        num_kv_heads=3,
        head_dim=5,
        vocab_size=11,
        max_position_embeddings=64,
        layers=(LayerSpec(intermediate_size=16),) * num_layers,
        rope=RopeSpec(theta=1e4),
        is_tied=True,
    )


class Memory:
    """Memory that remembers what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[Device, int]] = []

    def empty(self, device: Device, num_bytes: int) -> Tensor:
        self.asked.append((device, num_bytes))
        return torch.full((num_bytes,), 255, dtype=torch.uint8)


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_a_block_holds_sixteen_tokens(num_tokens: int, expected: int) -> None:
    """Blocks are counted upwards."""
    assert expected == num_blocks_for(num_tokens)


def test_allocation_is_all_or_nothing() -> None:
    """A request for more than is free takes none of it."""
    blocks = BlockAllocator(4)
    taken = blocks.allocate(3)
    assert taken is not None
    assert blocks.allocate(2) is None
    assert blocks.num_free == 1
    assert blocks.allocate(0) == []
    last = blocks.allocate(1)
    assert last is not None
    assert {0, 1, 2, 3} == {*taken, *last}


def test_a_block_freed_twice_is_caught() -> None:
    """The second time is our mistake, not a silent double use."""
    blocks = BlockAllocator(2)
    taken = blocks.allocate(1)
    assert taken is not None
    blocks.free(taken)
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free(taken)


def test_a_damaged_free_list_is_caught() -> None:
    """A block that is listed as free twice fails the integrity check."""
    blocks = BlockAllocator(2)
    blocks._free.append(0)
    with pytest.raises(AssertionError, match="free list"):
        blocks.check_integrity()


@settings(deadline=None, max_examples=100)
@given(
    num_blocks=st.integers(0, 20),
    requests=st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=40),
)
def test_no_block_is_held_twice(num_blocks: int, requests: list[tuple[bool, int]]) -> None:
    """Whatever is taken and given back, held and free blocks make up the whole."""
    blocks = BlockAllocator(num_blocks)
    held: list[list[int]] = []
    for is_allocation, number in requests:
        if is_allocation:
            fits = number <= blocks.num_free
            taken = blocks.allocate(number)
            assert fits == (taken is not None)
            held.append(taken or [])
        elif held:
            blocks.free(held.pop(number % len(held)))
        flat = [block for taken in held for block in taken]
        assert len(set(flat)) == len(flat) == num_blocks - blocks.num_free
        blocks.check_integrity()


def test_block_bytes_count_the_given_layers() -> None:
    """One block of one layer: 16 tokens * 2 (K and V) * 3 heads * 5 * 2 bytes = 960."""
    spec = make_spec()
    assert [block_bytes(spec, layers) for layers in ([], [1], [0, 2])] == [0, 960, 1920]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layer_has_its_own_keys_and_values(dtype: Dtype) -> None:
    """What is written to one tensor is not seen in another, and every byte is used."""
    spec, memory = make_spec(dtype=dtype), Memory()
    kv = PagedKV.allocate(spec, ["cpu"] * 3, 7, memory.empty)
    tensors = [t for i in range(3) for t in (kv.layer(i).key, kv.layer(i).value)]
    for number, tensor in enumerate(tensors):
        assert tensor.shape == (7, 3, BLOCK_SIZE, 5)
        assert DTYPES[dtype] == tensor.dtype
        assert tensor.is_contiguous()
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert (tensor == number).all()
    assert [("cpu", sum(t.nbytes for t in tensors))] == memory.asked


def test_each_device_is_asked_once_for_its_layers() -> None:
    """Layers 0 and 2 on the GPU (2 * 960 bytes a block), layer 1 on the CPU."""
    memory = Memory()
    kv = PagedKV.allocate(make_spec(), ["gpu", "cpu", "gpu"], 4, memory.empty)
    assert memory.asked == [("cpu", 4 * 960), ("gpu", 4 * 1920)]
    storages = [kv.layer(i).key.untyped_storage().data_ptr() for i in range(3)]
    assert storages[0] == storages[2] != storages[1]


def test_blocks_may_be_numbered_from_any_number() -> None:
    """Those of one pool behind those of another: 4 to 6."""
    blocks = BlockAllocator(3, first_block=4)
    taken = blocks.allocate(3)
    assert taken == [4, 5, 6]
    blocks.free([5])
    blocks.check_integrity()
    assert blocks.allocate(1) == [5]


SPEC = make_spec()
GPU = strategies.gpu(SPEC, "prefill")


def decode_tier(*attention: str, num_second: int = 0) -> TierPlacement:
    """Layers with attention and cache on the GPU, the CPU, or with the cache alone on the CPU."""
    tiers = {"gpu": strategies.gpu(SPEC, "decode"), "cpu": strategies.cpu(SPEC, "decode")}
    layers = tuple(
        replace(tiers["gpu"].layers[index], kv_on_cpu=True)
        if where == "kv"
        else tiers[where].layers[index]
        for index, where in enumerate(attention)
    )
    return replace(tiers["gpu"], strategy="mixed", cut=0, layers=layers, num_second_seqs=num_second)


PLACEMENTS = {
    "one pool": Placement(prefill=GPU, decode=decode_tier("gpu", "gpu", "gpu")),
    "moved to the cpu": Placement(prefill=GPU, decode=decode_tier("cpu", "gpu", "kv")),
    "moved to the gpu": Placement(
        prefill=strategies.cpu(SPEC, "prefill"), decode=decode_tier("gpu", "cpu", "gpu")
    ),
    "first on the gpu": Placement(
        prefill=GPU, decode=decode_tier("gpu", "gpu", "gpu", num_second=3)
    ),
    "both on the cpu": Placement(prefill=GPU, decode=decode_tier("kv", "kv", "kv", num_second=3)),
}


@pytest.mark.parametrize("num_seqs", [1, 2, 7])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_caches_take_the_bytes_that_the_planner_counts(name: str, num_seqs: int) -> None:
    """On each device, for the planned sequences and for each block more that fits."""
    placement = PLACEMENTS[name]
    wave = Workload(prompt_len=40, output_len=20, num_seqs=num_seqs)
    planned = kv_blocks(placement, wave)
    more = replace_blocks(planned, 5)
    for device in ("gpu", "cpu"):
        asked = [bytes_asked(placement, blocks)[device] for blocks in (planned, more)]
        assert asked[0] == kv_bytes(SPEC, placement, wave, device)
        if num_seqs > 1:  # a second sub-batch needs two
            assert asked[1] == asked[0] + 5 * bytes_per_block(SPEC, placement, device)


def replace_blocks(planned: KVBlocks, more: int) -> KVBlocks:
    prompts = planned.prompts + more if planned.prompts else 0
    return KVBlocks(first=planned.first + more, second=planned.second, prompts=prompts)


def bytes_asked(placement: Placement, blocks: KVBlocks) -> dict[Device, int]:
    memory = Memory()
    Caches.allocate(SPEC, placement, blocks, memory.empty)
    found: dict[Device, int] = {"gpu": 0, "cpu": 0}
    for device, num_bytes in memory.asked:
        found[device] += num_bytes
    return found


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_block_of_a_pool_is_a_page(name: str) -> None:
    """Pages of prompts are those of the moved layers, or lie behind the first sub-batch's."""
    placement = PLACEMENTS[name]
    wave = Workload(prompt_len=40, output_len=20, num_seqs=7)
    blocks = kv_blocks(placement, wave)
    pools = BlockPools.create(placement, blocks)
    caches = Caches.allocate(SPEC, placement, blocks, Memory().empty)
    assert (pools.prompts is not None) == moves_prompts(placement, wave)
    for pool, kv in zip(pools.decode, caches.decode, strict=True):
        assert all(layer.key.shape[0] >= pool.num_blocks for layer in kv.layers)
    if pools.prompts is None:
        assert caches.prefill is caches.decode[0]
        return
    taken = pools.prompts.allocate(pools.prompts.num_blocks)
    assert taken is not None
    if pools.moving == {1}:
        assert caches.prefill is caches.decode[0]
        assert taken[0] == blocks.first
    for index in range(SPEC.num_layers):
        prefill, decode = caches.prefill.layer(index), caches.decode[0].layer(index)
        if placement.prefill.layers[index].kv == placement.decode.layers[index].kv:
            assert prefill is decode
        else:
            assert prefill.key.shape[0] == taken[-1] + 1 == blocks.prompts

"""Memory of a placement: every byte written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec.structs import replace as msgspec_replace

from planner import strategies
from planner.attention_kinds import LatentAttention, RecurrentAttention
from planner.hardware import HardwareProfile
from planner.kv_blocks import KVBlocks, bytes_per_block, kv_blocks, num_prompts
from planner.memory import (
    DeviceMemory,
    activation_width,
    available_bytes,
    kv_block_capacity,
    needs,
    staging_bytes,
    weight_bytes,
)
from planner.model_spec import ModelSpec
from planner.placement import ModulePlacement, Placement, Runs, TierPlacement
from planner.workload import Phase, Workload
from tests.planner.tiny import (
    ATTENTION,
    DENSE,
    DENSE_LAYER,
    DENSE_TOKEN,
    EMBEDDING,
    EXPERT,
    EXPERTS,
    HEAD,
    KV_PER_TOKEN,
    LOGITS,
    MOE_LAYER,
    MOE_TOKEN,
    ROUTER,
    tiny_device,
    tiny_machine,
    tiny_spec,
)

# 2 sequences of 33 tokens: 2 * ceil(33 / 16) = 6 blocks = 96 tokens of cache.
WORKLOAD = Workload(prompt_len=20, output_len=13, num_seqs=2)
CACHED = 96


def machine(gpu_bytes: int | None = 1_000_000, cpu_bytes: int = 1_000_000) -> HardwareProfile:
    gpu = None if gpu_bytes is None else tiny_device("gpu", memory_bytes=gpu_bytes)
    return tiny_machine(cpu=tiny_device("cpu", memory_bytes=cpu_bytes), gpu=gpu)


def test_all_on_the_gpu_needs_weights_kv_and_activations_there() -> None:
    """Two dense layers; on the CPU only the logits of both sequences, which it samples from."""
    spec = tiny_spec("dd")
    found = needs(spec, strategies.placement(spec, "gpu", 0), WORKLOAD, machine())

    assert found["gpu"] == DeviceMemory(
        weights_bytes=160 + 176 + 2 * (400 + 784),  # embedding, head, 2 layers: 2704
        kv_bytes=CACHED * 16 * 2,  # 2 layers
        # Prefill: 40 tokens and 2 rows of logits. Decode: 2 * (384 + 40) and one layer's KV
        # gathered (96 * 16 * 1.5 = 2304), which is less.
        activation_bytes=40 * 384 + 2 * 40,
        staging_bytes=0,
        available_bytes=960_000,  # 96 %
    )
    assert found["cpu"] == DeviceMemory(
        weights_bytes=0,
        kv_bytes=0,
        activation_bytes=2 * 40,
        staging_bytes=0,
        available_bytes=900_000,  # 90 %
    )
    assert found["gpu"].needed_bytes == 2704 + 3072 + 15440


def test_all_on_the_cpu_needs_nothing_on_the_gpu() -> None:
    spec = tiny_spec("md")
    found = needs(spec, strategies.placement(spec, "cpu", 0), WORKLOAD, machine())

    assert found["gpu"].needed_bytes == 0
    weights = EMBEDDING + HEAD + (ATTENTION + ROUTER + EXPERTS) + (ATTENTION + DENSE)
    assert found["cpu"].weights_bytes == weights == 3152
    assert found["cpu"].kv_bytes == 2 * CACHED * KV_PER_TOKEN
    assert found["cpu"].activation_bytes == 40 * MOE_TOKEN + 2 * LOGITS


def test_a_machine_without_a_gpu_needs_memory_on_the_cpu_only() -> None:
    spec = tiny_spec("d")
    found = needs(spec, strategies.placement(spec, "cpu", 0), WORKLOAD, machine(gpu_bytes=None))

    assert list(found) == ["cpu"]
    assert available_bytes(machine(gpu_bytes=None), "gpu") == 0


@pytest.mark.parametrize(
    ("strategy", "cut", "gpu_bytes", "cpu_bytes"),
    [
        # One matrix for embedding and head where both are on the device: 160 + 176 - 160.
        ("gpu", 0, HEAD + 2 * (ATTENTION + DENSE), 0),
        ("cpu", 0, 0, HEAD + 2 * (ATTENTION + DENSE)),
        ("offload", 1, HEAD + ATTENTION + DENSE, ATTENTION + DENSE),
        # The embedding is on the CPU and the head on the GPU: twice the matrix.
        ("split", 1, HEAD + ATTENTION + DENSE, EMBEDDING + ATTENTION + DENSE),
    ],
)
def test_a_tied_matrix_is_stored_once_on_each_device_that_uses_it(
    strategy: str, cut: int, gpu_bytes: int, cpu_bytes: int
) -> None:
    spec = tiny_spec("dd", is_tied=True)
    found = needs(spec, strategies.placement(spec, strategy, cut), WORKLOAD, machine())

    assert found["gpu"].weights_bytes == gpu_bytes
    assert found["cpu"].weights_bytes == cpu_bytes


def test_a_tied_matrix_that_two_tiers_want_is_stored_once_on_each_device() -> None:
    """Prefill wants all on the GPU, decode all on the CPU: each holds the model once."""
    spec = tiny_spec("d", is_tied=True)
    both = Placement(prefill=strategies.gpu(spec, "prefill"), decode=strategies.cpu(spec, "decode"))
    found = needs(spec, both, WORKLOAD, machine())

    assert found["gpu"].weights_bytes == found["cpu"].weights_bytes == HEAD + ATTENTION + DENSE
    # prompts leave the GPU when they end: 2 blocks each
    assert found["gpu"].kv_bytes == 2 * 32 * KV_PER_TOKEN
    assert found["cpu"].kv_bytes == CACHED * KV_PER_TOKEN


def test_weights_that_either_tier_wants_are_resident_for_both() -> None:
    """Prefill streams layer 0 of 2, decode has the experts of both layers on the CPU."""
    spec = tiny_spec("mm")
    both = Placement(
        prefill=strategies.offload(spec, "prefill", 1),
        decode=strategies.experts_on_cpu(spec, "decode", 2),
    )
    found = needs(spec, both, WORKLOAD, machine())

    layer = ATTENTION + ROUTER + EXPERTS
    assert found["gpu"].weights_bytes == HEAD + (ATTENTION + ROUTER) + layer
    assert found["cpu"].weights_bytes == EMBEDDING + layer + EXPERTS


def test_kv_that_moves_between_the_phases_is_held_on_both_devices() -> None:
    """Layer 0 is on the CPU in prefill only, so its blocks are on both devices; layer 1 stays."""
    spec = tiny_spec("dd")
    both = Placement(
        prefill=strategies.split(spec, "prefill", 1), decode=strategies.offload(spec, "decode", 1)
    )
    found = needs(spec, both, WORKLOAD, machine())

    assert found["gpu"].kv_bytes == 2 * CACHED * KV_PER_TOKEN
    assert found["cpu"].kv_bytes == 2 * 32 * KV_PER_TOKEN  # while the prompts are computed
    assert bytes_per_block(spec, both, "gpu") == 2 * 16 * KV_PER_TOKEN
    assert bytes_per_block(spec, both, "cpu") == 16 * KV_PER_TOKEN


def test_layers_of_different_caches_are_counted_each_by_its_own() -> None:
    """A latent of 5 elements, a state that no token adds to, and the model's own heads."""
    latent = LatentAttention(num_heads=2, kv_rank=3, nope_dim=2, rope_dim=2, value_dim=4)
    state = RecurrentAttention(
        num_key_heads=1, num_value_heads=2, key_dim=4, value_dim=3, num_gates=2
    )
    spec = replace(
        tiny_spec("ddd"),
        layers=(
            replace(DENSE_LAYER, attention=latent),
            replace(DENSE_LAYER, attention=state),
            DENSE_LAYER,
        ),
    )
    # float32 state of 2 heads * 4 * 3, and 3 inputs of the convolution's 2*4 + 6 channels
    state_bytes = 4 * 24 + 2 * 3 * 14
    placement = strategies.placement(spec, "split", 2)
    found = needs(spec, placement, WORKLOAD, machine())

    assert found["cpu"].kv_bytes == CACHED * 10 + 2 * state_bytes  # 2 sequences
    assert found["gpu"].kv_bytes == CACHED * KV_PER_TOKEN
    assert bytes_per_block(spec, placement, "cpu") == 16 * 10
    assert bytes_per_block(spec, placement, "gpu") == 16 * KV_PER_TOKEN


def test_a_state_takes_no_blocks_from_the_cache() -> None:
    """What is left beside the states of the workload's sequences is for blocks."""
    state = RecurrentAttention(
        num_key_heads=1, num_value_heads=2, key_dim=4, value_dim=3, num_gates=2
    )
    spec = replace(tiny_spec("dd"), layers=(replace(DENSE_LAYER, attention=state), DENSE_LAYER))
    placement = strategies.placement(spec, "cpu", 0)
    need = needs(spec, placement, WORKLOAD, machine())["cpu"]
    free = need.available_bytes - need.needed_bytes

    capacity = kv_block_capacity(spec, placement, WORKLOAD, machine())
    assert capacity.first == 6 + free // (16 * KV_PER_TOKEN)


def test_shared_experts_and_wide_latents_are_alive_too() -> None:
    """Elements per token: 4 * hidden 8, and the widest moment of the layer."""
    shared = replace(MOE_LAYER, shared_size=100)
    latent = LatentAttention(num_heads=2, kv_rank=30, nope_dim=20, rope_dim=2, value_dim=40)
    layer = replace(DENSE_LAYER, attention=latent)

    # gate, up and product of 100, normed input and output
    assert activation_width(replace(tiny_spec("m"), layers=(shared,))) == 32 + 3 * 100 + 16
    # queries 2*22, latent 32, keys and values 2*60, heads' output 2*40
    assert activation_width(replace(tiny_spec("d"), layers=(layer,))) == 32 + 44 + 32 + 120 + 80


def test_residents_lie_on_the_gpu_and_the_other_experts_on_the_cpu() -> None:
    """Of four experts one is resident in prefill and three in decode: 3 above, all but 1 below."""
    spec = tiny_spec("m")
    placement = Placement(
        prefill=with_experts(spec, "prefill", 1), decode=with_experts(spec, "decode", 3)
    )

    assert (
        weight_bytes(spec, placement, "gpu") == EMBEDDING + HEAD + ATTENTION + ROUTER + 3 * EXPERT
    )
    assert weight_bytes(spec, placement, "cpu") == 3 * EXPERT


def test_what_is_streamed_beside_residents_and_slots_needs_staging() -> None:
    """Two buffers of the three experts that are not resident; six slots of an expert each."""
    spec = tiny_spec("m")
    streamed = with_experts(spec, "prefill", 1, runs="stream")
    assert staging_bytes(spec, streamed) == 2 * 3 * EXPERT
    assert staging_bytes(spec, with_experts(spec, "prefill", 1)) == 0
    assert staging_bytes(spec, with_experts(spec, "prefill", 1, runs="split")) == 6 * EXPERT


def with_experts(
    spec: ModelSpec, phase: Phase, num_resident: int, *, runs: Runs = "cpu"
) -> TierPlacement:
    """All on the GPU but for experts, of which some are resident."""
    gpu = strategies.gpu(spec, phase)
    where = ModulePlacement(lives="cpu", runs=runs, num_resident=num_resident)
    layers = tuple(msgspec_replace(layer, ffn=where) for layer in gpu.layers)
    return msgspec_replace(
        gpu, strategy="mixed", layers=layers, num_expert_slots=6 if runs == "split" else 0
    )


def test_streaming_needs_two_buffers_of_the_largest_streamed_layer() -> None:
    """Layer 1 is the larger: 400 + 80 + 1152 = 1632; with only layer 0 streamed, 1184."""
    spec = tiny_spec("dm")

    assert staging_bytes(spec, strategies.offload(spec, "decode", 2)) == 2 * 1632
    assert staging_bytes(spec, strategies.offload(spec, "decode", 1)) == 2 * 1184
    assert staging_bytes(spec, strategies.split(spec, "decode", 1)) == 0
    both = Placement(
        prefill=strategies.offload(spec, "prefill", 2), decode=strategies.split(spec, "decode", 1)
    )
    assert needs(spec, both, WORKLOAD, machine())["gpu"].staging_bytes == 2 * 1632


def test_a_decode_step_on_the_gpu_gathers_one_layer_of_the_cache() -> None:
    """64 sequences of 1 + 31 tokens, 2 blocks each: keys once, values twice, 2048 tokens."""
    spec = tiny_spec("d")
    workload = Workload(prompt_len=1, output_len=31, num_seqs=64)
    on_gpu = needs(spec, strategies.placement(spec, "gpu", 0), workload, machine())["gpu"]
    on_cpu = needs(spec, strategies.placement(spec, "cpu", 0), workload, machine())["cpu"]

    assert on_gpu.activation_bytes == 64 * (DENSE_TOKEN + LOGITS) + 2048 * 24
    assert on_cpu.activation_bytes == 64 * (DENSE_TOKEN + LOGITS)


def test_a_prompt_in_parts_gathers_its_cache_behind_a_mask() -> None:
    """40 tokens (48 in blocks) in chunks of 8: KV of 48 tokens, and 8 * 48 cells of mask.

    A cell is 2 bytes, and 2 more for the booleans that it is made from.
    """
    spec = tiny_spec("d")
    placement = strategies.placement(spec, "cpu", 0, chunk_tokens=8)
    workload = Workload(prompt_len=40, output_len=1)
    found = needs(spec, placement, workload, machine())["cpu"]

    assert found.activation_bytes == 8 * DENSE_TOKEN + LOGITS + 48 * 24 + 8 * 48 * 4


def test_fits_up_to_the_last_byte() -> None:
    memory = DeviceMemory(
        weights_bytes=1, kv_bytes=2, activation_bytes=3, staging_bytes=4, available_bytes=10
    )

    assert memory.needed_bytes == 10
    assert memory.fits
    assert not DeviceMemory(
        weights_bytes=1, kv_bytes=2, activation_bytes=3, staging_bytes=4, available_bytes=9
    ).fits


def test_available_memory_leaves_the_runtime_and_a_margin() -> None:
    """(1000 - 500) * 0.96 on the GPU, * 0.90 on the CPU, and never less than nothing."""
    hardware = tiny_machine(
        cpu=tiny_device("cpu", memory_bytes=1000, reserved_bytes=500),
        gpu=tiny_device("gpu", memory_bytes=1000, reserved_bytes=500),
    )

    assert available_bytes(hardware, "gpu") == 480
    assert available_bytes(hardware, "cpu") == 450
    small = tiny_machine(cpu=tiny_device("cpu", memory_bytes=100, reserved_bytes=500))
    assert available_bytes(small, "cpu") == 0


@pytest.mark.parametrize(
    ("prompt_len", "output_len", "num_seqs", "num_blocks"),
    [(1, 1, 1, 1), (15, 1, 1, 1), (16, 1, 1, 2), (20, 13, 2, 6), (16, 16, 5, 10)],
)
def test_blocks_hold_every_sequence_at_its_full_length(
    prompt_len: int, output_len: int, num_seqs: int, num_blocks: int
) -> None:
    workload = Workload(prompt_len=prompt_len, output_len=output_len, num_seqs=num_seqs)
    placement = strategies.placement(tiny_spec("d"), "gpu", 0)
    assert kv_blocks(placement, workload) == KVBlocks(first=num_blocks)


def two_sub_batches(spec: ModelSpec, *, kv_on_cpu: bool = False) -> Placement:
    """All on the GPU; of 4 sequences 3 are a second sub-batch. Prefill steps of 32 tokens."""
    placement = strategies.placement(spec, "gpu", 0, chunk_tokens=32)
    layers = tuple(msgspec_replace(layer, kv_on_cpu=kv_on_cpu) for layer in placement.decode.layers)
    decode = msgspec_replace(placement.decode, num_second_seqs=3, layers=layers)
    return msgspec_replace(placement, decode=decode)


def test_the_second_sub_batch_is_on_the_cpu_and_its_prompts_on_the_gpu_for_a_while() -> None:
    """20 + 13 tokens are 3 blocks; a step of 32 tokens touches 1 + 32/20 prompts of 2 blocks."""
    spec, four = tiny_spec("dd"), Workload(prompt_len=20, output_len=13, num_seqs=4)
    block = 2 * 16 * KV_PER_TOKEN
    placement = two_sub_batches(spec)
    assert num_prompts(four, 32) == 3
    assert kv_blocks(placement, four) == KVBlocks(first=3, second=9, prompts=6)
    found = needs(spec, placement, four, machine())
    assert found["gpu"].kv_bytes == 9 * block
    assert found["cpu"].kv_bytes == 9 * block
    assert bytes_per_block(spec, placement, "gpu") == 2 * block  # one more, and for its prompt

    found = needs(spec, two_sub_batches(spec, kv_on_cpu=True), four, machine())
    assert found["gpu"].kv_bytes == 6 * block
    assert found["cpu"].kv_bytes == 12 * block


def test_the_first_sub_batch_has_a_sequence_at_least() -> None:
    spec, two = tiny_spec("d"), Workload(prompt_len=20, output_len=13, num_seqs=2)
    assert kv_blocks(two_sub_batches(spec), two) == KVBlocks(first=3, second=3, prompts=4)


def test_the_cache_takes_what_is_left_on_the_tighter_device() -> None:
    """Split after layer 0: a block is 256 bytes on either device; the GPU has room for 20 more."""
    spec = tiny_spec("dd")
    placement = strategies.placement(spec, "split", 1)
    need = needs(spec, placement, WORKLOAD, machine())["gpu"]
    # 96 % of the memory is available.
    memory_bytes = -(-(need.needed_bytes + 20 * 256) * 100 // 96)

    assert kv_block_capacity(
        spec, placement, WORKLOAD, machine(gpu_bytes=memory_bytes)
    ) == KVBlocks(first=26)


def test_the_cache_is_never_smaller_than_the_workload_needs() -> None:
    """A plan that does not fit is refused elsewhere; it still counts its own blocks."""
    spec = tiny_spec("dd")
    placement = strategies.placement(spec, "gpu", 0)
    assert kv_block_capacity(spec, placement, WORKLOAD, machine(gpu_bytes=10)) == KVBlocks(first=6)

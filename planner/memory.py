"""Bytes that a placement needs on each device: weights, KV, activations, staging, margin."""

from __future__ import annotations

from dataclasses import dataclass

from planner.hardware import HardwareProfile
from planner.kv_blocks import (
    KVBlocks,
    bytes_per_block,
    kv_blocks,
    kv_bytes,
    num_blocks_for,
    num_more_prompts,
)
from planner.model_spec import LayerSpec, ModelSpec, Module
from planner.placement import (
    KV_BLOCK_TOKENS,
    NUM_STREAM_BUFFERS,
    Device,
    Placement,
    TierPlacement,
)
from planner.workload import Phase, Workload

_LOGIT_BYTES = 4

# Share of a device's memory that no plan touches: allocator fragmentation, 3-5% of a caching
# allocator; on the CPU the operating system and its page cache, 10%.
MARGIN_SHARE: dict[Device, float] = {"gpu": 0.04, "cpu": 0.10}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes on one device; `available_bytes` is what the plan may use in all."""

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    staging_bytes: int
    available_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.staging_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes


def available_bytes(hardware: HardwareProfile, device: Device) -> int:
    """Bytes of a device that a plan may use: its memory less the runtime's part and the margin."""
    profile = hardware.cpu if device == "cpu" else hardware.gpu
    if profile is None:
        return 0
    free = max(0, profile.memory_bytes - profile.reserved_bytes)
    return int(free * (1.0 - MARGIN_SHARE[device]))


def staging_bytes(spec: ModelSpec, tier: TierPlacement) -> int:
    """GPU memory for weights on their way: two of the largest streamed layer, and expert slots."""
    largest = max(
        (streamed_bytes(spec, tier, index) for index in range(spec.num_layers)), default=0
    )
    return NUM_STREAM_BUFFERS * largest + tier.num_expert_slots * _largest_split_expert(spec, tier)


def streamed_bytes(spec: ModelSpec, tier: TierPlacement, layer: int) -> int:
    """Bytes of a layer that are copied to the GPU in each step."""
    total = sum(spec.weight_bytes(module, layer) for module in tier.streamed(layer))
    where = tier.layers[layer].ffn
    if where.runs == "stream" and where.num_resident:
        module = tier.layers[layer].modules()[-1][0]
        total -= spec.weight_bytes(module, layer)
        total += spec.part_bytes(module, layer, where.num_resident)[1]
    return total


def _largest_split_expert(spec: ModelSpec, tier: TierPlacement) -> int:
    return max(
        (
            spec.expert_bytes(index)
            for index, layer in enumerate(tier.layers)
            if layer.ffn.runs == "split"
        ),
        default=0,
    )


def weight_bytes(spec: ModelSpec, placement: Placement, device: Device) -> int:
    """Bytes of the weights on a device, for all tiers."""
    return sum(weight_bytes_by_module(spec, placement, device).values())


def weight_bytes_by_module(
    spec: ModelSpec, placement: Placement, device: Device
) -> dict[Module, int]:
    """The same of all layers' modules of a kind; a tied matrix is stored once, as embedding.

    Those that prefill or decode wants there: smaller tiers want the same.
    """
    order: tuple[Module, ...] = ("attention", "router", "experts", "dense", "embedding", "head")
    found = dict.fromkeys(order, 0)
    prefill, decode = placement.prefill, placement.decode
    ends: tuple[tuple[Module, bool], ...] = (
        ("embedding", device in (prefill.embedding.lives, decode.embedding.lives)),
        ("head", device in (prefill.head.lives, decode.head.lives)),
    )
    for module, is_here in ends:
        found[module] += is_here * spec.weight_bytes(module)
    if all(is_here for _, is_here in ends):
        found["embedding"] -= spec.tied_bytes
    for index, (before, after) in enumerate(zip(prefill.layers, decode.layers, strict=True)):
        pairs = zip(before.modules(), after.modules(), strict=True)
        for (module, first), (_, second) in pairs:
            if module == "experts":
                on_gpu = placement.num_resident(spec, index)
                count = on_gpu if device == "gpu" else placement.num_on_cpu(spec, index)
                found[module] += count * spec.expert_bytes(index)
            elif first.is_mixed:
                parts = spec.part_bytes(module, index, first.num_resident)
                found[module] += parts[0] if device == "gpu" else parts[1]
            elif device in (first.lives, second.lives):
                found[module] += spec.weight_bytes(module, index)
    return found


def activation_width(spec: ModelSpec) -> int:
    """Most elements per token that are alive at once in a step.

    The widest moment of a layer: residual, normed input and output (4 hidden), with queries, keys,
    values and attention output, or with gate, up, product and output of every chosen expert.
    """
    width = 0
    for layer in dict.fromkeys(spec.layers):
        chosen = layer.num_experts_per_token if layer.is_moe else 1
        width = max(
            width,
            _attention_width(spec, layer),
            chosen * (3 * layer.intermediate_size + 2 * spec.hidden_size),
            3 * layer.shared_size + 2 * spec.hidden_size,
        )
    return width + 4 * spec.hidden_size


def _attention_width(spec: ModelSpec, layer: LayerSpec) -> int:
    """Elements per token of queries, keys, values and output; else all that products make."""
    if layer.attention is None:
        return 2 * spec.q_size + 2 * spec.kv_size
    matrices = layer.attention.matrices(spec.hidden_size)
    *_, (_, _, output) = matrices
    return sum(count * rows for count, rows, _ in matrices[:-1]) + output


def needs(
    spec: ModelSpec,
    placement: Placement,
    workload: Workload,
    hardware: HardwareProfile,
) -> dict[Device, DeviceMemory]:
    """Memory that a placement needs on each device for all sequences of a workload at once."""
    devices: tuple[Device, ...] = ("cpu",) if hardware.gpu is None else ("gpu", "cpu")
    tiers = placement.tiers
    return {
        device: DeviceMemory(
            weights_bytes=weight_bytes(spec, placement, device),
            kv_bytes=kv_bytes(spec, placement, workload, device),
            activation_bytes=max(activation_bytes(spec, t, workload, device) for t in tiers),
            staging_bytes=max(staging_bytes(spec, t) for t in tiers) if device == "gpu" else 0,
            available_bytes=available_bytes(hardware, device),
        )
        for device in devices
    }


def activation_bytes(spec: ModelSpec, tier: TierPlacement, wave: Workload, device: Device) -> int:
    """Upper bound on the live activations of one step of a tier on a device, logits included."""
    widest = max(
        (
            spec.kv_bytes_per_token(index)
            for index, layer in enumerate(tier.layers)
            if layer.kv == device
        ),
        default=0,
    )

    def with_caches(widest_kv_bytes: int) -> int:
        return step_activation_bytes(
            spec,
            wave,
            device,
            tier.phase,
            tier.max_num_tokens,
            computes=tier.uses(device),
            widest_kv_bytes=widest_kv_bytes,
            num_second_seqs=tier.num_second_seqs,
        )

    if device == "cpu" or not tier.num_gpu_kv_tokens:
        return with_caches(widest)
    return max(with_caches(widest), with_caches(0) + _front_bytes(spec, tier, wave))


def _front_bytes(spec: ModelSpec, tier: TierPlacement, wave: Workload) -> int:
    """What the GPU gathers of the fronts of a layer whose caches are divided.

    Keys, or values, as they are and in float32; scores of every head, and weights.
    """
    num_tokens = min(tier.num_gpu_kv_tokens, _whole_blocks(wave.context_len))
    widest = max(
        spec.kv_bytes_per_token(index)
        for index, layer in enumerate(tier.layers)
        if layer.num_gpu_kv_tokens
    )
    each = widest // 2 + widest // spec.dtype_bytes * 2 + 2 * spec.num_heads * 4
    return wave.num_seqs * num_tokens * each


def step_activation_bytes(
    spec: ModelSpec,
    wave: Workload,
    device: Device,
    phase: Phase,
    chunk_tokens: int,
    *,
    computes: bool,
    widest_kv_bytes: int,
    num_second_seqs: int = 0,
) -> int:
    """The same of what a tier is: whether the device computes, and its widest KV per token."""
    if phase == "prefill":
        num_tokens = min(chunk_tokens, wave.num_seqs * wave.prompt_len)
        num_logits = min(wave.num_seqs, num_tokens)
    else:
        num_tokens = num_logits = wave.num_seqs
    if not computes:
        # Tokens are sampled on the CPU, whatever computes.
        return num_logits * spec.vocab_size * _LOGIT_BYTES if device == "cpu" else 0
    # Norms and softmax widen bfloat16 to float32.
    total = num_tokens * activation_width(spec) * max(4, spec.dtype_bytes)
    total += num_logits * spec.vocab_size * _LOGIT_BYTES
    if not widest_kv_bytes:
        return total
    if phase == "decode":
        # The CPU's kernel reads the pages in place, the GPU's gathers them.
        num_seqs = max(1, wave.num_seqs - num_second_seqs)
        num_gathered = num_seqs * _whole_blocks(wave.context_len)
        return total + (num_gathered * widest_kv_bytes * 3 // 2 if device == "gpu" else 0)
    if wave.num_seqs * wave.prompt_len > chunk_tokens:
        # Prompts in parts read the cache: one sequence gathered at a time (keys, then values before
        # and after they are laid out), behind a mask that is made from two boolean ones.
        context_len = _whole_blocks(wave.prompt_len)
        total += context_len * widest_kv_bytes * 3 // 2
        total += num_tokens * context_len * (spec.dtype_bytes + 2)
    return total


def _whole_blocks(num_tokens: int) -> int:
    return num_blocks_for(num_tokens) * KV_BLOCK_TOKENS


def kv_block_capacity(
    spec: ModelSpec, placement: Placement, workload: Workload, hardware: HardwareProfile
) -> KVBlocks:
    """KV blocks that fit beside everything else of a placement; at least the workload's own.

    The workload sizes the activations; what is left on the tighter device goes to the caches of
    the first sub-batch.
    """
    planned, more = kv_blocks(placement, workload), list[int]()
    for device, need in needs(spec, placement, workload, hardware).items():
        block_bytes = bytes_per_block(spec, placement, device)
        if block_bytes:
            more.append((need.available_bytes - need.needed_bytes) // block_bytes)
    extra = max(0, min(more, default=0))
    return KVBlocks(
        first=planned.first + extra,
        second=planned.second,
        prompts=planned.prompts + num_more_prompts(placement, workload, extra),
        fronts=planned.fronts,
    )

"""Bytes that a placement needs on each device: weights, KV, activations, staging, margin."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from planner.hardware import HardwareProfile
from planner.model_spec import LayerSpec, ModelSpec, Module
from planner.placement import Device, Placement, TierPlacement
from planner.step_graph import NUM_STREAM_BUFFERS
from planner.workload import PHASES, Phase, Workload

KV_BLOCK_TOKENS = 16
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


class ModelBytes:
    """Bytes of a model's modules and activations, worked out once.

    Sets of modules are bit masks, so that the bytes of a union over tiers are a few bit counts:
    modules of equal size share a mask.
    """

    def __init__(self, spec: ModelSpec) -> None:
        keys: list[tuple[Module, int | None]] = [("embedding", None), ("head", None)]
        for index, layer in enumerate(spec.layers):
            keys += [(module, index) for module in layer.modules]
        self._bit = {key: 1 << position for position, key in enumerate(keys)}
        self._mask_by_bytes: dict[int, int] = {}
        for key, bit in self._bit.items():
            size = spec.weight_bytes(*key)
            self._mask_by_bytes[size] = self._mask_by_bytes.get(size, 0) | bit
        self._tied_mask = self._bit["embedding", None] | self._bit["head", None]
        self._tied_bytes = spec.tied_bytes
        # Norms and softmax widen bfloat16 to float32.
        self._token_bytes = activation_width(spec) * max(4, spec.dtype_bytes)
        self._logit_bytes = spec.vocab_size * _LOGIT_BYTES

    def mask(self, modules: Iterable[tuple[Module, int | None]]) -> int:
        """The bit mask of some modules."""
        return sum(self._bit[key] for key in modules)

    def weight_bytes(self, mask: int) -> int:
        """Bytes of a set of modules on one device; a tied matrix is stored once."""
        total = 0
        for size, members in self._mask_by_bytes.items():
            total += size * (mask & members).bit_count()
        return total - (self._tied_bytes if mask & self._tied_mask == self._tied_mask else 0)

    def activation_bytes(self, num_tokens: int, num_logits: int) -> int:
        """Upper bound on the live activations of one step, its logits included."""
        return num_tokens * self._token_bytes + num_logits * self._logit_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TierFacts:
    """What the memory of a placement needs to know of one tier."""

    tier: TierPlacement
    lives: dict[Device, int]
    kv_layers: dict[Device, int]
    staging_bytes: int
    uses: dict[Device, bool]

    @classmethod
    def of(cls, tier: TierPlacement, spec: ModelSpec, sizes: ModelBytes) -> TierFacts:
        kv_layers: dict[Device, int] = {"gpu": 0, "cpu": 0}
        for index, layer in enumerate(tier.layers):
            kv_layers[layer.kv] |= 1 << index
        devices: tuple[Device, ...] = ("gpu", "cpu")
        return cls(
            tier=tier,
            lives={device: sizes.mask(tier.lives_on(device)) for device in devices},
            kv_layers=kv_layers,
            staging_bytes=staging_bytes(spec, tier),
            uses={device: tier.uses(device) for device in devices},
        )


def kv_bytes_per_block(spec: ModelSpec, placement: Placement, device: Device) -> int:
    """Bytes that one KV block of all layers takes on a device; states of a sequence not included.

    A layer whose KV moves between the phases holds blocks on both devices.
    """
    total = 0
    for index in range(spec.num_layers):
        places = {placement.tier(phase).layers[index].kv for phase in PHASES}
        if device in places:
            total += KV_BLOCK_TOKENS * spec.kv_bytes_per_token(index)
    return total


def num_kv_blocks(workload: Workload) -> int:
    """Blocks that hold every sequence of a workload at its full length.

    Examples
    --------
    >>> num_kv_blocks(Workload(prompt_len=20, output_len=13, num_seqs=2))  # 2 * ceil(33 / 16)
    6
    """
    return workload.num_seqs * math.ceil(workload.context_len / KV_BLOCK_TOKENS)


def staging_bytes(spec: ModelSpec, tier: TierPlacement) -> int:
    """GPU buffers for streamed weights: two of the largest streamed layer."""
    largest = max(
        (
            sum(spec.weight_bytes(module, index) for module in tier.streamed(index))
            for index in range(spec.num_layers)
        ),
        default=0,
    )
    return NUM_STREAM_BUFFERS * largest


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
    sizes = ModelBytes(spec)
    return WaveMemory(spec, sizes, workload, hardware).needs(
        TierFacts.of(placement.prefill, spec, sizes), TierFacts.of(placement.decode, spec, sizes)
    )


class WaveMemory:
    """Memory of pairs of tiers for sequences that run together; what all pairs share is here."""

    def __init__(
        self, spec: ModelSpec, sizes: ModelBytes, wave: Workload, hardware: HardwareProfile
    ) -> None:
        self._spec = spec
        self._sizes = sizes
        self._wave = wave
        self._kv_kinds = _kv_kinds(spec, wave)
        devices: tuple[Device, ...] = ("cpu",) if hardware.gpu is None else ("gpu", "cpu")
        self._available = {device: available_bytes(hardware, device) for device in devices}
        self._activations: dict[tuple[TierFacts, Phase, Device], int] = {}

    def needs(self, prefill: TierFacts, decode: TierFacts) -> dict[Device, DeviceMemory]:
        """Bytes on each device; weights that either tier wants on a device are there for both."""
        found: dict[Device, DeviceMemory] = {}
        for device, available in self._available.items():
            weights, kv, activations, staging = self._parts(prefill, decode, device)
            found[device] = DeviceMemory(
                weights_bytes=weights,
                kv_bytes=kv,
                activation_bytes=activations,
                staging_bytes=staging,
                available_bytes=available,
            )
        return found

    def lacking_bytes(self, prefill: TierFacts, decode: TierFacts) -> int:
        """Bytes by which a pair is over budget, on all devices together; 0 where it fits."""
        return sum(
            max(0, sum(self._parts(prefill, decode, device)) - available)
            for device, available in self._available.items()
        )

    def fits_alone(self, facts: TierFacts, phase: Phase) -> bool:
        """Whether a tier would fit in its phase if the other phase needed nothing."""
        return all(
            self._sizes.weight_bytes(facts.lives[device])
            + self._kv_bytes(facts.kv_layers[device])
            + self._activation_bytes(facts, phase, device)
            + (facts.staging_bytes if device == "gpu" else 0)
            <= available
            for device, available in self._available.items()
        )

    def _kv_bytes(self, layers: int) -> int:
        """Bytes of the caches of some layers (a bit mask)."""
        kinds = self._kv_kinds
        return sum(kind.layer_bytes * (layers & kind.layers).bit_count() for kind in kinds)

    def _parts(
        self, prefill: TierFacts, decode: TierFacts, device: Device
    ) -> tuple[int, int, int, int]:
        """Bytes of weights, KV, activations and staging."""
        return (
            self._sizes.weight_bytes(prefill.lives[device] | decode.lives[device]),
            self._kv_bytes(prefill.kv_layers[device] | decode.kv_layers[device]),
            max(
                self._activation_bytes(prefill, "prefill", device),
                self._activation_bytes(decode, "decode", device),
            ),
            max(prefill.staging_bytes, decode.staging_bytes) if device == "gpu" else 0,
        )

    def _activation_bytes(self, facts: TierFacts, phase: Phase, device: Device) -> int:
        """Live activations of a step of the phase, worked out once for each tier."""
        key = (facts, phase, device)
        if key not in self._activations:
            work_out = (
                self._prefill_activation_bytes
                if phase == "prefill"
                else self._decode_activation_bytes
            )
            self._activations[key] = work_out(facts, device)
        return self._activations[key]

    def _prefill_activation_bytes(self, facts: TierFacts, device: Device) -> int:
        wave, chunk = self._wave, facts.tier.max_num_tokens
        num_tokens = min(chunk, wave.num_seqs * wave.prompt_len)
        num_logits = min(wave.num_seqs, num_tokens)
        if not facts.uses[device]:
            return self._logits_on_their_way(device, num_logits)
        total = self._sizes.activation_bytes(num_tokens, num_logits)
        if facts.kv_layers[device] and wave.num_seqs * wave.prompt_len > chunk:
            # Prompts in parts read the cache: one sequence gathered at a time, behind a mask that
            # is made from two boolean ones.
            context_len = _whole_blocks(wave.prompt_len)
            total += self._gathered_bytes(context_len, facts.kv_layers[device])
            total += num_tokens * context_len * (self._spec.dtype_bytes + 2)
        return total

    def _decode_activation_bytes(self, facts: TierFacts, device: Device) -> int:
        wave = self._wave
        if not facts.uses[device]:
            return self._logits_on_their_way(device, wave.num_seqs)
        total = self._sizes.activation_bytes(wave.num_seqs, wave.num_seqs)
        if device == "gpu" and facts.kv_layers[device]:
            # The CPU's kernel reads the pages in place, the GPU's gathers them.
            num_gathered = wave.num_seqs * _whole_blocks(wave.context_len)
            total += self._gathered_bytes(num_gathered, facts.kv_layers[device])
        return total

    def _logits_on_their_way(self, device: Device, num_logits: int) -> int:
        """Tokens are sampled on the CPU, whatever computes."""
        return self._sizes.activation_bytes(0, num_logits) if device == "cpu" else 0

    def _gathered_bytes(self, num_tokens: int, kv_layers: int) -> int:
        """One layer's KV, gathered: keys, then values before and after they are laid out."""
        kinds = self._kv_kinds
        widest = max(kind.bytes_per_token for kind in kinds if kind.layers & kv_layers)
        return num_tokens * widest * 3 // 2

    def kv_layer_counts(self, layers: int) -> tuple[int, ...]:
        """How many of some layers (a bit mask) there are of each kind of cache."""
        return tuple((layers & kind.layers).bit_count() for kind in self._kv_kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _KvKind:
    """Layers (a bit mask) whose caches have one size, for all sequences of a wave."""

    layers: int
    layer_bytes: int
    bytes_per_token: int


def _kv_kinds(spec: ModelSpec, wave: Workload) -> tuple[_KvKind, ...]:
    """The layers of a model by the size of their caches."""
    layers_of: dict[tuple[int, int], int] = {}
    for index in range(spec.num_layers):
        key = (spec.kv_bytes_per_token(index), spec.state_bytes(index))
        layers_of[key] = layers_of.get(key, 0) | 1 << index
    num_tokens = num_kv_blocks(wave) * KV_BLOCK_TOKENS
    return tuple(
        _KvKind(
            layers=layers,
            layer_bytes=num_tokens * token_bytes + wave.num_seqs * state_bytes,
            bytes_per_token=token_bytes,
        )
        for (token_bytes, state_bytes), layers in layers_of.items()
    )


def _whole_blocks(num_tokens: int) -> int:
    return math.ceil(num_tokens / KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


def kv_block_capacity(
    spec: ModelSpec, placement: Placement, workload: Workload, hardware: HardwareProfile
) -> int:
    """KV blocks that fit beside everything else of a placement; at least the workload's own.

    The workload sizes the activations; what is left on the tighter device goes to the cache.
    """
    capacity: int | None = None
    for device, need in needs(spec, placement, workload, hardware).items():
        block_bytes = kv_bytes_per_block(spec, placement, device)
        if block_bytes:
            # States of sequences stay; what is left is for blocks.
            held = num_kv_blocks(workload) * block_bytes
            free = need.available_bytes - (need.needed_bytes - held)
            blocks = free // block_bytes
            capacity = blocks if capacity is None else min(capacity, blocks)
    return max(num_kv_blocks(workload), capacity or 0)

"""FlexGen's own cost model: seconds and bytes of a block with shares on GPU, CPU and disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexGenMachine:
    """Memories and rates of one machine, as FlexGen fits them to runs.

    Attributes
    ----------
    gpu_bytes, cpu_bytes, disk_bytes : float
        Memories.
    usable_share : float
        Of each memory.
    h2d_bytes_per_s, d2h_cache_bytes_per_s, d2h_hidden_bytes_per_s : float
        CPU to GPU; GPU to CPU for the KV cache and for activations, which are small copies.
    disk_read_bytes_per_s, disk_decode_write_bytes_per_s : float
        Disk to CPU, and CPU to disk in decode.
    disk_cache_write_bytes_per_s : float
        CPU to disk in prefill.
    prefill_linear_flop_per_s, prefill_attention_flop_per_s : float
        On the GPU.
    decode_linear_flop_per_s, decode_attention_flop_per_s : float
        On the GPU.
    cpu_attention_flop_per_s : float
        Decode attention where the cache lies, at GPU batches of 64 or more and widths of 4096 or
        more.
    small_batch_loss, small_width_loss, small_both_gain : float
        What a halving below those takes of that rate, and what both together give back.
    """

    gpu_bytes: float
    cpu_bytes: float
    disk_bytes: float
    usable_share: float = 0.8
    h2d_bytes_per_s: float
    d2h_cache_bytes_per_s: float
    d2h_hidden_bytes_per_s: float
    disk_read_bytes_per_s: float
    disk_cache_write_bytes_per_s: float
    disk_decode_write_bytes_per_s: float
    prefill_linear_flop_per_s: float
    prefill_attention_flop_per_s: float
    decode_linear_flop_per_s: float
    decode_attention_flop_per_s: float
    cpu_attention_flop_per_s: float
    small_batch_loss: float = 0.0
    small_width_loss: float = 0.0
    small_both_gain: float = 0.0

    def cpu_attention_rate(self, gpu_batch_size: int, hidden_size: int) -> float:
        """FLOP/s of decode attention on the CPU: less for small batches and narrow models."""
        small_batch = max(0.0, math.log2(64 / gpu_batch_size))
        small_width = max(0.0, math.log2(4096 / hidden_size))
        share = 1.0 + self.small_both_gain * small_batch * small_width
        share -= self.small_batch_loss * small_batch + self.small_width_loss * small_width
        return self.cpu_attention_flop_per_s * max(0.1, share)


# The constants that FlexGen ships (FMInference/FlexLLMGen, experimental/cost_model.py): fitted to
# runs on one T4 of a cloud machine, with the memories of its example.
T4 = FlexGenMachine(
    gpu_bytes=16 * _GIB,
    cpu_bytes=200 * _GIB,
    disk_bytes=1500 * _GIB,
    h2d_bytes_per_s=12.89 * _GIB,
    d2h_cache_bytes_per_s=0.97 * _GIB,
    d2h_hidden_bytes_per_s=4.82 * _GIB,
    disk_read_bytes_per_s=0.473 * _GIB,
    disk_cache_write_bytes_per_s=0.746 * _GIB,
    disk_decode_write_bytes_per_s=2.015 * _GIB,
    prefill_linear_flop_per_s=21.24e12,
    prefill_attention_flop_per_s=9.97e12,
    decode_linear_flop_per_s=4.3e12,
    decode_attention_flop_per_s=0.079e12,
    cpu_attention_flop_per_s=0.0123e12,
    small_batch_loss=0.0328,
    small_width_loss=0.0621,
    small_both_gain=0.0168,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptShape:
    """What of an OPT model FlexGen's formulas need; weights and activations are fp16."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int

    @property
    def layer_flop_per_token(self) -> int:
        """Of a layer's linear parts: 2 FLOPs for each of 4 h^2 + 2 h f weights."""
        return 8 * self.hidden_size**2 + 4 * self.hidden_size * self.ffn_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Sequences that pass through a layer before the next layer is loaded, and what runs them.

    `num_gpu_batches` batches of `gpu_batch_size` run one after the other in each layer (FlexGen's
    zig-zag schedule), so that a block reads each weight once.
    """

    model: OptShape
    machine: FlexGenMachine
    prompt_len: int
    output_len: int
    gpu_batch_size: int
    num_gpu_batches: int
    weight_bits: int = 16

    @property
    def num_seqs(self) -> int:
        return self.gpu_batch_size * self.num_gpu_batches

    @property
    def layer_weight_bytes(self) -> float:
        """Two bytes a weight at 16 bits: as many as the layer has FLOPs for a token."""
        return self.model.layer_flop_per_token * self.weight_bits / 16

    @property
    def hidden_bytes(self) -> int:
        """Activations of one token of every sequence."""
        return 2 * self.model.hidden_size * self.num_seqs

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token of every sequence in one layer."""
        return 2 * self.hidden_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Where weights, KV cache and activations live; what is left of 1 is on the CPU.

    Activations are never on the disk: FlexGen's runtime cannot put them there.
    """

    gpu_weights: float
    disk_weights: float
    gpu_cache: float
    disk_cache: float
    gpu_hidden: float

    @property
    def cpu_weights(self) -> float:
        return 1.0 - self.gpu_weights - self.disk_weights

    @property
    def cpu_cache(self) -> float:
        return 1.0 - self.gpu_cache - self.disk_cache

    @property
    def cpu_hidden(self) -> float:
        return 1.0 - self.gpu_hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A block with its shares, and the seconds that FlexGen's model predicts."""

    block: Block
    shares: Shares

    @property
    def prefill_s(self) -> float:
        """Of all layers: in each the slowest of copies in, copies out and products."""
        layer_s = max(prefill_lanes_s(self.block, self.shares))
        return layer_s * self.block.model.num_layers

    @property
    def decode_s(self) -> float:
        """Of all steps after the first token, all layers."""
        layer_s = max(decode_lanes_s(self.block, self.shares))
        return layer_s * self.block.model.num_layers * (self.block.output_len - 1)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of the block over all its seconds."""
        num_tokens = self.block.num_seqs * self.block.output_len
        return num_tokens / (self.prefill_s + self.decode_s)


def prefill_lanes_s(block: Block, shares: Shares) -> tuple[float, float, float]:
    """Seconds of a layer in prefill by what may bind it; they overlap.

    Returns
    -------
    tuple of float
        Disk to CPU to GPU; GPU to CPU to disk; products.
    """
    model, machine = block.model, block.machine
    hidden_bytes = block.prompt_len * block.hidden_bytes
    cache_bytes = (block.prompt_len + 1) * block.cache_bytes
    off_cache = shares.cpu_cache + shares.disk_cache

    to_gpu_bytes = _streamed_weight_bytes(block, shares) + hidden_bytes * shares.cpu_hidden
    read_bytes = block.layer_weight_bytes * shares.disk_weights
    in_s = to_gpu_bytes / machine.h2d_bytes_per_s + read_bytes / machine.disk_read_bytes_per_s

    out_s = cache_bytes * off_cache / machine.d2h_cache_bytes_per_s
    out_s += hidden_bytes * shares.cpu_hidden / machine.d2h_hidden_bytes_per_s
    out_s += cache_bytes * shares.disk_cache / machine.disk_cache_write_bytes_per_s

    linear_flops = block.num_seqs * block.prompt_len * model.layer_flop_per_token
    attention_flops = 4 * block.num_seqs * block.prompt_len**2 * model.hidden_size
    products_s = linear_flops / machine.prefill_linear_flop_per_s
    products_s += attention_flops / machine.prefill_attention_flop_per_s
    return in_s, out_s, products_s


def decode_lanes_s(block: Block, shares: Shares) -> tuple[float, float, float, float]:
    """Seconds of a layer in a decode step, by what may bind it.

    The copies to the GPU are in each, as in the released code; in the paper they overlap as in
    prefill. The context is the mean one. Attention runs where the cache lies, on the CPU also for
    what is on the disk.

    Returns
    -------
    tuple of float
        Each with the copies to the GPU: GPU to CPU; disk to CPU; CPU to disk; products.
    """
    model, machine = block.model, block.machine
    context = block.prompt_len + block.output_len / 2
    hidden_bytes = block.hidden_bytes * shares.cpu_hidden

    in_s = (_streamed_weight_bytes(block, shares) + hidden_bytes) / machine.h2d_bytes_per_s
    out_s = hidden_bytes / machine.d2h_hidden_bytes_per_s

    read_s = block.cache_bytes * context * shares.disk_cache / machine.disk_read_bytes_per_s
    read_bytes = block.layer_weight_bytes * shares.disk_weights
    # Weights in decode are read at 0.95 of the rate, by FlexGen's fit.
    read_s += read_bytes / (0.95 * machine.disk_read_bytes_per_s)
    written_bytes = block.cache_bytes * shares.disk_cache
    write_s = written_bytes / machine.disk_decode_write_bytes_per_s

    cpu_rate = machine.cpu_attention_rate(block.gpu_batch_size, model.hidden_size)
    attention_flops = 4 * block.num_seqs * context * model.hidden_size
    products_s = block.num_seqs * model.layer_flop_per_token / machine.decode_linear_flop_per_s
    products_s += attention_flops * shares.gpu_cache / machine.decode_attention_flop_per_s
    products_s += attention_flops * (shares.cpu_cache + shares.disk_cache) / cpu_rate
    return in_s + out_s, in_s + read_s, in_s + write_s, in_s + products_s


def free_bytes(block: Block, shares: Shares) -> tuple[float, float, float, float, float]:
    """Usable bytes that a block leaves: none negative where it fits.

    Returns
    -------
    tuple of float
        GPU in prefill, GPU in decode, CPU in prefill, CPU in decode, disk.
    """
    machine, share = block.machine, block.machine.usable_share
    gpu, cpu = share * machine.gpu_bytes, share * machine.cpu_bytes
    gpu_prefill, gpu_decode = _gpu_bytes(block, shares)
    cpu_prefill, cpu_decode = _cpu_bytes(block, shares)
    disk = _weight_bytes(block) * shares.disk_weights + _cache_bytes(block) * shares.disk_cache
    return (
        *(gpu - gpu_prefill, gpu - gpu_decode),
        *(cpu - cpu_prefill, cpu - cpu_decode),
        share * machine.disk_bytes - disk,
    )


def _gpu_bytes(block: Block, shares: Shares) -> tuple[float, float]:
    """In prefill and in decode: what lives there, two layers' weights, one batch at work."""
    home = _weight_bytes(block) * shares.gpu_weights + _cache_bytes(block) * shares.gpu_cache
    home += 2 * block.layer_weight_bytes * (1.0 - shares.gpu_weights)
    hidden = shares.gpu_hidden * block.hidden_bytes
    moved = shares.cpu_hidden * _batch_token_bytes(block)

    prefill = home + block.prompt_len * (hidden + moved) + _prefill_intermediate_bytes(block)
    cache_buffer = 2 * _length(block) * _batch_token_bytes(block) * shares.gpu_cache
    decode = home + hidden + moved + cache_buffer + _decode_intermediate_bytes(block, shares)
    return prefill, decode


def _cpu_bytes(block: Block, shares: Shares) -> tuple[float, float]:
    """In prefill and in decode: what lives there, and a layer's or a batch's buffers."""
    weights = _weight_bytes(block) * shares.cpu_weights
    hidden = shares.cpu_hidden * block.hidden_bytes
    token = _batch_token_bytes(block)

    prompt_cache = block.prompt_len * block.cache_bytes * block.model.num_layers
    prefill = weights + block.prompt_len * hidden + prompt_cache * shares.cpu_cache
    prefill += block.layer_weight_bytes * (1.0 - shares.gpu_weights)
    prefill += block.prompt_len * token * shares.cpu_hidden

    decode = weights + hidden + _cache_bytes(block) * shares.cpu_cache
    decode += block.layer_weight_bytes * shares.disk_weights
    decode += 4 * _length(block) * token * shares.disk_cache
    scores = 2 * block.model.num_heads * _length(block) * block.gpu_batch_size
    return prefill, decode + scores + token


def _length(block: Block) -> int:
    return block.prompt_len + block.output_len


def _weight_bytes(block: Block) -> float:
    return block.layer_weight_bytes * block.model.num_layers


def _cache_bytes(block: Block) -> int:
    """Of the longest context, all layers."""
    return _length(block) * block.cache_bytes * block.model.num_layers


def _batch_token_bytes(block: Block) -> int:
    """Activations of one token of each sequence of one GPU batch."""
    return 2 * block.model.hidden_size * block.gpu_batch_size


def _streamed_weight_bytes(block: Block, shares: Shares) -> float:
    return block.layer_weight_bytes * (shares.cpu_weights + shares.disk_weights)


def _prefill_intermediate_bytes(block: Block) -> int:
    """Of one batch on the GPU: queries to values, scores, attention's and the MLP's outputs."""
    hidden, prompt = block.model.hidden_size, block.prompt_len
    rows = (8 + 2 + 2 + 4 + 2) * hidden + 2 * block.model.ffn_size
    scores = 2 * block.model.num_heads * prompt**2
    return block.gpu_batch_size * (prompt * rows + scores)


def _decode_intermediate_bytes(block: Block, shares: Shares) -> float:
    hidden, length = block.model.hidden_size, _length(block)
    rows = (8 + 4 + 2) * hidden + 2 * block.model.ffn_size
    attention = 4 * hidden + 4 * length * hidden + 2 * block.model.num_heads * length
    return block.gpu_batch_size * (rows + attention * shares.gpu_cache)

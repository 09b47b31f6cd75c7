"""Attention kinds: what the token mixer of a layer weighs, computes and keeps of a sequence."""

# Matrices are (how many, rows, columns); H is the model's hidden size.

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Matrices = list[tuple[int, int, int]]
# Heads, KV heads and head size of ordinary attention; fractions where another kind equals it.
Heads = tuple[float, float, float]
_STATE_BYTES = 4  # a state is kept in float32


class GroupedAttention(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="grouped",
    tag_field="kind",
):
    """Softmax attention whose query heads share KV heads; all have their own where both agree.

    `value_dim` is the size of a value head where it is not `head_dim`; an output gate is one more
    projection of the queries' size.
    """

    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    value_dim: Size | None = None
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_output_gate: bool = False

    @property
    def _value_dim(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def own_heads(self) -> tuple[int, int, int]:
        """Heads, KV heads and head size as the model's configuration has them."""
        return (self.num_heads, self.num_kv_heads, self.head_dim)

    def matrices(self, hidden: int) -> Matrices:
        """The product with q, k, v and gate at once, and the output's."""
        output = self.num_heads * self._value_dim
        rows = self.num_heads * self.head_dim + self.kv_elements_per_token
        rows += output if self.has_output_gate else 0
        return [(1, rows, hidden), (1, hidden, output)]

    def num_vector_params(self, hidden: int) -> int:
        """Biases."""
        bias = hidden if self.has_o_bias else 0
        if self.has_qkv_bias:
            bias += self.num_heads * self.head_dim + self.kv_elements_per_token
        return bias

    @property
    def kv_elements_per_token(self) -> int:
        return self.num_kv_heads * (self.head_dim + self._value_dim)

    def state_bytes(self, dtype_bytes: int) -> int:
        """Nothing is kept of a sequence but the cache of its tokens."""
        return 0

    def heads(self, phase: Literal["prefill", "decode"]) -> Heads:
        """The mean of key and value size stands for both."""
        return (self.num_heads, self.num_kv_heads, (self.head_dim + self._value_dim) / 2)

    def seen_tokens(self, context: float, dtype_bytes: int) -> float:
        return context

    def score_flops(self, num_tokens: int, num_past_tokens: int, num_pairs: float) -> float:
        """2 * heads * (key size + value size) for each query and key that it sees."""
        return 2.0 * self.num_heads * (self.head_dim + self._value_dim) * num_pairs


class LatentAttention(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="latent",
    tag_field="kind",
):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache holds `kv_rank` latent elements of a token and `rope_dim` rotated ones, which all
    heads share; `q_rank` None: queries come from the hidden state at once.
    """

    num_heads: Size
    kv_rank: Size
    nope_dim: Size
    rope_dim: Size
    value_dim: Size
    q_rank: Size | None = None

    @property
    def own_heads(self) -> tuple[int, int, int]:
        """Every head has keys of its own, once the latent is widened."""
        return (self.num_heads, self.num_heads, self.nope_dim + self.rope_dim)

    @property
    def _widening(self) -> int:
        """Weights that widen a latent to keys and values; absorbed by queries and outputs."""
        return self.kv_rank * self.num_heads * (self.nope_dim + self.value_dim)

    def matrices(self, hidden: int) -> Matrices:
        """Queries (by way of their rank), latent, widening, output."""
        queries = self.num_heads * (self.nope_dim + self.rope_dim)
        latent = (1, self.kv_elements_per_token, hidden)
        wide = (1, self.num_heads * (self.nope_dim + self.value_dim), self.kv_rank)
        output = (1, hidden, self.num_heads * self.value_dim)
        if self.q_rank is None:
            return [(1, queries, hidden), latent, wide, output]
        return [(1, self.q_rank, hidden), (1, queries, self.q_rank), latent, wide, output]

    def num_vector_params(self, hidden: int) -> int:
        """Norms of the latents."""
        return self.kv_rank + (self.q_rank or 0)

    @property
    def kv_elements_per_token(self) -> int:
        return self.kv_rank + self.rope_dim

    def state_bytes(self, dtype_bytes: int) -> int:
        """Nothing is kept of a sequence but the cache of its tokens."""
        return 0

    def heads(self, phase: Literal["prefill", "decode"]) -> Heads:
        """Decode reads the latents, once for all heads; prefill widens them first."""
        if phase == "prefill":
            width = (self.nope_dim + self.rope_dim + self.value_dim) / 2
            return (self.num_heads, self.num_heads, width)
        width = self.kv_elements_per_token / 2
        return (self.num_heads * (2 * self.kv_rank + self.rope_dim) / (2 * width), 1, width)

    def seen_tokens(self, context: float, dtype_bytes: int) -> float:
        return context

    def score_flops(self, num_tokens: int, num_past_tokens: int, num_pairs: float) -> float:
        """The cheaper form: on latents as they are, or on keys and values made of all past ones.

        New tokens' latents are widened (or absorbed, which costs as much) in the products.
        """
        absorbed = 2.0 * self.num_heads * (2 * self.kv_rank + self.rope_dim) * num_pairs
        width = self.nope_dim + self.rope_dim + self.value_dim
        widened = 2.0 * self.num_heads * width * num_pairs + 2.0 * num_past_tokens * self._widening
        return min(absorbed, widened)


class RecurrentAttention(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="recurrent",
    tag_field="kind",
):
    """Linear attention with a state of `key_dim` by `value_dim` for each value head.

    Gated DeltaNet (arXiv 2412.06464) and Mamba-2 (arXiv 2405.21060; its groups are key heads and
    its state size is `key_dim`). `num_gates` numbers steer a value head: 2 and 1.
    """

    num_key_heads: Size
    num_value_heads: Size
    key_dim: Size
    value_dim: Size
    num_gates: Size
    conv_width: Size = 4

    @property
    def own_heads(self) -> tuple[int, int, int]:
        return (self.num_value_heads, self.num_value_heads, self.value_dim)

    @property
    def _conv_channels(self) -> int:
        keys = self.num_key_heads * self.key_dim
        return 2 * keys + self.num_value_heads * self.value_dim

    def matrices(self, hidden: int) -> Matrices:
        """Queries, keys, values, output gate and steering numbers at once; the output's."""
        values = self.num_value_heads * self.value_dim
        rows = self._conv_channels + values + self.num_gates * self.num_value_heads
        return [(1, rows, hidden), (1, hidden, values)]

    def num_vector_params(self, hidden: int) -> int:
        """The convolution, a decay and a bias for each head, the norm of the output."""
        return self.conv_width * self._conv_channels + 2 * self.num_value_heads + self.value_dim

    @property
    def kv_elements_per_token(self) -> int:
        return 0

    @property
    def _state(self) -> int:
        return self.num_value_heads * self.key_dim * self.value_dim

    def state_bytes(self, dtype_bytes: int) -> int:
        """The state, and the inputs that the convolution still needs."""
        return (
            self._state * _STATE_BYTES + (self.conv_width - 1) * self._conv_channels * dtype_bytes
        )

    def heads(self, phase: Literal["prefill", "decode"]) -> Heads:
        """The value heads; the state is as long as `seen_tokens` says."""
        return self.own_heads

    def seen_tokens(self, context: float, dtype_bytes: int) -> float:
        """Tokens whose keys and values are as many bytes as reading and writing the state.

        2 * heads * value_dim * dtype bytes * tokens = 2 * heads * key_dim * value_dim * 4 bytes;
        in bfloat16 their scores and values are the FLOPs of `score_flops` too.
        """
        return self.key_dim * _STATE_BYTES / dtype_bytes

    def score_flops(self, num_tokens: int, num_past_tokens: int, num_pairs: float) -> float:
        """Decay, read, write and output of the state for each token: 8 FLOPs an element."""
        return 8.0 * self._state * num_tokens


class MambaMixer(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="mamba",
    tag_field="kind",
):
    """Mamba's selective state space (arXiv 2312.00752): `state_dim` numbers for each channel."""

    num_channels: Size
    state_dim: Size
    step_rank: Size
    conv_width: Size = 4

    @property
    def own_heads(self) -> tuple[int, int, int]:
        return (1, 1, self.num_channels)

    def matrices(self, hidden: int) -> Matrices:
        """Input and gate, what steers the state, step sizes, output."""
        return [
            (1, 2 * self.num_channels, hidden),
            (1, self.step_rank + 2 * self.state_dim, self.num_channels),
            (1, self.num_channels, self.step_rank),
            (1, hidden, self.num_channels),
        ]

    def num_vector_params(self, hidden: int) -> int:
        """Convolution with bias, bias of the steps, decays, skip."""
        return self.num_channels * (self.conv_width + 3 + self.state_dim)

    @property
    def kv_elements_per_token(self) -> int:
        return 0

    def state_bytes(self, dtype_bytes: int) -> int:
        """The state, and the inputs that the convolution still needs."""
        conv = (self.conv_width - 1) * self.num_channels * dtype_bytes
        return self.num_channels * self.state_dim * _STATE_BYTES + conv

    def heads(self, phase: Literal["prefill", "decode"]) -> Heads:
        """One head of all channels; the state is as long as `seen_tokens` says."""
        return self.own_heads

    def seen_tokens(self, context: float, dtype_bytes: int) -> float:
        """Tokens whose keys and values are as many bytes as reading and writing the state."""
        return self.state_dim * _STATE_BYTES / dtype_bytes

    def score_flops(self, num_tokens: int, num_past_tokens: int, num_pairs: float) -> float:
        """Decay, write and output of the state for each token: 8 FLOPs an element."""
        return 8.0 * self.num_channels * self.state_dim * num_tokens


class CompressedAttention(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="compressed",
    tag_field="kind",
):
    """DeepSeek-V4: one entry that is key and value of all heads, kept for a window of tokens.

    Beyond the window a query sees one entry for every `ratio` tokens (none where it is None), at
    most `max_entries` of them where an indexer of `index_heads` heads of `index_dim` chooses.
    """

    num_heads: Size
    head_dim: Size
    q_rank: Size
    o_rank: Size
    num_o_groups: Size
    window: Size
    ratio: Size | None = None
    max_entries: Size | None = None
    index_heads: Annotated[int, Meta(ge=0)] = 0
    index_dim: Annotated[int, Meta(ge=0)] = 0

    @property
    def own_heads(self) -> tuple[int, int, int]:
        return (self.num_heads, 1, self.head_dim)

    def matrices(self, hidden: int) -> Matrices:
        """Queries, entries, grouped output; compressor and indexer where there are any."""
        queries = self.num_heads * self.head_dim
        found = [
            (1, self.q_rank, hidden),
            (1, queries, self.q_rank),
            (1, self.head_dim, hidden),
            (self.num_o_groups, self.o_rank, queries // self.num_o_groups),
            (1, hidden, self.num_o_groups * self.o_rank),
        ]
        if self.ratio is not None:
            # values and gates; windows overlap, which doubles both, where an indexer chooses
            times = 4 if self.index_heads else 2
            found.append((1, times * (self.head_dim + self.index_dim), hidden))
        if self.index_heads:
            found.append((1, self.index_heads * self.index_dim, self.q_rank))
            found.append((1, self.index_heads, hidden))
        return found

    def num_vector_params(self, hidden: int) -> int:
        """Norms of queries and entries."""
        return self.q_rank + self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Entries of compressed tokens and of the indexer, rounded up."""
        if self.ratio is None:
            return 0
        return -(-(self.head_dim + self.index_dim) // self.ratio)

    def state_bytes(self, dtype_bytes: int) -> int:
        """The window's entries."""
        return self.window * self.head_dim * dtype_bytes

    def heads(self, phase: Literal["prefill", "decode"]) -> Heads:
        """Entries count once, as keys, and are multiplied twice."""
        return (2 * self.num_heads, 1, self.head_dim / 2)

    def seen_tokens(self, context: float, dtype_bytes: int) -> float:
        """Entries that a query of a context multiplies with; the indexer's scores are left out."""
        seen = min(context, self.window)
        if self.ratio is not None:
            entries = context / self.ratio
            seen += entries if self.max_entries is None else min(entries, self.max_entries)
        return seen

    def score_flops(self, num_tokens: int, num_past_tokens: int, num_pairs: float) -> float:
        """4 * heads * head_dim for each entry that a query sees, at the mean context."""
        context = num_past_tokens + (num_tokens + 1) / 2
        return 4.0 * self.num_heads * self.head_dim * num_tokens * self.seen_tokens(context, 2)


Attention = (
    GroupedAttention | LatentAttention | RecurrentAttention | MambaMixer | CompressedAttention
)

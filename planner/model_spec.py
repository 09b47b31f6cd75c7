"""ModelSpec: the shapes of a decoder, and from them bytes and FLOPs of every placeable module."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import msgspec

from planner.attention_kinds import Attention, Heads

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4"]
WeightKind = Dtype | Quantization
Module = Literal["embedding", "attention", "router", "experts", "dense", "head"]
QkNorm = Literal["none", "head", "full"]

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# What a fingerprint leaves out where it has this value: plans from before it was there stay valid.
_LATER_FACTS: dict[str, object] = {"quantization": None, "num_learned_positions": 0}
_LATER_LAYER_FACTS: dict[str, object] = {
    "shared_size": 0,
    "num_ffn_matrices": 3,
    "attention": None,
}

# Neighbours along a row that share a scale, as GPTQ and AWQ have it: int4 then takes 4.125 bits.
QUANTIZATION_GROUP = 128
# Shares of columns that a dense feed-forward can be divided into between the devices.
DENSE_SHARES = 16
# Rows and columns of whole panels of any format (cpu_kernels/formats.py).
_PANEL_COLUMNS = 32
_SCALE_BYTES = 2
_CODE_BITS: dict[Quantization, int] = {"int8": 8, "int4": 4}

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: base, and how the frequencies are stretched.

    `llama3` follows the frequency bands of Llama 3.1 (config key `rope_scaling`); `linear` divides
    every frequency by `factor`.
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: its attention and its feed-forward.

    Attributes
    ----------
    intermediate_size : int
        Width of the dense feed-forward, or of one expert where `num_experts` > 0; a dense layer of
        width 0 has an attention only.
    window : int or None
        Tokens that a query sees, itself included, the last ones or chosen ones; None is all.
    shared_size : int
        Width of the feed-forward that every token takes beside the experts: shared experts side by
        side, or a dense one in parallel. It is computed where the router is, so it is part of the
        module `router`, in bytes, FLOPs and placement.
    num_ffn_matrices : int
        3 where a gate is multiplied in (gate, up, down), 2 where not (up, down).
    attention : Attention or None
        None is the grouped attention of the model's own heads, as the supported families have it.
    """

    intermediate_size: int
    num_experts: int = 0
    num_experts_per_token: int = 0
    window: int | None = None
    shared_size: int = 0
    num_ffn_matrices: Literal[2, 3] = 3
    attention: Attention | None = None

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def modules(self) -> tuple[Module, ...]:
        return ("attention", "router", "experts") if self.is_moe else ("attention", "dense")


# No slots: what is worked out once stays with the spec.
@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shapes and formats of a causal decoder; everything the planner knows of a model.

    Examples
    --------
    >>> spec = ModelSpec(name="toy", architecture="LlamaForCausalLM", dtype="bfloat16",
    ...     hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=10,
    ...     max_position_embeddings=32, layers=(LayerSpec(intermediate_size=16),),
    ...     rope=RopeSpec(theta=1e4), is_tied=True)
    >>> spec.kv_bytes_per_token(0)  # 2 (K and V) * 1 head * 4 * 2 bytes
    16
    """

    name: str
    architecture: str
    dtype: Dtype
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec
    is_tied: bool
    norm_eps: float = 1e-6
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    qk_norm: QkNorm = "none"
    clip_qkv: float | None = None
    norm_topk_prob: bool = True
    quantization: Quantization | None = None
    # Positions with an embedding of their own, which is added to a token's; rotary models have 0.
    num_learned_positions: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over every shape and format, the name left out."""
        facts = asdict(self)
        del facts["name"]
        _drop_defaults(facts, _LATER_FACTS)
        for layer in facts["layers"]:
            _drop_defaults(layer, _LATER_LAYER_FACTS)
        return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:16]

    def num_params(self, module: Module, layer: int | None = None) -> int:
        """Number of weights of one module; `layer` is needed for modules inside a layer.

        A layer's norms belong to the module that reads them (input norm: attention; post-attention
        norm: router or dense; final norm: head). A tied head counts its matrix again: it is stored
        once where embedding and head share a device (`memory.py`).
        """
        hidden = self.hidden_size
        if module == "embedding":
            return (self.vocab_size + self.num_learned_positions) * hidden
        if module == "head":
            return self.vocab_size * hidden + hidden
        assert layer is not None, f"{module} lies inside a layer"
        this = self.layers[layer]
        matrices = sum(count * rows * cols for count, rows, cols in self.matrices(module, layer))
        if module == "experts":
            return matrices
        return matrices + self._num_vector_params(module, this) + hidden  # and the norm

    def _num_vector_params(self, module: Module, layer: LayerSpec) -> int:
        """Biases and inner norms of a module of a layer."""
        if module == "router":
            return 0
        if module == "dense":
            bias = (layer.num_ffn_matrices - 1) * layer.intermediate_size + self.hidden_size
            return bias if self.has_mlp_bias else 0
        if layer.attention is not None:
            return layer.attention.num_vector_params(self.hidden_size)
        bias = (self.q_size + 2 * self.kv_size) if self.has_qkv_bias else 0
        bias += self.hidden_size if self.has_o_bias else 0
        norms = {"none": 0, "head": 2 * self.head_dim, "full": self.q_size + self.kv_size}
        return bias + norms[self.qk_norm]

    def expert_params(self, layer: int) -> int:
        """Weights of one expert (gate, up, down) of a layer."""
        this = self.layers[layer]
        return this.num_ffn_matrices * self.hidden_size * this.intermediate_size

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one expert (gate, up, down) of a layer."""
        return self.weight_bytes("experts", layer) // self.layers[layer].num_experts

    def dense_columns(self, layer: int, num_shares: int) -> int:
        """Columns in the first `num_shares` of the `DENSE_SHARES` of a dense feed-forward.

        A column is a row of gate and up and a column of down. Groups of quantised weights stay
        whole, and in all but tiny models the panels that the CPU's kernels read.
        """
        width = self.layers[layer].intermediate_size
        columns = width * num_shares // DENSE_SHARES
        if num_shares == DENSE_SHARES:
            return columns
        whole = _PANEL_COLUMNS if width >= DENSE_SHARES * _PANEL_COLUMNS else 1
        return columns - columns % (whole if self.quantization is None else QUANTIZATION_GROUP)

    def can_divide(self, layer: int, num_shares: int) -> bool:
        """Are there columns in the first shares of a layer's dense feed-forward, and in the rest?

        One with biases is not divided: each part would add them.
        """
        this = self.layers[layer]
        if this.is_moe or self.has_mlp_bias:
            return False
        return 0 < self.dense_columns(layer, num_shares) < this.intermediate_size

    def part_bytes(self, module: Module, layer: int, num_resident: int) -> tuple[int, int]:
        """Bytes of experts, or of a dense feed-forward, in residents and in all others.

        `num_resident` counts experts, or shares of columns; each part of a dense feed-forward has a
        norm.
        """
        if module == "experts":
            each = self.expert_bytes(layer)
            return num_resident * each, (self.layers[layer].num_experts - num_resident) * each
        columns = self.dense_columns(layer, num_resident)
        others = self.layers[layer].intermediate_size - columns
        return (
            self.weight_bytes(module, layer, columns),
            self.weight_bytes(module, layer, others),
        )

    def gated_size(self, layer: int, columns: int | None = None) -> float:
        """Width of the gate, up and down that have as many weights as a layer's feed-forward.

        Or as some columns of it.
        """
        this = self.layers[layer]
        width = this.intermediate_size if columns is None else columns
        return width * this.num_ffn_matrices / 3

    def weight_kind(self, module: Module) -> WeightKind:
        """How a module's matrices are stored: embedding and router are never quantised.

        The head of an int4 model is int8: it is read once a token and decides every one. A router
        with shared experts is nearly all shared experts, and stored as experts are.
        """
        is_small = module == "router" and not any(layer.shared_size for layer in self.layers)
        if self.quantization is None or module == "embedding" or is_small:
            return self.dtype
        return "int8" if module == "head" else self.quantization

    def weight_bytes(
        self, module: Module, layer: int | None = None, columns: int | None = None
    ) -> int:
        """Bytes of one module's weights in the model's format, scales included.

        Of some columns of a dense feed-forward: with its norm.
        """
        key = (module, layer, columns)
        if key not in self._known_bytes:
            self._known_bytes[key] = self._weight_bytes(*key)
        return self._known_bytes[key]

    @cached_property
    def _known_bytes(self) -> dict[tuple[Module, int | None, int | None], int]:
        return {}

    def _weight_bytes(self, module: Module, layer: int | None, columns: int | None) -> int:
        kind = self.weight_kind(module)
        others = self.num_params(module, layer)
        others -= sum(count * rows * size for count, rows, size in self.matrices(module, layer))
        total = others * self.dtype_bytes
        matrices = self.matrices(module, layer, columns)
        return total + sum(count * matrix_bytes(kind, *shape) for count, *shape in matrices)

    def matrices(
        self, module: Module, layer: int | None, columns: int | None = None
    ) -> list[tuple[int, int, int]]:
        """(how many, rows, columns) of a module's matrices; of some columns of a feed-forward."""
        hidden = self.hidden_size
        if module in ("embedding", "head"):
            return [(1, self.vocab_size, hidden)]
        assert layer is not None, f"{module} lies inside a layer"
        this = self.layers[layer]
        if module == "attention":
            if this.attention is not None:
                return this.attention.matrices(hidden)
            return [(1, self.q_size + 2 * self.kv_size, hidden), (1, hidden, self.q_size)]
        if module == "router":
            shared = _ffn_matrices(1, this.shared_size, hidden, this.num_ffn_matrices)
            return [(1, this.num_experts, hidden), *shared]
        count = this.num_experts if module == "experts" else 1
        width = this.intermediate_size if columns is None else columns
        return _ffn_matrices(count, width, hidden, this.num_ffn_matrices)

    @property
    def shares_head(self) -> bool:
        """Is one matrix both embedding and head? Not where the head is quantised."""
        return self.is_tied and self.quantization is None

    @property
    def tied_bytes(self) -> int:
        """Bytes that embedding and head share where they lie on one device."""
        return self.vocab_size * self.hidden_size * self.dtype_bytes if self.shares_head else 0

    def total_weight_bytes(self) -> int:
        """Bytes of all weights, a tied embedding matrix counted once."""
        total = self.weight_bytes("embedding") + self.weight_bytes("head")
        total -= self.tied_bytes
        for index, layer in enumerate(self.layers):
            total += sum(self.weight_bytes(module, index) for module in layer.modules)
        return total

    def kv_bytes_per_token(self, layer: int) -> int:
        """Bytes that one token adds to one layer's KV cache: 2 (K and V) * kv heads * head dim.

        Latent attention adds its latent, a layer with a state nothing. A window does not shorten
        the cache: the engine keeps all tokens.
        """
        assert 0 <= layer < self.num_layers
        attention = self.layers[layer].attention
        elements = 2 * self.kv_size if attention is None else attention.kv_elements_per_token
        return elements * self.dtype_bytes

    def state_bytes(self, layer: int) -> int:
        """Bytes that one layer keeps of a sequence whatever its length."""
        attention = self.layers[layer].attention
        return 0 if attention is None else attention.state_bytes(self.dtype_bytes)

    def attention_heads(self, layer: int, phase: Literal["prefill", "decode"] = "decode") -> Heads:
        """Heads, KV heads and head size of the ordinary attention that a layer's equals in cost.

        4 * heads * head size are the FLOPs of scores and values for each token that a query sees,
        2 * KV heads * head size the elements that are read of it (`seen_tokens` counts them).
        Other kinds than grouped attention have fractions.
        """
        attention = self.layers[layer].attention
        if attention is None:
            return (self.num_heads, self.num_kv_heads, self.head_dim)
        return attention.heads(phase)

    def seen_tokens(self, layer: int, context: float) -> float:
        """Tokens that a query of a context sees, itself included, in those of `attention_heads`.

        A state is as many as make its bytes, whatever the context.
        """
        this = self.layers[layer]
        seen = context if this.window is None else min(this.window, context)
        if this.attention is None:
            return seen
        return this.attention.seen_tokens(seen, self.dtype_bytes)

    def flops(self, module: Module, num_tokens: int, layer: int | None = None) -> float:
        """FLOPs of a module's matrix products for `num_tokens` tokens (2 per multiply-add).

        Attention counts its projections only; scores and values depend on the context and are in
        `attention_flops`. Experts count the chosen experts only.
        """
        if module == "embedding":
            return 0.0
        if module == "experts":
            assert layer is not None, f"{module} lies inside a layer"
            chosen = self.layers[layer].num_experts_per_token
            return 2.0 * num_tokens * chosen * self.expert_params(layer)
        matrices = self.matrices(module, layer)
        return 2.0 * num_tokens * sum(count * rows * columns for count, rows, columns in matrices)

    def attention_flops(self, layer: int, num_tokens: int, num_past_tokens: int) -> float:
        """FLOPs of scores and values of `num_tokens` new tokens of one sequence after a past.

        Causal: 4 * heads * head_dim * (c*p + c(c+1)/2); a window w cuts each
        query's keys to w. Other kinds of attention by their own formulas (`attention_kinds.py`).
        """
        this = self.layers[layer]
        window = this.window
        num_growing = num_tokens  # queries that still see everything before them
        if window is not None:
            num_growing = min(num_tokens, max(0, window - num_past_tokens))
        pairs = num_growing * num_past_tokens + num_growing * (num_growing + 1) / 2
        pairs += (num_tokens - num_growing) * (window or 0)
        if this.attention is None:
            return 4.0 * self.q_size * pairs
        return this.attention.score_flops(num_tokens, num_past_tokens, pairs)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], *, name: str, dtype: Dtype | None = None
    ) -> ModelSpec:
        """Read a Hugging Face `config.json` that was decoded to a dict.

        Parameters
        ----------
        config : dict
            The decoded file. Keys that hetero does not need are ignored, as the dialect has
            hundreds; keys that change the computation and are not supported are refused.
        name : str
            What the model is called in messages.
        dtype : Dtype, optional
            Overrides the dtype of the config.

        Raises
        ------
        ModelSpecError
            Unknown architecture, missing or out-of-range value, unsupported feature: one sentence
            that names the key and both values.
        """
        # Here because model_config builds on this file.
        from planner.model_config import read_config

        return read_config(config, name=name, dtype=dtype)


def _drop_defaults(facts: dict[str, Any], defaults: dict[str, object]) -> None:
    for name, default in defaults.items():
        if facts[name] == default:
            del facts[name]


def _ffn_matrices(
    count: int, width: int, hidden: int, num_matrices: int
) -> list[tuple[int, int, int]]:
    """(how many, rows, columns) of some feed-forwards of one width; none of width 0."""
    if width == 0:
        return []
    return [((num_matrices - 1) * count, width, hidden), (count, hidden, width)]


def matrix_bytes(kind: WeightKind, num_rows: int, num_columns: int) -> int:
    """Bytes of a matrix; of a quantised one with a scale for every group of a row."""
    if kind == "int8" or kind == "int4":
        num_groups = -(-num_columns // QUANTIZATION_GROUP)
        row_bytes = -(-num_columns * _CODE_BITS[kind] // 8) + num_groups * _SCALE_BYTES
        return num_rows * row_bytes
    return num_rows * num_columns * DTYPE_BYTES[kind]

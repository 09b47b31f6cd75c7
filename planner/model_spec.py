"""ModelSpec: the shapes of a decoder, and from them bytes and FLOPs of every placeable module."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4"]
WeightKind = Dtype | Quantization
Module = Literal["embedding", "attention", "router", "experts", "dense", "head"]
QkNorm = Literal["none", "head", "full"]

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# Neighbours along a row that share a scale, as GPTQ and AWQ have it: int4 then takes 4.125 bits.
QUANTIZATION_GROUP = 128
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
    """One decoder layer: its feed-forward kind and its attention window.

    `intermediate_size` is the width of the dense feed-forward, or of one expert where
    `num_experts` > 0. `window` is the number of tokens a query sees, itself included; None is all.
    """

    intermediate_size: int
    num_experts: int = 0
    num_experts_per_token: int = 0
    window: int | None = None

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def modules(self) -> tuple[Module, ...]:
        return ("attention", "router", "experts") if self.is_moe else ("attention", "dense")


@dataclass(frozen=True, slots=True, kw_only=True)
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
        if self.quantization is None:  # as before there was any
            del facts["quantization"]
        return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:16]

    def num_params(self, module: Module, layer: int | None = None) -> int:
        """Number of weights of one module; `layer` is needed for modules inside a layer.

        A layer's norms belong to the module that reads them (input norm: attention; post-attention
        norm: router or dense; final norm: head). A tied head counts its matrix again: it is stored
        once where embedding and head share a device (`memory.py`).
        """
        hidden = self.hidden_size
        if module == "embedding":
            return self.vocab_size * hidden
        if module == "head":
            return self.vocab_size * hidden + hidden
        assert layer is not None, f"{module} lies inside a layer"
        this = self.layers[layer]
        if module == "attention":
            bias = (self.q_size + 2 * self.kv_size) if self.has_qkv_bias else 0
            bias += hidden if self.has_o_bias else 0
            norms = {
                "none": 0,
                "head": 2 * self.head_dim,
                "full": self.q_size + self.kv_size,
            }[self.qk_norm]
            return hidden * (2 * self.q_size + 2 * self.kv_size) + bias + norms + hidden
        if module == "router":
            return this.num_experts * hidden + hidden
        if module == "experts":
            return this.num_experts * self.expert_params(layer)
        bias = (2 * this.intermediate_size + hidden) if self.has_mlp_bias else 0
        return 3 * hidden * this.intermediate_size + bias + hidden

    def expert_params(self, layer: int) -> int:
        """Weights of one expert (gate, up, down) of a layer."""
        return 3 * self.hidden_size * self.layers[layer].intermediate_size

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one expert (gate, up, down) of a layer."""
        hidden, width = self.hidden_size, self.layers[layer].intermediate_size
        kind = self.weight_kind("experts")
        return 2 * _matrix_bytes(kind, width, hidden) + _matrix_bytes(kind, hidden, width)

    def weight_kind(self, module: Module) -> WeightKind:
        """How a module's matrices are stored: embedding and router are never quantised.

        The head of an int4 model is int8: it is read once a token and decides every one.
        """
        if self.quantization is None or module in ("embedding", "router"):
            return self.dtype
        return "int8" if module == "head" else self.quantization

    def weight_bytes(self, module: Module, layer: int | None = None) -> int:
        """Bytes of one module's weights in the model's format, scales included."""
        kind = self.weight_kind(module)
        matrices = self._matrices(module, layer)
        others = self.num_params(module, layer)
        others -= sum(count * rows * columns for count, rows, columns in matrices)
        total = others * self.dtype_bytes
        return total + sum(count * _matrix_bytes(kind, *shape) for count, *shape in matrices)

    def _matrices(self, module: Module, layer: int | None) -> list[tuple[int, int, int]]:
        """(how many, rows, columns) of a module's matrices."""
        hidden = self.hidden_size
        if module in ("embedding", "head"):
            return [(1, self.vocab_size, hidden)]
        assert layer is not None, f"{module} lies inside a layer"
        this = self.layers[layer]
        if module == "attention":
            return [(1, self.q_size + 2 * self.kv_size, hidden), (1, hidden, self.q_size)]
        if module == "router":
            return [(1, this.num_experts, hidden)]
        count = this.num_experts if module == "experts" else 1
        width = this.intermediate_size
        return [(2 * count, width, hidden), (count, hidden, width)]

    @property
    def shares_head(self) -> bool:
        """Is one matrix both embedding and head? Not where the head is quantised."""
        return self.is_tied and self.quantization is None

    def total_weight_bytes(self) -> int:
        """Bytes of all weights, a tied embedding matrix counted once."""
        total = self.weight_bytes("embedding") + self.weight_bytes("head")
        if self.shares_head:
            total -= self.weight_bytes("embedding")
        for index, layer in enumerate(self.layers):
            total += sum(self.weight_bytes(module, index) for module in layer.modules)
        return total

    def kv_bytes_per_token(self, layer: int) -> int:
        """Bytes that one token adds to one layer's KV cache: 2 (K and V) * kv heads * head dim."""
        assert 0 <= layer < self.num_layers
        return 2 * self.kv_size * self.dtype_bytes

    def flops(self, module: Module, num_tokens: int, layer: int | None = None) -> float:
        """FLOPs of a module's matrix products for `num_tokens` tokens (2 per multiply-add).

        Attention counts its projections only; scores and values depend on the context and are in
        `attention_flops`. Experts count the chosen experts only.
        """
        hidden = self.hidden_size
        if module == "embedding":
            return 0.0
        if module == "head":
            return 2.0 * num_tokens * hidden * self.vocab_size
        assert layer is not None, f"{module} lies inside a layer"
        this = self.layers[layer]
        if module == "attention":
            return 2.0 * num_tokens * hidden * (2 * self.q_size + 2 * self.kv_size)
        if module == "router":
            return 2.0 * num_tokens * hidden * this.num_experts
        width = this.intermediate_size
        if module == "experts":
            width *= this.num_experts_per_token
        return 6.0 * num_tokens * hidden * width

    def attention_flops(self, layer: int, num_tokens: int, num_past_tokens: int) -> float:
        """FLOPs of scores and values of `num_tokens` new tokens of one sequence after a past.

        Causal: 4 * heads * head_dim * (c*p + c(c+1)/2); a window w cuts each
        query's keys to w.
        """
        window = self.layers[layer].window
        num_growing = num_tokens  # queries that still see everything before them
        if window is not None:
            num_growing = min(num_tokens, max(0, window - num_past_tokens))
        pairs = num_growing * num_past_tokens + num_growing * (num_growing + 1) / 2
        pairs += (num_tokens - num_growing) * (window or 0)
        return 4.0 * self.q_size * pairs

    def distinct_experts(self, layer: int, num_tokens: float) -> float:
        """Expected number of different experts that `num_tokens` tokens choose.

        Independent uniform choices: E (1 - (1 - k/E)^T).
        """
        this = self.layers[layer]
        if not this.is_moe or num_tokens <= 0:
            return 0.0
        miss = 1.0 - this.num_experts_per_token / this.num_experts
        return float(this.num_experts * (1.0 - miss**num_tokens))

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


def _matrix_bytes(kind: WeightKind, num_rows: int, num_columns: int) -> int:
    """Bytes of a matrix; of a quantised one with a scale for every group of a row."""
    if kind == "int8" or kind == "int4":
        num_groups = -(-num_columns // QUANTIZATION_GROUP)
        row_bytes = -(-num_columns * _CODE_BITS[kind] // 8) + num_groups * _SCALE_BYTES
        return num_rows * row_bytes
    return num_rows * num_columns * DTYPE_BYTES[kind]

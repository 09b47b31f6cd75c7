"""config.json -> ModelSpec, by the rules of each family; the file is untrusted."""

from __future__ import annotations

from typing import Any

from planner.config_json import ConfigReader, shown
from planner.errors import ModelSpecError
from planner.model_spec import (
    ARCHITECTURES,
    DTYPE_BYTES,
    Dtype,
    LayerSpec,
    ModelSpec,
    QkNorm,
    RopeSpec,
)

# The values that transformers' configuration classes fill in where a config leaves a key out.
_DEFAULT_KV_HEADS = {
    "MistralForCausalLM": 8,
    "MixtralForCausalLM": 8,
    "Qwen2ForCausalLM": 32,
    "Qwen3ForCausalLM": 32,
    "Qwen3MoeForCausalLM": 4,
}
_DEFAULT_WINDOW = {
    "MistralForCausalLM": 4096,
    "Qwen2ForCausalLM": 4096,
    "Qwen3ForCausalLM": 4096,
    "Qwen3MoeForCausalLM": 4096,
}

# Features of forks that keep a supported architecture's name but compute something else.
_FOREIGN_KEYS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "kv_lora_rank",
    "n_shared_experts",
    "scale_factor",
    "shared_expert_intermediate_size",
)

# Bounds on what a config may ask for: config.json is untrusted, and a product of its numbers is an
# allocation.
_MAX_LAYERS = 1024
_MAX_EXPERTS = 4096
_MAX_VOCAB = 1 << 24
_MAX_POSITION = 1 << 26


def read_config(values: dict[str, Any], *, name: str, dtype: Dtype | None = None) -> ModelSpec:
    """Read a decoded config.json; `ModelSpec.from_config` says the rest."""
    if not isinstance(values, dict):
        raise ModelSpecError(f"config.json is {shown(values)} but must be an object")
    config = ConfigReader(values)
    architecture = _architecture(config)
    if config.values.get("quantization_config") is not None:
        raise ModelSpecError(
            "config.json: quantization_config is set but quantised checkpoints are not supported; "
            "use the bfloat16 weights of the model"
        )
    for key in _FOREIGN_KEYS:
        if config.values.get(key) not in (None, False, 0, 1):
            raise ModelSpecError(
                f"config.json: {key} is {shown(config.values[key])}, which {architecture} does "
                "not have: the model is a fork that is not supported"
            )
    activation = config.values.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelSpecError(f"config.json: hidden_act is {shown(activation)}, supported is 'silu'")
    num_heads = config.integer("num_attention_heads")
    default_kv_heads = num_heads
    if "num_key_value_heads" not in config.values:
        default_kv_heads = _DEFAULT_KV_HEADS.get(architecture, num_heads)
    num_kv_heads = config.integer("num_key_value_heads", default=default_kv_heads)
    hidden_size = config.integer("hidden_size")
    if num_heads % num_kv_heads:
        raise ModelSpecError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    head_dim = _head_dim(config, architecture, hidden_size, num_heads)
    # Mistral, Mixtral and Qwen2 have no such switch: their biases are fixed by the family.
    attention_bias = config.flag("attention_bias", False) and architecture in (
        "LlamaForCausalLM",
        "OlmoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    )
    qk_norm: QkNorm = "none"
    if architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"):
        qk_norm = "head"
    elif architecture == "OlmoeForCausalLM":
        qk_norm = "full"
    is_mixtral = architecture == "MixtralForCausalLM"
    clip = config.values.get("clip_qkv") if architecture == "OlmoeForCausalLM" else None
    # What a config leaves out is what the family's own configuration class fills in.
    default_eps = 1e-5 if architecture in ("MixtralForCausalLM", "OlmoeForCausalLM") else 1e-6
    return ModelSpec(
        name=name,
        architecture=architecture,
        dtype=dtype or _dtype(config),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=config.integer("vocab_size", limit=_MAX_VOCAB),
        max_position_embeddings=config.integer("max_position_embeddings", limit=_MAX_POSITION),
        layers=_layers(config, architecture),
        rope=_rope(config, architecture),
        is_tied=config.flag("tie_word_embeddings", False),
        norm_eps=config.number("rms_norm_eps", default_eps),
        has_qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
        has_o_bias=attention_bias,
        has_mlp_bias=architecture == "LlamaForCausalLM" and config.flag("mlp_bias", False),
        qk_norm=qk_norm,
        clip_qkv=None if clip is None else config.number("clip_qkv", 1.0),
        norm_topk_prob=is_mixtral or config.flag("norm_topk_prob", False),
    )


def _architecture(config: ConfigReader) -> str:
    names = config.strings("architectures")
    supported = ", ".join(ARCHITECTURES)
    if not names:
        raise ModelSpecError(f"config.json: architectures is missing; supported: {supported}")
    if names[0] not in ARCHITECTURES:
        raise ModelSpecError(
            f"config.json: architecture {shown(names[0])} is not supported; supported: {supported}"
        )
    return names[0]


def _head_dim(config: ConfigReader, architecture: str, hidden_size: int, num_heads: int) -> int:
    if architecture == "Qwen3ForCausalLM":
        # Qwen3 configurations that leave head_dim out mean 128, whatever hidden_size says.
        head_dim = config.integer("head_dim", default=128)
    elif config.values.get("head_dim") is None and hidden_size % num_heads:
        raise ModelSpecError(
            f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads "
            f"{num_heads} and head_dim is missing"
        )
    else:
        head_dim = config.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise ModelSpecError(f"config.json: head_dim is {head_dim} but rotary needs an even one")
    if architecture == "OlmoeForCausalLM" and num_heads * head_dim != hidden_size:
        # Its query norm spans hidden_size.
        raise ModelSpecError(
            f"config.json: {num_heads} heads of head_dim {head_dim} do not make the hidden_size "
            f"{hidden_size}, which {architecture} needs"
        )
    return head_dim


def _dtype(config: ConfigReader) -> Dtype:
    value = config.values.get("dtype") or config.values.get("torch_dtype") or "float32"
    for dtype in DTYPE_BYTES:
        if value == dtype:
            return dtype
    raise ModelSpecError(
        f"config.json: dtype is {shown(value)}; supported: {', '.join(sorted(DTYPE_BYTES))}"
    )


def _layers(config: ConfigReader, architecture: str) -> tuple[LayerSpec, ...]:
    num_layers = config.integer("num_hidden_layers", limit=_MAX_LAYERS)
    windows = _windows(config, architecture, num_layers)
    if architecture not in ("MixtralForCausalLM", "OlmoeForCausalLM", "Qwen3MoeForCausalLM"):
        width = config.integer("intermediate_size")
        return tuple(LayerSpec(intermediate_size=width, window=w) for w in windows)
    num_experts = config.integer("num_experts", "num_local_experts", limit=_MAX_EXPERTS)
    other_name = config.integer("num_local_experts", default=num_experts, limit=_MAX_EXPERTS)
    if other_name != num_experts:
        raise ModelSpecError(
            f"config.json: num_experts is {num_experts} but num_local_experts is {other_name}"
        )
    top_k = config.integer("num_experts_per_tok", limit=_MAX_EXPERTS)
    if top_k > num_experts:
        raise ModelSpecError(
            f"config.json: num_experts_per_tok {top_k} is larger than the {num_experts} experts"
        )
    is_qwen = architecture == "Qwen3MoeForCausalLM"
    expert_width = config.integer("moe_intermediate_size" if is_qwen else "intermediate_size")
    dense_layers = config.layer_indices("mlp_only_layers")
    sparse_step = config.integer("decoder_sparse_step", default=1) if is_qwen else 1
    layers = []
    for index, window in enumerate(windows):
        if is_qwen and (index in dense_layers or (index + 1) % sparse_step):
            width = config.integer("intermediate_size")
            layers.append(LayerSpec(intermediate_size=width, window=window))
        else:
            layers.append(
                LayerSpec(
                    intermediate_size=expert_width,
                    num_experts=num_experts,
                    num_experts_per_token=top_k,
                    window=window,
                )
            )
    return tuple(layers)


def _windows(config: ConfigReader, architecture: str, num_layers: int) -> list[int | None]:
    """Attention window of each layer, by the rule of each family."""
    if architecture in ("LlamaForCausalLM", "OlmoeForCausalLM"):
        return [None] * num_layers
    if architecture.startswith("Qwen") and not config.flag("use_sliding_window", False):
        return [None] * num_layers
    default = None if "sliding_window" in config.values else _DEFAULT_WINDOW.get(architecture)
    if default is None and config.values.get("sliding_window") is None:
        return [None] * num_layers
    window = config.integer("sliding_window", default=default, limit=_MAX_POSITION)
    if architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        return [window] * num_layers
    kinds = config.strings("layer_types")
    if kinds is None:
        first = 0  # which integer() would refuse
        if config.values.get("max_window_layers") != 0:
            first = config.integer("max_window_layers", default=28)
        return [window if index >= first else None for index in range(num_layers)]
    if len(kinds) != num_layers:
        raise ModelSpecError(
            f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers"
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelSpecError(
                f"config.json: layer_types has {shown(kind)}; "
                "supported: full_attention, sliding_attention"
            )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rope(config: ConfigReader, architecture: str) -> RopeSpec:
    section = config.section("rope_scaling") or config.section("rope_parameters")
    rope = ConfigReader(section)
    default_theta = 1e6 if architecture == "MixtralForCausalLM" else 1e4
    theta = rope.number("rope_theta", config.number("rope_theta", default_theta))
    if config.number("partial_rotary_factor", rope.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelSpecError("config.json: partial_rotary_factor other than 1 is not supported")
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=rope.number("factor"))
    if kind != "llama3":
        raise ModelSpecError(
            f"config.json: rope type {shown(kind)} is not supported; "
            "supported: default, linear, llama3"
        )
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise ModelSpecError(
            f"config.json: low_freq_factor {low} must be below high_freq_factor {high}"
        )
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=rope.integer(
            "original_max_position_embeddings",
            default=config.integer("max_position_embeddings", limit=_MAX_POSITION),
            limit=_MAX_POSITION,
        ),
    )

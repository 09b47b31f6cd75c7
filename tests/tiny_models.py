"""Tiny random models of every family, made by transformers, with shapes that divide by nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from planner.model_spec import ModelSpec

_SHAPES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
_EXPERTS = {"num_experts_per_tok": 3, "norm_topk_prob": False}
_QWEN3_MOE = {**_EXPERTS, "num_experts": 5, "moe_intermediate_size": 20, "head_dim": 14}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 14,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "llama-tied": (
        "Llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 6, "rope_parameters": _LINEAR_ROPE},
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 14}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (
        "Qwen3",
        {"head_dim": 14, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": None},
    ),
    "qwen3-moe": ("Qwen3Moe", {**_QWEN3_MOE, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3-moe-unnormed": ("Qwen3Moe", {**_QWEN3_MOE, "tie_word_embeddings": True}),
    "olmoe": ("Olmoe", {**_EXPERTS, "num_experts": 5, "clip_qkv": 2.5}),
}

TINY_MODELS = tuple(_CONFIGS)
TINY_MOE_MODELS = ("mixtral", "qwen3-moe", "qwen3-moe-unnormed", "olmoe")


def tiny_model(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Any:
    """A transformers model with seeded weights, none of them trivial; `overrides` go to its config.

    Attention and experts are transformers' eager forms, the plainest.
    """
    family, values = _CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**{**_SHAPES, **values, **overrides})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for key, weight in model.named_parameters():
            if key.endswith("norm.weight"):
                torch.nn.init.uniform_(weight, 0.5, 1.5)
            elif key.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.3)
    # Not model.to(dtype), which rounds the rotary frequencies too; from_pretrained does not.
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    config.dtype = dtype
    return model.eval().requires_grad_(False)


def save_tiny_model(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Any:
    """Save a tiny model (config.json, model.safetensors) to a folder and return it."""
    model = tiny_model(name, dtype=dtype, seed=seed, **overrides)
    model.save_pretrained(folder)
    return model


def tiny_spec(model: Any, name: str = "tiny") -> ModelSpec:
    """The ModelSpec of a transformers model, read from the config.json that it would save."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    return ModelSpec.from_config({**config, "architectures": [type(model).__name__]}, name=name)

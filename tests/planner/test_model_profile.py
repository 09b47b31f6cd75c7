"""ModelProfile: shapes of any architecture from JSON, strictly."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from planner.attention_kinds import GroupedAttention, LatentAttention
from planner.errors import ModelSpecError
from planner.model_profile import read_model_profile
from planner.model_spec import LayerSpec

LATENT = {
    "kind": "latent", "num_heads": 4, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "value_dim": 5
}  # fmt: skip
GROUPED = {"kind": "grouped", "num_heads": 4, "num_kv_heads": 2, "head_dim": 3}
TOY: dict[str, Any] = {
    "schema_version": 1,
    "name": "toy",
    "source": "nobody/toy",
    "architecture": "ToyForCausalLM",
    "hidden_size": 8,
    "vocab_size": 10,
    "max_position_embeddings": 32,
    "is_tied": True,
    "kinds": {
        "d": {"attention": LATENT, "intermediate_size": 16},
        "m": {
            "attention": GROUPED,
            "intermediate_size": 6,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "shared_size": 5,
            "window": 7,
        },
    },
    "layers": "dmm",
}


def changed(*path: str, value: object) -> dict[str, Any]:
    """The toy with one value changed or added."""
    values = deepcopy(TOY)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return values


def test_a_profile_gives_each_letter_its_layer() -> None:
    spec = read_model_profile(TOY).spec()
    moe = LayerSpec(
        intermediate_size=6,
        num_experts=4,
        num_experts_per_token=2,
        shared_size=5,
        window=7,
        attention=GroupedAttention(num_heads=4, num_kv_heads=2, head_dim=3),
    )
    latent = LatentAttention(num_heads=4, kv_rank=6, nope_dim=4, rope_dim=2, value_dim=5)
    assert spec.layers == (LayerSpec(intermediate_size=16, attention=latent), moe, moe)
    assert (spec.name, spec.architecture, spec.dtype) == ("toy", "ToyForCausalLM", "bfloat16")
    assert (spec.hidden_size, spec.vocab_size, spec.is_tied) == (8, 10, True)
    # The heads of the model are those of the layers with the larger cache: 12 elements, not 8.
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 3)
    assert read_model_profile(TOY).spec("float32").dtype == "float32"


def test_weights_of_a_profile_by_hand() -> None:
    """Two bytes a weight; every number of a layer once."""
    spec = read_model_profile(TOY).spec()
    # q 8*24, latent 8*8, widening 6 * 4*(4+5), output 8*20, norms 6 + 8
    assert spec.weight_bytes("attention", 0) == 2 * (192 + 64 + 216 + 160 + 14)
    # q, k, v 8 * (12 + 6 + 6), output 8*12, norm 8
    assert spec.weight_bytes("attention", 1) == 2 * (192 + 96 + 8)
    # gate 4*8, shared 3 * 8*5, norm 8
    assert spec.weight_bytes("router", 1) == 2 * (32 + 120 + 8)
    assert spec.weight_bytes("experts", 1) == 2 * 4 * 3 * 8 * 6


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (changed("surprise", value=1), "unknown field `surprise`"),
        (changed("kinds", "d", "surprise", value=1), "unknown field `surprise`"),
        (changed("kinds", "d", "attention", "surprise", value=1), "unknown field `surprise`"),
        (changed("kinds", "d", "attention", "kind", value="magic"), "Invalid value 'magic'"),
        (changed("kinds", "d", "attention", "kv_rank", value=0), "`int` >= 1"),
        (changed("kinds", "m", "num_experts_per_token", value=5), "5 is larger than the 4 experts"),
        (changed("kinds", "m", "num_experts_per_token", value=0), "experts need num_experts_per_"),
        (changed("kinds", "d", "shared_size", value=3), "shared_size is 3 but there are no expert"),
        (changed("kinds", "d", "num_ffn_matrices", value=4), "Invalid enum value 4"),
        (changed("layers", value="dmx"), "layers has the letters 'dmx' but kinds are 'dm'"),
        (changed("layers", value="ddd"), "layers has the letters 'd' but kinds are 'dm'"),
        (changed("layers", value=""), "length >= 1"),
        (changed("layers", value="d" * 1025), "length <= 1024"),
        (changed("dtype", value="int8"), "Invalid enum value 'int8'"),
        (changed("schema_version", value=2), "Invalid enum value 2"),
        (changed("architecture", value="LlamaForCausalLM"), "described by the keys of its config"),
        ({}, "missing required field"),
    ],
)
def test_a_value_that_cannot_be_is_named(values: dict[str, Any], expected: str) -> None:
    """The key and what it should be."""
    with pytest.raises(ModelSpecError) as caught:
        read_model_profile(values)
    assert expected in str(caught.value)

"""Attention kinds against transformers' layers, and what they cost against their formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextAttention,
    Qwen3NextGatedDeltaNet,
)

from planner.attention_kinds import (
    Attention,
    CompressedAttention,
    GroupedAttention,
    LatentAttention,
    MambaMixer,
    RecurrentAttention,
)
from planner.model_spec import LayerSpec, ModelSpec
from tests.planner.tiny import tiny_spec

HIDDEN = 60


def on_meta(layer: Any, config: Any) -> Any:
    """The first layer of transformers, without memory."""
    with torch.device("meta"):
        return layer(config, 0)


def latent_of_transformers(q_rank: int | None) -> Any:
    config = transformers.DeepseekV3Config(
        hidden_size=HIDDEN, num_attention_heads=6, num_key_value_heads=6, q_lora_rank=q_rank,
        kv_lora_rank=18, qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=14,
    )  # fmt: skip
    return on_meta(DeepseekV3Attention, config)


def next_of_transformers(layer: Any) -> Any:
    config = transformers.Qwen3NextConfig(
        hidden_size=HIDDEN, num_attention_heads=6, num_key_value_heads=2, head_dim=14,
        linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=10,
        linear_value_head_dim=12, linear_conv_kernel_dim=4,
    )  # fmt: skip
    return on_meta(layer, config)


def mamba_of_transformers() -> Any:
    config = transformers.JambaConfig(hidden_size=HIDDEN, mamba_d_state=10, mamba_dt_rank=7)
    return on_meta(JambaMambaMixer, config)


def mamba2_of_transformers() -> Any:
    config = transformers.Mamba2Config(
        hidden_size=HIDDEN, num_heads=6, head_dim=20, state_size=14, n_groups=2
    )
    return on_meta(Mamba2Mixer, config)


def gpt_oss_of_transformers() -> Any:
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, num_attention_heads=6, num_key_value_heads=2, head_dim=14
    )
    return on_meta(GptOssAttention, config)


def compressed_of_transformers(kind: str) -> Any:
    config = transformers.DeepseekV4Config(
        hidden_size=HIDDEN, num_attention_heads=6, head_dim=16, q_lora_rank=22, o_lora_rank=10,
        o_groups=3, index_n_heads=5, index_head_dim=8, num_hidden_layers=1, layer_types=[kind],
    )  # fmt: skip
    return on_meta(DeepseekV4Attention, config)


LATENT = LatentAttention(
    num_heads=6, kv_rank=18, nope_dim=10, rope_dim=4, value_dim=14, q_rank=22
)  # fmt: skip
DELTA = RecurrentAttention(
    num_key_heads=2, num_value_heads=6, key_dim=10, value_dim=12, num_gates=2
)  # fmt: skip
MAMBA2 = RecurrentAttention(
    num_key_heads=2, num_value_heads=6, key_dim=14, value_dim=20, num_gates=1
)  # fmt: skip
MAMBA = MambaMixer(num_channels=120, state_dim=10, step_rank=7)
GATED = GroupedAttention(num_heads=6, num_kv_heads=2, head_dim=14, has_output_gate=True)
BIASED = GroupedAttention(
    num_heads=6, num_kv_heads=2, head_dim=14, has_qkv_bias=True, has_o_bias=True
)
HEAVY = CompressedAttention(
    num_heads=6, head_dim=16, q_rank=22, o_rank=10, num_o_groups=3, window=128, ratio=128
)
SPARSE = CompressedAttention(
    num_heads=6, head_dim=16, q_rank=22, o_rank=10, num_o_groups=3, window=128, ratio=4,
    max_entries=512, index_heads=5, index_dim=8,
)  # fmt: skip

# (ours, theirs, vectors of theirs that ours leaves out: norms of heads, sinks, positions)
PAIRS: dict[str, tuple[Attention, Any, int]] = {
    "latent": (LATENT, latent_of_transformers(22), 0),
    "latent without q rank": (
        LatentAttention(num_heads=6, kv_rank=18, nope_dim=10, rope_dim=4, value_dim=14),
        latent_of_transformers(None),
        0,
    ),
    "delta": (DELTA, next_of_transformers(Qwen3NextGatedDeltaNet), 0),
    "gated": (GATED, next_of_transformers(Qwen3NextAttention), 2 * 14),
    "biased": (BIASED, gpt_oss_of_transformers(), 6),
    "mamba": (MAMBA, mamba_of_transformers(), 7 + 10 + 10),
    # Mamba-2 has a skip and a bias of the convolution, and its norm is as wide as all heads.
    "mamba2": (MAMBA2, mamba2_of_transformers(), 6 + (120 + 2 * 28) + (120 - 20)),
    "heavily compressed": (
        HEAVY,
        compressed_of_transformers("heavily_compressed_attention"),
        6 + 128 * 16 + 16,
    ),
    "compressed and chosen": (
        SPARSE,
        compressed_of_transformers("compressed_sparse_attention"),
        6 + 4 * 32 + 16 + 4 * 16 + 8,
    ),
}


@pytest.mark.parametrize(("ours", "theirs", "num_left_out"), PAIRS.values(), ids=PAIRS)
def test_weights_are_those_that_transformers_allocates(
    ours: Attention, theirs: Any, num_left_out: int
) -> None:
    """Matrices exactly, and vectors but those that are named."""
    shapes = [tuple(parameter.shape) for parameter in theirs.parameters()]
    expected = sum(math.prod(shape) for shape in shapes)
    matrices = sum(count * rows * columns for count, rows, columns in ours.matrices(HIDDEN))
    assert matrices + ours.num_vector_params(HIDDEN) == expected - num_left_out
    linear = [m for m in theirs.modules() if isinstance(m, torch.nn.Linear)]
    assert matrices == sum(module.weight.numel() for module in linear)


def spec_of(attention: Attention, window: int | None = None) -> ModelSpec:
    layer = LayerSpec(intermediate_size=16, attention=attention, window=window)
    return replace(tiny_spec("d"), layers=(layer,))


def test_latent_attention_costs_what_deepseek_v3_publishes() -> None:
    """576 elements of cache a token; 128 heads * 2 * (576 + 512) FLOP for each token seen."""
    spec = spec_of(
        LatentAttention(
            num_heads=128, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, q_rank=1536
        )
    )
    assert spec.kv_bytes_per_token(0) == 2 * 576
    assert spec.attention_flops(0, 1, 4095) == 2 * 128 * (576 + 512) * 4096
    heads, kv_heads, width = spec.attention_heads(0)
    assert 4 * heads * width == 2 * 128 * (576 + 512)
    assert 2 * kv_heads * width == 576
    # A prompt from its beginning: ordinary attention, keys of 192 and values of 128.
    pairs = 1000 * 1001 / 2
    assert spec.attention_flops(0, 1000, 0) == 2 * 128 * (192 + 128) * pairs
    heads, _, width = spec.attention_heads(0, "prefill")
    assert 4 * heads * width == 2 * 128 * (192 + 128)


@given(
    num_tokens=st.integers(1, 4096),
    num_past=st.integers(0, 4096),
    q_rank=st.none() | st.integers(1, 64),
)
def test_latent_attention_takes_the_cheaper_form(
    num_tokens: int, num_past: int, q_rank: int | None
) -> None:
    """Scores on latents for each pair, or keys and values of all tokens and scores on those."""
    spec = spec_of(
        LatentAttention(
            num_heads=4, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=12, q_rank=q_rank
        )
    )
    pairs = sum(num_past + index + 1 for index in range(num_tokens))
    absorbed = 4 * (2 * (32 + 8) + 2 * 32) * pairs
    widened = 4 * (2 * (16 + 8) + 2 * 12) * pairs + 2 * num_past * 32 * 4 * (16 + 12)
    assert spec.attention_flops(0, num_tokens, num_past) == min(absorbed, widened)


@pytest.mark.parametrize("attention", [DELTA, MAMBA2, MAMBA], ids=["delta", "mamba2", "mamba"])
def test_a_state_costs_the_same_whatever_the_context(attention: Attention) -> None:
    """Tokens keep nothing; a step reads and writes the state, which is float32."""
    spec = spec_of(attention)
    state = {DELTA: 6 * 10 * 12, MAMBA2: 6 * 14 * 20, MAMBA: 120 * 10}[attention]
    conv = {DELTA: 3 * (2 * 20 + 72), MAMBA2: 3 * (2 * 28 + 120), MAMBA: 3 * 120}[attention]
    assert spec.kv_bytes_per_token(0) == 0
    assert spec.state_bytes(0) == 4 * state + 2 * conv
    _, kv_heads, width = spec.attention_heads(0)
    for as_run in (spec, replace(spec, dtype="float32")):
        for context in (1, 100_000):
            read = 2 * kv_heads * width * as_run.dtype_bytes * as_run.seen_tokens(0, context)
            assert read == 2 * 4 * state
    assert spec.attention_flops(0, 7, 5) == 7 * spec.attention_flops(0, 1, 100_000) == 7 * 8 * state


@pytest.mark.parametrize("context", [1, 100, 128, 129, 4096, 10**6])
def test_compressed_attention_sees_its_window_and_entries(context: int) -> None:
    """128 tokens, and an entry for every 128, or up to 512 entries of 4 tokens each."""
    window = min(context, 128)
    assert spec_of(HEAVY).seen_tokens(0, context) == window + context / 128
    assert spec_of(SPARSE).seen_tokens(0, context) == window + min(512, context / 4)
    # Scores and values with one entry, which is both, for each of 6 heads of 16.
    flops = spec_of(SPARSE).attention_flops(0, 1, context - 1)
    assert flops == 4 * 6 * 16 * (window + min(512, context / 4))
    heads, kv_heads, width = SPARSE.heads("decode")
    assert (4 * heads * width, 2 * kv_heads * width) == (4 * 6 * 16, 16)


def test_compressed_attention_keeps_a_window_and_a_share_of_each_token() -> None:
    """(16 + 8) / 4 elements a token; 16 / 128 of one are rounded up to one."""
    assert spec_of(SPARSE).kv_bytes_per_token(0) == 2 * 6
    assert spec_of(HEAVY).kv_bytes_per_token(0) == 2
    assert spec_of(SPARSE).state_bytes(0) == spec_of(HEAVY).state_bytes(0) == 2 * 128 * 16


@given(
    heads=st.integers(1, 8),
    group=st.integers(1, 8),
    head_dim=st.integers(1, 64),
    value_dim=st.none() | st.integers(1, 64),
    context=st.integers(1, 3000),
    window=st.none() | st.integers(1, 3000),
)
def test_grouped_attention_equals_its_heads(
    heads: int, group: int, head_dim: int, value_dim: int | None, context: int, window: int | None
) -> None:
    """FLOPs and bytes of a decode step are those of `attention_heads` and `seen_tokens`."""
    attention = GroupedAttention(
        num_heads=heads * group, num_kv_heads=heads, head_dim=head_dim, value_dim=value_dim
    )
    spec = spec_of(attention, window)
    found, kv_heads, width = spec.attention_heads(0)
    seen = spec.seen_tokens(0, context)
    assert seen == (context if window is None else min(window, context))
    assert 4 * found * width * seen == spec.attention_flops(0, 1, context - 1)
    assert 2 * kv_heads * width * 2 == spec.kv_bytes_per_token(0)


def test_the_same_heads_in_a_layer_cost_what_the_models_own_do() -> None:
    """A layer that names the model's heads is a layer that names none."""
    own = tiny_spec("d")
    named = spec_of(GroupedAttention(num_heads=2, num_kv_heads=1, head_dim=4))
    assert named.weight_bytes("attention", 0) == own.weight_bytes("attention", 0) == 400
    assert named.matrices("attention", 0) == own.matrices("attention", 0)
    assert named.attention_heads(0) == own.attention_heads(0)
    assert named.kv_bytes_per_token(0) == own.kv_bytes_per_token(0)
    assert named.attention_flops(0, 5, 3) == own.attention_flops(0, 5, 3)
    assert named.fingerprint != own.fingerprint

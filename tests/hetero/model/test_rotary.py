"""Rotary embedding against transformers, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hetero.model.rotary import apply_rotary, rotary_frequencies, rotary_rows
from tests.tiny_models import tiny_model, tiny_spec

CPU = torch.device("cpu")

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("head_dim", [14, 128])
def test_frequencies_equal_transformers(kind: str, head_dim: int) -> None:
    """Every stretched frequency, those in the ramp of llama3 included."""
    model = tiny_model(
        "llama", rope_parameters=ROPES[kind], head_dim=head_dim, max_position_embeddings=131072
    )
    rope = tiny_spec(model).rope
    assert rope.kind == kind
    torch.testing.assert_close(
        rotary_frequencies(rope, head_dim, CPU), model.model.rotary_emb.inv_freq, rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_transformers(kind: str, dtype: torch.dtype) -> None:
    """Same rotated heads, rounding included, at scattered and distant positions."""
    model = tiny_model("llama", rope_parameters=ROPES[kind], max_position_embeddings=131072)
    generator = torch.Generator().manual_seed(0)
    x_THK = torch.randn(5, 9, 14, generator=generator).to(dtype)
    positions_T = torch.tensor([0, 1, 30, 8191, 100_003])
    cos, sin = model.model.rotary_emb(x_THK, positions_T[None])
    heads = x_THK.transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    frequencies = rotary_frequencies(tiny_spec(model).rope, 14, CPU)
    actual = apply_rotary(x_THK, *rotary_rows(positions_T, frequencies, dtype))
    torch.testing.assert_close(actual, expected[0].transpose(0, 1), rtol=0, atol=0)

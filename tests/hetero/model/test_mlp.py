"""The dense layer and the two ends of the model, against transformers."""

from __future__ import annotations

import pytest
import torch

from hetero.model.head import embed, head
from hetero.model.mlp import dense_layer
from tests.hetero.model.packed import checkpoint_tensors, packed
from tests.tiny_models import tiny_model, tiny_spec

DENSE_MODELS = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "qwen3-moe")


@pytest.mark.parametrize("name", DENSE_MODELS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_dense_layer_equals_transformers(name: str, dtype: torch.dtype, atol: float) -> None:
    """Norm, gate, up, down and residual, biases where the family has them."""
    model = tiny_model(name, dtype=dtype)
    spec = tiny_spec(model)
    layer = model.model.layers[0]
    x_TD = torch.randn(11, 60, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = packed(spec, checkpoint_tensors(model, spec), "dense", 0)
    assert ("down_bias" in weights) == (name == "llama")
    expected = x_TD + layer.mlp(layer.post_attention_layernorm(x_TD))
    actual = dense_layer(x_TD, weights, spec.norm_eps)
    torch.testing.assert_close(actual, expected, rtol=1e-2 if atol > 1e-3 else 1e-5, atol=atol)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_head_gives_the_logits_of_transformers_in_float32(name: str) -> None:
    """Final norm and output matrix, own or tied."""
    model = tiny_model(name, dtype=torch.bfloat16)
    spec = tiny_spec(model)
    x_LD = torch.randn(3, 60, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = head(x_LD, packed(spec, checkpoint_tensors(model, spec), "head"), spec.norm_eps)
    assert logits.dtype == torch.float32
    expected = model.lm_head(model.model.norm(x_LD)).float()
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)


def test_embed_takes_rows() -> None:
    """Each token's row of the embedding matrix."""
    model = tiny_model("qwen3")
    spec = tiny_spec(model)
    token_ids = torch.tensor([7, 0, 100, 7])
    rows = embed(token_ids, packed(spec, checkpoint_tensors(model, spec), "embedding"))
    torch.testing.assert_close(rows, model.model.embed_tokens(token_ids), rtol=0, atol=0)

"""The two ends of the model: token embeddings, and the head that turns hidden states to logits."""

# T tokens, L rows that need logits, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from hetero.model.norm import rms_norm
from hetero.model.quantised import product


def embed(token_ids_T: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Rows of the embedding matrix, x_TD."""
    return F.embedding(token_ids_T, weights["weight"])


def head(x_LD: Tensor, weights: Mapping[str, Tensor], norm_eps: float) -> Tensor:
    """Final norm and output matrix: float32 logits_LV."""
    return product(rms_norm(x_LD, weights["norm"], norm_eps), weights, "weight").float()

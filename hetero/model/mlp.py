"""The dense feed-forward layer, and the activation that experts share with it."""

# T tokens, D hidden, I feed-forward width, N rows

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from hetero.model.norm import rms_norm
from hetero.model.quantised import product


def dense_layer(x_TD: Tensor, weights: Mapping[str, Tensor], norm_eps: float) -> Tensor:
    """x + down(silu(gate) * up) of the normed x."""
    return x_TD + dense_columns(x_TD, weights, norm_eps)


def dense_columns(x_TD: Tensor, weights: Mapping[str, Tensor], norm_eps: float) -> Tensor:
    """The same without the residual: what some columns add to x."""
    normed_TD = rms_norm(x_TD, weights["norm"], norm_eps)
    return product(gated(product(normed_TD, weights, "gate_up")), weights, "down")


def gated(gate_up_N2I: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold gate and up side by side."""
    gate_NI, up_NI = gate_up_N2I.chunk(2, dim=-1)
    return F.silu(gate_NI).mul_(up_NI)

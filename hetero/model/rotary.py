"""Rotary position embedding in transformers' convention: halves of a head are rotated as pairs."""

# T tokens, H heads, K head dim, F = K / 2 frequencies

from __future__ import annotations

import math

import torch
from torch import Tensor

from planner.model_spec import RopeSpec


def rotary_frequencies(rope: RopeSpec, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position of every pair, inv_freq_F in float32."""
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq_F = 1.0 / (rope.theta**exponents_F)
    if rope.kind == "linear":
        inv_freq_F = inv_freq_F / rope.factor
    elif rope.kind == "llama3":
        inv_freq_F = _llama3(inv_freq_F, rope)
    return inv_freq_F.to(device)


def rotary_rows(
    positions_T: Tensor, inv_freq_F: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos_TK and sin_TK of a step's positions; the first half of sin_TK is negated.

    Made once a step and shared by its layers: a table over all positions of a 128k context would
    take 134 MB. The sign is the one that `apply_rotary` needs for the swapped halves.
    """
    angles_TF = positions_T.to(torch.float32)[:, None] * inv_freq_F
    cos_TF, sin_TF = angles_TF.cos().to(dtype), angles_TF.sin().to(dtype)
    return torch.cat((cos_TF, cos_TF), dim=-1), torch.cat((-sin_TF, sin_TF), dim=-1)


def apply_rotary(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate every head of queries or keys by its token's position."""
    first, second = x_THK.chunk(2, dim=-1)
    swapped_THK = torch.cat((second, first), dim=-1)
    return (x_THK * cos_TK[:, None]).add_(swapped_THK.mul_(sin_TK[:, None]))


def _llama3(inv_freq_F: Tensor, rope: RopeSpec) -> Tensor:
    """Slow frequencies divided by `factor`, fast ones kept, a ramp between (Llama 3.1)."""
    wavelength_F = 2 * math.pi / inv_freq_F
    turns_F = rope.original_max_position / wavelength_F
    band = rope.high_freq_factor - rope.low_freq_factor
    keep_F = ((turns_F - rope.low_freq_factor) / band).clamp(0.0, 1.0)
    return (1 - keep_F) * inv_freq_F / rope.factor + keep_F * inv_freq_F

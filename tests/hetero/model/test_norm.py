"""RMS norm against transformers, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hetero.model.norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 60), (17, 60), (5, 3, 14)])
def test_rms_norm_equals_transformers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Same values and same rounding, over large and small rows."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-4, 4, shape[0]).view(-1, *[1] * (len(shape) - 1))
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    norm = LlamaRMSNorm(shape[-1], eps=1e-5)
    norm.weight.data = torch.rand(shape[-1], generator=generator).to(dtype) + 0.5
    actual = rms_norm(x, norm.weight.data, 1e-5)
    torch.testing.assert_close(actual, norm(x).data, rtol=0, atol=0)

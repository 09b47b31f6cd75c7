"""RMS norm with the rounding of transformers: normalised in float32, scaled in the dtype of x."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide the last dimension by its root mean square, then scale it."""
    # torch scales before it rounds when it is given the weight: 0.03 off transformers in bfloat16.
    # Without it, both agree to the bit, in three quarters of the time of the written-out form.
    return F.rms_norm(x, (x.shape[-1],), None, eps) * weight

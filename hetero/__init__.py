"""Run language models larger than the GPU's memory at the best speed of one machine."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetero.api import LLM
    from hetero.outputs import CompletionOutput, RequestMetrics, RequestOutput
    from hetero.sampler import SamplingParams

__version__ = "0.2.0"

# After a product torch's OpenMP threads spin for milliseconds, on the cores that our own threads
# need for the kernel that follows: prefill of 128 tokens took a quarter longer in its attention.
# OpenMP reads these when torch is imported; whoever has set them, or imported torch, decides.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("KMP_BLOCKTIME", "1")

# Importing torch takes seconds: it waits until a name that needs it is used.
_MODULES = {
    "LLM": "hetero.api",
    "CompletionOutput": "hetero.outputs",
    "RequestMetrics": "hetero.outputs",
    "RequestOutput": "hetero.outputs",
    "SamplingParams": "hetero.sampler",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hetero' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)

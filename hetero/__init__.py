"""Run language models larger than the GPU's memory at the best speed of one machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetero.api import (
        LLM,
        CompletionOutput,
        RequestMetrics,
        RequestOutput,
    )
    from hetero.sampler import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds: it waits until a name that needs it is used.
    if name in __all__:
        from hetero import api

        return getattr(api, name)
    raise AttributeError(f"module 'hetero' has no attribute {name!r}")

"""A model run by transformers with accelerate's `device_map="auto"`, under a GPU budget."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# What a machine keeps of its memory for all else.
_HOST_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds as `planner.plan.Estimate` defines them."""

    ttft_s: float
    tpot_s: float


def why_not() -> str | None:
    """Why it cannot run here; None where it can."""
    for package in ("accelerate", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None if torch.cuda.is_available() else "there is no CUDA device"


class AccelerateModel:
    """Weights of a folder, as many on the GPU as a budget holds. Close it before the next."""

    def __init__(self, folder: Path, *, budget_bytes: int, host_bytes: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map="auto",
            max_memory={0: budget_bytes, "cpu": int(_HOST_SHARE * host_bytes)},
        )

    def generate(self, prompts: Sequence[Sequence[int]], *, output_len: int) -> Times:
        """Greedy tokens of prompts of one length."""
        first_s, all_s = (self._seconds(prompts, count) for count in (1, output_len))
        return Times(ttft_s=first_s, tpot_s=(all_s - first_s) / max(1, output_len - 1))

    def close(self) -> None:
        """Give back its memory."""
        self._model = None
        gc.collect()
        torch.cuda.empty_cache()

    def _seconds(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        tokens = torch.tensor(prompts, device="cuda")
        torch.cuda.synchronize()
        begin_s = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        torch.cuda.synchronize()
        return time.perf_counter() - begin_s


def median_times(runs: Sequence[Times]) -> Times:
    return Times(
        ttft_s=statistics.median(run.ttft_s for run in runs),
        tpot_s=statistics.median(run.tpot_s for run in runs),
    )

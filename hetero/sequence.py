"""Sequence: one request's tokens, where its KV cache lies, and how far it has come."""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass, field
from typing import Literal

from hetero.sampler import SamplingParams

SequenceStatus = Literal["waiting", "running", "finished"]
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """A prompt and what is generated from it. Mutable: the scheduler and the engine change it.

    `token_ids` is the prompt followed by the output. The keys and values of the first
    `num_computed_tokens` of them are in the cache, in the blocks of `block_table`, which are of the
    pool of its `sub_batch`. The newest output token is not in the cache until the next step feeds
    it. `output_logprobs` has an entry (token -> log-probability) per output token where they were
    asked for.

    `prompt_table` has blocks while the prompt is computed in other pages than those of
    `block_table`, until the cache has moved there.

    Times are of `time.perf_counter`; None until the event.
    """

    seq_id: str
    prompt_token_ids: abc.Sequence[int]
    params: SamplingParams
    arrival_s: float = field(default_factory=time.perf_counter)

    token_ids: list[int] = field(init=False)
    output_logprobs: list[dict[int, float]] = field(init=False, default_factory=list)
    num_computed_tokens: int = field(init=False, default=0)
    sub_batch: int = field(init=False, default=0)
    block_table: list[int] = field(init=False, default_factory=list)
    prompt_table: list[int] = field(init=False, default_factory=list)
    num_preemptions: int = field(init=False, default=0)

    status: SequenceStatus = field(init=False, default="waiting")
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)

    first_scheduled_s: float | None = field(init=False, default=None)
    first_token_s: float | None = field(init=False, default=None)
    last_token_s: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_prefill(self) -> bool:
        """True until only the newest output token is missing from the cache.

        After preemption the output so far is computed again together with the prompt.
        """
        return self.num_computed_tokens < max(self.num_prompt_tokens, self.num_tokens - 1)

    @property
    def must_move(self) -> bool:
        """True where its prompt is complete and its cache is not yet where it decodes from."""
        return bool(self.prompt_table) and not self.is_prefill

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def append(self, token_id: int, now_s: float) -> None:
        """Add a generated token."""
        self.token_ids.append(token_id)
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s

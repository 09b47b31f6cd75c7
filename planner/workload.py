"""Workload: what is to be run; BatchShape: the size of one step; how a workload becomes steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

Phase = Literal["prefill", "decode"]
Objective = Literal["latency", "throughput"]

PHASES: tuple[Phase, ...] = ("prefill", "decode")

DEFAULT_CHUNK_TOKENS = 2048


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`num_seqs` sequences of `prompt_len` tokens, each continued by `output_len` tokens.

    Examples
    --------
    >>> Workload(prompt_len=512, output_len=128).context_len
    640
    """

    prompt_len: int = 512
    output_len: int = 128
    num_seqs: int = 1

    def __post_init__(self) -> None:
        for field in ("prompt_len", "output_len", "num_seqs"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)} but must be at least 1")

    @property
    def context_len(self) -> int:
        """Tokens of one sequence when it is complete."""
        return self.prompt_len + self.output_len


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """Size of one step: what its costs depend on.

    `num_tokens` new tokens of `num_seqs` sequences, each with `num_past_tokens` (mean) already in
    the cache. `num_logits` is how many rows reach the output head: sequences whose prompt ends in
    this step, or all of them in decode. `num_second_seqs` of them are the second sub-batch of a
    decode step that has two; None: as many as the placement says.
    """

    phase: Phase
    num_tokens: int
    num_seqs: int
    num_past_tokens: float
    num_logits: int
    num_second_seqs: int | None = None


def decode_shape(num_seqs: int, num_past_tokens: float) -> BatchShape:
    """One decode step: a token for each of `num_seqs` sequences."""
    return BatchShape(
        phase="decode",
        num_tokens=num_seqs,
        num_seqs=num_seqs,
        num_past_tokens=num_past_tokens,
        num_logits=num_seqs,
    )


def prompt_shape(prompt_len: int) -> BatchShape:
    """A whole prompt in one step; what moves after it is the cache of so many tokens."""
    return BatchShape(
        phase="prefill", num_tokens=prompt_len, num_seqs=1, num_past_tokens=0, num_logits=1
    )


def prefill_shapes(num_seqs: int, prompt_len: int, chunk_tokens: int) -> list[BatchShape]:
    """Steps in which the scheduler prefills `num_seqs` prompts that wait together.

    Prompts are taken in order; a step takes up to `chunk_tokens` new tokens, and a prompt that does
    not end in a step goes on in the next (chunked prefill). The scheduler follows the same rule.

    Examples
    --------
    >>> [(s.num_tokens, s.num_seqs, s.num_logits) for s in prefill_shapes(3, 6, 8)]
    [(8, 2, 1), (8, 2, 1), (2, 1, 1)]
    """
    shapes: list[BatchShape] = []
    sequence, done = 0, 0
    while sequence < num_seqs:
        room, parts, num_logits = chunk_tokens, [], 0
        while room and sequence < num_seqs:
            take = min(room, prompt_len - done)
            parts.append((take, done))
            room -= take
            done += take
            if done == prompt_len:
                sequence, done, num_logits = sequence + 1, 0, num_logits + 1
        num_tokens = sum(take for take, _ in parts)
        # Past weighted by the tokens that see it, so that attention work is right for mixed parts.
        past = sum(take * before for take, before in parts) / num_tokens
        shapes.append(
            BatchShape(
                phase="prefill",
                num_tokens=num_tokens,
                num_seqs=len(parts),
                num_past_tokens=past,
                num_logits=num_logits,
            )
        )
    return shapes

"""Sequence: when its prompt counts as done, and what it remembers of its tokens."""

from __future__ import annotations

import pytest

from hetero.sampler import SamplingParams
from hetero.sequence import Sequence


def make_sequence(num_prompt_tokens: int, num_output_tokens: int = 0) -> Sequence:
    sequence = Sequence(
        seq_id="a", prompt_token_ids=list(range(num_prompt_tokens)), params=SamplingParams()
    )
    for token_id in range(num_output_tokens):
        sequence.append(100 + token_id, now_s=float(token_id))
    return sequence


@pytest.mark.parametrize(
    ("num_output_tokens", "num_computed_tokens", "expected"),
    [
        (0, 0, True),
        (0, 3, True),
        (0, 4, False),  # all of the prompt is cached, its first token not yet sampled
        (1, 4, False),  # the usual state between decode steps
        (3, 6, False),
        (3, 0, True),  # preempted: prompt and output are computed again
        (3, 5, True),
    ],
)
def test_prefill_ends_when_only_the_newest_output_is_not_cached(
    num_output_tokens: int, num_computed_tokens: int, expected: bool
) -> None:
    """A prompt of 4 tokens, with outputs and with parts of it in the cache."""
    sequence = make_sequence(4, num_output_tokens)
    sequence.num_computed_tokens = num_computed_tokens
    assert expected == sequence.is_prefill


def test_output_tokens_follow_the_prompt() -> None:
    """Counts and contents tell prompt and output apart; the prompt stays as it was."""
    sequence = make_sequence(2, 3)
    assert sequence.token_ids == [0, 1, 100, 101, 102]
    assert sequence.output_token_ids == [100, 101, 102]
    assert (
        sequence.num_prompt_tokens,
        sequence.num_output_tokens,
        sequence.num_tokens,
    ) == (2, 3, 5)
    assert sequence.prompt_token_ids == [0, 1]


def test_first_and_last_token_times_are_kept() -> None:
    """The first time stays, the last one moves."""
    assert (make_sequence(1).first_token_s, make_sequence(1).last_token_s) == (None, None)
    sequence = make_sequence(1, 3)
    assert (sequence.first_token_s, sequence.last_token_s) == (0.0, 2.0)

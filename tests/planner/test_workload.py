"""Workload and the steps it becomes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.workload import BatchShape, Workload, decode_shape, prefill_shapes


@pytest.mark.parametrize("field", ["prompt_len", "output_len", "num_seqs"])
def test_a_workload_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0 but must be at least 1"):
        Workload(**{field: 0})


def test_a_workload_goes_through_json_unchanged() -> None:
    workload = Workload(prompt_len=7, output_len=3, num_seqs=2)
    assert msgspec.json.decode(msgspec.json.encode(workload), type=Workload) == workload


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"prompt_len": 0}', "prompt_len is 0"),
        ('{"prompt_len": 1.5}', "prompt_len"),
        ('{"prompt_len": "8"}', "prompt_len"),
        ('{"prompts": 8}', "prompts"),
    ],
)
def test_a_workload_that_is_not_one_is_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.json.decode(text, type=Workload)


def test_a_decode_step_has_a_token_and_a_row_of_logits_for_each_sequence() -> None:
    expected = BatchShape(
        phase="decode", num_tokens=3, num_seqs=3, num_past_tokens=9.5, num_logits=3
    )
    assert decode_shape(3, 9.5) == expected


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    """20 tokens by 8: the last chunk is short and is the only one that samples."""
    assert [
        (shape.num_tokens, shape.num_past_tokens, shape.num_logits)
        for shape in prefill_shapes(1, 20, 8)
    ] == [(8, 0.0, 0), (8, 8.0, 0), (4, 16.0, 1)]


def test_short_prompts_share_a_chunk() -> None:
    """4 prompts of 3 tokens by 8: 3 + 3 + 2, then the last token of the third and the fourth.

    Its past is the mean over the tokens that see it: 1 token sees 2, 3 tokens see none.
    """
    assert [
        (shape.num_tokens, shape.num_seqs, shape.num_past_tokens, shape.num_logits)
        for shape in prefill_shapes(4, 3, 8)
    ] == [(8, 3, 0.0, 2), (4, 2, 0.5, 2)]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(num_seqs=st.integers(1, 30), prompt_len=st.integers(1, 50), chunk_tokens=st.integers(1, 40))
def test_prefill_steps_compute_every_token_once(
    num_seqs: int, prompt_len: int, chunk_tokens: int
) -> None:
    """All tokens, one row of logits a sequence, full chunks but the last, and every pair once."""
    shapes = prefill_shapes(num_seqs, prompt_len, chunk_tokens)

    assert sum(shape.num_tokens for shape in shapes) == num_seqs * prompt_len
    assert sum(shape.num_logits for shape in shapes) == num_seqs
    assert all(shape.num_tokens == chunk_tokens for shape in shapes[:-1])
    assert len(shapes) == -(-num_seqs * prompt_len // chunk_tokens)
    # A token sees the tokens before it in its prompt: in earlier steps (past) or in its own.
    past_pairs = sum(shape.num_tokens * shape.num_past_tokens for shape in shapes)
    assert past_pairs == pytest.approx(_past_pairs(num_seqs, prompt_len, chunk_tokens))


def _past_pairs(num_seqs: int, prompt_len: int, chunk_tokens: int) -> int:
    """Tokens times the tokens of their prompt in earlier steps, one token at a time."""
    pairs = 0
    for first in range(0, num_seqs * prompt_len, prompt_len):
        for token in range(first, first + prompt_len):
            step_start = token // chunk_tokens * chunk_tokens
            pairs += max(0, step_start - first)
    return pairs

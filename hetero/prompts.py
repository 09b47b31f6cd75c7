"""Prompt: what may be asked to be continued, and its token ids."""

from __future__ import annotations

from typing import TypedDict

from hetero.errors import RequestError
from hetero.tokenizer import Tokenizer


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


Prompt = str | TokensPrompt


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a prompt.

    Raises
    ------
    RequestError
        Text without a tokenizer, an empty prompt, a prompt of another type.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                "the prompt is text but the model folder has no tokenizer.json; give "
                '{"prompt_token_ids": [...]}'
            )
        token_ids = tokenizer.encode(prompt)
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one character of text")
        return token_ids
    if not isinstance(prompt, dict) or set(prompt) != {"prompt_token_ids"}:
        raise RequestError('a prompt is text or {"prompt_token_ids": [...]}')
    ids = prompt["prompt_token_ids"]
    if not isinstance(ids, list | tuple) or not all(type(token_id) is int for token_id in ids):
        raise RequestError("prompt_token_ids must be a list of whole numbers")
    if not ids:
        raise RequestError("prompt_token_ids is empty; give at least one token")
    return list(ids)

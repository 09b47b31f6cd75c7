"""Job: the rows of a run as tokens; a row that the model cannot take is known before loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetero.cli.rows import Row
from hetero.errors import HeteroError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from hetero.tokenizer import Tokenizer
    from planner.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodRow:
    """A row that can be served."""

    row: Row
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot, and why."""

    row: Row
    error: HeteroError


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All rows of a run, each group in the order of the input."""

    good: tuple[GoodRow, ...]
    bad: tuple[BadRow, ...]

    @property
    def num_rows(self) -> int:
        return len(self.good) + len(self.bad)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that can be served."""
        return max(len(good.token_ids) for good in self.good)

    def within(
        self, num_kv_tokens: int, num_prompt_tokens: int, max_tokens: int, max_model_len: int
    ) -> Job:
        """The same job, rows that a KV cache of this size could never hold among the bad ones.

        It holds `num_kv_tokens` of one sequence, and `num_prompt_tokens` of one prompt.
        """
        good, bad = [], list(self.bad)
        for each in self.good:
            # An output ends where the context does; its last token is generated but never fed.
            needed = min(len(each.token_ids) + max_tokens, max_model_len) - 1
            if needed > num_kv_tokens:
                text = (
                    f"prompt and output come to {needed} tokens but the KV cache of this plan "
                    f"holds {num_kv_tokens}; plan for longer sequences, or lower --max-tokens"
                )
            elif len(each.token_ids) > num_prompt_tokens:
                text = (
                    f"the prompt has {len(each.token_ids)} tokens but the KV cache of this plan "
                    f"holds {num_prompt_tokens} of one; plan for longer prompts"
                )
            else:
                good.append(each)
                continue
            bad.append(BadRow(row=each.row, error=RequestError(text)))
        return Job(good=tuple(good), bad=tuple(bad))


def tokenize(rows: Sequence[Row], folder: Path, spec: ModelSpec, *, chat: bool) -> Job:
    """The tokens of every row; with `chat` a text is one turn of a user, by the model's template.

    Raises
    ------
    RequestError
        There is text but no tokenizer, or `chat` without a chat template.
    """
    from hetero.tokenizer import Tokenizer

    has_text = any(isinstance(row.prompt, str) for row in rows)
    tokenizer = Tokenizer.load(folder) if has_text else None
    if has_text and tokenizer is None:
        raise RequestError(
            f"the prompt is text but {folder} has no tokenizer.json; give token ids in --input: "
            '{"prompt_token_ids": [...]}'
        )
    good, bad = [], []
    for row, found in zip(rows, _encode(rows, tokenizer, chat), strict=True):
        error = found if isinstance(found, HeteroError) else _why_not(found, spec)
        if error is not None:
            bad.append(BadRow(row=row, error=error))
        elif not isinstance(found, HeteroError):
            good.append(GoodRow(row=row, token_ids=tuple(found)))
    return Job(good=tuple(good), bad=tuple(bad))


def _encode(
    rows: Sequence[Row], tokenizer: Tokenizer | None, chat: bool
) -> list[Sequence[int] | HeteroError]:
    texts: Sequence[str | HeteroError] = [row.prompt for row in rows if isinstance(row.prompt, str)]
    if tokenizer is not None and chat:
        turns = [[{"role": "user", "content": text}] for text in texts if isinstance(text, str)]
        texts = tokenizer.apply_chat_template_to_all(turns)
    of_text = iter(texts)
    found: list[Sequence[int] | HeteroError] = []
    for row in rows:
        prompt = next(of_text) if isinstance(row.prompt, str) else row.prompt
        if isinstance(prompt, str):
            assert tokenizer is not None
            # A rendered chat has its special tokens already.
            found.append(_encode_text(prompt, tokenizer, add_special_tokens=not chat))
        else:
            found.append(prompt)
    return found


def _encode_text(
    text: str, tokenizer: Tokenizer, *, add_special_tokens: bool
) -> Sequence[int] | HeteroError:
    try:
        return tokenizer.encode(text, add_special_tokens)
    except RequestError as error:
        return error


def _why_not(token_ids: Sequence[int], spec: ModelSpec) -> HeteroError | None:
    """What the engine would say after the weights were loaded."""
    limit = spec.max_position_embeddings
    if not token_ids:
        return RequestError("the prompt has no tokens; give more text")
    if len(token_ids) >= limit:
        return RequestError(
            f"the prompt has {len(token_ids)} tokens but {spec.name} has a context of {limit}, "
            "with at least 1 to generate; shorten the prompt"
        )
    outside = next((each for each in token_ids if not 0 <= each < spec.vocab_size), None)
    if outside is not None:
        return RequestError(
            f"the prompt has token id {outside} but {spec.name} knows 0..{spec.vocab_size - 1}"
        )
    return None

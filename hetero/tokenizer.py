"""Tokenizer: text to token ids and back, for a whole text or one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from hetero.chat_template import (
    MAX_TOKENIZER_CONFIG_BYTES,
    Conversation,
    load_chat_template,
    render_chat,
    render_chats,
)
from hetero.errors import HeteroError, ModelFolderError, RequestError
from hetero.model_folder import printable, read_bytes, read_json

_MAX_TOKENIZER_BYTES = 256 << 20
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most 4 bytes, so at most 4 tokens; after more than that the bytes are garbage.
_MAX_HELD_TOKENS = 16
# Tokens before the text decide whether it begins with a space.
_NUM_CONTEXT_TOKENS = 6
_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """The tokenizer of a model folder, its special tokens and its chat template."""

    def __init__(
        self,
        *,
        folder: Path,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        chat_template: str | None,
    ) -> None:
        self.folder = folder
        self.special_tokens = dict(special_tokens)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self._backend = backend

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """Read `tokenizer.json` and the files beside it; None where there is no tokenizer.json.

        Raises
        ------
        ModelFolderError
            A file is damaged, too large, or holds the wrong types; the message names it.
        """
        path = folder / "tokenizer.json"
        data = read_bytes(folder, path.name, _MAX_TOKENIZER_BYTES)
        if data is None:
            return None
        with _tokenizers_errors(path):
            backend = tokenizers.Tokenizer.from_buffer(data)
            # Some files ask to cut every text at a length; a prompt is never cut in silence.
            backend.no_truncation()
            backend.no_padding()
        settings = read_json(folder, "tokenizer_config.json", MAX_TOKENIZER_CONFIG_BYTES) or {}
        special_tokens = _special_tokens(settings)
        ids = {key: _folder_token_ids(folder, key) for key in ("bos_token_id", "eos_token_id")}
        for key, name in (("bos_token_id", "bos_token"), ("eos_token_id", "eos_token")):
            if not ids[key] and name in special_tokens:
                found = backend.token_to_id(special_tokens[name])
                ids[key] = () if found is None else (found,)
        return cls(
            folder=folder,
            backend=backend,
            special_tokens=special_tokens,
            bos_token_id=ids["bos_token_id"][0] if ids["bos_token_id"] else None,
            eos_token_ids=ids["eos_token_id"],
            chat_template=load_chat_template(folder),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, those added to the base vocabulary included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids; a rendered chat has its special tokens already, so pass False.

        Raises
        ------
        RequestError
            The text holds half of a UTF-16 pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"character {error.start} of the text is U+{ord(text[error.start]):04X}, half of a "
                "UTF-16 pair; send the whole character"
            ) from None
        with _tokenizers_errors(self.folder / "tokenizer.json"):
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids to text; ids outside the vocabulary give nothing."""
        with _tokenizers_errors(self.folder / "tokenizer.json"):
            return str(
                self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
            )

    def apply_chat_template(
        self, messages: Conversation, add_generation_prompt: bool = True
    ) -> str:
        """Messages to prompt text; see `chat_template.render_chat` for its errors.

        Raises
        ------
        RequestError
            The model has no chat template, or its template refuses the messages.
        """
        return render_chat(
            self._known_template(),
            messages,
            source=str(self.folder),
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )

    def apply_chat_template_to_all(
        self, conversations: Sequence[Conversation], add_generation_prompt: bool = True
    ) -> list[str | HeteroError]:
        """Many conversations by one worker: for each its text or why it cannot be rendered."""
        return render_chats(
            self._known_template(),
            conversations,
            source=str(self.folder),
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )

    def _known_template(self) -> str:
        if self.chat_template is None:
            raise RequestError(
                f"the model in {self.folder} has no chat template; send a prompt, not messages"
            )
        return self.chat_template


class IncrementalDetokenizer:
    """Text of a growing list of tokens; characters split over tokens come out whole.

    Only the last few tokens are decoded again for each new one: the text between them and the
    ones before is what is new (the way of vLLM and TGI).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._recent = list(prompt_token_ids[-_NUM_CONTEXT_TOKENS:])
        self._num_decoded = len(self._recent)

    def append(self, token_ids: Sequence[int]) -> str:
        """Add tokens and return the text they finish."""
        return "".join(self._append_one(token_id) for token_id in token_ids)

    def flush(self) -> str:
        """The text held back for a character that never was finished; after the last token."""
        return self._take(self._undecoded())

    def _append_one(self, token_id: int) -> str:
        self._recent.append(token_id)
        num_held = len(self._recent) - self._num_decoded
        new = self._undecoded()
        may_grow = not new or new.endswith(_REPLACEMENT)
        return "" if may_grow and num_held < _MAX_HELD_TOKENS else self._take(new)

    def _undecoded(self) -> str:
        before = self._tokenizer.decode(self._recent[: self._num_decoded], self._skips_special)
        return self._tokenizer.decode(self._recent, self._skips_special)[len(before) :]

    def _take(self, new: str) -> str:
        # The tokens that gave this text are the context of the next.
        num_new = len(self._recent) - self._num_decoded
        self._recent = self._recent[-max(num_new, _NUM_CONTEXT_TOKENS) :]
        self._num_decoded = len(self._recent)
        self.text += new
        return new


class StopChecker:
    """Finds stop strings in a growing text, wherever tokens end.

    The stop string that is complete first counts, as if the text came one character at a time; so
    the answer does not depend on how the text was divided.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string would stop at once"
        self.text = ""
        self.stop: str | None = None
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._end: int | None = None

    def append(self, new: str, *, may_stop: bool = True) -> bool:
        """Add text; True when a stop string has occurred. One in text that may not stop is text."""
        if self.stop is not None:
            return True
        num_before = len(self.text)
        self.text += new
        if not may_stop:
            return False
        found = []
        for stop in self._stops:
            start = self.text.find(stop, max(0, num_before - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if found:
            end, start, self.stop = min(found)
            self._end = end if self._include_stop else start
        return self.stop is not None

    @property
    def visible_text(self) -> str:
        """The text up to the stop, or what may be shown before one is ruled out."""
        return self.text[: self.num_visible_chars]

    @property
    def num_visible_chars(self) -> int:
        """Length that will stay: all but the longest end that begins a stop string."""
        if self._end is not None:
            return self._end
        return len(self.text) - max(map(self._num_begun, self._stops), default=0)

    @property
    def final_text(self) -> str:
        """The text when generation has ended: nothing is held back."""
        return self.text if self._end is None else self.text[: self._end]

    def _num_begun(self, stop: str) -> int:
        lengths = range(min(len(stop) - 1, len(self.text)), 0, -1)
        return next((n for n in lengths if self.text.endswith(stop[:n])), 0)


@contextmanager
def _tokenizers_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # The library raises plain Exception, and for what it did not foresee a panic, which is a
        # BaseException of a class that cannot be imported.
        is_panic = type(error).__name__ == "PanicException"
        if not is_panic and not isinstance(error, Exception):
            raise
        raise ModelFolderError(f"{path} cannot be used as a tokenizer: {error}") from None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of tokenizer_config.json: strings, or objects with their content."""
    found = {}
    for name in _SPECIAL_NAMES:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """End-of-sequence tokens of a model folder, for a model that is used without a tokenizer.

    Raises
    ------
    ModelFolderError
        generation_config.json or config.json is damaged or names what is no token id.
    """
    return _folder_token_ids(folder, "eos_token_id")


def _folder_token_ids(folder: Path, key: str) -> tuple[int, ...]:
    # Both are read: a damaged file is an error also where the other one has the answer.
    found: list[tuple[int, ...]] = []
    for name in ("generation_config.json", "config.json"):
        value = (read_json(folder, name) or {}).get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int and 0 <= item < 1 << 31 for item in listed):
            raise ModelFolderError(
                f"{folder / name}: {key} is {printable(str(value))} but must be a token id or a "
                "list of them"
            )
        found.append(tuple(listed))
    return found[0] or found[1]

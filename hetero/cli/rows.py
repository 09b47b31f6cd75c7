"""Rows of `hetero run --input --output`: every line checked first, one line written per row."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hetero.errors import EnvironmentProblemError, ExitCode, HeteroError, UsageError

_MAX_PROBLEMS = 20
_KEYS = {"custom_id", "prompt", "prompt_token_ids"}


class OutputExistsError(HeteroError):
    """The output file is there already; its rows are somebody's work."""

    exit_code = ExitCode.OUTPUT_LOCKED


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt: text, or token ids."""

    custom_id: str
    prompt: str | tuple[int, ...]


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read JSON lines `{"prompt": ...}` or `{"prompt_token_ids": [...]}`, with `custom_id` or not.

    A row without `custom_id` is called after its line: `line-1` is the first.

    Raises
    ------
    UsageError
        The file cannot be read, has no rows, or has bad ones; names every bad line (the first 20).
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    rows: list[Row] = []
    problems: list[str] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line, number)
        if isinstance(row, str):
            problems.append(f"line {number}: {row}")
            continue
        first = line_of.setdefault(row.custom_id, number)
        if first != number:
            problems.append(f"line {number}: custom_id {row.custom_id!r} is that of line {first}")
        rows.append(row)
    if problems:
        listed = "; ".join(problems[:_MAX_PROBLEMS])
        more = len(problems) - _MAX_PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        plural = "s" if len(problems) > 1 else ""
        raise UsageError(f"{path} has {len(problems)} bad line{plural}: {listed}{rest}")
    if not rows:
        raise UsageError(f'{path} has no rows; give lines such as {{"prompt": "Once upon a time"}}')
    return tuple(rows)


def _parse(line: bytes, number: int) -> Row | str:
    """A row, or what is wrong with its line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    if not isinstance(value, dict):
        return "not a JSON object"
    unknown = sorted(value.keys() - _KEYS)
    if unknown:
        return f"unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}"
    custom_id = value.get("custom_id", f"line-{number}")
    if not isinstance(custom_id, str) or not custom_id:
        return "custom_id must be a string that is not empty"
    if "prompt" in value and "prompt_token_ids" in value:
        return "give prompt or prompt_token_ids, not both"
    if "prompt" in value:
        prompt = value["prompt"]
        if not isinstance(prompt, str):
            return "prompt must be a string"
    elif "prompt_token_ids" in value:
        ids = value["prompt_token_ids"]
        if not isinstance(ids, list) or not all(type(token_id) is int for token_id in ids):
            return "prompt_token_ids must be a list of whole numbers"
        prompt = tuple(ids)
    else:
        return "there is no prompt; give prompt or prompt_token_ids"
    if not prompt:
        return "the prompt is empty"
    return Row(custom_id=custom_id, prompt=prompt)


class RowWriter:
    """Appends a line per finished row; what is written stays, whatever happens next. Mutable."""

    def __init__(self, path: Path) -> None:
        self.num_failed = 0
        self._path = path
        self._num_rows = 0
        try:
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except FileExistsError:
            raise _exists(path) from None
        except OSError as error:
            raise EnvironmentProblemError(f"cannot write {path}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(
        self,
        row: Row,
        *,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        finish_reason: str | None = None,
        error: str | None = None,
    ) -> None:
        """Append one row; `error` says why it failed.

        Raises
        ------
        EnvironmentProblemError
            The line could not be written; the lines before it are whole.
        """
        document = {
            "custom_id": row.custom_id,
            "text": text,
            "token_ids": None if token_ids is None else list(token_ids),
            "finish_reason": finish_reason,
            "error": error,
        }
        end = self._file.tell()
        data = json.dumps(document).encode() + b"\n"
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as problem:
            # A full disk takes part of a line: readers must not meet it.
            os.ftruncate(self._file.fileno(), end)
            raise EnvironmentProblemError(
                f"cannot write {self._path}: {problem.strerror}; its {self._num_rows} rows are "
                "complete"
            ) from None
        self._num_rows += 1
        self.num_failed += error is not None


def refuse_existing(path: Path) -> None:
    """Refuse an output file that exists, before any work.

    Raises
    ------
    OutputExistsError
        It does.
    """
    if os.path.lexists(path):
        raise _exists(path)


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError(f"the output {path} exists already; give another name, or remove it")

"""JSON into frozen values, strictly: what is twice there or not finite is refused with its path."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeVar

import msgspec

T = TypeVar("T")

# Of whole numbers: an exabyte has 18, and arithmetic with more overflows a float in the end.
_MAX_DIGITS = 18

# What msgspec has in a path for a key of a dictionary.
_ANY_KEY = "[...]"

# A longer key is shown by its beginning.
_MAX_KEY_CHARS = 60


class _SuspectError(Exception):
    """Something in the document is twice there or not finite; a second reading says where."""


class _Pairs(list[tuple[str, Any]]):
    """The members of a JSON object in the file's order, with those that are twice there."""


class _NotFinite(str):
    """A number as it is written, which no float can hold."""


class _TooLong(str):
    """A whole number as it is written, with more digits than anything is counted in."""


def decode_struct(data: bytes, kind: type[T]) -> T:
    """Read a JSON document as a msgspec structure; nothing in it is ignored.

    Parameters
    ----------
    data
        The document, in UTF-8.
    kind
        What it must be; types and ranges are those of its fields.

    Returns
    -------
    kind
        The value.

    Raises
    ------
    ValueError
        Not JSON, a key that is twice in its object, a number that is not finite or has too many
        digits, an unknown or missing key, a wrong type or value. The message ends in the path, as
        "- at `$.a[3].b`".

    Examples
    --------
    >>> decode_struct(b'{"a": [1, 2]}', dict[str, list[int]])
    {'a': [1, 2]}
    >>> decode_struct(b'{"a": {"b": 1, "b": 2}}', dict[str, dict[str, int]])
    Traceback (most recent call last):
    ValueError: the key is there twice - at `$.a.b`
    """
    _refuse_suspects(_text(data))
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise ValueError(_with_keys(str(error), data, kind)) from None


def _with_keys(fault: str, data: bytes, kind: type[object]) -> str:
    """A message of msgspec's with the keys of dictionaries, for which its path has `[...]`.

    The member that is at fault is the first that alone in its dictionary gives the same message.
    """
    original, tree = fault, json.loads(data)
    known, members = "", tree
    while _ANY_KEY in fault:
        holder = fault.rpartition("`$")[2].partition(_ANY_KEY)[0]
        for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", holder.removeprefix(known)):
            members = members[name or int(index)]
        whole = dict(members)
        for key, value in whole.items():
            members.clear()
            members[key] = value
            if _fault(tree, kind) == original:
                break
        else:
            return fault
        known, members = f"{holder}{_step(key)}", value
        fault = fault.replace(f"${holder}{_ANY_KEY}", f"${known}")
    return fault


def _fault(tree: object, kind: type[object]) -> str | None:
    try:
        msgspec.json.decode(json.dumps(tree), type=kind)
    except msgspec.ValidationError as error:
        return str(error)
    return None


def _text(data: bytes) -> str:
    if not data.strip():
        raise ValueError("it is empty")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} is 0x{data[error.start]:02x}, which is not UTF-8"
        ) from None


def _refuse_suspects(text: str) -> None:
    """Raise on a key that is twice there or a number that is not finite; the first in the file.

    msgspec takes the last of two keys. Its reader is three times as fast as this one, which keeps
    nothing: only a document that is suspect is read again, as a tree.
    """
    try:
        json.loads(
            text,
            object_pairs_hook=_check_keys,
            parse_float=_check_number,
            parse_int=_check_integer,
            parse_constant=_suspect,
        )
    except _SuspectError:
        fault = _first_fault(text)
        assert fault is not None
        raise ValueError(fault) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None


def _check_keys(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise _SuspectError


def _check_number(digits: str) -> None:
    if math.isinf(float(digits)):
        raise _SuspectError


def _check_integer(digits: str) -> None:
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        raise _SuspectError


def _suspect(name: str) -> NoReturn:
    raise _SuspectError


def _first_fault(text: str) -> str | None:
    """What is wrong with the first number or key of the document that is, and its path."""
    tree = json.loads(
        text,
        object_pairs_hook=_Pairs,
        parse_float=_number,
        parse_int=_integer,
        parse_constant=_NotFinite,
    )
    # What is still to be looked at, the next at the end: nesting is as deep as the file likes.
    waiting: list[tuple[str, Any, bool]] = [("$", tree, False)]
    while waiting:
        path, value, is_repeated = waiting.pop()
        if is_repeated:
            return f"the key is there twice - at `{path}`"
        if isinstance(value, _NotFinite):
            return f"{_shown(value)} is not a finite number - at `{path}`"
        if isinstance(value, _TooLong):
            return f"{_shown(value)} has more than {_MAX_DIGITS} digits - at `{path}`"
        children: list[tuple[str, Any, bool]] = []
        if isinstance(value, _Pairs):
            seen: set[str] = set()
            for key, member in value:
                children.append((f"{path}{_step(key)}", member, key in seen))
                seen.add(key)
        elif isinstance(value, list):
            children = [(f"{path}[{index}]", item, False) for index, item in enumerate(value)]
        waiting += reversed(children)
    return None


def _number(digits: str) -> _NotFinite | None:
    return _NotFinite(digits) if math.isinf(float(digits)) else None


def _integer(digits: str) -> _TooLong | _NotFinite | None:
    if len(digits.lstrip("-")) <= _MAX_DIGITS:
        return None
    return _NotFinite(digits) if math.isinf(float(digits)) else _TooLong(digits)


def _step(key: str) -> str:
    """One key in a path: `.link`, or `["a key"]` where it is no name."""
    is_name = key.isascii() and key.isidentifier()
    return f".{_shown(key)}" if is_name else f"[{json.dumps(_shown(key))}]"


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_KEY_CHARS else f"{text[:_MAX_KEY_CHARS]}..."

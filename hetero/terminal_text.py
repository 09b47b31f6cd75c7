"""Untrusted text on its way to a terminal: nothing in it may move the cursor or change a colour."""

from __future__ import annotations

import unicodedata

# Characters of rising height, for terminals that have them and for those that have ASCII only.
BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII_BLOCKS = "_.-=+*%#"

_KEPT = "\n\t"
_SHOWN = "?"


def visible(text: str) -> str:
    """The text with control characters, other than newline and tab, shown as `?`.

    Examples
    --------
    >>> visible("red: \\x1b[31m")
    'red: ?[31m'
    """
    if text.isprintable():
        return text
    return "".join(_SHOWN if _is_control(char) else char for char in text)


def one_line(text: str) -> str:
    """The same, on one line.

    Examples
    --------
    >>> one_line("a\\nb")
    'a b'
    """
    return " ".join(visible(text).split())


def _is_control(char: str) -> bool:
    # Cc: terminal commands. Cf: among them marks that reverse the direction of what follows; the
    # joiners of emoji and of Indic scripts are harmless.
    if char in _KEPT or char in "\u200c\u200d":
        return False
    return unicodedata.category(char) in ("Cc", "Cf")

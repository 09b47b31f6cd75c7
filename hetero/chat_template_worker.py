"""Renders chat templates in a process of its own, which chat_template.py starts.

Run as a script by path, with an isolated interpreter: it imports nothing of hetero. One JSON
request on stdin; on stdout one JSON line for each conversation: {"text"}, {"refused"} (the template
raised an error of its own for these messages) or {"broken"} (the template itself).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

_NUM_STANDARD_FILES = 3


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    sys.path += request["import_folders"]
    environment = _environment()
    _limit_process(request["max_memory_bytes"])
    _start_clock(request["max_seconds"])
    broken = None
    try:
        template = environment.from_string(request["template"])
    except Exception as error:  # a template can raise anything: all of it is its own fault
        broken = _describe(error)
    for messages in request["conversations"]:
        if broken is not None:
            _answer({"broken": broken})
            continue
        _start_clock(request["max_seconds"])
        variables = request["variables"] | {"messages": messages}
        _answer(_render(template, variables, request["max_chars"]))


def _render(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    from jinja2.exceptions import SecurityError

    parts, num_chars = [], 0
    try:
        for part in template.generate(variables):
            num_chars += len(part)
            if num_chars > max_chars:
                return {"broken": f"it wrote more than {max_chars} characters"}
            parts.append(part)
    except (SecurityError, MemoryError, RecursionError) as error:
        return {"broken": _describe(error)}
    except Exception as error:  # as above, but it may be these messages that it refuses
        return {"refused": _describe(error)}
    return {"text": "".join(parts)}


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needed too much memory"
    kind = type(error).__name__
    # Raised by the template's own raise_exception(): the message stands alone.
    text = str(error)[:500] if kind == "TemplateError" else f"{kind}: {str(error)[:500]}"
    return text.encode("unicode_escape").decode()


def _answer(answer: dict[str, str]) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _start_clock(max_seconds: float) -> None:
    # No handler: the signal ends the process even inside one long C loop ('a' * 10**9).
    signal.setitimer(signal.ITIMER_REAL, max_seconds)


def _limit_process(max_memory_bytes: int) -> None:
    """Take away what rendering does not need, should a template leave the sandbox."""
    datetime.now().astimezone()  # reads the time zone file while files can be opened
    limits = {
        resource.RLIMIT_AS: max_memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _NUM_STANDARD_FILES,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))
    for name in set(os.environ) - {"TZ"}:
        del os.environ[name]


def _environment() -> jinja2.Environment:
    """The sandbox with the names that transformers gives to chat templates."""
    # What Python and Jinja import only when first used is loaded while files can still be opened.
    import codecs
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.debug
    import jinja2.ext
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    codecs.lookup("unicode_escape")

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja makes a forbidden attribute an empty value until it is used; here it is an end."""

        def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
            kind = type(obj).__name__
            raise SecurityError(f"access to {attribute!r} of a {kind} is not allowed")

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant wrote, for training; here it is plain text."""

        tags = {"generation"}  # noqa: RUF012  jinja reads it from the class

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PlainNamespace(Namespace):
        """A namespace that takes no underscore names: they reach into Python."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            names = dict(*args[1:], **kwargs)
            for name in names:
                _refuse_underscore(name)
            Namespace.__init__(args[0], names)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_underscore(name)
            Namespace.__setitem__(self, name, value)

    def _refuse_underscore(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")

    def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    names: dict[str, Callable[..., Any]] = {
        "dict": make_dict,
        "namespace": PlainNamespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    environment.globals.update(names)
    del environment.globals["lipsum"]
    return environment


if __name__ == "__main__":
    main()

"""Chat templates of a model folder: found, and rendered where they can do no harm.

A template is a program of the model's maker. It runs in Jinja's sandbox, in a process of its own
that is killed after two seconds, has little memory and can open no file: chat_template_worker.py.
Starting that process takes about 0.1 s, so many conversations are rendered by one.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hetero.errors import EnvironmentProblemError, HeteroError, ModelFolderError, RequestError
from hetero.model_folder import printable, read_bytes, read_json

MAX_TEMPLATE_BYTES = 1 << 20
MAX_OUTPUT_CHARS = 8 << 20
MAX_RENDER_S = 2.0
MAX_TOKENIZER_CONFIG_BYTES = 16 << 20
MAX_CONVERSATION_BYTES = 8 << 20
_MAX_WORKER_BYTES = 16 << 20  # conversations given to one worker
# The interpreter with Jinja maps 30 MB, and up to 230 MB where the C library maps its locales.
_MAX_MEMORY_BYTES = 512 << 20
# The worker's own clock is what ends a template; this only catches a worker that never started.
_WORKER_START_S = 30.0

Conversation = Sequence[Mapping[str, Any]]


def load_chat_template(folder: Path) -> str | None:
    """The chat template of a model folder, or None.

    `chat_template.jinja` goes before `chat_template` of tokenizer_config.json (a string, or named
    templates of which "default" is taken), as in transformers.

    Raises
    ------
    ModelFolderError
        The template is larger than 1 MB, is not text, or none of several is called "default".
    """
    name = "chat_template.jinja"
    data = read_bytes(folder, name, MAX_TEMPLATE_BYTES)
    if data is not None:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ModelFolderError(f"{folder / name} is not UTF-8 text: {error.reason}") from None
    name = "tokenizer_config.json"
    config = read_json(folder, name, MAX_TOKENIZER_CONFIG_BYTES) or {}
    template = config.get("chat_template")
    if isinstance(template, list):
        template = _default_of_named(template, folder / name)
    if template is None:
        return None
    if not isinstance(template, str):
        raise ModelFolderError(
            f"{folder / name}: chat_template is {type(template).__name__} but must be a string"
        )
    num_bytes = len(template.encode("utf-8", "surrogatepass"))
    if num_bytes > MAX_TEMPLATE_BYTES:
        raise ModelFolderError(
            f"{folder / name}: chat_template has {num_bytes} bytes but at most "
            f"{MAX_TEMPLATE_BYTES} are read"
        )
    return template


def render_chat(
    template: str,
    messages: Conversation,
    *,
    source: str,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """Render one conversation; see `render_chats`, whose errors for it are raised."""
    (answer,) = render_chats(
        template,
        [messages],
        source=source,
        add_generation_prompt=add_generation_prompt,
        special_tokens=special_tokens,
    )
    if isinstance(answer, HeteroError):
        raise answer
    return answer


def render_chats(
    template: str,
    conversations: Sequence[Conversation],
    *,
    source: str,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
) -> list[str | HeteroError]:
    """Render conversations with a template that is not trusted.

    Parameters
    ----------
    template : str
        Jinja source.
    conversations : sequence of conversations
        Each a list of messages: objects with a "role".
    source : str
        What the template is called in errors.
    add_generation_prompt : bool
        Whether to end with the beginning of the assistant's turn.
    special_tokens : mapping, optional
        `bos_token`, `eos_token` and the like.

    Returns
    -------
    list of str or HeteroError
        For each conversation its text; or a RequestError where the messages are malformed or the
        template refuses them; or a ModelFolderError where the template is broken, leaves the
        sandbox, or writes more than 8 MB or needs more than 512 MB for this conversation.

    Raises
    ------
    ModelFolderError
        The template took longer than 2 s for one conversation.
    """
    variables = {
        **(special_tokens or {}),
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
    }
    answers: list[str | HeteroError] = []
    group: list[str] = []
    for messages in conversations:
        try:
            group.append(_conversation_json(messages))
        except RequestError as error:
            # Answers keep the order of the conversations, so those before this one go first.
            answers += _run_worker(template, group, source=source, variables=variables)
            answers.append(error)
            group = []
        if sum(map(len, group)) > _MAX_WORKER_BYTES:
            answers += _run_worker(template, group, source=source, variables=variables)
            group = []
    return answers + _run_worker(template, group, source=source, variables=variables)


def _conversation_json(messages: Conversation) -> str:
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("messages must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {index} must be an object with a role")
    try:
        text = json.dumps(messages)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages must be plain JSON: {error}") from None
    if len(text) > MAX_CONVERSATION_BYTES:
        raise RequestError(
            f"the messages have {len(text)} bytes as JSON but at most {MAX_CONVERSATION_BYTES} "
            "are rendered"
        )
    return text


def _run_worker(
    template: str, conversations: Sequence[str], *, source: str, variables: Mapping[str, Any]
) -> list[str | HeteroError]:
    if not conversations:
        return []
    request = {
        "import_folders": _import_folders(),
        "max_chars": MAX_OUTPUT_CHARS,
        "max_memory_bytes": _MAX_MEMORY_BYTES,
        "max_seconds": MAX_RENDER_S,
        "template": template,
        "variables": variables,
    }
    head = json.dumps(request).removesuffix("}")
    body = f'{head}, "conversations": [{", ".join(conversations)}]}}'
    timeout_s = _WORKER_START_S + MAX_RENDER_S * len(conversations)
    try:
        worker = subprocess.run(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("chat_template_worker.py"))],
            input=body.encode(),
            capture_output=True,
            check=False,
            cwd="/",
            timeout=timeout_s,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblemError(
            f"chat templates are rendered by a process of their own, which failed: {error}"
        ) from None
    lines = worker.stdout.splitlines()
    if worker.returncode == -signal.SIGALRM:
        raise ModelFolderError(
            f"the chat template of {source} took longer than {MAX_RENDER_S:g} s for conversation "
            f"{len(lines)}; use another template or plain prompts"
        )
    if worker.returncode != 0 or len(lines) != len(conversations):
        reason = worker.stderr.decode(errors="replace").strip().splitlines()[-1:] or [
            "no reason given"
        ]
        raise ModelFolderError(
            f"the chat template of {source} ended its process with code {worker.returncode}: "
            f"{printable(reason[0])}"
        )
    return [_answer(json.loads(line), source) for line in lines]


def _answer(answer: dict[str, str], source: str) -> str | HeteroError:
    if "text" in answer:
        return answer["text"]
    if "refused" in answer:
        return RequestError(
            f"the chat template of {source} refuses the messages: {answer['refused']}"
        )
    return ModelFolderError(f"the chat template of {source} cannot be used: {answer['broken']}")


def _import_folders() -> list[str]:
    folders = []
    for package in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, f"{package} is a dependency"
        folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))


def _default_of_named(templates: list[Any], path: Path) -> str:
    named = {
        entry["name"]: entry["template"]
        for entry in templates
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }
    if "default" not in named:
        raise ModelFolderError(
            f"{path}: chat_template names {', '.join(map(printable, named)) or 'nothing'} "
            "but not 'default'"
        )
    template: str = named["default"]
    return template

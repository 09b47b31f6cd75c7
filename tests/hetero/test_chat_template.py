"""Chat templates: the same text as transformers, and no way out of the sandbox or the limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from hetero import chat_template
from hetero.chat_template import load_chat_template, render_chat, render_chats
from hetero.errors import HeteroError, ModelFolderError, RequestError

DATA = Path(__file__).parents[2].parent / "shared/data/chat_templates"
REAL = (
    "GLM-4.6",
    "HuggingFaceTB-SmolLM3-3B",
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen3-Coder",
    "deepseek-ai-DeepSeek-V3.1",
    "microsoft-Phi-3.5-mini-instruct",
    "openai-gpt-oss-120b",
)
USER = {"role": "user", "content": 'What is 2 < 3 & "4"? \u00e9\U0001f600'}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "  Yes.\n"}, {"role": "user", "content": "Why?"}],
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(template: str, messages: list[dict[str, Any]] | None = None, **arguments: Any) -> str:
    return render_chat(template, messages or [USER], source="toy", **arguments)


@pytest.mark.parametrize("name", REAL)
def test_real_templates_give_the_text_of_transformers(name: str) -> None:
    """Templates as models ship them."""
    path = DATA / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    template = path.read_text(encoding="utf-8")
    expected, _ = render_jinja_template(
        CONVERSATIONS, chat_template=template, add_generation_prompt=True, **SPECIAL
    )
    actual = render_chats(template, CONVERSATIONS, source=name, special_tokens=SPECIAL)
    assert actual == expected


@pytest.mark.parametrize(
    "template",
    [
        "  {% if true %}\n  a\n  {% endif %}\nb\n",
        "{{ {'k': '<\u00e9>', 'n': [1, none, true]} | tojson }}",
        "{{ {'b': 1, 'a': 2} | tojson(indent=2) }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}"
        "{% endif %}{{ i }}{% endfor %}",
        "{% set ns = namespace(a=1, self=2) %}{% set ns.a = 3 %}{{ ns.a }}{{ ns.self }}",
        "{{ dict(a=1).items() | list }}{{ messages | length }}{{ undefined_name }}|",
        "{{ 'a b c d' | wordwrap(3) }}{{ messages | pprint }}{{ '%.2f' | format(1.5) }}",
        "{{ messages[0]['content'].split('?')[0] | trim | upper }}{{ 'x' if tools else 'y' }}",
        "{{ tools is none }}{{ documents is none }}{{ bos_token }}",
        "{{ 'begin' if add_generation_prompt else 'end' }}",
        "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) }}{{ [3, 1, 2] | sort | join('-') }}",
    ],
)
def test_template_features_give_the_text_of_transformers(template: str) -> None:
    """What models' templates use: blocks, JSON without HTML escapes, loops, namespaces, filters."""
    (expected,), _ = render_jinja_template([[USER]], chat_template=template, **SPECIAL)
    assert render(template, special_tokens=SPECIAL, add_generation_prompt=False) == expected


def test_a_template_knows_the_date_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """strftime_now works in the worker, in the time zone of the caller."""
    monkeypatch.setenv("TZ", "XXX-14")
    assert render("{{ strftime_now('%H%z') }}") in {
        time.strftime("%H", time.gmtime(time.time() + 14 * 3600 + delay)) for delay in (-60, 0)
    }


HOSTILE = {
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "map attribute": "{{ ['']|map(attribute='__class__.__mro__')|list }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'] }}",
    "function globals": "{{ raise_exception.__globals__ }}",
    "attribute that is not used": "{{ '' if messages.__class__ else '' }}",
    "function code": "{{ strftime_now.__code__.co_consts }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "self": "{{ self._TemplateReference__context.environment }}",
    "namespace keyword": "{{ namespace(__class__=1) }}",
    "namespace assignment": "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of an object": "{{ messages[0].update({'a': 1}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "extends": "{% extends '/etc/passwd' %}",
    "memory": "{{ 'a' * 10**9 }}",
    "memory of a list": "{{ [0] * 10**9 }}",
    "memory by doubling": "{% set ns = namespace(a='a') %}{% for i in range(99) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "padding": "{{ '%999999999d' | format(1) }}",
    "centre": "{{ 'a' | center(10**9) }}",
    "output": "{{ 'a' * 10**7 }}",
    "output in parts": "{% for i in range(9) %}{{ 'a' * 10**6 }}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "range": "{{ range(10**9) | list }}",
    "syntax": "{% if %}",
    "unknown tag": "{% exec 'x' %}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_fails_and_says_whose_fault_it_is(template: str) -> None:
    """Escapes, memory, output: a short printable error that names the model."""
    with pytest.raises(HeteroError, match="chat template of toy") as caught:
        render(template)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ (10**9999)**9999 }}",  # one long operation in C, which no Python handler interrupts
        "{{ ('a' * 50000) | replace('a', 'aa' * 50) | urlize }}" * 50,
    ],
)
def test_an_endless_template_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's own clock ends it, whatever it is doing."""
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.3)
    with pytest.raises(ModelFolderError, match=r"took longer than 0\.3 s for conversation 0"):
        render(template)


def test_the_limits_are_the_documented_ones() -> None:
    """Two seconds and 8 MB, as the documentation says."""
    assert (chat_template.MAX_RENDER_S, chat_template.MAX_OUTPUT_CHARS) == (2.0, 8 << 20)


def test_the_worker_cannot_open_files_or_read_secrets(tmp_path: Path) -> None:
    """Should a template leave the sandbox, the process has nothing: no file, no environment."""
    worker = Path(chat_template.__file__).with_name("chat_template_worker.py")
    code = (
        "import runpy, os, sys, json;"
        f"module = runpy.run_path({str(worker)!r});"
        "module['_limit_process'](1 << 29);"
        "failures = 0\n"
        "for attempt in ('open(\"/etc/passwd\")', 'os.pipe()', 'bytearray(1 << 30)'):\n"
        "    try: eval(attempt)\n"
        "    except (OSError, MemoryError): failures += 1\n"
        "print(failures, sorted(os.environ))"
    )
    environment = os.environ | {"HF_TOKEN": "secret", "TZ": "UTC"}
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert output == "3 ['TZ']\n"


def test_a_template_that_refuses_the_messages_blames_the_messages() -> None:
    """raise_exception is how templates say that roles must alternate."""
    template = "{{ raise_exception('roles must \\x1b alternate') }}"
    with pytest.raises(RequestError, match=r"refuses the messages: roles must \\x1b alternate"):
        render(template)


def test_one_bad_conversation_does_not_spoil_the_others() -> None:
    """Answers keep the order; each bad one has its own error."""
    template = (
        "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    answers = render_chats(template, [[USER], [], [USER, USER], [USER]], source="toy")
    assert answers[0] == answers[3] == USER["content"]
    assert "at least one message" in str(answers[1])
    assert "one only" in str(answers[2])
    assert all(isinstance(answer, RequestError) for answer in answers[1:3])
    assert render_chats(template, [], source="toy") == []


def test_large_batches_go_to_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order is kept where the conversations do not fit one worker."""
    monkeypatch.setattr(chat_template, "_MAX_WORKER_BYTES", 1000)
    conversations = [[{"role": "user", "content": f"{i}" * 100}] for i in range(9)]
    actual = render_chats("{{ messages[0].content }}", conversations, source="toy")
    assert actual == [f"{i}" * 100 for i in range(9)]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hi", "must be a list"),
        ([], "at least one message"),
        (["hi"], "message 0 must be an object with a role"),
        ([USER, {"content": "x"}], "message 1 must be an object with a role"),
        ([{"role": 3}], "message 0 must be an object with a role"),
        ([{"role": "user", "content": b"x"}], "must be plain JSON"),
        ([{"role": "user", "content": "x" * (9 << 20)}], "at most 8388608 are rendered"),
    ],
)
def test_malformed_messages_are_a_request_error(messages: Any, expected: str) -> None:
    """No worker is started for what is no conversation."""
    with pytest.raises(RequestError, match=expected):
        render_chat("x", messages, source="toy")


def test_half_a_utf16_pair_comes_back_as_it_went_in() -> None:
    """The tokenizer refuses it with its place; the worker does not fall over it."""
    message = {"role": "user", "content": "a\ud800"}
    assert render("{{ messages[0].content }}", [message]) == "a\ud800"


# --- finding the template ----------------------------------------------------------------------


def write_config(folder: Path, template: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_the_template_file_goes_before_the_config(tmp_path: Path) -> None:
    """As in transformers; without either there is none."""
    assert load_chat_template(tmp_path) is None
    assert load_chat_template(write_config(tmp_path, "from config")) == "from config"
    (tmp_path / "chat_template.jinja").write_bytes(b"from file \xc3\xa9")
    assert load_chat_template(tmp_path) == "from file \u00e9"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    """A model with a template for tools and one for everything else."""
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert load_chat_template(write_config(tmp_path, named)) == "d"
    with pytest.raises(ModelFolderError, match="names 'tools' but not 'default'"):
        load_chat_template(write_config(tmp_path, named[:1]))


@pytest.mark.parametrize("template", [3, {"a": 1}, ["x"], [{"name": "default", "template": 1}]])
def test_a_template_of_another_type_is_refused(tmp_path: Path, template: object) -> None:
    """The message names the file."""
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json: chat_template"):
        load_chat_template(write_config(tmp_path, template))


def test_a_huge_template_is_refused(tmp_path: Path) -> None:
    """Larger than 1 MB, in either place."""
    with pytest.raises(ModelFolderError, match="1048577 bytes but at most 1048576"):
        load_chat_template(write_config(tmp_path, "x" * ((1 << 20) + 1)))
    (tmp_path / "chat_template.jinja").write_text("x" * ((1 << 20) + 1))
    with pytest.raises(ModelFolderError, match="1048577 bytes but at most 1048576"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFolderError, match="is not UTF-8 text"):
        load_chat_template(tmp_path)

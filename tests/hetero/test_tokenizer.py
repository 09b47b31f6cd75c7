"""Tokenizer: round trips, one token at a time, stop strings, and damaged tokenizer files."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.errors import ModelFolderError, RequestError
from hetero.tokenizer import (
    IncrementalDetokenizer,
    StopChecker,
    Tokenizer,
    read_eos_token_ids,
)

OLMO = Path(__file__).parents[2].parent / "shared/data/tokenizers/olmo_gpt_neox/tokenizer.json"
TEXTS = [
    "Hello, world!",
    "Gr\u00fc\u00dfe aus K\u00f6ln \u2013 na\u00efve caf\u00e9",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 and \U0001f3f4\u200d\u2620\ufe0f and \U00029e3d",
    "a\n\n\n\t  b   \r\n" + " " * 40 + "c",
    "x" * 500,
    "",
]


def byte_tokenizer(folder: Path, **changes: Any) -> Path:
    """A tokenizer of single bytes: every character of more bytes is split over tokens."""
    # The printable stand-ins of byte-level BPE (GPT-2).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    signs = {byte: chr(byte) for byte in printable}
    signs |= {byte: chr(256 + index) for index, byte in enumerate(rest)}
    special = [
        {"id": 256 + index, "content": content, "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for index, content in enumerate(("<s>", "</s>", "<|end|>"))
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {sign: byte for byte, sign in signs.items()},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | changes))
    return folder


def write_json(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


def load_error(folder: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        Tokenizer.load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if not OLMO.is_file():
        pytest.skip(f"{OLMO} is not on this machine")
    folder = tmp_path_factory.mktemp("olmo")
    shutil.copyfile(OLMO, folder / "tokenizer.json")
    return load(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_real_tokenizer_gives_back_every_text(olmo: Tokenizer, text: str) -> None:
    """Encoding and decoding loses nothing."""
    assert olmo.decode(olmo.encode(text)) == text


def test_token_ids_are_those_of_the_library(olmo: Tokenizer) -> None:
    """ "hello" is one token of this vocabulary; ids outside it decode to nothing."""
    assert olmo.encode("hello") == [25521]
    assert olmo.decode([25521, 10**6]) == "hello"
    assert olmo.vocab_size == 50280


def test_special_tokens_are_added_and_skipped_on_request(byte_level: Tokenizer) -> None:
    """The beginning-of-sequence token comes with a prompt and not with a rendered chat."""
    assert byte_level.encode("ab") == [256, 97, 98]
    assert byte_level.encode("ab", add_special_tokens=False) == [97, 98]
    assert byte_level.decode([256, 97, 257]) == "a"
    assert byte_level.decode([256, 97, 257], skip_special_tokens=False) == "<s>a</s>"


def test_half_a_utf16_pair_is_a_request_error(byte_level: Tokenizer) -> None:
    """A lone surrogate names its place; the library has only a TypeError."""
    with pytest.raises(RequestError, match=r"character 2 of the text is U\+D800"):
        byte_level.encode("ab\ud800c")


def test_a_tokenizer_that_truncates_or_pads_does_not(tmp_path: Path) -> None:
    """A prompt is never cut in silence because tokenizer.json says so."""
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    folder = byte_tokenizer(tmp_path, truncation=truncation, padding=padding)
    assert load(folder).encode("abcdefgh") == [256, *b"abcdefgh"]


# --- one token at a time -----------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, token_ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    parts = [detokenizer.append([token_id]) for token_id in token_ids] + [detokenizer.flush()]
    assert detokenizer.text == "".join(parts)
    return parts


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_streaming_a_real_tokenizer_gives_the_text(olmo: Tokenizer, text: str) -> None:
    """The parts make the text and none holds half a character."""
    parts = streamed(olmo, olmo.encode(text), olmo.encode("A prompt:"))
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30), prompt=st.text(max_size=5))
def test_streaming_bytes_gives_any_text(byte_level: Tokenizer, text: str, prompt: str) -> None:
    """Characters of two to four bytes come out whole, at once, and in order."""
    token_ids = byte_level.encode(text, add_special_tokens=False)
    parts = streamed(byte_level, token_ids, byte_level.encode(prompt))
    assert [part for part in parts if part] == list(text)


@settings(max_examples=100, deadline=None)
@given(token_ids=st.lists(st.integers(0, 258), max_size=40))
def test_streaming_never_repeats_or_loses_valid_bytes(
    byte_level: Tokenizer, token_ids: list[int]
) -> None:
    """Arbitrary bytes and special tokens give the text of a full decode, broken bytes apart."""
    assert "".join(streamed(byte_level, token_ids, [])).replace("\ufffd", "") == byte_level.decode(
        token_ids
    ).replace("\ufffd", "")


def test_special_tokens_are_streamed_on_request(byte_level: Tokenizer) -> None:
    """The end-of-sequence token is text only where it was asked for."""
    shown = IncrementalDetokenizer(byte_level, [97], skip_special_tokens=False)
    assert shown.append([98, 257]) == "b</s>"
    assert IncrementalDetokenizer(byte_level, [97]).append([98, 257]) == "b"


def test_many_tokens_without_text_do_not_pile_up(byte_level: Tokenizer) -> None:
    """A run of special tokens or of broken bytes costs the same for each token."""
    detokenizer = IncrementalDetokenizer(byte_level)
    assert detokenizer.append([257] * 1000) == ""
    assert len(detokenizer._recent) < 40
    assert detokenizer.append([0xFF] * 1000 + [97]).endswith("\ufffda")
    assert len(detokenizer._recent) < 40


def test_flush_gives_an_unfinished_character(byte_level: Tokenizer) -> None:
    """What the model never finished ends as a replacement character, as in a full decode."""
    detokenizer = IncrementalDetokenizer(byte_level)
    assert detokenizer.append([97, 0xE4, 0xBD]) == "a"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.text == "a\ufffd"
    assert detokenizer.flush() == ""


# --- stop strings ------------------------------------------------------------------------------


def test_a_stop_string_over_several_parts_is_found_and_cut() -> None:
    """What may begin the stop string is held back until it is ruled out."""
    checker = StopChecker(("</answer>",))
    assert not checker.append("It is 7. </ans")
    assert checker.visible_text == "It is 7. "
    assert not checker.append("X </ans")
    assert checker.visible_text == "It is 7. </ansX "
    assert checker.append("wer> and more")
    assert checker.visible_text == checker.final_text == "It is 7. </ansX "
    assert checker.stop == "</answer>"


def test_the_stop_string_is_kept_on_request() -> None:
    """include_stop cuts behind it."""
    checker = StopChecker(("\n\n",), include_stop=True)
    assert not checker.append("a\n")
    assert checker.visible_text == "a"
    assert checker.append("\nb")
    assert checker.final_text == "a\n\n"


def test_without_a_stop_all_text_is_final() -> None:
    """What was held back is shown when generation ends by itself."""
    checker = StopChecker(("END",))
    checker.append("the EN")
    assert (checker.visible_text, checker.final_text) == ("the ", "the EN")
    unlimited = StopChecker(())
    unlimited.append("any")
    assert unlimited.visible_text == "any"


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("ab", max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=5),
    include_stop=st.booleans(),
)
def test_stop_strings_do_not_depend_on_how_text_is_divided(
    text: str, stops: list[str], cuts: list[int], include_stop: bool
) -> None:
    """Any division gives the answer of one character at a time, and shown text stays shown."""
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    parts = [text[begin:end] for begin, end in pairwise(edges)]
    by_parts, by_chars = (StopChecker(tuple(stops), include_stop) for _ in range(2))
    shown = ""
    for part in parts:
        by_parts.append(part)
        assert by_parts.visible_text.startswith(shown)
        shown = by_parts.visible_text
    for char in text:
        by_chars.append(char)
    assert by_parts.final_text == by_chars.final_text
    assert by_parts.final_text.startswith(shown)
    assert by_parts.stop == by_chars.stop
    assert (by_parts.stop is not None) == any(stop in text for stop in stops)


# --- special tokens of the folder --------------------------------------------------------------


def test_end_tokens_come_from_the_first_file_that_has_them(tmp_path: Path) -> None:
    """generation_config.json, then config.json, then tokenizer_config.json."""
    byte_tokenizer(tmp_path)
    assert load(tmp_path).eos_token_ids == ()
    write_json(
        tmp_path, "tokenizer_config.json", {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}
    )
    assert (load(tmp_path).eos_token_ids, load(tmp_path).bos_token_id) == ((257,), 256)
    assert load(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    write_json(tmp_path, "config.json", {"eos_token_id": 258, "bos_token_id": None})
    assert (load(tmp_path).eos_token_ids, load(tmp_path).bos_token_id) == ((258,), 256)
    write_json(tmp_path, "generation_config.json", {"eos_token_id": [257, 258]})
    assert load(tmp_path).eos_token_ids == (257, 258)
    (tmp_path / "tokenizer.json").unlink()
    assert read_eos_token_ids(tmp_path) == (257, 258)


@pytest.mark.parametrize("value", ["</s>", -1, 1.5, True, [1, None], {"id": 1}, 1 << 40])
def test_an_end_token_that_is_no_token_id_is_named(tmp_path: Path, value: object) -> None:
    """The file, the key and the value."""
    write_json(byte_tokenizer(tmp_path), "generation_config.json", {"eos_token_id": value})
    assert "generation_config.json: eos_token_id is" in load_error(tmp_path)


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    """Such a model is used with token ids."""
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_a_damaged_file_beside_the_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    """Each is read with the same care."""
    (byte_tokenizer(tmp_path) / name).write_text("[1]")
    assert f"{name} holds a JSON list" in load_error(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"version": "9.0", "model": {"type": "BPE"}}',
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    """Whatever the library makes of it, the answer names the file."""
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json" in load_error(tmp_path)


def test_a_tokenizer_that_makes_the_library_panic_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A panic in native code is a BaseException; it must not look like one of ours."""
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    byte_tokenizer(tmp_path, normalizer=normalizer)
    assert "cannot be used as a tokenizer" in load_error(tmp_path)
    capfd.readouterr()  # the library's own trace


def test_a_panic_while_encoding_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A template that names a special token it does not define."""
    processor = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}, "single": [
        {"SpecialToken": {"id": "gone", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
    ]}  # fmt: skip
    tokenizer = load(byte_tokenizer(tmp_path, post_processor=processor))
    with pytest.raises(ModelFolderError, match="cannot be used as a tokenizer"):
        tokenizer.encode("a")
    capfd.readouterr()


def test_an_interrupt_is_not_taken_for_a_damaged_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while loading stays Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "hetero.tokenizer.tokenizers.Tokenizer", type("T", (), {"from_buffer": interrupt})
    )
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.load(byte_tokenizer(tmp_path))


# --- chats -------------------------------------------------------------------------------------


def test_a_chat_is_rendered_with_the_special_tokens_of_the_folder(tmp_path: Path) -> None:
    """bos_token and eos_token are known to the template."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    settings_ = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
    write_json(byte_tokenizer(tmp_path), "tokenizer_config.json", settings_)
    tokenizer = load(tmp_path)
    message = {"role": "user", "content": "hi"}
    assert tokenizer.apply_chat_template([message]) == "<s>hi</s>"
    assert tokenizer.apply_chat_template_to_all([[message], [message] * 2]) == [
        "<s>hi</s>",
        "<s>hi</s>hi</s>",
    ]


def test_a_chat_without_a_template_is_a_request_error(byte_level: Tokenizer) -> None:
    """The message says what to send instead."""
    with pytest.raises(RequestError, match="no chat template; send a prompt, not messages"):
        byte_level.apply_chat_template([{"role": "user", "content": "hi"}])

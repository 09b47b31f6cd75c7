"""Strict JSON: whatever is wrong is refused with its path, whatever is right is read as it is."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.device import Sample
from planner.strict_json import decode_struct

SAMPLE = {"lane": "cpu", "kernel": "linear", "shape": [8, 8], "num_tokens": 4, "seconds": 0.5}
GOOD = json.dumps({"samples": [SAMPLE] * 4, "link": {"name": "x"}, "more": {}})


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    samples: tuple[Sample, ...]
    link: dict[str, str | float]
    more: dict[str, Any]
    tables: dict[str, dict[str, tuple[int, int]]] = {}


def error_of(text: str | bytes, kind: type[object] = Document) -> str:
    with pytest.raises(ValueError) as caught:
        decode_struct(text if isinstance(text, bytes) else text.encode(), kind)
    return str(caught.value)


def with_sample(index: int, member: str) -> str:
    """The document with one sample's seconds written as another member, or other members."""
    text = json.dumps(SAMPLE)
    samples = [text] * 4
    samples[index] = text.replace('"seconds": 0.5', member)
    assert samples[index] != text
    return GOOD.replace(json.dumps([SAMPLE] * 4), f"[{', '.join(samples)}]")


def test_a_good_document_is_read() -> None:
    """Every value is where the file has it."""
    document = decode_struct(GOOD.encode(), Document)
    assert [sample.seconds for sample in document.samples] == [0.5] * 4
    assert document.link == {"name": "x"}


@pytest.mark.parametrize(
    ("member", "path"),
    [
        ('"seconds": 0', "$.samples[3].seconds"),
        ('"seconds": -0.5', "$.samples[3].seconds"),
        ('"seconds": "fast"', "$.samples[3].seconds"),
        ('"seconds": null', "$.samples[3].seconds"),
        ('"seconds": NaN', "$.samples[3].seconds"),
        ('"seconds": Infinity', "$.samples[3].seconds"),
        ('"seconds": -Infinity', "$.samples[3].seconds"),
        ('"seconds": 1e999', "$.samples[3].seconds"),
        (f'"seconds": 1{"0" * 400}', "$.samples[3].seconds"),
        (f'"seconds": 1{"0" * 5000}', "$.samples[3].seconds"),
        ('"seconds": 0.5, "seconds": 0.5', "$.samples[3].seconds"),
        ('"seconds": 0.5, "speed": 1', "$.samples[3]"),
        ('"spread": 0.5', "$.samples[3]"),
        ('"seconds": 0.5, "busy": ["gpu", "tpu"]', "$.samples[3].busy[1]"),
    ],
)
def test_a_bad_field_is_refused_with_its_path(member: str, path: str) -> None:
    """The fourth of equal samples, so that the path must count."""
    assert error_of(with_sample(3, member)).endswith(f" - at `{path}`")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, "a": 2}', "the key is there twice - at `$.a`"),
        (
            '{"a": {"b": [{}, {"c": 1, "c": 1}]}}',
            "the key is there twice - at `$.a.b[1].c`",
        ),
        ('{"a key": {"b": 1, "b": 1}}', 'the key is there twice - at `$["a key"].b`'),
        ('{"\\u001b[31m": 1, "\\u001b[31m": 1}', 'the key is there twice - at `$["\\u001b[31m"]`'),
        # the first of two faults, in the order of the file
        ('{"a": NaN, "b": 1, "b": 2}', "NaN is not a finite number - at `$.a`"),
        ('{"b": 1, "b": NaN, "a": 1e999}', "the key is there twice - at `$.b`"),
        ("[[1], [2, -1e400]]", "-1e400 is not a finite number - at `$[1][1]`"),
    ],
)
def test_what_msgspec_would_take_is_refused(text: str, expected: str) -> None:
    """At any depth, whatever type the fields have."""
    assert error_of(text, object) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"\x00" * 9, "it is not JSON: Expecting value: line 1 column 1"),
        (b"\x1f\x8b\x08\x00", "byte 1 is 0x8b, which is not UTF-8"),
        (GOOD.encode("utf-16"), "byte 0 is 0xff, which is not UTF-8"),
        (b"\xef\xbb\xbf" + GOOD.encode(), "it is not JSON: Unexpected UTF-8 BOM"),
        (GOOD.encode() + b"}", "it is not JSON: Extra data: line 1 column"),
        (GOOD.encode()[:-1], "it is not JSON: Expecting ',' delimiter"),
        (GOOD.encode().replace(b'"x"', b"'x'"), "it is not JSON: Expecting value"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"more": ' + b'{"a":' * 100_000, "it is nested too deeply"),
    ],
)
def test_what_is_no_json_is_refused(data: bytes, expected: str) -> None:
    """One sentence, whatever the bytes are."""
    assert error_of(data).startswith(expected)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"a": {}, "b": 1}, "Expected `object`, got `int` - at `$.tables.b`"),
        ({"a": {"x": [1, 2], "y z": [1]}}, 'length 2 - at `$.tables.a["y z"]`'),
        ({"a": {"x": [1, 2]}, "b": {"x": [1, 2], "y": [1, "2"]}}, " - at `$.tables.b.y[1]`"),
        ({"a": {"x": [1, None]}, "b": {"x": [1, None]}}, " - at `$.tables.a.x[1]`"),
    ],
)
def test_a_key_of_a_dictionary_is_in_the_path(tables: Any, expected: str) -> None:
    """The first of those that are at fault, where msgspec writes dots for any."""
    document = json.dumps({**json.loads(GOOD), "tables": tables})
    assert error_of(document).endswith(expected)


def test_a_whole_number_that_nothing_is_counted_in_is_refused() -> None:
    """Of 19 digits; 18 are an exabyte and more."""
    assert decode_struct(b'{"a": -123456789012345678}', object) == {"a": -123456789012345678}
    assert error_of('{"a": [0, 1234567890123456789]}', object) == (
        "1234567890123456789 has more than 18 digits - at `$.a[1]`"
    )


def test_a_long_key_and_a_long_number_are_shown_by_their_beginning() -> None:
    """An error stays a line."""
    key = "k" * 10_000
    assert len(error_of(f'{{"{key}": 1, "{key}": 1}}', object)) < 200
    assert len(error_of(f'{{"{key}": 1{"0" * 10_000}}}', object)) < 200


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values)
def test_every_document_of_the_standard_library_is_read(value: object) -> None:
    """The standard library's own reader is the reference."""
    text = json.dumps(value)
    assert decode_struct(text.encode(), object) == json.loads(text)


@given(st.binary(max_size=60) | values.map(lambda value: json.dumps(value)[1:].encode()))
def test_other_bytes_are_a_value_error_or_a_document(data: bytes) -> None:
    """Nothing else is raised."""
    try:
        value = decode_struct(data, object)
    except ValueError:
        return
    assert value == json.loads(data)

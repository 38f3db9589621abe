"""JSON that one reader could take for something else is refused."""

import json

import pytest

from server.errors import InvalidJson
from server.strict_json import MAX_DEPTH, parse_json


@pytest.mark.parametrize(("body", "param", "words"), [
    (b"", "body", "not valid JSON"),
    (b"{", "body", "not valid JSON"),
    (b"{'a': 1}", "body", "not valid JSON"),
    (b"\xff\xfe{}", "body", "UTF-8"),
    (b'{"a": "\xc3"}', "body", "UTF-8"),
    (b'{"a": {"b": NaN}}', "a.b", "NaN"),
    (b'{"a": [0, -Infinity]}', "a[1]", "infinity"),
    (b'{"a": [0, 1e999]}', "a[1]", "infinity"),
    (b'{"a": 1, "a": 2}', "a", "twice"),
    (b'{"a": [{"b": "\\ud800"}]}', "a[0].b", "surrogate"),
    (b'{"\\udfff": 1}', "body", "surrogate"),
    (b'{"a": 99999999999999999999999}', "a", "64 bits"),
    (b'{"a": ' + b"9" * 5000 + b"}", "body", "digits"),
    (b"[" * 100_000, "body", "deep"),
    (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "[0]", "deep"),
])
def test_refused(body: bytes, param: str, words: str) -> None:
    with pytest.raises(InvalidJson) as caught:
        parse_json(body)
    assert words in caught.value.message
    assert (caught.value.param or "").startswith(param)


@pytest.mark.parametrize("value", [None, True, 0.5, "\u00e9\U0001f600", [1, [2, {"a": [None]}]], {"a": {"b": -(2**63)}},
                                   [["x"] * 3] * 3])
def test_taken_as_any_reader_does(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value


def test_the_deepest_allowed() -> None:
    parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)

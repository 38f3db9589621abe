"""JSON that one reader could take for something else is refused, and no text holds up the event loop for long."""

import json
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.api.json_faults import MAX_DEPTH, explain
from server.api.strict_json import EXPLAINED_BYTES, MAX_CONTAINERS, MAX_FIELDS, parse_json
from server.errors import InvalidJson


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


class Doubled(list[tuple[str, Any]]):
    """An object to be written with all of these pairs."""


def written(value: Any) -> str:
    if isinstance(value, Doubled):
        return "{" + ",".join(f"{json.dumps(key)}:{written(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


STRINGS = st.text("ab:\"\\\u00e9\U0001f600{}[],0", max_size=4)
SCALARS = st.none() | st.booleans() | STRINGS | st.floats() | st.integers(-3 * 2**64, 3 * 2**64) | st.sampled_from(
    ["\ud800", 2**63, 2**64, 2**64 + 1, -(2**64), 1e300])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=5) | st.lists(
    st.tuples(STRINGS, inner), max_size=4).map(Doubled), max_leaves=12)


@given(VALUES.map(written).flatmap(lambda text: st.sampled_from([
    text, text.replace(":", "\\u003a"), text.replace(":", "\\u003A", 1), text.replace("a", "\\u0061"), f" {text}\n",
    text[:-1], text + ","])))
@example('{"a:":1,"a\\u003a":2}')
@example('{"a":":","a":1}')
@example('{"\\\\u003a":1}')
@example('[1e999]')
def test_refused_is_what_the_slow_reader_refuses(text: str) -> None:
    body = text.encode()
    try:
        explain(body)
        sound = True
    except InvalidJson:
        sound = False
    if sound:
        assert parse_json(body) == json.loads(text)
    else:
        with pytest.raises(InvalidJson):
            parse_json(body)


SIZE = 2**18
HEAVY = {
    "integers": b"[" + b"1," * (SIZE // 2) + b"1]",
    "numbers": b"[" + b"1,0.5," * (SIZE // 6) + b"1]",
    "spoilt numbers": b"[" + b"1," * (SIZE // 2) + b'""]',
    "texts": b"[" + b'"",' * (SIZE // 3) + b'""]',
    "keys": b"{" + b",".join(b'"%06d":1' % i for i in range(MAX_FIELDS)) + b"}",
    "small objects": b"[" + b'{"a":1},' * (MAX_CONTAINERS - 2) + b"1]",
    "lists": b"[" + b"[]," * (2 * MAX_CONTAINERS) + b"[]]",
    "objects": b"[" + b'{"a":1},' * (2 * MAX_CONTAINERS) + b"1]",
}


@pytest.mark.parametrize("name", HEAVY)
def test_python_makes_hardly_a_step_per_value(name: str) -> None:
    """Lines of Python and calls, counted instead of timed. A value costs one where those of its kind are picked out."""
    steps = 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += event in ("line", "c_call", "call")
        return count

    sys.setprofile(count)
    sys.settrace(count)
    try:
        parse_json(HEAVY[name])
        refused = False
    except InvalidJson as error:
        refused = True
        assert "objects and lists" in error.message
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    assert refused == (name in ("lists", "objects"))
    assert steps < 3 * HEAVY[name].count(b",")


def test_a_long_text_is_refused_without_a_search_for_the_place() -> None:
    body = b'{"a": [' + b"0.5, " * (EXPLAINED_BYTES // 5) + b'1e999]}'
    with pytest.raises(InvalidJson) as caught:
        parse_json(body)
    assert caught.value.param == "body" and "not finite" in caught.value.message


def test_an_object_of_too_many_fields() -> None:
    body = json.dumps({str(i): i for i in range(MAX_FIELDS + 1)}).encode()
    with pytest.raises(InvalidJson, match="fields"):
        parse_json(body)

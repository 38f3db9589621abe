"""Schemas that answers cannot be held to are the client's to mend: refused with a reason, and never a failure."""

from typing import Any

import pytest

from server.engines.vllm.host.refusals import refusal
from server.engines.vllm.host.schemas import MAX_SCHEMAS, check_schema
from steering.language.errors import EngineUnavailable, InvalidRequest


def holding(part: dict[str, Any] | bool) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": part}, "required": ["a"], "additionalProperties": False}


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        part = holding(part)
    return part


# What a model would be held to only in part, or not at all. The first five answered 503 before.
WRONG: dict[str, tuple[dict[str, Any] | bool, str]] = {
    "multipleOf": ({"type": "integer", "multipleOf": 3}, "multipleOf"),
    "uniqueItems": ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "not supported"),
    "look-ahead": ({"type": "string", "pattern": "^(?=a)b$"}, "look ahead"),
    "dangling": ({"$ref": "#/$defs/nothing"}, "defs"),
    "minimum over maximum": ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
    "look-behind": ({"type": "string", "pattern": "(?<!a)b"}, "look"),
    "minLength over maxLength": ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    "unknown type": ({"type": "foo"}, "foo"),
    "no value at all": ({"enum": []}, "enum"),
    "false": (False, "false"),
    "broken pattern": ({"type": "string", "pattern": "("}, "paren"),
    "number too large": ({"type": "integer", "minimum": 10**30}, "INT64"),
    "lone surrogate": ({"enum": ["\ud800"]}, ""),
    "not": ({"type": "integer", "not": {"const": 1}}, "not is"),
    "if": ({"type": "object", "if": {"required": ["x"]}, "then": {"required": ["y"]}}, "if is"),
    "elsewhere": ({"$ref": "https://example.org/schema"}, r"\$ref"),
    "beside a ref": ({"$ref": "#", "minimum": 3}, "minimum beside"),
    "beside branches": ({"anyOf": [{"type": "integer"}], "maximum": 1}, "maximum beside"),
    "two of all": ({"allOf": [{"type": "object"}, {"type": "object"}]}, "not supported"),
    "deep": (nested(40), "nested too deeply"),
    "many": ({"anyOf": [{"type": "integer"}] * (MAX_SCHEMAS + 1)}, str(MAX_SCHEMAS)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_schema_that_cannot_be_held_to_is_refused_by_name(name: str) -> None:
    part, reason = WRONG[name]
    with pytest.raises(InvalidRequest, match=f"(?i){reason}") as refused:
        check_schema(holding(part))
    assert refused.value.param == "response_format.json_schema.schema"
    assert ".cc:" not in refused.value.message and "\n" not in refused.value.message


@pytest.mark.parametrize("part", [
    {"type": "integer", "minimum": 1, "maximum": 9}, {"type": "string", "pattern": "^[a-z]{2,5}$"},
    {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3}, {"enum": ["not", "if", 3, None]},
    {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "A"},
    {"type": "object", "anyOf": [{"type": "object", "properties": {"b": {"type": "integer"}}}]},
    {"$ref": "#"}, nested(10),
    # Properties may have the names of keywords.
    {"type": "object", "properties": {"not": {"type": "string"}, "if": {"$ref": "#"}, "multipleOf": {"enum": [1]}}},
    {"type": "string", "description": "a pattern such as (?=x)"}, {"type": "string", "format": "date-time"},
])
def test_what_answers_can_be_held_to_passes(part: dict[str, Any]) -> None:
    check_schema(holding(part))


def test_what_vllm_refuses_is_the_request_and_what_fails_in_it_is_the_engine() -> None:
    from vllm.exceptions import QueueOverflowError, VLLMServerError, VLLMValidationError
    from vllm.v1.engine.exceptions import EngineGenerateError

    named = refusal(VLLMValidationError("too many", parameter="logprobs", value=[0] * 1000), begun=False)
    assert isinstance(named, InvalidRequest) and (named.message, named.param) == ("too many", "logprobs")
    # No field of a request has that name.
    other = refusal(VLLMValidationError("bad", parameter="trace_decode_token_ids"), begun=False)
    assert isinstance(other, InvalidRequest) and other.param is None

    def wrapped(cause: Exception) -> EngineGenerateError:
        error = EngineGenerateError()
        error.__cause__ = cause
        return error

    assert isinstance(refusal(wrapped(ValueError("prompt too long")), begun=False), InvalidRequest)
    assert refusal(wrapped(ValueError("index out of range")), begun=True) is None
    assert refusal(wrapped(RuntimeError("no memory")), begun=False) is None
    assert refusal(VLLMServerError("broken"), begun=False) is None
    full = refusal(QueueOverflowError(), begun=False)
    assert isinstance(full, EngineUnavailable) and full.retry_after_s
    typed = InvalidRequest("ours", param="prompt")
    assert refusal(wrapped(typed), begun=True) is typed

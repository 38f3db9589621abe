"""Schemas that answers cannot be held to are the client's to mend: refused with a reason, and never a failure."""

from typing import Any

import pytest
from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo

from server.engines.grammar import Grammar, as_tag, check, of_choices, of_rules, of_schema, of_tag, parsed
from server.engines.schemas import MAX_SCHEMAS
from steering.language.errors import InvalidRequest

PARAM = "response_format.json_schema.schema"


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
    "length of a pattern": ({"type": "string", "pattern": "a*", "maxLength": 3}, "maxLength beside pattern"),
    "length of a format": ({"format": "date", "minLength": 3}, "minLength beside format"),
    "unknown format": ({"type": "string", "format": "colour"}, "colour"),
    "names and properties": ({"type": "object", "propertyNames": {"pattern": "a"}, "properties": {}}, "propertyNames"),
    "two patterns": ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "patternProperties"),
    "names of a length": ({"type": "object", "propertyNames": {"pattern": "a", "maxLength": 2}}, "length"),
    "no schema": ({"type": "object", "patternProperties": 3}, ""),
    "deep": (nested(40), "nested too deeply"),
    "many": ({"anyOf": [{"type": "integer"}] * (MAX_SCHEMAS + 1)}, str(MAX_SCHEMAS)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_schema_that_cannot_be_held_to_is_refused_by_name(name: str) -> None:
    part, reason = WRONG[name]
    with pytest.raises(InvalidRequest, match=f"(?i){reason}") as refused:
        check(of_schema(holding(part), PARAM))
    assert refused.value.param == PARAM
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
    check(of_schema(holding(part), PARAM))


@pytest.mark.parametrize(("grammar", "reason"), [
    (Grammar("regex", "(?=a)b", "structured_outputs.regex"), "Lookahead"),
    (Grammar("regex", "(", "structured_outputs.regex"), "paren"),
    (Grammar("regex", "a\0b", "structured_outputs.regex"), "NUL"),
    (of_rules('root ::= nothing', "structured_outputs.grammar"), "not defined"),
    (of_rules('first ::= "a"', "structured_outputs.grammar"), "root"),
    (of_rules('start: nothing', "structured_outputs.grammar"), "unknown name"),
    (of_tag({"type": "sequence"}, "tools"), ""),
])
def test_a_grammar_that_is_none_is_refused_by_name(grammar: Grammar, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"(?i){reason}") as refused:
        check(grammar)
    assert refused.value.param == grammar.param and ".cc:" not in refused.value.message


def test_a_grammar_is_of_lark_unless_it_defines_rules_as_ebnf_does() -> None:
    assert of_rules('# a ::= b\nstart: "a"', "g").kind == "lark"
    assert of_rules('root ::= "a"', "g").kind == "ebnf"
    check(of_rules('start: "a" | "b"', "g"))


@pytest.mark.parametrize("choices", [
    ["yes", "no"], ['a "quoted" \\ one', "two\nlines", "tab\t", "\x07", "é 😀 \u2028"]])
def test_choices_are_those_texts_and_no_others(choices: list[str]) -> None:
    compiler = GrammarCompiler(TokenizerInfo([chr(i) for i in range(128)], stop_token_ids=[127]))
    for grammar in (of_choices(choices, "g"), of_tag(as_tag(of_choices(choices, "g")), "g")):
        matcher = GrammarMatcher(compiler.compile_grammar(parsed(grammar)))
        for choice in choices:
            assert matcher.accept_string(choice) and matcher.is_completed()
            matcher.reset()
        assert not matcher.accept_string("maybe")

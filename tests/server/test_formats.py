"""Calls of tools and thoughts, as models write them, as deltas of a message: cut anywhere, nothing is lost."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo

from server.engines.grammar import of_tag, parsed
from server.text.assemble import Assembler
from server.text.dialect import BLOCK, FORMATS
from server.text.formats.base import Tool
from server.text.formats.json_calls import JsonCallReader
from server.text.formats.pythonic import PythonCallReader
from server.text.formats.thinking import THOUGHTS
from server.text.message import Message
from steering.programs.sections import At, Marks, Sections

THINK = THOUGHTS["think"]


def sections(form: str | None, *, thinking: bool = False, answer: Any = "answer") -> Sections:
    tools = FORMATS[form].marks if form else ()
    marks = Marks((THINK, *tools, BLOCK) if answer == "answer" else (THINK,), answer)
    return Sections(marks, At(0) if thinking else At())


def message(pieces: list[str], form: str | None, **how: Any) -> Message:
    assembler = Assembler(sections(form, **how), FORMATS[form] if form else None)
    found = Message()
    for piece in pieces:
        found.add(assembler.push(piece))
    found.add(assembler.end())
    return found


def calls(found: Message) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in found.calls]


WEATHER, CLOCK = ("weather", {"city": "São \"P\" {}", "days": [1, 2]}), ("clock", {})
# Form, what the model writes, what is said beside the calls, and the calls.
WRITTEN: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {json.dumps(WEATHER[1])}}}\n</tool_call>',
     "Let me see.", [WEATHER]),
    ("hermes", f'<tool_call>{{"arguments": {json.dumps(WEATHER[1])}, "name": "weather"}}</tool_call>\n<tool_call>\n'
     '{"name":"clock"}\n</tool_call>\n', "", [WEATHER, CLOCK]),
    ("hermes", '<tool_call>{"id": 7, "type": "function", "name": "clock", "arguments": {}, "more": [1, "}"]}'
     "</tool_call> done", " done", [CLOCK]),
    ("hermes", '<tool_call>{"name": "clock", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("clock", {"a": 1})]),
    ("llama3_json", f'{{"name": "weather", "parameters": {json.dumps(WEATHER[1])}}}', "", [WEATHER]),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "clock", "parameters": {}}; {"name": "clock", '
     '"parameters": {}}', "", [CLOCK, CLOCK]),
    ("llama3_json", '{"city": "Paris"}', '{"city": "Paris"}', []),
    ("mistral", f'[TOOL_CALLS][{{"name": "weather", "arguments": {json.dumps(WEATHER[1])}}}, '
     '{"name": "clock", "arguments": {}}]', "", [WEATHER, CLOCK]),
    ("mistral", 'Sure. [TOOL_CALLS] [{"name": "clock", "arguments": {}}]', "Sure.", [CLOCK]),
    ("pythonic", '[weather(city="São \\"P\\" {}", days=[1, 2]), clock()]', "", [WEATHER, CLOCK]),
    ("pythonic", "[a.b(x={'k': (1, None)}, y=true, z=-2.5)]", "", [("a.b", {"x": {"k": [1, None]}, "y": True,
                                                                         "z": -2.5})]),
    ("pythonic", "[1, 2] is a list", "[1, 2] is a list", []),
]


@pytest.mark.parametrize(("form", "text", "said", "wanted"), WRITTEN)
def test_calls_are_read_in_whatever_pieces_they_come(form: str, text: str, said: str, wanted: list[Any]) -> None:
    whole = message([text], form)
    assert (whole.text, calls(whole)) == (said, wanted)
    for size in (1, 2, 7):
        cut = message([text[i:i + size] for i in range(0, len(text), size)], form)
        assert (cut.text, [(c.name, c.arguments) for c in cut.calls]) == (
            whole.text, [(c.name, c.arguments) for c in whole.calls])
    thoughtful = message([f"<think>\nhm\n</think>\n\n{text}"], form)
    assert (thoughtful.reasoning, thoughtful.text.strip(), calls(thoughtful)) == ("hm", said.strip(), wanted)


def test_arguments_come_in_pieces_and_a_name_comes_once() -> None:
    assembler = Assembler(sections("hermes"), FORMATS["hermes"])
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    deltas = [assembler.push(character).calls for character in text]
    parts = [part for delta in deltas for part in delta]
    assert [part.name for part in parts if part.name] == ["weather"] and parts[0].id
    assert all(part.index == 0 for part in parts) and len(parts) > 10
    assert "".join(part.arguments for part in parts) == '{"city": "Paris"}'


@pytest.mark.parametrize(("form", "text"), [
    ("hermes", "a <tool_call>no JSON</tool_call> b"), ("hermes", "<tool_call>\n{\"name\": \"wea"),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'), ("hermes", "a <tool_ca"), ("hermes", "  \n"),
    ("llama3_json", '{"name": 3}'), ("llama3_json", '{"na'), ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", "[TOOL_CALLS][{"), ("pythonic", "[f(x)]"), ("pythonic", "[f(1)]"), ("pythonic", "[f(a="),
    ("pythonic", "[f(**{}"), ("pythonic", "[f(a=open('x'))]"), ("hermes", "```json\n{}\n```"), ("hermes", "``` json"),
])
def test_what_only_looks_like_a_call_is_text(form: str, text: str) -> None:
    for pieces in ([text], list(text)):
        found = message(pieces, form)
        assert (found.text, found.calls) == (text, [])


@pytest.mark.parametrize(("form", "text", "said", "name", "arguments"), [
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Pa', "", "weather", '{"city": "Pa'),
    ("hermes", '<tool_call>{"name": "clock"', "", "clock", ""),
    ("mistral", '[TOOL_CALLS][{"name": "clock", "arguments": {}}, {"name": "wea', '{"name": "wea', "clock", "{}"),
    ("hermes", '<tool_call>{"name": "clock", "arguments": {} oops}</tool_call>', "oops}", "clock", "{}"),
    ("pythonic", '[clock(), weather(ci', "weather(ci", "clock", "{}"),
])
def test_of_a_call_that_is_cut_off_what_was_read_stays(form: str, text: str, said: str, name: str, arguments: str
                                                       ) -> None:
    for pieces in ([text], list(text)):
        found = message(pieces, form)
        assert found.text.strip(", ") == said
        assert [(call.name, call.arguments) for call in found.calls] == [(name, arguments)]


@pytest.mark.parametrize(("text", "thinking", "reasoning", "said"), [
    ("<think>\n a\n\nb \n</think>\n\nHi", False, "a\n\nb", "Hi"), (" a </think> Hi ", True, "a", "Hi "),
    ("no mark", True, "no mark", ""), ("cut ", True, "cut ", ""), ("Hi <think>late</think> there", False, "late",
                                                                    "Hi there"),
    ("<think></think>", False, "", ""), ("a </thi", True, "a </thi", ""),
])
def test_thoughts_are_told_apart(text: str, thinking: bool, reasoning: str, said: str) -> None:
    for pieces in ([text], list(text)):
        found = message(pieces, None, thinking=thinking)
        assert (found.reasoning, found.text) == (reasoning, said)


PIECES = st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<tool", '{"name": ', '"f"', ', "arguments": ', "{}",
                                   '{"a": "', '"}', "}", "[", "]", "x", " ", "\\", '"', "<think>", "</think>",
                                   "[TOOL_CALLS]", "f(", ")", "a=1", "```", "json"]), max_size=16)


@settings(max_examples=500, deadline=None)
@given(form=st.sampled_from(sorted(FORMATS)), pieces=PIECES)
def test_a_stream_and_a_whole_answer_are_the_same_message(form: str, pieces: list[str]) -> None:
    whole, cut = message(["".join(pieces)], form), message(pieces, form)
    assert (cut.text, cut.reasoning) == (whole.text, whole.reasoning)
    assert [(c.name, c.arguments) for c in cut.calls] == [(c.name, c.arguments) for c in whole.calls]
    # What is neither a mark nor within a call is told, whatever it looks like.
    if "x" in pieces and not whole.calls:
        assert (whole.text + whole.reasoning).count("x") == pieces.count("x")


@pytest.mark.parametrize("reader", [JsonCallReader, PythonCallReader])
def test_a_deep_or_long_call_is_no_trouble(reader: Any) -> None:
    for text in ('{"name": "f", "arguments": ' + '{"a": ' * 20_000, "[f(a=" + "[" * 70_000 + ")"):
        found = reader()
        found.push(text)
        found.end()


ROME = '{"city": "Rome"}'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
              "required": ["city"], "additionalProperties": False}


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_what_a_forced_call_may_be_is_read_as_a_call_of_these_tools(form: str) -> None:
    """The grammar of each form takes what its reader reads, and no text."""
    compiler = GrammarCompiler(TokenizerInfo([chr(i) for i in range(128)], stop_token_ids=[127]))
    tools = [Tool("weather", PARAMETERS),
             Tool("clock", {"type": "object", "properties": {}, "additionalProperties": False})]
    one = {"hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>',
           "llama3_json": '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}',
           "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome", "days": 2}}]',
           "pythonic": '[weather(city="Rome", days=2)]'}[form]
    two = {"hermes": f'{one}\n<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call>',
           "llama3_json": f'{one}; {{"name": "clock", "parameters": {{}}}}',
           "mistral": f'{one[:-1]}, {{"name": "clock", "arguments": {{}}}}]', "pythonic": f"{one[:-1]}, clock()]"}[form]

    def takes(text: str, given: list[Tool], many: bool) -> bool:
        matcher = GrammarMatcher(compiler.compile_grammar(parsed(of_tag(FORMATS[form].forced(given, many=many), "t"))))
        return bool(matcher.accept_string(text) and matcher.is_completed())

    assert takes(one, tools, many=False) and takes(one, tools[:1], many=False) and takes(two, tools, many=True)
    assert not takes(two, tools, many=False) and not takes(one, tools[1:], many=False)
    assert not takes("Hello", tools, many=True) and not takes(one.replace('"Rome"', "3"), tools, many=True)
    assert calls(message([two], form)) == [("weather", {"city": "Rome", "days": 2}), ("clock", {})]


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_free_text_may_hold_calls_of_these_tools_and_no_others(form: str) -> None:
    tag = FORMATS[form].free([Tool("weather", PARAMETERS)], ["clock"], many=True)
    if form in ("llama3_json", "pythonic"):
        # Their calls have no mark in front, so text cannot be told from them.
        assert tag is None
        return
    compiler = GrammarCompiler(TokenizerInfo([chr(i) for i in range(128)], stop_token_ids=[127]))

    def takes(text: str, given: Any = tag) -> bool:
        matcher = GrammarMatcher(compiler.compile_grammar(parsed(of_tag(given, "t"))))
        return bool(matcher.accept_string(text) and matcher.is_completed())

    def call(name: str, arguments: str) -> str:
        body = f'{{"name": "{name}", "arguments": {arguments}}}'
        return f"<tool_call>\n{body}\n</tool_call>" if form == "hermes" else f"[TOOL_CALLS][{body}]"

    assert takes("Hello <tool") and takes(f'Well. {call("weather", ROME)}') and takes(call("clock", '{"any": [1]}'))
    assert not takes(call("weather", '{"city": 3}')) and not takes(call("weather", "{}"))
    assert not takes(call("other", "{}"))
    single = FORMATS[form].free([Tool("weather", PARAMETERS)], [], many=False)
    assert takes(call("weather", ROME), single) and not takes(call("weather", ROME) * 2, single)

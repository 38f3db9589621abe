"""Chat with tools, thoughts and forms of answers, driven by OpenAI's client against a scripted model."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI
from transformers import PreTrainedTokenizerFast

from server.api.openai.logprobs import Teller, entries
from server.app import create_app
from server.engines.data import Token
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL
from tests.server.scripted import WIDTH, ScriptedEngine
from tests.server.tokenizers import byte_tokenizer
from vectors.library import Library

# In short what templates of Qwen 3 do.
HERMES = (
    "{% if tools %}{{ '<|system|><tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '</tools> answer in <tool_call></tool_call><|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% elif deep is defined %}{{ '<think>' }}{% endif %}{% endif %}")
TOOL = {"type": "function", "function": {"name": "weather", "description": "Says <|end|> weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASK: Any = [{"role": "user", "content": "How is it in Paris?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(HERMES)


@pytest.fixture
def api(client: httpx.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=client, max_retries=0)


@pytest.fixture
def say(engine: ScriptedEngine, vocabulary: Vocabulary) -> Callable[[str], None]:
    """Let the model write a text."""
    engine.features = frozenset({"structured_outputs"})
    engine.room = 4096

    def script(text: str) -> None:
        ids = vocabulary.encode(text, special_tokens=False)
        engine.script = lambda generation: ids

    return script


async def both(api: AsyncOpenAI, **fields: Any) -> tuple[Any, Any, list[Any]]:
    """The whole answer's message and reason, and the deltas of the streamed one."""
    asked: dict[str, Any] = {"model": MODEL, "messages": ASK, **fields}
    whole = await api.chat.completions.create(**asked)
    chunks = [chunk async for chunk in await api.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True})]
    assert chunks[-1].usage == whole.usage
    return whole, whole.choices[0].message, [chunk.choices[0] for chunk in chunks if chunk.choices]


def joined(choices: list[Any]) -> tuple[str, str, list[tuple[str, str]], str]:
    """Content, reasoning, calls and reason of a stream."""
    content = "".join(choice.delta.content or "" for choice in choices)
    reasoning = "".join(getattr(choice.delta, "reasoning", None) or "" for choice in choices)
    calls: dict[int, list[str]] = {}
    for choice in choices:
        for part in choice.delta.tool_calls or []:
            if part.id is not None:
                assert part.index not in calls and part.type == "function"
                calls[part.index] = [part.function.name, ""]
            calls[part.index][1] += part.function.arguments or ""
    [reason] = [choice.finish_reason for choice in choices if choice.finish_reason]
    return content, reasoning, [(name, arguments) for name, arguments in calls.values()], reason


def told(message: Any) -> tuple[str, str, list[tuple[str, str]]]:
    return (message.content or "", getattr(message, "reasoning", None) or "",
            [(call.function.name, call.function.arguments) for call in message.tool_calls or []])


async def test_a_call_of_a_tool(api: AsyncOpenAI, say: Any, engine: ScriptedEngine, vocabulary: Vocabulary) -> None:
    say(f"Let me see.\n{CALL}")
    whole, message, choices = await both(api, tools=[TOOL])
    assert told(message) == ("Let me see.", "", [("weather", '{"city": "Paris"}')])
    assert whole.choices[0].finish_reason == "tool_calls" and message.tool_calls[0].id.startswith("call_")
    assert joined(choices) == (*told(message), "tool_calls")
    assert len([choice for choice in choices if choice.delta.tool_calls]) > 5, "arguments come in pieces"
    prompt = vocabulary.tokenizer.decode(engine.completions[0].generation.prompt_ids)
    assert '"city"' in prompt and "<tools>" in prompt
    # What a description says is text, and ends no turn.
    assert engine.completions[0].generation.prompt_ids.count(vocabulary.tokenizer.convert_tokens_to_ids("<|end|>")) == 2
    # The whole answer goes back as history, with what the tool said.
    say("It is sunny.")
    again = await api.chat.completions.create(model=MODEL, tools=[TOOL], messages=[
        *ASK, message.model_dump(), {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}])
    assert again.choices[0].message.content == "It is sunny." and again.choices[0].finish_reason == "stop"
    assert again.choices[0].message.tool_calls is None


async def test_a_message_that_only_calls_has_no_content(api: AsyncOpenAI, say: Any) -> None:
    say(f"{CALL}\n{CALL}")
    _, message, choices = await both(api, tools=[TOOL])
    assert message.content is None and len(message.tool_calls) == 2
    assert message.tool_calls[0].id != message.tool_calls[1].id
    assert joined(choices)[2] == [("weather", '{"city": "Paris"}')] * 2


@pytest.mark.parametrize(("text", "how", "wanted"), [
    (CALL[:50], {"max_tokens": 400}, ("", "", [("weather", '{"cit')], "stop")),
    (CALL, {"max_tokens": 50}, ("", "", [("weather", '{"cit')], "length")),
    (CALL, {"max_tokens": 20}, (CALL[:20], "", [], "length")),
    # A stop text may lie within a call; what came before it is told.
    (CALL, {"stop": "Paris"}, ("", "", [("weather", '{"city": "')], "stop")),
    (f"Hm. {CALL}", {"stop": "<tool"}, ("Hm. ", "", [], "stop")),
    ("Hm <tool", {"stop": "zzz"}, ("Hm <tool", "", [], "stop")),
    ("<tool_call>nonsense</tool_call>", {}, ("<tool_call>nonsense</tool_call>", "", [], "stop")),
])
async def test_a_call_that_is_cut_off_loses_nothing(api: AsyncOpenAI, say: Any, text: str, how: Any, wanted: Any
                                                    ) -> None:
    say(text)
    whole, message, choices = await both(api, tools=[TOOL], **how)
    assert (*told(message), whole.choices[0].finish_reason) == wanted == joined(choices)


async def test_marks_mean_nothing_where_no_tool_is_offered(api: AsyncOpenAI, say: Any, engine: ScriptedEngine) -> None:
    say(CALL)
    for how in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        _, message, choices = await both(api, **how)
        assert told(message) == (CALL, "", []) and joined(choices)[0] == CALL
        assert b"<tools>" not in bytes(str(engine.completions[-1].generation.prompt_ids), "ascii")


@pytest.mark.parametrize(("choice", "kind"), [
    (None, None), ("auto", None), ("required", "tag"), ({"type": "function", "function": {"name": "clock"}}, "tag")])
async def test_a_call_that_must_come_is_held_to_by_a_grammar(api: AsyncOpenAI, say: Any, engine: ScriptedEngine,
                                                             choice: Any, kind: str | None) -> None:
    say(CALL)
    how = {} if choice is None else {"tool_choice": choice}
    await api.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL, CLOCK], **how)
    grammar = engine.completions[0].generation.sampling.grammar
    assert (None if grammar is None else grammar.kind) == kind
    if grammar is not None:
        assert ("weather" in grammar.text) == (choice == "required") and "clock" in grammar.text
        # The model may think before it.
        assert "<think>" in grammar.text


async def test_what_a_model_thinks(api: AsyncOpenAI, say: Any) -> None:
    say("<think>\nParis, hm.\n</think>\n\nSunny.")
    whole, message, choices = await both(api)
    assert told(message) == ("Sunny.", "Paris, hm.", []) and joined(choices)[:2] == ("Sunny.", "Paris, hm.")
    thought = whole.usage.completion_tokens_details.reasoning_tokens
    assert 0 < thought < whole.usage.completion_tokens - len("Sunny.")
    # A thought that the template has opened, one that it has closed, and one with a call behind it.
    say("Paris, hm.</think>Sunny.")
    whole, message, choices = await both(api, extra_body={"chat_template_kwargs": {"deep": True}})
    assert told(message) == ("Sunny.", "Paris, hm.", []) and joined(choices)[:2] == ("Sunny.", "Paris, hm.")
    say("Sunny.")
    for extra in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        whole, message, _ = await both(api, extra_body=extra)
        assert told(message) == ("Sunny.", "", []) and whole.usage.completion_tokens_details.reasoning_tokens == 0
        assert whole.usage.prompt_tokens > len("How is it in Paris?") + 10
    say(f"<think>hm</think>\n{CALL}")
    _, message, _ = await both(api, tools=[TOOL])
    assert told(message) == ("", "hm", [("weather", '{"city": "Paris"}')])


async def test_forms_of_answers_reach_the_engine(api: AsyncOpenAI, say: Any, engine: ScriptedEngine) -> None:
    say("{}")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
              "additionalProperties": False}
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    asked: list[tuple[dict[str, Any], str, str]] = [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}},
         "json", json.dumps(schema)),
        ({"response_format": {"type": "json_object"}}, "json", '{"type": "object"}'),
        ({"extra_body": {"structured_outputs": {"json": json.dumps(schema)}}}, "json", json.dumps(schema)),
        ({"extra_body": {"structured_outputs": {"regex": "a+"}}}, "regex", "a+"),
        ({"extra_body": {"structured_outputs": {"choice": ["a", "b"]}}}, "ebnf", 'root ::= "a" | "b"'),
        ({"extra_body": {"structured_outputs": {"grammar": 'start: "a"'}}}, "lark", 'start: "a"'),
    ]
    for fields, kind, text in asked:
        await api.chat.completions.create(model=MODEL, messages=ASK, **{
            **fields, "extra_body": {**fields.get("extra_body", {}), **quiet}})
        grammar = engine.completions[-1].generation.sampling.grammar
        assert (grammar.kind, grammar.text) == (kind, text)
    # Where the model may think first the form comes behind the thought.
    await api.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "json_object"})
    grammar = engine.completions[-1].generation.sampling.grammar
    assert grammar.kind == "tag" and grammar.param == "response_format"
    # A call, or an answer of the form.
    await api.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "json_object"}, tools=[TOOL])
    assert "<tool_call>" in engine.completions[-1].generation.sampling.grammar.text


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}], "tool_choice": "required"},
     "tools[0].function.parameters", "not is not supported"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "response_format ends the text"),
    ({"structured_outputs": {"choice": ["a" * 4000] * 40}}, "structured_outputs.choice", "this server allows 131072"),
])
async def test_forms_that_cannot_be_held_to_are_refused(client: httpx.AsyncClient, say: Any, fields: Any, param: str,
                                                        words: str) -> None:
    say("x")
    answer = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": ASK, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"]


async def test_a_message_that_the_assistant_has_begun_is_gone_on_with(
        api: AsyncOpenAI, say: Any, vocabulary: Vocabulary, engine: ScriptedEngine) -> None:
    say(" Paris.")
    for said in ("It rains in", "<think>It rains in"):
        await api.chat.completions.create(model=MODEL, messages=[*ASK, {"role": "assistant", "content": said}],
                                          extra_body={"continue_final_message": True})
        prompt = vocabulary.tokenizer.decode(engine.completions[-1].generation.prompt_ids)
        assert prompt.endswith(f"<|assistant|>{said}")
    _, message, _ = await both(api, messages=[*ASK, {"role": "assistant", "content": "<think>It rains in"}],
                               extra_body={"continue_final_message": True})
    assert told(message) == ("", "Paris.", [])
    await api.chat.completions.create(model=MODEL, messages=ASK, extra_body={"add_generation_prompt": False})
    assert vocabulary.tokenizer.decode(engine.completions[-1].generation.prompt_ids).endswith("<|end|>")


SCOPED = {"steering": {"interventions": [
    {"op": "add", "layers": [1], "inline": {"vector": [1.0] * WIDTH},
     "scope": {"prompt": "none", "generation": {"exclude": {"sections": ["tool_call", "reasoning"]}}}},
    {"op": "add", "layers": [1], "inline": {"vector": [1.0] * WIDTH},
     "scope": {"prompt": "none", "generation": {"sections": ["reasoning"]}}},
    {"op": "add", "layers": [1], "inline": {"vector": [1.0] * WIDTH},
     "scope": {"prompt": "none", "generation": {"sections": ["json"]}}}]}}


async def test_scopes_know_sections_and_receipts_count_them(api: AsyncOpenAI, say: Any, vocabulary: Vocabulary) -> None:
    thought, said = "<think>hm</think>", "Well. "
    say(f"{thought}{said}{CALL}")
    _, message, _ = await both(api, tools=[TOOL], extra_body=SCOPED)
    whole = await api.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], extra_body=SCOPED)
    receipt = whole.model_extra["steering"]
    # A token has the section that it leaves the text in: the last one of a mark belongs to what comes behind it. The
    # last token of all was never fed back.
    tokens = vocabulary.encode(f"{thought}{said}{CALL}", special_tokens=False)
    sections, text = [], ""
    for token in tokens:
        text += vocabulary.token_text(token)
        inside = text.count("<tool_call>") > text.count("</tool_call>")
        sections.append("tool_call" if inside else "reasoning" if text.count("<think>") > text.count("</think>")
                        else "answer")
    counts = [applied["tokens"]["generation"] for applied in receipt["applied"]]
    assert counts == [sections.count("answer"), sections.count("reasoning"), 0]
    assert receipt["sections"] == [{"answer": sections.count("answer") + 1, "reasoning": sections.count("reasoning"),
                                    "tool_call": sections.count("tool_call")}]
    # JSON that is held to is a section of its own, and so is a block that the model marks as JSON.
    quiet = {"chat_template_kwargs": {"enable_thinking": False}, **SCOPED}
    say("{}")
    held = await api.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "json_object"},
                                             extra_body=quiet)
    count = len(vocabulary.encode("{}", special_tokens=False)) + 1
    assert held.model_extra["steering"]["sections"] == [{"json": count}]
    say("So:\n```json\n{}\n```")
    block = await api.chat.completions.create(model=MODEL, messages=ASK, extra_body=quiet)
    assert block.choices[0].message.content == "So:\n```json\n{}\n```"
    assert set(block.model_extra["steering"]["sections"][0]) == {"answer", "json"}
    # Plain completions have sections, too, and no calls.
    say(f"a {CALL}")
    plain = await api.completions.create(model=MODEL, prompt="x", max_tokens=200, extra_body=SCOPED)
    assert plain.choices[0].text == f"a {CALL}" and set(plain.model_extra["steering"]["sections"][0]) == {"answer"}


async def test_token_ids_are_told_if_asked_for(api: AsyncOpenAI, say: Any, engine: ScriptedEngine,
                                               vocabulary: Vocabulary) -> None:
    say("Hi 😀")
    whole, _, choices = await both(api, extra_body={"return_token_ids": True})
    ids = [*vocabulary.encode("Hi 😀", special_tokens=False), vocabulary.end_ids[0]]
    assert whole.choices[0].token_ids == ids == [
        token for choice in choices for token in (choice.model_extra or {}).get("token_ids", [])]
    assert whole.prompt_token_ids == engine.completions[0].generation.prompt_ids
    plain = await api.completions.create(model=MODEL, prompt="x", extra_body={"return_token_ids": True})
    assert (plain.choices[0].token_ids, len(plain.choices[0].prompt_token_ids)) == (ids, 1)


async def test_log_probabilities_are_told_by_token(api: AsyncOpenAI, say: Any, engine: ScriptedEngine,
                                                   vocabulary: Vocabulary) -> None:
    say("a😀b")
    plain = await api.completions.create(model=MODEL, prompt="x", logprobs=2)
    found = plain.choices[0].logprobs
    assert found.tokens[:6] == ["a", *(f"bytes:\\x{byte:02x}" for byte in "😀".encode()), "b"]
    # The emoji is one character of the text, and it is there when its last byte is.
    assert found.text_offset == [0, 1, 1, 1, 1, 2, 3]
    chunks = [chunk async for chunk in await api.completions.create(model=MODEL, prompt="x", logprobs=2, stream=True)]
    assert [n for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
            for n in chunk.choices[0].logprobs.text_offset] == found.text_offset
    top = ((70, -1.0), (70, -2.0), (vocabulary.known, -3.0))
    alike = Teller(vocabulary, ()).told([Token(65, -0.5, top), Token(66)])
    assert list(alike.top_logprobs[0].values()) == [-1.0, -2.0, -3.0] and "token_id:70" in alike.top_logprobs[0]
    assert alike.token_logprobs == [-0.5, None], "what is not known is not zero"
    assert entries(vocabulary, [Token(65)])[0].logprob is None


async def test_capabilities_say_how_the_model_calls_and_thinks(client: httpx.AsyncClient) -> None:
    found = (await client.get("/v1/capabilities")).json()
    assert (found["tool_calls"], found["reasoning"], found["structured_outputs"]) == (
        "hermes", ["<think>", "</think>"], False)


@pytest.fixture
async def unthinking(settings: Settings, engine: ScriptedEngine, library: Library, vocabulary: Vocabulary
                     ) -> AsyncIterator[FastAPI]:
    off = settings.model_copy(update={"tool_parser": "none", "reasoning_parser": "none"})
    app = create_app(off, engine, library, vocabulary, engine_name="scripted")
    async with app.router.lifespan_context(app):
        yield app


async def test_forms_can_be_turned_off(unthinking: FastAPI, say: Any) -> None:
    say("<think>hm</think>Hi")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=unthinking), base_url="http://localhost") as client:
        api = AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=client, max_retries=0)
        answer = await api.chat.completions.create(model=MODEL, messages=ASK)
        assert answer.choices[0].message.content == "<think>hm</think>Hi"
        assert answer.usage.completion_tokens_details is None
        with pytest.raises(openai.BadRequestError) as refused:
            await api.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL])
        assert refused.value.code == "unsupported_parameter" and "tool_parser" in str(refused.value)

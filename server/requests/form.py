"""What form the text of a completion has: which sections are told apart in it, which tools it may call, and what
grammar it is held to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.engines.grammar import Grammar, as_tag, of_choices, of_rules, of_schema, of_tag
from server.engines.schemas import check_schema
from server.errors import UnsupportedParameter
from server.requests.fields import CompletionFields
from server.requests.schema import ChatRequest
from server.requests.state import ServerState
from server.requests.tools import NamedTool, OfferedTool
from server.text.assemble import Assembler
from server.text.dialect import Dialect
from server.text.formats.base import Tool, ToolFormat, sequence, text
from server.text.vocabulary import NONE_SHOWN
from steering.language.errors import InvalidRequest
from steering.programs.sections import Mark, Sections

# What models write between a thought and what they are held to.
GAP = {"type": "regex", "pattern": r"[ \n]{0,4}"}


@dataclass(frozen=True)
class Form:
    """
    Attributes:
        sections: how the sections of a completion are told.
        taken_apart: whether marks are taken out of the text, so that it becomes a message.
        tools: the form of calls, where tools may be called.
        shown: special tokens that are a part of the text.
        grammar: None for free text.
    """

    sections: Sections
    taken_apart: bool = False
    tools: ToolFormat | None = None
    shown: frozenset[int] = NONE_SHOWN
    grammar: Grammar | None = None

    def assembler(self) -> Assembler | None:
        return Assembler(self.sections, self.tools) if self.taken_apart else None


def plain_form(body: CompletionFields, state: ServerState) -> Form:
    """Of a plain completion: text, marks included."""
    grammar = _asked(body, state)
    return Form(state.dialect.sections(tools=False, answer="json" if _is_json(grammar) else "answer"),
                grammar=_allowed(grammar, state))


def chat_form(body: ChatRequest, state: ServerState, opening: str) -> Form:
    """Of an answer in a conversation. opening: what of the assistant's turn the prompt holds.

    Raises:
        InvalidRequest: naming the field.
    """
    dialect = state.dialect
    offered, asked = offered_tools(body), _asked(body, state)
    tools = dialect.tools if offered else None
    if tools is not None and asked is not None and any(mark.opens for mark in tools.marks):
        raise InvalidRequest(f"this model writes calls in the form {tools.name}, which cannot be told from an answer "
                             f"that is held to {asked.param.partition('.')[0]}", param="tools",
                             fix="Leave one of them out.")
    sections = dialect.sections(tools=tools is not None, answer="json" if _is_json(asked) else "answer",
                                opening=opening)
    grammar = asked if tools is None else _with_calls(body, offered, tools, asked)
    if grammar is not None and dialect.thought is not None:
        grammar = _behind_thought(grammar, dialect.thought, opening,
                                  thinking=sections.marks.section(sections.start) == "reasoning")
    return Form(sections, True, tools, dialect.shown, _allowed(grammar, state))


def offered_tools(body: ChatRequest) -> list[OfferedTool]:
    """The tools that the model is told of.

    Raises:
        InvalidRequest: a tool is chosen that is not there.
    """
    choice = body.tool_choice
    names = [tool.function.name for tool in body.tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise InvalidRequest(f"there is no tool {choice.function.name}", param="tool_choice.function.name",
                             fix="Name one of the tools.")
    if choice == "required" and not names:
        raise InvalidRequest("a call is required and there are no tools", param="tool_choice")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidRequest(f"two tools are named {name}", param=("tools", i, "function", "name"))
    return [] if choice == "none" else body.tools


def template_variables(body: ChatRequest, dialect: Dialect) -> dict[str, Any]:
    """What the chat template is told besides messages and tools.

    Raises:
        UnsupportedParameter: it knows no such variable.
    """
    given = dict(body.chat_template_kwargs)
    effort, known = body.reasoning_effort, dialect.variables
    if effort is not None and "reasoning_effort" in known:
        given.setdefault("reasoning_effort", effort)
    elif effort is not None and "enable_thinking" in known:
        given.setdefault("enable_thinking", effort != "none")
    elif effort is not None and (effort != "none" or dialect.thought is not None):
        raise UnsupportedParameter("the chat template of this model knows no effort", param="reasoning_effort",
                                   fix="Leave it out.")
    if given.get("enable_thinking") is False and dialect.thought is None:
        # What is turned off is not there.
        given.pop("enable_thinking")
    for name in given:
        if name in RESERVED or name not in known:
            raise UnsupportedParameter(f"the chat template of this model has no variable {name[:64]!r} to set",
                                       param=("chat_template_kwargs", name[:64]), fix="Leave it out.")
    if len(json.dumps(given)) > MAX_VARIABLES:
        raise InvalidRequest(f"the variables take more than {MAX_VARIABLES} characters", param="chat_template_kwargs")
    return given


MAX_VARIABLES = 8192
# What templates are given anyway.
RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token",
                      "eos_token", "pad_token", "unk_token"))


def _asked(body: CompletionFields, state: ServerState) -> Grammar | None:
    """What the request wants the answer to be held to."""
    form, wanted = (body.response_format if isinstance(body, ChatRequest) else None), body.structured_outputs
    held = form is not None and form.type != "text"
    if held and wanted is not None:
        raise InvalidRequest("response_format and structured_outputs both say what the answer is held to",
                             param="structured_outputs", fix="Leave one of them out.")
    if form is not None and form.json_schema is not None and form.json_schema.content is not None:
        return of_schema(form.json_schema.content, "response_format.json_schema.schema")
    if held:
        return of_schema({"type": "object"}, "response_format")
    if wanted is None:
        return None
    if wanted.json_ is not None:
        return of_schema(_schema(wanted.json_), "structured_outputs.json")
    if wanted.regex is not None:
        return Grammar("regex", wanted.regex, "structured_outputs.regex")
    if wanted.choice is not None:
        return of_choices(wanted.choice, "structured_outputs.choice")
    if wanted.grammar is not None:
        return of_rules(wanted.grammar, "structured_outputs.grammar")
    return of_schema({"type": "object"}, "structured_outputs.json_object")


def _schema(given: Mapping[str, Any] | str) -> Mapping[str, Any]:
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidRequest("this is no JSON schema", param="structured_outputs.json")
    return found


def _is_json(grammar: Grammar | None) -> bool:
    return grammar is not None and grammar.kind == "json"


def _with_calls(body: ChatRequest, offered: list[OfferedTool], form: ToolFormat, asked: Grammar | None
                ) -> Grammar | None:
    """The grammar of an answer that must or may call tools; None where nothing has to be held."""
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        named = [tool for tool in offered if tool.function.name == choice.function.name]
        return of_tag(form.forced(_held(named, body), many=False), "tool_choice")
    if choice == "required":
        return of_tag(form.forced(_held(offered, body), many=body.parallel_tool_calls), "tool_choice")
    if asked is not None:
        # A call, or the answer that is held.
        calls = form.forced(_held(offered, body), many=body.parallel_tool_calls)
        return of_tag({"type": "or", "elements": [calls, as_tag(asked)]}, asked.param)
    if body.parallel_tool_calls and not any(tool.function.strict for tool in offered):
        return None
    free = form.free(_held([tool for tool in offered if tool.function.strict], body),
                     [tool.function.name for tool in offered if not tool.function.strict],
                     many=body.parallel_tool_calls)
    if free is None:
        field = next((("tools", i, "function", "strict") for i, tool in enumerate(body.tools) if tool.function.strict),
                     ("parallel_tool_calls",))
        raise UnsupportedParameter(f"calls in the form {form.name}, which this model writes, can be held to it only "
                                   "where a call is required", param=field,
                                   fix='Leave it out, or set tool_choice to "required".')
    return of_tag(free, "tools")


def _held(tools: list[OfferedTool], body: ChatRequest) -> list[Tool]:
    """Tools whose schemas can be held to."""
    for tool in tools:
        try:
            check_schema(tool.function.parameters)
        except ValueError as error:
            place = ("tools", body.tools.index(tool), "function", "parameters")
            raise InvalidRequest(f"arguments cannot be held to this schema: {error}", param=place,
                                 fix="Leave that out of the schema, and check the arguments for it.") from error
    return [Tool(tool.function.name, {"type": "object", **tool.function.parameters}) for tool in tools]


def _behind_thought(grammar: Grammar, thought: Mark, opening: str, *, thinking: bool) -> Grammar:
    """The grammar for a model that may think before it answers."""
    assert thought.end is not None
    if thinking:
        free = {"type": "any_text", "excludes": [thought.end]}
        return of_tag(sequence(free, text(thought.end), GAP, as_tag(grammar)), grammar.param)
    if thought.end in opening:
        # The template has closed the thought.
        return grammar
    tag = {"type": "tag", "begin": thought.begin, "content": {"type": "any_text"}, "end": thought.end}
    return of_tag(sequence({"type": "optional", "content": sequence(tag, GAP)}, as_tag(grammar)), grammar.param)


def _allowed(grammar: Grammar | None, state: ServerState) -> Grammar | None:
    """The grammar, where engine and settings allow it."""
    if grammar is None:
        return None
    if "structured_outputs" not in state.engine.features:
        raise UnsupportedParameter(f"the {state.engine_name} engine has no structured output", param=grammar.param,
                                   fix="Leave it out.")
    if len(grammar.text) > state.settings.max_grammar_bytes:
        raise grammar.refused(f"it has {len(grammar.text)} characters, this server allows "
                              f"{state.settings.max_grammar_bytes}")
    if not state.vocabulary.end_ids:
        raise grammar.refused("this model has no token that ends a text")
    return grammar

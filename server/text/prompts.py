"""Chat messages to prompt tokens, and the role of each token for scopes.

What a message says is data: control tokens of the model that a message holds are encoded as the text they are written
as, so no message can end its turn or open another. Text without such tokens gives the tokens of the tokenizer's own
`apply_chat_template`, to the id. Roles are exact or refused (`turns`). Methods block: call them in a thread.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from jinja2 import TemplateError

from server.errors import ContextLengthExceeded, UnsupportedParameter
from server.text.literal import BREAK, Control, Encoded, unmarked
from server.text.turns import Message, marked, turn_ends
from server.text.vocabulary import Vocabulary
from steering.language.errors import InvalidRequest, InvalidSpec, Path

_USER, _SYSTEM = {"role": "user", "content": "x"}, {"role": "system", "content": "x"}
_REPLY = {"role": "assistant", "content": "x"}
# Conversations in which a template writes its markers; the first that it takes is looked at.
_PROBES: tuple[list[Message], ...] = ([_SYSTEM, _USER, _REPLY, _USER], [_USER, _REPLY, _USER], [_USER])

MESSAGES: Path = ("messages",)
# Where a message that is continued ends. No message that can be encoded holds it.
CUT = "\udc82"


@dataclass(frozen=True)
class Prompt:
    """
    Attributes:
        roles: one per token, for chat prompts of which a scope names roles.
        opening: what of the assistant's turn the prompt holds already.
    """

    token_ids: list[int]
    roles: list[str] | None = None
    opening: str = ""


@dataclass(frozen=True)
class Manner:
    """How a conversation is told to the model.

    Attributes:
        tools: functions that it may call, as templates take them.
        variables: of the template, by name.
        opens: the template opens a turn for the assistant.
        continues: the last message is the assistant's, and the completion goes on with it.
        thoughtful: what the template opens may be a thought, so it is looked at.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    opens: bool = True
    continues: bool = False
    thoughtful: bool = False


PLAIN = Manner()


class ChatPrompts:
    def __init__(self, vocabulary: Vocabulary, *, control_in_messages: bool = False) -> None:
        """control_in_messages: control tokens that a message holds are meant, as the tokenizer itself would have it."""
        self._vocabulary = vocabulary
        self._control = None if control_in_messages else self._find_control()

    def prompt(self, messages: Sequence[Message], *, roles: bool, at_most: int | None = None, manner: Manner = PLAIN
               ) -> Prompt:
        """Tokens of a conversation up to where the assistant begins to speak.

        Args:
            at_most: tokens it may have; None for any number.
            manner: how the conversation is told.

        Raises:
            InvalidRequest: the model's template refuses the conversation.
            ContextLengthExceeded: it cannot have so few tokens, as could be told before it was tokenised.
            InvalidSpec: roles are wanted and the template does not keep turns apart.
        """
        said = self._said(messages, MESSAGES)
        manner = self._told(manner)
        text = self._rendered(said, manner)
        self._check_nothing_lost(said, text, manner)
        opening = self._opening(said, text, manner)
        if at_most is not None:
            check_length(self._vocabulary.least_tokens(text), at_most, "messages")
        if not roles:
            return Prompt(self._encoded(text, MESSAGES).ids, opening=opening)
        with_ends = self._rendered(marked(said), manner)
        ends = None if unmarked(with_ends)[0] != unmarked(text)[0] or manner.continues else turn_ends(
            said, with_ends, lambda some, opens: self._render(some, replace(manner, opens=opens)),
            self._vocabulary.tokenizer.bos_token)
        if ends is None:
            raise _no_roles("the chat template of this model does not keep turns apart")
        found = self._encoded(with_ends, MESSAGES, [end for end, _ in ends])
        if found.offsets is None:
            raise _no_roles("the tokenizer of this model does not tell which text a token stands for")
        return Prompt(found.ids, _roles_of(found.offsets, found.places, [role for _, role in ends]), opening)

    def conversation(self, messages: Sequence[Message], where: Path) -> list[int]:
        """Tokens of a conversation to read: one the assistant ends stays as it is, others are opened for it."""
        text = self._rendered(self._said(messages, where), Manner(opens=messages[-1]["role"] != "assistant"), where)
        return self._encoded(text, where).ids

    def _find_control(self) -> Control | None:
        """Special tokens, and what else the template writes between contents that the tokenizer knows as one."""
        tokenizer = self._vocabulary.tokenizer
        if tokenizer.chat_template is None:
            return None
        frame = ""
        for probe in _PROBES:
            try:
                frame = self._render(probe, PLAIN)
                break
            except TemplateError:
                continue
        added = tokenizer.added_tokens_decoder.values()
        return Control(tokenizer, {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special),
                                   *(str(token) for token in added if str(token) in frame)})

    def _said(self, messages: Sequence[Message], where: Path) -> list[Message]:
        """The messages with control tokens in them broken up.

        Raises:
            InvalidRequest: there is one, and the tokenizer cannot take it for text.
        """
        return [_said_with(message, partial(self._written, place=(*where, i, "content")))
                for i, message in enumerate(messages)]

    def _told(self, manner: Manner) -> Manner:
        """The same for tools and variables."""
        return replace(manner, tools=[_each_text(tool, partial(self._written, place=("tools", i)))
                                      for i, tool in enumerate(manner.tools)],
                       variables=_each_text(manner.variables, partial(self._written, place=("chat_template_kwargs",))))

    def _written(self, text: str, place: Path) -> str:
        """A text that somebody wrote, with control tokens in it broken up."""
        control = self._control
        if control is None:
            return text
        if control.separable:
            return control.written(text)
        token = control.find(text)
        if token is not None:
            raise InvalidRequest(f"the text holds {token}, a control token of this model, which its tokenizer "
                                 "cannot take for text", param=place, fix="Leave it out.")
        return text

    def _opening(self, messages: Sequence[Message], text: str, manner: Manner) -> str:
        """What of the assistant's turn a rendered conversation holds."""
        if manner.continues:
            return str(unmarked(messages[-1]["content"])[0])
        if not manner.opens or not manner.thoughtful:
            return ""
        before = self._rendered(messages, replace(manner, opens=False))
        return unmarked(text[len(os.path.commonprefix([before, text])):])[0]

    def _check_nothing_lost(self, messages: Sequence[Message], text: str, manner: Manner) -> None:
        """Tools, calls of them and their results stand in the rendered text, or are refused.

        Raises:
            InvalidRequest: the template of this model has no place for them.
        """
        plain = unmarked(text)[0]
        if any(tool["function"]["name"] not in plain for tool in manner.tools):
            raise UnsupportedParameter("the chat template of this model has no place for tools", param="tools",
                                       fix="Leave tools out, or serve a model whose template offers them.")
        for i, message in enumerate(messages):
            if message.get("tool_calls") and "tool_calls" not in str(self._vocabulary.tokenizer.chat_template):
                raise InvalidRequest("the chat template of this model has no place for tool calls",
                                     param=("messages", i, "tool_calls"), fix="Describe the call in words, in content.")
            if message["role"] == "tool" and message["content"].strip() not in text:
                raise InvalidRequest("the chat template of this model has no place for tool results",
                                     param=("messages", i),
                                     fix="Describe the result in words, in a message of the user.")

    def _encoded(self, text: str, where: Path, places: Sequence[int] | None = None) -> Encoded:
        """Tokens of a rendered text with marks. places: what to find again in the characters of the offsets.

        Raises:
            InvalidRequest: the tokenizer takes a part of the text for a control token whatever is done.
        """
        control = self._control
        plain, moved = unmarked(text, places or ())
        literal = None
        if BREAK not in text:
            # The tokenizer's own tokens. One that folds case or width finds control tokens where none is written.
            ids, offsets = ((self._vocabulary.encode(plain, special_tokens=False), None) if places is None
                            else self._vocabulary.encode_with_offsets(plain))
            if control is None or control.count(ids) == control.meant(plain):
                # Offsets that count the spaces of a token are to be had of the other one only.
                literal = control.encode(text, places) if control is not None and places is not None else None
                return literal if literal is not None and literal.ids == ids else Encoded(ids, offsets, moved)
        literal = None if control is None else control.encode(text, places or ())
        if literal is None:
            raise InvalidRequest("the text holds what the tokenizer takes for a control token of this model",
                                 param=where, fix="Leave it out.")
        return literal

    def _rendered(self, messages: Sequence[Message], manner: Manner, where: Path = MESSAGES) -> str:
        if self._vocabulary.tokenizer.chat_template is None:
            raise InvalidRequest("this model has no chat template", param=where, fix="Use /v1/completions.")
        try:
            return self._render(messages, manner)
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses the conversation: {error.message}"[:300],
                                 param=where) from None

    def _render(self, messages: Sequence[Message], manner: Manner) -> str:
        said = [dict(message) for message in messages]
        if manner.continues:
            said[-1]["content"] += CUT
        text = str(self._vocabulary.tokenizer.apply_chat_template(
            said, tools=[dict(tool) for tool in manner.tools] or None, tokenize=False,
            add_generation_prompt=manner.opens and not manner.continues, **manner.variables))
        if not manner.continues:
            return text
        if CUT not in text:
            raise TemplateError("it leaves out the end of the last message, so it cannot be continued")
        return text[:text.rindex(CUT)]


def _said_with(message: Message, change: Callable[[str], str]) -> Message:
    """A message with all changed that somebody wrote. Its other fields are words that cannot hold a control token."""
    found = {**message, "content": change(message["content"])}
    if "reasoning_content" in message:
        found["reasoning_content"] = change(message["reasoning_content"])
    if "tool_calls" in message:
        found["tool_calls"] = [{**call, "function": {**call["function"], "arguments": _each_text(
            call["function"]["arguments"], change)}} for call in message["tool_calls"]]
    return found


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): _each_text(part, change) for name, part in value.items()}
    return [_each_text(part, change) for part in value] if isinstance(value, list) else value


def check_length(least: int, at_most: int, where: str | Path) -> None:
    """Raises ContextLengthExceeded for a text of at least `least` tokens where `at_most` fit."""
    if least > at_most:
        raise ContextLengthExceeded(at_most, f"the text has {least} at least", param=where, fix="Shorten it.")


def _roles_of(offsets: Sequence[tuple[int, int]], ends: Sequence[int], roles: Sequence[str]) -> list[str]:
    """The role of each token: that of the part `[end before, end)` in which all of it lies."""
    if not offsets:
        return []
    starts, stops = np.asarray(offsets, dtype=np.int64).T
    # Of parts without a character the last one ends there.
    part = np.minimum(np.searchsorted(ends, starts, side="right"), len(ends) - 1)
    if np.any(stops > np.asarray(ends)[part]):
        raise _no_roles("a token of this prompt belongs to two turns")
    return [roles[i] for i in part.tolist()]


def _no_roles(reason: str) -> InvalidSpec:
    return InvalidSpec(f"{reason}, so scopes cannot name roles", param=("steering", "interventions"),
                       fix="Pick tokens by position or window.")

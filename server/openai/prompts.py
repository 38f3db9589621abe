"""Chat messages to prompt tokens, and the role of each token for scopes.

Roles are exact or refused. The chat template is rendered turn by turn; where each rendering begins with the one
before, the text in between is that turn, markers included. Templates that move text between turns (a system message
merged into the first user turn, say) have no such division, and a scope that names roles is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from server.openai.vocabulary import Vocabulary
from steering.errors import InvalidRequest, InvalidSpec

Message = Mapping[str, str]
# What a template puts before the first turn: a begin-of-text token, a default system prompt.
PREAMBLE = "preamble"
GENERATION = "assistant"


@dataclass(frozen=True)
class Prompt:
    """`roles`: one per token, for chat prompts of which a scope names roles."""

    token_ids: list[int]
    roles: list[str] | None = None


class ChatPrompts:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def prompt(self, messages: Sequence[Message], *, roles: bool) -> Prompt:
        """Tokens of a conversation up to where the assistant begins to speak.

        Raises:
            InvalidRequest: the model's template refuses the conversation.
            InvalidSpec: roles are wanted and the template does not keep turns apart.
        """
        text = self._rendered(messages)
        if not roles:
            return Prompt(self._vocabulary.encode(text, special_tokens=False))
        ends = self._turn_ends(messages, text)
        token_ids, offsets = self._vocabulary.encode_with_offsets(text)
        if ends is None or offsets is None:
            raise _no_roles("the chat template of this model does not keep turns apart")
        return Prompt(token_ids, _roles_of(offsets, ends))

    def conversation(self, messages: Sequence[Message], param: str) -> list[int]:
        """Tokens of a conversation to read: one the assistant ends stays as it is, others are opened for it."""
        text = self._rendered(messages, generation=messages[-1]["role"] != "assistant", param=param)
        return self._vocabulary.encode(text, special_tokens=False)

    def _rendered(self, messages: Sequence[Message], *, generation: bool = True, param: str = "messages") -> str:
        if self._vocabulary.tokenizer.chat_template is None:
            raise InvalidRequest("this model has no chat template", param=param, fix="Use /v1/completions.")
        try:
            return self._render(messages, generation=generation)
        except TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses the conversation: {error.message}"[:300],
                                 param=param) from None

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        return str(self._vocabulary.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=generation))

    def _turn_ends(self, messages: Sequence[Message], whole: str) -> list[tuple[int, str]] | None:
        """(end, role) of each part of the text in order; None where the template has no such parts."""
        # Whether turns stay apart depends on their order, not on their words, so it is tried with words that cannot
        # be mistaken for one another.
        marked = [{"role": m["role"], "content": f"\ue000{chr(0xE100 + i)}\ue001"} for i, m in enumerate(messages)]
        try:
            ends = self._divide(marked, self._render(marked, generation=True))
            if ends is None or not _holds_own_marks(marked, self._render(marked, generation=True), ends):
                return None
            return self._divide(messages, whole)
        except TemplateError:
            return None

    def _divide(self, messages: Sequence[Message], whole: str) -> list[tuple[int, str]] | None:
        grown = [self._render(messages[:k + 1], generation=False) for k in range(len(messages))]
        if any(not longer.startswith(shorter) for shorter, longer in zip(grown, [*grown[1:], whole], strict=True)):
            return None
        preamble = self._preamble(messages, grown[0])
        if preamble is None:
            return None
        ends = [(preamble, PREAMBLE), *((len(text), m["role"]) for text, m in zip(grown, messages, strict=True))]
        return [*ends, (len(whole), GENERATION)]

    def _preamble(self, messages: Sequence[Message], first: str) -> int | None:
        """Length of what precedes the first turn: the same turn rendered later, behind others, has none."""
        opener = messages[0]
        other = {"user": "assistant", "assistant": "user"}.get(opener["role"])
        if other is None:
            # A system turn cannot be repeated everywhere; with one given, nothing but BOS comes before it.
            bos = self._vocabulary.tokenizer.bos_token
            return len(bos) if bos and first.startswith(bos) else 0
        contexts: list[list[Message]] = [
            [{"role": "system", "content": "-"}],
            [{"role": opener["role"], "content": "-"}, {"role": other, "content": "-"}],
        ]
        for context in contexts:
            try:
                before = self._render(context, generation=False)
                after = self._render([*context, opener], generation=False)
            except TemplateError:
                continue
            turn = after.removeprefix(before)
            if after.startswith(before) and turn and first.endswith(turn):
                return len(first) - len(turn)
        return None


def _holds_own_marks(messages: Sequence[Message], text: str, ends: Sequence[tuple[int, str]]) -> bool:
    """Whether the part of each message holds its content and no other's."""
    start = ends[0][0]
    if "\ue000" in text[:start] or "\ue000" in text[ends[-2][0]:]:
        return False
    for message, (end, _) in zip(messages, ends[1:], strict=False):
        part = text[start:end]
        if message["content"] not in part or part.count("\ue000") != part.count(message["content"]):
            return False
        start = end
    return True


def _roles_of(offsets: Sequence[tuple[int, int]], ends: Sequence[tuple[int, str]]) -> list[str]:
    roles: list[str] = []
    part = 0
    for start, stop in offsets:
        while part < len(ends) - 1 and start >= ends[part][0]:
            part += 1
        if stop > ends[part][0]:
            raise _no_roles("a token of this prompt belongs to two turns")
        roles.append(ends[part][1])
    return roles


def _no_roles(reason: str) -> InvalidSpec:
    return InvalidSpec(f"{reason}, so scopes cannot name roles", param="steering.interventions",
                       fix="Pick tokens by position or window.")

"""Texts that are read and not continued: by a lens, or to capture their activations."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from server.errors import ContextLengthExceeded
from server.requests.plan import Plan
from server.requests.schema import Message, TokenIds, size_of
from server.requests.state import ServerState
from server.text.prompts import Prompt, check_length
from steering.language.errors import InvalidRequest, InvalidSpec, Path
from steering.language.spec import Steering

Text = Annotated[str, Field(min_length=1)] | TokenIds | Annotated[list[Message], Field(min_length=1, max_length=4096)]


def check_reading(steering: Steering) -> None:
    """Raises InvalidSpec for what only means something where text is generated. A guard of a preset waits for that."""
    given = {"report": steering.report != "none", "monitor": bool(steering.monitor),
             "guard": steering.guard is not None, "contrast": steering.contrast is not None}
    for field, asked in given.items():
        if asked:
            raise InvalidSpec("nothing is generated here to report on, to monitor, to guard or to contrast",
                              param=("steering", field), fix="Leave it out.")


def length_of(text: Text) -> int:
    """Characters, or tokens where the text is given as such."""
    if isinstance(text, str):
        return len(text)
    return sum(size_of(part.as_template()) if isinstance(part, Message) else 1 for part in text)


def prompt_to_read(text: Text, plan: Plan, state: ServerState, where: Path) -> Prompt:
    """Tokens of a text, with their roles where the plan names some. Blocks.

    Raises:
        InvalidRequest, InvalidSpec, ContextLengthExceeded: it cannot be read.
    """
    if isinstance(text, list) and isinstance(text[0], Message):
        messages = [message.as_template() for message in text if isinstance(message, Message)]
        prompt = state.chat_prompts.prompt(messages, roles=plan.names_roles, at_most=state.engine.max_sequence_tokens)
    else:
        if plan.names_roles:
            raise InvalidSpec("this input has no chat roles, so scopes cannot name them",
                              param=("steering", "interventions"), fix="Give messages, or pick tokens by position.")
        if isinstance(text, str):
            check_length(state.vocabulary.least_tokens(text), state.engine.max_sequence_tokens, where)
            prompt = Prompt(state.vocabulary.encode(text, special_tokens=True))
        else:
            prompt = Prompt([token for token in text if isinstance(token, int)])
    if not prompt.token_ids:
        raise InvalidRequest("the input is empty", param=where, fix="Give at least one token.")
    for token in prompt.token_ids:
        if token >= state.vocabulary.vocab_size:
            raise InvalidRequest(f"there is no token {token}", param=where,
                                 fix=f"Use 0 to {state.vocabulary.vocab_size - 1}.")
    context = state.engine.max_sequence_tokens
    if len(prompt.token_ids) > context:
        raise ContextLengthExceeded(context, f"the input has {len(prompt.token_ids)}", param=where, fix="Shorten it.")
    return prompt


def positions_in(length: int, positions: Sequence[int] | None) -> list[int]:
    """Positions of a text, counted from the start; None: all of them. Raises InvalidRequest."""
    if positions is None:
        return list(range(length))
    for n, position in enumerate(positions):
        if not -length <= position < length:
            raise InvalidRequest(f"position {position} lies outside of {length} tokens", param=("positions", n),
                                 fix="Ask for positions that every text has.")
    return [position % length for position in positions]

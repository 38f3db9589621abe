"""What an assistant says in one completion: its answer, what it thought before, the tools that it calls.

A message comes in deltas while it is written. All deltas of a stream added up are the message of the whole response,
whatever API it is told in.
"""

from dataclasses import dataclass, field
from typing import Literal

# Why a message ended: "stop" for its natural end or a stop string, "length" where it was cut, "tool_calls" where it
# ended naturally and calls tools.
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class CallDelta:
    """A part of a call. `id` and `name` come together with the first part of a call and with no other; `arguments` is
    the next piece of its JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What was added to a message."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)

    def then(self, other: "Delta") -> "Delta":
        return Delta(self.text + other.text, self.reasoning + other.reasoning, (*self.calls, *other.calls))


@dataclass
class Call:
    """A tool that is called. arguments: JSON text as the model wrote it, cut off where the completion was."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Message:
    """A message as far as it is written. finish_reason: None while it is not finished."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta, finish_reason: FinishReason | None = None) -> None:
        self.text += delta.text
        self.reasoning += delta.reasoning
        for part in delta.calls:
            if part.id is not None and part.name is not None:
                self.calls.append(Call(part.id, part.name))
            self.calls[part.index].arguments += part.arguments
        self.finish_reason = finish_reason or self.finish_reason

"""A response as OpenAI's `/v1/responses` writes it: whole, and as the events in which it comes about."""

import secrets
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field

from server.requests.receipt import Receipt
from server.text.message import Delta, FinishReason

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class OutputMessage(BaseModel):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"
    content: list[ResponseText] = []


class OutputCall(BaseModel):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


class OutputReasoning(BaseModel):
    type: Literal["reasoning"] = "reasoning"
    id: str
    summary: list[Any] = []
    content: list[ReasoningText] = []
    status: Status = "in_progress"


class InputDetails(BaseModel):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class SteeredResponse(BaseModel):
    """OpenAI's response with the receipt, which is there once the response has ended."""

    id: str
    object: Literal["response"] = "response"
    created_at: float
    completed_at: float | None = None
    status: Status = "in_progress"
    model: str
    output: list[OutputMessage | OutputCall | OutputReasoning] = []
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    metadata: dict[str, str] = {}
    previous_response_id: str | None = None
    store: bool = True
    background: bool = False
    max_output_tokens: int | None = None
    parallel_tool_calls: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    text: dict[str, Any] = {"format": {"type": "text"}}
    reasoning: dict[str, Any] = {}
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    steering: Receipt | None = Field(default=None, description="What was applied.")


class Writer:
    """Writes a response from the deltas of its message, and tells each step as an event."""

    def __init__(self, response: SteeredResponse) -> None:
        self.response = response
        self._number = 0

    def begun(self) -> Iterator[dict[str, Any]]:
        yield self._event("response.created", response=self._dumped())
        yield self._event("response.in_progress", response=self._dumped())

    def add(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.reasoning:
            reasoning = yield from self._open(OutputReasoning, lambda: OutputReasoning(id=_id("rs"),
                                                                                      content=[ReasoningText()]))
            reasoning.content[0].text += delta.reasoning
            yield self._inside("response.reasoning_text.delta", delta=delta.reasoning)
        if delta.text:
            message = yield from self._open(OutputMessage, lambda: OutputMessage(id=_id("msg")))
            if not message.content:
                message.content.append(ResponseText())
                yield self._inside("response.content_part.added", part=ResponseText().model_dump())
            message.content[0].text += delta.text
            yield self._inside("response.output_text.delta", delta=delta.text, logprobs=[])
        for part in delta.calls:
            if part.id is not None and part.name is not None:
                yield from self._close("completed")
                yield from self._opened(OutputCall(id=_id("fc"), call_id=part.id, name=part.name))
            call = self.response.output[-1]
            if isinstance(call, OutputCall) and part.arguments:
                call.arguments += part.arguments
                yield self._event("response.function_call_arguments.delta", item_id=call.id, output_index=self._index,
                                  delta=part.arguments)

    def ended(self, reason: FinishReason | Literal["cancelled"]) -> Iterator[dict[str, Any]]:
        """Close what is open. Usage and receipt are told by `last`, as they are known later."""
        yield from self._close("completed" if reason in ("stop", "tool_calls") else "incomplete")
        if reason == "length":
            self.response.status, self.response.incomplete_details = "incomplete", {"reason": "max_output_tokens"}
        else:
            self.response.status = "cancelled" if reason == "cancelled" else "completed"

    def last(self) -> dict[str, Any]:
        kind = "completed" if self.response.status == "completed" else "incomplete"
        return self._event(f"response.{kind}", response=self._dumped())

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    def _open(self, kind: Any, make: Any) -> Any:
        """The item that is written now, a new one where the last one is of another kind."""
        if not self.response.output or type(self.response.output[-1]) is not kind:
            yield from self._close("completed")
            yield from self._opened(make())
        return self.response.output[-1]

    def _opened(self, item: OutputMessage | OutputCall | OutputReasoning) -> Iterator[dict[str, Any]]:
        self.response.output.append(item)
        yield self._event("response.output_item.added", output_index=self._index, item=item.model_dump())

    def _close(self, status: Status) -> Iterator[dict[str, Any]]:
        if not self.response.output or self.response.output[-1].status != "in_progress":
            return
        item = self.response.output[-1]
        item.status = status
        if isinstance(item, OutputReasoning):
            yield self._inside("response.reasoning_text.done", text=item.content[0].text)
        elif isinstance(item, OutputCall):
            yield self._event("response.function_call_arguments.done", item_id=item.id, output_index=self._index,
                              name=item.name, arguments=item.arguments)
        elif item.content:
            yield self._inside("response.output_text.done", text=item.content[0].text, logprobs=[])
            yield self._inside("response.content_part.done", part=item.content[0].model_dump())
        yield self._event("response.output_item.done", output_index=self._index, item=item.model_dump())

    def _inside(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self.response.output[-1].id, output_index=self._index, content_index=0,
                           **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _dumped(self) -> dict[str, Any]:
        return self.response.model_dump(mode="json", exclude_unset=False)


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"

"""`POST /v1/messages` and `/v1/messages/count_tokens`."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from server.api.openai.chat import chat_prompt, start_chat
from server.api.openai.responses import chat_of
from server.api.openai.streaming import Wire, stream, while_connected
from server.api.openai.usage import usage
from server.api.route import StrictRoute
from server.errors import anthropic_body
from server.http.answers import JsonAnswer
from server.requests.admission.caller import caller_of
from server.requests.messages import CountRequest, MessagesRequest
from server.requests.receipt import Receipt
from server.requests.service import Started
from server.requests.state import State
from server.requests.told import told_ahead, told_of
from server.text.message import Delta, FinishReason

router = APIRouter(tags=["messages"], route_class=StrictRoute)
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextContent(BaseModel):
    type: Literal["text"] = "text"
    text: str = ""


class ThinkingContent(BaseModel):
    type: Literal["thinking"] = "thinking"
    thinking: str = ""
    signature: str = ""


class ToolUseContent(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any] = {}


class MessageUsage(BaseModel):
    input_tokens: int = Field(default=0, description="Of the prompt, without those from the cache.")
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int = 0


class SteeredMessage(BaseModel):
    """Anthropic's message with the receipt."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextContent | ThinkingContent | ToolUseContent] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage = MessageUsage()
    steering: Receipt | None = None


class Counted(BaseModel):
    input_tokens: int


@router.post("/v1/messages", response_model=SteeredMessage)
async def create_message(body: MessagesRequest, request: Request, state: State) -> Response:
    """A message in Anthropic's shape, steered as `steering` says."""
    chat = chat_of(body.as_chat())
    chat.steering = body.steering
    caller = caller_of(request, state.settings, body.timeout_s)
    with state.queue.entering(caller.client):
        async with caller.deadline.held():
            started = await start_chat(chat, request.state.request_id, state, caller)
    answer = _Answer(body, started)
    events = answer.events()
    if body.stream:
        return await stream(events, request, told_ahead(started.plan), WIRE)
    message = await while_connected(request, answer.whole(events), events.aclose)  # type: ignore[attr-defined]
    headers = {} if message.steering is None else told_of(message.steering)
    return await state.pools.complete(lambda: JsonAnswer(message.model_dump(mode="json"), headers=headers))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, state: State) -> Counted:
    """The tokens of a prompt, without a completion."""
    chat = chat_of(body.as_chat())
    return Counted(input_tokens=len((await chat_prompt(chat, state, roles=False)).token_ids))


class _Answer:
    """Writes a message from the deltas of a run, and tells each step as an event."""

    def __init__(self, body: MessagesRequest, started: Started) -> None:
        self._started = started
        self._arguments = ""
        self._open = False
        self.message = SteeredMessage(id=f"msg_{started.request_id.removeprefix('req-')}", model=body.model)

    async def whole(self, events: AsyncIterator[dict[str, Any]]) -> SteeredMessage:
        async for _ in events:
            pass
        return self.message

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        pieces = self._started.run.pieces()
        reason: FinishReason = "stop"
        try:
            begun = False
            async for piece in pieces:
                if not begun:
                    # Not before there is a token: what fails until then still becomes a status.
                    self.message.usage.input_tokens = self._started.run.prompt_tokens
                    yield {"type": "message_start", "message": self.message.model_dump(
                        mode="json", exclude={"steering"})}
                    begun = True
                for event in self._add(piece.delta):
                    yield event
                reason = piece.finish_reason or reason
            for event in self._close():
                yield event
            stopped = self._started.run.choices[0].stopped_at
            message = self.message
            message.stop_sequence = stopped
            message.stop_reason = ("stop_sequence" if stopped is not None else "max_tokens" if reason == "length"
                                   else "tool_use" if reason == "tool_calls" else "end_turn")
            counts = usage(self._started)
            cached = counts.prompt_tokens_details.cached_tokens or 0 if counts.prompt_tokens_details else 0
            message.usage = MessageUsage(input_tokens=counts.prompt_tokens - cached, cache_read_input_tokens=cached,
                                         output_tokens=counts.completion_tokens)
            message.steering = await self._started.receipt()
            dumped = message.model_dump(mode="json")
            yield {"type": "message_delta", "delta": {"stop_reason": message.stop_reason, "stop_sequence": stopped},
                   "usage": dumped["usage"], "steering": dumped["steering"]}
            yield {"type": "message_stop"}
        finally:
            await pieces.aclose()

    def _add(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.reasoning:
            thought = yield from self._block(ThinkingContent, ThinkingContent)
            thought.thinking += delta.reasoning
            yield self._change({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.text:
            text = yield from self._block(TextContent, TextContent)
            text.text += delta.text
            yield self._change({"type": "text_delta", "text": delta.text})
        for part in delta.calls:
            if part.id is not None and part.name is not None:
                yield from self._close()
                yield from self._opened(ToolUseContent(id=part.id, name=part.name))
            if part.arguments:
                self._arguments += part.arguments
                yield self._change({"type": "input_json_delta", "partial_json": part.arguments})

    def _block(self, kind: Any, make: Any) -> Any:
        """The block that is written now, a new one where the last one is of another kind."""
        if not self._open or type(self.message.content[-1]) is not kind:
            yield from self._close()
            yield from self._opened(make())
        return self.message.content[-1]

    def _opened(self, block: TextContent | ThinkingContent | ToolUseContent) -> Iterator[dict[str, Any]]:
        self.message.content.append(block)
        self._open, self._arguments = True, ""
        yield {"type": "content_block_start", "index": self._index, "content_block": block.model_dump()}

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        self._open = False
        block = self.message.content[-1]
        if isinstance(block, ToolUseContent):
            block.input = _object(self._arguments)
        yield {"type": "content_block_stop", "index": self._index}

    def _change(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    @property
    def _index(self) -> int:
        return len(self.message.content) - 1


def _object(arguments: str) -> dict[str, Any]:
    """Arguments that were cut off have no object; their text was streamed, and a whole message says `max_tokens`."""
    try:
        found = json.loads(arguments or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _event(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


WIRE = Wire(_event, lambda error: _event(anthropic_body(error)), b"")

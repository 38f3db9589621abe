"""`/v1/responses`: a chat in OpenAI's newer form, which the server may keep so that others go on from it."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ValidationError

from server.api.openai.chat import start_chat
from server.api.openai.response_shape import ResponseUsage, SteeredResponse, Writer
from server.api.openai.streaming import Wire, stream, while_connected
from server.api.openai.usage import usage
from server.api.route import StrictRoute
from server.api.validation import invalid
from server.errors import ResponseCancelled, error_body
from server.http.answers import JsonAnswer
from server.identity.recording import recorded
from server.requests.admission.caller import caller_of
from server.requests.responses import ResponsesRequest
from server.requests.schema import ChatRequest
from server.requests.service import Started
from server.requests.state import ServerState, State
from server.requests.stored.responses import Stored
from server.requests.told import told_ahead, told_of
from server.threads import in_thread
from steering.language.errors import TrimtabError
from vectors.library.audit.notes import maker
from vectors.library.spaces import READER

log = structlog.get_logger("trimtab.responses")
router = APIRouter(tags=["responses"], route_class=StrictRoute)
ResponseId = Annotated[str, Path(max_length=64)]


class DeletedResponse(BaseModel):
    id: str
    object: str = "response"
    deleted: bool = True


def chat_of(fields: dict[str, Any]) -> ChatRequest:
    """A chat request that another API's request stands for. Raises InvalidRequest, UnsupportedParameter."""
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid(error.errors(), fields, ChatRequest) from None


@router.post("/v1/responses", response_model=SteeredResponse)
async def create_response(body: ResponsesRequest, request: Request, state: State) -> Response:
    """A turn of a conversation, steered as `steering` says."""
    before: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        wanted = body.previous_response_id
        before = (await in_thread(state.responses.find, wanted, "previous_response_id")).messages
    messages = [*before, *body.said()]
    chat = chat_of(body.as_chat(messages))
    chat.steering = body.steering
    caller = caller_of(request, state.settings, body.timeout_s)
    with state.queue.entering(caller.client):
        async with caller.deadline.held():
            started = await start_chat(chat, request.state.request_id, state, caller)
    answer = _Answer(body, started, messages, state)
    if body.stream:
        return await stream(answer.events(), request, told_ahead(started.plan), answer.wire())
    events = answer.events()
    response = await while_connected(request, answer.whole(events), events.aclose)  # type: ignore[attr-defined]
    # One that was cancelled has no receipt.
    headers = {} if response.steering is None else told_of(response.steering)
    return await state.pools.complete(lambda: JsonAnswer(response.model_dump(mode="json"), headers=headers))


@router.get("/v1/responses/{response_id}", response_model=SteeredResponse)
async def show_response(response_id: ResponseId, state: State) -> Response:
    """A stored response."""
    return JsonAnswer((await in_thread(state.responses.find, response_id, "response_id")).response)


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: ResponseId, state: State) -> DeletedResponse:
    found = await in_thread(state.responses.find, response_id, "response_id")
    async with recorded(state.library.audit, "response.delete", response_id,
                        before={"model": found.response.get("model")}):
        await in_thread(state.responses.delete, response_id, "response_id")
    return DeletedResponse(id=response_id)


@router.post("/v1/responses/{response_id}/cancel", response_model=SteeredResponse)
async def cancel_response(response_id: ResponseId, state: State) -> Response:
    """End a response that is being written; what there is of it is kept. One that has ended stays as it is."""
    running = state.running_responses.get(response_id)
    if running is None or not READER.get().sees(running.tenant):
        return await show_response(response_id, state)
    running.run.fail(ResponseCancelled("the response was cancelled"))
    return JsonAnswer(running.response.model_dump(mode="json") | {"status": "cancelled"})


@dataclass
class _Answer:
    body: ResponsesRequest
    started: Started
    messages: list[dict[str, Any]]
    state: ServerState
    response: SteeredResponse = field(init=False)
    tenant: str = field(default_factory=maker)

    def __post_init__(self) -> None:
        body, own = self.body, self.state.sampling_defaults
        self.response = SteeredResponse(
            id=f"resp_{self.started.request_id.removeprefix('req-')}", created_at=float(int(time.time())),
            model=body.model, instructions=body.instructions, metadata=body.metadata, store=body.store,
            previous_response_id=body.previous_response_id, max_output_tokens=body.max_output_tokens,
            temperature=own.temperature if body.temperature is None else body.temperature,
            top_p=own.top_p if body.top_p is None else body.top_p, tools=body.tools,
            tool_choice=body.tool_choice or "auto", text=body.text.model_dump(by_alias=True, exclude_none=True),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning={} if body.reasoning is None else body.reasoning.model_dump(exclude_none=True))

    @property
    def run(self) -> Any:
        return self.started.run

    def wire(self) -> Wire:
        def failure(error: TrimtabError) -> bytes:
            told = error_body(error)["error"]
            # The package of OpenAI raises what stands under `error`.
            return _event({"type": "error", "code": told["code"], "message": told["message"], "param": told["param"],
                           "error": told})

        return Wire(_event, failure, b"")

    async def whole(self, events: AsyncIterator[dict[str, Any]]) -> SteeredResponse:
        async for _ in events:
            pass
        return self.response

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        writer, pieces = Writer(self.response), self.started.run.pieces()
        reason: Any = "cancelled"
        try:
            with self._running():
                begun = False
                try:
                    async for piece in pieces:
                        # Not before there is a token: what fails until then still becomes a status.
                        for event in writer.begun() if not begun else ():
                            yield event
                        begun = True
                        for event in writer.add(piece.delta):
                            yield event
                        reason = piece.finish_reason or reason
                except ResponseCancelled:
                    reason = "cancelled"
            for event in writer.ended(reason):
                yield event
            await self._finish(reason)
            yield writer.last()
        finally:
            await pieces.aclose()

    @contextmanager
    def _running(self) -> Any:
        self.state.running_responses[self.response.id] = self
        try:
            yield
        finally:
            self.state.running_responses.pop(self.response.id, None)

    async def _finish(self, reason: str) -> None:
        counts = usage(self.started)
        self.response.usage = ResponseUsage(input_tokens=counts.prompt_tokens, output_tokens=counts.completion_tokens,
                                            total_tokens=counts.total_tokens)
        if counts.completion_tokens_details is not None:
            told = counts.completion_tokens_details.reasoning_tokens or 0
            self.response.usage.output_tokens_details.reasoning_tokens = told
        if counts.prompt_tokens_details is not None:
            self.response.usage.input_tokens_details.cached_tokens = counts.prompt_tokens_details.cached_tokens or 0
        if reason != "cancelled":
            self.response.steering = await self.started.receipt()
        self.response.completed_at = float(int(time.time()))
        if self.response.store:
            await self._store()

    async def _store(self) -> None:
        """Keep it. That it could not be kept is said in the response and never fails it."""
        said = [item.model_dump(exclude={"status"}) for item in self.response.output]
        spoken = ResponsesRequest.model_validate({"model": self.body.model, "input": said}).said() if said else []
        stored = Stored(self.response.model_dump(mode="json"), [*self.messages, *spoken])
        try:
            self.response.store = await in_thread(self.state.responses.keep, self.response.id, stored)
        except TrimtabError as error:
            self.response.store = False
            log.warning("response_not_stored", error=error.message)


def _event(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()

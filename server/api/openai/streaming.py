"""Server-sent events, and leaving when the client does."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from server.errors import error_body
from server.http.handlers import CLIENT_GONE, note
from server.http.open_requests import ended_by
from server.observability.unexpected import report_unexpected
from steering.language.errors import TrimtabError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
# How long the last event of a stream that is ended from outside may wait for its client.
FAREWELL_S = 5.0


class EventStream(StreamingResponse):
    """Sends chunks as events. Its source is closed however the response ends, so generation never outlives it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = _Sent(send)
        try:
            await super().__call__(scope, receive, sent.send)
        except anyio.get_cancelled_exc_class():
            error = ended_by(scope)
            if error is not None and sent.begun and not sent.ended:
                with anyio.move_on_after(FAREWELL_S, shield=True):
                    last = b"" if sent.done else _failure(error) + DONE
                    await send({"type": "http.response.body", "body": last, "more_body": False})
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await close(self._events)


class _Sent:
    """`send` of a stream, and how far it came. done: the event `[DONE]` is out; ended: the response is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.done = self.ended = False

    async def send(self, message: Message) -> None:
        await self._send(message)
        self.begun = True
        self.done = self.done or message.get("body") == DONE
        self.ended = message["type"] == "http.response.body" and not message.get("more_body")


def event(chunk: BaseModel, *, keep_null: bool = False) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_unset=not keep_null).encode() + b"\n\n"


async def stream(chunks: AsyncIterator[BaseModel], request: Request, headers: Mapping[str, str]) -> EventStream:
    """The response of a stream, with further `headers`. What fails before the first chunk is raised here, and becomes
    the status."""
    first = await while_connected(request, anext(chunks), chunks)
    return EventStream(_events(first, chunks, request), headers)


async def _events(first: BaseModel, chunks: AsyncIterator[BaseModel], request: Request) -> AsyncGenerator[bytes, None]:
    try:
        try:
            yield event(first)
            async for chunk in chunks:
                yield event(chunk)
        except TrimtabError as error:
            yield _told(request, error)
        except Exception as error:  # the status is sent: the stream itself must say that it failed
            yield _told(request, report_unexpected(error, request.state.request_id))
        yield DONE
    finally:
        await close(chunks)


def _told(request: Request, error: TrimtabError) -> bytes:
    note(request, error, request.app.state.server.metrics)
    return _failure(error)


def _failure(error: TrimtabError) -> bytes:
    return b"data: " + json.dumps(error_body(error)).encode() + b"\n\n"


async def while_connected(request: Request, work: Awaitable[T], source: AsyncIterator[Any]) -> T:
    """The result of `work`; if the client leaves first, the work is cancelled and `source` closed."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HTTPException(CLIENT_GONE, "the client closed the connection")
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({working})
                await close(source)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def close(source: AsyncIterator[Any]) -> None:
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        await aclose()

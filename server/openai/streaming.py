"""Server-sent events, and leaving when the client does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from server.errors import error_body
from server.handlers import report_unexpected
from steering.errors import TrimtabError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
# Of nginx: the client closed the connection. Nobody reads it; logs and metrics do.
CLIENT_GONE = 499


class EventStream(StreamingResponse):
    """Sends chunks as events. Its source is closed however the response ends, so generation never outlives it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await close(self._events)


def event(chunk: BaseModel, *, keep_null: bool = False) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_unset=not keep_null).encode() + b"\n\n"


async def stream(chunks: AsyncIterator[BaseModel], request: Request) -> EventStream:
    """The response of a stream. What fails before the first chunk is raised here and becomes the status."""
    first = await while_connected(request, anext(chunks), chunks)
    return EventStream(_events(first, chunks, request.state.request_id))


async def _events(first: BaseModel, chunks: AsyncIterator[BaseModel], request_id: str) -> AsyncIterator[bytes]:
    try:
        yield event(first)
        async for chunk in chunks:
            yield event(chunk)
    except TrimtabError as error:
        yield _failure(error_body(error))
    except Exception as error:  # the status is sent: the stream itself must say that it failed
        yield _failure(error_body(report_unexpected(error, request_id)))
    finally:
        await close(chunks)
    yield DONE


def _failure(body: dict[str, Any]) -> bytes:
    return b"data: " + _Failure(**body).model_dump_json().encode() + b"\n\n"


class _Failure(BaseModel):
    error: dict[str, Any]


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

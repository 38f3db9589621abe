"""Server-sent events, and leaving when the client does."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
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
# A comment, which readers of events skip.
STILL_HERE = b": keep-alive\n\n"
# How long the last event of a stream that is ended from outside may wait for its client.
FAREWELL_S = 5.0


def data(content: bytes) -> bytes:
    return b"data: " + content + b"\n\n"


@dataclass(frozen=True)
class Wire:
    """How one kind of stream is written: its chunks, the error that ends it, and what ends every one of them."""

    chunk: Callable[[Any], bytes]
    failure: Callable[[TrimtabError], bytes]
    end: bytes


def _chunk(chunk: BaseModel) -> bytes:
    return data(chunk.model_dump_json(exclude_unset=True).encode())


COMPLETIONS = Wire(_chunk, lambda error: data(json.dumps(error_body(error)).encode()), data(b"[DONE]"))


class EventStream(StreamingResponse):
    """Sends chunks as events. Its source is closed however the response ends, so generation never outlives it."""

    media_type = "text/event-stream"

    def __init__(self, source: "_Source", wire: Wire, request: Request, headers: Mapping[str, str], pause_s: float
                 ) -> None:
        """`pause_s`: seconds of silence after which a comment is sent; 0: none is."""
        super().__init__(_events(source, wire, request),
                         headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        self._source, self._wire, self._pause_s = source, wire, pause_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = _Sent(send, self._wire.end)
        beating = asyncio.create_task(sent.beat(self._pause_s)) if self._pause_s else None
        try:
            await super().__call__(scope, receive, sent.send)
        except anyio.get_cancelled_exc_class():
            error = ended_by(scope)
            if error is not None and sent.begun and not sent.ended:
                with anyio.move_on_after(FAREWELL_S, shield=True):
                    last = b"" if sent.done else self._wire.failure(error) + self._wire.end
                    await send({"type": "http.response.body", "body": last, "more_body": False})
            raise
        finally:
            if beating is not None:
                beating.cancel()
            with anyio.CancelScope(shield=True):
                await self._source.close()


class _Sent:
    """`send` of a stream, and how far it came. done: the event that ends it is out; ended: the response is."""

    def __init__(self, send: Send, end: bytes) -> None:
        self._send, self._end = send, end
        self.begun = self.done = self.ended = False
        self._ending = False
        self._since = asyncio.get_running_loop().time()

    async def send(self, message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body")
        self._ending = self._ending or last
        await self._send(message)
        self._since = asyncio.get_running_loop().time()
        self.begun = True
        self.done = self.done or (bool(self._end) and message.get("body") == self._end)
        self.ended = last

    async def beat(self, pause_s: float) -> None:
        """Send a comment whenever nothing was sent for so long."""
        now = asyncio.get_running_loop().time
        # A client that left is noticed by what sends the events.
        with suppress(OSError):
            while not self._ending:
                await asyncio.sleep(max(self._since + pause_s - now(), 0))
                if now() - self._since >= pause_s and not self._ending:
                    self._since = now()
                    if self.begun:
                        await self._send({"type": "http.response.body", "body": STILL_HERE, "more_body": True})


class _Source:
    """Chunks, of which the first one is under way."""

    def __init__(self, chunks: AsyncIterator[Any]) -> None:
        self._chunks = chunks
        self._first = asyncio.ensure_future(anext(chunks))

    async def begun(self, pause_s: float) -> None:
        """Wait for the first chunk, for so many seconds at most; 0: as long as it takes. Raises what stands in its
        place."""
        await asyncio.wait({self._first}, timeout=pause_s or None)
        if self._first.done():
            self._first.result()

    async def __aiter__(self) -> AsyncIterator[Any]:
        yield await self._first
        async for chunk in self._chunks:
            yield chunk

    async def close(self) -> None:
        self._first.cancel()
        # Whatever it ended with, nobody is left to hear of it.
        await asyncio.gather(self._first, return_exceptions=True)
        await close(self._chunks)


async def stream(chunks: AsyncIterator[Any], request: Request, headers: Mapping[str, str],
                 wire: Wire = COMPLETIONS) -> EventStream:
    """The response of a stream, with further `headers`. What fails before the first chunk is raised here, and becomes
    the status, unless the first chunk takes so long that the stream has to begin without it."""
    pause_s = request.app.state.server.settings.keep_alive_s
    source = _Source(chunks)
    await while_connected(request, source.begun(pause_s), source.close)
    return EventStream(source, wire, request, headers, pause_s)


async def _events(source: _Source, wire: Wire, request: Request) -> AsyncGenerator[bytes, None]:
    def told(error: TrimtabError) -> bytes:
        note(request, error, request.app.state.server.metrics)
        return wire.failure(error)

    try:
        async for chunk in source:
            yield wire.chunk(chunk)
    except TrimtabError as error:
        yield told(error)
    except Exception as error:  # the status is sent: the stream itself must say that it failed
        yield told(report_unexpected(error, request.state.request_id))
    if wire.end:
        yield wire.end


async def while_connected(request: Request, work: Awaitable[T], close_source: Callable[[], Awaitable[None]]) -> T:
    """The result of `work`; if the client leaves first, the work is cancelled and its source closed."""
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
                await close_source()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def close(source: AsyncIterator[Any]) -> None:
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        await aclose()

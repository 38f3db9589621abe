"""One connection of a client: uvicorn's, with bounds on how long it may be silent, and on what it leaves unread.

uvicorn ends connections that are idle between two requests. Here end those that never send the head of a request, and
those whose client does not take what it asked for: their requests are cancelled like those of any client that left.
"""

import asyncio
import fcntl
import json
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import uvicorn
from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.errors import BodyTimeout, InvalidHttp, TooManyConnections, error_body, status_of
from server.http.frame import ABORT
from steering.language.errors import TrimtabError

# A client that takes less than this in the time of a stall counts as one that takes nothing.
TAKEN_BYTES = 16 * 1024
RETRY_AFTER_S = 5
PHRASES = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


@dataclass(frozen=True)
class Bounds:
    """
    Attributes:
        head_s: seconds in which the head of a request must arrive.
        stalled_s: seconds a client may leave what was sent to it unread.
        connections: open at once; more are refused.
        ended: told why the server ended a connection: "limit", "slow_head", "stalled" or "invalid".
    """

    head_s: float
    stalled_s: float
    connections: int
    ended: Callable[[str], None] = lambda reason: None


class HttpConfig(uvicorn.Config):
    """uvicorn's configuration with the bounds of connections. One parser, whatever else is installed: h11 bounds the
    size of a request's head."""

    def __init__(self, app: Any, bounds: Bounds, *, max_header_bytes: int, **given: Any) -> None:
        super().__init__(app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False,
                         h11_max_incomplete_event_size=max_header_bytes, **given)
        self.bounds = bounds


class Connection(H11Protocol):
    def __init__(self, config: HttpConfig, server_state: ServerState, app_state: dict[str, Any],
                 _loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = config.bounds
        self._answer = self.app
        self.app = self._with_abort
        self._head_since: float | None = None
        self._head_begun = False
        # Since when the client has taken less than TAKEN_BYTES of so many bytes.
        self._unread: tuple[float, int] | None = None

    async def _with_abort(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        cast("dict[str, Any]", scope).setdefault("extensions", {})[ABORT] = self.transport.abort
        await self._answer(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self._bounds.connections:
            self.transport = transport
            self._refuse(TooManyConnections("the server has as many connections as it takes",
                                            fix="Try again, and keep connections open for several requests.",
                                            retry_after_s=RETRY_AFTER_S), "limit")
            return
        super().connection_made(transport)
        self._head_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        if not self._answering:
            self._head_begun = True
            if self._head_since is None:
                self._head_since = self.loop.time()
        super().data_received(data)
        if self._answering:
            self._head_since, self._head_begun = None, False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_since, self._head_begun = None, False

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def check(self, now: float) -> None:
        """End the connection if its client is too slow. To be called every second or so."""
        if self._head_since is not None and now - self._head_since > self._bounds.head_s:
            if self._head_begun:
                self._refuse(BodyTimeout("the head of the request did not arrive in time", param="headers",
                                            fix="Send it without pauses."), "slow_head")
            else:
                self._bounds.ended("slow_head")
                self.transport.close()
            self._head_since = None
        self._check_unread(now)

    def _check_unread(self, now: float) -> None:
        unread = _unread(self.transport)
        # While writing goes on there is room, so what is there may still be read; a full or closed one only empties.
        if not unread or not (self.flow.write_paused or self.transport.is_closing()):
            self._unread = None
        elif self._unread is None or self._unread[1] - unread >= TAKEN_BYTES:
            self._unread = (now, unread)
        elif now - self._unread[0] > self._bounds.stalled_s:
            self._bounds.ended("stalled")
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What h11 could not read."""
        if self._answering:
            # Rubbish behind a request that is being answered: no answer can be told from the other.
            self._bounds.ended("invalid")
            self.transport.abort()
            return
        self._refuse(InvalidHttp("this is no request of HTTP/1.1, or its head is too large", fix="Speak plain HTTP/1.1 "
                                 "here; HTTPS ends in front of this server."), "invalid")

    def _should_upgrade(self) -> bool:
        # There is nothing to upgrade to, and no reason to say so in the log for each who asks.
        return False

    def _refuse(self, error: TrimtabError, reason: str) -> None:
        self._bounds.ended(reason)
        status, body = status_of(error), json.dumps(error_body(error)).encode()
        retry = f"Retry-After: {RETRY_AFTER_S}\r\n" if status == 503 else ""
        self.transport.write((f"HTTP/1.1 {status} {PHRASES[status]}\r\nContent-Type: application/json\r\n"
                              f"Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n").encode() + body)
        self.transport.close()


def _unread(transport: asyncio.Transport) -> int:
    """Bytes for the client that wait here, and those that the system has taken and the client's has not."""
    try:
        waiting, sock = transport.get_write_buffer_size(), transport.get_extra_info("socket")
    except AttributeError:
        # asyncio's transport of a TLS connection that has ended has lost what it would ask.
        return 0
    if sock is None:
        return waiting
    try:
        return waiting + int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
    except OSError:
        # Closed by now, or a system that does not tell.
        return waiting

"""The body of a request, bounded in bytes and in time while it arrives."""

import anyio
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from server.errors import BodyTimeout
from steering.language.errors import PayloadTooLarge

# Files of any size are sent here; all other bodies are JSON.
UPLOADS = frozenset({"/v1/artifacts/import", "/v1/activations/import", "/v1/files"})
# A body may take the time that is set, and a second more for so many bytes of it.
BYTES_PER_SECOND = 16 * 1024
# How long what a refused client still sends is thrown away. Were the connection closed at once, the client's system
# would often throw the answer away instead.
LINGER_S = 2.0


class BoundedBody:
    """`receive` of one request. unread: whether bytes of the body are still to come."""

    def __init__(self, scope: Scope, receive: Receive, *, limit: int, timeout_s: float) -> None:
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        self.unread = declared not in ("", "0") or "transfer-encoding" in headers
        # Such a client sends nothing before it is told to, which a refused one never is.
        self._sends_at_once = headers.get("expect", "").lower() != "100-continue"
        self._declared = int(declared[:20]) if declared.isdigit() else 0
        self._receive = receive
        self._limit, self._uploads = limit, scope["path"] in UPLOADS
        self._timeout_s = timeout_s
        self._received = 0
        self._deadline: float | None = None

    async def receive(self) -> Message:
        """
        Raises:
            PayloadTooLarge: more bytes, sent or announced, than the limit.
            BodyTimeout: they come too slowly.
        """
        if not self.unread:
            return await self._receive()
        self._check(self._declared)
        if self._deadline is None:
            self._deadline = anyio.current_time() + self._timeout_s
        message: Message | None = None
        with anyio.move_on_at(self._deadline + self._received / BYTES_PER_SECOND):
            message = await self._receive()
        if message is None:
            self._sends_at_once = False
            raise BodyTimeout("the body did not arrive in time", param="body", fix="Send it without pauses.")
        self.unread = message["type"] == "http.request" and bool(message.get("more_body"))
        self._received += len(message.get("body", b""))
        self._check(self._received)
        return message

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise PayloadTooLarge(f"the body is larger than {self._limit} bytes", param="body",
                                  fix="Send less at once." if self._uploads else
                                  "Upload numbers once as a file to /v1/artifacts/import, and name them.")

    async def discard(self) -> None:
        """Throw away what still comes, for a moment."""
        if self._sends_at_once:
            with anyio.move_on_after(LINGER_S):
                while self.unread:
                    message = await self._receive()
                    self.unread = message["type"] == "http.request" and bool(message.get("more_body"))


def body_limit(path: str, *, json_bytes: int, upload_bytes: int) -> int:
    """Bytes the body of a request to `path` may have."""
    return upload_bytes if path in UPLOADS else json_bytes

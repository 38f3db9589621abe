"""The requests that are being answered, so that a server that shuts down can wait for them and then end them."""

from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from starlette.types import Scope

from server.errors import ShuttingDown
from steering.language.errors import TrimtabError

# A client whose request was refused because the server goes away finds its successor after about this long.
RETRY_AFTER_S = 5


class OpenRequest:
    """One request under way. `error`: why it was ended before its time, else None."""

    def __init__(self) -> None:
        self.error: TrimtabError | None = None
        self.scope = anyio.CancelScope()

    def end(self, error: TrimtabError) -> None:
        """Cancel the work on the request; it is answered with `error`, a stream by its last event."""
        if self.error is None:
            self.error = error
            self.scope.cancel()


class OpenRequests:
    """All of them. `closing`: no new ones are taken."""

    def __init__(self) -> None:
        self.closing = False
        self._open: set[OpenRequest] = set()
        self._empty = anyio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        self.closing = True

    def check(self) -> None:
        """Raises ShuttingDown once no new requests are taken."""
        if self.closing:
            raise shutting_down()

    @contextmanager
    def entered(self, request: OpenRequest) -> Iterator[None]:
        """Work inside the block is cancelled when the request is ended."""
        if not self._open:
            self._empty = anyio.Event()
        self._open.add(request)
        try:
            with request.scope:
                yield
        finally:
            self._open.discard(request)
            if not self._open:
                self._empty.set()

    async def wait_empty(self) -> None:
        await self._empty.wait()

    def end_all(self) -> None:
        for request in list(self._open):
            request.end(shutting_down())


def shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down", fix="Send the request again, to another server or later.",
                        retry_after_s=RETRY_AFTER_S)


def ended_by(scope: Scope) -> TrimtabError | None:
    """Why the request of this scope was ended before its time."""
    found = scope.get("state", {}).get("open_request")
    return found.error if isinstance(found, OpenRequest) else None

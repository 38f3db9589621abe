"""Around every request: an id, the limit on body bytes, one log line, the request metrics."""

import secrets
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.handlers import answer, report_unexpected
from server.metrics import Metrics
from steering.errors import PayloadTooLarge

log = structlog.get_logger("trimtab.access")

UPLOAD_PREFIX = "/v1/artifacts"
UNMATCHED = "unmatched"


class RequestFrame:
    """Pure ASGI, so that streams pass through untouched."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, max_body_bytes: int, max_upload_bytes: int) -> None:
        self.app = app
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, self._limited(scope, receive), send_with_id)
        except Exception as error:
            failure = report_unexpected(error, request_id)
            if status:
                # The response has begun and cannot become an error any more; the connection is cut.
                raise
            await answer(Request(scope), failure, self.metrics)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", UNMATCHED)
            elapsed_s = time.perf_counter() - started
            self.metrics.answered(route, scope["method"], status, elapsed_s)
            log.info("request", request_id=request_id, method=scope["method"], route=route, status=status,
                     elapsed_ms=round(elapsed_s * 1e3, 1))

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        limit = self.max_upload_bytes if scope["path"].startswith(UPLOAD_PREFIX) else self.max_body_bytes
        declared = Headers(scope=scope).get("content-length", "")
        too_large = declared.isdigit() and int(declared[:20]) > limit
        received_bytes = 0

        async def receive_limited() -> Message:
            nonlocal received_bytes
            if too_large:
                raise _too_large(limit)
            message = await receive()
            if message["type"] == "http.request":
                received_bytes += len(message.get("body", b""))
                if received_bytes > limit:
                    raise _too_large(limit)
            return message

        return receive_limited


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {limit} bytes", param="body",
                           fix="Upload the numbers once to /v1/artifacts and name them.")

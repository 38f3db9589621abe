"""Around every request: an id, the gate, the bounds of its body, its end, one log line, the request metrics."""

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import anyio
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.body import BoundedBody, body_limit
from server.http.gate import HEALTH, READY, Gate
from server.http.handlers import CLIENT_GONE, answer, refusal
from server.http.open_requests import OpenRequest, OpenRequests
from server.identity.keys import Keys
from server.identity.principal import CURRENT
from server.identity.quotas import QUOTA, Asked
from server.identity.recording import actor
from server.observability.metrics import Metrics
from server.observability.tracing import RequestSpan, Tracing
from server.observability.unexpected import report_unexpected
from server.settings import Settings
from steering.language.errors import TrimtabError
from vectors.library.audit.notes import ACTOR
from vectors.library.spaces import READER

log = structlog.get_logger("trimtab.access")

UNMATCHED = "unmatched"
POLLED = ("/metrics", "/v1/jobs")
# Nothing that could end a line of a log or of a head.
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
WHO: tuple[ContextVar[Any], ...] = (CURRENT, ACTOR, READER)
# What the server's own connections offer beyond ASGI: to drop the client at once.
ABORT = "trimtab.abort"


class RequestFrame:
    """Pure ASGI, so that streams pass through untouched."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics, open_requests: OpenRequests,
                 keys: Keys, tracing: Tracing | None = None) -> None:
        self.app = app
        self._tracing = tracing
        self._settings = settings
        self._metrics = metrics
        self._open = open_requests
        self._gate = Gate(settings, keys)
        self._health: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        _without_last_slash(scope)
        request_id = f"req-{secrets.token_hex(12)}"
        started = time.perf_counter()
        limit = body_limit(scope["path"], json_bytes=self._settings.max_body_bytes,
                           upload_bytes=self._settings.max_upload_bytes)
        body = BoundedBody(scope, receive, limit=limit, timeout_s=self._settings.body_timeout_s)
        asked_as = _asked_as(scope)
        mine = OpenRequest()
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, open_request=mine)
        response = _Response(send, body, request_id, asked_as, self._open, state)
        # Every line that is written for this request, by whatever part of the server, has its id.
        with (_as_before(), self._traced(scope, request_id) as span,
              structlog.contextvars.bound_contextvars(request_id=request_id, **_trace_id(span))):
            response.trace = None if span is None else span.header
            try:
                await self._answer(scope, body, response, mine)
            except ClientDisconnect:
                response.status = CLIENT_GONE
            finally:
                self._record(scope, response.status, request_id, asked_as, time.perf_counter() - started, span)

    def _traced(self, scope: Scope, request_id: str) -> AbstractContextManager[RequestSpan | None]:
        """Whoever watches the server asks too often to be worth a trace."""
        if self._tracing is None or scope["path"] in HEALTH or scope["path"].startswith(POLLED):
            return nullcontext()
        return self._tracing.request(scope["method"], Headers(scope=scope), {"trimtab.request_id": request_id})

    async def _answer(self, scope: Scope, body: BoundedBody, response: "_Response", mine: OpenRequest) -> None:
        error: TrimtabError | None = None
        try:
            await self._gate.prepare(scope)
            CURRENT.set(who := self._gate.check(scope))
            ACTOR.set(actor(who, scope, response.request_id))
            READER.set(who.reader)
            if scope["path"] in READY:
                self._open.check()
            if scope["path"] in HEALTH:
                # Never waited for when the server shuts down.
                await self.app(scope, body.receive, response.send)
            else:
                self._open.check()
                with self._open.entered(mine):
                    await self.app(scope, body.receive, response.send)
                error = mine.error
        except ClientDisconnect:
            raise
        except TrimtabError as refused:
            error = refused
        except Exception as unexpected:
            error = report_unexpected(unexpected, response.request_id)
            if response.status and ABORT not in scope.get("extensions", {}):
                raise
        if error is None or response.complete:
            return
        if response.status:
            # The response has begun and cannot become an error any more; the connection is cut.
            scope["extensions"][ABORT]()
        else:
            await answer(Request(scope), error, self._metrics)(scope, body.receive, response.send)

    def _record(self, scope: Scope, status: int, request_id: str, asked_as: str | None, elapsed_s: float,
                span: RequestSpan | None) -> None:
        # As the API describes it, without the forms of its parameters.
        route = getattr(scope.get("route"), "path_format", UNMATCHED)
        self._metrics.answered(route, scope["method"], status, elapsed_s)
        if route in HEALTH:
            # Polled every few seconds: only what changed is worth a line.
            before, self._health[route] = self._health.get(route), status
            if before == status or (before is None and status < 400):
                return
        error = refusal(scope)
        who = CURRENT.get()
        why: dict[str, str] = {} if who.key_id is None else {"key": who.name, "tenant": who.tenant}
        why |= {} if error is None else {"code": error.code, **({"param": error.param} if error.param else {})}
        if span is not None:
            span.ended(scope["method"], route, status, {f"trimtab.{name}": value for name, value in why.items()})
        if asked_as is not None:
            why["client_request_id"] = asked_as
        if error is not None and status >= 500:
            why["message"] = str(error)
        # What is asked again and again, by machines, and went well is no news.
        quiet = status < 400 and route not in HEALTH and scope["method"] == "GET" and route.startswith(POLLED)
        write = log.warning if status >= 500 else log.debug if quiet else log.info
        write("request", request_id=request_id, method=scope["method"], route=route, status=status,
              elapsed_ms=round(elapsed_s * 1e3, 1), **why)


def _trace_id(span: RequestSpan | None) -> dict[str, str]:
    return {} if span is None else {"trace_id": span.trace_id}


@contextmanager
def _as_before() -> Iterator[None]:
    """Who asks is forgotten with the end of the request, also where the server sent it itself."""
    before = [(variable, variable.get()) for variable in WHO]
    try:
        yield
    finally:
        for variable, value in before:
            variable.set(value)


def _without_last_slash(scope: Scope) -> None:
    """`/v1/models/` is `/v1/models`, for the gate and for the routes alike. A slash that was written as `%2F` is a part
    of a name."""
    path, raw = scope["path"], scope.get("raw_path") or scope["path"].encode()
    if len(path) > 1 and path.endswith("/") and raw.endswith(b"/"):
        scope["path"], scope["raw_path"] = path[:-1], raw[:-1]


def _asked_as(scope: Scope) -> str | None:
    """The id that the client gave its request. It is told again and logged, and nothing is found by it, because
    anybody may choose it."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _CLIENT_ID.fullmatch(given) else None


class _Response:
    """`send` of one request. status: 0 until the response has begun; complete: whether all of it was sent."""

    def __init__(self, send: Send, body: BoundedBody, request_id: str, asked_as: str | None,
                 open_requests: OpenRequests, state: dict[str, Any]) -> None:
        self._state = state
        self._send = send
        self._body = body
        self._open = open_requests
        self._whole = False
        self.request_id, self._asked_as = request_id, asked_as
        self.trace: str | None = None
        self.status = 0
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._asked_as or self.request_id
            headers["X-Trimtab-Request"] = self.request_id
            if self.trace is not None:
                headers["traceresponse"] = self.trace
            asked: Asked | None = self._state.get(QUOTA)
            if asked is not None:
                headers.update(asked.headers)
            self._whole = "content-length" in headers
            if self._body.unread or self._open.closing:
                headers["Connection"] = "close"
        last = message["type"] == "http.response.body" and not message.get("more_body")
        if last and self._body.unread and self._whole:
            # The client has its answer with this; the connection ends after what it still sends.
            await self._send({**message, "more_body": True})
            with anyio.CancelScope(shield=True):
                await self._body.discard()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)
        self.complete = self.complete or last

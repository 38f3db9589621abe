"""From exceptions to responses: every error leaves in OpenAI's shape."""

import math

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from server.errors import (
    InvalidJson,
    MethodNotAllowed,
    RouteNotFound,
    Unauthorized,
    anthropic_body,
    error_body,
    status_of,
)
from server.observability.metrics import Metrics
from server.observability.unexpected import report_unexpected
from steering.language.errors import InvalidRequest, TrimtabError

log = structlog.get_logger("trimtab.server")
# Of nginx: the client closed the connection. Nobody reads it; logs and metrics do.
CLIENT_GONE = 499
_REFUSAL = "refusal"
# Who asks here reads errors as Anthropic writes them.
MESSAGES = "/v1/messages"


def add_handlers(app: FastAPI, metrics: Metrics) -> None:
    async def on_typed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, TrimtabError)
        return answer(request, error, metrics)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = answer(request, _typed(request, error), metrics)
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(TrimtabError, on_typed)
    app.add_exception_handler(HTTPException, on_http)


def answer(request: Request, error: TrimtabError, metrics: Metrics) -> JSONResponse:
    """The response of an error."""
    note(request, error, metrics)
    headers = {"WWW-Authenticate": error.scheme} if isinstance(error, Unauthorized) else {}
    status = status_of(error)
    if status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    body = anthropic_body(error) if request.scope["path"].startswith(MESSAGES) else error_body(error)
    return JSONResponse(body, status, headers)


def note(request: Request, error: TrimtabError, metrics: Metrics) -> None:
    """Count an error that the client is told, and keep it for the request's line in the log."""
    metrics.refused(error.code)
    request.scope.setdefault("state", {})[_REFUSAL] = error


def refusal(scope: Scope) -> TrimtabError | None:
    """The error that the request was answered with."""
    found = scope.get("state", {}).get(_REFUSAL)
    return found if isinstance(found, TrimtabError) else None


def _typed(request: Request, error: HTTPException) -> TrimtabError:
    if error.status_code == 404:
        return RouteNotFound(f"there is no {request.method} {request.url.path[:200]}", param="path",
                             fix="See /openapi.json for what there is.")
    if error.status_code == 405:
        return MethodNotAllowed(f"{request.method[:20]} is not offered by {request.url.path[:200]}", param="method")
    if error.status_code == 400:
        return InvalidJson("the body cannot be read", param="body")
    if error.status_code < 500:
        return InvalidRequest(str(error.detail)[:200], param="body")
    return report_unexpected(error, request.state.request_id)

"""Errors that only the HTTP side knows, and how every error looks on the wire."""

from typing import Any, ClassVar

from steering.language.errors import InvalidRequest, NotFound, TrimtabError


class InvalidJson(InvalidRequest):
    """A body that is not the JSON it says it is."""

    code: ClassVar[str] = "invalid_json"


class UnsupportedParameter(InvalidRequest):
    """A parameter of OpenAI's API that this server does not offer. It is refused, never ignored."""

    code: ClassVar[str] = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    code: ClassVar[str] = "context_length_exceeded"


class ModelNotFound(NotFound):
    code: ClassVar[str] = "model_not_found"


class RouteNotFound(NotFound):
    code: ClassVar[str] = "route_not_found"


class MethodNotAllowed(InvalidRequest):
    status, code = 405, "method_not_allowed"


class UnsupportedMediaType(InvalidRequest):
    status, code = 415, "unsupported_media_type"


class Unauthorized(InvalidRequest):
    """scheme: how the key is wanted, for the header WWW-Authenticate."""

    status, code, type = 401, "invalid_api_key", "authentication_error"

    def __init__(self, message: str, *, scheme: str = "Bearer", param: str | None = None, fix: str | None = None
                 ) -> None:
        super().__init__(message, param=param, fix=fix)
        self.scheme = scheme


class ForbiddenHost(InvalidRequest):
    """A server without a key was asked under a name not its own, as by a page that rebinds its name to this machine."""

    status, code = 403, "forbidden_host"


class ForbiddenOrigin(InvalidRequest):
    """A server without a key was asked by a web page of another site."""

    status, code = 403, "forbidden_origin"


class BodyTimeout(InvalidRequest):
    """The client sent its request too slowly."""

    status, code = 408, "body_timeout"


class ClientTooSlow(InvalidRequest):
    """The client reads its answer too slowly for the server to keep what it leaves unread."""

    status, code = 408, "client_too_slow"


class HeadersTooLarge(InvalidRequest):
    status, code = 431, "headers_too_large"


class InvalidHttp(InvalidRequest):
    """What a client sent is no request that can be read."""

    code: ClassVar[str] = "invalid_http"


class TooManyConnections(TrimtabError):
    status, code = 503, "too_many_connections"


class DefaultSpecUnusable(TrimtabError):
    """The server's default spec cannot be applied: requests are refused rather than served unsteered."""

    status, code = 503, "default_spec_unusable"


class RehearsalFailed(InvalidRequest):
    """A spec that was to be stored was tried on the engine, and the engine did not get through."""

    status, code = 409, "rehearsal_failed"


class ShuttingDown(TrimtabError):
    """The server stops: it takes no new requests and ends those that take too long."""

    status, code = 503, "shutting_down"


class Overloaded(TrimtabError):
    """Too much waits in front of the engine already; nothing of the request was begun."""

    status, code = 503, "overloaded"


class RequestTimeout(TrimtabError):
    """The request took longer than it may; what it began has ended."""

    status, code = 504, "request_timeout"


class InternalError(TrimtabError):
    """Something that should not happen did. The log has the details, under the request's id."""


class TooManyJobs(TrimtabError):
    status, code = 503, "too_many_jobs"


def error_body(error: TrimtabError) -> dict[str, Any]:
    """OpenAI's shape."""
    message = f"{error.message.rstrip('.')}. {error.fix}" if error.fix else error.message
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}

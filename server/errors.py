"""Errors that only the HTTP side knows, and what every error becomes over HTTP."""

from collections.abc import Mapping
from typing import Any, ClassVar

from steering.language.errors import InvalidRequest, NotFound, Path, TrimtabError


class InvalidSettings(TrimtabError):
    """A setting that the server cannot or must not start with."""

    code: ClassVar[str] = "invalid_settings"


class SettingsRefused(TrimtabError):
    """Settings that were to be taken over while the server runs, and are not valid."""

    code: ClassVar[str] = "settings_refused"


class InvalidJson(InvalidRequest):
    """A body that is not the JSON it says it is."""

    code: ClassVar[str] = "invalid_json"


class UnsupportedParameter(InvalidRequest):
    """A parameter of OpenAI's API that this server does not offer. It is refused, never ignored."""

    code: ClassVar[str] = "unsupported_parameter"


class EmbeddingsUnsupported(InvalidRequest):
    """A model that writes text was asked for embeddings."""

    code: ClassVar[str] = "embeddings_unsupported"


class ContextLengthExceeded(InvalidRequest):
    """Begins with the words by which programs of OpenAI's API know this error, whatever its code."""

    code: ClassVar[str] = "context_length_exceeded"

    def __init__(self, context: int, message: str, *, param: str | Path | None = None, fix: str | None = None) -> None:
        """context: tokens that prompt and completion may have together."""
        super().__init__(f"This model's maximum context length is {context} tokens, and {message}", param=param,
                         fix=fix)


class InvalidAdapter(InvalidRequest):
    """An adapter whose files cannot be read, or that changes what this server does not change."""

    code: ClassVar[str] = "invalid_adapter"


class ModelNotFound(NotFound):
    code: ClassVar[str] = "model_not_found"


class RouteNotFound(NotFound):
    code: ClassVar[str] = "route_not_found"


class MethodNotAllowed(InvalidRequest):
    code = "method_not_allowed"


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"


class Unauthorized(InvalidRequest):
    """scheme: how the key is wanted, for the header WWW-Authenticate."""

    code = "invalid_api_key"

    def __init__(self, message: str, *, scheme: str = "Bearer", param: str | Path | None = None,
                 fix: str | None = None) -> None:
        super().__init__(message, param=param, fix=fix)
        self.scheme = scheme


class NotPermitted(InvalidRequest):
    """The key is valid and lacks the role that the request needs."""

    code = "not_permitted"


class PolicyViolation(InvalidRequest):
    """A policy of the key or its tenant has a rule against what the request asks for."""

    code = "policy_violation"


class ForbiddenHost(InvalidRequest):
    """A server without a key was asked under a name not its own, as by a page that rebinds its name to this machine."""

    code = "forbidden_host"


class ForbiddenOrigin(InvalidRequest):
    """A server without a key was asked by a web page of another site."""

    code = "forbidden_origin"


class BodyTimeout(InvalidRequest):
    """The client sent its request too slowly."""

    code = "body_timeout"


class ResponseCancelled(InvalidRequest):
    """A response was ended by a request to cancel it."""

    code = "response_cancelled"


class ClientTooSlow(InvalidRequest):
    """The client reads its answer too slowly for the server to keep what it leaves unread."""

    code = "client_too_slow"


class HeadersTooLarge(InvalidRequest):
    code = "headers_too_large"


class InvalidHttp(InvalidRequest):
    """What a client sent is no request that can be read."""

    code: ClassVar[str] = "invalid_http"


class TooManyConnections(TrimtabError):
    code = "too_many_connections"


class NotSteered(InvalidRequest):
    """A request, or the server's settings, ask for steering, and nothing would be applied."""

    code = "not_steered"


class SteeringDisabled(TrimtabError):
    """A request asks for steering without exception, and the kill switch holds all of it back."""

    code = "steering_disabled"


class DefaultSpecUnusable(TrimtabError):
    """The server's default spec cannot be applied: requests are refused rather than served unsteered."""

    code = "default_spec_unusable"


class RehearsalFailed(InvalidRequest):
    """A spec that was to be stored was tried on the engine, and the engine did not get through."""

    code = "rehearsal_failed"


class ShuttingDown(TrimtabError):
    """The server stops: it takes no new requests and ends those that take too long."""

    code = "shutting_down"


class Overloaded(TrimtabError):
    """Too much waits in front of the engine already; nothing of the request was begun."""

    code = "overloaded"


class RateLimited(TrimtabError):
    """A quota of the key or its tenant is used up for the moment."""

    code: ClassVar[str] = "rate_limit_exceeded"


class QuotaExceeded(RateLimited):
    """A quota of the key or its tenant is used up for the day or the month."""

    code: ClassVar[str] = "quota_exceeded"


class RequestTimeout(TrimtabError):
    """The request took longer than it may; what it began has ended."""

    code = "request_timeout"


class InternalError(TrimtabError):
    """Something that should not happen did. The log has the details, under the request's id."""


class TooManyJobs(TrimtabError):
    code = "too_many_jobs"


class FilesFull(InvalidRequest):
    """An upload is over the limit on the bytes of files."""

    code: ClassVar[str] = "files_full"


# The status with which each code leaves. Steering and the library know causes, and nothing of HTTP.
_CODES: Mapping[int, str] = {
    400: "answer_in_prompt calibration_failed constant_activations context_length_exceeded "
         "embeddings_unsupported empty_text fit_failed "
         "grader_unusable invalid_adapter invalid_extraction_data invalid_http invalid_json invalid_metadata "
         "invalid_payload "
         "invalid_request invalid_spec layer_out_of_range leaking_split no_contrast not_steered one_class "
         "steering_limit steering_overflow text_too_long too_few_examples too_few_pairs unsupported_model "
         "unsupported_parameter unsupported_site wrong_convention",
    401: "invalid_api_key",
    403: "forbidden_host forbidden_origin foreign_name not_permitted policy_violation",
    404: "model_not_found not_found route_not_found",
    405: "method_not_allowed",
    408: "body_timeout client_too_slow",
    409: "artifact_mismatch calibration_cancelled conflict evaluation_required "
         "extraction_cancelled files_full library_full not_calibrated "
         "rehearsal_failed response_cancelled settings_refused",
    413: "payload_too_large program_too_large",
    415: "unsupported_media_type",
    429: "quota_exceeded rate_limit_exceeded",
    431: "headers_too_large",
    500: "cannot_start corrupt_blob engine_failed internal_error invalid_settings model_overflow",
    501: "extra_missing",
    502: "judge_failed",
    503: "default_spec_unusable effects_unavailable engine_unavailable history_unavailable library_unavailable "
         "model_unavailable overloaded program_lost shutting_down slots_exhausted steering_disabled "
         "storage_unavailable too_many_connections too_many_jobs",
    504: "request_timeout",
    507: "storage_full",
}
STATUS: Mapping[str, int] = {code: status for status, codes in _CODES.items() for code in codes.split()}


def status_of(error: TrimtabError) -> int:
    """The HTTP status of an error: that of its code, or of the nearest kind above it that has one."""
    return next(STATUS[kind.code] for kind in type(error).__mro__
                if issubclass(kind, TrimtabError) and kind.code in STATUS)


def error_body(error: TrimtabError) -> dict[str, Any]:
    """OpenAI's shape."""
    message = f"{error.message.rstrip('.')}. {error.fix}" if error.fix else error.message
    return {"error": {"message": message, "type": _type(error), "param": error.param, "code": error.code}}


_ANTHROPIC: Mapping[int, str] = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                                 404: "not_found_error", 413: "request_too_large",
                                 429: "rate_limit_error", 503: "overloaded_error",
                                 504: "timeout_error"}


def anthropic_body(error: TrimtabError) -> dict[str, Any]:
    """Anthropic's shape, with the field and the code of OpenAI's beside it."""
    status = status_of(error)
    kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**error_body(error)["error"], "type": kind}}


def _type(error: TrimtabError) -> str:
    if isinstance(error, Unauthorized):
        return "authentication_error"
    if isinstance(error, RateLimited):
        return "rate_limit_error"
    return "invalid_request_error" if isinstance(error, InvalidRequest) else "server_error"

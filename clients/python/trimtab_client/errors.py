"""What can go wrong, as types. Every refusal of the server carries its stable `code` and the field it is about.

TrimtabError
    ConnectionFailed      no answer, or none that a Trimtab server gives
    JobFailed             a job ended without a result
    ServerRefused         any refusal; `code`, `param`, `status`
        BadRequest        400, 405, 413, 415, 422
        Unauthorized      401, 403
        NotFound          404
        Conflict          409
        Overloaded        429, 503: worth trying again
        ServerFailed      any other 5xx
"""

from typing import Any


class TrimtabError(Exception):
    """Base of all errors of this package."""


class ConnectionFailed(TrimtabError):
    """The server did not answer, or what answered is not a Trimtab server."""


class JobFailed(TrimtabError):
    """A job failed or was cancelled. code, param: of the refusal, where there is one."""

    def __init__(self, message: str, *, job_id: str, code: str | None, param: str | None) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.code = code
        self.param = param


class ServerRefused(TrimtabError):
    """code: stable, to switch on. param: the field that is wrong, where one is. request_id: for the server's log."""

    def __init__(self, message: str, *, status: int, code: str, param: str | None, request_id: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id


class BadRequest(ServerRefused):
    pass


class Unauthorized(ServerRefused):
    pass


class NotFound(ServerRefused):
    pass


class Conflict(ServerRefused):
    pass


class Overloaded(ServerRefused):
    pass


class ServerFailed(ServerRefused):
    pass


_BY_STATUS: dict[int, type[ServerRefused]] = {
    401: Unauthorized, 403: Unauthorized, 404: NotFound, 409: Conflict, 429: Overloaded, 503: Overloaded}


def refusal(status: int, body: Any, request_id: str | None) -> TrimtabError:
    """The exception for an answer of status 400 or above. body: its JSON, or None if it is none."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("code"), str):
        return ConnectionFailed(f"status {status} in a form that a Trimtab server does not use")
    kind = _BY_STATUS.get(status, ServerFailed if status >= 500 else BadRequest)
    return kind(str(error.get("message")), status=status, code=error["code"], param=error.get("param"),
                request_id=request_id)

"""Tells a mistake in a request from a failure of the engine.

Where vLLM refuses what a request asks for, the client gets a 400. All other failures are the engine's own.
"""

from collections.abc import Iterator
from dataclasses import fields
from http import HTTPStatus

from server.engines.data import Sampling
from steering.language.errors import EngineUnavailable, InvalidRequest, TrimtabError

RESTARTING = "It is being restarted; try again in a while."
# vLLM's names of fields that requests have too; its other parameters no request can name.
FIELDS = frozenset(field.name for field in fields(Sampling))


def refusal(error: BaseException, *, begun: bool) -> TrimtabError | None:
    """The typed error of a failure that the request caused, None where the engine is to blame.

    Args:
        begun: outputs of the request had come before. What is wrong with a request shows before that, so a bare
            ValueError that comes later is a fault of the engine.
    """
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    for cause in _causes(error):
        if isinstance(cause, TrimtabError):
            return cause
        if isinstance(cause, VLLMClientError):
            parameter = getattr(cause, "parameter", None)
            return InvalidRequest(_said(cause), param=parameter if parameter in FIELDS else None)
        if isinstance(cause, GracefulHTTPError) and cause.http_status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return InvalidRequest(_said(cause))
        if isinstance(cause, GracefulHTTPError):
            return EngineUnavailable(f"vLLM takes no more requests: {_said(cause)}", retry_after_s=1)
        if isinstance(cause, ValueError) and not begun:
            return InvalidRequest(_said(cause))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: vLLM wraps what went wrong while a request was taken in."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _said(error: BaseException) -> str:
    """The message alone: vLLM's errors add parameter and value to their text, and a value may be long."""
    return str(error.args[0]) if error.args else str(error) or type(error).__name__

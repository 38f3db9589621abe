"""Exceptions that nobody expected: the log has all of them, the caller the id of the request."""

import structlog

from server.errors import InternalError
from steering.language.errors import TrimtabError
from vectors.storage_errors import FAILING, FULL, storage_error

log = structlog.get_logger("trimtab.server")


def report_unexpected(error: BaseException, request_id: str) -> TrimtabError:
    """Log an unexpected exception; the error to show carries nothing of it. Disks that are full or fail are told as
    such, wherever that was noticed."""
    if isinstance(error, OSError) and error.errno in FULL | FAILING:
        log.error("disk failed", request_id=request_id, error=str(error)[:300])
        return storage_error(error, "the server cannot use its disk")
    log.error("unexpected error", request_id=request_id, exc_info=error)
    return InternalError(f"the server failed on this request; its id is {request_id}")

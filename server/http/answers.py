"""Answers as JSON. A number that JSON does not have becomes null and a log line; it never fails the request."""

import json
from typing import Any

import structlog
from fastapi.responses import JSONResponse

from steering.language.errors import path_text
from steering.language.finite import finite, not_finite

log = structlog.get_logger("trimtab.server")


class JsonAnswer(JSONResponse):
    def render(self, content: Any) -> bytes:
        try:
            return super().render(content)
        except ValueError:
            paths = [path_text(path) for path in not_finite(content)]
            if not paths:
                raise
            log.error("answer_not_finite", fields=paths[:10])
            return json.dumps(finite(content), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()

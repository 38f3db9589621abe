"""Log lines: structured, to standard error, never with prompts or keys in them; docs/operations.md lists their fields.
"""

import logging
import sys
from contextlib import suppress
from typing import Literal, TextIO, cast

import structlog


class _Unfailing:
    """Standard error, for log lines: where one cannot be written (a full disk behind it, a closed pipe), the line is
    lost and what it tells of goes on."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()


def configure_logging(form: Literal["json", "console"]) -> None:
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if form == "json"
        else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback))
    # Tracebacks are plain: those with local variables would write prompts and keys into the log.
    exceptions = [structlog.processors.format_exc_info] if form == "json" else []
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level,
                    structlog.processors.TimeStamper(fmt="iso"), *exceptions, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Unfailing())))
    _take_in_libraries([structlog.contextvars.merge_contextvars, structlog.stdlib.add_logger_name,
                        structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso"), *exceptions],
                       renderer)


class _Lines(logging.Handler):
    """Writes to standard error as it is now."""

    def emit(self, record: logging.LogRecord) -> None:
        _Unfailing().write(f"{self.format(record)}\n")


def _take_in_libraries(before: list[structlog.typing.Processor], renderer: structlog.typing.Processor) -> None:
    """What libraries log and no handler of their own takes: from warnings on, as lines of the same form."""
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _Lines)]
    lines = _Lines(logging.WARNING)
    lines.setFormatter(structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=before, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]))
    root.addHandler(lines)
    # Clients that speak no HTTP are counted, not logged.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

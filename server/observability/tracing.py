"""Traces by OpenTelemetry, an optional extra: a request from its head over the queue and the engine to its measurement.

Without the setting nothing of OpenTelemetry is imported, and each call here returns at once. With it, spans go into a
queue that is bounded, and from there to a receiver in a thread of their own: one that is slow or away costs spans, not
requests. Names and attributes follow the conventions for generative models. No text of a request is in any.
"""

import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import structlog

from server.errors import InvalidSettings
from server.threads import in_thread

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

log = structlog.get_logger("trimtab.tracing")
EXPORT_S, STOP_S = 5, 5.0
MOST_EXPORTED = 512
EVALUATION = "gen_ai.evaluation.result"
Attributes = Mapping[str, str | bool | int | float | Sequence[str]]
Event = tuple[str, Attributes]

_CURRENT: "ContextVar[Tracing | None]" = ContextVar("tracing", default=None)


class RequestSpan:
    """The span of one request. header: its place in the trace, as W3C's `traceparent` is written."""

    def __init__(self, span: "Span") -> None:
        self._span = span
        at = span.get_span_context()
        self.trace_id = format(at.trace_id, "032x")
        self.header = f"00-{self.trace_id}-{at.span_id:016x}-{int(at.trace_flags):02x}"

    def ended(self, method: str, route: str, status: int, attributes: Attributes) -> None:
        """`attributes`: of who asked, and of the error where there was one."""
        from opentelemetry.trace import Status, StatusCode

        self._span.update_name(f"{method} {route}")
        self._span.set_attributes({"http.route": route, "http.response.status_code": status, **attributes})
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))


class Tracing:
    """
    Args:
        processor: takes spans that have ended; must not block.
        sample: share of requests that are traced where the caller does not say; a caller's own decision holds.
    """

    def __init__(self, processor: "SpanProcessor", sample: float = 1.0) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample)), shutdown_on_exit=False,
            resource=Resource.create({"service.name": "trimtab", "service.version": version("trimtab"),
                                      "service.instance.id": secrets.token_hex(8)}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("trimtab")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str], attributes: Attributes) -> Iterator[RequestSpan]:
        """Around a request; what is recorded within, and in tasks that begin within, belongs to it."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        # From an empty context, because one request must not be a part of another.
        parent = self._propagator.extract(headers, Context())
        with self._tracer.start_as_current_span(method, parent, SpanKind.SERVER, record_exception=False,
                                                attributes={"http.request.method": method, **attributes}) as span:
            before = _CURRENT.set(self)
            try:
                yield RequestSpan(span)
            finally:
                _CURRENT.reset(before)

    def record(self, name: str, began: int, ended: int, attributes: Attributes, events: Sequence[Event]) -> None:
        span = self._tracer.start_span(name, start_time=began, attributes=attributes)
        for event, told in events:
            span.add_event(event, told, ended)
        span.end(ended)

    async def stop(self) -> None:
        """Send what waits. A receiver that is away is not waited for."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        await in_thread(sending.join, STOP_S)


def open_tracing(endpoint: str | None, sample: float, queue: int) -> Tracing | None:
    """
    Args:
        endpoint: of a receiver of OTLP over HTTP; None for no tracing.
        queue: spans that may wait to be sent; more are dropped.

    Raises:
        InvalidSettings: the extra is not installed.
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidSettings("traces need OpenTelemetry, which is not installed", param="trace_endpoint",
                              fix="Install it: pip install 'trimtab[otel]'.") from error
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_S)
    return Tracing(BatchSpanProcessor(exporter, max_queue_size=queue, schedule_delay_millis=1000,
                                      max_export_batch_size=min(MOST_EXPORTED, queue),
                                      export_timeout_millis=EXPORT_S * 1000), sample)


def traced() -> bool:
    """Whether what is recorded now is kept; where that takes work, it need not be done otherwise."""
    return _CURRENT.get() is not None


def record(name: str, began: int, ended: int | None = None, *, attributes: Attributes | None = None,
           events: Sequence[Event] = ()) -> None:
    """A part of the request in which this is called, if that is traced. It never fails.

    Args:
        began, ended: nanoseconds since 1970; ended None for now.
    """
    tracing = _CURRENT.get()
    if tracing is None:
        return
    try:
        tracing.record(name, began, ended or time.time_ns(), attributes or {}, events)
    except Exception as error:  # a trace must not fail what it tells of
        log.warning("trace_failed", span=name, error=f"{type(error).__name__}: {error}"[:300])


def evaluation(name: str, *, value: float | None = None, label: str | None = None, **more: str) -> Event:
    """What was found out about an answer, as the conventions tell it."""
    told: dict[str, Any] = {"gen_ai.evaluation.name": name, **{f"trimtab.{key}": text for key, text in more.items()}}
    if value is not None:
        told["gen_ai.evaluation.score.value"] = value
    if label is not None:
        told["gen_ai.evaluation.score.label"] = label
    return EVALUATION, told

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
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import structlog

from server.errors import InvalidSettings
from server.threads import in_thread

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import SpanContext

log = structlog.get_logger("trimtab.tracing")
EXPORT_S, STOP_S = 5, 5.0
MOST_EXPORTED = 512
EVALUATION = "gen_ai.evaluation.result"
Attributes = Mapping[str, str | bool | int | float | Sequence[str]]
Event = tuple[str, Attributes]

# The request that is answered in this context, where it is traced.
_CURRENT: "ContextVar[RequestSpan | None]" = ContextVar("request_span", default=None)


class RequestSpan:
    """The span of one request. header: its place in the trace, as W3C's `traceparent` is written."""

    def __init__(self, tracing: "Tracing", at: "SpanContext", parent: "SpanContext | None", name: str,
                 attributes: dict[str, Any]) -> None:
        self.tracing, self.at, self._parent = tracing, at, parent
        self._name, self._attributes, self._began, self._failed = name, attributes, time.time_ns(), False
        self.trace_id = format(at.trace_id, "032x")
        self.header = f"00-{self.trace_id}-{at.span_id:016x}-{int(at.trace_flags):02x}"

    def ended(self, method: str, route: str, status: int, attributes: Attributes) -> None:
        """`attributes`: of who asked, and of the error where there was one."""
        self._name, self._failed = f"{method} {route}", status >= 500
        self._attributes |= {"http.route": route, "http.response.status_code": status, **attributes}

    def finish(self) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        self.tracing.finished(
            name=self._name, context=self.at, parent=self._parent, attributes=self._attributes, kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR if self._failed else StatusCode.UNSET), start_time=self._began,
            end_time=time.time_ns())


class Tracing:
    """Spans are made when they have ended, in one piece. A span of the SDK that is begun, told of and ended takes five
    times as long, and a request that is not sampled has none at all.

    Args:
        processor: takes spans that have ended; must not block.
        sample: share of requests that are traced where the caller does not say; a caller's own decision holds.
    """

    def __init__(self, processor: "SpanProcessor", sample: float = 1.0) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import Event, ReadableSpan
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, TraceFlags
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        class Ours(Resource):
            # The exporter asks for it at each span, and the SDK's makes a JSON text of the whole each time.
            __hash__ = object.__hash__

        self._processor, self._sampler = processor, ParentBased(TraceIdRatioBased(sample))
        made = Resource.create({"service.name": "trimtab", "service.version": version("trimtab"),
                                "service.instance.id": secrets.token_hex(8)})
        resource = Ours(dict(made.attributes), made.schema_url)
        self._span = partial(ReadableSpan, resource=resource, instrumentation_scope=InstrumentationScope("trimtab"))
        self._event, self._ids, self._context, self._flags = Event, RandomIdGenerator(), SpanContext, TraceFlags
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, method: str, headers: Mapping[str, str], attributes: Attributes) -> Iterator[RequestSpan]:
        """Around a request; what is recorded within, and in tasks that begin within, belongs to it."""
        span = self._begun(method, headers, {"http.request.method": method, **attributes})
        if not span.at.trace_flags.sampled:
            yield span
            return
        before = _CURRENT.set(span)
        try:
            yield span
        finally:
            _CURRENT.reset(before)
            try:
                span.finish()
            except Exception as error:  # a trace must not fail what it tells of
                log.warning("trace_failed", span=method, error=f"{type(error).__name__}: {error}"[:300])

    def _begun(self, method: str, headers: Mapping[str, str], attributes: dict[str, Any]) -> RequestSpan:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, get_current_span

        # From an empty context, because one request must not be a part of another.
        context, parent = Context(), None
        if "traceparent" in headers:
            context = self._propagator.extract(headers, context)
            found = get_current_span(context).get_span_context()
            parent = found if found.is_valid else None
        trace_id = self._ids.generate_trace_id() if parent is None else parent.trace_id
        decided = self._sampler.should_sample(context, trace_id, method, SpanKind.SERVER, attributes)
        flags = self._flags(self._flags.SAMPLED if decided.decision.is_sampled() else self._flags.DEFAULT)
        at = self._context(trace_id, self._ids.generate_span_id(), False, flags, decided.trace_state)
        return RequestSpan(self, at, parent, method, attributes)

    def record(self, within: RequestSpan, name: str, began: int, ended: int, attributes: Attributes,
               events: Sequence[Event]) -> None:
        at = within.at
        self.finished(
            name=name, parent=at, attributes=attributes, start_time=began, end_time=ended,
            context=self._context(at.trace_id, self._ids.generate_span_id(), False, at.trace_flags, at.trace_state),
            events=[self._event(event, told, ended) for event, told in events])

    def finished(self, **told: Any) -> None:
        """Hand over a span, of what `ReadableSpan` takes."""
        self._processor.on_end(self._span(**told))

    async def stop(self) -> None:
        """Send what waits. A receiver that is away is not waited for."""
        sending = threading.Thread(target=self._processor.shutdown, daemon=True)
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
    within = _CURRENT.get()
    if within is None:
        return
    try:
        within.tracing.record(within, name, began, ended or time.time_ns(), attributes or {}, events)
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

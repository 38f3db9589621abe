"""Traces by OpenTelemetry, an optional extra: a request from its head over the queue and the engine to its measurement.

Without the setting nothing of OpenTelemetry is imported, and each call here returns at once. With it, spans go into a
queue that is bounded, and from there to a receiver in a thread of their own: one that is slow or away costs spans, not
requests. Names and attributes follow the conventions for generative models. No text of a request is in any.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from server.threads import in_thread

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import SpanContext

log = structlog.get_logger("trimtab.tracing")
STOP_S = 5.0
# Of one request, while it runs.
MOST_PARTS = 1024
EVALUATION = "gen_ai.evaluation.result"
Attributes = Mapping[str, str | bool | int | float | Sequence[str]]
Event = tuple[str, Attributes]

# The request that is answered in this context, where it is traced.
_CURRENT: "ContextVar[RequestSpan | None]" = ContextVar("request_span", default=None)


@dataclass(frozen=True, slots=True)
class Part:
    """A span below that of its request. began, ended: nanoseconds since 1970."""

    name: str
    began: int
    ended: int
    attributes: Attributes
    events: Sequence[Event]


class RequestSpan:
    """The span of one request, with its parts. header: its place in the trace, as W3C's `traceparent` is written."""

    def __init__(self, tracing: "Tracing", at: "SpanContext", parent: "SpanContext | None", name: str,
                 attributes: dict[str, Any]) -> None:
        self._tracing, self.at, self.parent = tracing, at, parent
        self.name, self.attributes, self.began, self.failed = name, attributes, time.time_ns(), False
        self.parts: list[Part] = []
        self.ended_at = 0
        self.trace_id = format(at.trace_id, "032x")
        self.header = f"00-{self.trace_id}-{at.span_id:016x}-{int(at.trace_flags):02x}"

    def ended(self, method: str, route: str, status: int, attributes: Attributes) -> None:
        """`attributes`: of who asked, and of the error where there was one."""
        self.name, self.failed = f"{method} {route}", status >= 500
        self.attributes |= {"http.route": route, "http.response.status_code": status, **attributes}

    def add(self, part: Part) -> None:
        """Also when the request has ended."""
        if self.ended_at:
            self._tracing.hand_over(Finished(self, [part], whole=False))
        elif len(self.parts) < MOST_PARTS:
            self.parts.append(part)

    def finish(self) -> None:
        self.ended_at = time.time_ns()
        self._tracing.hand_over(Finished(self, self.parts, whole=True))


class Finished:
    """What waits to be sent: a request with its parts, or parts that came after its end.

    It goes through OpenTelemetry's queue in the place of a span, and `Unfolding` makes spans of it, many at a time in
    the thread that sends them. To make five spans and to queue each, while a request is answered, costs three times as
    much.
    """

    def __init__(self, request: RequestSpan, parts: Sequence[Part], *, whole: bool) -> None:
        self.request, self.parts, self.whole, self.context = request, parts, whole, request.at


class Tracing:
    """
    Args:
        processor: takes what is finished; must not block.
        sample: share of requests that are traced where the caller does not say; a caller's own decision holds.
    """

    def __init__(self, processor: "SpanProcessor", sample: float = 1.0) -> None:
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
        from opentelemetry.trace import SpanContext, TraceFlags
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._processor: Any = processor
        self._below, self._of = TraceIdRatioBased(sample).bound, TraceIdRatioBased.TRACE_ID_LIMIT
        self._ids, self._context = RandomIdGenerator(), SpanContext
        self._flags = (TraceFlags(TraceFlags.DEFAULT), TraceFlags(TraceFlags.SAMPLED))
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
        parent = self._parent(headers) if "traceparent" in headers else None
        if parent is None:
            trace_id = self._ids.generate_trace_id()
            flags, state = self._flags[trace_id & self._of < self._below], None
        else:
            trace_id, flags, state = parent.trace_id, self._flags[parent.trace_flags.sampled], parent.trace_state
        at = self._context(trace_id, self._ids.generate_span_id(), False, flags, state)
        return RequestSpan(self, at, parent, method, attributes)

    def _parent(self, headers: Mapping[str, str]) -> "SpanContext | None":
        from opentelemetry.context import Context
        from opentelemetry.trace import get_current_span

        # Into an empty context, because one request must not be a part of another.
        found = get_current_span(self._propagator.extract(headers, Context())).get_span_context()
        return found if found.is_valid else None

    def hand_over(self, finished: Finished) -> None:
        self._processor.on_end(finished)

    async def stop(self) -> None:
        """Send what waits. A receiver that is away is not waited for."""
        sending = threading.Thread(target=self._processor.shutdown, daemon=True)
        sending.start()
        await in_thread(sending.join, STOP_S)


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
        within.add(Part(name, began, ended or time.time_ns(), attributes or {}, events))
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

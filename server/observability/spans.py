"""Spans of requests that have ended, made where they are sent. Imported only where OpenTelemetry is installed."""

import secrets
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

from server.observability.tracing import Finished


class Ours(Resource):
    # The exporter asks for it at each span, and the SDK's makes a JSON text of the whole each time.
    __hash__ = object.__hash__


class Unfolding:
    """An exporter of what is finished, in front of one of spans."""

    def __init__(self, exporter: SpanExporter) -> None:
        made = Resource.create({"service.name": "trimtab", "service.version": version("trimtab"),
                                "service.instance.id": secrets.token_hex(8)})
        resource = Ours(dict(made.attributes), made.schema_url)
        self._span = partial(ReadableSpan, resource=resource, instrumentation_scope=InstrumentationScope("trimtab"))
        self._exporter, self._ids = exporter, RandomIdGenerator()

    def export(self, finished: Sequence[Finished]) -> SpanExportResult:
        return self._exporter.export([span for one in finished for span in self._spans(one)])

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def _spans(self, finished: Finished) -> Iterator[ReadableSpan]:
        request, at = finished.request, finished.request.at
        for part in finished.parts:
            yield self._span(
                name=part.name, parent=at, attributes=part.attributes, start_time=part.began, end_time=part.ended,
                context=SpanContext(at.trace_id, self._ids.generate_span_id(), False, at.trace_flags, at.trace_state),
                events=[Event(name, told, part.ended) for name, told in part.events])
        if finished.whole:
            yield self._span(
                name=request.name, context=at, parent=request.parent, attributes=request.attributes,
                kind=SpanKind.SERVER, start_time=request.began, end_time=request.ended_at,
                status=Status(StatusCode.ERROR if request.failed else StatusCode.UNSET))

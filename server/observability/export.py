"""Where traces go: a queue that is bounded, and a thread that sends to a receiver of OpenTelemetry's protocol."""

from typing import Any

from server.errors import InvalidSettings
from server.observability.tracing import Tracing

EXPORT_S = 5
# Requests at a time.
MOST_EXPORTED = 128


def open_tracing(endpoint: str | None, sample: float, queue: int) -> Tracing | None:
    """
    Args:
        endpoint: of a receiver of OTLP over HTTP; None for no tracing.
        queue: requests whose spans may wait to be sent; more are dropped.

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
    from server.observability.spans import Unfolding

    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_S)
    unfolding: Any = Unfolding(exporter)
    return Tracing(BatchSpanProcessor(unfolding, max_queue_size=queue, schedule_delay_millis=1000,
                                      max_export_batch_size=min(MOST_EXPORTED, queue),
                                      export_timeout_millis=EXPORT_S * 1000), sample)

"""Extractions as jobs: run in a thread, stored when done."""

from collections.abc import Callable
from typing import Any

from server.jobs import Cancelled, Control
from server.state import ServerState
from server.threads import in_thread
from vectors.extract import Extraction
from vectors.extract.errors import ExtractionCancelled


async def extract_and_store(state: ServerState, control: Control, extract: Callable[[], Extraction]) -> dict[str, Any]:
    """The job's result: the artifact's reference and the report. A cancelled job stores nothing."""

    def work() -> dict[str, Any]:
        found = extract()
        if control.cancelled():
            raise Cancelled
        artifact = state.library.create(found.metadata, found.payload)
        return {"artifact": artifact.ref, "report": dict(found.report)}

    try:
        return await in_thread(work)
    except ExtractionCancelled:
        raise Cancelled from None

"""What nobody asks for and the disk needs: leftovers of deleted versions and of crashes are removed on a schedule."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import anyio
import structlog

from server.observability.instruments import Counter, Gauge, Registry
from server.threads import contained
from vectors.library import Library
from vectors.scratch import sweep

log = structlog.get_logger("trimtab.housekeeping")
# The first pass waits until a server that was just started serves.
FIRST_S = 60.0
STOP_S = 5.0


class Housekeeping:
    """`start` and `stop` belong to the server's life."""

    def __init__(self, library: Library, registry: Registry, every_s: float, audit_kept_s: float = 0,
                 more: Sequence[Callable[[], object]] = ()) -> None:
        """`every_s`: seconds between two passes; 0: none at all. `audit_kept_s`: age at which records of the audit go;
        0: none. `more`: what else is to be cleared at each pass."""
        self._more = more
        self._audit_kept = timedelta(seconds=audit_kept_s)
        self._library = library
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None
        # A thread of its own, so that requests wait for none of it.
        self._thread = anyio.CapacityLimiter(1)
        self._held = Gauge("trimtab_library_held", "What the library holds, as of the last pass: bytes, names, "
                           "versions.", ["what"], registry=registry)
        self._freed = Counter("trimtab_library_freed_bytes", "Bytes that passes removed.", registry=registry)
        self._failed = Counter("trimtab_housekeeping_failures", "Passes that failed.", registry=registry)

    async def start(self) -> None:
        if self._every_s:
            self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task], timeout=STOP_S)

    async def tidy(self) -> None:
        """One pass. Whatever fails is logged, and tried again at the next."""
        try:
            await anyio.to_thread.run_sync(contained(self._tidy), limiter=self._thread, abandon_on_cancel=True)
        except Exception as error:  # no disk or database may end what cleans up behind it
            self._failed.inc()
            log.warning("housekeeping_failed", error=f"{type(error).__name__}: {error}"[:300])

    async def _work(self) -> None:
        await asyncio.sleep(FIRST_S)
        while True:
            await self.tidy()
            await asyncio.sleep(self._every_s)

    def _tidy(self) -> None:
        folders = sweep()
        for clear in self._more:
            clear()
        collected = self._library.gc()
        self._freed.inc(collected.nbytes)
        if folders or collected.blobs or collected.partial:
            log.info("housekeeping", blobs=len(collected.blobs), partial=collected.partial, bytes=collected.nbytes,
                     scratch_folders=folders)
        if self._audit_kept:
            self._library.audit.expire(datetime.now(UTC) - self._audit_kept)
        usage = asdict(self._library.usage())
        for what, name in (("bytes", "nbytes"), ("names", "names"), ("versions", "versions")):
            self._held.labels(what).set(usage[name])

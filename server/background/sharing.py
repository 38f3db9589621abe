"""Jobs that servers share: each renews what it holds, and goes on with what a server left that lives no more."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import anyio
import httpx
import structlog

from server.background.board import LEASE_S, Asked, Board
from server.background.job import FINISHED, Job
from server.background.jobs import Jobs
from server.observability.instruments import Counter, Registry
from server.threads import in_thread
from steering.language.errors import Conflict, NotFound, TrimtabError

log = structlog.get_logger("trimtab.jobs")
BEAT_S = 2.0
# What a server answers that has no room, or no engine, just now.
LATER = (429, 503)
Client = Callable[[Job, Asked], AbstractAsyncContextManager[httpx.AsyncClient]]


class Sharing:
    """`start` and `stop` belong to the server's life; it stops before the jobs do."""

    def __init__(self, jobs: Jobs, board: Board, registry: Registry, client: Client) -> None:
        """client: one of this server, for whom asked for the job, whose request begins the job of that id again."""
        self._jobs, self._board, self._client = jobs, board, client
        self._task: asyncio.Task[None] | None = None
        self._resuming: dict[str, tuple[Job, asyncio.Task[None]]] = {}
        self._taken = Counter("trimtab_jobs_taken_over", "Jobs of other servers that were begun again here.",
                              registry=registry)
        self._lost = Counter("trimtab_jobs_lost", "Jobs of this server that others went on with, because it did not "
                             "renew them in time.", registry=registry)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """What is over is recorded; what is not is left to others."""
        if self._task is None:
            return
        for task in (self._task, *(task for _, task in self._resuming.values())):
            task.cancel()
        await asyncio.gather(self._task, *(task for _, task in self._resuming.values()), return_exceptions=True)
        open_ones = [job.id for job in self._jobs.held() if job.status not in FINISHED] + list(self._resuming)
        try:
            await self.beat()
            for job_id in open_ones:
                self._jobs.lose(job_id)
            await in_thread(lambda: self._board.release(self._jobs.owner, open_ones))
        except TrimtabError as error:
            log.warning("jobs_not_released", jobs=open_ones, error=str(error)[:300])

    async def beat(self) -> None:
        """Renew the leases and record how far the jobs are. Raises LibraryUnavailable."""
        began = time.monotonic()
        jobs = [job.model_copy() for job in self._jobs.held()] + [job for job, _ in self._resuming.values()]
        if not jobs:
            return
        found = await in_thread(lambda: self._board.beat(self._jobs.owner, jobs))
        self._jobs.hold(began + LEASE_S)
        self._jobs.said(job.id for job in jobs if job.status in FINISHED)
        for job_id in found.lost:
            log.warning("job_lost", job=job_id)
            self._lost.inc()
            self._jobs.lose(job_id)
        for job_id in found.unwanted - found.lost:
            try:
                self._jobs.cancel(job_id)
            except (Conflict, NotFound):
                continue

    async def _work(self) -> None:
        failing = False
        while True:
            try:
                await self.beat()
                while self._jobs.room and len(self._resuming) < 1 and await self._take():
                    pass
                failing = False
            except Exception as error:  # any error of a database; leases that are not renewed end by themselves
                if not failing:
                    log.warning("jobs_out_of_step", error=f"{type(error).__name__}: {error}"[:300])
                failing = True
            with anyio.move_on_after(BEAT_S):
                await self._jobs.over.wait()
            self._jobs.over.clear()

    async def _take(self) -> bool:
        taken = await in_thread(lambda: self._board.take(self._jobs.owner))
        if taken is None:
            return False
        job, asked = taken
        log.warning("job_taken_over", job=job.id, kind=job.kind, about=job.about)
        self._taken.inc()
        self._resuming[job.id] = job, asyncio.create_task(self._resume(job, asked))
        return True

    async def _resume(self, job: Job, asked: Asked) -> None:
        """Ask this server for the job once more, under the id that it has."""
        try:
            async with self._client(job, asked) as client:
                answer = await client.request(asked.method, asked.path, params=asked.query, content=asked.body.encode(),
                                              headers={"Content-Type": "application/json"})
            if answer.status_code in LATER:
                await in_thread(lambda: self._board.release(self._jobs.owner, [job.id]))
            elif answer.status_code >= 300:
                over = job.model_copy(update={"status": "failed", "finished_at": time.time(),
                                              "error": answer.json()["error"]})
                await in_thread(lambda: self._board.beat(self._jobs.owner, [over]))
        except Exception as error:  # its lease ends, and another server tries
            log.warning("job_not_resumed", job=job.id, error=f"{type(error).__name__}: {error}"[:300])
        finally:
            self._resuming.pop(job.id, None)

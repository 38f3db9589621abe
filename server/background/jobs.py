"""Background jobs: progress, cancel, result. Their last known state is kept in files and survives a restart.

Several servers may share a folder: each runs its own jobs, shows those of the others, and takes none over from a server
that lives.
"""

import asyncio
import os
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from server.background.board import LEASE_S, Board
from server.background.job import FINISHED, Behind, Cancelled, Control, Courtesy, Job, Work
from server.background.lease import Lease
from server.background.line import Line
from server.errors import TooManyJobs, error_body
from server.observability.unexpected import report_unexpected
from steering.language.errors import Conflict, NotFound, TrimtabError, path_text
from steering.language.finite import finite, not_finite
from vectors.library.audit.notes import maker
from vectors.library.spaces import READER
from vectors.storage_errors import storing

log = structlog.get_logger("trimtab.jobs")

KEPT = 500
# How long work that is cancelled may take to notice.
GRACE_S = 1.0
# Half-written files so old belong to a process that was killed.
LEFT_BEHIND_S = 600.0
# How long it is kept what jobs that were cut off had found, for when they are asked for again.
UNFINISHED_S = 7 * 86400.0
_ID = re.compile(r"job-[0-9a-f]{24}")


class RunsElsewhere(Conflict):
    """A job is to be cancelled that another server runs."""


class Jobs:
    """Runs one job at a time, in the order of `Line`; at most `max_jobs` wait or run. `load` comes first; it and
    `refresh` block, the rest belongs to the event loop.

    Args:
        share: by which jobs give way to requests; None where there are none.
        board: where jobs are recorded instead of in files, because servers with folders of their own share them. What
            is here of them is recorded by `server.background.sharing`.
    """

    def __init__(self, folder: Path, max_jobs: int, share: Courtesy | None = None, board: Board | None = None) -> None:
        self.folder = folder
        self.board = board
        self._share = share
        self._max_jobs = max_jobs
        self._jobs: dict[str, Job] = {}
        self._controls: dict[str, Control] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._line: Line[Job] = Line()
        self._lease: Lease | None = None
        # Jobs that are over here, which the board does not know yet; `over` says that there is a new one.
        self.unsaid: dict[str, Job] = {}
        self.over = asyncio.Event()
        self._lost: set[str] = set()

    @property
    def owner(self) -> str:
        """This server, as jobs name it."""
        if self._lease is None:
            raise RuntimeError("jobs are not loaded")
        return self._lease.id

    @property
    def room(self) -> bool:
        return len(self._tasks) < self._max_jobs

    def held(self) -> list[Job]:
        """The jobs that wait or run here, and those that were done since they were last recorded."""
        return [*(self._jobs[id] for id in self._controls), *self.unsaid.values()]

    def hold(self, until: float) -> None:
        """All jobs here are this server's until then, by the monotonic clock."""
        for control in self._controls.values():
            control.hold(until)

    def lose(self, job_id: str) -> None:
        """Another server runs it now. Nothing of what is still done here counts."""
        self.unsaid.pop(job_id, None)
        if (control := self._controls.get(job_id)) is not None:
            self._lost.add(job_id)
            control.cancel()
            self._tasks[job_id].cancel()

    def load(self) -> None:
        """Read what others left. What a process had not finished that lives no more has failed.

        Raises:
            StorageUnavailable: the folder cannot be used.
        """
        with storing("the folder of jobs cannot be used"):
            self._lease = Lease(self.folder)
        self._lease.others()
        for pattern, age_s in (("*.partial", LEFT_BEHIND_S), ("*.jsonl", UNFINISHED_S),
                               ("*.safetensors", UNFINISHED_S)):
            for path in self.folder.glob(pattern):
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > age_s:
                        path.unlink()
        if self.board is not None:
            return
        for path in sorted(self.folder.glob("job-*.json")):
            self._read(path)
        self._forget_oldest()

    def refresh(self) -> None:
        """Look again at the jobs of other servers, new ones included. Raises LibraryUnavailable."""
        if self.board is not None:
            found = {job.id: job for job in self.board.all()}
            # Those that run here are known better here than there.
            known = {id for id, job in dict(self._jobs).items() if self._own(job)}
            for job_id in set(self._jobs) - known - set(found):
                self._jobs.pop(job_id, None)
            self._jobs.update((id, job) for id, job in found.items() if id not in self._controls)
            return
        for path in self.folder.glob("job-*.json"):
            job = self._jobs.get(path.stem)
            if job is None or (job.status not in FINISHED and not self._own(job)):
                self._read(path)

    def is_current(self, job_id: str) -> bool:
        """Whether what is known here of a job is all there is: it runs here, or is over."""
        job = self._jobs.get(job_id)
        return job is not None and (job.status in FINISHED or self._own(job))

    def _read(self, path: Path) -> None:
        try:
            job = Job.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            # The server it belongs to has forgotten it.
            self._jobs.pop(path.stem, None)
            return
        except (ValidationError, OSError) as error:
            log.warning("job file cannot be read", path=str(path), error=str(error))
            return
        if job.status not in FINISHED and (self._lease is None or not self._lease.held(job.owner)):
            job.status, job.finished_at = "failed", time.time()
            job.error = {"message": "the server stopped before the job was done", "code": "interrupted"}
            self._try_to_save(job)
        self._jobs[job.id] = job

    async def stop(self) -> None:
        for control in self._controls.values():
            control.cancel()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._lease is not None:
            self._lease.release()

    def submit(self, kind: str, work: Work, *, about: str = "", estimate_s: float | None = None,
               id: str | None = None, created_at: float | None = None) -> Job:
        """id: from `new_id`, where it was told to somebody before. created_at: of one that another server had begun.

        Raises TooManyJobs; StorageUnavailable, StorageFull: it could not be recorded and is not run."""
        if not self.room:
            raise TooManyJobs(f"{len(self._tasks)} jobs wait or run already", fix="Try again when some are done.")
        job = Job(id=id or new_id(), kind=kind, about=about, owner=self.owner, tenant=maker(),
                  created_at=time.time() if created_at is None else created_at, estimate_s=estimate_s)
        with storing("the job cannot be recorded"):
            self._save(job)
        self._controls[job.id] = control = Control(job, self._share)
        self._jobs[job.id] = job
        if self.board is not None:
            control.hold(time.monotonic() + LEASE_S)
        self._forget_oldest()
        task = asyncio.create_task(self._run(job, work))
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._release(job.id))
        self._line.join(job)
        self._turns()
        return self._shown(job)

    def get(self, job_id: str) -> Job:
        """Raises NotFound: there is none, or it is another tenant's."""
        job = self._jobs.get(job_id) if _ID.fullmatch(job_id) else None
        if job is None or not READER.get().sees(job.tenant):
            raise NotFound(f"there is no job {job_id[:60]!r}", param="id")
        return self._shown(job)

    def _newest(self) -> list[Job]:
        return sorted(self._jobs.values(), key=lambda job: job.created_at, reverse=True)

    def list(self) -> list[Job]:
        """Those of the tenant, newest first."""
        return [self._shown(job) for job in self._newest() if READER.get().sees(job.tenant)]

    def _shown(self, job: Job) -> Job:
        """Of a job of another tenant that is before this one, nothing is told but that there is one."""
        before = None if job.behind is None else self._jobs.get(job.behind.id)
        return job if before is None or READER.get().sees(before.tenant) else job.model_copy(update={"behind": None})

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop. One that waits stops at once; one that runs stops when it next looks, and is left to
        itself where that takes longer than `GRACE_S`. Raises NotFound, and Conflict if it is over or runs on another
        server."""
        job = self.get(job_id)
        if job.status in FINISHED:
            raise Conflict(f"the job is over: {job.status}", param="id")
        control = self._controls.get(job_id)
        if control is None:
            raise RunsElsewhere("the job runs on another server of this data folder", param="id",
                                fix="Cancel it there.")
        control.cancel()
        asyncio.get_running_loop().call_later(0 if job.status == "queued" else GRACE_S, self._tasks[job_id].cancel)
        return job

    async def _run(self, job: Job, work: Work) -> None:
        control = self._controls[job.id]
        try:
            await control.turn()
            control.check()
            job.status, job.started_at = "running", time.time()
            self._try_to_save(job)
            job.result = _storable(await work(control), job)
            job.status, job.progress = "succeeded", 1.0
        except Cancelled:
            job.status = "cancelled"
        except asyncio.CancelledError:
            job.status = "cancelled"
            raise
        except TrimtabError as error:
            job.status, job.error = "failed", error_body(error)["error"]
        except Exception as error:  # a job's failure is its result, and belongs in the log
            job.status, job.error = "failed", error_body(report_unexpected(error, job.id))["error"]
        finally:
            job.finished_at = time.time()
            self._leave(job)
            self._try_to_save(job)

    def _turns(self) -> None:
        """Give the turn to whose it is, and tell all the others their places."""
        before: Job | None = None
        for place, job in enumerate(self._line.order()):
            self._controls[job.id].go(place == 0)
            job.place = place
            job.behind = None if before is None else Behind(id=before.id, kind=before.kind, about=before.about)
            before = job

    def _leave(self, job: Job) -> None:
        self._line.leave(job)
        job.place, job.behind = None, None
        self._turns()

    def _release(self, job_id: str) -> None:
        job = self._jobs[job_id]
        if job.status not in FINISHED:
            # Cancelled before it ever ran: its own bookkeeping did not.
            job.status, job.finished_at = "cancelled", time.time()
            self._leave(job)
            self._try_to_save(job)
        del self._tasks[job_id]
        if self._controls.pop(job_id).expired and job.status == "cancelled":
            # Nobody asked for that. Whoever takes it next begins it anew.
            self._lost.add(job_id)
        if job_id in self._lost:
            self._lost.discard(job_id)
            del self._jobs[job_id]
        elif self.board is not None:
            self.unsaid[job_id] = job
            self.over.set()

    def _try_to_save(self, job: Job) -> None:
        """The job goes on, or is over, also where that cannot be recorded."""
        try:
            self._save(job)
        except OSError as error:
            log.warning("job_not_recorded", job=job.id, status=job.status, error=str(error))

    def _save(self, job: Job) -> None:
        if self.board is not None:
            return
        path = self._path(job.id)
        partial = path.with_suffix(".partial")
        try:
            # Places are those of this moment.
            partial.write_text(job.model_dump_json(exclude={"place", "behind"}))
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def said(self, job_ids: Iterable[str]) -> None:
        """The board knows that these are over."""
        for job_id in job_ids:
            self.unsaid.pop(job_id, None)

    def _own(self, job: Job) -> bool:
        return self._lease is not None and job.owner == self._lease.id

    def _path(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.json"

    def _forget_oldest(self) -> None:
        over = [job for job in self._newest()[KEPT:] if job.status in FINISHED]
        for job in over:
            del self._jobs[job.id]
            with suppress(OSError):
                self._path(job.id).unlink(missing_ok=True)


def new_id() -> str:
    return f"job-{secrets.token_hex(12)}"


def _storable(result: dict[str, Any], job: Job) -> dict[str, Any]:
    """The result as JSON can hold it: null for numbers that are not finite."""
    wrong = [path_text(path) for path in not_finite(result)]
    if not wrong:
        return result
    log.warning("job_result_not_finite", job=job.id, fields=wrong[:10])
    return {name: finite(value) for name, value in result.items()}

"""Batches of the API: each a file of requests, run one batch after the other, beside and behind what else is asked.

What there is of a batch lies in a folder: what is told of it, results as they come, a mark where somebody cancelled it,
and a lock that the server which runs it holds. So a server that starts goes on with what another left, however that
ended, and asks nothing again that was answered.
"""

import asyncio
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import httpx
import structlog
from filelock import FileLock, Timeout
from openai.types import Batch, BatchError, BatchRequestCounts
from openai.types.batch import Errors
from pydantic import ValidationError

from server.batches.files import StoredFiles
from server.batches.lines import answered, finished, read_requests, read_results, run
from server.errors import TooManyJobs
from server.identity.principal import Principal
from server.shelf import TENANT
from server.threads import in_thread
from steering.language.errors import Conflict, InvalidRequest, NotFound
from vectors.library.spaces import EVERYTHING, HOUSE, READER, reading
from vectors.storage_errors import storage_error, storing

log = structlog.get_logger("trimtab.batches")
_ID = re.compile(r"batch_[0-9a-f]{24}")
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
WINDOW_S = 86400
KEPT = 500
# How often a batch that runs looks whether it was cancelled or its time is over, and how often one is looked for that
# another server left.
LOOK_S, SEARCH_S = 0.5, 30.0
# The server may have no room for a long time, and a batch waits for it.
TRIES = 24
Client = Callable[[str, Principal], AbstractAsyncContextManager[httpx.AsyncClient]]


class Batches:
    """`start` and `stop` belong to the server's life; `create` and what else is asked may be called before and after.
    """

    def __init__(self, folder: Path, files: StoredFiles, client: Client, *, at_once: int, most_lines: int,
                 most_open: int, now: Callable[[], float] = time.time) -> None:
        """
        Args:
            client: a client of this server for the batch of that id and who made it, whose requests go behind those of
                others.
            at_once: requests of a batch under way at once.
            most_open: batches that wait or run.
        """
        self._folder, self._files, self._client, self._now = folder, files, client, now
        self._at_once, self._most_lines, self._most_open = at_once, most_lines, most_open
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await in_thread(self._folder.mkdir, 0o777, True, True)
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def create(self, input_file_id: str, endpoint: str, metadata: Mapping[str, str] | None, who: Principal
                     ) -> Batch:
        """One whose file is wrong is kept as failed, and says why. Its requests may do what `who` may now.

        Raises:
            NotFound: there is no such file.
            TooManyJobs: so many batches wait already.
            StorageUnavailable, StorageFull.
        """
        batch = await in_thread(self._created, input_file_id, endpoint, metadata, who)
        self._wake.set()
        return batch

    async def cancel(self, batch_id: str) -> Batch:
        """Raises NotFound, and Conflict where it is over."""
        batch = await in_thread(self._cancelled, batch_id)
        self._wake.set()
        return batch

    def find(self, batch_id: str) -> Batch:
        """Blocks. Raises NotFound: there is none, or it is another tenant's."""
        return self._found(batch_id)[0]

    def all(self) -> list[Batch]:
        """Those of the tenant, newest first. Blocks."""
        found = [one for path in self._folder.glob("batch_*.json") if (one := self._read(path)) is not None]
        own = [batch for batch, tenant in found if READER.get().sees(tenant)]
        return sorted(own, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def uses(self, file_id: str) -> bool:
        """Whether a batch that is not over reads this file. Blocks."""
        return any(batch.input_file_id == file_id and batch.status in OPEN for batch in self.all())

    def _created(self, input_file_id: str, endpoint: str, metadata: Mapping[str, str] | None, who: Principal) -> Batch:
        requests = self._files.content(input_file_id, "input_file_id")
        with reading(EVERYTHING):
            known = self.all()
        if sum(batch.status in OPEN for batch in known) >= self._most_open:
            raise TooManyJobs(f"{self._most_open} batches wait or run already", fix="Try again when some are done.")
        for old in [batch for batch in known if batch.status not in OPEN][KEPT:]:
            for kind in ("json", "who"):
                self._path(old.id, kind).unlink(missing_ok=True)
        now = int(self._now())
        batch = Batch(id=f"batch_{secrets.token_hex(12)}", object="batch", endpoint=endpoint, completion_window="24h",
                      input_file_id=input_file_id, status="validating", created_at=now, expires_at=now + WINDOW_S,
                      metadata=None if metadata is None else dict(metadata),
                      request_counts=BatchRequestCounts(total=0, completed=0, failed=0))
        try:
            # All of the file is read before anything is asked.
            total = sum(1 for _ in read_requests(requests, param="input_file_id", endpoint=endpoint,
                                                 most=self._most_lines))
            if not total:
                raise InvalidRequest("the file has no requests", param="input_file_id")
            batch.request_counts = BatchRequestCounts(total=total, completed=0, failed=0)
        except InvalidRequest as error:
            batch.status, batch.failed_at = "failed", now
            batch.errors = Errors(object="list", data=[BatchError(code=error.code, message=error.message,
                                                                  param=error.param)])
        self._remember(batch.id, who)
        self._save(batch, who.tenant)
        return batch

    def _remember(self, batch_id: str, who: Principal) -> None:
        with storing("the batch cannot be recorded"):
            self._path(batch_id, "who").write_text(json.dumps({"name": who.name, "tenant": who.tenant,
                                                               "roles": sorted(who.roles), "key_id": who.key_id}))

    def _maker(self, batch_id: str) -> Principal:
        told = json.loads(self._path(batch_id, "who").read_text())
        return Principal(told["name"], told["tenant"], frozenset(told["roles"]), told["key_id"])

    def _cancelled(self, batch_id: str) -> Batch:
        batch = self.find(batch_id)
        if batch.status not in OPEN:
            raise Conflict(f"the batch is over: {batch.status}", param="batch_id")
        # The server that runs it writes what is told of it, so this is only a mark.
        self._path(batch_id, "cancel").touch()
        return batch.model_copy(update={"status": "cancelling", "cancelling_at": int(self._now())})

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            for batch in reversed([batch for batch in await in_thread(self.all) if batch.status in OPEN]):
                try:
                    with FileLock(self._path(batch.id, "lock"), timeout=0):
                        await self._run(batch.id)
                    self._path(batch.id, "lock").unlink(missing_ok=True)
                except Timeout:
                    continue
                except Exception as error:  # whatever ends a batch must not end those behind it; it is tried again
                    log.warning("batch_interrupted", batch=batch.id, error=f"{type(error).__name__}: {error}"[:300])
            # wait_for of Python 3.11 loses a cancellation that comes together with the event.
            with suppress(TimeoutError):
                async with asyncio.timeout(SEARCH_S):
                    await self._wake.wait()

    async def _run(self, batch_id: str) -> None:
        """Run a batch, or what is left of it, to its end."""
        batch, tenant = await in_thread(self._found, batch_id)
        if batch.status not in OPEN:
            return
        results = self._path(batch.id, "results")
        done = await in_thread(finished, results)
        counts = batch.request_counts = BatchRequestCounts(
            total=batch.request_counts.total if batch.request_counts else len(done), completed=sum(done.values()),
            failed=len(done) - sum(done.values()))

        def told(ok: bool) -> None:
            counts.completed += ok
            counts.failed += not ok

        how = "completed"
        if counts.completed + counts.failed < counts.total:
            batch.status, batch.in_progress_at = "in_progress", batch.in_progress_at or int(self._now())
            await in_thread(self._save, batch, tenant)
            how = await self._ask(batch, tenant, results, done, told)
        batch.status, batch.finalizing_at = "finalizing", int(self._now())
        await in_thread(self._save, batch, tenant)
        await in_thread(self._finish, batch, tenant, results, how)

    async def _ask(self, batch: Batch, tenant: str, results: Path, done: Mapping[str, bool],
                   told: Callable[[bool], None]) -> str:
        """How it ended: completed, cancelled or expired."""
        requests = await in_thread(self._files.content, batch.input_file_id)
        async with self._client(batch.id, await in_thread(self._maker, batch.id)) as client:
            asking = asyncio.create_task(run(
                read_requests(requests, endpoint=batch.endpoint), results, client, at_once=self._at_once, done=done,
                told=told, tries=TRIES))
            saved = batch.model_copy(deep=True)
            try:
                while True:
                    if await in_thread(self._path(batch.id, "cancel").exists):
                        return "cancelled"
                    if batch.expires_at is not None and self._now() >= batch.expires_at:
                        return "expired"
                    self._wake.clear()
                    woken = asyncio.create_task(self._wake.wait())
                    await asyncio.wait({asking, woken}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                    woken.cancel()
                    if asking.done():
                        asking.result()
                        return "completed"
                    if batch != saved:
                        await in_thread(self._save, batch, tenant)
                        saved = batch.model_copy(deep=True)
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    def _finish(self, batch: Batch, tenant: str, results: Path, how: str) -> None:
        """Make the files of results, in the same way each time, and end the batch. Blocks."""
        done = finished(results)
        counts = {True: sum(done.values()), False: len(done) - sum(done.values())}
        missing = []
        if how == "expired":
            missing = [name for name, _ in read_requests(self._files.content(batch.input_file_id)) if name not in done]
        for kind, ok in (("output", True), ("errors", False)):
            if counts[ok] or (kind == "errors" and missing):
                file_id = f"file-{batch.id.removeprefix('batch_')}-{kind}"

                def write(path: Path, ok: bool = ok) -> None:
                    _write_results(path, results, ok, () if ok else missing)

                self._files.keep(file_id, f"{batch.id}_{kind}.jsonl", "batch_output", write, tenant=tenant)
                setattr(batch, "output_file_id" if ok else "error_file_id", file_id)
        batch.request_counts = BatchRequestCounts(
            total=batch.request_counts.total if batch.request_counts else len(done), completed=counts[True],
            failed=counts[False] + len(missing))
        batch.status = how  # type: ignore[assignment]
        setattr(batch, f"{how}_at", int(self._now()))
        if how == "cancelled":
            batch.cancelling_at = batch.cancelling_at or batch.finalizing_at
        self._save(batch, tenant)
        for suffix in ("results", "cancel", "who"):
            self._path(batch.id, suffix).unlink(missing_ok=True)

    def _save(self, batch: Batch, tenant: str) -> None:
        """Raises StorageUnavailable, StorageFull."""
        path, partial = self._path(batch.id, "json"), self._path(batch.id, "partial")
        try:
            told = {**batch.model_dump(mode="json"), TENANT: tenant}
            partial.write_bytes(json.dumps(told).encode("utf-8", "surrogatepass"))
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise storage_error(error, "the batch cannot be recorded") from error

    def _found(self, batch_id: str) -> tuple[Batch, str]:
        found = self._read(self._path(batch_id, "json")) if _ID.fullmatch(batch_id) else None
        if found is None or not READER.get().sees(found[1]):
            raise NotFound(f"there is no batch {batch_id[:64]!r}", param="batch_id")
        return found

    def _read(self, path: Path) -> tuple[Batch, str] | None:
        """A batch and whose it is."""
        try:
            told = json.loads(path.read_bytes())
            tenant = told.pop(TENANT, HOUSE)
            batch = Batch.model_validate(told)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ValidationError) as error:
            log.warning("batch_unreadable", batch=path.stem, error=f"{type(error).__name__}: {error}"[:200])
            return None
        if batch.status in ("validating", "in_progress") and self._path(batch.id, "cancel").exists():
            batch.status = "cancelling"
        return batch, tenant

    def _path(self, batch_id: str, suffix: str) -> Path:
        return self._folder / f"{batch_id}.{suffix}"


def _write_results(path: Path, results: Path, ok: bool, missing: list[str] | tuple[str, ...]) -> None:
    with path.open("wb") as file:
        for line, result in read_results(results):
            if answered(result) is ok:
                file.write(line)
        for name in missing:
            late: dict[str, Any] = {"id": f"batch_{name}", "custom_id": name, "response": None, "error": {
                "code": "batch_expired", "message": "The request was not asked before the batch expired."}}
            file.write(json.dumps(late, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        file.flush()
        os.fsync(file.fileno())

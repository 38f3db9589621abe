"""How a route starts a job: recorded first, under the id that the job then has."""

import time
from contextvars import ContextVar
from dataclasses import dataclass

from server.background.board import Asked
from server.background.job import Job, Work
from server.background.jobs import new_id
from server.identity.principal import CURRENT
from server.identity.recording import recorded
from server.requests.state import ServerState
from server.threads import in_thread
from vectors.library.audit.notes import maker


@dataclass(frozen=True)
class Given:
    """The request that is being answered. body: as it was sent, not compressed."""

    method: str
    path: str
    query: str
    body: bytes


GIVEN: ContextVar[Given | None] = ContextVar("given", default=None)
# The job that the request begins again, where the server sends it for one that another server left.
AGAIN: ContextVar[Job | None] = ContextVar("again", default=None)


async def submitted(state: ServerState, kind: str, work: Work, *, about: str, estimate_s: float | None = None) -> Job:
    """Raises TooManyJobs, StorageUnavailable, LibraryUnavailable."""
    again = AGAIN.get()
    if again is not None:
        async with recorded(state.library.audit, "job.resume", again.id, after={"kind": kind, "about": about}):
            return state.jobs.submit(kind, work, about=about, estimate_s=estimate_s, id=again.id,
                                     created_at=again.created_at)
    id = new_id()
    async with recorded(state.library.audit, "job.create", id, after={"kind": kind, "about": about}):
        board, given, who = state.jobs.board, GIVEN.get(), CURRENT.get()
        if board is None or given is None:
            return state.jobs.submit(kind, work, about=about, estimate_s=estimate_s, id=id)
        asked = Asked(given.method, given.path, given.query, given.body.decode(), {
            "name": who.name, "tenant": who.tenant, "roles": sorted(who.roles), "key_id": who.key_id})
        planned = Job(id=id, kind=kind, about=about, estimate_s=estimate_s, owner=state.jobs.owner, tenant=maker(),
                      created_at=time.time())
        await in_thread(lambda: board.add(planned, asked))
        try:
            return state.jobs.submit(kind, work, about=about, estimate_s=estimate_s, id=id,
                                     created_at=planned.created_at)
        except BaseException:
            await in_thread(lambda: board.remove(id, planned.owner))
            raise

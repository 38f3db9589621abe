"""How a route starts a job: recorded first, under the id that the job then has."""

from server.background.job import Job, Work
from server.background.jobs import new_id
from server.identity.recording import recorded
from server.requests.state import ServerState


async def submitted(state: ServerState, kind: str, work: Work, *, about: str, estimate_s: float | None = None) -> Job:
    """Raises TooManyJobs, StorageUnavailable, LibraryUnavailable."""
    id = new_id()
    async with recorded(state.library.audit, "job.create", id, after={"kind": kind, "about": about}):
        return state.jobs.submit(kind, work, about=about, estimate_s=estimate_s, id=id)

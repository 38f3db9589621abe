"""`/v1/jobs`: what runs in the background."""

from fastapi import APIRouter
from pydantic import BaseModel

from server.api.route import StrictRoute
from server.background.job import Job
from server.background.jobs import RunsElsewhere
from server.identity.recording import recorded
from server.requests.state import State
from server.threads import in_thread

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=StrictRoute)


class JobList(BaseModel):
    data: list[Job]


# Coroutines: jobs belong to the event loop.
@router.get("")
async def list_jobs(state: State) -> JobList:
    """Newest first."""
    await in_thread(state.jobs.refresh)
    return JobList(data=state.jobs.list())


@router.get("/{id}")
async def show_job(id: str, state: State) -> Job:
    if not state.jobs.is_current(id):
        await in_thread(state.jobs.refresh)
    return state.jobs.get(id)


@router.post("/{id}/cancel")
async def cancel_job(id: str, state: State) -> Job:
    """Ask a job to stop; it does at the next step of its work."""
    if not state.jobs.is_current(id):
        await in_thread(state.jobs.refresh)
    job = state.jobs.get(id)
    async with recorded(state.library.audit, "job.cancel", id, before={"status": job.status}, needed=False):
        try:
            return state.jobs.cancel(id)
        except RunsElsewhere:
            if state.jobs.board is None:
                raise
            board = state.jobs.board
            await in_thread(lambda: board.cancel(id))
            return job

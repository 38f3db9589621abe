"""`/health`: whether the process answers; `/health/ready` and `/ping`: whether it serves requests now; `/health/live`:
whether it does or will again by itself. None needs the key, a thread or a database."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from server.requests.state import State

router = APIRouter(tags=["health"])


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The shape of every error."""

    error: ErrorDetail


class Health(BaseModel):
    status: Literal["ok"] = "ok"


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health() -> Health:
    """The process runs."""
    return Health()


@router.head("/health/ready", include_in_schema=False)
@router.get("/ping", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
@router.post("/ping", include_in_schema=False)
@router.get("/health/ready", responses={503: {"model": ErrorBody, "description": "Requests are not served now."}})
async def ready(state: State) -> Health:
    """The engine takes requests. While it does not, leave this server out of balancing."""
    condition = state.engine.condition()
    if not condition.ready:
        raise condition.error()
    return Health()


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", responses={503: {"model": ErrorBody, "description": "Only a new process helps."}})
async def live(state: State) -> Health:
    """The engine serves, starts, or is being restarted. Where this fails, start the server again."""
    condition = state.engine.condition()
    if not condition.live:
        raise condition.error()
    return Health()

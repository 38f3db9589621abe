"""`/health`: whether the process answers; `/health/ready`: whether it can serve requests. Neither needs the key."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from server.state import State
from steering.errors import EngineUnavailable

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


@router.get("/health")
async def health() -> Health:
    """The process runs."""
    return Health()


@router.get("/health/ready", responses={503: {"model": ErrorBody, "description": "The engine does not run."}})
async def ready(state: State) -> Health:
    """The engine takes requests."""
    if not state.engine.alive:
        raise EngineUnavailable("the engine does not run")
    return Health()

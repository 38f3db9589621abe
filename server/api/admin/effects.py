"""`GET /v1/effects`: what interventions did, measured in production."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from server.api.route import StrictRoute
from server.requests.state import State
from server.threads import in_thread

router = APIRouter(tags=["effects"], route_class=StrictRoute)


@router.get("/v1/effects")
async def list_effects(
    state: State,
    group: Annotated[Literal["artifact", "preset", "minute", "all"], Query(
        description="What rows stand for; all: each artifact, op and preset.")] = "all",
    artifact: Annotated[str | None, Query(max_length=128, description='Reference with version, "inline", or "all" for '
                                          "whole specs.")] = None,
    preset: Annotated[str | None, Query(max_length=128, description="Reference with version.")] = None,
    since: Annotated[int | None, Query(ge=0, le=2**40, description="Seconds since 1970.")] = None,
    until: Annotated[int | None, Query(ge=0, le=2**40, description="Seconds since 1970.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, list[dict[str, Any]]]:
    """Means over measured completions, largest KL first, in nats per token; and what graded answers were, by artifact
    ("all": whole specs, "untouched": without steering) or as `group` says."""
    await state.shadow.flush()
    store = state.effect_store
    asked: dict[str, Any] = {"since": since, "until": until, "artifact": artifact, "preset": preset}
    measured = await in_thread(lambda: store.totals(group=group, limit=limit, **asked))
    outcomes = await state.live_grading.totals(group=group, limit=limit, **asked)
    return {"data": [_known(one) for one in measured], "outcomes": [_known(one) for one in outcomes]}


def _known(row: Any) -> dict[str, Any]:
    """The fields of a row that have a value."""
    return {key: value for key, value in asdict(row).items() if value is not None}

"""`GET /v1/effects`: what interventions did, measured in production."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from server.api.route import StrictRoute
from server.effects.outcome_store import OutcomeTotal
from server.effects.outcome_store import totals as outcome_totals
from server.effects.store import Total
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
    await state.live_grading.flush()
    store, asked = state.effect_store, {"since": since, "until": until, "artifact": artifact, "preset": preset}
    found = await in_thread(lambda: (store.totals(group=group, limit=limit, **asked),
                                     outcome_totals(store, group=group, limit=limit, **asked)))
    data, outcomes = ([_known(one) for one in rows] for rows in found)
    return {"data": data, "outcomes": outcomes}


def _known(row: Total | OutcomeTotal) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if value is not None}

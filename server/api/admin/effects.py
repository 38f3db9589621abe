"""`GET /v1/effects`: what interventions did, measured in production."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from server.api.route import StrictRoute
from server.effects.store import Which
from server.requests.state import State
from server.threads import in_thread
from steering.language.errors import InvalidRequest

router = APIRouter(tags=["effects"], route_class=StrictRoute)
Group = Literal["artifact", "preset", "minute", "tenant", "arm", "all"]


@router.get("/v1/effects")
async def list_effects(
    state: State,
    group: Annotated[Group, Query(
        description="What rows stand for; all: each artifact, op and preset; arm: each arm of each roll-out.")] = "all",
    artifact: Annotated[str | None, Query(max_length=128, description='Reference with version, "inline", or "all" for '
                                          "whole specs.")] = None,
    preset: Annotated[str | None, Query(max_length=128, description="Reference with version.")] = None,
    tenant: Annotated[str | None, Query(max_length=64, description="Whose the completions are. Keys of other tenants "
                                        "than default are told of their own alone, whatever they ask.")] = None,
    rollout: Annotated[str | None, Query(max_length=32, description="Id of a roll-out: only completions that belong to "
                                         "one of its arms.")] = None,
    arm: Annotated[Literal["stable", "candidate"] | None, Query(description="Together with rollout or group=arm.")
                   ] = None,
    since: Annotated[int | None, Query(ge=0, le=2**40, description="Seconds since 1970.")] = None,
    until: Annotated[int | None, Query(ge=0, le=2**40, description="Seconds since 1970.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, list[dict[str, Any]]]:
    """Means over measured completions, largest KL first, in nats per token; and what graded answers were, by artifact
    ("all": whole specs, "untouched": without steering) or as `group` says."""
    if arm is not None and rollout is None and group != "arm":
        raise InvalidRequest("a completion may belong to arms of several roll-outs, so arm alone would count it more "
                             "than once", param="arm", fix="Name the roll-out, too, or ask for group=arm.")
    await state.shadow.flush()
    store = state.effect_store
    which = Which(since, until, artifact, preset, tenant, rollout, arm)
    measured = await in_thread(lambda: store.totals(group=group, limit=limit, which=which))
    outcomes = await state.live_grading.totals(group=group, limit=limit, which=which)
    return {"data": [_known(one) for one in measured], "outcomes": [_known(one) for one in outcomes]}


def _known(row: Any) -> dict[str, Any]:
    """The fields of a row that have a value."""
    return {key: value for key, value in asdict(row).items() if value is not None}

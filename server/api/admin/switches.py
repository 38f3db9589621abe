"""`/v1/admin`: the default spec and the kill switch, which hold for all servers of a library, and its housekeeping."""

from datetime import datetime
from typing import Annotated, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.api.route import StrictRoute
from server.requests.rehearsal import rehearse
from server.requests.state import State
from server.threads import in_thread
from steering.language.errors import Conflict
from steering.language.fields import MAX_INTERVENTIONS, ArtifactRef
from steering.language.guard import Guard
from steering.language.spec import LastingInterventions, Spec
from vectors.library.switches import Turned

router = APIRouter(prefix="/v1/admin", tags=["admin"], route_class=StrictRoute)


class DefaultSpecBody(BaseModel):
    """A spec, or a preset whose present version is copied."""

    model_config = ConfigDict(extra="forbid")

    interventions: LastingInterventions | None = Field(default=None, min_length=1, max_length=MAX_INTERVENTIONS)
    preset: ArtifactRef | None = None
    guard: Guard | None = Field(default=None, description="With interventions; a preset brings its own.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.interventions is None) == (self.preset is None):
            raise ValueError("give either interventions or preset")
        if self.guard is not None and self.preset is not None:
            raise ValueError("a preset brings its own guard")
        return self


class TurnedView(BaseModel):
    """Who turned a switch last."""

    at: datetime
    by: str = Field(description='Name of the key; "owner" for that of the settings, and for everybody where the server '
                    'asks for none; "local" for the library opened without a server.')
    tenant: str = Field(description="Of the key.")

    @classmethod
    def of(cls, turned: Turned | None) -> Self | None:
        return None if turned is None else cls(at=turned.at, by=turned.by, tenant=turned.tenant)


class DefaultSpecView(BaseModel):
    spec: Spec | None = Field(description="Null: requests are steered only as they say themselves.")
    problem: str | None = Field(default=None, description="Why the requests it would act on are refused: it failed "
                                "when it was tried at the start of this server.")
    turned: TurnedView | None = Field(default=None, description="Who set or cleared it last; null where nobody did.")


class KillSwitchBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    on: bool = Field(description="true: nothing is steered until it is turned off again.")


class KillSwitchView(BaseModel):
    on: bool
    reason: str | None
    stored: bool = Field(description="Whether the library knows it. false: this server acts on it already, other "
                         "servers and a restart do not know it yet; storing is tried again until it succeeds.")
    failure: str | None = Field(default=None, description="Why the library could not be reached at the last try.")
    turned: TurnedView | None = Field(default=None, description="Who turned it last; null where nobody did. What the "
                                      "settings say is turned by nobody.")


class LibraryView(BaseModel):
    """What the library holds, and its limits (null: none)."""

    names: int = Field(description="Artifacts and presets.")
    versions: int
    bytes: int = Field(description="Of the numbers, equal ones once, and of the metadata.")
    max_names: int | None
    max_versions: int | None
    max_bytes: int | None


class CollectedView(BaseModel):
    blobs: int = Field(description="Numbers that no version names any more.")
    partial: int = Field(description="Files that killed writers left.")
    bytes: int = Field(description="Of both.")


@router.get("/default-spec")
def show_default_spec(state: State) -> DefaultSpecView:
    spec = state.planner.default_spec()
    return DefaultSpecView(spec=spec, problem=None if spec is None else state.planner.default_spec_problem(spec),
                           turned=TurnedView.of(state.library.switches.default_spec_turned()))


@router.put("/default-spec")
async def set_default_spec(body: DefaultSpecBody, state: State) -> DefaultSpecView:
    """Let a spec act first in every request that does not say otherwise. It is run on the engine for a few tokens
    first; what fails there is not stored."""
    given = {} if body.guard is None else {"guard": body.guard}
    if body.preset is None:
        spec = Spec(interventions=body.interventions or [], **given)
    else:
        spec = (await in_thread(state.library.presets.resolve, body.preset)).spec
    await rehearse(spec, state)
    await in_thread(state.library.switches.set_default_spec, spec)
    state.planner.unbar_default_spec()
    return await in_thread(show_default_spec, state)


@router.delete("/default-spec")
def clear_default_spec(state: State) -> DefaultSpecView:
    """Take the default spec away; one given in the settings acts again."""
    state.library.switches.clear_default_spec()
    return show_default_spec(state)


# Coroutines, so that they wait for no thread: the switch works when everything else is stuck.
@router.get("/kill-switch")
async def show_kill_switch(state: State) -> KillSwitchView:
    switch = state.kill_switch
    return KillSwitchView(on=switch.on, reason=switch.reason, stored=switch.unstored is None, failure=switch.failure,
                          turned=TurnedView.of(switch.turned))


@router.put("/kill-switch")
async def set_kill_switch(body: KillSwitchBody, state: State) -> KillSwitchView:
    """Turn all steering off or on at once. It acts also where it cannot be stored yet."""
    if state.settings.kill_switch and not body.on:
        raise Conflict("the kill switch is set in the server's settings", param="on",
                       fix="Start the server without TRIMTAB_KILL_SWITCH.")
    await state.kill_switch.set(body.on)
    return await show_kill_switch(state)


@router.get("/library")
def show_library(state: State) -> LibraryView:
    """How much the library holds."""
    held, limits = state.library.usage(), state.library.limits
    return LibraryView(names=held.names, versions=held.versions, bytes=held.nbytes, max_names=limits.library_names,
                       max_versions=limits.library_versions, max_bytes=limits.library_bytes)


@router.post("/library/gc")
def collect_library(
    state: State,
    min_age_s: Annotated[float, Query(ge=60, le=10**9, description="Only what is at least so old: younger files may "
                                      "still be being written.")] = 3600.0,
) -> CollectedView:
    """Remove from the storage what deleted versions and crashes left. It also happens on a schedule (gc_interval_s)."""
    found = state.library.gc(min_age_s)
    return CollectedView(blobs=len(found.blobs), partial=found.partial, bytes=found.nbytes)

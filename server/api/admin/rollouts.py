"""`/v1/admin/rollouts`: a candidate version beside the stable one, step by step, with guard rails that end it."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from server.api.route import StrictRoute
from server.requests.rehearsal import rehearse
from server.requests.state import ServerState, State
from server.rollouts.rollouts import terms_of
from server.rollouts.tally import RailState
from server.rollouts.terms import Rail, Terms
from server.threads import in_thread
from steering.language.errors import TrimtabError
from steering.language.fields import ArtifactRef
from steering.language.spec import Spec
from vectors.library.naming import DEFAULT_ALIAS
from vectors.library.rollouts import DRAFT, StoredRollout

router = APIRouter(prefix="/v1/admin/rollouts", tags=["admin"], route_class=StrictRoute)
Status = Literal["draft", "published", "production", "returned"]


class NewRollout(Terms):
    collection: Literal["preset", "artifact"] = "preset"
    target: ArtifactRef = Field(description='The alias, "cheerful@production"; a bare name means that alias.')
    candidate: Annotated[int, Field(ge=1, lt=10**9)] = Field(description="Number of the version to be tried.")


class ReturnBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    why: Annotated[str, Field(max_length=500)] = Field(default="", description="For those who read about it later.")


class RailView(BaseModel):
    """A guard rail, and what it has seen."""

    rail: Rail
    stable_samples: int
    stable_mean: float | None = Field(description="In the unit of the metric; null before the first sample.")
    candidate_samples: int
    candidate_mean: float | None
    evidence: float = Field(description="Against the candidate, over what ends the roll-out at 1.")


class EventView(BaseModel):
    at: datetime
    what: str
    by: str = Field(description='Name of the key; "owner" for that of the settings, "roll-out" for the server itself.')
    tenant: str
    why: str


class RolloutView(BaseModel):
    id: str
    collection: Literal["preset", "artifact"]
    target: str
    stable: int
    candidate: int
    status: Status = Field(description="draft: acts on nothing; published: at work; production: the alias points at "
                           "the candidate; returned: only the stable version acts.")
    step: int = Field(description="From 0.")
    step_since: datetime
    created_at: datetime
    approved_by: str | None = Field(description="Who published it: tenant and name of the key.")
    terms: Terms
    rails: list[RailView]
    problem: str | None = Field(default=None, description="Why it does not go on by itself.")
    history: list[EventView]


class RolloutList(BaseModel):
    data: list[RolloutView]


@router.post("", status_code=201)
async def create_rollout(body: NewRollout, state: State) -> RolloutView:
    """Make a draft. It acts on nothing until it is published."""
    name, _, alias = body.target.partition("@")
    terms = body.model_dump(mode="json", exclude={"collection", "target", "candidate"})
    made = await in_thread(lambda: state.library.rollouts.create(
        body.collection, name, alias or DEFAULT_ALIAS, body.candidate, terms))
    return await _view(made, state)


@router.get("")
async def list_rollouts(state: State, limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> RolloutList:
    """Newest first."""
    found = await in_thread(state.library.rollouts.list, limit)
    return RolloutList(data=[_told(one, rails, state) for one, rails in zip(
        found, await state.rollouts.states(found), strict=True)])


@router.get("/{id}")
async def show_rollout(id: str, state: State) -> RolloutView:
    return await _view(await in_thread(state.library.rollouts.find, id), state)


@router.post("/{id}/publish")
async def publish_rollout(id: str, state: State) -> RolloutView:
    """Approve a draft: it acts on requests from now on. The candidate is run on the engine for a few tokens first."""
    found = await in_thread(state.library.rollouts.find, id)
    if found.status == DRAFT:
        await _rehearse(found, state)
    two = state.settings.rollout_two_people
    return await _view(await state.rollouts.changed(
        lambda: state.library.rollouts.publish(id, two_people=two)), state)


@router.post("/{id}/promote")
async def promote_rollout(id: str, state: State) -> RolloutView:
    """Point the alias at the candidate. That ends the roll-out."""
    return await _view(await state.rollouts.changed(lambda: state.library.rollouts.promote(id)), state)


@router.post("/{id}/return")
async def return_rollout(id: str, body: ReturnBody, state: State) -> RolloutView:
    """Let only the stable version act again. That ends the roll-out."""
    return await _view(await state.rollouts.changed(lambda: state.library.rollouts.give_back(id, body.why)), state)


@router.delete("/{id}", status_code=204)
async def delete_rollout(id: str, state: State) -> None:
    """Delete one that is not at work, and what is known of it."""
    await state.rollouts.changed(lambda: state.library.rollouts.delete(id))


async def _rehearse(found: StoredRollout, state: ServerState) -> None:
    ref = f"{found.name}@{found.candidate}"
    if found.collection == "preset":
        spec = (await in_thread(state.library.presets.resolve, ref)).spec
    else:
        spec = Spec.model_validate({"interventions": [{"artifact": ref}]})
    try:
        await rehearse(spec, state)
    except TrimtabError as error:
        raise error.about("candidate") from None


async def _view(found: StoredRollout, state: ServerState) -> RolloutView:
    [rails] = await state.rollouts.states([found])
    return _told(found, rails, state)


def _told(found: StoredRollout, rails: list[RailState], state: ServerState) -> RolloutView:
    running = state.rollouts.running(found.id)
    return RolloutView(
        id=found.id, collection=found.collection, target=found.target, stable=found.stable, candidate=found.candidate,
        status=found.status, step=found.step, step_since=found.step_since, created_at=found.created_at,
        approved_by=found.by("published"), terms=terms_of(found),
        rails=[_rail(one) for one in rails],
        problem=None if running is None else running.problem,
        history=[EventView.model_validate(event) for event in found.history])


def _rail(state: RailState) -> RailView:
    return RailView(rail=state.rail, stable_samples=state.stable_count, stable_mean=state.stable_mean,
                    candidate_samples=state.candidate_count, candidate_mean=state.candidate_mean,
                    evidence=state.evidence)

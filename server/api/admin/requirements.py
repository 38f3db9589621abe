"""`/v1/admin/requirements`: what an alias requires of a version before it may be moved there or rolled out."""

import json
from datetime import datetime
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.api.route import StrictRoute
from server.requests.state import State
from server.threads import in_thread
from steering.language.fields import ArtifactRef
from vectors.library.naming import DEFAULT_ALIAS
from vectors.library.requirements import StoredRequirement

router = APIRouter(prefix="/v1/admin/requirements", tags=["admin"], route_class=StrictRoute)
Held = Literal["preset", "artifact"]
Figure = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Bound(BaseModel):
    """A bound on one figure of an evaluation, of the spec as it is stored (dose 1)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    figure: Literal["success", "broken", "chance", "kl"] = Field(
        description="success, broken: shares of the texts, by a grader; chance: how often a random artifact does as "
        "well; kl: nats a token.")
    grader: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Its kind, `refusal` say; of all figures but kl.")
    at_least: Figure | None = None
    at_most: Figure | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.figure == "kl") != (self.grader is None):
            raise ValueError("every figure but kl is by a grader")
        if self.at_least is None and self.at_most is None:
            raise ValueError("a bound needs at_least or at_most")
        return self


class Requirement(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    collection: Held = "preset"
    target: ArtifactRef = Field(description='The alias, "cheerful@production"; a bare name means that alias.')
    bounds: Annotated[list[Bound], Field(min_length=1, max_length=32)] = Field(description="All of which have to hold.")
    prompts: Annotated[int, Field(ge=1, le=10**6)] = Field(default=1, description="That the evaluation has at least.")
    max_age_s: Annotated[float, Field(gt=0, le=10**10, allow_inf_nan=False)] | None = Field(
        default=None, description="How old the evaluation may be.")
    tenant: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Only evaluations that this tenant asked for count.")


class RequirementView(Requirement):
    updated_at: datetime


class RequirementList(BaseModel):
    data: list[RequirementView]


@router.get("")
def list_requirements(state: State) -> RequirementList:
    return RequirementList(data=[_view(one) for one in state.library.requirements.list()])


@router.put("")
async def set_requirement(body: Requirement, state: State) -> RequirementView:
    """Set what an alias requires. It holds for every move and roll-out from now on."""
    name, _, alias = body.target.partition("@")
    document = body.model_dump(mode="json", exclude={"collection", "target"})
    return _view(await in_thread(lambda: state.library.requirements.set(
        body.collection, name, alias or DEFAULT_ALIAS, document)))


@router.delete("", status_code=204)
async def delete_requirement(target: Annotated[ArtifactRef, Query()], state: State,
                             collection: Held = "preset") -> None:
    """Let an alias move freely again."""
    name, _, alias = target.partition("@")
    await in_thread(lambda: state.library.requirements.delete(collection, name, alias or DEFAULT_ALIAS))


def _view(stored: StoredRequirement) -> RequirementView:
    return RequirementView.model_validate({
        **json.loads(stored.document), "collection": stored.collection, "target": f"{stored.name}@{stored.alias}",
        "updated_at": stored.updated_at})

"""`/v1/presets`: named, versioned specs. Each is also served as a model, `model:preset`."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from server.api.library.artifacts import AliasTarget, Deleted
from server.api.library.refs import NAME, REF
from server.api.route import StrictRoute
from server.requests.rehearsal import rehearse
from server.requests.state import State
from server.threads import in_thread
from steering.language.errors import TrimtabError
from steering.language.spec import Spec
from vectors.library.paging import MAX_LIMIT, Order
from vectors.library.presets import Preset

router = APIRouter(prefix="/v1/presets", tags=["presets"], route_class=StrictRoute)


class NewPreset(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    spec: Spec
    description: str = ""


class PresetView(BaseModel):
    name: str
    ref: str = Field(description="name@version.")
    version: int
    model: str = Field(description="Model name that serves it.")
    spec: Spec
    description: str
    digest: str
    aliases: list[str]
    created_at: datetime


class PresetList(BaseModel):
    data: list[PresetView]
    cursor: str | None = Field(default=None, description="Of the next page; null on the last.")


class ListQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    q: str | None = Field(default=None, description="Searched in name and description.")
    all: bool = Field(default=False, description="Also those that belong to other models than the one that is served.")
    order: Order = "name"
    limit: int = Field(default=50, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(default=None, description="From the page before.")


@router.post("", status_code=201)
async def create_preset(body: NewPreset, state: State) -> PresetView:
    """Store a spec as a new version. It is run on the engine for a few tokens first; what fails there is not stored."""
    await in_thread(state.library.presets.check, body.name, body.spec, body.description)
    try:
        await rehearse(body.spec, state)
    except TrimtabError as error:
        raise (error.at("spec") if error.path else error) from None
    preset = await in_thread(state.library.presets.create, body.name, body.spec, body.description)
    return _view(preset, state)


@router.get("")
def list_presets(query: Annotated[ListQuery, Query()], state: State) -> PresetList:
    """One entry per name: the version that the bare name means."""
    page = state.library.presets.list(q=query.q, everything=query.all, order=query.order, limit=query.limit,
                                      cursor=query.cursor)
    return PresetList(data=[_view(preset, state) for preset in page.items], cursor=page.cursor)


@router.get(f"/{REF}")
def show_preset(ref: str, state: State) -> PresetView:
    return _view(state.library.presets.resolve(ref), state)


@router.get(f"/{NAME}/versions")
def list_preset_versions(name: str, state: State) -> PresetList:
    """All versions, newest first."""
    return PresetList(data=[_view(preset, state) for preset in state.library.presets.versions(name)])


@router.delete(f"/{REF}")
def delete_preset(ref: str, state: State, force: bool = False) -> Deleted:
    """Delete one version, or with a bare name all. `force` also if an alias points at it."""
    return Deleted(deleted=list(state.library.presets.delete(ref, force=force)))


@router.put(f"/{NAME}/aliases/{{alias}}")
def set_preset_alias(name: str, alias: str, body: AliasTarget, state: State) -> PresetView:
    """Point an alias at a version."""
    return _view(state.library.presets.set_alias(name, alias, body.version), state)


@router.delete(f"/{NAME}/aliases/{{alias}}", status_code=204)
def remove_preset_alias(name: str, alias: str, state: State) -> None:
    state.library.presets.remove_alias(name, alias)


def _view(preset: Preset, state: State) -> PresetView:
    return PresetView.model_construct(
        name=preset.name, ref=preset.ref, version=preset.version, model=f"{state.settings.model_name}:{preset.name}",
        spec=preset.spec, description=preset.description, digest=preset.digest, aliases=list(preset.aliases),
        created_at=preset.created_at)

"""`/v1/artifacts`: the library over HTTP. A reference is "name", "name@3" or "name@alias"; names never become paths."""

import asyncio
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from server.api.library.refs import NAME, REF
from server.api.route import StrictRoute
from server.api.strict_json import parse_json
from server.errors import InvalidJson, UnsupportedMediaType
from server.requests.state import State
from server.threads import in_thread
from server.workbench.reconstruction import checked, is_of
from server.workbench.subject import EngineSubject
from steering.artifacts.payload import Kind, Payload
from steering.language.errors import ArtifactMismatch, InvalidPayload, InvalidRequest
from steering.language.vocabulary import Op, Site
from steering.models.facts import ModelFacts
from steering.programs.inline import parse_tensor
from vectors.artifact import Artifact, Metadata, Patch
from vectors.formats import detect, get_format
from vectors.formats.dictionaries.said import SaeFields, split
from vectors.library import Filter
from vectors.library.paging import MAX_LIMIT, Order

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], route_class=StrictRoute)

TensorValue = Annotated[Any, Field(description="Nested lists, or base64 (see Encoded in the spec reference).")]


class NewArtifact(BaseModel):
    model_config = ConfigDict(extra="forbid")

    metadata: Metadata
    tensors: dict[str, dict[str, TensorValue]] = Field(
        max_length=4096, description='Layer to tensor name to numbers: {"3": {"vector": [...]}}.')


class ArtifactView(Metadata):
    """One version of an artifact, without its numbers."""

    ref: str = Field(description="name@version.")
    version: int
    digest: str = Field(description="sha256 of the numbers as stored.")
    nbytes: int
    stored_layers: list[int] = Field(description="Layers that have numbers.")
    aliases: list[str]
    created_at: datetime


class ArtifactList(BaseModel):
    data: list[ArtifactView]
    cursor: str | None = Field(default=None, description="Of the next page; null on the last.")


class Deleted(BaseModel):
    deleted: list[str] = Field(description="References of the deleted versions.")


class AliasTarget(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1, le=10**9)


class ListQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    q: str | None = Field(default=None, description="Searched in name, description and tags.")
    kind: Kind | None = None
    op: Op | None = None
    site: Site | None = None
    tag: str | None = None
    model_id: str | None = None
    all: bool = Field(default=False, description="Also those that belong to other models than the one that is served. "
                      "Several models may each have an artifact of the same name.")
    order: Order = "name"
    limit: int = Field(default=50, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(default=None, description="From the page before.")


@router.post("", status_code=201)
async def create_artifact(body: NewArtifact, state: State) -> ArtifactView:
    """Store numbers as a new version; the same again gives the version that exists. An SAE that is not of another model
    must reconstruct activations of the served one."""
    subject = EngineSubject(state, asyncio.get_running_loop())
    return await in_thread(_create, body, subject)


def _create(body: NewArtifact, subject: EngineSubject) -> ArtifactView:
    state, layers = subject.state, {}
    for layer, tensors in body.tensors.items():
        if not (layer.isascii() and layer.isdigit() and len(layer) <= 5):
            raise InvalidPayload(f"{layer[:40]!r} is not a layer number", param="tensors", fix='Write "3".')
        layers[int(layer)] = {name: parse_tensor(value, ("tensors", layer, name))
                              for name, value in tensors.items()}
    try:
        payload = Payload.build(body.metadata.kind, layers)
    except InvalidPayload as error:
        raise error.at("tensors") from None
    _check_width(body.metadata, payload, state.engine.facts, "tensors")
    return view(state.library.create(checked(body.metadata, payload, SaeFields(), subject), payload))


@router.post("/import", status_code=201, openapi_extra={"requestBody": {"required": True, "content": {
    "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": {
        "file": {"type": "string", "format": "binary"},
        "metadata": {"type": "string", "description": "JSON object: fields that win over those in the file."}}}},
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}})
async def import_artifact(request: Request, state: State, metadata: Annotated[str | None, Query(
        description="JSON object: fields that win over those in the file; for uploads that are no form.")] = None
        ) -> ArtifactView:
    """Take in a safetensors, GGUF or npz file. An SAE's may be as another program wrote it; the JSON beside it and its
    conventions then stand under `sae` in the metadata, and it must reconstruct activations of the served model."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/octet-stream"):
        raise UnsupportedMediaType(f"the body is {kind[:80] or 'of no stated type'}", param="Content-Type",
                                   fix="Send multipart/form-data with a part file, or application/octet-stream.")
    # Not a byte is read before its turn: what waits lies in the client's memory.
    async with state.pools.uploads:
        if kind == "multipart/form-data":
            data, metadata = await _form(request, metadata)
        else:
            data = await request.body()
        return await in_thread(_import, data, _fields(metadata), EngineSubject(state, asyncio.get_running_loop()))


@router.get("")
def list_artifacts(query: Annotated[ListQuery, Query()], state: State) -> ArtifactList:
    """One entry per name: the version that the bare name means."""
    wanted = Filter(q=query.q, kind=query.kind, op=query.op, site=query.site, tag=query.tag, model_id=query.model_id,
                    everything=query.all)
    page = state.library.list(wanted, order=query.order, limit=query.limit, cursor=query.cursor)
    return ArtifactList(data=[view(artifact) for artifact in page.items], cursor=page.cursor)


@router.get(f"/{REF}")
def show_artifact(ref: str, state: State) -> ArtifactView:
    return view(state.library.resolve(ref))


@router.get(f"/{NAME}/versions")
def list_versions(name: str, state: State) -> ArtifactList:
    """All versions, newest first."""
    return ArtifactList(data=[view(artifact) for artifact in state.library.versions(name)])


@router.get(f"/{REF}/download", response_class=Response,
            responses={200: {"content": {"application/octet-stream": {}}, "description": "The file."}})
def download_artifact(ref: str, state: State, format: Literal["safetensors", "gguf"] = "safetensors",
                      layers: Annotated[str | None, Query(pattern=r"^\d{1,5}(,\d{1,5})*$", max_length=4096,
                                                          description="Only these: 3,4,5.")] = None) -> Response:
    """The numbers with their metadata, as safetensors or as a llama.cpp control vector."""
    artifact = state.library.resolve(ref)
    chosen = get_format(format)
    picked = None if layers is None else [int(n) for n in layers.split(",")]
    data = chosen.write(artifact.metadata, state.library.payload(artifact), picked)
    name = f"{artifact.metadata.name.replace('/', '-')}-{artifact.version}{chosen.suffix}"
    return Response(data, media_type=chosen.media_type,
                    headers={"Content-Disposition": f'attachment; filename="{name}"'})


@router.patch(f"/{REF}")
def patch_artifact(ref: str, body: Patch, state: State) -> ArtifactView:
    """Change description, tags or card of one version. The rest never changes."""
    return view(state.library.patch(ref, body))


@router.delete(f"/{REF}")
def delete_artifact(ref: str, state: State, force: bool = False) -> Deleted:
    """Delete one version, or with a bare name all. `force` also if aliases, presets or the default spec need it."""
    return Deleted(deleted=list(state.library.delete(ref, force=force)))


@router.put(f"/{NAME}/aliases/{{alias}}")
def set_alias(name: str, alias: str, body: AliasTarget, state: State) -> ArtifactView:
    """Point an alias at a version."""
    return view(state.library.set_alias(name, alias, body.version))


@router.delete(f"/{NAME}/aliases/{{alias}}", status_code=204)
def remove_alias(name: str, alias: str, state: State) -> None:
    state.library.remove_alias(name, alias)


def view(artifact: Artifact) -> ArtifactView:
    return ArtifactView.model_construct(
        **dict(artifact.metadata), ref=artifact.ref, version=artifact.version, digest=artifact.digest,
        nbytes=artifact.nbytes, stored_layers=list(artifact.layers), aliases=list(artifact.aliases),
        created_at=artifact.created_at)


async def _form(request: Request, metadata: str | None) -> tuple[bytes, str | None]:
    async with request.form(max_files=1, max_fields=1) as form:
        unknown = sorted(set(form) - {"file", "metadata"})
        if unknown:
            raise InvalidRequest(f"unknown form field {unknown[0][:80]!r}", param=unknown[0][:80],
                                 fix="Send file and metadata.")
        file, given = form.get("file"), form.get("metadata", metadata)
        if not isinstance(file, UploadFile):
            raise InvalidRequest("the form has no file", param="file", fix="Send the artifact as the part file.")
        if given is not None and not isinstance(given, str):
            raise InvalidRequest("metadata is a text field, not a file", param="metadata")
        return await file.read(), given


def _fields(metadata: str | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    try:
        fields = parse_json(metadata.encode("utf-8", "surrogatepass"))
    except InvalidJson as error:
        raise InvalidJson(error.message, param="metadata") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("metadata is no JSON object", param="metadata")
    return fields


def _import(data: bytes, fields: dict[str, Any], subject: EngineSubject) -> ArtifactView:
    if not data:
        raise InvalidPayload("the file is empty", param="file")
    library = subject.state.library
    metadata, payload = detect(data).read(data, fields, library.limits)
    _check_width(metadata, payload, subject.facts, "file")
    return view(library.create(checked(metadata, payload, split(fields)[0], subject), payload))


def _check_width(metadata: Metadata, payload: Payload, facts: ModelFacts, param: str) -> None:
    """Refuse numbers of another width than the loaded model's, unless they say that they are another model's."""
    if not is_of(metadata, facts):
        return
    width, site = payload.width, metadata.site
    if width is not None and facts.sites.get(site) and width != facts.width(site):
        raise ArtifactMismatch(f"the numbers are {width} wide, {site} of the loaded model {facts.model_id} is "
                               f"{facts.width(site)} wide", param=param, fix="Import it into a server of the model it "
                               "was made on, or name that model in metadata.model_id to keep it for later.")

"""`/v1/activations`: what the model holds inside while it reads texts, as files with an id and a time."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from server.activations.store import Activations, new_id
from server.activations.taken import taken
from server.api.route import StrictRoute
from server.background.apart import apart
from server.background.job import Control, Job
from server.errors import UnsupportedMediaType
from server.identity.principal import CURRENT
from server.identity.recording import recorded
from server.requests.model_names import parse_model, serving
from server.requests.plan import Plan
from server.requests.policy_gate import check_captures
from server.requests.reading import Text, check_reading, length_of, positions_in, prompt_to_read
from server.requests.state import ServerState, State
from server.requests.submitting import submitted
from server.text.prompts import Prompt
from server.threads import in_thread
from server.workbench.capture import Capture, Wanted, metadata
from server.workbench.subject import EngineSubject, sample
from steering.language.errors import TrimtabError
from steering.language.fields import Position
from steering.language.layers import Layers
from steering.language.spec import Steering
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.layers import explicit_layers
from vectors.extract.trial.effort import seconds
from vectors.library.audit.notes import maker

router = APIRouter(prefix="/v1/activations", tags=["reading"], route_class=StrictRoute)
Id = Annotated[str, Path(max_length=64)]
MEDIA = "application/octet-stream"


class CaptureBody(BaseModel):
    """Texts, and what of them is wanted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=256, description="Base model, or base:preset.")
    input: Annotated[list[Text], Field(min_length=1, max_length=65_536, fail_fast=True)] = Field(
        description="Texts, token ids or conversations up to where the assistant speaks.")
    sites: Annotated[dict[Site, Layers], Field(min_length=1)] = Field(
        description='Sites, and the layers of each: {"resid_post": [3, 5]}.')
    positions: Annotated[list[Position], Field(min_length=1, max_length=4096)] | None = Field(
        default=None, description="Tokens of each text, negative ones from the end; null: all.")
    pool: Literal["none", "mean"] = Field(
        default="none", description="mean: of each text only the mean over the positions. The first token of a text "
        "often has a norm many times that of all others, and then rules the mean; positions can leave it out.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="Of the numbers.")
    expires_after_s: float | None = Field(default=None, gt=0, le=10**9, description="Seconds until they are removed, "
                                          "at most the server's own time (activations_kept_s).")
    steering: Steering = Field(default=Steering(), description="What to do to the model meanwhile. All tokens are "
                              "prompt to scopes.")


class ActivationsList(BaseModel):
    data: list[Activations]


@router.post("", status_code=202)
async def create_activations(body: CaptureBody, state: State) -> Job:
    """Start the job. Its result says under which id the activations are, of which /content is a safetensors file: per
    site and layer a tensor `SITE.LAYER` `[rows, width]`, and int32 `text`, `position` and `token` `[rows]`, which say
    of which text and token a row is (for means `text` and `count`)."""
    check_captures(CURRENT.get().policies, ("sites",))
    check_reading(body.steering)
    model = parse_model(body.model, state)
    state = serving(model, state)
    plan = await state.pools.complete(lambda: state.planner.plan(body.steering, model.preset))
    wanted = await state.texts.run(lambda: _wanted(body, plan, state), sum(map(length_of, body.input)))
    described, told = _described(body, wanted, plan, state)
    columns = wanted.columns({site: state.engine.facts.width(site) for site in wanted.sites})
    described.bytes = await in_thread(state.activations.check_room, columns, told)
    subject = EngineSubject(state, asyncio.get_running_loop())
    estimate = await in_thread(lambda: seconds(wanted.tokens, subject, sample(subject)))

    async def work(control: Control) -> dict[str, Any]:
        capture = Capture(wanted, state.engine, state.share, control)
        try:
            return await apart(lambda: capture.run(state.activations, described, told))
        except TrimtabError as error:
            raise plan.placed(error) from None

    return await submitted(state, "activations", work, about=described.id, estimate_s=estimate)


@router.post("/import", status_code=201, openapi_extra={"requestBody": {"required": True, "content": {
    MEDIA: {"schema": {"type": "string", "format": "binary"}}}}})
async def import_activations(request: Request, state: State) -> Activations:
    """Keep a file that another server captured, to port an artifact by it. Of which weights it is, the file says."""
    check_captures(CURRENT.get().policies, ("file",))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MEDIA:
        raise UnsupportedMediaType(f"the body is {kind[:80] or 'of no stated type'}", param="Content-Type",
                                   fix=f"Send {MEDIA}.")
    # Not a byte is read before its turn: what waits lies in the client's memory.
    async with state.pools.uploads:
        data = await request.body()
        id = new_id()
        async with recorded(state.library.audit, "activations.import", id, after={"bytes": len(data)}):
            return await in_thread(taken, data, id, state.activations, maker())


@router.get("")
async def list_activations(state: State) -> ActivationsList:
    """Newest first."""
    return ActivationsList(data=await in_thread(state.activations.all))


@router.get("/{id}")
async def show_activations(id: Id, state: State) -> Activations:
    return await in_thread(state.activations.find, id)


@router.get("/{id}/content", response_class=FileResponse,
            responses={200: {"content": {MEDIA: {}}, "description": "The safetensors file."}})
async def activations_content(id: Id, state: State) -> FileResponse:
    path = await in_thread(state.activations.content, id)
    return FileResponse(path, media_type=MEDIA, filename=f"{id}.safetensors")


@router.delete("/{id}", status_code=204)
async def delete_activations(id: Id, state: State) -> None:
    found = await in_thread(state.activations.find, id)
    async with recorded(state.library.audit, "activations.delete", id, before={"bytes": found.bytes}):
        await in_thread(state.activations.delete, id)


def _wanted(body: CaptureBody, plan: Plan, state: ServerState) -> Wanted:
    """Raises TrimtabError: naming the text or the field that does not fit."""
    prompts: list[Prompt] = []
    positions = []
    for n, text in enumerate(body.input):
        prompt = prompt_to_read(text, plan, state, ("input", n))
        plan.check_prompt(prompt.token_ids, prompt.roles)
        prompts.append(prompt)
        positions.append(positions_in(len(prompt.token_ids), body.positions))
    return Wanted(prompts, _sites(body.sites, state.engine.facts), positions, body.pool == "mean", body.dtype,
                  plan.program)


def _sites(wanted: Mapping[Site, Layers], facts: ModelFacts) -> dict[Site, Sequence[int]]:
    """Raises UnsupportedSite, LayerOutOfRange."""
    found: dict[Site, Sequence[int]] = {}
    for site, layers in wanted.items():
        offered = facts.sites.get(site, ())
        # Not every layer of every model has every site. Of those that lack it, "all" asks for nothing.
        found[site] = sorted(offered) if layers == "all" else _explicit(site, layers, facts)
        for layer in found[site] or [0]:
            facts.check_site(site, layer, ("sites", site))
    return found


def _explicit(site: Site, layers: Layers, facts: ModelFacts) -> list[int]:
    try:
        return sorted(explicit_layers(layers, facts))
    except TrimtabError as error:
        raise error.about("sites", site) from None


def _described(body: CaptureBody, wanted: Wanted, plan: Plan, state: ServerState
               ) -> tuple[Activations, dict[str, str]]:
    created, expires = state.activations.expiry(body.expires_after_s)
    program = plan.program
    applied = [] if program is None else [
        f"{'inline' if item.source is None else item.source.ref} ({compiled.op})"
        for item, compiled in zip(plan.planned, program.compiled, strict=True)]
    described = Activations(
        id=new_id(), created_at=created, expires_at=expires, model=body.model,
        fingerprint=state.engine.facts.fingerprint, texts=len(wanted.prompts), tokens=wanted.tokens,
        rows=sum(wanted.counts()), sites={site: list(layers) for site, layers in wanted.sites.items()},
        pool=body.pool, dtype=body.dtype, bytes=0, applied=applied, disabled=plan.disabled, tenant=maker())
    return described, metadata(described, body.steering.model_dump(mode="json", exclude_defaults=True),
                               body.positions)

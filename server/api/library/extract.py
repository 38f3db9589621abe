"""Extraction as jobs: `GET /v1/extract/methods`, `POST /v1/extract/{method}`, and `POST /v1/extract` for pairs."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Response
from pydantic import Field, ValidationError

from server.api.library.of_model import OfModel, served
from server.api.library.refs import REF
from server.api.route import StrictRoute
from server.api.validation import invalid
from server.background.apart import apart
from server.background.job import Cancelled, Control, Job
from server.identity.principal import CURRENT
from server.requests.policy_gate import check_job
from server.requests.state import ServerState, State
from server.requests.submitting import submitted
from server.threads import in_thread
from server.workbench.subject import EngineSubject, sample
from steering.language.errors import InvalidRequest, NotFound
from vectors.extract import RECIPES, Extraction, Prepared, Progress, RecipeOptions, get_recipe, prepare
from vectors.extract import Cancelled as StopAsked
from vectors.extract.contrastive import ContrastiveRequest
from vectors.extract.items import digest_of
from vectors.extract.refusals import ExtractionCancelled
from vectors.extract.trial.picture import draw
from vectors.extract.tune import TuneRequest, prepare_tuning
from vectors.library.audit.notes import maker
from vectors.library.naming import check_changed, check_written

MEDIA = {"png": "image/png", "svg": "image/svg+xml"}
router = APIRouter(tags=["extract"], route_class=StrictRoute)


class ExtractBody(ContrastiveRequest):
    method: Literal["mean_difference", "pca_pairwise", "pca_repe", "logistic_probe"] = Field(
        default="mean_difference", description="How the direction is fitted.")


@router.post("/v1/extract", status_code=202)
async def create_extraction(body: ExtractBody, state: State, model: OfModel = None) -> Job:
    """Start the job. Its result names the artifact it stored and holds the report."""
    request = get_recipe(body.method).request(
        **{name: getattr(body, name) for name in ContrastiveRequest.model_fields})
    return await _start(body.method, request, served(model, state), "POST /v1/extract")


@router.get("/v1/extract/methods")
def list_methods() -> dict[str, list[dict[str, Any]]]:
    """Every method, what it makes in a line, which field takes the data, and the JSON schema of all fields."""
    return {"data": [{"name": recipe.name, "summary": recipe.summary, "data": recipe.data_field(),
                      "request": recipe.request.model_json_schema()} for recipe in RECIPES.values()]}


@router.post("/v1/extract/{method}", status_code=202)
async def create_by_method(method: Annotated[str, Path(max_length=64)],
                           body: Annotated[dict[str, Any], Body(description="Fields of the method.")],
                           state: State, model: OfModel = None) -> Job:
    """Start the job. Its result names the artifact it stored and holds the report with its controls."""
    state = served(model, state)
    return await _start(method, _request(method, _without_method(method, body)), state, f"POST /v1/extract/{method}")


@router.post(f"/v1/artifacts/{REF}/tune", status_code=202, tags=["artifacts"])
async def create_tuning(ref: str, body: TuneRequest, state: State, model: OfModel = None) -> Job:
    """Start the job. It tries a stored vector again, on other prompts, by another grader or on an adapter, and stores a
    new version with the layers and the strength that it found."""
    state = served(model, state)
    artifact = await in_thread(state.library.resolve, ref)
    check_changed(artifact.metadata.name, "ref")
    check_job(CURRENT.get().policies, artifact.ref, op=artifact.metadata.op, site=artifact.metadata.site,
              param=("ref",))
    subject = EngineSubject(state, asyncio.get_running_loop())
    payload = (await in_thread(state.library.source, artifact.ref)).payload
    tuning = await in_thread(prepare_tuning, artifact.metadata, payload, body, subject)
    return await submitted(state, "tune", lambda control: _run(tuning.run, subject, control, state),
                           about=artifact.ref, estimate_s=await in_thread(tuning.estimate, sample(subject)))


@router.get(f"/v1/artifacts/{REF}/trial.{{format}}", response_class=Response, tags=["artifacts"],
            responses={200: {"content": {"image/png": {}, "image/svg+xml": {}}, "description": "The picture."}})
def draw_trial(ref: str, format: Annotated[Literal["png", "svg"], Path()], state: State) -> Response:
    """What was tried when the artifact was made, as a picture with its band."""
    artifact = state.library.resolve(ref)
    trial = (artifact.metadata.card or {}).get("trial")
    if not isinstance(trial, dict) or not trial.get("surface"):
        raise NotFound(f"{artifact.ref} has no trial", param="ref", fix=f"Run: trimtab tune {artifact.metadata.name}")
    return Response(draw(trial, artifact.ref, format), media_type=MEDIA[format])


def _without_method(method: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that may repeat the method of the path."""
    if body.get("method", method) != method:
        raise InvalidRequest(f"the path says {method}, the body another method", param="method",
                             fix="Leave it out of the body.")
    return {name: value for name, value in body.items() if name != "method"}


def _request(method: str, body: Mapping[str, Any]) -> RecipeOptions:
    """Raises NotFound: there is no such method. InvalidRequest: naming the field."""
    kind = get_recipe(method).request
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error.errors(), body, kind) from None


async def _start(method: str, request: RecipeOptions, state: ServerState, created_by: str) -> Job:
    """Raises TrimtabError: the options or the data do not fit, or too many jobs wait."""
    check_written(request.name, "name")
    check_job(CURRENT.get().policies, request.name, op=getattr(request, "op", None),
              site=getattr(request, "site", None), reads=True)
    subject = EngineSubject(state, asyncio.get_running_loop())
    prepared = await in_thread(prepare, method, request, subject, created_by)
    estimate = await in_thread(prepared.estimate, sample(subject))
    return await submitted(state, "extract", lambda control: _made(prepared, subject, control, state),
                           about=request.name, estimate_s=estimate)


async def _made(prepared: Prepared, subject: EngineSubject, control: Control, state: ServerState) -> dict[str, Any]:
    """As `_run`. What a long run has is kept until the artifact is stored: one that was cut off goes on from there when
    the same tenant asks for the same again."""
    kept = state.jobs.folder / f"extract-{digest_of([prepared.digest, maker()])[:32]}.safetensors"
    return await _run(partial(prepared.run, checkpoint=kept), subject, control, state, kept)


async def _run(run: Callable[[Progress, StopAsked], Extraction], subject: EngineSubject, control: Control,
               state: ServerState, kept: FilePath | None = None) -> dict[str, Any]:
    """The job's result: the artifact's reference and the report. A cancelled job stores nothing."""
    subject.control = control

    def work() -> dict[str, Any]:
        found = run(control.progress, control.cancelled)
        control.check()
        artifact = state.library.create(found.metadata, found.payload)
        if kept is not None:
            kept.unlink(missing_ok=True)
        return {"artifact": artifact.ref, "report": dict(found.report)}

    try:
        return await apart(work)
    except ExtractionCancelled:
        raise Cancelled from None

"""Extraction methods with data of their own: `GET /v1/extract/methods`, `POST /v1/extract/{method}`."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path

from server.extraction import extract_and_store
from server.jobs import Control, Job
from server.route import StrictRoute
from server.routes.extract import ExtractBody, start_extraction
from server.state import ServerState, State
from server.subject import EngineSubject
from steering.language.errors import InvalidRequest
from vectors.extract import RecipeOptions, get_recipe, methods, parse_fields, parse_request, recipes, run_recipe

router = APIRouter(tags=["extract"], route_class=StrictRoute)


@router.get("/v1/extract/methods")
def list_methods() -> dict[str, list[dict[str, Any]]]:
    """Every method, what it makes in a line, which field takes the data, and the JSON schema of all fields."""
    pairs = ExtractBody.model_json_schema()
    return {"data": [
        *({"name": method.name, "summary": method.summary, "data": "pairs", "request": pairs} for method in methods()),
        *({"name": recipe.name, "summary": recipe.summary, "data": recipe.data_field(),
           "request": recipe.request.model_json_schema()} for recipe in recipes())]}


@router.post("/v1/extract/{method}", status_code=202)
async def create_by_method(method: Annotated[str, Path(max_length=64)],
                           body: Annotated[dict[str, Any], Body(description="Fields of the method.")],
                           state: State) -> Job:
    """Start the job. Its result names the artifact it stored and holds the report with its controls."""
    if any(method == contrastive.name for contrastive in methods()):
        if body.get("method", method) != method:
            raise InvalidRequest(f"the path says {method}, the body another method", param="method",
                                 fix="Leave it out of the body.")
        return await start_extraction(parse_fields(ExtractBody, {**body, "method": method}), state)
    get_recipe(method)
    request = parse_request(method, body)
    return state.jobs.submit("extract", lambda control: _work(method, request, control, state))


async def _work(method: str, request: RecipeOptions, control: Control, state: ServerState) -> dict[str, Any]:
    subject = EngineSubject(state, asyncio.get_running_loop())
    return await extract_and_store(state, control, lambda: run_recipe(
        method, request, subject, control.progress, control.cancelled, f"POST /v1/extract/{method}"))

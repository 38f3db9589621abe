"""`/v1/models`: the base model first, then each preset that was made for it as `model:preset`."""

from fastapi import APIRouter
from openai.types import Model
from pydantic import BaseModel, Field

from server.api.openai.offered import Offer
from server.api.route import StrictRoute
from server.errors import ModelNotFound
from server.requests.model_names import parse_model
from server.requests.state import ServerState, State
from server.threads import in_thread
from steering.language.errors import InvalidRequest

router = APIRouter(tags=["models"], route_class=StrictRoute)
OWNER = "trimtab"
PAGE = 500


class ServedModel(Model):
    """OpenAI's description, and the context as other servers state it."""

    max_model_len: int = Field(description="Tokens that prompt and completion may have together on this server.")


class ModelList(BaseModel):
    object: str = "list"
    data: list[ServedModel]


@router.get("/v1/models")
async def list_models(state: State) -> ModelList:
    return ModelList(data=await in_thread(_models, state))


@router.get("/v1/models/{name:path}")
async def show_model(name: str, state: State) -> ServedModel:
    model = parse_model(name, state)
    created = 0
    if model.preset is not None:
        try:
            preset = await in_thread(state.library.presets.resolve, model.preset)
        except InvalidRequest as error:
            raise ModelNotFound(error.message, param="model") from None
        if not await in_thread(Offer(state.library, state.engine.facts).fitting, [preset]):
            raise ModelNotFound(f"the preset {preset.ref} was made for another model, or lacks an artifact",
                                param="model")
        created = int(preset.created_at.timestamp())
    return _model(name, created, state)


def _models(state: ServerState) -> list[ServedModel]:
    base, offer = state.settings.model_name, Offer(state.library, state.engine.facts)
    found = [_model(base, 0, state)]
    cursor = None
    while True:
        page = state.library.presets.list(limit=PAGE, cursor=cursor)
        found += [_model(f"{base}:{preset.name}", int(preset.created_at.timestamp()), state)
                  for preset in offer.fitting(page.items)]
        cursor = page.cursor
        if cursor is None:
            return found


def _model(name: str, created: int, state: ServerState) -> ServedModel:
    return ServedModel(id=name, created=created, object="model", owned_by=OWNER,
                       max_model_len=state.engine.max_sequence_tokens)

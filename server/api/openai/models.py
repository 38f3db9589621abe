"""`/v1/models`: the base model first, then its adapters, then each preset that was made for it as `model:preset`."""

import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter
from openai.types import Model
from pydantic import BaseModel, Field
from transformers.utils import cached_file

from server.api.openai.offered import Offer
from server.api.route import StrictRoute
from server.engines.adapters import Adapter
from server.errors import ModelNotFound
from server.identity.principal import CURRENT
from server.requests.model_names import parse_model
from server.requests.policy_gate import allows_model, allows_preset
from server.requests.state import ServerState, State
from server.threads import in_thread
from steering.language.errors import InvalidRequest

router = APIRouter(tags=["models"], route_class=StrictRoute)
OWNER = "trimtab"
PAGE = 500
STARTED = int(time.time())


class ServedModel(Model):
    """OpenAI's description, and the context as other servers state it."""

    max_model_len: int = Field(description="Tokens that prompt and completion may have together on this server.")
    parent: str | None = Field(default=None, description="Of an adapter: the model that it was trained on.")


class ModelList(BaseModel):
    object: str = "list"
    data: list[ServedModel]


@router.get("/v1/models")
async def list_models(state: State) -> ModelList:
    return ModelList(data=await in_thread(_models, state))


@router.get("/v1/models/{name:path}")
async def show_model(name: str, state: State) -> ServedModel:
    model = parse_model(name, state)
    if model.preset is None and model.adapter is not None:
        return _adapted(model.adapter, state)
    if model.preset is None:
        created = await in_thread(_made_at, state.settings.model)
    else:
        try:
            preset = await in_thread(state.library.presets.resolve, model.preset)
        except InvalidRequest as error:
            raise ModelNotFound(error.message, param="model") from None
        if not allows_preset(CURRENT.get().policies, preset):
            raise ModelNotFound(f"there is no preset {model.preset!r}", param="model")
        if not await in_thread(Offer(state.library, state.engine.facts).fitting, [preset]):
            raise ModelNotFound(f"the preset {preset.ref} was made for another model, or lacks an artifact",
                                param="model")
        created = int(preset.created_at.timestamp())
    return _model(name, created, state)


def _models(state: ServerState) -> list[ServedModel]:
    """Those that the policies of who asks allow."""
    base, held = state.settings.model_name, CURRENT.get().policies
    adapted = [_adapted(adapter, state) for adapter in state.engine.adapters or () if allows_model(held, adapter.name)]
    if not allows_model(held, base):
        return adapted
    found = [_model(name, _made_at(state.settings.model), state) for name in state.settings.model_names] + adapted
    offer = Offer(state.library, state.engine.facts)
    cursor = None
    while True:
        page = state.library.presets.list(limit=PAGE, cursor=cursor)
        found += [_model(f"{base}:{preset.name}", int(preset.created_at.timestamp()), state)
                  for preset in offer.fitting(page.items) if allows_preset(held, preset)]
        cursor = page.cursor
        if cursor is None:
            return found


@lru_cache(maxsize=1)
def _made_at(model: str) -> int:
    """When the files of the model that is served were written; the start of this server where they are not found."""
    described = Path(model) / "config.json"
    if not described.exists():
        with suppress(OSError, ValueError):
            described = Path(cached_file(model, "config.json", local_files_only=True) or model)
    return int(described.stat().st_mtime) if described.exists() else STARTED


def _adapted(adapter: Adapter, state: ServerState) -> ServedModel:
    return _model(adapter.name, adapter.created, state, parent=state.settings.model_name)


def _model(name: str, created: int, state: ServerState, parent: str | None = None) -> ServedModel:
    return ServedModel(id=name, created=created, object="model", owned_by=OWNER, parent=parent,
                       max_model_len=state.engine.max_sequence_tokens)

"""The model that a request names: the served one, or that one with a preset, as `model:preset`."""

from dataclasses import dataclass

from server.errors import ModelNotFound
from server.requests.state import ServerState


@dataclass(frozen=True)
class ModelName:
    """A model name of a request, taken apart."""

    base: str
    preset: str | None


def parse_model(name: str, state: ServerState) -> ModelName:
    """Raises ModelNotFound unless `name` is the served model, or that and `:preset`."""
    base = state.settings.model_name
    if name == base:
        return ModelName(base, None)
    if name.startswith(f"{base}:"):
        return ModelName(base, name[len(base) + 1:])
    raise ModelNotFound(f"there is no model {name[:100]!r}", param="model", fix=f"Use {base} or {base}:PRESET.")

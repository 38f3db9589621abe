"""The model that a request names: the served one by any of its names, or that one with a preset, as `model:preset`."""

from dataclasses import dataclass, replace

from server.engines.adapters import Adapter
from server.errors import ModelNotFound
from server.identity.principal import CURRENT
from server.requests.state import ServerState


@dataclass(frozen=True)
class ModelName:
    """A model name of a request, taken apart."""

    base: str
    preset: str | None
    adapter: Adapter | None = None


def parse_model(name: str, state: ServerState) -> ModelName:
    """
    Raises:
        ModelNotFound: `name` is neither the served model nor one of its adapters, nor one of these and `:preset`.
        PolicyViolation: this key may not ask it.
    """
    model = _parsed(name, state)
    for held in CURRENT.get().policies:
        held.check_model(model.base)
    return model


def _parsed(name: str, state: ServerState) -> ModelName:
    served = state.settings.model_name
    # The names of models may hold colons, those of adapters do not.
    for own in state.settings.model_names:
        if name == own:
            return ModelName(served, None)
        if name.startswith(f"{own}:") and name != f"{own}:":
            return ModelName(served, name[len(own) + 1:])
    base, _, preset = name.partition(":")
    adapter = None if state.engine.adapters is None else state.engine.adapters.get(base)
    if adapter is None or name.endswith(":"):
        raise ModelNotFound(f"there is no model {name[:100]!r}", param="model", fix=f"Use {served} or {served}:PRESET.")
    return ModelName(base, preset or None, adapter)


def serving(model: ModelName, state: ServerState) -> ServerState:
    """The state whose engine has the adapter on the model that the request names, if it names one."""
    return state if model.adapter is None else replace(state, engine=state.engine.on(model.adapter))

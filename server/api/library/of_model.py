"""What a job is run on: the query parameter `model`, which names the served model or one of its adapters."""

from typing import Annotated

from fastapi import Query

from server.requests.model_names import parse_model, serving
from server.requests.state import ServerState
from steering.language.errors import InvalidRequest

OfModel = Annotated[str | None, Query(max_length=256, description="What the job is run on: the model, or one of its "
                                      "adapters.")]


def served(name: str | None, state: ServerState) -> ServerState:
    """The state whose engine has the named adapter on the model.

    Raises:
        ModelNotFound: there is no such model. InvalidRequest: the name has a preset. PolicyViolation.
    """
    model = parse_model(state.settings.model_name if name is None else name, state)
    if model.preset is not None:
        raise InvalidRequest("a job is run on a model without a preset", param="model",
                             fix="Name the model, or one of its adapters.")
    return serving(model, state)

"""Requests for vocabulary lenses."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_client.completions import Steering, models, steering_field
from trimtab_client.flow import Call, Flow
from trimtab_client.models import LensReading
from trimtab_client.reading import reader


def lens(input: str | Sequence[int] | Sequence[Mapping[str, Any]], *, lens: str = "logit", layers: Any = "all",
         positions: Sequence[int] | None = (-1,), top_k: int = 5, groups: Mapping[str, Sequence[str]] | None = None,
         steering: Steering = None, model: str | None = None) -> Flow[LensReading]:
    """What each layer would say next. input: text, token ids or messages. lens: "logit" or a tuned lens of the
    library. positions: tokens to look at, None for all. groups: name -> spellings that count together."""
    if model is None:
        model = (yield models())[0]
    body: dict[str, Any] = {
        "model": model, "input": input if isinstance(input, str) else [
            dict(item) if isinstance(item, Mapping) else item for item in input],
        "lens": lens, "layers": layers, "positions": None if positions is None else list(positions), "top_k": top_k,
        "groups": {name: list(spellings) for name, spellings in (groups or {}).items()}}
    if steering is not None:
        body["steering"] = steering_field(steering)
    found: LensReading = yield Call("POST", "/v1/lens", reader(LensReading), json=body)
    return found

"""Requests for features of sparse autoencoders."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab_client.completions import Steering, models, steering_field
from trimtab_client.flow import Call, Flow
from trimtab_client.models import FeaturesReading
from trimtab_client.reading import reader


def features(artifact: str, input: str | Sequence[int] | Sequence[Mapping[str, Any]], *, layer: int | None = None,
             positions: Sequence[int] | None = None, top_k: int = 10, features: Sequence[int] = (),
             steering: Steering = None, model: str | None = None) -> Flow[FeaturesReading]:
    """Which features of an SAE are active in a text. input: text, token ids or messages. positions: tokens to look at,
    None for all. features: those whose values are told at every token."""
    if model is None:
        model = (yield models())[0]
    body: dict[str, Any] = {
        "model": model, "artifact": artifact, "input": input if isinstance(input, str) else [
            dict(item) if isinstance(item, Mapping) else item for item in input],
        "layer": layer, "positions": None if positions is None else list(positions), "top_k": top_k,
        "features": list(features)}
    if steering is not None:
        body["steering"] = steering_field(steering)
    found: FeaturesReading = yield Call("POST", "/v1/features", reader(FeaturesReading), json=body)
    return found

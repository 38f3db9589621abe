"""A body that is wrong in a million places is refused for the first few of them: no error per place is made."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError

from server.app import routed
from server.requests.schema import CompletionRequest
from vectors.extract import RECIPES

# Their lists end at the first fault, however long they are.
FAIL_FAST = {"CompletionRequest.prompt", "TextPair.positive", "TextPair.negative", "LensRequest.input",
             "DetokenizeRequest.tokens"}


def body_types() -> dict[str, Any]:
    routes = {route.body_field.field_info.annotation for route in routed().routes
              if isinstance(route, APIRoute) and route.body_field is not None}
    requests = (recipe.request for recipe in RECIPES.values())
    return {getattr(found, "__name__", str(found)): found for found in (*routes, *requests)}


def unbounded(schema: Any, path: str) -> Iterator[str]:
    """Places in a JSON schema that may hold a list of any length."""
    if isinstance(schema, Mapping):
        if schema.get("type") == "array" and "maxItems" not in schema:
            yield path
        for key, value in schema.items():
            if key == "$defs":
                continue
            yield from unbounded(value, path if key in ("anyOf", "items", "oneOf", "properties") else f"{path}.{key}")
    elif isinstance(schema, list):
        for value in schema:
            yield from unbounded(value, path)


def test_every_list_is_bounded_or_ends_at_its_first_fault() -> None:
    loose = set()
    for name, annotation in body_types().items():
        schema = TypeAdapter(annotation).json_schema()
        for place, part in ((name, schema), *schema.get("$defs", {}).items()):
            loose |= set(unbounded(part, place))
    assert loose - FAIL_FAST == set()


@pytest.mark.parametrize("prompt", [["x"] * 100_000 + [1], [["x"] * 100_000], [1] * 100_000 + ["x"], [[]] * 100_000])
def test_a_prompt_of_many_faults_has_few_complaints(prompt: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": prompt})
    assert caught.value.error_count() < 10


def test_the_walk_finds_what_it_looks_for() -> None:
    class Loose(BaseModel):
        names: list[str] | None = None

    assert set(unbounded(Loose.model_json_schema(), "Loose")) == {"Loose.names"}

"""A body that is wrong in a million places is refused for the first few of them: no error per place is made."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError

from server.api.lens import LensRequest
from server.api.validation import invalid
from server.app import routed
from server.requests.schema import CompletionRequest
from steering.language.errors import path_text
from vectors.extract import RECIPES

# Their lists end at the first fault, however long they are.
FAIL_FAST = {"CompletionRequest.prompt", "TextPair.positive", "TextPair.negative", "LensRequest.input",
             "FeaturesRequest.input", "CaptureBody.input", "DetokenizeRequest.tokens", "StackCheckBody.prompts"}


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


def test_a_name_of_one_form_is_not_unknown_in_another() -> None:
    """Layers may be a range or a share of the depth, and each form forbids the other's names."""
    found = {}
    for layers in ({"stop": 99_999}, {"stop": 1.5}, {"start": 1}, {"depth": [0.5]}, {"end": 3}):
        value = {"model": "m", "input": "x", "layers": layers}
        with pytest.raises(ValidationError) as caught:
            LensRequest.model_validate(value)
        error = invalid(caught.value.errors(), value, LensRequest)
        found[str(layers)] = path_text(error.path), error.message
    assert found == {
        "{'stop': 99999}": ("layers.stop", "should be less than or equal to 4096"),
        "{'stop': 1.5}": ("layers.stop", "should be a valid integer"),
        "{'start': 1}": ("layers.stop", "the field is required"),
        "{'depth': [0.5]}": ("layers.depth[1]", "the field is required"),
        "{'end': 3}": ("layers.end", "unknown field 'end'")}


@pytest.mark.parametrize(("fields", "param", "message"), [
    ({"draws": 1}, "draws", "should be greater than or equal to 20"),
    ({"layers": {"stop": 99_999}}, "layers.stop", "should be less than or equal to 4096"),
    ({"drows": 20}, "drows", "unknown field 'drows'")])
async def test_fields_of_a_method_are_refused_as_those_of_other_bodies(client: Any, fields: dict[str, Any], param: str,
                                                                      message: str) -> None:
    answer = await client.post("/v1/extract/mean_difference", json={"name": "a", "pairs": [], **fields})
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["message"].partition(". ")[0]) == (param, message)

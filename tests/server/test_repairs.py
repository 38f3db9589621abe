"""Errors show the form that works. What an error says to write is written here, and must be taken."""

import json
import re
from copy import deepcopy
from typing import Any

import httpx
import pytest
import torch

from server.api.repairs import MOST_NODES
from server.requests.schema import ChatRequest
from steering.artifacts.payload import Payload
from tests.server.conftest import MODEL, chat
from vectors.artifact import Metadata
from vectors.library import Library

URL = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _stored(library: Library) -> None:
    for name in ("calm", "warm", "harmful"):
        library.create(Metadata(name=name, kind="vector", op="add", site="resid_post", layers=[2]),
                       Payload.build("vector", {2: {"vector": torch.ones(8)}}))


def one(**fields: Any) -> dict[str, Any]:
    return {"interventions": [{"artifact": "calm", **fields}]}


@pytest.mark.parametrize(("steering", "param", "written"), [
    (one(strength="2"), "steering.interventions[0].strength", '"strength": 2'),
    (one(strength="1.5rel"), "steering.interventions[0].strength", '"strength": {"value": 1.5, "unit": "rel"}'),
    (one(strength="0.5 kl"), "steering.interventions[0].strength", '"strength": {"kl": 0.5}'),
    (one(strength={"value": "2"}), "steering.interventions[0].strength.value", '"value": 2'),
    (one(layers=3), "steering.interventions[0].layers", '"layers": [3]'),
    (one(layers="1,2"), "steering.interventions[0].layers", '"layers": [1, 2]'),
    (one(layers="1-3"), "steering.interventions[0].layers", '"layers": {"start": 1, "stop": 4}'),
    (one(layers=[2.0]), "steering.interventions[0].layers[0]", "2"),
    (one(gate="harmful"), "steering.interventions[0].gate", '"gate": {"probe": "harmful"}'),
    ("calm", "steering", '"steering": {"artifact": "calm"}'),
    (["calm", "warm"], "steering",
     '"steering": {"interventions": [{"artifact": "calm"}, {"artifact": "warm"}]}'),
    ({"interventions": {"artifact": "calm"}}, "steering.interventions", '"interventions": [{"artifact": "calm"}]'),
    ({"interventions": "calm"}, "steering.interventions", '"interventions": [{"artifact": "calm"}]'),
    ({"interventions": ["calm"]}, "steering.interventions[0]", '{"artifact": "calm"}'),
    ({"artifact": "calm", "layers": [3]}, "steering.layers",
     '"steering": {"interventions": [{"artifact": "calm", "layers": [3]}]}'),
    ({"artifact": "calm", "required": "true"}, "steering.required", '"required": true'),
    ({"preset": ["soft"]}, "steering.preset", '"preset": "soft"'),
    ({"monitor": "harmful"}, "steering.monitor", '"monitor": [{"artifact": "harmful"}]'),
])
async def test_the_fix_is_json_that_is_taken(client: httpx.AsyncClient, steering: Any, param: str,
                                             written: str) -> None:
    body = chat(steering=steering)
    error = (await client.post(URL, json=body)).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_spec", param)
    assert error["message"].endswith(f"Write {written}."), error["message"]
    # Written where the fix says, it means something; whether the artifact can do that is another question.
    ChatRequest.model_validate(_repaired(body, param, written))


def _repaired(body: dict[str, Any], param: str, written: str) -> dict[str, Any]:
    path: list[str | int] = [int(part) if part.isdigit() else part for part in re.findall(r"[a-z_]+|\d+", param)]
    body, (name, value) = deepcopy(body), (None, json.loads(written)) if not re.match(r'"\w+": ', written) else \
        next(iter(json.loads(f"{{{written}}}").items()))
    while name is not None and path[-1] != name:
        path.pop()
    node: Any = body
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return body


@pytest.mark.parametrize(("field", "value", "written"), [
    ("temperature", "0.5", '"temperature": 0.5'), ("max_tokens", "5", '"max_tokens": 5'),
    ("messages", "hi", '"messages": [{"role": "user", "content": "hi"}]')])
async def test_other_fields_too(client: httpx.AsyncClient, field: str, value: Any, written: str) -> None:
    error = (await client.post(URL, json=chat() | {field: value})).json()["error"]
    assert error["param"] == field and error["message"].endswith(f"Write {written}.")


@pytest.mark.parametrize("steering", [one(strength="strong"), one(layers={"from": 3}), one(scope="prompt"),
                                      one(strength=[1, 2]), {"report": "all"}])
async def test_nothing_is_shown_that_would_not_be_taken(client: httpx.AsyncClient, steering: Any) -> None:
    message = (await client.post(URL, json=chat(steering=steering))).json()["error"]["message"]
    assert "Write" not in message


async def test_a_long_request_is_not_tried_again(client: httpx.AsyncClient) -> None:
    vectors = {str(layer): [0.0] * 8 for layer in range(MOST_NODES // 8)}
    steering = {"interventions": [{"op": "add", "inline": {"vector": vectors}, "strength": "2"}]}
    error = (await client.post(URL, json=chat(steering=steering))).json()["error"]
    assert error["param"] == "steering.interventions[0].strength" and "Write" not in error["message"]


async def test_a_preset_shows_the_long_form(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/presets", json={"name": "soft", "spec": {"artifact": "calm"}})
    assert '"spec": {"interventions": [{"artifact": "calm"}]}' in answer.json()["error"]["message"]


@pytest.mark.parametrize(("steering", "param", "fix"), [
    ({"artifact": "clam"}, "steering.artifact", "Did you mean calm?"),
    ({"artifact": "calm@7"}, "steering.artifact", "There is calm@1."),
    (one(gate={"probe": "harmfull"}), "steering.interventions[0].gate.probe", "Did you mean harmful?"),
    ({"preset": "sofd"}, "steering.preset", "Did you mean soft?"),
    ({"monitor": ["harmfu"]}, "steering.monitor[0]", "Did you mean harmful or warm?"),
])
async def test_a_name_that_does_not_exist_brings_the_nearest(client: httpx.AsyncClient, steering: Any, param: str,
                                                             fix: str) -> None:
    await client.post("/v1/presets", json={"name": "soft", "spec": one()})
    error = (await client.post(URL, json=chat(steering=steering))).json()["error"]
    assert (error["code"], error["param"]) == ("not_found", param) and error["message"].endswith(fix)
    alone = (await client.get("/v1/artifacts/warn")).json()["error"]["message"]
    assert alone.endswith("Did you mean warm?")
    assert "Did you mean" not in (await client.get("/v1/artifacts/xyzzy")).json()["error"]["message"]


async def test_a_model_name_brings_the_nearest_preset(client: httpx.AsyncClient) -> None:
    await client.post("/v1/presets", json={"name": "soft", "spec": one()})
    error = (await client.post(URL, json=chat() | {"model": f"{MODEL}:sofd"})).json()["error"]
    assert "soft" in error["message"] and error["param"] == "model"

"""Massive activations as a server tells of them: in its capabilities, and in receipts of requests that touch them."""

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
import torch

from server.engines.data import Captured, CaptureRequest
from tests.server.conftest import chat
from tests.server.scripted import LAYERS, WIDTH, ScriptedEngine

DIM, VALUE = 2, 5000.0
LATER = {"prompt": {"exclude": {"positions": [0]}}}


@pytest.fixture
def engine(vocabulary: Any) -> ScriptedEngine:
    """It has a massive entry at the first position of layers 1 and 2."""
    made = ScriptedEngine(vocabulary)
    plain = made.capture

    async def capture(requests: Sequence[CaptureRequest], program: Any = None) -> list[Captured]:
        found = await plain(requests, program)
        for one in found:
            for layer, h in one.get("resid_post", {}).items():
                h.copy_(torch.sign(h) + (h == 0))
                if layer in (1, 2):
                    h[0, DIM] = VALUE
        return found

    made.capture = capture  # type: ignore[method-assign]
    return made


def vector(*sizes: float) -> dict[str, Any]:
    return {"op": "add", "inline": {"vector": {"1": [*sizes, *[0.0] * (WIDTH - len(sizes))]}}}


async def test_capabilities_tell_dims_layers_and_norms(client: httpx.AsyncClient) -> None:
    told = (await client.get("/v1/capabilities")).json()["massive_activations"]
    assert set(told["layers"]) == {"1", "2"} and told["layers"]["1"]["first"] == {str(DIM): VALUE}
    assert told["layers"]["1"]["every"] == {} and told["layers"]["1"]["ratio"] == pytest.approx(VALUE)
    assert told["layers"]["1"]["first_norm"] == pytest.approx(VALUE, rel=1e-3)
    assert told["layers"]["1"]["norm"] == pytest.approx(WIDTH**0.5, rel=1e-3)
    assert told["texts"] == 10 and told["tokens"] == []


async def warnings(client: httpx.AsyncClient, *interventions: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await client.post("/v1/chat/completions", json=chat(steering={"interventions": list(interventions)}))
    found: list[dict[str, Any]] = answer.json()["steering"]["warnings"]
    return found


async def test_receipts_warn_of_the_first_position_and_of_dims(client: httpx.AsyncClient) -> None:
    first = await warnings(client, {**vector(1.0), "scope": LATER}, vector(1.0))
    assert [(one["code"], one["intervention"]) for one in first] == [("massive", 1)]
    assert "first position is steered at layer 1" in first[0]["message"]
    [along] = await warnings(client, {**vector(0.0, 0.0, 1.0), "scope": LATER})
    assert along["code"] == "massive" and f"dims {DIM} at layer 1: 100 %" in along["message"]
    assert await warnings(client, {**vector(1.0), "strength": 0}) == []
    elsewhere = {"op": "add", "inline": {"vector": {str(LAYERS - 1): [1.0] * WIDTH}}}
    assert await warnings(client, elsewhere) == []

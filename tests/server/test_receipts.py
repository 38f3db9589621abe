"""The receipt where clients drop fields they do not know: in headers, by id for a while, and as a demand."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.requests.kept_receipts import KeptReceipts
from server.requests.receipt import Receipt
from server.requests.told import LONGEST, told_of
from server.settings import Settings
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
VECTOR = {"op": "add", "inline": {"vector": {"1": [1.0] * 8}}}
SPEC = {"interventions": [VECTOR]}
ZERO = {"interventions": [{**VECTOR, "strength": 0}]}


def plain(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hi", "max_tokens": 8, **fields}


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat), (COMPLETE, plain)])
async def test_headers_tell_what_was_applied(client: httpx.AsyncClient, path: str, body: Any) -> None:
    answer = await client.post(path, json=body(steering=SPEC))
    tokens = answer.json()["steering"]["applied"][0]["tokens"]
    assert tokens["prompt"] > 0
    assert answer.headers["X-Trimtab-Applied"] == (
        f'"inline";op=add;prompt={tokens["prompt"]};generation={tokens["generation"]}')
    streamed = await client.post(path, json=body(steering=SPEC, stream=True))
    assert streamed.headers["X-Trimtab-Applied"] == '"inline";op=add'
    unsteered = await client.post(path, json=body())
    assert unsteered.headers["X-Trimtab-Applied"] == "none"
    await client.put("/v1/admin/kill-switch", json={"on": True})
    for stream in (False, True):
        held = await client.post(path, json=body(steering=SPEC, stream=stream))
        assert held.headers["X-Trimtab-Applied"] == "disabled"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_receipt_can_be_had_by_every_id_of_its_answer(client: httpx.AsyncClient, stream: bool) -> None:
    for path, body in ((CHAT, chat), (COMPLETE, plain)):
        answer = await client.post(path, json=body(steering=SPEC, stream=stream))
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        last = events[-1] if stream else answer.json()
        for known in (answer.headers["X-Trimtab-Request"], last["id"]):
            found = await client.get(f"/v1/receipts/{known}")
            assert (found.status_code, found.json()) == (200, last["steering"])


async def test_what_is_not_kept_is_not_found(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/receipts/req-0123")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_the_clients_own_id_is_kept_and_finds_nothing(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT, json=chat(), headers={"X-Request-ID": "trace-7/a"})
    assert answer.headers["X-Request-ID"] == "trace-7/a"
    assert answer.headers["X-Trimtab-Request"].startswith("req-")
    assert (await client.get("/v1/receipts/trace-7")).status_code == 404
    for odd in ("a b", "x" * 129, 'a"', ""):
        answer = await client.post(CHAT, json=chat(), headers={"X-Request-ID": odd})
        assert answer.headers["X-Request-ID"] == answer.headers["X-Trimtab-Request"]


def receipt(*names: str) -> Receipt:
    return Receipt.model_validate({
        "disabled": False, "engine": "x", "report": "none", "applied": [
            {"artifact": name, "source": "request", "op": "add", "sites": ["resid_post"], "layers": [1], "strength": {},
             "options": {}, "tokens": {"prompt": 3, "generation": 1}, "choices": []} for name in names]})


def test_many_interventions_do_not_make_a_head_that_clients_refuse() -> None:
    few = told_of(receipt("a@1", "b@2"))["X-Trimtab-Applied"]
    assert few == '"a@1";op=add;prompt=3;generation=1, "b@2";op=add;prompt=3;generation=1'
    many = told_of(receipt(*[f"{'n' * 60}@{i}" for i in range(96)]))["X-Trimtab-Applied"]
    *listed, last = many.split(", ")
    assert len(many) < LONGEST + 32 and last == f"more;count={96 - len(listed)}"


def test_what_is_kept_is_bounded_in_time_and_in_bytes() -> None:
    now = 0.0
    size = len(receipt("a@1").model_dump_json(exclude_unset=True))
    kept = KeptReceipts(most_bytes=4 * size, seconds=10, now=lambda: now)
    for i in range(6):
        kept.keep(f"req-{i}", receipt("a@1"))
    assert [kept.find(f"req-{i}") is not None for i in range(6)] == [False, False, True, True, True, True]
    assert kept.nbytes == 4 * size
    kept.keep("req-large", receipt("a@1", "b@1"))
    assert kept.find("req-large") is None and kept.find("req-5") is not None
    kept.keep("req-5", receipt("b@1"))
    assert b"b@1" in (kept.find("chatcmpl-5") or b"") and kept.nbytes == 4 * size
    now = 10.0
    assert kept.find("req-5") is None and (len(kept), kept.nbytes) == (0, 0)


async def test_a_request_can_demand_to_be_steered(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for path, body in ((CHAT, chat), (COMPLETE, plain)):
        assert (await client.post(path, json=body(steering={**SPEC, "required": True}))).status_code == 200
        for nothing in ({}, ZERO, {"default": "none"}):
            answer = await client.post(path, json=body(steering={**nothing, "required": True}))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "not_steered", "steering.required")
        assert (await client.post(path, json=body(steering=ZERO))).status_code == 200
    await client.put("/v1/admin/kill-switch", json={"on": True})
    answer = await client.post(CHAT, json=chat(steering={**SPEC, "required": True}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "steering_disabled")
    assert (await client.post(CHAT, json=chat(steering=SPEC))).status_code == 200


class TestWhereTheServerDemandsIt:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", require_steering=True)

    async def test_every_completion_needs_it(self, client: httpx.AsyncClient) -> None:
        for path, body in ((CHAT, chat), (COMPLETE, plain)):
            for nothing in ({}, {"steering": ZERO}, {"steering": {"default": "none"}}):
                error = (await client.post(path, json=body(**nothing))).json()["error"]
                assert (error["code"], error["param"]) == ("not_steered", "steering")
            assert (await client.post(path, json=body(steering=SPEC))).status_code == 200
        await client.put("/v1/admin/default-spec", json=SPEC)
        assert (await client.post(CHAT, json=chat())).status_code == 200

    async def test_the_kill_switch_is_no_outage(self, client: httpx.AsyncClient) -> None:
        await client.put("/v1/admin/kill-switch", json={"on": True})
        answer = await client.post(CHAT, json=chat())
        assert answer.json()["steering"]["disabled"]

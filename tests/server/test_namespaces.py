"""Namespaces: what a tenant makes and names is there for itself alone, whichever way another one asks."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from server.api.route import StrictRoute
from server.app import routed
from server.background.job import FINISHED
from server.identity.roles import NEEDED, OF_ALL_TENANTS, OPEN
from server.settings import Settings
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_keys import OWNER, bearer, code, make
from tests.server.test_steering import _spec, store
from vectors.library import Library
from vectors.library.audit.notes import ACTOR, Actor
from vectors.library.spaces import READER, Reader

URL = "/v1/chat/completions"
# Of the tenant whose things must not be seen; no answer to another one may hold it.
SECRET = "zebra"
MINE, THEIRS, NONE = f"acme/{SECRET}", f"acme/{SECRET}", "acme/nobody"
ROLES = ("infer", "infer_raw", "library_read", "library_write", "jobs", "metrics", "operate")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"))


@contextmanager
def acting(tenant: str) -> Iterator[None]:
    """Work in this context is done for a key of the tenant."""
    reader, actor = READER.set(Reader(tenant)), ACTOR.set(Actor("k", "k", tenant))
    try:
        yield
    finally:
        READER.reset(reader)
        ACTOR.reset(actor)


@pytest.fixture
def stored(library: Library) -> Iterator[Library]:
    store(library, "plain")
    store(library, "shared/calm")
    library.presets.create("shared/soft", _spec("shared/calm"))
    with acting("acme"):
        for value in (1.0, 2.0):
            store(library, MINE, value)
        library.set_alias(MINE, "beta", 1)
        library.presets.create(MINE, _spec(MINE))
        library.presets.set_alias(MINE, "beta", 1)
        library.evaluations.add("eval-acme", datetime.now(UTC), [f"{MINE}@1"], SUMMARY, REPORT)
    yield library


class Tenants:
    """Two tenants, and what the first one has made."""

    def __init__(self, client: httpx.AsyncClient, acme: dict[str, Any], other: dict[str, Any], app: FastAPI) -> None:
        self.client, self.app = client, app
        self.acme, self.other = bearer(acme), bearer(other)
        self.ids: dict[str, str] = {}

    async def prepare(self) -> None:
        """One of each thing that has an id."""
        answer = (await self.ask(self.acme, "POST", URL, chat(steering={"artifact": MINE}))).json()
        self.ids["request_id"] = answer["id"]
        told = (await self.ask(self.acme, "POST", "/v1/responses", {"model": MODEL, "input": "hi"})).json()
        self.ids["response_id"] = told["id"]
        line = json.dumps({"custom_id": "a", "method": "POST", "url": URL, "body": chat()})
        file = await self.client.post("/v1/files", headers=self.acme, data={"purpose": "batch"},
                                      files={"file": (f"{SECRET}.jsonl", line.encode())})
        self.ids["file_id"] = file.json()["id"]
        batch = await self.ask(self.acme, "POST", "/v1/batches", {
            "input_file_id": self.ids["file_id"], "endpoint": URL, "metadata": {"about": SECRET}})
        self.ids["batch_id"] = batch.json()["id"]
        with acting("acme"):
            self.ids["job"] = self.app.state.server.jobs.submit("extract", _nothing, about=SECRET).id
        self.ids["evaluation"] = "eval-acme"
        capture = await self.ask(self.acme, "POST", "/v1/activations", {
            "model": MODEL, "input": ["hi"], "sites": {"resid_post": [1]}, "steering": {"artifact": MINE}})
        job = capture.json()
        while job["status"] not in FINISHED:
            await asyncio.sleep(0.005)
            job = (await self.ask(self.acme, "GET", f"/v1/jobs/{job['id']}")).json()
        self.ids["activations"] = job["result"]["id"]
        rollout = await self.ask(self.acme, "POST", "/v1/admin/rollouts", {
            "collection": "artifact", "target": f"{MINE}@beta", "candidate": 2, "steps": [{"share": 0.5}]})
        assert rollout.status_code == 201, rollout.text
        self.ids["rollout"] = rollout.json()["id"]

    async def ask(self, who: dict[str, str], method: str, path: str, body: Any = None) -> httpx.Response:
        return await self.client.request(method, path, headers=who, json=body)


async def _nothing(control: Any) -> dict[str, Any]:
    return {"artifact": SECRET}


@pytest.fixture
async def tenants(client: httpx.AsyncClient, app: FastAPI, stored: Library) -> Tenants:
    found = Tenants(client, await make(client, *ROLES, tenant="acme"), await make(client, *ROLES, tenant="other"), app)
    await found.prepare()
    return found


SUMMARY: dict[str, Any] = {"about": SECRET}
REPORT = "{}"
ALIAS = {"version": 1}
EVALUATION = {"prompts": ["a"], "graders": [{"kind": "whole"}], "draws": 0}
# By the route's name: the value of its parameter as this tenant's, and one that does not exist, with a body.
IN_PATH: dict[str, tuple[str, str, Any]] = {
    **dict.fromkeys(("show_artifact", "download_artifact", "show_calibration", "draw_calibration", "draw_trial",
                     "delete_artifact", "show_preset", "delete_preset"), (THEIRS, NONE, None)),
    **dict.fromkeys(("list_versions", "remove_alias", "list_preset_versions", "remove_preset_alias"),
                    (THEIRS, NONE, None)),
    **dict.fromkeys(("set_alias", "set_preset_alias"), (THEIRS, NONE, ALIAS)),
    "patch_artifact": (THEIRS, NONE, {"description": "mine now"}),
    "create_calibration": (THEIRS, NONE, {"prompts": ["a"] * 8}),
    "create_tuning": (THEIRS, NONE, {}),
    "create_port": (THEIRS, NONE, {"name": "other/mine", "source": "act-" + "0" * 24}),
    "show_model": (f"{MODEL}:{THEIRS}", f"{MODEL}:{NONE}", None),
    **dict.fromkeys(("show_receipt",), ("request_id", "req-0", None)),
    **dict.fromkeys(("show_response", "delete_response", "cancel_response"), ("response_id", "resp_0", None)),
    **dict.fromkeys(("show_file", "file_content", "delete_file"), ("file_id", "file-" + "0" * 24, None)),
    **dict.fromkeys(("show_batch", "cancel_batch"), ("batch_id", "batch_" + "0" * 24, None)),
    **dict.fromkeys(("show_job", "cancel_job"), ("job", "job-" + "0" * 24, None)),
    **dict.fromkeys(("show_evaluation", "show_evaluation_report", "draw_evaluation", "delete_evaluation"),
                    ("evaluation", "eval-none", None)),
    **dict.fromkeys(("show_rollout", "publish_rollout", "promote_rollout", "delete_rollout"),
                    ("rollout", "rollout-" + "0" * 24, None)),
    "return_rollout": ("rollout", "rollout-" + "0" * 24, {"why": "a"}),
    **dict.fromkeys(("show_activations", "activations_content", "delete_activations"),
                    ("activations", "act-" + "0" * 24, None)),
}
# Parameters of a path that name nothing of a tenant.
NAMELESS = {"create_by_method", "asset"}
OTHERS = {"alias": "beta", "format": "png", "method": "mean_difference"}


def routes() -> list[StrictRoute]:
    """Those that other keys than an administrator's may ask."""
    return [route for route in routed().routes if isinstance(route, StrictRoute) and route.needed != "admin"]


def named(route: StrictRoute, method: str, value: str) -> str:
    path = route.path_format
    for parameter in route.dependant.path_params:
        path = path.replace(f"{{{parameter.name}}}", OTHERS.get(parameter.name, value))
    return path


def test_every_route_with_a_name_in_its_path_is_walked() -> None:
    assert {route.name for route in routes() if route.dependant.path_params} == set(IN_PATH) | NAMELESS
    assert set(NEEDED) >= set(IN_PATH)


async def test_what_another_tenant_has_is_as_if_it_did_not_exist(tenants: Tenants) -> None:
    """Byte for byte the same answer, but for the name that was asked for; and nothing was changed by asking."""
    for route in routes():
        if not route.dependant.path_params or route.name in NAMELESS:
            continue
        theirs, none, body = IN_PATH[route.name]
        theirs = tenants.ids.get(theirs, theirs)
        method = next(iter(route.methods))
        found = await tenants.ask(tenants.other, method, named(route, method, theirs), body)
        missing = await tenants.ask(tenants.other, method, named(route, method, none), body)
        assert found.status_code == missing.status_code == 404, (route.name, found.text, missing.text)
        asked, absent = theirs.removeprefix(f"{MODEL}:"), none.removeprefix(f"{MODEL}:")
        assert found.text.replace(asked, "X") == missing.text.replace(absent, "X"), route.name
    # The control: their owner is answered, and everything is still there.
    for route in routes():
        if route.name in ("show_artifact", "show_preset", "show_model", "show_receipt", "show_response", "show_file",
                          "file_content", "show_batch", "show_job", "show_activations",
                          "activations_content", "list_versions", "download_artifact"):
            value = tenants.ids.get(IN_PATH[route.name][0], IN_PATH[route.name][0])
            answer = await tenants.ask(tenants.acme, "GET", named(route, "GET", value))
            assert answer.status_code == 200, (route.name, answer.text)
    listed = await tenants.ask(tenants.acme, "GET", f"/v1/artifacts/{MINE}/versions")
    assert [one["ref"] for one in listed.json()["data"]] == [f"{MINE}@2", f"{MINE}@1"]
    assert listed.json()["data"][1]["aliases"] == ["beta"] and listed.json()["data"][0]["description"] == ""
    for who in (tenants.acme, OWNER):
        assert (await tenants.ask(who, "GET", f"/v1/jobs/{tenants.ids['job']}")).status_code == 200


def bodies(artifact: str, preset: str) -> dict[str, tuple[str, str, Any]]:
    """Requests that name something in their body, in every field that can."""
    step = {"interventions": [{"artifact": artifact}]}
    gated = {"interventions": [{"artifact": "plain", "gate": {"probe": artifact}}]}
    messages = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    return {
        "artifact": ("POST", URL, chat(steering=step)), "short": ("POST", URL, chat(steering={"artifact": artifact})),
        "gate": ("POST", URL, chat(steering=gated)), "monitor": ("POST", URL, chat(steering={"monitor": [artifact]})),
        "preset": ("POST", URL, chat(steering={"preset": preset})),
        "model": ("POST", URL, chat() | {"model": f"{MODEL}:{preset}"}),
        "completions": ("POST", "/v1/completions", {"model": MODEL, "prompt": "hi", "steering": step}),
        "responses": ("POST", "/v1/responses", {"model": MODEL, "input": "hi", "steering": step}),
        "messages": ("POST", "/v1/messages", messages | {"steering": step}),
        "count_tokens": ("POST", "/v1/messages/count_tokens", {
            key: value for key, value in messages.items() if key != "max_tokens"} | {"model": f"{MODEL}:{preset}"}),
        "lens": ("POST", "/v1/lens", {"model": MODEL, "input": "hi", "steering": step}),
        "activations": ("POST", "/v1/activations", {
            "model": MODEL, "input": ["hi"], "sites": {"resid_post": [1]}, "steering": step}),
        "checked": ("POST", "/v1/checks/patch", {
            "site": "mlp_act", "layer": 1, "artifact": artifact,
            "pairs": [{"base": "a", "source": "b", "base_answer": "c", "source_answer": "d"}]}),
        "checked stack": ("POST", "/v1/specs/check", {"steering": step}),
        "checked preset": ("POST", "/v1/specs/check", {"steering": {"preset": preset}}),
        "lens artifact": ("POST", "/v1/lens", {"model": MODEL, "input": "hi", "lens": artifact}),
        "features": ("POST", "/v1/features", {"model": MODEL, "input": "hi", "artifact": artifact}),
        "monitored feature": ("POST", "/v1/completions", {
            "model": MODEL, "prompt": "hi", "max_tokens": 1, "steering": {"monitor": [
                {"artifact": artifact, "feature": 1}]}}),
        "evaluated spec": ("POST", "/v1/evaluations", EVALUATION | {"spec": step}),
        "evaluated preset": ("POST", "/v1/evaluations", EVALUATION | {"preset": preset}),
        "stored spec": ("POST", "/v1/presets", {"name": "other/p", "spec": step}),
        "default spec": ("PUT", "/v1/admin/default-spec", step),
        "default preset": ("PUT", "/v1/admin/default-spec", {"preset": preset}),
    }


def _patch(source: str) -> dict[str, Any]:
    scope = {"prompt": {"positions": [-1]}, "generation": "none"}
    return {"interventions": [{"op": "patch", "options": {"source": source, "row": 0}, "scope": scope}]}


async def test_a_name_in_a_body_is_as_if_it_did_not_exist(tenants: Tenants) -> None:
    missing = bodies(NONE, NONE)
    for what, (method, path, body) in bodies(THEIRS, THEIRS).items():
        found = await tenants.ask(tenants.other, method, path, body)
        none = await tenants.ask(tenants.other, method, path, missing[what][2])
        assert found.status_code == none.status_code and found.status_code in (400, 404, 200), (what, found.text)
        assert (found.status_code == 200) == (what == "count_tokens"), (what, found.text)
        assert found.text.replace(THEIRS, "X") == none.text.replace(NONE, "X"), what
    for field, path, theirs, none in (
            ("previous_response_id", "/v1/responses", tenants.ids["response_id"], "resp_0"),
            ("input_file_id", "/v1/batches", tenants.ids["file_id"], "file-" + "0" * 24)):
        body = {"model": MODEL, "input": "hi"} if field.startswith("previous") else {"endpoint": URL}
        found = await tenants.ask(tenants.other, "POST", path, body | {field: theirs})
        missed = await tenants.ask(tenants.other, "POST", path, body | {field: none})
        assert found.status_code == missed.status_code == 404, (field, found.text)
        assert found.text.replace(theirs, "X") == missed.text.replace(none, "X")
    found, missed = [await tenants.ask(tenants.other, "POST", "/v1/artifacts/shared/calm/port", {
        "name": "other/mine", "source": id}) for id in (tenants.ids["activations"], "act-" + "0" * 24)]
    assert found.status_code == missed.status_code == 404, found.text
    assert found.text.replace(tenants.ids["activations"], "X") == missed.text.replace("act-" + "0" * 24, "X")
    found, missed = [await tenants.ask(tenants.other, "POST", URL, chat(steering=_patch(id)))
                     for id in (tenants.ids["activations"], "act-" + "0" * 24)]
    assert found.status_code == missed.status_code == 404, found.text
    assert found.text.replace(tenants.ids["activations"], "X") == missed.text.replace("act-" + "0" * 24, "X")
    # The control: their owner may.
    own = await tenants.ask(tenants.acme, "POST", URL, chat(steering=_patch(tenants.ids["activations"])))
    assert own.status_code == 200, own.text
    for what in ("artifact", "preset", "model", "completions"):
        method, path, body = bodies(THEIRS, THEIRS)[what]
        assert (await tenants.ask(tenants.acme, method, path, body)).status_code == 200, what


async def test_lists_show_nothing_of_another_tenant(tenants: Tenants) -> None:
    walked = 0
    queries = {"list_evaluations": f"?ref={MINE}@1", "list_receipts": f"?artifact={MINE}",
               "list_effects": f"?artifact={MINE}@1", "list_artifacts": f"?q={SECRET}&all=true",
               "list_presets": f"?q={SECRET}&all=true"}
    for route in routes():
        if route.dependant.path_params or "GET" not in route.methods or route.name == "follow_live":
            continue
        for query in {"", queries.get(route.name, "")}:
            answer = await tenants.ask(tenants.other, "GET", route.path_format + query)
            if route.name in OF_ALL_TENANTS:
                assert code(answer) == (403, "not_permitted"), route.name
                continue
            assert answer.status_code == 200, (route.name, answer.text)
            # Some answers say again what was asked for.
            assert SECRET not in answer.text, (route.name, answer.text)
            assert not any(one in answer.text for one in tenants.ids.values()), route.name
            walked += route.needed != OPEN
    assert walked >= 15
    # The control: the tenant itself sees them.
    for path in ("/v1/artifacts", "/v1/presets", "/v1/models", "/v1/jobs", "/v1/files", "/v1/batches", "/v1/receipts",
                 "/v1/activations"):
        assert SECRET in (await tenants.ask(tenants.acme, "GET", path)).text, path
    # A page that begins behind something of another tenant does not begin there.
    for path, id in (("/v1/files", tenants.ids["file_id"]), ("/v1/batches", tenants.ids["batch_id"])):
        answer = await tenants.ask(tenants.other, "GET", f"{path}?after={id}")
        assert code(answer) == (400, "invalid_request")


async def test_no_suggestion_holds_a_name_of_another_tenant(tenants: Tenants) -> None:
    for asked in (f"acme/{SECRET}s", f"{SECRET}", f"other/{SECRET}"):
        for kind in ("artifacts", "presets"):
            message = (await tenants.ask(tenants.other, "GET", f"/v1/{kind}/{asked}")).json()["error"]["message"]
            assert "Did you mean" not in message, message
    mine = (await tenants.ask(tenants.acme, "GET", f"/v1/artifacts/acme/{SECRET}s")).json()["error"]["message"]
    assert f"Did you mean {MINE}?" in mine


async def test_who_may_write_which_names(tenants: Tenants) -> None:
    metadata = {"kind": "vector", "op": "add", "site": "resid_post"}

    async def create(who: dict[str, str], name: str) -> tuple[int, str | None]:
        body = {"metadata": metadata | {"name": name}, "tensors": {"2": {"vector": [1.0] * 8}}}
        answer = await tenants.ask(who, "POST", "/v1/artifacts", body)
        return answer.status_code, answer.json().get("error", {}).get("code")

    house = bearer(await make(tenants.client, *ROLES, name="house"))
    refused = (403, "foreign_name")
    for name, other, default in (("other/new", (201, None), refused), ("new", refused, (201, None)),
                                 ("shared/new", refused, (201, None)), ("default/new", refused, (201, None)),
                                 (MINE, refused, refused), (NONE, refused, refused)):
        assert await create(tenants.other, name) == other, name
        assert await create(house, name) == default, name
        assert await create(OWNER, name) == (201, None), name
    assert (await create(OWNER, "acme/versions"))[0] == 400
    assert (await create(OWNER, "a/b/c"))[0] == 400
    # What all can read, not all can change.
    for method, path, body in (("DELETE", "/v1/artifacts/plain", None),
                               ("PATCH", "/v1/artifacts/plain", {"tags": ["a"]}),
                               ("PUT", "/v1/artifacts/shared/calm/aliases/beta", ALIAS),
                               ("DELETE", "/v1/presets/shared/soft", None),
                               ("POST", "/v1/presets", {"name": "mine", "spec": {"interventions": []}}),
                               ("POST", "/v1/artifacts/plain/calibrate", {"prompts": ["a"] * 8})):
        answer = await tenants.ask(tenants.other, method, path, body)
        assert code(answer) == refused, (path, answer.text)
    for path in ("/v1/artifacts/plain", "/v1/artifacts/shared/calm", "/v1/artifacts/shared%2Fcalm/versions",
                 "/v1/presets/shared/soft"):
        assert (await tenants.ask(tenants.other, "GET", path)).status_code == 200, path
    used = await tenants.ask(tenants.other, "POST", URL, chat(steering={"preset": "shared/soft", "artifact": "plain"}))
    assert [one["artifact"] for one in used.json()["steering"]["applied"]] == ["shared/calm@1", "plain@1"]
    # No tenant may be called as the names for all are.
    answer = await tenants.ask(OWNER, "POST", "/v1/admin/keys", {"name": "x", "tenant": "shared", "roles": ["infer"]})
    assert answer.status_code == 400


async def test_what_many_read_names_nothing_that_they_may_not(tenants: Tenants) -> None:
    """A preset for all, the default spec and a mandatory spec would tell those whom they act on what they name."""
    step = {"interventions": [{"artifact": MINE}]}
    for method, path, body in (
            ("POST", "/v1/presets", {"name": "shared/p", "spec": step}),
            ("POST", "/v1/presets", {"name": "p", "spec": step}),
            ("POST", "/v1/presets", {"name": "other/p", "spec": step}),
            ("PUT", "/v1/admin/default-spec", step),
            ("PUT", "/v1/admin/policies/other", {"mandatory": step})):
        answer = await tenants.ask(OWNER, method, path, body)
        assert code(answer) == (400, "invalid_request") and MINE in answer.text, (path, answer.text)
    for method, path, body in (("POST", "/v1/presets", {"name": "acme/q", "spec": step}),
                               ("PUT", "/v1/admin/policies/acme", {"mandatory": step})):
        assert (await tenants.ask(OWNER, method, path, body)).status_code in (200, 201), path
    # Who uses an artifact for all is told to none but those who may know.
    await tenants.ask(OWNER, "POST", "/v1/presets", {"name": "acme/uses", "spec": {
        "interventions": [{"artifact": "plain"}]}})
    house = bearer(await make(tenants.client, *ROLES, name="house"))
    answer = await tenants.ask(house, "DELETE", "/v1/artifacts/plain")
    assert code(answer) == (409, "conflict") and "acme" not in answer.text and "another tenant" in answer.text
    assert "acme/uses" in (await tenants.ask(OWNER, "DELETE", "/v1/artifacts/plain")).text


async def test_cached_prefixes_are_kept_apart_by_tenant(tenants: Tenants, engine: ScriptedEngine) -> None:
    async def salt(who: dict[str, str], **fields: Any) -> str | None:
        engine.completions.clear()
        assert (await tenants.ask(who, "POST", URL, chat("longer than the batch's", **fields))).status_code == 200
        mine = max((one.generation for one in engine.completions), key=lambda one: len(one.prompt_ids))
        return mine.cache_salt

    acme, other = await salt(tenants.acme), await salt(tenants.other)
    assert acme != other and None not in (acme, other) and acme == await salt(tenants.acme)
    # No salt that a request gives is another tenant's.
    assert acme is not None and await salt(OWNER, cache_salt=acme) != acme
    assert await salt(tenants.other, cache_salt="x") != await salt(tenants.acme, cache_salt="x")
    assert await salt(OWNER) is None


async def test_models_that_a_policy_forbids_are_not_listed(tenants: Tenants) -> None:
    async def listed() -> set[str]:
        return {one["id"] for one in (await tenants.ask(tenants.acme, "GET", "/v1/models")).json()["data"]}

    every = {MODEL, f"{MODEL}:{MINE}", f"{MODEL}:shared/soft"}
    for rules, found in (({}, every), ({"presets": ["shared/*"]}, every - {f"{MODEL}:{MINE}"}),
                         ({"artifacts": ["acme/*"]}, every - {f"{MODEL}:shared/soft"}), ({"models": ["other"]}, set()),
                         ({"most_interventions": 0}, {MODEL})):
        answer = await tenants.ask(OWNER, "PUT", "/v1/admin/policies/acme", rules)
        assert answer.status_code == 200 and await listed() == found, rules
    await tenants.ask(OWNER, "PUT", "/v1/admin/policies/acme", {"presets": ["shared/*"]})
    hidden = await tenants.ask(tenants.acme, "GET", f"/v1/models/{MODEL}:{MINE}")
    none = await tenants.ask(tenants.acme, "GET", f"/v1/models/{MODEL}:{NONE}")
    assert code(hidden) == (404, "model_not_found") and hidden.text.replace(MINE, NONE) == none.text

"""Keys with roles: made once, stored as a hash, refused when blocked, expired or without the role."""

import asyncio
import base64
import json
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import trimtab_client
from fastapi import FastAPI
from pydantic import SecretStr
from structlog.testing import capture_logs
from trimtab_client import Client
from typer.testing import CliRunner

from server.api.route import StrictRoute
from server.app import create_app, routed
from server.cli.main import app as cli
from server.errors import Unauthorized
from server.identity.keys import Keys, new_secret, spelled
from server.identity.roles import ANY_KEY, MEANING, NEEDED, OPEN, ROLES
from server.observability.instruments import Registry
from server.requests.killswitch import KillSwitch
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from vectors.library import Library

OWNER = {"Authorization": "Bearer owner-s-key"}
VECTOR = {"op": "add", "layers": [1], "site": "resid_post", "inline": {"vector": [1.0] * 8}}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"))


def bearer(made: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {made['key']}"}


async def make(client: httpx.AsyncClient, *roles: str, name: str = "one", **fields: Any) -> dict[str, Any]:
    answer = await client.post("/v1/admin/keys", headers=OWNER, json={"name": name, "roles": list(roles), **fields})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_a_key_is_shown_once_and_only_its_hash_is_stored(client: httpx.AsyncClient, tmp_path: Path) -> None:
    made = await make(client, "infer")
    secret = made["key"].split("-", 2)[2]
    listed = (await client.get("/v1/admin/keys", headers=OWNER)).text
    shown = (await client.get(f"/v1/admin/keys/{made['id']}", headers=OWNER)).text
    assert made["id"] in listed and secret not in listed and secret not in shown
    with sqlite3.connect(tmp_path / "library.db") as database:
        rows = str(database.execute("SELECT * FROM access_key").fetchall())
    assert made["id"] in rows and secret not in rows
    assert (await client.get("/v1/key", headers=bearer(made))).json() == {
        "name": "one", "tenant": "default", "roles": ["infer"], "policies": [], "limits": []}


def routes() -> list[StrictRoute]:
    return [route for route in routed().routes if isinstance(route, StrictRoute)]


def test_every_route_names_its_role_and_no_role_is_without_a_route() -> None:
    names = {route.name for route in routed().routes if hasattr(route, "endpoint")}
    assert names == set(NEEDED)
    assert set(NEEDED.values()) - {ANY_KEY, OPEN} == set(ROLES) - {"infer_raw"}


@pytest.mark.parametrize("role", ROLES)
async def test_every_route_with_every_role(client: httpx.AsyncClient, role: str) -> None:
    """A role is let through where the table says so, whatever the request then comes to, and refused everywhere else
    before its body is read."""
    headers = bearer(await make(client, role))
    for route in routes():
        for method in route.methods:
            path = route.path_format
            for parameter in route.dependant.path_params:
                path = path.replace(f"{{{parameter.name}}}", "nothing")
            allowed = route.needed in (ANY_KEY, OPEN, role) or role == "admin"
            if allowed and route.name == "follow_live":
                # It is answered for as long as the client stays.
                continue
            answer = await client.request(method, path, headers=headers, content=b"\xff" if method != "GET" else None)
            refused = answer.status_code == 403 and answer.json()["error"]["code"] == "not_permitted"
            assert refused == (not allowed), (role, method, path, answer.text)
            assert answer.status_code != 401
            if refused:
                assert route.needed in answer.json()["error"]["message"]


async def test_without_a_valid_key_nothing_but_health_and_the_page_is_answered(client: httpx.AsyncClient) -> None:
    made = await make(client, "infer")
    wrong = [{}, {"Authorization": "Bearer tt"}, {"Authorization": f"Bearer tt-{made['id']}"},
             {"Authorization": f"Bearer tt-{made['id']}-wrong"}, {"Authorization": f"Bearer {made['key']}x"},
             {"Authorization": "Bearer tt-0000000000000000-" + made["key"].split("-", 2)[2]}]
    for headers in wrong:
        assert code(await client.get("/v1/models", headers=headers)) == (401, "invalid_api_key"), headers
        assert (await client.get("/health", headers=headers)).status_code == 200
    assert (await client.get("/v1/models", headers=bearer(made))).status_code == 200
    assert (await client.get("/v1/models", headers={"x-api-key": made["key"]})).status_code == 200
    password = base64.b64encode(f"anyone:{made['key']}".encode()).decode()
    assert (await client.get("/openapi.json", headers={"Authorization": f"Basic {password}"})).status_code == 200


async def test_a_key_is_blocked_and_taken_again(client: httpx.AsyncClient) -> None:
    made = await make(client, "infer")
    for blocked, status in ((True, 401), (False, 200)):
        changed = await client.patch(f"/v1/admin/keys/{made['id']}", headers=OWNER, json={"blocked": blocked})
        assert changed.json()["blocked"] is blocked
        assert (await client.get("/v1/models", headers=bearer(made))).status_code == status


async def test_roles_change_at_once(client: httpx.AsyncClient) -> None:
    made = await make(client, "infer")
    assert code(await client.get("/v1/artifacts", headers=bearer(made))) == (403, "not_permitted")
    await client.patch(f"/v1/admin/keys/{made['id']}", headers=OWNER, json={"roles": ["library_read"]})
    assert (await client.get("/v1/artifacts", headers=bearer(made))).status_code == 200
    assert code(await client.post("/v1/chat/completions", headers=bearer(made), json=chat())) == (403, "not_permitted")


async def test_numbers_in_the_request_need_a_role_of_their_own(client: httpx.AsyncClient) -> None:
    plain, raw = await make(client, "infer"), await make(client, "infer", "infer_raw", name="raw")
    body = chat(steering={"interventions": [VECTOR]})
    refused = await client.post("/v1/chat/completions", headers=bearer(plain), json=body)
    assert code(refused) == (403, "not_permitted")
    assert refused.json()["error"]["param"] == "steering.interventions[0].inline"
    assert (await client.post("/v1/chat/completions", headers=bearer(raw), json=body)).status_code == 200
    # Captured activations are numbers, too: who may not send any may not name them, whether they are there or not.
    patch = {"op": "patch", "options": {"source": "act-" + "0" * 24, "row": 0},
             "scope": {"prompt": "all", "generation": "none"}}
    for key, found in ((plain, (403, "not_permitted")), (raw, (404, "not_found"))):
        answer = await client.post("/v1/chat/completions", headers=bearer(key),
                                   json=chat(steering={"interventions": [patch]}))
        assert code(answer) == found and answer.json()["error"]["param"] == "steering.interventions[0].options.source"
    # What somebody with the right to store put into a preset may be used by all.
    stored = await client.post("/v1/presets", headers=OWNER, json={"name": "calm", "spec": {"interventions": [VECTOR]}})
    assert stored.status_code == 201, stored.text
    named = chat(steering={"preset": "calm"})
    assert (await client.post("/v1/chat/completions", headers=bearer(plain), json=named)).status_code == 200


async def test_a_stored_preset_is_evaluated_without_the_role_for_numbers_in_requests(client: httpx.AsyncClient) -> None:
    plain, raw = await make(client, "jobs"), await make(client, "jobs", "infer_raw", name="raw")
    spec = {"interventions": [VECTOR]}
    stored = await client.post("/v1/presets", headers=OWNER, json={"name": "calm", "spec": spec})
    assert stored.status_code == 201, stored.text
    asked = {"prompts": ["How are you?"], "graders": [{"kind": "length", "least": 1}], "draws": 0}

    async def evaluated(made: dict[str, Any], named: dict[str, Any]) -> httpx.Response:
        return await client.post("/v1/evaluations", headers=bearer(made), json={**asked, **named})

    refused = await evaluated(plain, {"spec": spec})
    assert code(refused) == (403, "not_permitted")
    assert refused.json()["error"]["param"] == "spec.interventions[0].inline"
    for made, named in ((raw, {"spec": spec}), (plain, {"preset": "calm"}), (plain, {"preset": "calm@1"})):
        answer = await evaluated(made, named)
        assert answer.status_code == 202, answer.text


async def test_a_batch_may_do_what_its_maker_may(client: httpx.AsyncClient) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
            "body": chat(steering={"interventions": [VECTOR]})}

    async def first_status(made: dict[str, Any]) -> int:
        headers = bearer(made)
        file = await client.post("/v1/files", headers=headers, data={"purpose": "batch"},
                                 files={"file": ("a.jsonl", json.dumps(line).encode())})
        assert file.status_code == 200, file.text
        batch = (await client.post("/v1/batches", headers=headers, json={
            "input_file_id": file.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"})).json()
        async with asyncio.timeout(60):
            while batch["status"] != "completed":
                await asyncio.sleep(0.02)
                batch = (await client.get(f"/v1/batches/{batch['id']}", headers=headers)).json()
        found = batch["output_file_id"] or batch["error_file_id"]
        results = (await client.get(f"/v1/files/{found}/content", headers=headers)).json()
        status: int = results["response"]["status_code"]
        return status

    assert await first_status(await make(client, "infer")) == 403
    assert await first_status(await make(client, "infer", "infer_raw", name="raw")) == 200


async def test_rotation_leaves_the_old_secret_for_a_while(client: httpx.AsyncClient) -> None:
    first = await make(client, "infer")
    second = (await client.post(f"/v1/admin/keys/{first['id']}/rotate", headers=OWNER, json={"overlap_s": 60})).json()
    assert second["id"] == first["id"] and second["key"] != first["key"]
    for made in (first, second):
        assert (await client.get("/v1/models", headers=bearer(made))).status_code == 200
    third = (await client.post(f"/v1/admin/keys/{first['id']}/rotate", headers=OWNER, json={"overlap_s": 0})).json()
    assert [(await client.get("/v1/models", headers=bearer(made))).status_code for made in (first, second, third)] == [
        401, 401, 200]


async def test_changes_that_cannot_be(client: httpx.AsyncClient) -> None:
    made = await make(client, "infer")
    twice = await client.post("/v1/admin/keys", headers=OWNER, json={"name": "one", "roles": ["jobs"]})
    assert code(twice) == (409, "conflict")
    assert (await make(client, "jobs", tenant="other"))["tenant"] == "other"
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    for wrong in ({"name": "x", "roles": []}, {"name": "x", "roles": ["root"]}, {"name": "A b", "roles": ["infer"]},
                  {"name": "x", "roles": ["infer"], "expires_at": past},
                  {"name": "x", "roles": ["infer"], "expires_at": "2030-01-01T00:00:00"}):
        assert (await client.post("/v1/admin/keys", headers=OWNER, json=wrong)).status_code == 400, wrong
    assert (await client.patch(f"/v1/admin/keys/{made['id']}", headers=OWNER, json={})).status_code == 400
    for method, path in (("GET", "no"), ("PATCH", "no"), ("DELETE", "no"), ("POST", "no/rotate")):
        answer = await client.request(method, f"/v1/admin/keys/{path}", headers=OWNER,
                                      json={"blocked": True} if method == "PATCH" else {} if method == "POST" else None)
        assert code(answer) == (404, "not_found"), method
    assert (await client.delete(f"/v1/admin/keys/{made['id']}", headers=OWNER)).status_code == 204
    assert (await client.get("/v1/models", headers=bearer(made))).status_code == 401


async def test_the_log_says_whose_key_it_was_and_never_the_key(client: httpx.AsyncClient) -> None:
    made = await make(client, "infer", tenant="team", name="batch")
    with capture_logs() as logged:
        await client.get("/v1/models", headers=bearer(made))
    line = next(line for line in logged if line["event"] == "request")
    assert (line["key"], line["tenant"]) == ("batch", "team") and made["key"] not in str(logged)


class TestWithoutTheKeyOfTheSettings:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(served_model_name=MODEL, data_dir=tmp_path / "data")

    async def test_the_first_key_is_an_administrator_s_and_the_last_one_stays(self, client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models")).status_code == 200
        assert code(await client.post("/v1/admin/keys", json={"name": "a", "roles": ["infer"]})) == (
            400, "invalid_request")
        root = (await client.post("/v1/admin/keys", json={"name": "root", "roles": ["admin"]})).json()
        assert code(await client.get("/v1/models")) == (401, "invalid_api_key")
        where, headers = f"/v1/admin/keys/{root['id']}", bearer(root)
        soon = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        for change in ({"blocked": True}, {"roles": ["infer"]}, {"expires_at": soon}):
            assert code(await client.patch(where, headers=headers, json=change)) == (409, "conflict"), change
        assert code(await client.delete(where, headers=headers)) == (409, "conflict")
        second = (await client.post("/v1/admin/keys", headers=headers, json={"name": "b", "roles": ["admin"]})).json()
        assert (await client.delete(where, headers=bearer(second))).status_code == 204
        assert (await client.get("/v1/models", headers=bearer(second))).status_code == 200


@pytest.fixture
async def other(settings: Settings, vocabulary: Vocabulary, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A second server of the same library."""
    library = Library.open(f"sqlite:///{tmp_path / 'library.db'}", str(tmp_path / "blobs"))
    app: FastAPI = create_app(settings.model_copy(update={"data_dir": tmp_path / "other"}), ScriptedEngine(vocabulary),
                              library, vocabulary, engine_name="scripted")
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://localhost") as found:
        yield found


async def test_another_server_learns_of_it(client: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
    made = await make(client, "infer")

    async def until(status: int) -> None:
        async with asyncio.timeout(60):
            while (await other.get("/v1/models", headers=bearer(made))).status_code != status:
                await asyncio.sleep(0.02)

    await until(200)
    await client.patch(f"/v1/admin/keys/{made['id']}", headers=OWNER, json={"blocked": True})
    await until(401)


class Clock:
    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


async def test_expiry_and_last_use(library: Library) -> None:
    clock = Clock()
    keys = Keys(library.keys, b"owner", Registry(), now=clock)
    secret, digest = new_secret()
    made = library.keys.create(name="a", tenant="t", roles=["infer"], digest=digest,
                               expires_at=clock.time + timedelta(hours=1))
    key = spelled(made.id, secret).encode()
    await keys.start()
    assert keys.find(key).tenant == "t" and keys.find(b"owner").key_id is None
    clock.time += timedelta(minutes=59)
    keys.find(key)
    await keys.stop()
    assert library.keys.all()[0].used_at == clock.time
    clock.time += timedelta(minutes=1)
    with pytest.raises(Unauthorized, match="expired"):
        keys.find(key)


async def test_known_keys_go_on_to_count_while_the_database_is_away(library: Library) -> None:
    keys = Keys(library.keys, b"owner", Registry())
    secret, digest = new_secret()
    made = library.keys.create(name="a", tenant="t", roles=["infer"], digest=digest, expires_at=None)
    await keys.start()

    def away() -> None:
        raise OSError("gone")

    library.keys.all = away  # type: ignore[method-assign, assignment]
    while keys.failure is None:
        await keys._exchange()
    assert keys.find(spelled(made.id, secret).encode()).name == "a"
    await keys.stop()


async def test_the_command_line_and_the_python_client(address: str) -> None:
    def run(*words: str, key: str = "owner-s-key") -> str:
        done = CliRunner().invoke(cli, ["keys", *words, "--url", address, "--api-key", key])
        assert done.exit_code == 0, done.output
        return done.stdout

    def work() -> None:
        key = run("create", "batch", "--role", "infer", "--role", "jobs", "--tenant", "team", "--days", "7").strip()
        with Client(address, api_key=key) as mine:
            assert (mine.own_key().tenant, mine.own_key().roles) == ("team", ["infer", "jobs"])
            with pytest.raises(trimtab_client.Unauthorized, match="library_read"):
                mine.list_artifacts()
        with Client(address, api_key="owner-s-key") as owner:
            made = owner.keys()[0]
            assert made.expires_at is not None and owner.get_key(made.id) == made
            assert owner.change_key(made.id, expires_at="never").expires_at is None
        assert "batch" in run("list") and key not in run("list")
        assert '"library_read"' in run("change", made.id, "--role", "library_read")
        assert "blocked" in run("block", made.id) and "blocked" in run("list")
        run("unblock", made.id)
        second = run("rotate", made.id, "--overlap-s", "0").strip()
        assert '"library_read"' in run("own", key=second)
        run("delete", made.id)
        with Client(address, api_key="owner-s-key") as owner:
            assert owner.keys() == []

    await asyncio.to_thread(work)


def test_the_page_on_security_says_what_roles_mean() -> None:
    page = (Path(__file__).parents[2] / "docs/security.md").read_text()
    for role, meaning in MEANING.items():
        assert f"| `{role}` | {meaning} |" in page
    for route in routes():
        if route.needed == ANY_KEY and not route.path.startswith("/v1/models/"):
            assert f"`{route.path}`" in page


@pytest.fixture
def secretive(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"),
                    vllm_args={"hf_token": "sesame"},
                    database_url="postgresql://ada:sesame@db.example/library?sslpassword=sesame")


async def test_the_settings_in_force_are_told_without_secrets(
        secretive: Settings, engine: ScriptedEngine, library: Library, vocabulary: Vocabulary) -> None:
    app = create_app(secretive, engine, library, vocabulary, engine_name="scripted")
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test") as client:
        operator = bearer(await make(client, "operate"))
        answer = await client.get("/v1/admin/settings", headers=operator)
    found = {one["name"]: one for one in answer.json()["settings"]}
    assert set(found) == set(Settings.model_fields)
    assert found["max_choices"] == {"name": "max_choices", "value": secretive.max_choices, "default": True,
                                    "reloaded": True,
                                    "description": Settings.model_fields["max_choices"].description}
    assert found["api_key"]["value"] == "(hidden)" and not found["api_key"]["default"]
    assert found["database_url"]["value"] == "postgresql://(hidden)@db.example/library?(hidden)"
    assert found["vllm_args"]["value"] == {"hf_token": "(hidden)"}
    assert "sesame" not in answer.text and "owner-s-key" not in answer.text
    assert answer.json()["versions"]["torch"]


async def test_who_turned_a_switch_and_when_is_told_to_every_server(client: httpx.AsyncClient, library: Library
                                                                    ) -> None:
    """Also after a restart; whoever turns a switch to what it is already has not turned it."""
    one, two = [bearer(await make(client, "operate", "infer_raw", name=name)) for name in ("ada", "bob")]
    url, before = "/v1/admin/kill-switch", datetime.now(UTC)
    assert (await client.get(url, headers=one)).json()["turned"] is None
    turned = (await client.put(url, headers=one, json={"on": True})).json()["turned"]
    assert (turned["by"], turned["tenant"]) == ("ada", "default")
    assert before <= datetime.fromisoformat(turned["at"]) <= datetime.now(UTC)
    assert (await client.put(url, headers=two, json={"on": True})).json()["turned"] == turned
    restarted = KillSwitch(library.switches, Registry(), always=False)
    await restarted.start()
    assert restarted.turned is not None and restarted.turned.by == "ada"
    await restarted.stop()
    assert (await client.put(url, headers=two, json={"on": False})).json()["turned"]["by"] == "bob"

    url = "/v1/admin/default-spec"
    assert (await client.get(url, headers=two)).json()["turned"] is None
    await client.put(url, headers=two, json={"interventions": [VECTOR]})
    assert (await client.get(url, headers=one)).json()["turned"]["by"] == "bob"
    await client.delete(url, headers=OWNER)
    found = (await client.get(url, headers=one)).json()
    assert found["spec"] is None and found["turned"]["by"] == "owner"

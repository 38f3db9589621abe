"""The audit over HTTP: every route that changes something leaves a record of who asked for it, and no text."""

import asyncio
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from pydantic import SecretStr
from trimtab_client import Client
from typer.testing import CliRunner

from server.api.route import StrictRoute
from server.app import routed
from server.background.apart import apart
from server.background.housekeeping import Housekeeping
from server.background.job import FINISHED
from server.cli.main import app as cli
from server.engines.adapters import Adapters
from server.observability.instruments import Registry
from server.settings import Settings
from tests.server.conftest import MODEL, chat
from tests.server.test_activations import OCTETS
from tests.server.test_adapters import Adapting
from tests.server.test_port import OTHER, file
from vectors.library import Library
from vectors.library.audit.log import Wanted
from vectors.library.audit.notes import ACTOR, Actor
from vectors.storage_errors import LibraryUnavailable

OWNER = {"Authorization": "Bearer owner-s-key"}
INLINE = {"op": "add", "layers": [1], "site": "resid_post", "inline": {"vector": [1.0] * 8}}
SPEC = {"interventions": [INLINE]}
ARTIFACT = {"metadata": {"name": "calm", "kind": "vector", "op": "add", "site": "resid_post"},
            "tensors": {"1": {"vector": [1.0] * 8}}}
# These answer, or read a body and tell something of it, and leave nothing changed behind but counters. A response that
# is stored goes by itself, and who asked for it is a matter of the sample of steered requests.
CHANGE_NOTHING = {"create_chat_completion", "create_completion", "create_response", "create_message", "count_tokens",
                  "tokenize", "detokenize", "refuse_embeddings", "read_lens", "read_features", "cancel_response"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "adapters" / "mild").mkdir(parents=True)
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"),
                    engine="vllm", vllm_adapter_dir=tmp_path / "adapters")


@pytest.fixture
def engine(vocabulary: Any) -> Adapting:
    made = Adapting(vocabulary)
    made.adapters, made.served_on = Adapters(), []  # type: ignore[attr-defined]
    return made


class Prepared:
    """What the preparation of a job is replaced by: its own tests are elsewhere."""

    name, options = "made", None

    def estimate(self, *_: object) -> float:
        return 1.0

    def run(self, *_: object) -> None:
        raise ValueError("it is not to be done")


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prepare", "prepare_tuning", "_request"):
        monkeypatch.setattr(f"server.api.library.extract.{name}", lambda *_: Prepared())
    monkeypatch.setattr("server.api.checks.Weights", lambda *_: SimpleNamespace(
        readers=lambda *_: {"output projection": torch.eye(16)}))
    for module in ("extract", "calibration", "evaluations"):
        monkeypatch.setattr(f"server.api.library.{module}.sample", lambda *_: None)
    monkeypatch.setattr("server.api.library.calibration.estimated", lambda *_: 1.0)
    monkeypatch.setattr("server.api.library.evaluations.seconds", lambda *_: 1.0)
    for module in ("extract._run", "calibration._work", "evaluations._work"):
        async def _nothing(*_: object) -> dict[str, Any]:
            return {}
        monkeypatch.setattr(f"server.api.library.{module}", _nothing)


class Changes:
    """Asks each changing route for something that it does. What was made before is kept for those that come later."""

    def __init__(self, client: httpx.AsyncClient, headers: Mapping[str, str]) -> None:
        self.client, self.headers, self.ids = client, headers, dict[str, str]()

    async def ask(self, method: str, path: str, body: Any = None, **fields: Any) -> httpx.Response:
        given = {"json": body} if body is not None else {}
        return await self.client.request(method, path, headers=self.headers, **given, **fields)

    async def draft(self) -> httpx.Response:
        return await self.ask("POST", "/v1/admin/rollouts", {
            "target": "mild@tried", "candidate": 2, "steps": [{"share": 0.1}]})

    async def sent(self) -> httpx.Response:
        return await self.client.post("/v1/activations/import", content=file(), headers={**self.headers, **OCTETS})

    async def do(self, name: str) -> httpx.Response:
        evaluation = {"prompts": ["a"], "graders": [{"kind": "whole"}], "spec": SPEC, "draws": 0}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat()}
        match name:
            case "create_artifact":
                return await self.ask("POST", "/v1/artifacts", ARTIFACT)
            case "import_artifact":
                file = (await self.ask("GET", "/v1/artifacts/calm/download")).content
                return await self.ask("POST", "/v1/artifacts/import", files={"file": ("a", file)},
                                      data={"metadata": '{"name": "other"}'})
            case "patch_artifact":
                return await self.ask("PATCH", "/v1/artifacts/calm", {"description": "new"})
            case "set_alias":
                return await self.ask("PUT", "/v1/artifacts/calm/aliases/best", {"version": 1})
            case "remove_alias":
                return await self.ask("DELETE", "/v1/artifacts/calm/aliases/best")
            case "create_preset":
                return await self.ask("POST", "/v1/presets", {"name": "mild", "spec": SPEC})
            case "set_preset_alias":
                return await self.ask("PUT", "/v1/presets/mild/aliases/best", {"version": 1})
            case "remove_preset_alias":
                return await self.ask("DELETE", "/v1/presets/mild/aliases/best")
            case "create_by_method" | "create_extraction":
                path = "/v1/extract" + ("/mean_difference" if name == "create_by_method" else "")
                return await self.ask("POST", path, {"method": "mean_difference", "name": "x", "pairs": [
                    {"positive": f"good {n}", "negative": f"bad {n}"} for n in range(16)]})
            case "create_tuning":
                return await self.ask("POST", "/v1/artifacts/calm/tune", {})
            case "create_calibration":
                return await self.ask("POST", "/v1/artifacts/calm/calibrate", {"prompts": ["a"] * 8})
            case "create_evaluation":
                return await self.ask("POST", "/v1/evaluations", evaluation)
            case "create_activations":
                answer = await self.ask("POST", "/v1/activations", {
                    "model": MODEL, "input": ["hi"], "sites": {"resid_post": [1]}})
                job = answer.json()
                while job["status"] not in FINISHED:
                    await asyncio.sleep(0.005)
                    job = (await self.ask("GET", f"/v1/jobs/{job['id']}")).json()
                self.ids["activations"] = job["result"]["id"]
                return answer
            case "create_patch_check":
                return await self.ask("POST", "/v1/checks/patch", {
                    "site": "mlp_act", "layer": 1, "vector": [1.0] * 16,
                    "pairs": [{"base": "a", "source": "b", "base_answer": "c", "source_answer": "d"}]})
            case "import_activations":
                return await self.sent()
            case "create_port":
                other = {"name": "theirs", "fingerprint": OTHER, "model_id": "theirs"}
                await self.ask("POST", "/v1/artifacts", {"metadata": ARTIFACT["metadata"] | other,
                                                         "tensors": {"2": {"vector": [1.0] * 8}}})
                return await self.ask("POST", "/v1/artifacts/theirs/port", {
                    "name": "ours", "source": (await self.sent()).json()["id"]})
            case "create_stack_check":
                return await self.ask("POST", "/v1/specs/check", {"steering": {"interventions": [INLINE, INLINE]}})
            case "delete_activations":
                return await self.ask("DELETE", f"/v1/activations/{self.ids['activations']}")
            case "cancel_job":
                return await self.ask("POST", f"/v1/jobs/{self.ids['job']}/cancel")
            case "delete_evaluation":
                return await self.ask("DELETE", "/v1/evaluations/eval-1")
            case "set_default_spec":
                return await self.ask("PUT", "/v1/admin/default-spec", SPEC)
            case "clear_default_spec":
                return await self.ask("DELETE", "/v1/admin/default-spec")
            case "reload_settings":
                return await self.ask("POST", "/v1/admin/settings/reload")
            case "set_kill_switch":
                return await self.ask("PUT", "/v1/admin/kill-switch", {"on": True})
            case "load_adapter":
                return await self.ask("POST", "/v1/load_lora_adapter", {"lora_name": "mild", "lora_path": "mild"})
            case "unload_adapter":
                return await self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "mild"})
            case "create_key":
                answer = await self.ask("POST", "/v1/admin/keys", {"name": "k", "roles": ["infer"]})
                self.ids["key"] = answer.json()["id"]
                return answer
            case "change_key":
                return await self.ask("PATCH", f"/v1/admin/keys/{self.ids['key']}", {"blocked": True})
            case "rotate_key":
                return await self.ask("POST", f"/v1/admin/keys/{self.ids['key']}/rotate", {})
            case "delete_key":
                return await self.ask("DELETE", f"/v1/admin/keys/{self.ids['key']}")
            case "set_policy":
                return await self.ask("PUT", "/v1/admin/policies/team", {"reports": False})
            case "delete_policy":
                return await self.ask("DELETE", "/v1/admin/policies/team")
            case "set_requirement":
                await self.ask("PUT", "/v1/presets/mild/aliases/held", {"version": 1})
                return await self.ask("PUT", "/v1/admin/requirements", {
                    "target": "mild@held", "bounds": [{"figure": "kl", "at_most": 1.0}]})
            case "delete_requirement":
                answer = await self.ask("DELETE", "/v1/admin/requirements", params={"target": "mild@held"})
                await self.ask("DELETE", "/v1/presets/mild/aliases/held")
                return answer
            case "create_rollout":
                other = {"interventions": [INLINE | {"strength": 2.0}]}
                await self.ask("POST", "/v1/presets", {"name": "mild", "spec": other})
                await self.ask("PUT", "/v1/presets/mild/aliases/tried", {"version": 1})
                answer = await self.draft()
                self.ids["rollout"] = answer.json()["id"]
                return answer
            case "publish_rollout" | "promote_rollout":
                return await self.ask("POST", f"/v1/admin/rollouts/{self.ids['rollout']}/{name.partition('_')[0]}")
            case "return_rollout":
                await self.ask("PUT", "/v1/presets/mild/aliases/tried", {"version": 1})
                self.ids["rollout"] = (await self.draft()).json()["id"]
                await self.ask("POST", f"/v1/admin/rollouts/{self.ids['rollout']}/publish")
                return await self.ask("POST", f"/v1/admin/rollouts/{self.ids['rollout']}/return", {"why": "a test"})
            case "delete_rollout":
                await self.ask("DELETE", "/v1/presets/mild/aliases/tried")
                return await self.ask("DELETE", f"/v1/admin/rollouts/{self.ids['rollout']}")
            case "upload_file":
                answer = await self.ask("POST", "/v1/files", data={"purpose": "batch"},
                                        files={"file": ("a.jsonl", json.dumps(line).encode())})
                self.ids["file"] = answer.json()["id"]
                return answer
            case "create_batch":
                answer = await self.ask("POST", "/v1/batches", {
                    "input_file_id": self.ids["file"], "endpoint": "/v1/chat/completions", "completion_window": "24h"})
                self.ids["batch"] = answer.json()["id"]
                return answer
            case "cancel_batch":
                return await self.ask("POST", f"/v1/batches/{self.ids['batch']}/cancel")
            case "delete_file":
                made = await self.ask("POST", "/v1/files", data={"purpose": "batch"},
                                      files={"file": ("b.jsonl", json.dumps(line).encode())})
                return await self.ask("DELETE", f"/v1/files/{made.json()['id']}")
            case "delete_response":
                body = {"model": MODEL, "input": "hi", "max_output_tokens": 4}
                answer = await self.ask("POST", "/v1/responses", body)
                return await self.ask("DELETE", f"/v1/responses/{answer.json()['id']}")
            case "delete_preset":
                return await self.ask("DELETE", "/v1/presets/mild")
            case "delete_artifact":
                return await self.ask("DELETE", "/v1/artifacts/calm")
            case "collect_library":
                await self.ask("DELETE", "/v1/artifacts/other")
                return await self.ask("POST", "/v1/admin/library/gc")
        raise AssertionError(f"the test does not know how to ask {name} for a change")


# What is told to go comes last.
LAST = ["delete_requirement", "publish_rollout", "promote_rollout", "return_rollout", "delete_rollout",
        "clear_default_spec", "delete_policy", "cancel_batch", "delete_file", "remove_alias",
        "remove_preset_alias", "unload_adapter", "delete_preset", "delete_artifact", "collect_library",
        "change_key", "rotate_key", "delete_key"]
FIRST = ["create_artifact", "create_preset", "set_requirement", "create_rollout", "upload_file", "create_batch",
         "load_adapter", "create_key"]


async def test_every_changing_route_leaves_a_record(
        client: httpx.AsyncClient, library: Library, settings: Settings, prepared: None) -> None:
    made = (await client.post("/v1/admin/keys", headers=OWNER, json={
        "name": "ada", "tenant": "team", "roles": ["admin"]})).json()
    changing = {route.name for route in routed().routes if isinstance(route, StrictRoute)
                and route.methods - {"GET", "HEAD"}} - CHANGE_NOTHING
    changes = Changes(client, {"Authorization": f"Bearer {made['key']}"})
    left = sorted(changing - set(FIRST) - set(LAST))
    library.evaluations.add("eval-1", datetime.now(UTC), [], {}, "{}")
    # A batch that is to be cancelled must not have ended.
    await client._transport.app.state.server.batches.stop()  # type: ignore[attr-defined]
    for name in (*FIRST, *left, *LAST):
        assert name in changing, name
        if name == "cancel_job":
            # One that has not begun, because it is behind a job that never gets its turn.
            changes.ids["job"] = await waiting_job(client)
        if name == "collect_library":
            for path in (settings.data_dir.parent / "blobs").rglob("*"):
                if path.is_file():
                    os.utime(path, (0, 0))
        answer = await changes.do(name)
        assert answer.status_code < 400, (name, answer.text)
        found = library.audit.list(Wanted(request_id=answer.headers["X-Trimtab-Request"]))
        assert found, f"{name} changed something and left no record"
        assert {(one.key_id, one.key_name, one.tenant, one.address) for one in found} == {
            (made["id"], "ada", "team", "127.0.0.1")}, name
        assert not any(one.action.endswith(".failed") for one in found), name
    assert library.audit.verify().fault is None


async def waiting_job(client: httpx.AsyncClient) -> str:
    state = client._transport.app.state.server  # type: ignore[attr-defined]

    async def forever(_: object) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    id: str = state.jobs.submit("extract", forever).id
    return id


async def test_what_fails_after_it_was_recorded_is_recorded_as_failed(
        client: httpx.AsyncClient, library: Library, prepared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    await client.post("/v1/artifacts", headers=OWNER, json=ARTIFACT)
    state = client._transport.app.state.server  # type: ignore[attr-defined]
    monkeypatch.setattr(state.jobs, "_max_jobs", 0)
    answer = await client.post("/v1/artifacts/calm/calibrate", headers=OWNER, json={"prompts": ["a"] * 8})
    assert answer.json()["error"]["code"] == "too_many_jobs"
    asked, failed = library.audit.list(Wanted(after=1))
    assert (asked.action, failed.action) == ("job.create", "job.create.failed")
    assert failed.after == {"error": "too_many_jobs"}
    assert asked.target == failed.target


async def test_no_adapter_is_loaded_that_cannot_be_recorded(
        client: httpx.AsyncClient, library: Library, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise LibraryUnavailable("away")

    monkeypatch.setattr(library.audit, "add", away)
    answer = await client.post("/v1/load_lora_adapter", headers=OWNER, json={"lora_name": "mild", "lora_path": "mild"})
    assert answer.status_code == 503 and engine.served_on == []
    # What ends work goes on.
    job = await waiting_job(client)
    assert (await client.post(f"/v1/jobs/{job}/cancel", headers=OWNER)).status_code == 200


async def test_the_kill_switch_is_recorded_with_all_its_turns(
        client: httpx.AsyncClient, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """It acts while the library is away; the turns are recorded when it is back, with the time of each."""
    store, away = library.switches.set_kill_switch, True

    def sometimes(*given: Any) -> None:
        if away:
            raise OSError("away")
        store(*given)

    monkeypatch.setattr(library.switches, "set_kill_switch", sometimes)
    for on in (True, False, True):
        await client.put("/v1/admin/kill-switch", headers=OWNER, json={"on": on})
    assert library.audit.list(Wanted(action="kill_switch")) == []
    away = False
    async with asyncio.timeout(60):
        while not (found := library.audit.list(Wanted(action="kill_switch", after=0))):
            await asyncio.sleep(0.02)
    assert [(one.before, one.after, one.key_name) for one in found] == [
        (False, True, "owner"), (True, False, "owner"), (False, True, "owner")]
    assert [one.at for one in found] == sorted(one.at for one in found) and len({one.at for one in found}) == 3


async def test_what_a_job_changes_is_recorded_for_who_asked_for_it() -> None:
    token = ACTOR.set(Actor("k", "ada", "team", "", "req-1"))
    try:
        assert (await apart(ACTOR.get)).key_name == "ada"
    finally:
        ACTOR.reset(token)


async def test_housekeeping_lets_old_records_go(library: Library) -> None:
    library.audit.add("note", "a")
    library.audit.add("note", "b")
    await Housekeeping(library, Registry(), 0).tidy()
    assert [one.number for one in library.audit.list(Wanted(after=0))] == [1, 2]
    await Housekeeping(library, Registry(), 0, audit_kept_s=1e-6).tidy()
    assert [(one.number, one.action) for one in library.audit.list(Wanted(after=0))] == [
        (2, "note"), (3, "audit.expire")]


class TestSteering:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"),
                        audit_steering_sample=1.0)

    async def steered(self, client: httpx.AsyncClient, library: Library) -> list[Any]:
        body = chat("mail me: ann@example.com", user="u-7", steering={"interventions": [INLINE]})
        for asked in (body, chat("nothing is steered here")):
            assert (await client.post("/v1/chat/completions", headers=OWNER, json=asked)).status_code == 200
        await client._transport.app.state.server.steering_audit.write()  # type: ignore[attr-defined]
        return library.audit.list(Wanted(action="steer", after=0))

    async def test_who_steered_whom_with_what_and_no_text(self, client: httpx.AsyncClient, library: Library) -> None:
        found = await self.steered(client, library)
        assert [(one.action, one.target, one.key_name) for one in found] == [("steer", MODEL, "owner")]
        assert found[0].after["user"] == "u-7"
        assert found[0].after["applied"][0]["artifact"] == "inline" and found[0].after["applied"][0]["op"] == "add"
        assert "mail me" not in str(library.audit.list(Wanted())) and found[0].request_id.startswith("req-")

    class TestWithTexts:
        @pytest.fixture
        def settings(self, tmp_path: Path) -> Settings:
            return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", api_key=SecretStr("owner-s-key"),
                            audit_steering_sample=1.0, audit_texts=True)

        async def test_texts_are_redacted(self, client: httpx.AsyncClient, library: Library) -> None:
            _, texts = await TestSteering().steered(client, library)
            assert texts.action == "steer.text" and "mail me: [redacted]" in texts.after["prompts"][0]
            assert "ann@example.com" not in str(texts) and len(texts.after["answers"]) == 1


async def test_the_sample_is_none_unless_a_setting_says_so(client: httpx.AsyncClient, library: Library) -> None:
    body = chat(steering={"interventions": [INLINE]})
    assert (await client.post("/v1/chat/completions", headers=OWNER, json=body)).status_code == 200
    await client._transport.app.state.server.steering_audit.write()  # type: ignore[attr-defined]
    assert library.audit.list(Wanted()) == []


async def test_the_command_line_and_the_client(address: str, tmp_path: Path, library: Library) -> None:
    def run(*words: str, status: int = 0) -> str:
        done = CliRunner().invoke(cli, ["audit", *words, "--url", address, "--api-key", "owner-s-key"])
        assert done.exit_code == status, done.output
        return done.output

    def work() -> None:
        with Client(address, api_key="owner-s-key") as client:
            client.create_preset("mild", SPEC)
            client.set_preset_alias("mild", "production", 1)
            page = client.audit(action="preset", limit=1)
            assert [one.action for one in page.data] == ["preset.alias"] and page.head.number == 2
            assert client.verify_audit().whole and not client.verify_audit(2, "0" * 64).whole
        assert "preset.create" in run("tail") and "production" in run("tail", "-n", "1")
        file = tmp_path / "audit.jsonl"
        run("export", str(file))
        head = run("verify").split()[-1]
        assert run("verify", str(file), "--known", head).split()[-1] == head
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0].replace("mild@1", "wild@1"), lines[1]]))
        assert "record 1 was altered" in run("verify", str(file), status=1)
        assert "is not in the chain" in run("verify", "--known", f"1:{'0' * 64}", status=1)

    await asyncio.to_thread(work)

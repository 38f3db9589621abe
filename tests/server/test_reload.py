"""Settings that are read again while the server runs: what changes, what is named, and what is refused as a whole."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs

from server.app import create_app
from server.http.runner import _reloading
from server.requests.reload import RELOADED
from server.settings import Settings, load_settings
from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from vectors.library import Library
from vectors.library.audit.log import Wanted

RELOAD = "/v1/admin/settings/reload"
STEERED = {"interventions": [{"op": "add", "layers": [1], "inline": {"vector": [1.0] * 8}}]}


class Files:
    """The file with settings, and the secret beside it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.secret = folder / "trimtab.yaml", folder / "key"
        self.secret.write_text("first-key")
        self.write(max_choices=2)

    def write(self, **values: object) -> None:
        self.path.write_text(json.dumps({"api_key_file": "key", "served_model_name": MODEL, **values}))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    for name in [name for name in os.environ if name.startswith("TRIMTAB_")]:
        monkeypatch.delenv(name)
    return Files(tmp_path)


@pytest.fixture
def app(files: Files, tmp_path: Path, engine: ScriptedEngine, library: Library, vocabulary: Vocabulary) -> FastAPI:
    def read() -> Settings:
        return load_settings(config=files.path, data_dir=tmp_path / "data")

    return create_app(read(), engine, library, vocabulary, engine_name="scripted", again=read)


@pytest.fixture
async def owner(client: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    client.headers["Authorization"] = "Bearer first-key"
    yield client


async def test_what_can_change_does_and_the_rest_is_named(owner: httpx.AsyncClient, files: Files, app: FastAPI,
                                                          library: Library) -> None:
    assert (await owner.post("/v1/chat/completions", json=chat(n=3))).status_code == 400
    assert (await owner.post(RELOAD)).json() == {"changed": {}, "needs_restart": [], "certificates": False}
    files.write(max_choices=3, shadow_sample=1, shadow_budget=10, outcome_sample=0.5, queue_requests=7,
                audit_steering_sample=1, require_steering=False, port=4711)
    answer = await owner.post(RELOAD)
    assert answer.json() == {"changed": {
        "max_choices": 3, "shadow_sample": 1.0, "shadow_budget": 10.0, "outcome_sample": 0.5, "queue_requests": 7,
        "audit_steering_sample": 1.0}, "needs_restart": ["port"], "certificates": False}
    assert (await owner.post("/v1/chat/completions", json=chat(n=3))).status_code == 200
    state = app.state.server
    assert state.shadow.draws() and state.queue._bounds["requests"] == 7 and state.settings.port == 8000
    # It is named until it holds, and what is taken over already is not told twice.
    assert (await owner.post(RELOAD)).json() == {"changed": {}, "needs_restart": ["port"], "certificates": False}
    record, = library.audit.list(Wanted(request_id=answer.headers["X-Trimtab-Request"]))
    assert record.action == "settings.reload" and record.before["max_choices"] == 2
    assert record.after["max_choices"] == 3 and record.after["needs_restart"] == ["port"]
    # The sample of the audit began with the reload.
    await owner.post("/v1/chat/completions", json=chat(steering=STEERED))
    await state.steering_audit.write()
    assert [one.action for one in library.audit.list(Wanted(action="steer"))] == ["steer"]


async def test_a_new_key_from_its_file_counts_at_once_and_the_old_one_no_more(owner: httpx.AsyncClient, files: Files,
                                                                              library: Library) -> None:
    files.secret.write_text("second-key")
    assert (await owner.post(RELOAD)).json()["changed"] == {"api_key": "(hidden)"}
    assert (await owner.get("/v1/models")).status_code == 401
    assert (await owner.get("/v1/models", headers={"Authorization": "Bearer second-key"})).status_code == 200
    assert "second-key" not in str(library.audit.list(Wanted()))


async def test_a_server_with_a_key_does_not_become_one_without(owner: httpx.AsyncClient, files: Files) -> None:
    files.path.write_text(json.dumps({"served_model_name": MODEL, "max_choices": 2}))
    assert (await owner.post(RELOAD)).json()["needs_restart"] == ["api_key"]
    owner.headers.pop("Authorization")
    assert (await owner.get("/v1/models")).status_code == 401


@pytest.mark.parametrize(("change", "param"), [
    (lambda files: files.write(max_choices=9, shadow_sample=2), "shadow_sample"),
    (lambda files: files.write(max_choices=9, no_such=1), "config"),
    (lambda files: files.secret.unlink(), "api_key"),
    (lambda files: files.path.write_text("max_choices: ["), "config")])
async def test_what_is_not_valid_changes_nothing(owner: httpx.AsyncClient, files: Files, app: FastAPI, change: object,
                                                 param: str) -> None:
    before = app.state.server.settings
    change(files)  # type: ignore[operator]
    answer = await owner.post(RELOAD)
    assert answer.status_code == 409
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("settings_refused", param)
    assert app.state.server.settings == before and (await owner.get("/v1/models")).status_code == 200


async def test_a_request_keeps_the_settings_it_began_with(owner: httpx.AsyncClient, files: Files,
                                                          engine: ScriptedEngine) -> None:
    engine.gate = asyncio.Event()
    running = asyncio.create_task(owner.post("/v1/chat/completions", json=chat(n=2)))
    async with asyncio.timeout(30):
        while len(engine.completions) < 2:
            await asyncio.sleep(0.005)
    files.write(max_choices=1)
    assert (await owner.post(RELOAD)).json()["changed"] == {"max_choices": 1}
    engine.gate.set()
    assert len((await running).json()["choices"]) == 2
    assert (await owner.post("/v1/chat/completions", json=chat(n=2))).status_code == 400


async def test_sighup_reads_them_again_and_ends_nothing(owner: httpx.AsyncClient, files: Files, app: FastAPI) -> None:
    assert threading.current_thread() is threading.main_thread()
    with _reloading(app):
        files.write(max_choices=3)
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(30):
            while app.state.server.settings.max_choices != 3:
                await asyncio.sleep(0.005)
        files.write(max_choices=-1)
        with capture_logs() as logged:
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(30):
                while not any(line["event"] == "settings_not_reloaded" for line in logged):
                    await asyncio.sleep(0.005)
    assert app.state.server.settings.max_choices == 3


def test_what_is_reloaded_are_settings() -> None:
    assert set(Settings.model_fields) >= RELOADED

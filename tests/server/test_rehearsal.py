"""What cannot run is not stored; what was stored and cannot run any more refuses requests and ends no server."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import server.requests.rehearsal
from server.app import create_app
from server.engines.data import Condition, Generation
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from steering.language.errors import EngineUnavailable, SlotsExhausted, SteeringOverflow, TrimtabError
from tests.server.conftest import chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_steering import _spec, names, store
from vectors.library import Library
from vectors.storage_errors import CorruptBlob, LibraryUnavailable, StorageUnavailable

DEADLY = 666.0
LOUD = {"interventions": [{"artifact": "one", "strength": DEADLY}]}
CALM = {"interventions": [{"artifact": "one"}]}


class Mortal(ScriptedEngine):
    """Raises `failure` where something acts at the deadly strength, as an engine does that a spec kills."""

    down = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        quiet = self.script

        def script(generation: Generation) -> Sequence[int]:
            for item in generation.program.compiled if generation.program else ():
                if item.applied.strength["value"] == DEADLY:
                    raise self.failure
            return quiet(generation)

        self.script = script

    def condition(self) -> Condition:
        return Condition(ready=False, reason="restarting", retry_after_s=7) if self.down else super().condition()


@pytest.fixture
def engine(vocabulary: Vocabulary) -> Mortal:
    return Mortal(vocabulary)


@pytest.fixture(autouse=True)
def stored(library: Library) -> Library:
    store(library, "one")
    return library


async def put_default(client: httpx.AsyncClient, spec: dict[str, Any]) -> httpx.Response:
    return await client.put("/v1/admin/default-spec", json=spec)


async def post_preset(client: httpx.AsyncClient, spec: dict[str, Any]) -> httpx.Response:
    return await client.post("/v1/presets", json={"name": "loud", "spec": spec})


STORE = pytest.mark.parametrize(("store_spec", "prefix"), [(put_default, ""), (post_preset, "spec.")])


def kept(library: Library) -> list[Any]:
    return [library.switches.default_spec(), library.presets.list().items]


@STORE
@pytest.mark.parametrize(("failure", "status", "code", "param"), [
    (SteeringOverflow("values that are not finite at layer 2", param="interventions[0]"), 400, "steering_overflow",
     "interventions[0]"),
    (RuntimeError("index -1 is out of bounds"), 409, "rehearsal_failed", None),
    (EngineUnavailable("the loop died"), 409, "rehearsal_failed", None),
    (SlotsExhausted("all slots are held"), 503, "slots_exhausted", "interventions")])
async def test_what_fails_on_the_engine_is_not_stored(
        client: httpx.AsyncClient, engine: Mortal, library: Library, store_spec: Any, prefix: str, failure: Exception,
        status: int, code: str, param: str | None) -> None:
    engine.failure = failure
    answer = await store_spec(client, LOUD)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["param"] == (param and f"{prefix}{param}") and "out of bounds" not in error["message"]
    assert kept(library) == [None, []]
    assert (await store_spec(client, CALM)).status_code in (200, 201)
    assert kept(library) != [None, []]


@STORE
async def test_an_engine_that_is_down_stores_nothing_and_says_when_to_come_back(
        client: httpx.AsyncClient, engine: Mortal, library: Library, store_spec: Any, prefix: str) -> None:
    engine.down = True
    answer = await store_spec(client, CALM)
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "7"
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert "Nothing was stored" in answer.json()["error"]["message"] and kept(library) == [None, []]


async def test_one_that_never_ends_is_refused(client: httpx.AsyncClient, engine: Mortal, library: Library,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.requests.rehearsal, "LONGEST_S", 0.1)
    engine.gate = asyncio.Event()
    answer = await put_default(client, CALM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "rehearsal_failed")
    assert kept(library) == [None, []] and all(c.cancelled.is_set() for c in engine.completions)


@pytest.mark.parametrize("scope", [
    {"prompt": {"positions": [0, -1]}}, {"prompt": {"positions": [200]}, "generation": "none"},
    {"prompt": {"positions": [-100]}}, {"prompt": {"windows": [[60, None]]}, "generation": "none"},
    {"prompt": {"roles": ["user"]}, "generation": "none"},
    {"prompt": {"roles": ["user"], "positions": [150]}, "generation": "none"},
    {"prompt": {"token_ids": [7]}, "generation": "none"}])
async def test_it_runs_on_the_tokens_that_the_scope_names(client: httpx.AsyncClient, engine: Mortal,
                                                          scope: dict[str, Any]) -> None:
    answer = await put_default(client, {"interventions": [{"artifact": "one", "scope": scope}]})
    assert answer.status_code == 200, answer.text
    [completion] = engine.completions
    assert completion.touched()[0].prompt > 0 and len(completion.given) == server.requests.rehearsal.TOKENS


async def test_it_runs_also_while_the_kill_switch_is_on(client: httpx.AsyncClient, engine: Mortal) -> None:
    await client.put("/v1/admin/kill-switch", json={"on": True})
    assert (await put_default(client, LOUD)).status_code >= 400
    assert (await put_default(client, CALM)).status_code == 200


async def test_it_is_counted_as_nobodys_request(client: httpx.AsyncClient, engine: Mortal) -> None:
    async def counted() -> list[str]:
        names = ("trimtab_generated_tokens_total", "trimtab_prompt_tokens_total", "trimtab_steered_requests_total")
        return [line for line in (await client.get("/metrics")).text.splitlines() if line.startswith(names)]

    before = await counted()
    assert (await put_default(client, CALM)).status_code == 200 and engine.completions
    assert await counted() == before and len(before) == 3
    await client.post("/v1/chat/completions", json=chat())
    assert not set(await counted()) & set(before)


async def test_a_stored_default_spec_that_fails_refuses_requests_and_starts_the_server(
        settings: Settings, engine: Mortal, library: Library, vocabulary: Vocabulary) -> None:
    library.switches.set_default_spec(_spec("one", strength=DEADLY))
    for _ in range(2):
        app: FastAPI = create_app(settings, engine, library, vocabulary)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport,
                                                                       base_url="http://localhost") as client:
            assert (await client.get("/health/ready")).status_code == 200
            seen = len(engine.completions)
            answer = await client.post("/v1/chat/completions", json=chat())
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "default_spec_unusable")
            assert "fell over" in (await client.get("/v1/admin/default-spec")).json()["problem"]
            assert len(engine.completions) == seen
            free = await client.post("/v1/chat/completions", json=chat(steering={"default": "none"}))
            assert free.status_code == 200
    app = create_app(settings, engine, library, vocabulary)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport,
                                                                   base_url="http://localhost") as client:
        assert (await put_default(client, CALM)).json()["problem"] is None
        answer = await client.post("/v1/chat/completions", json=chat())
        assert names(answer.json()["steering"]) == [("default", "one@1")]


@pytest.mark.parametrize("error", [LibraryUnavailable("it is away", retry_after_s=2),
                                   StorageUnavailable("it is away", retry_after_s=2), CorruptBlob("it is damaged")],
                         ids=lambda error: error.code)
async def test_a_library_that_is_away_says_nothing_of_the_default_spec(
        client: httpx.AsyncClient, library: Library, monkeypatch: pytest.MonkeyPatch, error: TrimtabError) -> None:
    assert (await put_default(client, CALM)).status_code == 200

    def away(ref: str) -> None:
        raise error

    monkeypatch.setattr(library, "source", away)
    answer = await client.post("/v1/chat/completions", json=chat())
    if isinstance(error, CorruptBlob):
        # The control: this one says something of it.
        assert answer.json()["error"]["code"] == "default_spec_unusable"
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, error.code)
        assert answer.headers["retry-after"] == "2"


async def test_what_a_default_spec_lacks_may_still_come(client: httpx.AsyncClient, library: Library, settings: Settings,
                                                        engine: Mortal, vocabulary: Vocabulary) -> None:
    lacking = settings.model_copy(update={"default_spec": _spec("later")})
    app = create_app(lacking, engine, library, vocabulary)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=transport, base_url="http://localhost") as own:
        assert (await own.post("/v1/chat/completions", json=chat())).status_code == 503
        store(library, "later")
        assert (await own.post("/v1/chat/completions", json=chat())).status_code == 200

"""What the model's own generation config says holds for requests that leave it out, on every kind of request."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.boot import build
from server.engines.generation_config import SamplingDefaults, defaults_of
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from vectors.library import Library

OWN = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
BUILT_IN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.fixture
def app(settings: Settings, engine: ScriptedEngine, library: Library, vocabulary: Vocabulary) -> FastAPI:
    return create_app(settings, engine, library, vocabulary, sampling_defaults=SamplingDefaults(**OWN))  # type: ignore[arg-type]


def sampled(engine: ScriptedEngine) -> dict[str, Any]:
    sampling = engine.completions[-1].generation.sampling
    return {name: getattr(sampling, name) for name in OWN}


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat(), "/v1/completions": {"model": MODEL, "prompt": "hi", "max_tokens": 8},
    "/v1/responses": {"model": MODEL, "input": "hi", "store": False},
    "/v1/messages": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}}


@pytest.mark.parametrize("path", BODIES)
async def test_requests_get_what_they_leave_out(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    body = BODIES[path]
    answer = await client.post(path, json=body)
    assert answer.status_code == 200 and sampled(engine) == OWN
    if path == "/v1/responses":
        assert (answer.json()["temperature"], answer.json()["top_p"]) == (0.6, 0.95)
    # Null is absent, and what is asked for holds, also where it is what the API has as its default.
    await client.post(path, json={**body, "temperature": None})
    assert sampled(engine) == OWN
    await client.post(path, json={**body, "temperature": 1.0, "top_p": 1.0})
    assert sampled(engine) == OWN | {"temperature": 1.0, "top_p": 1.0}


async def test_zero_asks_for_what_it_says(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    asked = {"temperature": 0, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    await client.post("/v1/chat/completions", json=chat(**asked))
    assert sampled(engine) == {**asked, "top_p": 0.95}
    told = (await client.get("/v1/capabilities")).json()
    assert told["sampling_defaults"] == OWN


@pytest.mark.parametrize(("config", "expected"), [
    (OWN | {"do_sample": False, "eos_token_id": 2, "max_new_tokens": 5}, OWN),
    ({"temperature": 0.6, "top_k": None}, BUILT_IN | {"temperature": 0.6}),
    ({"temperature": -1, "top_p": 0, "top_k": 2.5, "min_p": True, "repetition_penalty": "1"}, BUILT_IN),
    ({}, BUILT_IN), ([], BUILT_IN), (None, BUILT_IN)])
def test_the_config_is_read_as_far_as_a_request_could_ask_for_it(tmp_path: Path, config: Any, expected: Any) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert vars(defaults_of(str(tmp_path))) == expected


def test_a_config_that_is_no_json_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    assert defaults_of(str(tmp_path)) == SamplingDefaults()


def test_a_name_that_is_nowhere_gives_nothing() -> None:
    assert defaults_of("nobody/has-this-model") == SamplingDefaults()


@pytest.mark.parametrize(("setting", "temperature"), [("auto", 0.6), ("none", 1.0)])
def test_the_setting_says_whether_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine,
                                           tokenizer: Any, setting: Any, temperature: float) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(OWN))
    given: list[SamplingDefaults] = []
    monkeypatch.setattr("server.boot.load_engine", lambda settings: engine)
    monkeypatch.setattr("server.boot.check_model", lambda model: None)
    monkeypatch.setattr("server.boot.AutoTokenizer.from_pretrained", lambda model: tokenizer)
    monkeypatch.setattr("server.boot.create_app", lambda *_, sampling_defaults, **__: given.append(sampling_defaults))
    build(Settings(model=str(tmp_path), data_dir=tmp_path / "data", generation_config=setting))
    assert given[0].temperature == temperature

"""A server over a scripted engine: real app, real library, real tokenizer; only the model is replaced."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from server.app import create_app
from server.http.listener import bind
from server.http.runner import Server
from server.observability.logs import configure_logging
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from tests.server.scripted import ScriptedEngine
from tests.server.tokenizers import byte_tokenizer
from tests.sqlite import library_url
from vectors.library import Library

MODEL = "tiny"


@pytest.fixture(autouse=True)
def _logs() -> None:
    configure_logging("json")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    return Vocabulary(tokenizer, [tokenizer.eos_token_id], len(tokenizer) + 4)


@pytest.fixture
def engine(vocabulary: Vocabulary) -> ScriptedEngine:
    return ScriptedEngine(vocabulary)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    opened = Library.open(library_url(tmp_path), str(tmp_path / "blobs"))
    yield opened
    opened.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", max_choices=4, max_prompts=4)


@pytest.fixture
def app(settings: Settings, engine: ScriptedEngine, library: Library, vocabulary: Vocabulary) -> FastAPI:
    return create_app(settings, engine, library, vocabulary, engine_name="scripted")


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=30) as found:
        yield found


@pytest.fixture
async def server(app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """The app on a port of its own, as `trimtab serve` serves it."""
    monkeypatch.setattr("server.http.runner.CHECK_S", 0.05)
    sockets = bind("127.0.0.1", 0)
    async with app.router.lifespan_context(app):
        found = Server(app, settings, settings.max_connections)
        serving = asyncio.create_task(found.serve(sockets))
        while not found.started:
            assert not serving.done(), serving.exception()
            await asyncio.sleep(0.005)
        yield found
        found.stop()
        await serving


@pytest.fixture
def port(server: Server) -> int:
    found: int = server.servers[0].sockets[0].getsockname()[1]
    return found


@pytest.fixture
def address(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}

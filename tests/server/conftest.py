"""A server over a scripted engine: real app, real library, real tokenizer; only the model is replaced."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from server.app import create_app
from server.logs import configure_logging
from server.openai.vocabulary import Vocabulary
from server.settings import Settings
from tests.server.scripted import ScriptedEngine
from tests.server.tokenizers import byte_tokenizer
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
    opened = Library.open(f"sqlite:///{tmp_path / 'library.db'}", str(tmp_path / "blobs"))
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


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}

"""Trimtab's real app around an engine, asked in process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from transformers import AutoTokenizer

from lab import model_path
from server.app import create_app
from server.engines.base import Engine
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from vectors.library import Library


class Running:
    """An engine that somebody else starts and stops."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> None:
        return None

    async def stop(self) -> None:
        return None


def make_app(name: str, engine: Any, engine_name: str, folder: Path, **chosen: Any) -> FastAPI:
    """The app of lab model `name` with a library of its own in `folder`, under the settings `chosen`."""
    settings = Settings(model=str(model_path(name)), data_dir=folder, shadow_sample=0.0, **chosen,
                        engine=engine_name)
    folder.mkdir(parents=True, exist_ok=True)
    library = Library.open(settings.library_database_url, settings.library_blob_url)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    vocabulary = Vocabulary(tokenizer, list(engine.end_ids), engine.facts.vocab_size)
    return create_app(settings, engine, library, vocabulary, engine_name=engine_name)


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=300) as client:
        yield client

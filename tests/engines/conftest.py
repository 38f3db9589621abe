"""Tiny models on disk and engines on them."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from server.app import create_app
from server.engines.data import Generation, Sampling, Token, Touched
from server.engines.transformers.engine import TransformersEngine
from server.engines.transformers.options import EngineOptions
from server.settings import Settings
from server.text.vocabulary import Vocabulary
from steering.artifacts.source import Resolved
from steering.language.intervention import Intervention
from steering.programs.compiler import compile_program
from steering.programs.program import Program
from tests.server.tokenizers import byte_tokenizer
from tests.tiny import tiny
from vectors.library import Library

MODEL = "tiny"
torch.set_num_threads(1)
PATIENCE_S = 60
_counter = itertools.count()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny(family).save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
async def start_engine(model_dir: Callable[[str], Path]) -> AsyncIterator[Callable[..., Any]]:
    """`await start_engine(family, **options)`; `model` is a folder to load instead. Stopped at the end of the test."""
    engines: list[TransformersEngine] = []

    async def start(family: str, **options: Any) -> TransformersEngine:
        settings: dict[str, Any] = {"kv_cache_tokens": 4096, "max_batch_tokens": 128, "page_size": 8,
                                    "self_test": False, "model_id": "tiny"}
        if "model" not in options:
            settings["model"] = str(model_dir(family))
        engine = TransformersEngine(EngineOptions(**{**settings, **options}))
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.stop()


@pytest.fixture
def serve(model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    """`async with serve(max_requests, **engine options) as (app, client)`: the whole application on a tiny model."""

    @asynccontextmanager
    async def serve(max_requests: int, **options: Any) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
        engine = TransformersEngine(EngineOptions(**{
            "model": str(model_dir("qwen3")), "model_id": MODEL, "kv_cache_tokens": 8192, "max_batch_tokens": 512,
            "page_size": 8, "self_test": False, "max_requests": max_requests, **options}))
        library = Library.open(f"sqlite:///{tmp_path / 'library.db'}", str(tmp_path / "blobs"))
        tokenizer = byte_tokenizer()
        settings = Settings(served_model_name=MODEL, data_dir=tmp_path / "data", max_choices=16, max_prompts=64,
                            max_requests=max_requests, queue_requests=1000, queue_tokens=10**6)
        app = create_app(settings, engine, library, Vocabulary(tokenizer, [2], engine.facts.vocab_size))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(
                transport=transport, base_url="http://localhost", timeout=300) as client:
            yield app, client

    return serve


def compiled(engine: TransformersEngine, *interventions: dict[str, Any]) -> Program:
    """A program of inline interventions."""
    return compile_program([Resolved(Intervention.model_validate(item)) for item in interventions], engine.facts)


async def generate(engine: TransformersEngine, prompt: list[int], program: Program | None = None, *,
                   roles: list[str] | None = None, **sampling: Any) -> tuple[list[Token], list[Touched]]:
    """All tokens of one completion (greedy, with log-probabilities, unless told otherwise) and what was touched."""
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "logprobs": 5, **sampling}
    completion = engine.generate(Generation(f"request-{next(_counter)}", prompt, Sampling(**settings), program, roles))
    return [token async for token in completion], completion.touched()


async def at_rest(engine: Any) -> None:
    """Until nothing runs, waits or holds a slot. The engine lets go of a request after its client has the last token,
    and a sampled effect is measured after the answer, so that neither has to be over when a client asks."""
    stats = engine.stats
    try:
        async with asyncio.timeout(PATIENCE_S):
            while any(stats()[name] for name in ("running", "waiting", "slots_used")):
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"the engine does not come to rest, because of {stats()}") from None


def ids(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]

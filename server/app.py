"""The application: everything made once, joined, and started and stopped with the server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import Depends, FastAPI

from server.engines.base import Engine
from server.handlers import add_handlers
from server.jobs import Jobs
from server.metrics import Metrics
from server.middleware import RequestFrame
from server.openai import chat, completions, models
from server.openai.prompts import ChatPrompts
from server.openai.vocabulary import Vocabulary
from server.planner import Planner
from server.routes import admin, artifacts, capabilities, extract, health, jobs, presets
from server.settings import Settings
from server.state import ServerState, require_key
from vectors.library import Library

ROUTERS = (chat.router, completions.router, models.router, artifacts.router, presets.router, capabilities.router,
           extract.router, jobs.router, admin.router)
DESCRIPTION = "Inference-time steering behind OpenAI's API: each request may carry a `steering` field."


def create_app(settings: Settings, engine: Engine, library: Library, vocabulary: Vocabulary, *,
               engine_name: str = "transformers") -> FastAPI:
    """
    Args:
        engine: started and stopped with the app.
        library: closed with the app.
        vocabulary: of the engine's model.
        engine_name: as receipts state it.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        # After the start: the self-test has narrowed the facts to what it reached.
        app.state.server = state = ServerState(
            settings=settings, engine=engine, engine_name=engine_name, library=library, vocabulary=vocabulary,
            chat_prompts=ChatPrompts(vocabulary), planner=Planner(settings, library, engine.facts), metrics=metrics,
            jobs=Jobs(settings.data_dir / "jobs", settings.max_jobs))
        try:
            await anyio.to_thread.run_sync(state.jobs.load)
            yield
        finally:
            await state.jobs.stop()
            await engine.stop()
            await anyio.to_thread.run_sync(library.close)

    app = FastAPI(title="Trimtab", version="1", description=DESCRIPTION, lifespan=lifespan,
                  generate_unique_id_function=lambda route: route.name)
    app.add_middleware(RequestFrame, metrics=metrics, max_body_bytes=settings.max_body_bytes,
                       max_upload_bytes=settings.max_upload_bytes)
    add_handlers(app, metrics)
    app.include_router(health.router)
    responses: dict[int | str, dict[str, Any]] = {"4XX": {"model": health.ErrorBody, "description": "Refused."},
                                                  "5XX": {"model": health.ErrorBody, "description": "Failed."}}
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(require_key)], responses=responses)
    return app

"""The whole server on the bundled model: real engine, real library, real HTTP, the unmodified openai client."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
import uvicorn
from openai import AsyncOpenAI

from lab import model_path
from server.boot import build
from server.settings import Settings

torch.set_num_threads(1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """A running server on a free port, with few slots so that specs must wait for one another."""
    data: Path = tmp_path_factory.mktemp("data")
    app = build(Settings(model=str(model_path("lab-dense")), data_dir=data, slots=16, slot_wait_s=300,
                         max_batch_tokens=256, kv_cache_tokens=8192))
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        task = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started:
            if task.done():
                task.result()
                pytest.fail("the server stopped before it started")
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        await task


@pytest_asyncio.fixture(loop_scope="module")
async def client(server_url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server_url}/v1", api_key="unused", timeout=600, max_retries=0) as made:
        yield made

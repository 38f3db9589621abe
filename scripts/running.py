"""A Trimtab server inside the calling process, for scripts that use it as a client would."""

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn

from lab import model_path
from server.boot import build
from server.http.runner import KEEP_ALIVE_S
from server.settings import Settings


@contextlib.asynccontextmanager
async def running_server(model: str = "lab-dense", **settings: Any) -> AsyncIterator[str]:
    """Base URL of a fresh server on a bundled model, with an empty library in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(socket.socket()) as sock:
        app = build(Settings(**{"model": str(model_path(model)), "data_dir": Path(folder), **settings}))
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False,
                                               timeout_keep_alive=KEEP_ALIVE_S))
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started:
            if serving.done():
                serving.result()
                raise RuntimeError("the server stopped before it started")
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving

"""A server on a model in a process of its own, as a user starts it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_S = 900


@contextmanager
def serving(folder: Path, model: str, *options: str, threads: int | None = None
            ) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """The process of `trimtab serve MODEL` and its address, when it answers. Its library lies in `folder`. threads: of
    a pass through the model; by default as many as the machine offers, or the environment says.

    Raises:
        RuntimeError: it ended, or does not answer in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", "from server.cli import app; app()", "serve", model,
                                "--port", str(port), "--data-dir", str(folder / "data"), *options],
                               env={**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})})
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_S
        while not ready(url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {process.poll()}")
            time.sleep(1)
        yield process, url
    finally:
        process.terminate()
        process.wait(timeout=60)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False

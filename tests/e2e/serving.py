"""`trimtab serve lab-dense` in a process of its own, and streams of it."""

import concurrent.futures
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import START_S, wait_until_ready

CHAT = "/v1/chat/completions"
LONG = {"model": "lab-dense", "messages": [{"role": "user", "content": "Hello."}],
        "max_tokens": 400, "ignore_eos": True}


@contextmanager
def serving(folder: Path, preexec: Callable[[], None] | None = None, **settings: str
            ) -> Iterator[tuple["subprocess.Popen[bytes]", str, Path]]:
    """The process, its base URL and its log. It leads a process group of its own, as one started from a shell does."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from server.cli import app; app()", "serve", "lab-dense", "--port", str(port),
             "--data-dir", str(folder / "data"), "--no-examples"], stdout=output, stderr=output, preexec_fn=preexec,
            process_group=0,
            env={**os.environ, **settings})
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, time.monotonic() + START_S)
        yield process, url, log
    finally:
        process.kill()
        process.wait(timeout=60)


def stream(url: str, begun: Callable[[], Any]) -> list[str]:
    """Data of all events; raises if the stream is cut."""
    found = []
    with httpx.stream("POST", f"{url}{CHAT}", json={**LONG, "stream": True}, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line:
                found.append(line.removeprefix("data: "))
                begun()
    return found


def once(future: "concurrent.futures.Future[None]") -> Callable[[], None]:
    def resolve() -> None:
        if not future.done():
            future.set_result(None)

    return resolve

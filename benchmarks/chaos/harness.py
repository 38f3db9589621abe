"""A server in a process of its own, started, signalled and watched from outside."""

import asyncio
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from benchmarks.chaos.disk import Disk

START_S = 600.0
POLL_S = 0.1


class Server:
    """`trimtab serve` on a free port of loopback. Its data outlive it; `log` is what all its lives wrote."""

    def __init__(self, folder: Path, model: str, engine: str) -> None:
        self.model, self.engine = model, engine
        self.disk = Disk(folder / "data")
        self.log = folder / "log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self, **settings: object) -> None:
        """Returns once it is ready.

        Raises:
            TimeoutError: it ended, or was not ready in time; with the end of its log.
        """
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [*self.disk.prefix, sys.executable, "-m", "benchmarks.chaos.serve", "serve", self.model, "--port",
                   str(port), "--data-dir", str(self.disk.folder), "--engine", self.engine, "--no-examples"]
        environment = {f"TRIMTAB_{name.upper()}": str(value) for name, value in settings.items()}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log,
                                             stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        async with httpx.AsyncClient(base_url=self.url, timeout=5) as http:
            while time.monotonic() < deadline and self.running:
                with suppress(httpx.HTTPError):
                    if (await http.get("/health/ready")).status_code == 200:
                        return
                await asyncio.sleep(0.2)
        raise TimeoutError(f"the server did not become ready: {self.log.read_text(errors='replace')[-2000:]}")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    async def wait(self, timeout_s: float) -> int:
        """Its exit code.

        Raises:
            TimeoutError: it goes on.
        """
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while (code := self._process.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server still runs after {timeout_s:.0f} s")
            await asyncio.sleep(0.05)
        return code

    async def kill(self) -> None:
        """SIGKILL, to the children too, which would otherwise notice in their own time."""
        children = psutil.Process(self.pid).children(recursive=True) if self.running else []
        if self.running:
            self.signal(signal.SIGKILL)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        await self.wait(60)

    async def close(self) -> None:
        if self.running:
            await self.kill()
        self.disk.close()

    def engine_process(self) -> psutil.Process:
        """The process of vLLM's engine core."""
        children = psutil.Process(self.pid).children(recursive=True)
        return max(children, key=lambda child: child.memory_info().rss)

    def memory_mib(self) -> float:
        """Resident memory of the server and all that it started."""
        process = psutil.Process(self.pid)
        total = 0
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += each.memory_info().rss
        return total / 2**20

    def written_since(self, offset: int) -> str:
        """What the log holds after `offset` bytes."""
        with self.log.open("rb") as log:
            log.seek(offset)
            return log.read().decode(errors="replace")

    @contextmanager
    def locked_database(self) -> Iterator[None]:
        """Nobody else can write to the library meanwhile."""
        with sqlite3.connect(self.disk.seen / "library.db", timeout=30, isolation_level=None) as held:
            held.execute("BEGIN EXCLUSIVE")
            try:
                yield
            finally:
                held.execute("ROLLBACK")
        held.close()


class Readiness:
    """What `/health/ready` says, asked all the time. No answer within two seconds is a no."""

    def __init__(self) -> None:
        self.ready: bool | None = None
        self.slowest_s = 0.0
        self._answers = 0
        self._changed = asyncio.Condition()

    async def until(self, ready: bool, timeout_s: float) -> float:
        """Seconds until it says so, to a question that is asked after this call.

        Raises:
            TimeoutError: it does not.
        """
        started = time.monotonic()
        # The answer that is under way may be of before.
        fresh = self._answers + 2
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self.ready is ready and self._answers >= fresh)
        return time.monotonic() - started

    @asynccontextmanager
    async def watching(self, server: Server) -> AsyncIterator["Readiness"]:
        task = asyncio.create_task(self._watch(server))
        try:
            yield self
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self, server: Server) -> None:
        async with httpx.AsyncClient(timeout=2, limits=httpx.Limits(max_keepalive_connections=0)) as http:
            while True:
                ready = False
                started = time.monotonic()
                with suppress(httpx.HTTPError):
                    ready = (await http.get(f"{server.url}/health/ready")).status_code == 200
                    self.slowest_s = max(self.slowest_s, time.monotonic() - started)
                async with self._changed:
                    self.ready = ready
                    self._answers += 1
                    self._changed.notify_all()
                await asyncio.sleep(POLL_S)

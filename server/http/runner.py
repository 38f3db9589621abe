"""A server from its first signal to its last byte: it serves, drains, ends what is left, and says 0."""

import asyncio
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any

import anyio
import psutil
import structlog
import uvicorn
from fastapi import FastAPI

from server.http.connection import Bounds, Connection, HttpConfig
from server.http.listener import BACKLOG, connection_limit
from server.http.open_requests import OpenRequests, shutting_down
from server.http.tls import certificates, check_certificates
from server.settings import Settings
from server.starting import said
from steering.language.errors import TrimtabError

log = structlog.get_logger("trimtab.server")

# Longer than clients keep idle connections: closed by the server first, one may be reused just as it goes away.
KEEP_ALIVE_S = 75
CHECK_S = 1.0
# How long completions that are ended may take to hand over the tokens they have; then what else is open; then bytes.
RUNS_END_S = 2.0
REQUESTS_END_S = 7.0
BYTES_END_S = 2.0
# A second signal leaves streams this long to say that they end; the first leaves the engine this long to stop.
AT_ONCE_S = 1.0
ENGINE_STOP_S = 60.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(app: FastAPI, settings: Settings, sockets: list[socket.socket],
        ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve until told to stop by SIGTERM or SIGINT; returns when everything is closed.

    Args:
        sockets: bound, not listening.
        ready: called with the base URL once requests are answered.
    """
    config_only = uvicorn.Config(app, log_config=None)
    with asyncio.Runner(loop_factory=config_only.get_loop_factory()) as runner:
        runner.run(_serve(app, settings, sockets, ready))


async def _serve(app: FastAPI, settings: Settings, sockets: list[socket.socket], ready: Callable[[str], None]) -> None:
    stop = _Stop(settings.shutdown_s)
    with stop.on_signals(), _reloading(app):
        try:
            async with AsyncExitStack() as started:
                with said("the server cannot start", param="model", fix="The log above may say more."):
                    await started.enter_async_context(app.router.lifespan_context(app))
                settle()
                # Libraries that count their objects at the exit would find all of these left.
                started.callback(gc.unfreeze)
                server = Server(app, settings, connection_limit(settings.max_connections), ready)
                stop.serving(server)
                await server.serve(sockets)
        except asyncio.CancelledError:
            # Told to stop while it still started: nothing was promised to anybody.
            if not stop.told:
                raise
    log.info("stopped")


class Server(uvicorn.Server):
    """uvicorn's, with an end of its own."""

    def __init__(self, app: FastAPI, settings: Settings, max_connections: int,
                 ready: Callable[[str], None] = lambda url: None) -> None:
        if max_connections < settings.max_connections:
            log.warning("fewer connections than set: the limit of open files is low", connections=max_connections,
                        wanted=settings.max_connections)
        bounds = Bounds(settings.header_timeout_s, settings.stalled_client_s, max_connections,
                        app.state.metrics.connection_ended)
        super().__init__(HttpConfig(app, bounds, max_header_bytes=settings.max_header_bytes, host=settings.host,
                                    port=settings.port, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_S,
                                    **certificates(settings)))
        self._app = app
        self._settings = settings
        self._ready = ready
        self._next_check = 0.0

    @property
    def open_requests(self) -> OpenRequests:
        found: OpenRequests = self._app.state.open_requests
        return found

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `_Stop`'s: uvicorn would raise them again when all is done, and end the process by them."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.config.ssl is not None:
            self._app.state.reloading.certificates = partial(check_certificates, self._settings, self.config.ssl)
        self._ready(base_url(self._settings.host, self.servers[0].sockets[0].getsockname()[1],
                             secure=self.config.is_ssl))

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        if now >= self._next_check:
            self._next_check = now + CHECK_S
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check(now)
        return await super().on_tick(counter)

    def stop(self) -> None:
        """From now on new requests are refused and the server is not ready."""
        self.open_requests.close()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what is open as long as is set, then end it. The sockets stay open meanwhile: who still comes is
        told that the server goes away, instead of nothing."""
        self.open_requests.close()
        self._close_idle(kept_alive_only=True)
        log.info("shutting down", open_requests=len(self.open_requests), within_s=self._settings.shutdown_s)
        await self._emptied(self._settings.shutdown_s)
        if len(self.open_requests):
            log.warning("ending what is still open", open_requests=len(self.open_requests))
            self._app.state.server.runs.fail(shutting_down)
            await self._emptied(RUNS_END_S)
            self.open_requests.end_all()
            await self._emptied(REQUESTS_END_S)
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        await self._hung_up()

    def end_now(self) -> None:
        """Do not wait any longer for open requests."""
        self.open_requests.end_all()

    async def _emptied(self, within_s: float) -> None:
        with anyio.move_on_after(within_s):
            while len(self.open_requests):
                with anyio.move_on_after(CHECK_S):
                    await self.open_requests.wait_empty()
                await self.on_tick(1)

    def _close_idle(self, *, kept_alive_only: bool = False) -> None:
        """kept_alive_only: leave connections on which no request has arrived yet, because theirs may be on its way, and
        whoever sends it is to be told that the server goes away."""
        for connection in list(self.server_state.connections):
            unused = isinstance(connection, Connection) and connection.cycle is None
            if not (kept_alive_only and unused):
                connection.shutdown()

    async def _hung_up(self) -> None:
        """The last bytes are on their way; who does not take them is left."""
        self._close_idle()
        with anyio.move_on_after(BYTES_END_S):
            while self.server_state.connections or self.server_state.tasks:
                await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Stop:
    """What signals do: the first one drains, the second ends the process at once."""

    def __init__(self, shutdown_s: float) -> None:
        self.told = 0
        self._shutdown_s = shutdown_s
        self._server: Server | None = None
        self._main: asyncio.Task[Any] | None = None

    def serving(self, server: Server) -> None:
        self._server = server
        if self.told:
            server.stop()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        self.told += 1
        if self.told == 1:
            # Whatever hangs on the way out, the process ends.
            _exit_after(self._shutdown_s + RUNS_END_S + REQUESTS_END_S + BYTES_END_S + ENGINE_STOP_S, 1)
            if self._server is not None:
                self._server.stop()
            elif self._main is not None:
                self._main.cancel()
            return
        if self._server is not None and self.told == 2:
            self._server.end_now()
        _exit_after(AT_ONCE_S if self.told == 2 else 0.0, 128 + number)


@contextmanager
def _reloading(app: FastAPI) -> Iterator[None]:
    """SIGHUP has the settings read again. What goes wrong is in the log, and nothing changes then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    tasks: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            await app.state.reloading.reload()
        except TrimtabError as error:
            log.error("settings_not_reloaded", param=error.param, error=str(error))

    def on_signal() -> None:
        tasks.add(task := asyncio.create_task(reload()))
        task.add_done_callback(tasks.discard)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, on_signal)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def settle() -> None:
    """Take all that is there once the server has started out of what the garbage collector looks through. Otherwise it
    stops the process for a tenth of a second and more each time a body brings many lists."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _exit_after(seconds: float, code: int) -> None:
    """End this process and those it started, without asking anybody."""

    def end() -> None:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def base_url(host: str, port: int, *, secure: bool = False) -> str:
    return f"http{'s' if secure else ''}://{f'[{host}]' if ':' in host else host}:{port}"

"""A server inside this process, on a port of its own, for commands that work without a running one."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from steering.language.errors import EngineUnavailable

POLL_S = 0.05


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve `app` on a free loopback port while the block runs. Yields the base URL.

    Raises:
        EngineUnavailable: it did not start; the log says why.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))

    def serve() -> None:
        # A start that fails ends in sys.exit, which means nothing in a thread; `started` stays false.
        with suppress(SystemExit):
            server.run(sockets=[listener])

    thread = threading.Thread(target=serve, name="trimtab-in-process")
    thread.start()
    try:
        while not server.started:
            thread.join(POLL_S)
            if not thread.is_alive():
                raise EngineUnavailable("the server in this process did not start", fix="See the log above, or run "
                                        "trimtab doctor.")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()

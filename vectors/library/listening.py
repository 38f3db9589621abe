"""A connection on which PostgreSQL says at once that another process has changed the library."""

import select
import socket
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine

from vectors.library.revision import CHANNEL

# How often it is looked whether the connection still stands, and how long to wait before another one is tried.
LOOK_S, AGAIN_S = 5.0, 0.5


class Listening:
    """Listens from `start` to `stop`, in a thread of its own, and connects again for as long as that takes.

    Args:
        told: called in that thread with the number of the library's revision; with None after the connection was made,
            because changes may have been missed before.

    Attributes:
        connected: whether changes are told at present.
        failure: why the connection was lost or not made, the last time that happened.
    """

    def __init__(self, engine: Engine, told: Callable[[int | None], None]) -> None:
        self._engine, self._told = engine, told
        self.connected = False
        self.failure: str | None = None
        self._stopped = threading.Event()
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="trimtab-listening", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._waker.send(b"x")
        self._thread.join()
        self._wake.close()
        self._waker.close()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._listen()
            except Exception as error:  # whatever the driver raises, the library is asked meanwhile
                self.failure = f"{type(error).__name__}: {error}"[:300]
            self.connected = False
            self._stopped.wait(AGAIN_S)

    def _listen(self) -> None:
        """Until the connection is lost or no longer wanted."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            driver: Any = connection.connection.driver_connection
            # It is one more than the pool's, and closed when it is not wanted any longer.
            connection.detach()
            connection.exec_driver_sql(f"LISTEN {CHANNEL}")
            self.connected = True
            self._told(None)
            while not self._stopped.is_set():
                readable, _, _ = select.select([driver.fileno(), self._wake], [], [], LOOK_S)
                if not readable:
                    driver.execute("SELECT 1")
                driver.pgconn.consume_input()
                while (notice := driver.pgconn.notifies()) is not None:
                    self._told(int(notice.extra))

"""A server that speaks the protocol of S3 (moto's), and that can be told to fail."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

SLOW_DOWN = (b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message>'
             b"</Error>")


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        """Nothing of it is of interest."""


class S3:
    """
    Attributes:
        refuses: of a method of HTTP, how many of the next requests get a 503.
        damage: what becomes of the bytes of the next answers to GET; None for what they are.
        checksums: SHA-256 of their bodies that requests told.
    """

    def __init__(self) -> None:
        self.refuses: dict[str, int] = {}
        self.damage: Callable[[bytes], bytes] | None = None
        self.checksums: list[str] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._lock = threading.Lock()

    def environment(self) -> dict[str, str]:
        """What clients of it need; they are whoever they like."""
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1"}

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        with self._lock:
            if (told := environ.get("HTTP_X_AMZ_CHECKSUM_SHA256")) is not None:
                self.checksums.append(told)
            refused = self.refuses.get(method, 0) > 0
            if refused:
                self.refuses[method] -= 1
        if refused:
            # Read, because a body that is left unread would be taken for the next request.
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [SLOW_DOWN]
        body = b"".join(self._app(environ, start_response))
        return [self.damage(body) if method == "GET" and self.damage is not None else body]

    @contextmanager
    def running(self) -> Iterator["S3"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

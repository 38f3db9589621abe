"""What is decided before a byte of the body is read, and how the body is bounded. At the level of ASGI messages."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from structlog.testing import capture_logs

from server.settings import Settings
from tests.server.scripted import ScriptedEngine

CHAT, IMPORT = "/v1/chat/completions", "/v1/artifacts/import"
JSON = {"content-type": "application/json"}


class Client:
    """One request, its body given part by part; `read` counts the parts that were asked for before the answer began.

    A part that is None never comes: the client is silent from there on. Parts that end leave the connection.
    """

    def __init__(self, app: FastAPI, path: str, headers: dict[str, str], parts: Iterable[bytes | None], *,
                 whole: bool = False) -> None:
        """whole: the first part is the last one and says so."""
        self.app = app
        self.whole = whole
        self.parts = iter(parts)
        self.read = 0
        self.sent: list[Any] = []
        self.scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 1), "client": ("x", 1),
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "headers": [(k.lower().encode(), v.encode()) for k, v in {"host": "localhost", **headers}.items()]}

    async def receive(self) -> Any:
        self.read += not self.sent
        for part in self.parts:
            if part is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": part, "more_body": not self.whole}
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def ask(self) -> int:
        """The status; 0 if nothing was answered."""
        async with self.app.router.lifespan_context(self.app), asyncio.timeout(30):
            await self.app(self.scope, self.receive, self.send)
        return self.sent[0]["status"] if self.sent else 0

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}


class TestWithKey:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"api_key": SecretStr("k")})

    @pytest.mark.parametrize("path", [CHAT, "/v1/artifacts", IMPORT, "/v1/presets", "/nowhere"])
    async def test_no_byte_of_the_body_is_read_without_the_key(self, app: FastAPI, path: str) -> None:
        refused = Client(app, path, JSON | {"content-length": "40000000", "expect": "100-continue"}, [b"["])
        assert (await refused.ask(), refused.read) == (401, 0)

    async def test_with_the_key_it_is(self, app: FastAPI) -> None:
        given = Client(app, CHAT, JSON | {"authorization": "Bearer k", "content-length": "3"}, [b"[", b"1]"])
        await given.ask()
        assert given.read >= 2

    async def test_a_refused_client_is_heard_out_for_a_moment_and_then_left(self, app: FastAPI) -> None:
        refused = Client(app, CHAT, JSON | {"content-length": "999"}, [b"x"] * 3 + [None])
        assert await refused.ask() == 401
        assert refused.headers["connection"] == "close"
        body = [m for m in refused.sent if m["type"] == "http.response.body"]
        assert b"invalid_api_key" in body[0]["body"] and body[-1] == {
            "type": "http.response.body", "body": b"", "more_body": False}
        assert next(refused.parts, "all were read") == "all were read"


class TestSize:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_body_bytes": 2000, "max_upload_bytes": 5000, "max_header_bytes": 3000})

    @pytest.mark.parametrize(("path", "size", "status"), [
        (CHAT, 2001, 413), ("/v1/artifacts", 2001, 413), (CHAT, 1999, 400), (IMPORT, 2001, 400), (IMPORT, 5001, 413)])
    async def test_announced(self, app: FastAPI, path: str, size: int, status: int) -> None:
        kind = "application/octet-stream" if path == IMPORT else "application/json"
        client = Client(app, path, {"content-type": kind, "content-length": str(size)}, [b"x" * size], whole=True)
        assert await client.ask() == status
        assert client.read == (0 if status == 413 else 1)

    async def test_sent_without_announcement(self, app: FastAPI, engine: ScriptedEngine) -> None:
        client = Client(app, CHAT, JSON | {"transfer-encoding": "chunked"}, [b" " * 1500] * 9)
        assert (await client.ask(), client.read) == (413, 2)
        assert engine.completions == []

    @pytest.mark.parametrize("where", ["header", "query"])
    async def test_headers(self, app: FastAPI, where: str) -> None:
        client = Client(app, CHAT, JSON | ({"x-long": "x" * 3000} if where == "header" else {}), [])
        if where == "query":
            client.scope["query_string"] = b"q=" + b"x" * 3000
        assert (await client.ask(), client.read) == (431, 0)


class TestTime:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"body_timeout_s": 0.05})

    @pytest.mark.parametrize("parts", [[None], [b"{", None]])
    async def test_a_body_that_does_not_come(self, app: FastAPI, parts: list[bytes | None]) -> None:
        client = Client(app, CHAT, JSON | {"content-length": "90"}, parts)
        assert await client.ask() == 408
        assert client.headers["connection"] == "close"

    async def test_dripping_does_not_help(self, app: FastAPI) -> None:
        client = Client(app, CHAT, JSON | {"content-length": "90000"}, [])

        async def receive() -> Any:
            await asyncio.sleep(0.001)
            return {"type": "http.request", "body": b" ", "more_body": True}

        client.receive = receive  # type: ignore[method-assign]
        assert await client.ask() == 408


@pytest.mark.parametrize(("path", "kind"), [(CHAT, "application/json"), (IMPORT, "application/octet-stream"),
                                            (IMPORT, "multipart/form-data; boundary=x")])
async def test_a_client_that_leaves_in_mid_body_is_no_failure(app: FastAPI, path: str, kind: str) -> None:
    client = Client(app, path, {"content-type": kind, "content-length": "90"}, [b"--x\r\n"])
    with capture_logs() as logged:
        assert await client.ask() == 0
    assert [(line["event"], line["log_level"], line["status"]) for line in logged] == [("request", "info", 499)]

"""Clients that are slow, silent, too many or no clients at all, over real connections."""

import asyncio
import json
import socket
from contextlib import closing, suppress
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.http.runner import Server
from server.settings import Settings
from tests.server.conftest import chat
from tests.server.scripted import ScriptedEngine

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SOON_S = 0.2


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"header_timeout_s": SOON_S, "body_timeout_s": SOON_S,
                                       "stalled_client_s": SOON_S, "max_connections": 4})


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server ends the connection."""
    found = b""
    async with asyncio.timeout(60):
        with suppress(ConnectionResetError):
            while part := await reader.read(65536):
                found += part
    return found


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


async def ended(app: FastAPI, reason: str) -> None:
    line = f'trimtab_connections_ended_total{{reason="{reason}"}} 1.0'
    async with asyncio.timeout(60):
        while line not in app.state.metrics.render(app.state.server.engine).decode():
            await asyncio.sleep(0.01)


async def test_one_that_sends_nothing(port: int, app: FastAPI) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await rest(reader) == b""
    await ended(app, "slow_head")
    writer.close()


async def test_a_head_that_drips(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def drip() -> None:
        for byte in HEAD + b"X-Long: " + b"x" * 10_000:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    assert error_of(await rest(reader)) == (408, "body_timeout")
    dripping.cancel()
    writer.close()


async def test_a_body_that_does_not_come(port: int, engine: ScriptedEngine) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD + b"Content-Length: 100\r\n\r\n{")
    assert error_of(await rest(reader)) == (408, "body_timeout")
    assert engine.completions == []
    writer.close()


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n",
                                  b"GET / HTTP/1.1\r\n\r\n", HEAD + b"X: " + b"x" * 20_000])
async def test_what_is_no_request(port: int, app: FastAPI, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    assert error_of(await rest(reader)) == (400, "invalid_http")
    await ended(app, "invalid")
    writer.close()


async def test_an_upgrade_is_an_ordinary_request(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"\r\n"), 30)
    writer.close()


async def test_more_than_there_may_be(port: int, settings: Settings, engine: ScriptedEngine, address: str) -> None:
    engine.gate = asyncio.Event()
    body = json.dumps(chat()).encode()
    held = []
    for n in range(settings.max_connections):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        held.append((reader, writer))
        while len(engine.completions) <= n:
            await asyncio.sleep(0.005)
    refused, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = await rest(refused)
    assert error_of(answer) == (503, "too_many_connections") and b"\r\nRetry-After: 5\r\n" in answer
    writer.close()
    engine.gate.set()
    for reader, writer in held:
        assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"\r\n"), 30)
        writer.close()
    async with httpx.AsyncClient() as client:
        while (await client.get(f"{address}/health")).status_code == 503:
            await asyncio.sleep(0.01)


def stream_of_megabytes(port: int) -> socket.socket:
    """A client that asked for more than all buffers on the way hold, and has read nothing yet."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    sock.settimeout(30)
    sock.connect(("127.0.0.1", port))
    body = json.dumps(chat(stream=True, n=4, ignore_eos=True, max_tokens=200, logprobs=True, top_logprobs=20)).encode()
    sock.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock


async def test_one_that_does_not_read_loses_its_request(port: int, app: FastAPI, server: Server) -> None:
    sock = stream_of_megabytes(port)
    await ended(app, "stalled")
    async with asyncio.timeout(30):
        while len(server.open_requests):
            await asyncio.sleep(0.005)
    assert not server.server_state.connections
    sock.close()


async def test_one_that_reads_late_but_reads_gets_all(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.connection.TAKEN_BYTES", 1)
    loop = asyncio.get_running_loop()
    read = bytearray()
    with closing(stream_of_megabytes(port)) as sock:
        sock.setblocking(False)
        while b"[DONE]" not in read[-40:]:
            part = await asyncio.wait_for(loop.sock_recv(sock, 8192), 60)
            assert part, "the connection was ended"
            read += part
            # All of it takes many times as long as a client may read nothing.
            await asyncio.sleep(0.003)
    assert len(read) > 1_000_000


async def test_what_a_slow_one_leaves_unread_is_bounded(port: int, app: FastAPI, engine: ScriptedEngine,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.requests.generate.MAX_UNREAD", 150)
    with closing(stream_of_megabytes(port)):
        async with asyncio.timeout(60):
            while not engine.completions or not all(c.cancelled.is_set() for c in engine.completions):
                await asyncio.sleep(0.005)
    assert 200 < sum(len(c.given) for c in engine.completions) < 4 * 200


async def test_connections_are_kept_between_requests(address: str, port: int, server: Server) -> None:
    async with httpx.AsyncClient() as client:
        for _ in range(2):
            answer: Any = await client.post(f"{address}/v1/chat/completions", json=chat())
            assert answer.status_code == 200 and "connection" not in answer.headers
            assert len(server.server_state.connections) == 1
            # Longer than a head may take: between requests another limit holds.
            await asyncio.sleep(2 * SOON_S)

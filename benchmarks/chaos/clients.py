"""Clients that nobody would want: they leave, they do not read, they never finish what they say."""

import asyncio
import json
from contextlib import suppress
from typing import Literal
from urllib.parse import urlsplit

import httpx

from benchmarks.chaos.chaos import HANG_S, Chaos
from benchmarks.chaos.oracle import Body

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Said = Literal["nothing", "head", "body"]
# Little enough that a stream which is not read soon fills it.
RECEIVE_BUFFER = 4096


async def leave_stream(chaos: Chaos, events: int, max_tokens: int = 60) -> None:
    """Read that many events of a stream of a random kind and go away; 0: without waiting for the first."""
    chance = chaos.random
    body = chaos.completion(prompt="The cat sat near " * chance.choice((1, 8, 20)), stream=True, max_tokens=max_tokens,
                            ignore_eos=True, n=chance.choice((1, 1, 3)), seed=chance.randrange(10**6),
                            logprobs=chance.choice((None, 3)))
    if chance.random() < 0.6:
        guard = {"guard": {"kl": 5.0}} if chance.random() < 0.3 else {}
        report = {"report": "summary"} if chance.random() < 0.3 else {}
        body["steering"] = {"interventions": [chaos.innocents.intervention()], **guard, **report}
    chaos.counts["streams left"] += 1
    with suppress(httpx.HTTPError):
        async with asyncio.timeout(HANG_S), chaos.http.stream("POST", "/v1/completions", json=body) as answer:
            if events == 0:
                return
            async for line in answer.aiter_lines():
                events -= bool(line)
                if events <= 0:
                    return


async def half_request(url: str, kind: Said) -> Connection:
    """A connection that sends this much of a request and then nothing more."""
    reader, writer = await _connect(url)
    if kind == "head":
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-")
    elif kind == "body":
        writer.write(_head(100_000) + b'{"model": "')
    await writer.drain()
    return reader, writer


async def slow_reader(url: str, body: Body) -> Connection:
    """A connection that asks for a stream and reads none of it."""
    reader, writer = await _connect(url)
    content = json.dumps(body).encode()
    writer.write(_head(len(content)) + content)
    await writer.drain()
    return reader, writer


def _head(length: int) -> bytes:
    return (f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n\r\n").encode()


async def _connect(url: str) -> Connection:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=RECEIVE_BUFFER)
    return reader, writer

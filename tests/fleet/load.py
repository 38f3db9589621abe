"""Clients under load, and a log of all that they were answered."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MODEL = "lab-dense"
# Nothing of the test waits longer for an answer; what takes so long hangs.
ANSWER_S = 240.0
NEVER = float("inf")


def now() -> float:
    """The clock of the whole test."""
    return time.monotonic()


@dataclass
class Answer:
    """One request and what came of it.

    Attributes:
        asked: what the oracles have to know of the request.
        replica: who answered; "" for nobody, or the balancer itself.
        first, ended: when the head came, and when the last byte came or the connection broke.
        status: 0 where no head came.
        cut: why the answer is not whole, "" where it is.
        steering: its receipt. body: of a whole JSON answer.
    """

    method: str
    path: str
    key: str
    asked: dict[str, Any]
    began: float
    first: float = NEVER
    ended: float = NEVER
    replica: str = ""
    status: int = 0
    request_id: str = ""
    cut: str = ""
    stream: bool = False
    body: Any = None
    steering: dict[str, Any] | None = None
    tokens: int = 0

    @property
    def code(self) -> str:
        """Of the error that it is, or that its stream ended with."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return str(error["code"]) if isinstance(error, dict) else ""

    @property
    def done(self) -> bool:
        return 200 <= self.status < 300 and not self.cut and not self.code

    def __str__(self) -> str:
        return (f"{self.method} {self.path} of {self.key} at {self.began:.3f}-{self.ended:.3f}, "
                f"{self.replica or 'nobody'}: {self.status} {self.code} {self.cut} {self.asked}")


@dataclass
class Log:
    """All answers in the order in which they were asked for; `open` are those that have not ended. names: of keys."""

    answers: list[Answer] = field(default_factory=list)
    open: dict[int, Answer] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    _waiting: set[asyncio.Event] = field(default_factory=set)

    def begun(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.open[id(answer)] = answer

    def ended(self, answer: Answer) -> None:
        answer.ended = now()
        del self.open[id(answer)]
        for event in self._waiting:
            event.set()

    def since(self, at: float) -> Iterator[Answer]:
        """Of those that ask the model, those that began later, the newest first."""
        return (answer for answer in itertools.takewhile(lambda one: one.began > at, reversed(self.answers))
                if answer.path in (CHAT, RESPONSES))

    @property
    def chats(self) -> Iterator[Answer]:
        """Those that ask the model."""
        return (answer for answer in self.answers if answer.path in (CHAT, RESPONSES))

    async def until(self, condition: Callable[[], bool], what: str, within_s: float = 300.0) -> None:
        """Wait for a condition that answers of clients bring about."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    # Time passes too, and a condition may be about something else than answers.
                    try:
                        async with asyncio.timeout(0.2):
                            await event.wait()
                    except TimeoutError:
                        pass
                    event.clear()
        except TimeoutError:
            raise AssertionError(f"after {within_s} s it is not so that {what}; the last answers:\n" + "\n".join(
                map(str, self.answers[-12:]))) from None
        finally:
            self._waiting.discard(event)


class Asker:
    """Sends requests with one client and logs what comes back. where: who answers, for a client of one replica alone;
    by default the balancer marks it."""

    def __init__(self, url: str, log: Log, where: str = "") -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=httpx.Limits(max_connections=100))
        self._log, self._where = log, where

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, method: str, path: str, key: str, json_body: Any = None, **asked: Any) -> Answer:
        stream = isinstance(json_body, dict) and bool(json_body.get("stream"))
        answer = Answer(method, path, self._log.names.get(key, "owner"), asked, now(), stream=stream)
        self._log.begun(answer)
        try:
            async with self._client.stream(method, path, json=json_body,
                                           headers={"Authorization": f"Bearer {key}"}) as response:
                answer.first, answer.status = now(), response.status_code
                answer.replica = self._where or response.headers.get("x-replica", "")
                answer.request_id = response.headers.get("x-trimtab-request", "")
                if stream and response.status_code == 200:
                    await _read_events(response.aiter_lines(), answer)
                else:
                    _read_body(await response.aread(), answer)
        except httpx.TransportError as error:
            answer.cut = f"{type(error).__name__}: {error}"
        finally:
            self._log.ended(answer)
        return answer


def _read_body(data: bytes, answer: Answer) -> None:
    try:
        answer.body = json.loads(data) if data else None
    except ValueError:
        # The balancer's own pages are HTML.
        return
    if answer.path in (CHAT, RESPONSES) and answer.status == 200:
        answer.steering, usage = answer.body["steering"], answer.body["usage"]
        answer.tokens = usage["completion_tokens" if answer.path == CHAT else "output_tokens"]


async def _read_events(lines: AsyncIterator[str], answer: Answer) -> None:
    ended = False
    async for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            ended = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            answer.body = chunk
        if chunk.get("steering") is not None:
            answer.steering = chunk["steering"]
        if chunk.get("usage") is not None:
            answer.tokens = chunk["usage"]["completion_tokens"]
    if not ended:
        answer.cut = "the stream ended without its end"


def chat(user: str | None = None, *, tokens: int = 6, stream: bool = False, steering: Any = None) -> dict[str, Any]:
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me of the hotel."}],
                            "max_tokens": tokens, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if user is not None:
        body["user"] = user
    return body if steering is None else body | {"steering": steering}


class Load:
    """Clients that ask again and again until they are told to stop, each what its list has next."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self._stopping = False

    async def repeat(self, asks: Callable[[int], Awaitable[Any]], pause_s: float) -> None:
        for n in itertools.count():
            if self._stopping:
                return
            await asks(n)
            await asyncio.sleep(pause_s)

    @asynccontextmanager
    async def running(self, *clients: tuple[Callable[[int], Awaitable[Any]], float]) -> AsyncIterator[None]:
        """clients: what the n-th request of each is, and how long it waits between two. The block ends when the last
        answers have come; a fault of a client ends the block."""
        async with asyncio.TaskGroup() as group:
            for asks, pause_s in clients:
                group.create_task(self.repeat(asks, pause_s))
            try:
                yield
            finally:
                self._stopping = True

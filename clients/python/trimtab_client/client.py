"""The two clients: the same endpoints over httpx, blocking and async."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from trimtab_client.endpoints import Endpoints
from trimtab_client.errors import ConnectionFailed, TrimtabError, refusal
from trimtab_client.flow import Answer, Call, Flow, Pause, Stream, event_data

T = TypeVar("T")
# Generation may take long before its first byte; what hangs is found by connecting.
TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class Client(Endpoints):
    """Blocking client. Usable as a context manager; `http` takes the place of the connection it would make."""

    def __init__(self, base_url: str = "http://127.0.0.1:8000", *, api_key: str | None = None,
                 timeout: httpx.Timeout | float = TIMEOUT, http: httpx.Client | None = None) -> None:
        self._http = http or httpx.Client(base_url=base_url, headers=_headers(api_key), timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def run(self, work: Call[T] | Flow[T]) -> T:
        if isinstance(work, Call):
            return self._answered(work)
        sent: Any = None
        while True:
            try:
                step = work.send(sent)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            sent = None
            if isinstance(step, Pause):
                time.sleep(step.seconds)
            else:
                sent = self._answered(step)

    def _answered(self, call: Call[T]) -> T:
        try:
            response = self._http.request(**_request(call))
        except httpx.HTTPError as error:
            raise _failed(error) from error
        return call.read(_answer(response))

    def iterate(self, work: Flow[Stream[T]]) -> Iterator[T]:
        stream = self.run(work)
        try:
            with self._http.stream(stream.method, stream.path, json=stream.json) as response:
                if response.status_code >= 400:
                    response.read()
                    _answer(response)
                if stream.raw:
                    yield from map(stream.read, response.iter_bytes())
                    return
                for line in response.iter_lines():
                    if (data := event_data(line)) is not None:
                        yield stream.read(data)
        except httpx.HTTPError as error:
            raise _failed(error) from error


class AsyncClient(Endpoints):
    """Async client, for asyncio. An async context manager; `http` takes the place of the connection it would make."""

    def __init__(self, base_url: str = "http://127.0.0.1:8000", *, api_key: str | None = None,
                 timeout: httpx.Timeout | float = TIMEOUT, http: httpx.AsyncClient | None = None) -> None:
        self._http = http or httpx.AsyncClient(base_url=base_url, headers=_headers(api_key), timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def run(self, work: Call[T] | Flow[T]) -> T:
        if isinstance(work, Call):
            return await self._answered(work)
        sent: Any = None
        while True:
            try:
                step = work.send(sent)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            sent = None
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
            else:
                sent = await self._answered(step)

    async def _answered(self, call: Call[T]) -> T:
        try:
            response = await self._http.request(**_request(call))
        except httpx.HTTPError as error:
            raise _failed(error) from error
        return call.read(_answer(response))

    async def iterate(self, work: Flow[Stream[T]]) -> AsyncIterator[T]:
        stream = await self.run(work)
        try:
            async with self._http.stream(stream.method, stream.path, json=stream.json) as response:
                if response.status_code >= 400:
                    await response.aread()
                    _answer(response)
                if stream.raw:
                    async for piece in response.aiter_bytes():
                        yield stream.read(piece)
                    return
                async for line in response.aiter_lines():
                    if (data := event_data(line)) is not None:
                        yield stream.read(data)
        except httpx.HTTPError as error:
            raise _failed(error) from error


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def _request(call: Call[Any]) -> dict[str, Any]:
    params = {name: value for name, value in call.params.items() if value is not None}
    body: dict[str, Any] = {}
    if call.content is not None:
        body["content"] = call.content
    elif call.json is not None:
        body["json"] = call.json
    return {"method": call.method, "url": call.path, "params": params, "headers": dict(call.headers), **body}


def _answer(response: httpx.Response) -> Answer:
    if response.status_code < 400:
        return Answer(response.status_code, response.content, response.headers)
    try:
        body = json.loads(response.content)
    except ValueError:
        body = None
    raise refusal(response.status_code, body, response.headers.get("x-request-id"))


def _failed(error: httpx.HTTPError) -> TrimtabError:
    said = str(error) or type(error).__name__
    try:
        where = f" of {error.request.method} {error.request.url}"
    except RuntimeError:
        where = ""
    return ConnectionFailed(f"no answer{where}: {said}")

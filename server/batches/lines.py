"""Requests of a file in OpenAI's form of batches, a few at a time, with a file of results that says what is done.

A result is on the disk before the next request is asked, so who goes on with the same two files asks nothing again that
was answered.
"""

import asyncio
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from server.threads import in_thread
from steering.language.errors import InvalidRequest

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
# How often a request that the server has no room for, or that found no server, is sent again.
TRIES = 8
LONGEST_PAUSE_S = 60.0
Request = Mapping[str, Any]


def read_requests(path: Path, *, param: str = "requests", endpoint: str | None = None, most: int | None = None
                  ) -> Iterator[tuple[str, Request]]:
    """Each request with its custom_id, line by line.

    Args:
        param: the field that an error is about.
        endpoint: where all of them must go; None for any of PATHS.
        most: how many there may be.

    Raises:
        InvalidRequest: naming the line.
    """
    seen: set[str] = set()
    wanted = PATHS if endpoint is None else (endpoint,)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                request = json.loads(line)
            except (ValueError, RecursionError):
                raise InvalidRequest(f"line {number} is no JSON", param=param) from None
            name = request.get("custom_id") if isinstance(request, dict) else None
            if not isinstance(name, str) or not isinstance(request.get("body"), dict):
                raise InvalidRequest(f"line {number} has no custom_id or no body", param=param)
            if name in seen:
                raise InvalidRequest(f"line {number} has the custom_id {name[:80]!r} of an earlier one", param=param)
            if request.get("url") not in wanted or request.get("method", "POST") != "POST":
                raise InvalidRequest(f"line {number} does not POST to {'one of ' if endpoint is None else ''}"
                                     f"{', '.join(wanted)}", param=param)
            if request["body"].get("stream"):
                raise InvalidRequest(f"line {number} asks for a stream", param=param, fix="Leave stream out.")
            seen.add(name)
            if most is not None and len(seen) > most:
                raise InvalidRequest(f"there are more than {most} requests", param=param,
                                     fix="Split them into several files.")
            yield name, request


def read_results(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines that are whole, and what they hold."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n") and line.strip():
                    yield line, json.loads(line)


def finished(path: Path) -> dict[str, bool]:
    """Which requests have a result, and whether they were answered. A last line that was cut off when its writer died
    is taken away."""
    found, whole = {}, 0
    for line, result in read_results(path):
        found[result["custom_id"]] = answered(result)
        whole += len(line)
    if path.exists():
        os.truncate(path, whole)
    return found


def answered(result: Mapping[str, Any]) -> bool:
    response = result["response"]
    return response is not None and response["status_code"] < 400


async def run(requests: Iterator[tuple[str, Request]], results: Path, client: httpx.AsyncClient, *, at_once: int,
              done: Collection[str] = (), told: Callable[[bool], None] = lambda ok: None, tries: int = TRIES) -> None:
    """Ask what is not `done` and write what comes back. told: called for each result, with whether it was answered.

    Raises:
        InvalidRequest: the file of requests is wrong.
        httpx.TransportError: no server answers. What was answered is kept.
        OSError: the results cannot be written.
    """
    turn = asyncio.Lock()

    async def following() -> tuple[str, Request] | None:
        async with turn:
            return await in_thread(_next, requests, done)

    with results.open("ab") as file:

        async def work() -> None:
            while (found := await following()) is not None:
                name, request = found
                response = await _asked(client, request, tries)
                await in_thread(_write, file, _result(name, response))
                told(response.status_code < 400)

        workers = [asyncio.create_task(work()) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        finally:
            # The file stays open until the last of them has left it.
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def _next(requests: Iterator[tuple[str, Request]], done: Collection[str]) -> tuple[str, Request] | None:
    return next((found for found in requests if found[0] not in done), None)


def _write(file: BinaryIO, result: Mapping[str, Any]) -> None:
    file.write(json.dumps(result, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    file.flush()
    # What was answered is not asked again, also after the machine went down.
    os.fsync(file.fileno())


async def _asked(client: httpx.AsyncClient, request: Request, tries: int) -> httpx.Response:
    for attempt in range(tries):
        pause = min(2.0**min(attempt, 10), LONGEST_PAUSE_S)
        try:
            response = await client.post(request["url"], json=request["body"])
        except httpx.TransportError:
            if attempt == tries - 1:
                raise
        else:
            if response.status_code not in (429, 503) or attempt == tries - 1:
                return response
            pause = min(float(response.headers.get("Retry-After", pause)), LONGEST_PAUSE_S)
        await asyncio.sleep(pause)
    raise AssertionError("unreachable")


def _result(name: str, response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        # Something between here and the server answered in its place.
        body = {"text": response.text}
    asked = response.headers.get("x-trimtab-request")
    return {"id": f"batch_{asked or name}", "custom_id": name, "error": None,
            "response": {"status_code": response.status_code, "body": body, "request_id": asked}}

"""`trimtab run-batch`: requests from a file in OpenAI's form of batches, a few at a time beside what else is served."""

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from filelock import FileLock, Timeout
from trimtab_client import ConnectionFailed

from server.cli.connection import DEFAULT_URL, Key, Url
from server.cli.console import out
from steering.language.errors import Conflict, InvalidRequest

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
# How often a request that the server has no room for, or that found no server, is sent again.
TRIES = 8
LONGEST_PAUSE_S = 60.0
TIMEOUT = httpx.Timeout(3600.0, connect=10.0)


def run_batch(
    requests: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON lines with custom_id, url and "
                                             "body, as OpenAI has them.")],
    results: Annotated[Path, typer.Argument(dir_okay=False, help="Where results go, one line each as they come. What "
                                            "it holds already is not asked again.")],
    at_once: Annotated[int, typer.Option(min=1, max=256, help="Requests under way at once. Few leave room for "
                                         "others.")] = 4,
    url: Url = DEFAULT_URL, key: Key = None,
) -> None:
    """Run requests from a file. Started again after it was ended, it goes on where it was."""
    try:
        with FileLock(f"{results}.lock", timeout=0):
            wanted = dict(_requests(requests))
            done = _finished(results)
            left = {name: request for name, request in wanted.items() if name not in done}
            out.print(f"{len(wanted)} requests, {len(wanted) - len(left)} of them done before")
            failed = asyncio.run(_run(left, results, at_once, url, key))
            out.print(f"{len(left) - failed} answered, {failed} refused; results in {results}")
    except Timeout:
        raise Conflict(f"another run writes to {results}", param="results", fix="Wait for its end.") from None


def _requests(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Raises InvalidRequest, naming the line, before anything is asked."""
    seen = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError:
            raise InvalidRequest(f"line {number} is no JSON", param="requests") from None
        name = request.get("custom_id") if isinstance(request, dict) else None
        if not isinstance(name, str) or not isinstance(request.get("body"), dict):
            raise InvalidRequest(f"line {number} has no custom_id or no body", param="requests")
        if name in seen:
            raise InvalidRequest(f"line {number} has the custom_id {name[:80]!r} of an earlier one", param="requests")
        if request.get("url") not in PATHS or request.get("method", "POST") != "POST":
            raise InvalidRequest(f"line {number} does not POST to one of {', '.join(PATHS)}", param="requests")
        if request["body"].get("stream"):
            raise InvalidRequest(f"line {number} asks for a stream", param="requests", fix="Leave stream out.")
        seen.add(name)
        yield name, request


def _finished(path: Path) -> set[str]:
    """The requests whose results are there. A last line that was cut off when the writer died is taken away."""
    if not path.exists():
        return set()
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
    return {json.loads(line)["custom_id"] for line in content[:whole].splitlines() if line.strip()}


async def _run(left: Mapping[str, Mapping[str, Any]], results: Path, at_once: int, url: str, key: str | None) -> int:
    """How many were refused."""
    waiting, failed = iter(left.items()), 0
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with results.open("ab") as file:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT) as client:

            async def work() -> None:
                nonlocal failed
                for name, request in waiting:
                    response = await _answered(client, request)
                    failed += response.status_code >= 400
                    file.write(json.dumps(_result(name, response), ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    # What was answered is not asked again, also after the machine went down.
                    os.fsync(file.fileno())

            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(work())
    return failed


async def _answered(client: httpx.AsyncClient, request: Mapping[str, Any]) -> httpx.Response:
    """Raises ConnectionFailed where no server answers; what was answered so far is kept."""
    for attempt in range(TRIES):
        pause = min(2.0**attempt, LONGEST_PAUSE_S)
        try:
            response = await client.post(request["url"], json=request["body"])
        except httpx.TransportError as error:
            if attempt == TRIES - 1:
                raise ConnectionFailed(f"no answer of {client.base_url}: {error or type(error).__name__}") from error
        else:
            if response.status_code not in (429, 503) or attempt == TRIES - 1:
                return response
            pause = min(float(response.headers.get("Retry-After", pause)), LONGEST_PAUSE_S)
        await asyncio.sleep(pause)
    raise AssertionError("unreachable")


def _result(name: str, response: httpx.Response) -> dict[str, Any]:
    return {"id": f"batch_{response.headers.get('x-trimtab-request', name)}", "custom_id": name, "error": None,
            "response": {"status_code": response.status_code, "body": response.json(),
                         "request_id": response.headers.get("x-trimtab-request")}}

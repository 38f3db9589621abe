"""`trimtab run-batch`: requests from a file in OpenAI's form of batches, a few at a time beside what else is served."""

import asyncio
from pathlib import Path
from typing import Annotated

import httpx
import typer
from filelock import FileLock, Timeout
from trimtab_client import ConnectionFailed

from server.batches.lines import finished, read_requests, run
from server.cli.connection import DEFAULT_URL, Key, Url
from server.cli.console import out
from steering.language.errors import Conflict

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
            # All of the file is read before anything is asked.
            wanted = {name for name, _ in read_requests(requests)}
            done = finished(results)
            before = len(wanted & set(done))
            out.print(f"{len(wanted)} requests, {before} of them done before")
            told: list[bool] = []
            asyncio.run(_run(requests, results, at_once, url, key, done, told))
            out.print(f"{sum(told)} answered, {len(told) - sum(told)} refused; results in {results}")
    except Timeout:
        raise Conflict(f"another run writes to {results}", param="results", fix="Wait for its end.") from None


async def _run(requests: Path, results: Path, at_once: int, url: str, key: str | None, done: dict[str, bool],
               told: list[bool]) -> None:
    """Raises ConnectionFailed where no server answers; what was answered so far is kept."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT) as client:
        try:
            await run(read_requests(requests), results, client, at_once=at_once, done=done, told=told.append)
        except httpx.TransportError as error:
            raise ConnectionFailed(f"no answer of {client.base_url}: {error or type(error).__name__}") from error

"""`/v1/files` and `/v1/batches` through the official package; what was answered is never asked again, also after
kill -9; others go first."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from openai import AsyncOpenAI, BadRequestError, ConflictError, InternalServerError, NotFoundError
from openai.types import Batch

from server.batches.batches import OPEN, WINDOW_S, Batches
from server.batches.files import StoredFiles
from server.identity.principal import OWNER, Principal
from server.requests.admission.caller import BATCH, caller_of
from server.requests.admission.fairness import LAST, FairQueue
from server.settings import Settings
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine
from tests.server.test_chat import api  # noqa: F401

SPEC = {"interventions": [{"op": "add", "inline": {"vector": {"1": [1.0] * 8}}}]}
COUNT = 8
CHAT = "/v1/chat/completions"


def lines(*bodies: Any, url: str = CHAT) -> bytes:
    return b"\n".join(json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": url, "body": body}).encode()
                      for n, body in enumerate(bodies))


def read(content: bytes) -> dict[str, Any]:
    found = [json.loads(line) for line in content.splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one for one in found}


async def over(api: AsyncOpenAI, batch_id: str) -> Batch:  # noqa: F811
    async with asyncio.timeout(60):
        while (batch := await api.batches.retrieve(batch_id)).status in OPEN:
            await asyncio.sleep(0.02)
    return batch


async def submit(api: AsyncOpenAI, content: bytes, **fields: Any) -> Batch:  # noqa: F811
    file = await api.files.create(file=("wanted.jsonl", content), purpose="batch")
    return await api.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **fields)


async def test_files_in_and_out(api: AsyncOpenAI) -> None:  # noqa: F811
    content = lines(chat(), chat(steering=SPEC), {**chat(), "model": "nothing"})
    batch = await submit(api, content, metadata={"of": "tests"})
    assert (batch.status, batch.metadata) == ("validating", {"of": "tests"})
    done = await over(api, batch.id)
    assert done.status == "completed" and done.completed_at and done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (3, 2, 1)
    assert done.output_file_id is not None and done.error_file_id is not None
    output = read((await api.files.content(done.output_file_id)).content)
    said = {name: one["response"]["body"]["choices"][0]["message"]["content"] for name, one in output.items()}
    assert said == {"id-0": " good day", "id-1": " bad day"}
    assert output["id-1"]["response"]["body"]["steering"]["applied"][0]["tokens"]["prompt"] > 0
    # What was answered in a batch has a receipt like any other.
    receipt: Any = await api.get(f"/receipts/{output['id-1']['response']['request_id']}", cast_to=object)
    assert receipt["applied"][0]["tokens"] == output["id-1"]["response"]["body"]["steering"]["applied"][0]["tokens"]
    (refused,) = read((await api.files.content(done.error_file_id)).content).values()
    assert refused["custom_id"] == "id-2" and refused["response"]["status_code"] == 404
    assert [one.id async for one in api.batches.list()] == [batch.id]
    assert {one.id async for one in api.files.list(purpose="batch_output")} == {done.output_file_id,
                                                                               done.error_file_id}
    assert (await api.files.retrieve(batch.input_file_id)).bytes == len(content)
    assert (await api.files.delete(batch.input_file_id)).deleted
    with pytest.raises(NotFoundError):
        await api.files.retrieve(batch.input_file_id)


async def test_pages(api: AsyncOpenAI) -> None:  # noqa: F811
    ids = {(await api.files.create(file=("a", b"x"), purpose="batch")).id for _ in range(3)}
    first = await api.files.list(limit=2)
    assert first.has_more and {one.id async for one in first} == ids
    with pytest.raises(BadRequestError, match="in the list"):
        await api.batches.list(after="batch_nothing")


async def test_cancelled_it_keeps_what_it_has(api: AsyncOpenAI, engine: ScriptedEngine) -> None:  # noqa: F811
    engine.gate = asyncio.Event()
    engine.held = lambda generation: len(engine.completions) > 2
    batch = await submit(api, lines(*[chat(max_tokens=1)] * COUNT))
    while len(engine.completions) < 3:
        await asyncio.sleep(0.01)
    with pytest.raises(ConflictError, match="reads the file"):
        await api.files.delete(batch.input_file_id)
    assert (await api.batches.cancel(batch.id)).status == "cancelling"
    done = await over(api, batch.id)
    assert done.status == "cancelled" and done.cancelled_at and done.request_counts is not None
    output = b"" if done.output_file_id is None else (await api.files.content(done.output_file_id)).content
    assert len(read(output)) == done.request_counts.completed < COUNT
    with pytest.raises(ConflictError, match="over"):
        await api.batches.cancel(batch.id)
    # Nothing of it runs on.
    for completion in engine.completions[2:]:
        assert completion.cancelled.is_set()


@pytest.mark.parametrize(("content", "said"), [
    (b"", "no requests"), (b"{", "line 1 is no JSON"), (b"[" * 10**5, "line 1 is no JSON"),
    (b"\xff\xfe", "line 1 is no JSON"), (lines(chat()) + b"\n" + lines(chat()), "line 2 has the custom_id"),
    (lines(chat(stream=True)), "asks for a stream"), (lines(chat(), url="/v1/completions"), "does not POST"),
    (lines(*[chat()] * 9), "more than 8")])
async def test_a_file_that_is_wrong(api: AsyncOpenAI, engine: ScriptedEngine, content: bytes,  # noqa: F811
                                    said: str) -> None:
    batch = await submit(api, content)
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data
    assert said in (batch.errors.data[0].message or "") and batch.errors.data[0].param == "input_file_id"
    assert not engine.completions


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(served_model_name=MODEL, data_dir=tmp_path / "data", batch_lines=COUNT, files_bytes=200_000,
                    max_jobs=2, batch_at_once=2)


async def test_bounds(api: AsyncOpenAI, engine: ScriptedEngine) -> None:  # noqa: F811
    with pytest.raises(ConflictError, match="over the limit"):
        await api.files.create(file=("a", b"x" * 200_001), purpose="batch")
    with pytest.raises(BadRequestError, match="for batches only"):
        await api.files.create(file=("a", b"x"), purpose="assistants")
    with pytest.raises(NotFoundError):
        await api.batches.create(input_file_id="file-../../x", endpoint=CHAT, completion_window="24h")
    engine.gate = asyncio.Event()
    for _ in range(2):
        await submit(api, lines(chat()))
    with pytest.raises(InternalServerError, match="batches wait or run") as error:
        await submit(api.with_options(max_retries=0), lines(chat()))
    assert error.value.status_code == 503
    engine.gate.set()


async def test_files_go_when_their_time_is_over(tmp_path: Path) -> None:
    now = [1000.0]
    files = StoredFiles(tmp_path, most_bytes=10, seconds=100, now=lambda: now[0])
    short, long = files.upload("a", b"12345", 10), files.upload("b", b"12345", 10**6)
    assert (short.expires_at, long.expires_at) == (1010, 1100)
    now[0] = 1010
    assert [file.id for file in files.all()] == [long.id]
    files.upload("c", b"12345")
    assert len(list(tmp_path.iterdir())) == 4


def asking(answer: Callable[[dict[str, Any]], Any]
           ) -> Callable[[str, Principal], AbstractAsyncContextManager[httpx.AsyncClient]]:
    """A client whose server is a function."""

    @asynccontextmanager
    async def client(batch_id: str, who: Principal) -> AsyncIterator[httpx.AsyncClient]:
        async def handle(request: httpx.Request) -> httpx.Response:
            said = answer(json.loads(request.content))
            return httpx.Response(200, json={"said": await said if asyncio.iscoroutine(said) else said})

        async with httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://here") as found:
            yield found

    return client


def batches_of(folder: Path, client: Any, now: Callable[[], float] = time.time) -> tuple[StoredFiles, Batches]:
    files = StoredFiles(folder / "files", most_bytes=10**6, seconds=10**6, now=now)
    return files, Batches(folder / "batches", files, client, at_once=2, most_lines=100, most_open=4, now=now)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)


async def test_expired_it_says_what_was_not_asked(tmp_path: Path) -> None:
    now, held = [1000.0], asyncio.Event()

    async def answer(body: dict[str, Any]) -> str:
        if body["n"] > 2:
            await held.wait()
        return "yes"

    files, batches = batches_of(tmp_path, asking(answer), lambda: now[0])
    await batches.start()
    file = files.upload("a", lines(*({"n": n} for n in range(COUNT))), None)
    batch = await batches.create(file.id, CHAT, None, OWNER)
    await until(lambda: (counts := batches.find(batch.id).request_counts) is not None and counts.completed == 3)
    now[0] += WINDOW_S
    await until(lambda: batches.find(batch.id).status == "expired")
    await batches.stop()
    done = batches.find(batch.id)
    assert done.output_file_id is not None and done.error_file_id is not None
    assert len(read(files.content(done.output_file_id).read_bytes())) == 3
    late = read(files.content(done.error_file_id).read_bytes())
    assert {one["error"]["code"] for one in late.values()} == {"batch_expired"} and len(late) == COUNT - 3


KILLED = """
import asyncio, json, os, sys
from pathlib import Path
from tests.server.test_batches import OWNER, asking, batches_of, lines, CHAT, COUNT
folder = Path(sys.argv[1])

async def answer(body):
    with (folder / "asked").open("a") as file:
        file.write(f"{body['n']}\\n")
    if body["n"] > 4:
        await asyncio.Event().wait()
    return body["n"]

async def main():
    files, batches = batches_of(folder, asking(answer))
    await batches.start()
    file = files.upload("a", lines(*({"n": n} for n in range(COUNT))))
    (folder / "id").write_text((await batches.create(file.id, CHAT, None, OWNER)).id)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_another_server_goes_on_after_kill_9(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    results = tmp_path / "batches"
    deadline = time.monotonic() + 120
    while sum(path.read_bytes().count(b"\n") for path in results.glob("*.results")) != 5:
        assert time.monotonic() < deadline and process.poll() is None
        await asyncio.sleep(0.02)
    # While it lives, the batch is its own.
    asked: Counter[int] = Counter()

    def answer(body: dict[str, Any]) -> int:
        asked[body["n"]] += 1
        return int(body["n"])

    files, batches = batches_of(tmp_path, asking(answer))
    batch_id = (tmp_path / "id").read_text()
    await batches.start()
    await asyncio.sleep(0.2)
    await batches.stop()
    assert not asked
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with next(results.glob("*.results")).open("ab") as file:
        file.write(b'{"custom_id": "id-7", "resp')
    await batches.start()
    await until(lambda: batches.find(batch_id).status == "completed")
    await batches.stop()
    done = batches.find(batch_id)
    assert done.output_file_id is not None and done.error_file_id is None
    output = read(files.content(done.output_file_id).read_bytes())
    assert {name: one["response"]["body"]["said"] for name, one in output.items()} == {
        f"id-{n}": n for n in range(COUNT)}
    # The five that had been answered were not asked again, and the others once.
    assert asked == Counter({5: 1, 6: 1, 7: 1})
    assert Counter(map(int, (tmp_path / "asked").read_text().split())) == Counter(range(7))


def test_others_go_first() -> None:
    queue: FairQueue[str] = FairQueue(8)
    queue.push((LAST, "default", "batch_1", ""), "of the batch", 1)
    for n in range(3):
        queue.push(("default", "", "host", str(n)), f"live {n}", 10**6)
    assert [found[1] for _ in range(4) if (found := queue.pop()) is not None] == [
        "live 0", "live 1", "live 2", "of the batch"]


async def test_only_the_server_marks_a_request_as_of_a_batch(settings: Settings) -> None:
    scope: dict[str, Any] = {"type": "http", "headers": [(BATCH.encode(), b"batch_1")], "client": ("1.2.3.4", 5)}
    assert caller_of(Request(scope), settings, None).client == ("default", "", "1.2.3.4", "5")
    assert caller_of(Request({**scope, BATCH: "batch_1"}), settings, None).client == (LAST, "default", "batch_1", "")

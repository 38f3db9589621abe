"""Background jobs, and extraction as one."""

import asyncio
import errno
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.background.job import Cancelled, Control, Job
from server.background.jobs import Jobs
from server.background.lease import Lease
from server.errors import TooManyJobs
from server.settings import Settings
from steering.language.errors import Conflict, InvalidRequest, NotFound

PAIRS = [{"positive": f"{good} {noun}", "negative": f"{bad} {noun}", "item": noun}
         for noun in ("day", "world", "hello", "x", "y", "z", "w", "v", "u", "t")
         for good, bad in (("good", "bad"), ("ST", "OP"))]


@pytest.fixture
async def jobs(tmp_path: Path) -> AsyncIterator[Jobs]:
    found = Jobs(tmp_path / "jobs", max_jobs=2)
    found.load()
    yield found
    await found.stop()


async def finished(jobs: Jobs, job: Job) -> Job:
    async with asyncio.timeout(20):
        while job.finished_at is None:
            await asyncio.sleep(0.01)
    return jobs.get(job.id)


async def test_success_progress_and_result(jobs: Jobs) -> None:
    async def work(control: Control) -> dict[str, Any]:
        control.progress(0.5, "half")
        assert job.progress == 0.5 and job.status == "running"
        return {"x": 1}

    job = jobs.submit("test", work)
    done = await finished(jobs, job)
    assert (done.status, done.progress, done.stage, done.result) == ("succeeded", 1.0, "half", {"x": 1})


async def test_typed_and_unexpected_failures(jobs: Jobs) -> None:
    async def typed(_: Control) -> dict[str, Any]:
        raise InvalidRequest("no", param="pairs")

    async def unexpected(_: Control) -> dict[str, Any]:
        raise RuntimeError("secret")

    first, second = jobs.submit("a", typed), jobs.submit("b", unexpected)
    assert (await finished(jobs, first)).error == {
        "message": "no", "type": "invalid_request_error", "param": "pairs", "code": "invalid_request"}
    error = (await finished(jobs, second)).error
    assert error is not None and error["code"] == "internal_error" and "secret" not in error["message"]


async def test_one_at_a_time_in_order_and_no_more_than_allowed(jobs: Jobs) -> None:
    gate, running = asyncio.Event(), []

    async def work(control: Control) -> dict[str, Any]:
        running.append(control)
        await gate.wait()
        return {}

    first, second = jobs.submit("a", work), jobs.submit("b", work)
    with pytest.raises(TooManyJobs):
        jobs.submit("c", work)
    await asyncio.sleep(0)
    assert len(running) == 1 and (first.status, second.status) == ("running", "queued")
    gate.set()
    await finished(jobs, second)
    assert [job.id for job in jobs.list()] == [second.id, first.id]


async def test_cancel(jobs: Jobs) -> None:
    begun = asyncio.Event()

    async def work(control: Control) -> dict[str, Any]:
        begun.set()
        while not control.cancelled():
            await asyncio.sleep(0.001)
        raise Cancelled

    first, second = jobs.submit("a", work), jobs.submit("b", work)
    await begun.wait()
    jobs.cancel(second.id)
    assert (await finished(jobs, second)).status == "cancelled" and first.status == "running"
    jobs.cancel(first.id)
    assert (await finished(jobs, first)).status == "cancelled"
    with pytest.raises(Conflict):
        jobs.cancel(first.id)
    for wrong in ("job-x", "../x", "job-" + "0" * 24):
        with pytest.raises(NotFound):
            jobs.get(wrong)


async def test_jobs_survive_a_restart_and_unfinished_ones_have_failed(jobs: Jobs, tmp_path: Path) -> None:
    async def done(_: Control) -> dict[str, Any]:
        return {"x": 1}

    async def never(_: Control) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    first = await finished(jobs, jobs.submit("a", done))
    second = jobs.submit("b", never)
    await asyncio.sleep(0)
    (tmp_path / "jobs" / "job-broken.json").write_text("{")
    again = Jobs(tmp_path / "jobs", max_jobs=2)
    again.load()
    assert again.get(first.id) == first and again.get(second.id).status == "running"
    release(jobs)
    again.refresh()
    left = again.get(second.id)
    assert left.status == "failed" and left.error is not None and left.error["code"] == "interrupted"
    await again.stop()


def release(jobs: Jobs) -> None:
    """As the end of its process does, however it comes."""
    assert jobs._lease is not None
    os.close(jobs._lease._handle)
    jobs._lease = None


async def wait_for_ever(_: Control) -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


async def test_a_second_server_neither_adopts_nor_fails_nor_cancels_what_the_first_one_runs(
        jobs: Jobs, client: httpx.AsyncClient, settings: Settings, tmp_path: Path) -> None:
    """The second one is a whole server; the first shares its folder."""
    first = Jobs(settings.data_dir / "jobs", max_jobs=4)
    first.load()
    running, queued = first.submit("a", wait_for_ever), first.submit("b", wait_for_ever)
    await asyncio.sleep(0)
    for job in (running, queued):
        seen = (await client.get(f"/v1/jobs/{job.id}")).json()
        assert (seen["status"], seen["error"], seen["owner"]) == (job.status, None, job.owner)
        answer = await client.post(f"/v1/jobs/{job.id}/cancel")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    assert {job["id"] for job in (await client.get("/v1/jobs")).json()["data"]} == {running.id, queued.id}
    first.cancel(queued.id)
    await finished(first, queued)
    assert (await client.get(f"/v1/jobs/{queued.id}")).json()["status"] == "cancelled"
    assert running.status == "running"
    release(first)
    seen = (await client.get("/v1/jobs")).json()["data"]
    assert {job["id"]: job["status"] for job in seen} == {running.id: "failed", queued.id: "cancelled"}
    await first.stop()


async def test_a_lease_ends_with_its_process_and_not_before(tmp_path: Path) -> None:
    script = ("from pathlib import Path; from server.background.lease import Lease; "
              f"lease = Lease(Path({str(tmp_path)!r})); print(lease.id, flush=True); input()")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    owner = (await process.stdout.readline()).decode().strip()
    own = Lease(tmp_path)
    assert own.held(owner) and own.held(own.id) and own.others() == [owner]
    process.kill()
    await process.communicate()
    assert not own.held(owner) and own.others() == [] and not own.held("../../etc/passwd")
    assert [path.stem for path in tmp_path.iterdir()] == [own.id]
    own.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status", "code"), [
    (errno.ENOSPC, 507, "storage_full"), (errno.EROFS, 503, "storage_unavailable")])
async def test_a_submit_that_fails_leaves_no_job(app: FastAPI, client: httpx.AsyncClient, settings: Settings,
                                                 monkeypatch: pytest.MonkeyPatch, number: int, status: int, code: str
                                                 ) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    body = {"name": "made", "layers": [1, 2], "token": 0, "pairs": PAIRS}
    with monkeypatch.context() as patched:
        patched.setattr("server.background.jobs.os.replace", fails)
        answer = await client.post("/v1/extract", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert (await client.get("/v1/jobs")).json() == {"data": []}
    assert not list((settings.data_dir / "jobs").glob("job-*"))
    # It counts for nothing: as many as ever may run.
    jobs = app.state.server.jobs
    for _ in range(settings.max_jobs):
        jobs.submit("a", wait_for_ever)


async def test_a_job_ends_and_is_shown_where_it_can_not_be_recorded(jobs: Jobs, monkeypatch: pytest.MonkeyPatch
                                                                   ) -> None:
    gate = asyncio.Event()

    async def work(_: Control) -> dict[str, Any]:
        await gate.wait()
        return {"x": 1}

    first, second = jobs.submit("a", work), jobs.submit("b", work)
    await asyncio.sleep(0)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("server.background.jobs.os.replace", fails)
    jobs.cancel(second.id)
    gate.set()
    assert (await finished(jobs, second)).status == "cancelled"
    assert (await finished(jobs, first)).result == {"x": 1}
    with pytest.raises(Conflict):
        jobs.cancel(first.id)


async def test_extraction_over_http(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/extract", json={"name": "made", "layers": [1, 2], "token": 0, "pairs": PAIRS})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    async with asyncio.timeout(60):
        while job["status"] in ("queued", "running"):
            await asyncio.sleep(0.02)
            job = (await client.get(f"/v1/jobs/{job['id']}")).json()
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["artifact"] == "made@1" and job["progress"] == 1.0
    made = (await client.get("/v1/artifacts/made")).json()
    assert made["stored_layers"] == [1, 2] and made["provenance"]["method"] == "mean_difference"
    assert made["model_id"] == "tiny" and made["fingerprint"] == "f" * 64
    assert [j["id"] for j in (await client.get("/v1/jobs")).json()["data"]] == [job["id"]]


async def test_conversations_and_tokens_as_pairs(client: httpx.AsyncClient) -> None:
    pairs = [{"positive": [{"role": "user", "content": f"good {i}"}], "negative": [5 + i, 6 + i, 9]}
             for i in range(12)]
    answer = await client.post("/v1/extract", json={"name": "made", "layers": [1], "pairs": pairs})
    assert answer.status_code == 202, answer.text


def test_progress_never_goes_back() -> None:
    job = Job(id="job-x", kind="k", created_at=0.0)
    control = Control(job)
    seen = []
    for share in (0.1, 0.5, 0.4, -1.0, 2.0, 0.9):
        control.progress(share, f"at {share}")
        seen.append(job.progress)
    assert seen == [0.1, 0.5, 0.5, 0.5, 1.0, 1.0] and job.stage == "at 0.9"

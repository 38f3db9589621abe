"""Whose turn it is among jobs, and what a job that is cancelled or passed does meanwhile."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from server.background.apart import NICE, QUICK_S, apart
from server.background.job import UNCOUNTED_S, Cancelled, Control, Job
from server.background.jobs import Jobs
from server.background.line import LOSS, TIMES, UNKNOWN_S, Line
from server.engines.data import CaptureRequest
from server.engines.guests import LOOK_S, WEIGHT, Share
from server.workbench.subject import EngineSubject
from tests.server.conftest import chat
from tests.server.scripted import ScriptedEngine


@dataclass(eq=False)
class Waiting:
    name: str
    estimate_s: float | None
    progress: float = 0.0


def names(line: Line[Waiting]) -> str:
    return "".join(job.name for job in line.order())


def test_a_short_job_passes_a_long_one_and_is_not_passed_itself() -> None:
    line: Line[Waiting] = Line()
    long, short, shorter = Waiting("L", 100), Waiting("s", 100 / TIMES), Waiting("t", 1)
    line.join(long)
    line.join(short)
    assert names(line) == "sL"
    line.join(shorter)
    assert names(line) == "sLt"
    line.leave(short)
    assert names(line) == "tL"
    line.leave(shorter)
    assert names(line) == "L"
    line.leave(long)
    line.leave(long)
    assert names(line) == ""


def test_only_what_is_known_to_be_short_passes_and_what_is_nearly_done_is_not_passed() -> None:
    line: Line[Waiting] = Line()
    long = Waiting("L", 100)
    for job in (long, Waiting("u", None), Waiting("m", 60)):
        line.join(job)
    assert names(line) == "Lum"
    long.progress = 0.99
    line.join(Waiting("s", 10))
    assert names(line) == "Lums"
    unknown: Line[Waiting] = Line()
    for job in (Waiting("u", None), Waiting("s", UNKNOWN_S / TIMES)):
        unknown.join(job)
    assert names(unknown) == "su"


def test_short_jobs_do_not_hold_up_a_long_one_for_ever() -> None:
    line: Line[Waiting] = Line()
    line.join(Waiting("L", 100))
    passed = 0.0
    for _ in range(100):
        short = Waiting("s", 20)
        line.join(short)
        if names(line)[0] == "L":
            break
        passed += 20
        line.leave(short)
    assert 0 < passed <= LOSS * 100


@pytest.fixture
async def jobs(tmp_path: Path) -> AsyncIterator[Jobs]:
    found = Jobs(tmp_path / "jobs", max_jobs=8)
    found.load()
    yield found
    await found.stop()


async def until_over(job: Job) -> None:
    async with asyncio.timeout(30):
        while job.finished_at is None:
            await asyncio.sleep(0.005)


async def test_a_running_job_stops_at_its_next_step_while_a_short_one_passes_and_places_are_told(jobs: Jobs) -> None:
    steps, begun, on = 0, asyncio.Event(), asyncio.Event()

    async def long(control: Control) -> dict[str, Any]:
        nonlocal steps
        for _ in range(1000):
            await control.turn()
            steps += 1
            begun.set()
            await asyncio.sleep(0)
        return {}

    async def short(control: Control) -> dict[str, Any]:
        await control.turn()
        before = steps
        await on.wait()
        return {"meanwhile": steps - before}

    first = jobs.submit("calibrate", long, about="calm@1", estimate_s=600)
    await begun.wait()
    second = jobs.submit("extract", short, about="french", estimate_s=5)
    third = jobs.submit("evaluate", short, about="tone@2")
    for _ in range(20):
        await asyncio.sleep(0)
    found = [(job.status, job.place) for job in (second, first, third)]
    assert found == [("running", 0), ("running", 1), ("queued", 2)]
    assert second.behind is None and first.behind is not None and third.behind is not None
    assert (first.behind.id, first.behind.kind, first.behind.about) == (second.id, "extract", "french")
    assert third.behind.about == "calm@1"
    stopped = steps
    on.set()
    for job in (second, first, third):
        await until_over(job)
    assert second.result == {"meanwhile": 0} and stopped < steps == 1000 and first.status == "succeeded"
    assert (first.place, first.behind) == (None, None)


async def test_cancelling_ends_a_job_in_the_middle_of_a_pass_and_of_a_computation(jobs: Jobs) -> None:
    """Neither looks whether it is cancelled."""
    loop, computing, let_go, asked = asyncio.get_running_loop(), threading.Event(), threading.Event(), asyncio.Event()
    ended: list[str] = []

    async def a_pass() -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("pass")

    async def passing(control: Control) -> dict[str, Any]:
        return await apart(lambda: {"x": control.result(a_pass(), loop)})

    async def computing_alone(control: Control) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            computing.set()
            let_go.wait(60)
            try:
                control.result(a_pass(), loop)
            except Cancelled:
                ended.append("computation")
                raise
            return {}

        return await apart(work)

    first, second = jobs.submit("a", passing), jobs.submit("b", computing_alone)
    await asked.wait()
    jobs.cancel(first.id)
    await until_over(first)
    assert first.status == "cancelled" and ended == ["pass"]
    await asyncio.to_thread(computing.wait, 30)
    asked.clear()
    jobs.cancel(second.id)
    await until_over(second)
    assert second.status == "cancelled"
    let_go.set()
    async with asyncio.timeout(30):
        while len(ended) < 2:
            await asyncio.sleep(0.005)
    assert ended == ["pass", "computation"] and not asked.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads")
async def test_the_thread_of_a_job_gives_way_to_those_of_requests() -> None:
    before = torch.get_num_threads()
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found = await apart(lambda: (os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), torch.get_num_threads()))
    assert found == (max(own, NICE), 1) and torch.get_num_threads() == before


async def test_what_a_job_computes_itself_is_a_step_of_a_guest_too() -> None:
    """By a clock of requests that stands still, and one of the job's thread: it waits where it has computed, and a
    cancelled one waits no longer."""
    now, used, hosts = [0.0], [0.0], [True]
    share = Share(lambda: bool(hosts), lambda: now[0])
    control = Control(Job(id="job-x", kind="k", created_at=0.0), share, lambda: used[0])

    def told(share_done: float) -> "asyncio.Future[None]":
        return asyncio.ensure_future(asyncio.to_thread(control.progress, share_done, "fit"))

    async with asyncio.timeout(30):
        # What its thread did before is not of the job, and little is no step.
        used[0] = 100.0
        await told(0.1)
        used[0] += UNCOUNTED_S / 2
        await told(0.2)
        used[0] += 3.0
        waiting = told(0.3)
        await asyncio.sleep(5 * LOOK_S)
        assert not waiting.done()
        now[0] += 3.0 * WEIGHT + 0.1
        await waiting
        used[0] += 3.0
        waiting = told(0.4)
        await asyncio.sleep(5 * LOOK_S)
        assert not waiting.done()
        hosts.clear()
        await waiting
        hosts.append(True)
        used[0] += 3.0
        waiting = told(0.5)
        await asyncio.sleep(5 * LOOK_S)
        control.cancel()
        with pytest.raises(Cancelled):
            await waiting


async def test_threads_take_turns_quickly_while_a_job_computes() -> None:
    before = sys.getswitchinterval()
    within = await asyncio.gather(*(apart(sys.getswitchinterval) for _ in range(3)))
    assert max(within) <= QUICK_S
    async with asyncio.timeout(30):
        while sys.getswitchinterval() != before:
            await asyncio.sleep(0.005)


async def test_a_job_asks_in_small_passes_and_waits_for_the_requests_between_them(
        app: FastAPI, client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """While one request is held in the engine, by a clock that stands still, a job gets one pass and no second one."""
    sizes: list[int] = []
    capture = engine.capture

    async def noted(requests: list[CaptureRequest], program: Any = None) -> Any:
        sizes.append(sum(len(request.token_ids) for request in requests))
        return await capture(requests, program)

    engine.capture = noted  # type: ignore[assignment, method-assign]
    state = app.state.server
    clock = [0.0]
    share = state.share
    assert isinstance(share, Share)
    share.clock = lambda: clock[0]
    share._tokens = 32
    subject = EngineSubject(state, asyncio.get_running_loop())
    texts = [list(range(10)) for _ in range(7)]
    engine.gate = asyncio.Event()
    asking = asyncio.ensure_future(client.post("/v1/chat/completions", json=chat()))
    async with asyncio.timeout(30):
        while not engine.completions or not share._hosts():
            await asyncio.sleep(0.001)
    share.took(1.0, 0)
    working = asyncio.ensure_future(asyncio.to_thread(subject.capture, texts, "resid_post", [1], [-1]))
    await asyncio.sleep(0.1)
    assert sizes == []
    clock[0] += 10
    async with asyncio.timeout(30):
        while not sizes:
            await asyncio.sleep(0.001)
        engine.gate.set()
        assert (await asking).status_code == 200
        assert len(await working) == 7
    # The second pass is larger, because by this clock the first one took no time.
    assert sizes == [30, 40]

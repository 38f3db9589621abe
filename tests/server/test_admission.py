"""The queue in front of the engine: who is served next, what is refused, what a request may take in time."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from server.identity.principal import CURRENT, OWNER, Principal
from server.requests.admission.caller import caller_of
from server.requests.admission.fairness import FairQueue
from server.settings import Settings
from tests.server.conftest import MODEL, chat
from tests.server.scripted import ScriptedEngine

PLACES, REQUESTS, TOKENS = 8, 16, 8192


def drained(queue: FairQueue[str], thought: int = 10) -> list[str]:
    """Items in the order in which they are served, each done before the next is asked for."""
    order = []
    while (found := queue.pop()) is not None:
        client, item = found
        order.append(item)
        queue.done(client, thought, thought)
    return order


class TestFairQueue:
    def test_clients_take_turns(self) -> None:
        queue: FairQueue[str] = FairQueue(1)
        for n in range(6):
            queue.push(("a",), f"a{n}", 10)
        for n in range(3):
            queue.push(("b",), f"b{n}", 10)
        order = drained(queue)
        assert [item for item in order if item[0] == "a"] == [f"a{n}" for n in range(6)], "in order for each"
        assert Counter(item[0] for item in order[:6]) == {"a": 3, "b": 3}

    def test_turns_are_counted_in_tokens(self) -> None:
        queue: FairQueue[str] = FairQueue(1)
        for n in range(40):
            queue.push(("long",), f"l{n}", 100)
            queue.push(("short",), f"s{n}", 10)
        taken: Counter[str] = Counter()
        for _ in range(33):
            found = queue.pop()
            assert found is not None
            cost = 100 if found[1][0] == "l" else 10
            taken[found[1][0]] += cost
            queue.done(found[0], cost, cost)
        assert abs(taken["l"] - taken["s"]) <= 100

    def test_what_was_taken_counts_not_what_was_thought(self) -> None:
        queue: FairQueue[str] = FairQueue(1)
        for n in range(20):
            queue.push(("modest",), f"m{n}", 100)
            queue.push(("greedy",), f"g{n}", 100)
        served: Counter[str] = Counter()
        for _ in range(22):
            found = queue.pop()
            assert found is not None
            served[found[1][0]] += 1
            queue.done(found[0], 100, 10 if found[1][0] == "m" else 100)
        assert served["m"] > 5 * served["g"]

    def test_many_connections_are_one_key(self) -> None:
        queue: FairQueue[str] = FairQueue(1)
        for n in range(10):
            queue.push(("crowd", "host", str(n)), f"c{n}", 10)
        for n in range(10):
            queue.push(("alone", "host", "1"), f"a{n}", 10)
        assert Counter(item[0] for item in drained(queue)[:10]) == {"c": 5, "a": 5}

    def test_one_connection_leaves_places_for_who_comes_next(self) -> None:
        queue: FairQueue[str] = FairQueue(PLACES)
        for n in range(100):
            queue.push(("big",), f"b{n}", 10)
        assert len(list(iter(queue.pop, None))) == 6
        queue.push(("small",), "s", 10)
        assert queue.pop() == (("small",), "s")
        # And where there is one place only, it is used.
        lone: FairQueue[str] = FairQueue(1)
        lone.push(("big",), "b", 10)
        assert lone.pop() is not None

    def test_nobody_saves_up_and_nobody_is_kept(self) -> None:
        queue: FairQueue[str] = FairQueue(1)
        for n in range(5):
            queue.push(("a",), f"a{n}", 10)
        assert len(drained(queue)) == 5
        assert not queue._root.children, "clients with nothing here are forgotten"
        for n in range(50):
            queue.push(("a",), f"a{n}", 10)
        for _ in range(20):
            found = queue.pop()
            assert found is not None
            queue.done(found[0], 10, 10)
        for n in range(20):
            queue.push(("b",), f"b{n}", 10)
        assert Counter(item[0] for item in drained(queue)[:10]) == {"a": 5, "b": 5}, "b does not catch up"

    def test_what_is_removed_is_not_served(self) -> None:
        queue: FairQueue[str] = FairQueue(1)
        for name in ("x", "y", "z"):
            queue.push(("a",), name, 10)
        queue.remove(("a",), "y")
        assert drained(queue) == ["x", "z"]
        assert (queue.waiting, queue.running) == (0, 0)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_requests": PLACES, "queue_requests": REQUESTS, "queue_tokens": TOKENS,
                                       "max_choices": 16})


class Connections(httpx.ASGITransport):
    """Every request comes from a connection of its own."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.client = (self.client[0], self.client[1] + 1)
        return await super().handle_async_request(request)


@pytest.fixture
async def clients(app: FastAPI) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Two clients of one server, from two addresses."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        yield [await stack.enter_async_context(httpx.AsyncClient(
            transport=Connections(app=app, raise_app_exceptions=False, client=(f"10.0.0.{n}", 1000)),
            base_url="http://127.0.0.1", timeout=60)) for n in (1, 2)]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def nothing_waits(app: FastAPI) -> bool:
    queue = app.state.server.queue
    return (queue._fair.waiting, queue._fair.running, +queue._totals, *(+own for own in queue._own.values())) == (
        0, 0, {}, {}, {})


async def test_many_choices_of_one_do_not_keep_another_waiting(app: FastAPI, clients: list[httpx.AsyncClient],
                                                               engine: ScriptedEngine) -> None:
    """4 prompts with 16 choices each do not move; a short request of somebody else is answered meanwhile."""
    engine.gate = asyncio.Event()
    engine.held = lambda generation: generation.prompt_ids[0] == 5
    big = asyncio.create_task(clients[0].post("/v1/completions", json={
        "model": MODEL, "prompt": [[5, 6]] * 4, "n": 16, "max_tokens": 4}))
    await until(lambda: len(engine.completions) == 6)
    answer = await asyncio.wait_for(clients[1].post("/v1/chat/completions", json=chat()), 60)
    assert answer.status_code == 200 and not big.done()
    assert len(engine.completions) == 7, "the engine is never given more than it runs"
    engine.gate.set()
    assert [choice["index"] for choice in (await big).json()["choices"]] == list(range(64))
    assert nothing_waits(app)


async def test_a_full_queue_refuses_and_recovers(app: FastAPI, clients: list[httpx.AsyncClient],
                                                 engine: ScriptedEngine) -> None:
    engine.gate = asyncio.Event()
    queue = app.state.server.queue
    asking = []
    for n in range(40):
        if n == PLACES:
            await until(lambda: len(engine.completions) == PLACES)
        asking.append(asyncio.create_task(clients[n % 2].post("/v1/chat/completions", json=chat())))
    await until(lambda: sum(task.done() for task in asking) + queue._totals["requests"] + queue._fair.running == 40)
    refused = [task.result() for task in asking if task.done()]
    assert {(one.status_code, one.json()["error"]["code"]) for one in refused} == {(503, "overloaded")}
    assert all(1 <= int(one.headers["Retry-After"]) <= 60 for one in refused)
    assert REQUESTS * 3 // 4 <= 40 - PLACES - len(refused) <= REQUESTS
    told = (await clients[0].get("/metrics")).text
    counted = {line.split()[0]: float(line.split()[1]) for line in told.splitlines()
               if line.startswith("trimtab_overloaded_total")}
    assert sum(counted.values()) == len(refused) and all('of="requests"' in name for name in counted)
    engine.gate.set()
    answers = [one.status_code for one in await asyncio.gather(*asking)]
    assert Counter(answers) == {200: 40 - len(refused), 503: len(refused)}
    assert nothing_waits(app)
    assert (await clients[0].post("/v1/chat/completions", json=chat())).status_code == 200


async def test_one_client_does_not_fill_the_queue(app: FastAPI, clients: list[httpx.AsyncClient],
                                                  engine: ScriptedEngine) -> None:
    engine.gate = asyncio.Event()
    asking = [asyncio.create_task(clients[0].post("/v1/chat/completions", json=chat())) for _ in range(40)]
    queue = app.state.server.queue
    await until(lambda: sum(task.done() for task in asking) + queue._totals["requests"] + queue._fair.running == 40)
    assert queue._totals["requests"] == REQUESTS * 3 // 4
    other = asyncio.create_task(clients[1].post("/v1/chat/completions", json=chat()))
    await until(lambda: queue._totals["requests"] == REQUESTS * 3 // 4 + 1)
    engine.gate.set()
    assert (await other).status_code == 200
    await asyncio.gather(*asking)
    assert nothing_waits(app)


async def test_tokens_that_wait_are_bounded(app: FastAPI, clients: list[httpx.AsyncClient]) -> None:
    """A prompt counts once however many choices read it, and each choice with what it may generate."""
    def body(n: int) -> dict[str, Any]:
        return {"model": MODEL, "prompt": [[7] * 50] * 4, "n": n, "max_tokens": 100}

    assert (4 * 50 + 4 * 15 * 100, 4 * 50 + 4 * 16 * 100) == (6200, 6600) and TOKENS * 3 / 4 == 6144
    assert (await clients[0].post("/v1/completions", json=body(14))).status_code == 200
    answer = await clients[0].post("/v1/completions", json=body(16))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert "tokens" in answer.json()["error"]["message"] and nothing_waits(app)


@pytest.mark.parametrize("keyed", [False, True])
def test_who_asks(settings: Settings, keyed: bool) -> None:
    """Whose key it was tells clients apart; a header that nobody has checked would be a way to be many."""

    def asked(key: str, port: int) -> tuple[str, ...]:
        CURRENT.set(Principal(key, "default", frozenset(), f"id-of-{key}") if keyed else OWNER)
        request = Request({"type": "http", "client": ("10.0.0.1", port),
                           "headers": [(b"authorization", f"Bearer {key}".encode())]})
        return caller_of(request, settings.model_copy(update={"request_timeout_s": 0}), None).client

    async def all_of() -> list[tuple[str, ...]]:
        return [asked("k", 1), asked("k", 2), asked("other", 1)]

    first, second, other = asyncio.run(all_of())
    assert first[:3] == second[:3] and first != second
    assert first[0] == other[0] == "default"
    assert (first[1] == other[1]) is not keyed and (first == other) is not keyed


@pytest.mark.parametrize(("path", "fields"), [
    ("/v1/chat/completions", {}), ("/v1/messages", {}), ("/v1/responses", {"messages": None, "max_tokens": None,
                                                                         "input": "hi"}),
    ("/v1/completions", {"messages": None, "prompt": "hi"})])
async def test_a_deadline_in_which_nothing_can_be_answered_is_refused(clients: list[httpx.AsyncClient], path: str,
                                                                     fields: dict[str, Any]) -> None:
    body = {name: value for name, value in chat(timeout_s=5e-324, **fields).items() if value is not None}
    answer = await clients[0].post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "timeout_s")


@pytest.mark.parametrize("where", ["generating", "waiting"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long_ends(app: FastAPI, clients: list[httpx.AsyncClient],
                                                  engine: ScriptedEngine, where: str, stream: bool) -> None:
    engine.gate = asyncio.Event()
    blockers = []
    if where == "waiting":
        blockers = [asyncio.create_task(clients[0].post("/v1/chat/completions", json=chat())) for _ in range(PLACES)]
        await until(lambda: len(engine.completions) == PLACES)
    answer = await clients[1].post("/v1/chat/completions", json=chat(timeout_s=0.05, stream=stream))
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    assert answer.json()["error"]["param"] == "timeout_s"
    assert all(completion.cancelled.is_set() for completion in engine.completions[len(blockers):])
    assert len(engine.completions) == len(blockers) or where == "generating"
    engine.gate.set()
    for task in blockers:
        assert (await task).status_code == 200
    assert nothing_waits(app)


async def test_a_stream_that_takes_too_long_says_so(app: FastAPI, clients: list[httpx.AsyncClient],
                                                    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token comes, the second never does; then the time is up."""
    class Once(asyncio.Event):
        waited = 0

        async def wait(self) -> Any:
            self.waited += 1
            return self.waited == 1 or await super().wait()

    loop, alarms = asyncio.get_running_loop(), []
    call_later = loop.call_later

    def noted(delay: float, callback: Any, *arguments: Any, **fields: Any) -> asyncio.TimerHandle:
        if delay > 4000:
            alarms.append(callback)
        return call_later(delay, callback, *arguments, **fields)

    monkeypatch.setattr(loop, "call_later", noted)
    object.__setattr__(app.state.server, "settings",
                       app.state.server.settings.model_copy(update={"request_timeout_s": 0}))
    engine.gate = Once()
    asking = asyncio.create_task(clients[0].post("/v1/chat/completions", json=chat(timeout_s=5000, stream=True)))
    await until(lambda: engine.completions and engine.completions[0].given)
    [alarm] = alarms
    alarm()
    answer = await asking
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert answer.status_code == 200 and events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"] and json.loads(events[-2])["error"]["code"] == "request_timeout"
    assert engine.completions[0].cancelled.is_set() and nothing_waits(app)


async def test_a_request_cannot_ask_for_more_time_than_the_server_gives(app: FastAPI, engine: ScriptedEngine,
                                                                        clients: list[httpx.AsyncClient]) -> None:
    state = app.state.server
    object.__setattr__(state, "settings", state.settings.model_copy(update={"request_timeout_s": 0.05}))
    engine.gate = asyncio.Event()
    for fields in ({}, {"timeout_s": 3600.0}):
        answer = await asyncio.wait_for(clients[0].post("/v1/chat/completions", json=chat(**fields)), 60)
        assert answer.status_code == 504 and "0.05 s" in answer.json()["error"]["message"]

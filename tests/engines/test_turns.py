"""Waiting for a slot: in order, within bounds, with nothing lost however a waiter leaves."""

import asyncio
import itertools
import random
import threading
from collections import deque
from typing import Any

import pytest
import torch

from server.engines.base import Generation, Sampling
from server.engines.turns import SHARING_S, Turns
from steering.language.errors import SlotsExhausted
from steering.language.scope import Scope
from steering.ops.base import Row
from steering.programs.program import Applied, Compiled, Program
from steering.residency.bank import Bank
from tests.engines.conftest import compiled, generate
from tests.engines.test_batching import PROMPT, add


def program(number: int) -> Program:
    rows = {("resid_post", 0): Row("add", {"delta": torch.full((4,), float(number))})}
    return Program((Compiled("add", Scope(), rows, Applied(None, "add", (), (), {}, {})),))


def make(slots: int, **settings: Any) -> tuple[Bank, Turns]:
    bank = Bank(slots, torch.device("cpu"))
    return bank, Turns(bank, **{"most_waiting": 100, "wait_s": None, **settings})


async def waiting(turns: Turns, count: int) -> None:
    async with asyncio.timeout(30):
        while len(turns) != count:
            await asyncio.sleep(0)


async def test_slots_go_to_those_who_came_first() -> None:
    bank, turns = make(2)
    holders = [program(0), program(1)]
    for holder in holders:
        await turns.take(holder)
    order: list[int] = []

    async def want(number: int) -> None:
        await turns.take(program(number))
        order.append(number)

    tasks = []
    for number in range(2, 12):
        tasks.append(asyncio.create_task(want(number)))
        await waiting(turns, number - 1)
    held = deque(holders)
    for number in range(2, 12):
        bank.release(held.popleft())
        turns.freed()
        async with asyncio.timeout(30):
            while len(order) < number - 1:
                await asyncio.sleep(0)
        held.append(program(order[-1]))
    await asyncio.gather(*tasks)
    assert order == list(range(2, 12))


async def test_a_slot_that_comes_free_before_the_waiter_is_queued_is_not_missed() -> None:
    """Whoever is told that there is none is in the queue before anything else can happen."""
    bank, turns = make(1)
    await turns.take(program(0))
    task = asyncio.create_task(turns.take(program(1)))
    # Released and announced by the engine's thread at any time: the announcement runs on the loop, behind the attempt.
    bank.release(program(0))
    asyncio.get_running_loop().call_soon(turns.freed)
    assert await asyncio.wait_for(task, 30) == 1


async def test_the_queue_is_bounded_and_says_so() -> None:
    bank, turns = make(1, most_waiting=2)
    await turns.take(program(0))
    tasks = [asyncio.create_task(turns.take(program(n))) for n in (1, 2)]
    await waiting(turns, 2)
    with pytest.raises(SlotsExhausted, match="2 requests wait") as refused:
        await turns.take(program(3))
    assert refused.value.retry_after_s
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(turns) == 0 and bank.num_pinned == 1


async def test_time_that_is_over_is_over() -> None:
    bank, turns = make(1, wait_s=0.02)
    await turns.take(program(0))
    with pytest.raises(SlotsExhausted, match=r"none came free in 0.02 s"):
        await turns.take(program(1))
    assert len(turns) == 0
    bank.release(program(0))
    assert await turns.take(program(1)) == 1


async def test_a_slot_given_in_the_moment_of_leaving_goes_to_the_next() -> None:
    bank, turns = make(1)
    await turns.take(program(0))
    leaves = asyncio.create_task(turns.take(program(1)))
    await waiting(turns, 1)
    stays = asyncio.create_task(turns.take(program(2)))
    await waiting(turns, 2)
    bank.release(program(0))
    turns.freed()
    leaves.cancel()
    assert await asyncio.wait_for(stays, 30) == 1
    assert leaves.cancelled() and bank.num_pinned == 1 and not bank.in_use(program(1))


async def test_equal_programs_share_but_not_for_ever() -> None:
    now = 0.0
    bank, turns = make(1, clock=lambda: now)
    popular, rare = program(0), program(1)
    assert await turns.take(popular) == 1
    task = asyncio.create_task(turns.take(rare))
    await waiting(turns, 1)
    assert await turns.take(popular) == 1, "it takes no slot from the one that waits"
    now = SHARING_S
    late = asyncio.create_task(turns.take(popular))
    await waiting(turns, 2)
    for _ in range(2):
        bank.release(popular)
        turns.freed()
    assert await asyncio.wait_for(task, 30) == 1
    assert not late.done()
    bank.release(rare)
    turns.freed()
    assert await asyncio.wait_for(late, 30) == 1


async def test_what_cannot_be_placed_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, turns = make(1)
    await turns.take(program(0))
    tasks = [asyncio.create_task(turns.take(program(n))) for n in (1, 2)]
    await waiting(turns, 2)
    place = bank.place

    def full(slot: int, rows: Any) -> Any:
        if float(rows[0]["resid_post", 0].tensors["delta"][0]) == 1.0:
            raise MemoryError("no room on the device")
        return place(slot, rows)

    monkeypatch.setattr(bank, "place", full)
    bank.release(program(0))
    turns.freed()
    with pytest.raises(MemoryError):
        await tasks[0]
    assert await asyncio.wait_for(tasks[1], 30) == 1


@pytest.mark.parametrize("seed", range(4))
async def test_any_order_of_coming_leaving_and_ending(seed: int) -> None:
    """At random: no more slots than there are, no waiter beside a free slot, nothing held at the end."""
    chance = random.Random(seed)
    bank, turns = make(3)
    held: list[Program] = []
    tasks: dict[asyncio.Task[int], Program] = {}
    numbers = itertools.count()
    for _ in range(400):
        what = chance.random()
        if what < 0.45:
            wanted = program(chance.choice([next(numbers), 1]))
            tasks[asyncio.create_task(turns.take(wanted))] = wanted
        elif what < 0.7 and tasks:
            chance.choice(list(tasks)).cancel()
        elif held:
            bank.release(held.pop(chance.randrange(len(held))))
            asyncio.get_running_loop().call_soon(turns.freed)
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        for task in [t for t in tasks if t.done()]:
            wanted = tasks.pop(task)
            if not task.cancelled():
                held.append(wanted)
        assert bank.num_pinned <= 3
    for _ in range(2000):
        await asyncio.sleep(0)
        for task in [t for t in tasks if t.done()]:
            wanted = tasks.pop(task)
            if not task.cancelled():
                held.append(wanted)
        if not tasks and not held:
            break
        while held:
            bank.release(held.pop())
        turns.freed()
    assert not tasks and len(turns) == 0 and bank.num_pinned == 0


async def test_a_slot_that_the_engine_frees_during_the_attempt_is_not_missed(start_engine: Any,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread announces the slot after the attempt has failed, and before the waiter is in the queue."""
    engine = await start_engine("qwen3", slots=1, slot_wait_s=30)
    holder = engine.generate(Generation("holder", PROMPT[:5], Sampling(max_tokens=400, ignore_eos=True),
                                        compiled(engine, add(1))))
    await anext(aiter(holder))
    acquire, retired, attempts = engine.bank.acquire, threading.Event(), 0
    engine.roster._on_retired = lambda running: (engine._retired(running), retired.set())

    def late(wanted: Program) -> int | None:
        nonlocal attempts
        attempts += 1
        slot = acquire(wanted)
        if attempts == 1:
            assert slot is None
            engine.supervisor.leave(holder.running)
            assert retired.wait(30)
        return slot

    monkeypatch.setattr(engine.bank, "acquire", late)
    tokens, _ = await asyncio.wait_for(generate(engine, PROMPT[:5], compiled(engine, add(2)), max_tokens=2), 20)
    assert len(tokens) == 2

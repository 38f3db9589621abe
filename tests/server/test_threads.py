"""Who starts a thread stays until it has ended, however often it is cancelled."""

import asyncio
import threading

import anyio
import pytest

from server.threads import in_thread


class Held:
    """Work that a test lets go of, and that says when it runs."""

    def __init__(self) -> None:
        self.begun, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self) -> int:
        self.begun.set()
        assert self.go.wait(60)
        self.ended.set()
        return 7

    async def running(self) -> None:
        async with asyncio.timeout(30):
            while not self.begun.is_set():
                await asyncio.sleep(0.002)


async def test_results_and_errors_come_back() -> None:
    assert await in_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)


async def test_a_cancelled_caller_leaves_when_the_thread_has_ended() -> None:
    work, limiter = Held(), anyio.CapacityLimiter(1)
    task = asyncio.create_task(in_thread(work, limiter=limiter))
    await work.running()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not task.done() and limiter.borrowed_tokens == 1
    work.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended.is_set() and limiter.borrowed_tokens == 0


async def test_so_does_one_in_a_cancelled_scope_or_out_of_time() -> None:
    work = Held()
    loops = 0
    with anyio.CancelScope() as scope:
        async def leave() -> None:
            nonlocal loops
            await work.running()
            scope.cancel()
            for _ in range(20):
                await asyncio.sleep(0.001)
                loops += 1
            work.go.set()

        leaving = asyncio.create_task(leave())
        await in_thread(work)
        await asyncio.sleep(0)
    assert scope.cancelled_caught and work.ended.is_set() and loops == 20
    await leaving
    late = Held()
    releasing = asyncio.create_task(late.running())
    releasing.add_done_callback(lambda _: asyncio.get_running_loop().call_later(0.05, late.go.set))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await in_thread(late)
    assert late.ended.is_set() or not late.begun.is_set()
    await releasing


async def test_one_that_waits_for_its_turn_leaves_at_once_and_never_begins() -> None:
    first, second, limiter = Held(), Held(), anyio.CapacityLimiter(1)
    running = asyncio.create_task(in_thread(first, limiter=limiter))
    await first.running()
    waiting = asyncio.create_task(in_thread(second, limiter=limiter))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    first.go.set()
    assert await running == 7
    assert not second.begun.is_set()

"""Who gets which slot of vLLM's workers, without vLLM."""

import asyncio
from typing import Any

import pytest

from server.engines.vllm.slots import SlotTable
from steering.program import Program


class _Named:
    """As much of a program as the table looks at."""

    def __init__(self, digest: str) -> None:
        self.digest = digest


def program(name: str) -> Program:
    named: Any = _Named(name)
    return named  # type: ignore[no-any-return]


class Workers:
    def __init__(self) -> None:
        self.placed: list[tuple[int, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail = False

    async def place(self, slot: int, program: Program) -> bool:
        await self.gate.wait()
        if self.fail:
            raise RuntimeError("lost")
        self.placed.append((slot, program.digest))
        return True


async def test_programs_share_slots_and_the_longest_unused_goes_first() -> None:
    workers = Workers()
    table = SlotTable(2, workers.place)
    a, b, c = program("a"), program("b"), program("c")
    assert await table.acquire(a) == await table.acquire(a) == 1
    assert await table.acquire(b) == 2
    assert await table.acquire(c) is None, "both slots are pinned"
    table.release(a, table.epoch)
    assert await table.acquire(c) is None, "one pin of a is left"
    table.release(a, table.epoch)
    table.release(b, table.epoch)
    assert await table.acquire(a) == 1
    assert await table.acquire(c) == 2, "b was unused for longest"
    assert workers.placed == [(1, "a"), (2, "b"), (2, "c")]


async def test_everybody_waits_for_one_upload() -> None:
    workers = Workers()
    workers.gate.clear()
    table = SlotTable(2, workers.place)
    waiting = [asyncio.ensure_future(table.acquire(program("a"))) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    workers.gate.set()
    assert await asyncio.gather(*waiting) == [1, 1, 1]
    assert len(workers.placed) == 1


async def test_a_lost_upload_leaves_no_program_and_no_hole() -> None:
    workers = Workers()
    workers.fail = True
    table = SlotTable(1, workers.place)
    lost = await asyncio.gather(*(table.acquire(program("a")) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(error, RuntimeError) for error in lost)
    workers.fail = False
    assert await table.acquire(program("b")) == 1
    assert table.num_pinned == table.num_resident == 1


async def test_one_who_goes_away_takes_no_slot_along() -> None:
    workers = Workers()
    workers.gate.clear()
    table = SlotTable(1, workers.place)
    waiting = asyncio.ensure_future(table.acquire(program("a")))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    workers.gate.set()
    await asyncio.sleep(0.01)
    assert await table.acquire(program("b")) == 1, "the program nobody waits for makes room"


async def test_measuring_slots_are_apart_and_clear_forgets() -> None:
    workers = Workers()
    table = SlotTable(2, workers.place, first=9)
    assert await table.acquire(program("a")) == 9
    before = table.epoch
    table.clear()
    assert table.num_resident == 0
    assert [await table.acquire(program(name)) for name in "ba"] == [9, 10]
    table.release(program("a"), before)
    assert table.num_pinned == 2, "a pin of workers that are gone is none of these"

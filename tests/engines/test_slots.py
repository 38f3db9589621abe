"""Who gets which slot of an engine, and in what order; without an engine."""

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from server.engines.data import Generation, Sampling
from server.engines.slots import Lease, SlotTable
from steering.language.errors import EngineUnavailable, SlotsExhausted
from steering.programs.program import Program
from tests.engines.conftest import compiled, generate
from tests.engines.test_batching import PROMPT, add


class _Named:
    """As much of a program as the table looks at."""

    def __init__(self, identity: str) -> None:
        self.identity = identity


def program(name: str) -> Program:
    named: Any = _Named(name)
    return named  # type: ignore[no-any-return]


class Workers:
    def __init__(self) -> None:
        self.placed: list[tuple[int, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail = False
        self.unfit: set[str] = set()

    async def place(self, slot: int, program: Program) -> bool:
        await self.gate.wait()
        if self.fail:
            raise RuntimeError("lost")
        if program.identity in self.unfit:
            raise MemoryError
        self.placed.append((slot, program.identity))
        return True


class Queue:
    """Requests that lease, each in a task of its own; `served` has their names in the order in which they were."""

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self.served: list[str] = []
        self.leases: dict[str, Lease] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, *names: str) -> None:
        """Requests called as their programs, with anything behind a dot."""
        for name in names:
            self.tasks[name] = asyncio.ensure_future(self._lease(name))
            await settle(lambda name=name: name in self.served or self.table.num_waiting > 0)

    async def leave(self, *names: str) -> None:
        for name in names:
            self.leases.pop(name).release()
        await settle()

    async def _lease(self, name: str) -> None:
        self.leases[name] = await self.table.lease(program(name.split(".")[0]))
        self.served.append(name)


async def settle(until: Callable[[], bool] = lambda: True) -> None:
    """Let everything happen that can happen without time."""
    for _ in range(50):
        await asyncio.sleep(0)
    assert until()


async def test_programs_share_slots_and_the_longest_unused_goes_first() -> None:
    workers = Workers()
    table = SlotTable(2, workers.place)
    queue = Queue(table)
    await queue.ask("a.1", "a.2", "b.1")
    assert [queue.leases[name].slot for name in ("a.1", "a.2", "b.1")] == [1, 1, 2]
    await queue.leave("a.1", "a.2", "b.1")
    await queue.ask("a.3", "c.1")
    assert queue.leases["a.3"].slot == 1 and queue.leases["c.1"].slot == 2, "b was unused for longest"
    assert workers.placed == [(1, "a"), (2, "b"), (2, "c")]


async def test_more_programs_than_slots_are_served_in_the_order_in_which_they_came() -> None:
    table = SlotTable(3, Workers().place)
    queue = Queue(table)
    names = [f"p{n}.{n}" for n in range(20)]
    await queue.ask(*names)
    assert queue.served == names[:3] and table.num_waiting == 17
    for n in range(17):
        # Whichever leaves, the next in line comes.
        await queue.leave(queue.served[n])
        assert queue.served == names[:n + 4]
    assert table.num_waiting == 0 and table.num_pinned == 3


async def test_a_freed_slot_is_never_missed_between_a_try_and_the_queue() -> None:
    """Whatever the order of events, nobody waits beside a free slot."""
    table = SlotTable(1, Workers().place)
    held = await table.lease(program("a"))
    waiting = asyncio.ensure_future(table.lease(program("b")))
    held.release()
    assert (await asyncio.wait_for(waiting, 10)).slot == 1
    waiting.result().release()
    for n in range(20):
        first = asyncio.ensure_future(table.lease(program(f"x{n}")))
        second = asyncio.ensure_future(table.lease(program(f"y{n}")))
        for _ in range(n):
            await asyncio.sleep(0)
        (await first).release()
        (await asyncio.wait_for(second, 10)).release()
    assert table.num_pinned == table.num_waiting == 0


async def test_a_program_in_demand_does_not_keep_a_waiting_one_out() -> None:
    """The slot with the fewest requests is drained for whoever waits; its own later requests queue up behind."""
    table = SlotTable(2, Workers().place)
    queue = Queue(table)
    await queue.ask("a.1", "a.2", "b.1", "w.1", "b.2", "a.3")
    assert queue.served == ["a.1", "a.2", "b.1", "a.3"], "b is drained, a is shared on"
    await queue.leave("b.1")
    assert queue.served[-1] == "w.1"
    # Now b waits. Of a and w it is w that has fewer requests.
    await queue.ask("a.4")
    assert queue.served[-1] == "a.4"
    await queue.leave("w.1")
    assert queue.served[-1] == "b.2" and table.num_waiting == 0
    await queue.ask("b.3")
    assert queue.served[-1] == "b.3", "nobody waits, so nothing is drained any more"


async def test_those_that_wait_for_one_program_come_together() -> None:
    table = SlotTable(1, Workers().place)
    queue = Queue(table)
    await queue.ask("a.1", "b.1", "c.1", "b.2")
    await queue.leave("a.1")
    assert queue.served == ["a.1", "b.1", "b.2"]
    await queue.leave("b.1", "b.2")
    assert queue.served[-1] == "c.1"


async def test_one_who_stops_waiting_leaves_no_trace() -> None:
    table = SlotTable(1, Workers().place)
    queue = Queue(table)
    await queue.ask("a.1", "w.1", "a.2")
    assert queue.served == ["a.1"], "a is drained for w"
    queue.tasks["w.1"].cancel()
    await settle()
    assert queue.served == ["a.1", "a.2"] and table.num_waiting == 0, "with w gone a is shared again"
    # A slot that is handed over in the very moment in which its waiter goes is not lost.
    await queue.ask("v.1")
    queue.leases.pop("a.1").release()
    queue.leases.pop("a.2").release()
    queue.tasks["v.1"].cancel()
    await settle()
    assert table.num_pinned == 0
    assert (await table.lease(program("z"))).slot == 1


async def test_only_a_queue_over_its_bound_refuses() -> None:
    table = SlotTable(1, Workers().place, max_waiting=2)
    queue = Queue(table)
    await queue.ask("a.1", "b.1", "c.1")
    with pytest.raises(SlotsExhausted) as refused:
        await table.lease(program("d"))
    assert refused.value.retry_after_s
    await queue.leave("a.1")
    await queue.ask("d.1")
    assert queue.served == ["a.1", "b.1"] and table.num_waiting == 2


async def test_everybody_waits_for_one_upload() -> None:
    workers = Workers()
    workers.gate.clear()
    table = SlotTable(2, workers.place)
    waiting = [asyncio.ensure_future(table.lease(program("a"))) for _ in range(3)]
    await settle()
    assert not any(task.done() for task in waiting)
    workers.gate.set()
    assert [lease.slot for lease in await asyncio.gather(*waiting)] == [1, 1, 1]
    assert len(workers.placed) == 1


async def test_a_lost_upload_leaves_no_program_and_no_hole() -> None:
    workers = Workers()
    workers.fail = True
    table = SlotTable(1, workers.place)
    lost = await asyncio.gather(*(table.lease(program("a")) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(error, RuntimeError) for error in lost)
    workers.fail = False
    assert (await table.lease(program("b"))).slot == 1
    assert table.num_pinned == table.num_resident == 1


async def test_one_who_goes_away_takes_no_slot_along() -> None:
    workers = Workers()
    workers.gate.clear()
    table = SlotTable(1, workers.place)
    gone = asyncio.ensure_future(table.lease(program("a")))
    await settle()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    after = asyncio.ensure_future(table.lease(program("b")))
    await settle()
    assert not after.done(), "the upload of a is still under way"
    workers.gate.set()
    assert (await asyncio.wait_for(after, 10)).slot == 1, "the program nobody waits for makes room"


async def test_a_program_that_the_workers_lost_is_uploaded_again_elsewhere() -> None:
    workers = Workers()
    table = SlotTable(2, workers.place)
    first, other = await table.lease(program("a")), await table.lease(program("a"))
    first.distrust()
    again = await table.lease(program("a"))
    assert (again.slot, workers.placed) == (2, [(1, "a"), (2, "a")])
    first.release()
    waiting = asyncio.ensure_future(table.lease(program("b")))
    await settle()
    assert not waiting.done(), "the other request still has its slot"
    other.release()
    assert (await waiting).slot == 1


async def test_measuring_slots_are_apart_and_clear_forgets() -> None:
    table = SlotTable(2, Workers().place, first=9)
    before = await table.lease(program("a"))
    assert before.slot == 9
    table.clear()
    assert table.num_resident == 0
    assert [(await table.lease(program(name))).slot for name in "ba"] == [9, 10]
    before.release()
    before.release()
    assert table.num_pinned == 2, "a lease of workers that are gone is none of these"


async def test_those_that_wait_when_the_workers_die_are_told() -> None:
    table = SlotTable(1, Workers().place)
    queue = Queue(table)
    await queue.ask("a.1", "b.1", "c.1")
    table.interrupt(EngineUnavailable("dead"))
    await settle()
    for name in ("b.1", "c.1"):
        with pytest.raises(EngineUnavailable):
            queue.tasks[name].result()
    assert table.num_waiting == 0
    table.clear()
    assert (await table.lease(program("b"))).slot == 1


async def test_time_that_is_over_is_over() -> None:
    table = SlotTable(1, Workers().place, wait_s=0.05)
    held = await table.lease(program("a"))
    with pytest.raises(SlotsExhausted, match=r"for 0.05 s") as refused:
        await table.lease(program("b"))
    assert refused.value.retry_after_s and table.num_waiting == 0
    held.release()
    assert (await table.lease(program("b"))).slot == 1


async def test_what_cannot_be_placed_fails_alone() -> None:
    workers = Workers()
    table = SlotTable(1, workers.place)
    held = await table.lease(program("a"))
    bad, good = (asyncio.ensure_future(table.lease(program(name))) for name in ("bad", "good"))
    await settle(lambda: table.num_waiting == 2)
    workers.unfit = {"bad"}
    held.release()
    with pytest.raises(MemoryError):
        await bad
    assert (await asyncio.wait_for(good, 30)).slot == 1
    assert table.num_pinned == table.num_resident == 1


@pytest.mark.parametrize("seed", range(4))
async def test_any_order_of_coming_leaving_and_ending(seed: int) -> None:
    """At random: no more slots than there are, nobody waits beside a free slot, nothing is held at the end."""
    chance = random.Random(seed)
    table = SlotTable(3, Workers().place)
    held: list[Lease] = []
    asking: set[asyncio.Task[Lease]] = set()

    def collect() -> None:
        for task in [task for task in asking if task.done()]:
            asking.remove(task)
            if not task.cancelled():
                held.append(task.result())

    for number in range(400):
        what = chance.random()
        if what < 0.45:
            asking.add(asyncio.create_task(table.lease(program(chance.choice([f"own {number}", "popular"])))))
        elif what < 0.7 and asking:
            chance.choice(sorted(asking, key=asyncio.Task.get_name)).cancel()
        elif held:
            held.pop(chance.randrange(len(held))).release()
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
        collect()
        assert table.num_pinned <= 3
    for _ in range(2000):
        await settle()
        collect()
        if not asking and not held:
            break
        assert held, "somebody waits beside free slots"
        while held:
            held.pop().release()
    assert not asking and table.num_waiting == table.num_pinned == 0


async def test_a_slot_that_the_engine_frees_during_the_attempt_is_not_missed(start_engine: Any,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread announces the slot after the attempt has failed, and before the waiter is in the queue."""
    engine = await start_engine("qwen3", slots=1, slot_wait_s=30)
    holder = engine.generate(Generation("holder", PROMPT[:5], Sampling(max_tokens=400, ignore_eos=True),
                                        compiled(engine, add(1))))
    await anext(aiter(holder))
    settled, retired, attempts = engine.slots._settled, threading.Event(), 0
    engine.roster._on_retired = lambda running: (engine._retired(running), retired.set())

    def late(wanted: Program) -> Any:
        nonlocal attempts
        attempts += 1
        found = settled(wanted)
        if attempts == 1:
            assert found is None
            engine.supervisor.leave(holder.running)
            assert retired.wait(30)
        return found

    monkeypatch.setattr(engine.slots, "_settled", late)
    tokens, _ = await asyncio.wait_for(generate(engine, PROMPT[:5], compiled(engine, add(2)), max_tokens=2), 20)
    assert len(tokens) == 2

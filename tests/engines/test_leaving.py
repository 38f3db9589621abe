"""A request that leaves is gone from every table of the engine, whatever state it is in."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from server.engines.data import CaptureRequest, CompareRequest, Generation, Sampling
from server.engines.transformers.engine import TransformersEngine
from server.observability.instruments import Registry
from server.requests.guard import GuardedCompletion, GuardMetrics, HeldGuard
from steering.language.guard import Guard
from tests.engines.conftest import compiled, generate, ids
from tests.engines.test_batching import PROMPT, add
from tests.leaving import leaving_at

PATIENCE_S = 60
TOKENS = 48


@pytest.fixture
async def engine(start_engine: Any) -> AsyncIterator[TransformersEngine]:
    """A cache of 12 pages of 8 tokens, and steps of 16 tokens at most: prompts come in parts, three requests are too
    many. Afterwards everything is free, and a plain request is served."""
    found = await start_engine("qwen3", kv_cache_tokens=96, max_batch_tokens=16, slots=3, slot_wait_s=PATIENCE_S)
    alone, _ = await generate(found, PROMPT[:9], max_tokens=5)
    yield found
    await all_free(found)
    async with asyncio.timeout(PATIENCE_S):
        tokens, _ = await generate(found, PROMPT[:9], max_tokens=5)
    assert ids(tokens) == ids(alone) and len(tokens) == 5
    await all_free(found)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def all_free(engine: TransformersEngine) -> None:
    roster, processor = engine.roster, engine.supervisor.manager.batch_processor
    await until(lambda: not roster.completions)
    slots = engine.slots
    await until(lambda: not slots.num_pinned and not slots.num_waiting and not engine._pass_lock.locked())
    assert not roster.leaving and not roster.given_up and not roster._row_of and roster._num_steered == 0
    assert sorted(roster._free_rows) == list(range(len(roster._table)))
    assert roster._arena.num_used == 0
    # Only the engine's own thread may look into its tables: in a pause.
    found = await asyncio.to_thread(_look, engine, processor)
    assert found == {"active": 0, "waiting": 0, "order": 0, "cancelled": 0, "tables": 0, "free": 1.0}


def _look(engine: TransformersEngine, processor: Any) -> dict[str, Any]:
    with engine.supervisor.manager.pause():
        scheduler, cache = processor.scheduler, processor.cache
        cache.evict_cached_blocks()
        cache.pool.try_to_free_sectors()
        return {"active": len(scheduler.active_requests), "waiting": len(scheduler.waiting_requests),
                "order": len(scheduler.waiting_requests_order), "cancelled": len(scheduler._requests_to_cancel),
                "tables": sum(len(allocator.block_table) for allocator in cache.cache_allocators.values()),
                "free": cache.compute_free_capacity()}


class Reading:
    """A client that reads a completion and can leave."""

    def __init__(self, engine: TransformersEngine, name: str, prompt: list[int], *interventions: dict[str, Any],
                 max_tokens: int = TOKENS) -> None:
        program = compiled(engine, *interventions) if interventions else None
        self.tokens = 0
        self.name = name
        self.completion = engine.generate(Generation(name, prompt, Sampling(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True), program))
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for _ in self.completion:
            self.tokens += 1

    async def leaves(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        assert self.task.cancelled(), "it was over before it could leave; the test shows nothing"


def state_of(engine: TransformersEngine, name: str) -> str:
    """Where the stock scheduler has a request, and how far it is."""
    scheduler = engine.supervisor.manager.batch_processor.scheduler
    if (state := scheduler.active_requests.get(name)) is not None:
        return str(state.status.name)
    return "waiting" if name in scheduler.waiting_requests else "unknown"


@pytest.fixture
def held(engine: TransformersEngine) -> "Held":
    return Held(engine)


class Held:
    """Stops the engine's thread before a step of a test's choosing, so that a state lasts as long as the test needs."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._processor = engine.supervisor.manager.batch_processor
        self._step = self._processor._generation_step
        self.when: Callable[[], bool] = lambda: False
        self.reached, self.go = threading.Event(), threading.Event()
        self._processor._generation_step = self._held

    def _held(self, model: Any) -> None:
        if not self.reached.is_set() and self.when():
            self.reached.set()
            assert self.go.wait(PATIENCE_S)
        self._step(model)

    async def at(self, when: Callable[[], bool]) -> None:
        self.when = when
        await until(self.reached.is_set)

    def release(self) -> None:
        self.go.set()
        self._processor._generation_step = self._step


async def test_while_it_waits_for_a_slot(engine: TransformersEngine) -> None:
    holders = [Reading(engine, f"holder-{n}", PROMPT[:5], add(n), max_tokens=80) for n in range(3)]
    waiting = Reading(engine, "waits", PROMPT[:5], add(9))
    await until(lambda: engine.slots.num_waiting == 1)
    await waiting.leaves()
    for holder in holders:
        await holder.leaves()


async def test_before_the_engine_has_read_it(engine: TransformersEngine, held: Held) -> None:
    """The request and its cancellation reach the engine between the same two steps."""
    first = Reading(engine, "first", PROMPT[:5])
    await held.at(lambda: True)
    late = Reading(engine, "late", PROMPT[:5], add(1))
    await until(lambda: "late" in engine.roster.completions)
    await late.leaves()
    held.release()
    await first.leaves()


async def test_when_its_cancellation_is_read_before_it(engine: TransformersEngine, held: Held) -> None:
    """The stock loop empties the two queues one after the other; what comes in between must not be lost."""
    first = Reading(engine, "first", PROMPT[:5])
    await held.at(lambda: True)
    manager = engine.supervisor.manager
    late = Reading(engine, "late", PROMPT[:5], add(1), max_tokens=90)
    await until(lambda: not manager.input_queue.empty())
    on_its_way = manager.input_queue.get_nowait()
    await late.leaves()
    held.release()
    await until(lambda: manager.cancel_queue.empty())
    steps = engine.steps.done
    await until(lambda: engine.steps.done > steps + 1)
    manager.input_queue.put(on_its_way)
    manager._wake_up_loop.set()
    await first.leaves()


async def test_while_it_is_prefilled(engine: TransformersEngine, held: Held) -> None:
    reading = Reading(engine, "prefilling", PROMPT, add(1))
    await held.at(lambda: state_of(engine, "prefilling") == "PREFILLING")
    assert reading.tokens == 0
    leaving = asyncio.create_task(reading.leaves())
    await asyncio.sleep(0)
    held.release()
    await leaving


async def test_while_it_decodes(engine: TransformersEngine) -> None:
    reading = Reading(engine, "decoding", PROMPT, add(1))
    await until(lambda: reading.tokens >= 3)
    await reading.leaves()


async def test_in_its_last_step(engine: TransformersEngine, held: Held) -> None:
    """It is over and it has left: one of the two must not hide the other."""
    reading = Reading(engine, "last", PROMPT[:9], add(1), max_tokens=4)
    await held.at(lambda: len(engine.roster.completions["last"].running.drawn) == 3)
    await reading.leaves()
    held.release()


async def test_behind_a_full_batch(engine: TransformersEngine, held: Held) -> None:
    """More requests than tokens of a step: some are known to the scheduler and not begun."""
    readings = [Reading(engine, f"many-{n}", PROMPT[:16]) for n in range(5)]
    await held.at(lambda: state_of(engine, "many-4") == "waiting")
    for reading in reversed(readings):
        leaving = asyncio.create_task(reading.leaves())
        await asyncio.sleep(0)
        if reading is readings[-1]:
            await leaving
    held.release()


@pytest.mark.parametrize("leaving_first", ["offloaded", "active"])
async def test_all_leave_once_one_is_offloaded(engine: TransformersEngine, held: Held, leaving_first: str) -> None:
    """Which blocks new requests until one is over: a cancelled one is over."""
    scheduler = engine.supervisor.manager.batch_processor.scheduler
    readings = [Reading(engine, f"stream-{n}", [7 + n + (5 * t) % 70 for t in range(12)], add(n), max_tokens=60)
                for n in range(3)]
    await held.at(lambda: scheduler.block_new_requests)
    offloaded = {r.name for r in readings if state_of(engine, r.name) == "waiting"}
    assert offloaded and len(offloaded) < 3
    readings.sort(key=lambda r: (r.name in offloaded) != (leaving_first == "offloaded"))
    leaving = asyncio.gather(*(r.leaves() for r in readings))
    await asyncio.sleep(0)
    held.release()
    await leaving
    # Without one that ends by itself: nothing else may be needed to let others in.
    async with asyncio.timeout(PATIENCE_S):
        assert len((await generate(engine, PROMPT[:9], max_tokens=2))[0]) == 2


async def test_one_of_several_choices(engine: TransformersEngine) -> None:
    """n completions of one prompt share its pages."""
    choices = [Reading(engine, f"choice-{n}", PROMPT[:17], add(1)) for n in range(3)]
    await until(lambda: all(c.tokens for c in choices[:2]))
    await choices[0].leaves()
    await choices[2].leaves()
    await asyncio.wait_for(choices[1].task, PATIENCE_S)
    assert choices[1].tokens == TOKENS


async def test_held_by_a_guard(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two parts no part of it runs, while it is measured."""
    measuring, go = asyncio.Event(), asyncio.Event()
    compare = engine.compare

    async def slow(request: CompareRequest) -> Any:
        measuring.set()
        await go.wait()
        return await compare(request)

    monkeypatch.setattr(engine, "compare", slow)
    program = compiled(engine, add(1))

    async def weaken(factors: Any) -> Any:
        raise AssertionError("nothing is to be weakened")

    guarded = GuardedCompletion(
        engine, Generation("guarded", PROMPT[:9], Sampling(max_tokens=40, temperature=0.0, ignore_eos=True), program),
        [HeldGuard(Guard(every=8, max_repetition=1.0))], weaken, GuardMetrics(Registry()))

    async def read() -> None:
        async for _ in guarded:
            pass

    task = asyncio.create_task(read())
    await asyncio.wait_for(measuring.wait(), PATIENCE_S)
    task.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_guard_that_is_cancelled_while_it_measures_begins_no_other_part(engine: TransformersEngine,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    compare = engine.compare

    async def leaving(request: CompareRequest) -> Any:
        await guarded.cancel()
        return await compare(request)

    monkeypatch.setattr(engine, "compare", leaving)

    async def weaken(factors: Any) -> Any:
        raise AssertionError("nothing is to be weakened")

    guarded = GuardedCompletion(
        engine, Generation("guarded", PROMPT[:9], Sampling(max_tokens=40, temperature=0.0, ignore_eos=True),
                           compiled(engine, add(1))),
        [HeldGuard(Guard(every=8, max_repetition=1.0))], weaken, GuardMetrics(Registry()))
    async with asyncio.timeout(PATIENCE_S):
        assert len([token async for token in guarded]) == 8


async def test_while_it_is_measured(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a pass cannot be stopped: the next pass waits for it, and reads its own activations."""
    begun, go = threading.Event(), threading.Event()
    forward = engine.forward._forward
    inside: list[int] = []
    most = 0

    def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        begun.set()
        assert go.wait(PATIENCE_S)
        found = forward(*args, **kwargs)
        inside.pop()
        return found

    request = CompareRequest([*PROMPT[:12]], 9, compiled(engine, add(1)))
    expected = await engine.compare(request)
    monkeypatch.setattr(engine.forward, "_forward", slow)
    left = asyncio.create_task(engine.compare(request))
    await until(begun.is_set)
    left.cancel()
    stays = asyncio.create_task(engine.compare(request))
    for _ in range(50):
        await asyncio.sleep(0.001)
    as_they_were = left.done(), stays.done(), len(inside)
    go.set()
    assert as_they_were == (False, False, 1)
    with pytest.raises(asyncio.CancelledError):
        await left
    found = await stays
    assert most == 1, "two passes shared the model's hooks"
    assert found.total.kl.tolist() == expected.total.kl.tolist()


async def test_names_in_use_are_refused_and_leave_nothing(engine: TransformersEngine) -> None:
    from steering.language.errors import InvalidRequest

    first, second = (engine.generate(Generation("twin", PROMPT[:5], Sampling(max_tokens=80, ignore_eos=True),
                                                compiled(engine, add(1)))) for _ in range(2))
    await first.admit()
    with pytest.raises(InvalidRequest, match="in use"):
        await second.admit()
    await second.cancel()
    assert "twin" in engine.roster.completions, "the one that was refused ended the other"
    await first.cancel()


@pytest.mark.parametrize("what", ["generate", "score", "capture", "compare", "next_logprobs"])
async def test_at_every_await(engine: TransformersEngine, what: str) -> None:
    program = compiled(engine, add(1))
    works: dict[str, Callable[[int], Any]] = {
        "generate": lambda n: generate(engine, PROMPT[:9], program, max_tokens=3),
        "score": lambda n: engine.score(PROMPT[:9], program),
        "capture": lambda n: engine.capture([CaptureRequest(PROMPT[:9], {"resid_post": [0, 1]})], program),
        "compare": lambda n: engine.compare(CompareRequest(PROMPT[:12], 9, program)),
        "next_logprobs": lambda n: engine.next_logprobs([PROMPT[:9], PROMPT[:5]], program)}

    async def run(number: int) -> Any:
        return await leaving_at(works[what](number), number)

    for number in itertools.count():
        task = asyncio.create_task(run(number))
        await asyncio.wait({task}, timeout=PATIENCE_S)
        # The lock of passes is free exactly when no thread uses the hooks: another one must not find them in use.
        assert not engine._pass_lock.locked()
        if not task.cancelled():
            break
        await until(lambda: not engine.roster.completions)
    assert number >= 2
    assert task.result() is not None

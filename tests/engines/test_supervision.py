"""A loop that raises, ends or hangs: who is failed, who goes on, and what the engine says of itself meanwhile."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from server.engines.data import CaptureRequest, CompareRequest, Generation, Sampling, Token
from server.engines.transformers import comparing, stock, supervisor
from server.engines.transformers import engine as engine_module
from server.engines.transformers.engine import TransformersEngine
from server.engines.watching import BackOff, Progress
from steering.language.errors import EngineFailed, EngineUnavailable, UnsupportedModel
from tests.engines.conftest import compiled, generate, ids
from tests.engines.test_batching import PROMPT, add
from tests.engines.test_leaving import PATIENCE_S, all_free, until

POISON = 96
PROMPTS = [[7 + n + (5 * t) % 70 for t in range(9 + n)] for n in range(4)]


@pytest.fixture
async def start(start_engine: Any) -> Callable[..., Any]:
    async def start(**options: Any) -> TransformersEngine:
        found: TransformersEngine = await start_engine("qwen3", **{
            "max_batch_tokens": 16, "slots": 4, "slot_wait_s": PATIENCE_S, "back_off_s": (0.01,), **options})
        return found

    return start


@contextmanager
def poisoned(engine: TransformersEngine) -> Iterator[list[int]]:
    """The model raises on one token id; the sizes of the batches in which it did."""
    raised: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if (kwargs["input_ids"] == POISON).any():
            raised.append(int(kwargs["input_ids"].numel()))
            raise ArithmeticError("a token that the model cannot bear")

    hook = engine.model.register_forward_pre_hook(look, with_kwargs=True)
    yield raised
    hook.remove()


def settings(n: int) -> dict[str, Any]:
    return {"max_tokens": 12, "ignore_eos": True, "temperature": 0.8 * (n % 2), "seed": n,
            "logit_bias": {POISON: -100.0}}


def program(engine: TransformersEngine, n: int) -> Any:
    # One with a rule on what is generated, whose bits are noted token by token.
    scope = {"prompt": "none", "generation": {"token_ids": list(range(0, 90, 2))}} if n == 3 else {}
    return compiled(engine, add(n, scope=scope)) if n else None


def start_of(engine: TransformersEngine, n: int) -> "asyncio.Task[Any]":
    return asyncio.create_task(generate(engine, PROMPTS[n], program(engine, n), **settings(n)))


async def alone(engine: TransformersEngine) -> list[Any]:
    return [await generate(engine, PROMPTS[n], program(engine, n), **settings(n)) for n in range(4)]


def same(got: list[Any], expected: list[Any]) -> None:
    for (tokens, touched), (wanted, touched_alone) in zip(got, expected, strict=True):
        assert ids(tokens) == ids(wanted)
        assert [(t.prompt, t.generation) for t in touched] == [(t.prompt, t.generation) for t in touched_alone]
        assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in wanted], abs=1e-4)


@pytest.mark.parametrize("prompt", [[POISON], [5, 6, POISON], [*PROMPT[:20], POISON, 5, 6]],
                         ids=["at once", "in its prompt", "in a later part of it"])
async def test_a_step_that_raises_fails_only_who_raises_alone(start: Any, prompt: list[int]) -> None:
    engine = await start()
    expected = await alone(engine)
    with poisoned(engine) as raised:
        others = [start_of(engine, n) for n in range(4)]
        await until(lambda: engine.steps.done > 0)
        bad = [asyncio.create_task(generate(engine, prompt, compiled(engine, add(9)))) for _ in range(2)]
        failures = await asyncio.gather(*bad, return_exceptions=True)
        got = await asyncio.gather(*others)
    assert [type(failure) for failure in failures] == [EngineFailed] * 2
    assert "ArithmeticError" in str(failures[0]) and "bear" not in str(failures[0])
    assert len(raised) >= 2
    same(got, expected)
    assert engine.alive and sum(engine.restarts().values()) == 0
    await all_free(engine)


async def test_a_step_of_one_request_has_one_second_try(start: Any) -> None:
    """Nobody is beside it: at its prompt and in the middle of its text it raises once, and later again."""
    engine = await start()
    expected = await generate(engine, PROMPTS[1], program(engine, 1), **settings(1))
    fails: set[int] = set()
    calls = 0

    def look(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in fails:
            raise RuntimeError("once")

    hook = engine.model.register_forward_pre_hook(look)
    for failing in (1, 6):
        fails, calls = {failing}, 0
        same([await generate(engine, PROMPTS[1], program(engine, 1), **settings(1))], [expected])
    fails, calls = {3, 7}, 0
    with pytest.raises(EngineFailed):
        await generate(engine, PROMPTS[1], program(engine, 1), **settings(1))
    hook.remove()
    assert engine.alive and sum(engine.restarts().values()) == 0
    await all_free(engine)


async def test_a_step_that_fails_in_the_middle_of_texts_is_undone(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises after half of its tokens were drawn and noted; nobody is at fault, and nobody loses a token."""
    engine = await start()
    expected = await alone(engine)
    note, calls = engine.roster.note, 0

    def once(running: Any, token: int) -> None:
        nonlocal calls
        calls += 1
        note(running, token)
        if calls == 19:
            raise RuntimeError("once")

    monkeypatch.setattr(engine.roster, "note", once)
    got = await asyncio.gather(*(start_of(engine, n) for n in range(4)))
    assert calls > 19
    same(got, expected)
    await all_free(engine)


async def test_what_nobody_is_at_fault_for_ends_the_loop(start: Any) -> None:
    """Each step raises: not every request of the day is tried, the loop is started again, and it serves."""
    engine = await start(restart_limit=100)
    expected = await alone(engine)
    hook = engine.model.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(OSError("the device is gone")))
    tasks = [start_of(engine, n % 4) for n in range(20)]
    done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)
    assert {type(error) for error in done} == {EngineFailed, EngineUnavailable}
    hook.remove()
    await until(lambda: engine.alive)
    assert engine.restarts()["restarting"] >= 1
    same([await start_of(engine, n) for n in range(4)], expected)
    await all_free(engine)


async def test_a_loop_that_ends_between_steps_is_started_again_and_all_go_on(
        start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start(self_test=True)
    tests = 0
    selftest = engine_module.run_selftest

    def counted(*args: Any) -> Any:
        nonlocal tests
        tests += 1
        assert not engine.alive, "it serves before it was tested"
        return selftest(*args)

    monkeypatch.setattr(engine_module, "run_selftest", counted)
    expected = await alone(engine)
    scheduler = engine.supervisor.manager.batch_processor.scheduler
    schedule, calls = scheduler.schedule_batch, 0

    def fifth(*budgets: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyError("a table that is out of order")
        return schedule(*budgets)

    scheduler.schedule_batch = fifth
    got = await asyncio.gather(*(start_of(engine, n) for n in range(4)))
    same(got, expected)
    assert (dict(engine.restarts()), tests) == ({"restarting": 1, "stalled": 0}, 1)
    assert calls == 5, "the old loop goes on"
    await all_free(engine)


async def test_a_loop_that_ends_behind_a_step_fails_those_of_the_step(start: Any) -> None:
    engine = await start(max_requests=2)
    expected = await alone(engine)
    processor = engine.supervisor.manager.batch_processor
    update, calls = processor.update_batch, 0

    def third() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise IndexError("behind the step")
        update()

    processor.update_batch = third
    got = await asyncio.gather(*(start_of(engine, n) for n in range(4)), return_exceptions=True)
    assert [isinstance(found, EngineUnavailable) for found in got] == [True, True, False, False]
    assert got[0].retry_after_s and "restarted" in got[0].message
    same(got[2:], expected[2:])
    await all_free(engine)


async def test_one_that_ends_every_loop_is_not_taken_over_for_ever(start: Any) -> None:
    engine = await start(restart_limit=100)
    bind = engine.steps.bind

    def ending(processor: Any) -> None:
        bind(processor)
        search = processor.cache.search_prefix_match

        def salted(name: str, prompt_ids: list[int]) -> int:
            if POISON in prompt_ids:
                raise ValueError("in the scheduler, where no step is")
            return search(name, prompt_ids)

        processor.cache.search_prefix_match = salted

    engine.supervisor.manager.end_soon()
    engine.steps.bind = ending
    await until(lambda: engine.restarts()["restarting"] == 1 and engine.alive)
    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(generate(engine, [POISON, 5]), PATIENCE_S)
    await until(lambda: engine.alive)
    assert 2 <= engine.restarts()["restarting"] <= 4
    assert len((await generate(engine, PROMPT, max_tokens=3))[0]) == 3
    await all_free(engine)


async def test_a_loop_that_hangs_is_noticed_and_told_to_all(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready turns off, open requests fail, live turns off as the thread cannot be ended; when it ends, all is well."""
    monkeypatch.setattr(supervisor, "END_S", 0.2)
    engine = await start(stall_s=0.6)
    reached, go = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        reached.set()
        assert go.wait(PATIENCE_S)

    hook = engine.model.register_forward_pre_hook(wait)
    try:
        open_ones = [start_of(engine, n) for n in range(3)]
        await until(reached.is_set)
        measuring = asyncio.create_task(engine.score(PROMPT))
        assert engine.condition().ready, "a step may take its time"
        failures = await asyncio.wait_for(asyncio.gather(*open_ones, return_exceptions=True), PATIENCE_S)
        assert [type(failure) for failure in failures] == [EngineUnavailable] * 3
        await until(lambda: not engine.condition().live)
        assert (engine.condition().ready, engine.condition().reason) == (False, "hung")
        with pytest.raises(EngineUnavailable, match="hangs"):
            await generate(engine, PROMPT)
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(measuring, PATIENCE_S)
        with pytest.raises(EngineUnavailable, match="hangs"):
            await asyncio.wait_for(engine.score(PROMPT), PATIENCE_S)
    finally:
        hook.remove()
        go.set()
    await until(lambda: engine.alive)
    assert dict(engine.restarts()) == {"restarting": 0, "stalled": 1}
    assert engine.condition().live
    assert len((await generate(engine, PROMPT, max_tokens=3))[0]) == 3
    await all_free(engine)


async def test_a_loop_that_turns_without_a_step_is_ended_and_started_again(start: Any) -> None:
    """Work waits, the thread lives, and nothing advances: what readiness alone did not see."""
    engine = await start(stall_s=0.5)
    scheduler = engine.supervisor.manager.batch_processor.scheduler
    scheduler.schedule_batch = lambda *budgets: ([], False, 0, 0)
    with pytest.raises(EngineUnavailable, match="no progress"):
        await asyncio.wait_for(generate(engine, PROMPT), PATIENCE_S)
    await until(lambda: engine.alive)
    assert engine.restarts()["stalled"] == 1
    assert len((await generate(engine, PROMPT, max_tokens=3))[0]) == 3
    await all_free(engine)


async def test_a_measurement_that_hangs_is_a_stall(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "END_S", 0.2)
    engine = await start(stall_s=0.5)
    go = threading.Event()
    monkeypatch.setattr(engine.forward, "score", lambda *args: go.wait(PATIENCE_S))
    measuring = asyncio.create_task(engine.score(PROMPT))
    await until(lambda: not engine.condition().live)
    go.set()
    await measuring
    await until(lambda: engine.alive)
    await all_free(engine)


@pytest.mark.parametrize("end", [SystemExit(3), KeyboardInterrupt()])
async def test_a_measurement_that_is_told_to_end_fails_alone(
        start: Any, monkeypatch: pytest.MonkeyPatch, end: BaseException) -> None:
    """What a thread raises is carried to the event loop, which those two would end."""
    engine = await start()
    expected = await engine.score(PROMPT)

    def told(*_: Any) -> None:
        raise end

    measured: list[tuple[Any, str, Callable[[], Awaitable[Any]]]] = [
        (engine.forward, "score", lambda: engine.score(PROMPT)),
        (engine.forward, "capture", lambda: engine.capture([CaptureRequest(PROMPT, {"resid_post": [0]})])),
        (comparing, "_all_compared", lambda: engine.compare(CompareRequest(PROMPT, 4, compiled(engine, add(1)))))]
    for owner, name, measure in measured:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, told)
            with pytest.raises(EngineFailed, match=type(end).__name__):
                await measure()
    assert torch.equal((await engine.score(PROMPT)).logprobs[1:], expected.logprobs[1:])
    assert engine.alive and sum(engine.restarts().values()) == 0
    await all_free(engine)


async def test_a_new_loop_that_hangs_when_it_is_tried_is_not_followed_by_another(
        start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads would use the model's hooks at once."""
    monkeypatch.setattr(supervisor, "END_S", 0.2)
    engine = await start(stall_s=0.5, self_test=True)
    make, made, go = engine.supervisor._make, [], threading.Event()

    def hanging() -> Any:
        manager = make()
        made.append(manager)
        step = manager.batch_processor._generation_step

        def hang(model: Any) -> None:
            assert go.wait(PATIENCE_S)
            step(model)

        if len(made) == 1:
            manager.batch_processor._generation_step = hang
        return manager

    engine.supervisor._make = hanging
    engine.supervisor.manager.end_soon()
    await until(lambda: engine.condition().reason == "hung")
    await asyncio.sleep(0.5)
    assert len(made) == 1
    go.set()
    await until(lambda: engine.alive)
    assert len(made) == 2 and not made[0].is_running()
    assert len((await generate(engine, PROMPT, max_tokens=3))[0]) == 3
    await all_free(engine)


async def test_starts_that_fail_are_counted_and_tried_on(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start(restart_limit=2, back_off_s=(0.01, 0.02))
    make, attempts, conditions = engine.supervisor._make, 0, []

    def fails() -> Any:
        nonlocal attempts
        attempts += 1
        conditions.append(engine.condition())
        raise MemoryError("no room for the cache")

    engine.supervisor._make = fails
    engine.supervisor.manager.end_soon()
    await until(lambda: attempts >= 4)
    assert [(c.ready, c.live, c.reason) for c in conditions[:4]] == [
        (False, True, "restarting"), (False, True, "restarting"), (False, False, "exhausted"),
        (False, False, "exhausted")]
    engine.supervisor._make = make
    await until(lambda: engine.alive)
    assert engine.condition().live and engine.restarts()["restarting"] == 1
    assert len((await generate(engine, PROMPT, max_tokens=3))[0]) == 3


async def test_those_who_wait_for_a_slot_get_it_in_the_next_loop(start: Any) -> None:
    engine = await start(slots=1)
    holder = engine.generate(Generation("holder", PROMPT[:5], Sampling(max_tokens=60, ignore_eos=True),
                                        compiled(engine, add(1))))
    stream = aiter(holder)
    assert isinstance(await anext(stream), Token)
    waiting = asyncio.create_task(generate(engine, PROMPT[:5], compiled(engine, add(2)), max_tokens=3))
    await until(lambda: engine.slots.num_waiting == 1)
    engine.supervisor.manager.end_soon()
    await until(lambda: not engine.alive)
    await holder.cancel()
    assert len((await asyncio.wait_for(waiting, PATIENCE_S))[0]) == 3
    assert engine.restarts()["restarting"] == 1
    await all_free(engine)


async def test_stopping_tells_those_who_are_open(start: Any) -> None:
    engine = await start()
    task = asyncio.create_task(generate(engine, PROMPT[:5], max_tokens=400, ignore_eos=True))
    await until(lambda: engine.steps.done > 2)
    await engine.stop()
    with pytest.raises(EngineUnavailable, match="stops"):
        await task
    assert (engine.condition().ready, engine.condition().reason) == (False, "stopped")
    with pytest.raises(EngineUnavailable, match="stops"):
        await generate(engine, PROMPT)
    assert engine.supervisor.manager is None


def test_progress_is_what_advances_while_work_waits() -> None:
    now = 0.0
    progress = Progress(10.0, lambda: now)
    story = [(0, 0, False, False), (9, 0, True, False), (50, 0, False, False), (59, 0, True, False),
             (60, 0, True, True), (61, 1, True, False), (70, 1, True, False), (71, 1, True, True),
             (72, 1, False, False)]
    for now, done, waits, stalled in story:
        assert progress.stalled(done, waits) is stalled, now


def test_back_off_grows_until_a_start_lasts() -> None:
    now = 0.0
    back_off = BackOff((1.0, 5.0), limit=2, healthy_s=60, clock=lambda: now)
    assert [back_off.next(), back_off.next()] == [1.0, 5.0] and not back_off.exhausted
    assert back_off.next() == 5.0 and back_off.exhausted
    back_off.started()
    now = 59.0
    assert back_off.next() == 5.0 and back_off.exhausted, "it did not last"
    back_off.started()
    now = 119.0
    assert back_off.next() == 1.0 and not back_off.exhausted


@pytest.mark.parametrize(("owner", "method", "said"), [
    ("Scheduler", "finish_request", r"Scheduler.finish_request of transformers takes \(self, state\), not"),
    ("ModelRunner", "_sample", "ModelRunner of transformers has no _sample"),
])
async def test_a_changed_stock_method_stops_the_start_by_name(
        start: Any, monkeypatch: pytest.MonkeyPatch, owner: str, method: str, said: str) -> None:
    if owner == "Scheduler":
        monkeypatch.setattr(stock.Scheduler, method, lambda self, state: None)
    else:
        monkeypatch.delattr(stock.ModelRunner, method)
    with pytest.raises(UnsupportedModel, match=said):
        await start()


async def test_another_version_and_a_missing_table_stop_the_start(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock.transformers, "__version__", "5.20.0")
    with pytest.raises(UnsupportedModel, match=r"steers transformers 5.19.x, this is 5.20.0"):
        await start()
    monkeypatch.undo()
    monkeypatch.setitem(stock.TABLES, "scheduler", ("block_all_requests",))
    with pytest.raises(UnsupportedModel, match="FIFOScheduler of transformers has no block_all_requests"):
        await start()

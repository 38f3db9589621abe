"""Jobs give way to requests: step by step, on the time of a clock that counts steps."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from server.engines.data import Generation, Sampling
from server.engines.guests import ALONE, FEWEST, FIRST, MOST, STEP_S, Share
from server.engines.transformers.engine import TransformersEngine
from tests.engines.conftest import compiled, generate, ids
from tests.engines.test_batching import PROMPT, add

GUESTS, TOKENS, CHAT = 6, 60, 10


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_guest_waits_while_requests_have_their_time_and_goes_on_at_once_where_there_are_none() -> None:
    clock, hosts = Clock(), [True]
    share = Share(lambda: bool(hosts), clock)
    async with share.step(10):
        clock.now += 3
    assert not share.due()
    clock.now += 5.9
    assert not share.due()
    waiting = asyncio.ensure_future(share.step(10).__aenter__())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    clock.now += 0.2
    async with asyncio.timeout(20):
        await waiting
    share.took(100, 10)
    assert not share.due()
    hosts.clear()
    assert share.due()


def test_steps_have_as_many_tokens_as_are_done_in_their_time() -> None:
    hosts = [True]
    share = Share(lambda: bool(hosts), Clock())
    for _ in range(50):
        share.took(share.tokens / 1000, share.tokens)
    assert share.tokens == pytest.approx(1000 * STEP_S, rel=0.05)
    # What was quick and small says nothing against more.
    share.took(STEP_S / 2, 4)
    assert share.tokens == pytest.approx(1000 * STEP_S, rel=0.05)
    for _ in range(50):
        share.took(60, share.tokens)
    assert share.tokens == FEWEST < FIRST
    for _ in range(50):
        share.took(1e-9, share.tokens)
    assert share.tokens == MOST
    hosts.clear()
    assert share.tokens == ALONE * MOST


@pytest.fixture
async def watched(start_engine: Callable[..., Any]) -> tuple[TransformersEngine, list[list[str]]]:
    """An engine whose guests are timed in steps, and who took part in each of its steps."""
    engine: TransformersEngine = await start_engine("llama")
    steps, seen = engine.steps, list[list[str]]()
    prepare = steps._prepare

    def noted(batch: Any) -> None:
        seen.append([item.state.request_id for item in batch])
        prepare(batch)

    steps._prepare = noted  # type: ignore[method-assign]
    engine.roster.share.clock = lambda: float(steps.done)
    return engine, seen


def guest(engine: TransformersEngine, n: int, *interventions: dict[str, Any]) -> Generation:
    program = compiled(engine, *interventions) if interventions else None
    return Generation(f"guest-{n}", PROMPT[:5 + n], Sampling(TOKENS, temperature=0.0, ignore_eos=True), program,
                      guest=True)


async def told(engine: TransformersEngine, generation: Generation) -> list[int]:
    return [token.token_id async for token in engine.generate(generation)]


async def test_steps_of_a_chat_and_of_guests_alternate_and_change_no_token(
        watched: tuple[TransformersEngine, list[list[str]]]) -> None:
    engine, seen = watched
    wanted = [guest(engine, n, *([add(n)] if n % 2 else [])) for n in range(GUESTS)]
    alone = [await told(engine, one) for one in wanted]
    chat_alone, _ = await generate(engine, PROMPT[:9], max_tokens=CHAT, ignore_eos=True)
    seen.clear()
    running = [asyncio.ensure_future(told(engine, one)) for one in wanted]
    async with asyncio.timeout(60):
        while not any("guest-0" in names for names in seen):
            await asyncio.sleep(0.001)
        chat, _ = await generate(engine, PROMPT[:9], max_tokens=CHAT, ignore_eos=True)
        met = await asyncio.gather(*running)
    assert met == alone and ids(chat) == ids(chat_alone)
    kinds = ["".join(sorted({name.split("-")[0][0] for name in names})) for names in seen]
    first, last = kinds.index("r"), len(kinds) - 1 - kinds[::-1].index("r")
    between = "".join(kinds[first:last + 1])
    # r: a step of the request alone, g: of guests alone; a batch of both would read "gr".
    assert "gr" not in kinds and between.count("r") == CHAT
    assert 1 <= between.count("g") <= CHAT // 2 and "gg" not in between
    # Guests alone need none of that: all of them share their steps.
    assert max(len(names) for names in seen) == GUESTS


async def test_a_guest_goes_on_where_a_request_finds_no_room(start_engine: Callable[..., Any]) -> None:
    engine: TransformersEngine = await start_engine("llama", kv_cache_tokens=96, max_batch_tokens=16)
    engine.roster.share.clock = lambda: 0.0
    running = [asyncio.ensure_future(told(engine, guest(engine, n))) for n in range(2)]
    async with asyncio.timeout(60):
        while not engine.steps.done:
            await asyncio.sleep(0.001)
        # It never gets a turn by the clock while the request is there, which needs more than what is free.
        engine.roster.share.took(1.0, 1)
        tokens, _ = await generate(engine, PROMPT[:9], max_tokens=60, ignore_eos=True)
        assert len(tokens) == 60
        assert [len(found) for found in await asyncio.gather(*running)] == [TOKENS, TOKENS]

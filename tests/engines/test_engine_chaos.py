"""At random, in a small cache: requests come, leave, poison a step, are measured, and loops end. Who stays gets the
text that it gets alone; at the end nothing is held."""

import asyncio
import random
from typing import Any

import pytest

from server.engines.data import CompareRequest, Generation, Sampling
from server.engines.transformers.engine import TransformersEngine
from steering.language.errors import EngineFailed, EngineUnavailable
from tests.engines.conftest import compiled
from tests.engines.test_batching import add
from tests.engines.test_leaving import PATIENCE_S, all_free
from tests.engines.test_supervision import POISON, poisoned

ROUNDS = 24


def request(engine: TransformersEngine, kind: int) -> tuple[list[int], Any, Sampling]:
    """One of some kinds of requests, so that each can be known alone."""
    chance = random.Random(kind)
    prompt = [5 + (kind * 7 + 3 * t) % 80 for t in range(chance.randrange(3, 34))]
    scope = chance.choice([{}, {"prompt": "none"}, {"generation": "none"}, {"prompt": {"positions": [-1]}},
                           {"prompt": "none", "generation": {"token_ids": list(range(0, 90, 3))}}])
    sampling = Sampling(max_tokens=chance.randrange(2, 30), temperature=chance.choice([0.0, 0.8]), seed=kind,
                        ignore_eos=True, logit_bias={POISON: -100.0})
    return prompt, compiled(engine, add(kind % 5, scope=scope)) if kind % 3 else None, sampling


@pytest.mark.parametrize("seed", range(1))
async def test_who_stays_gets_what_it_gets_alone(start_engine: Any, seed: int) -> None:
    chance = random.Random(seed)
    engine = await start_engine("qwen3", kv_cache_tokens=96, max_batch_tokens=16, slots=3, slot_wait_s=PATIENCE_S,
                                back_off_s=(0.01,), restart_limit=1000)
    reference = await start_engine("qwen3")
    expected: dict[int, list[int]] = {}
    for kind in range(12):
        prompt, program, sampling = request(reference, kind)
        expected[kind] = [t.token_id async for t in reference.generate(
            Generation(f"alone-{kind}", prompt, sampling, program))]
    finished = left = failed = ended = 0

    async def client(number: int) -> None:
        nonlocal finished, left, failed, ended
        kind, what = chance.randrange(12), chance.random()
        prompt, program, sampling = request(engine, kind)
        if what < 0.15:
            prompt = [*prompt, POISON]
        leaves_after = chance.randrange(1, 20) if 0.15 <= what < 0.45 else None
        got: list[int] = []
        try:
            async for token in (stream := aiter(engine.generate(Generation(f"r-{number}", prompt, sampling, program)))):
                got.append(token.token_id)
                assert got == expected[kind][:len(got)]
                if leaves_after is not None and len(got) >= leaves_after:
                    await stream.aclose()
                    left += 1
                    return
        except EngineFailed:
            assert POISON in prompt, "an innocent request was failed"
            failed += 1
            return
        except EngineUnavailable:
            # Of the step in which a loop was ended, or in a moment in which none runs.
            ended += 1
            return
        assert POISON not in prompt
        assert got == expected[kind]
        finished += 1
        if program is not None and chance.random() < 0.3:
            try:
                await engine.compare(CompareRequest([*prompt, *got], len(prompt), program))
            except EngineUnavailable:
                ended += 1

    async def gives_up(number: int) -> None:
        """A client that may leave before it gets anything."""
        nonlocal left
        task = asyncio.create_task(client(number))
        await asyncio.wait({task}, timeout=chance.choice([None, None, 0.0, 0.003, 0.02]))
        if not task.done():
            task.cancel()
            left += 1
        await asyncio.gather(task, return_exceptions=task.cancelled() or not task.done())

    loops = 0
    with poisoned(engine):
        async with asyncio.timeout(2 * PATIENCE_S):
            for round_number in range(ROUNDS):
                many = [gives_up(100 * round_number + n) for n in range(chance.randrange(1, 7))]
                if chance.random() < 0.1:
                    loops += 1
                    manager = engine.supervisor.manager
                    if manager is not None:
                        manager.end_soon()
                await asyncio.gather(*many)
                while not engine.alive:
                    await asyncio.sleep(0.01)
    assert finished > 10 and left > 5 and failed and loops and sum(engine.restarts().values())
    assert engine.restarts()["stalled"] == 0
    await all_free(engine)

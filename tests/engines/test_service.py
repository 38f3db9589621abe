"""The service around a real engine: who is served when many ask at once. Order is counted, not time."""

import asyncio
import threading
from typing import Any

import httpx
import pytest

from server.engines.data import Generation
from tests.engines.conftest import MODEL, at_rest, compiled, generate, ids
from tests.engines.test_batching import PROMPT, add

PLACES = 8
SLOTS, PROGRAMS = 64, 150
# One connection leaves the last quarter of the places to others; of the rest, those without a slot.
WAITING = PROGRAMS * 3 // 4 - SLOTS - 1


async def test_a_short_request_is_next_beside_64_prompts_with_16_choices(serve: Any) -> None:
    async with serve(PLACES) as (app, client):
        state = app.state.server
        begun: list[str] = []
        begin = state.engine.generate

        def recording(generation: Generation) -> Any:
            begun.append("short" if len(generation.prompt_ids) == 1 else "long")
            return begin(generation)

        state.engine.generate = recording
        joined, joined_at = state.queue.joined, []

        def joining(who: Any, costs: Any, **how: Any) -> Any:
            joined_at.append(len(begun))
            return joined(who, costs, **how)

        state.queue.joined = joining
        long = asyncio.create_task(client.post("/v1/completions", json={
            "model": MODEL, "prompt": [[5 + n, 6, 7] for n in range(64)], "n": 16, "max_tokens": 2,
            "ignore_eos": True, "temperature": 1.0, "seed": 1}))
        async with asyncio.timeout(300):
            while len(begun) < 2 * PLACES:
                await asyncio.sleep(0.002)
            # Of another client, which a connection tells where there are no keys.
            transport = httpx.ASGITransport(app=app, client=("10.0.0.9", 1234))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as other:
                short = await other.post("/v1/completions", json={"model": MODEL, "prompt": [9], "max_tokens": 4,
                                                                  "ignore_eos": True})
            assert short.status_code == 200 and short.json()["usage"]["completion_tokens"] == 4
            assert begun.index("short") - joined_at[-1] <= 1, "it has the next place that comes free"
            assert not long.done() and len(begun) < 1025
            whole = await long
        assert [choice["index"] for choice in whole.json()["choices"]] == list(range(1024))
        assert whole.json()["usage"]["completion_tokens"] == 2048


async def test_150_programs_at_once_over_64_slots_are_all_served(serve: Any) -> None:
    async with serve(PROGRAMS, slots=SLOTS) as (app, client):
        engine = app.state.server.engine
        # No step is made before more wait for a slot than there are slots left.
        go = threading.Event()
        hook = engine.model.register_forward_pre_hook(lambda *_: None if go.wait(120) else None)
        asking = asyncio.gather(*(client.post("/v1/completions", json={
            "model": MODEL, "prompt": PROMPT[:9], "max_tokens": 3, "temperature": 0, "ignore_eos": True, "logprobs": 0,
            "steering": {"interventions": [add(n)]}}) for n in range(PROGRAMS)))
        async with asyncio.timeout(120):
            while engine.slots.num_waiting < WAITING:
                await asyncio.sleep(0.005)
        assert engine.stats()["slots_used"] == SLOTS
        go.set()
        answers = await asking
        hook.remove()
        assert [answer.status_code for answer in answers] == [200] * PROGRAMS
        for n in range(0, PROGRAMS, 25):
            alone = await generate(engine, PROMPT[:9], compiled(engine, add(n)), max_tokens=3, ignore_eos=True)
            told = answers[n].json()["choices"][0]["logprobs"]["token_logprobs"]
            assert told == pytest.approx([token.logprob for token in alone[0]], abs=1e-4), (n, ids(alone[0]))
        await at_rest(engine)

"""The kill switch on a real engine: tokens before it are steered, those after it are as if nothing had ever acted."""

import asyncio
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from server.effects.by_part import compare_parts
from server.engines.data import CompareRequest, Generation, Sampling
from server.requests.killswitch import KillSwitch
from server.requests.switched import SwitchedCompletion
from tests.engines.conftest import at_rest, compiled, generate, ids
from tests.engines.test_guard import PROMPT, STRONG, greedy

TOTAL, BEFORE = 16, 5


class Switch:
    """The part of the kill switch that a completion looks at."""

    def __init__(self) -> None:
        self.on = False
        self.listeners: list[Callable[[], None]] = []

    @contextmanager
    def subscribe(self, changed: Callable[[], None]) -> Iterator[None]:
        self.listeners.append(changed)
        yield
        self.listeners.remove(changed)

    def turn(self) -> None:
        self.on = True
        for changed in self.listeners:
            changed()


async def test_steered_before_it_and_not_after(start_engine: Any, model_dir: Any) -> None:
    engine = await start_engine("qwen3")
    program = compiled(engine, STRONG)
    given = Generation("switched", PROMPT, Sampling(max_tokens=TOTAL, temperature=0.0), program)
    switch = Switch()
    completion = SwitchedCompletion(engine, given, program, lambda: engine.generate(given), cast(KillSwitch, switch),
                                    ends=False)
    said: list[int] = []
    async for token in completion:
        said.append(token.token_id)
        if len(said) == BEFORE:
            switch.turn()
    steered = ids((await generate(engine, PROMPT, program, max_tokens=TOTAL))[0])
    plain = ids((await generate(engine, PROMPT, max_tokens=TOTAL))[0])
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32).eval()
    assert said == greedy(model, steered[:BEFORE], TOTAL - BEFORE, 0.0)
    assert said not in (steered, plain), "without this the switch would have changed nothing"
    assert (completion.switched_off, completion.ended, switch.listeners) == (BEFORE, False, [])
    [touched] = completion.touched()
    assert touched.prompt == len(PROMPT) and BEFORE - 1 <= touched.generation < TOTAL - 1

    # Measured in its parts, what came after it has no effect.
    found = await compare_parts(engine, CompareRequest([*PROMPT, *said], len(PROMPT), program), list(completion.parts))
    assert float(found.total.kl[:BEFORE].max()) > 0.01 and float(found.total.kl[BEFORE:].abs().max()) < 1e-6
    again = ids((await generate(engine, PROMPT, program, max_tokens=TOTAL))[0])
    assert again == steered
    await at_rest(engine)


async def test_one_that_waits_for_a_slot_notices_it_at_once(start_engine: Any) -> None:
    """The only slot is held by another program, for as long as the test lasts."""
    engine = await start_engine("qwen3", slots=1, slot_wait_s=600)
    holder = engine.generate(Generation("holder", PROMPT, Sampling(max_tokens=400, ignore_eos=True),
                                        compiled(engine, {**STRONG, "strength": 2.0})))
    held = aiter(holder)
    await anext(held)
    program = compiled(engine, STRONG)
    plain = ids((await generate(engine, PROMPT, max_tokens=TOTAL))[0])
    for ends in (False, True):
        given = Generation(f"waiting-{ends}", PROMPT, Sampling(max_tokens=TOTAL, temperature=0.0), program)
        switch = Switch()
        completion = SwitchedCompletion(engine, given, program, functools.partial(engine.generate, given),
                                        cast(KillSwitch, switch), ends=ends)
        admitting = asyncio.create_task(completion.admit())
        async with asyncio.timeout(60):
            while not engine.slots.num_waiting:
                await asyncio.sleep(0.002)
            assert not admitting.done()
            switch.turn()
            await admitting
            said = [token.token_id async for token in completion]
        assert said == ([] if ends else plain)
        assert (completion.switched_off, completion.ended, switch.listeners) == (0, ends, [])
        assert [touched.prompt for touched in completion.touched()] == [0] and engine.slots.num_waiting == 0
    # One that leaves while it waits takes its place in the queue with it.
    given = Generation("leaving", PROMPT, Sampling(max_tokens=TOTAL, temperature=0.0), program)
    completion = SwitchedCompletion(engine, given, program, lambda: engine.generate(given), cast(KillSwitch, Switch()),
                                    ends=False)
    admitting = asyncio.create_task(completion.admit())
    async with asyncio.timeout(60):
        while not engine.slots.num_waiting:
            await asyncio.sleep(0.002)
    admitting.cancel()
    await asyncio.gather(admitting, return_exceptions=True)
    await completion.cancel()
    assert admitting.cancelled() and engine.slots.num_waiting == 0
    await holder.cancel()

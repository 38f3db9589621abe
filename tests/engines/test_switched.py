"""The kill switch on a real engine: tokens before it are steered, those after it are as if nothing had ever acted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from server.effects.parts import compare_parts
from server.engines.base import CompareRequest, Generation, Sampling
from server.requests.killswitch import KillSwitch
from server.requests.switched import SwitchedCompletion
from tests.engines.conftest import compiled, generate, ids
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
    assert again == steered and engine.stats()["slots_used"] == 0

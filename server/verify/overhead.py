"""What steering costs: tokens per second beside the stock engine, whose rounds take turns with ours in one process."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from server.engines.base import Engine
from server.verify.exactness import compiled, generated
from steering.programs.program import Program

REQUESTS = 8
PROMPT_LENGTH = 16
NEW_TOKENS = 24
MOST_ROUNDS, FEWEST_ROUNDS = 7, 3


class Stock(Protocol):
    """An engine as its makers ship it."""

    async def start(self) -> None: ...

    async def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """The greedy completions of prompts that come at once."""

    async def stop(self) -> None: ...


@dataclass(frozen=True)
class Arm:
    """Tokens per second (median of the rounds), and the ratios to the stock engine in the same round."""

    tokens_per_s: float
    ratio: float
    lowest: float
    highest: float


Work = Callable[[int], Awaitable[object]]


def programs_of(engine: Engine, number: int) -> list[Program]:
    """Distinct programs; each adds another vector at every layer, too short to end a text or to change its length."""
    layers, made = engine.facts.sites["resid_post"], []
    for seed in range(number):
        vectors = torch.randn(len(layers), engine.facts.d_model, generator=torch.Generator().manual_seed(seed))
        program = compiled(engine, [{
            "op": "add", "layers": list(layers), "strength": {"value": 0.5, "unit": "unit"},
            "inline": {"vector": {str(layer): v.tolist() for layer, v in zip(layers, vectors, strict=True)}}}])
        assert program is not None
        made.append(program)
    return made


def prompts_of(vocab_size: int, number: int, length: int, salt: int) -> list[list[int]]:
    """Others for every salt, so that no round finds its prompts in the cache."""
    generator = torch.Generator().manual_seed(salt)
    return torch.randint(vocab_size, (number, length), generator=generator).tolist()


async def measure(engine: Engine, stock: Stock, deadline: float) -> dict[str, Arm]:
    """Rounds until the deadline (of `time.monotonic`), at most seven and at least three; the first warms up."""
    programs = programs_of(engine, REQUESTS)
    size = engine.facts.vocab_size

    async def plain(salt: int) -> None:
        await stock.run(prompts_of(size, REQUESTS, PROMPT_LENGTH, salt), NEW_TOKENS)

    def steered(chosen: Sequence[Program | None]) -> Work:
        async def work(salt: int) -> None:
            prompts = prompts_of(size, REQUESTS, PROMPT_LENGTH, salt)
            await asyncio.gather(*(generated(engine, prompt, program, max_tokens=NEW_TOKENS, logprobs=None)
                                   for prompt, program in zip(prompts, chosen, strict=True)))

        return work

    # The stock engine runs twice in a round, so that the noise between equal arms is seen.
    arms: dict[str, Work] = {"stock": plain, "stock again": plain, "idle": steered([None] * REQUESTS),
                             "one program": steered(programs[:1] * REQUESTS), "many programs": steered(programs)}
    return await take_turns(arms, REQUESTS * NEW_TOKENS, deadline)


async def take_turns(arms: Mapping[str, Work], tokens: int, deadline: float) -> dict[str, Arm]:
    """Arms in turn, the order reversed every other round. Ratios are to the arm "stock" of the same round."""
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(1 + MOST_ROUNDS):
        if number > FEWEST_ROUNDS and time.monotonic() > deadline:
            break
        for i, name in enumerate(list(arms) if number % 2 else list(arms)[::-1]):
            began = time.perf_counter()
            await arms[name](100 * number + i)
            if number:
                speeds[name].append(tokens / (time.perf_counter() - began))
    found = {}
    for name, values in speeds.items():
        ratios = [value / stock for value, stock in zip(values, speeds["stock"], strict=True)]
        found[name] = Arm(statistics.median(values), statistics.median(ratios), min(ratios), max(ratios))
    return found

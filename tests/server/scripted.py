"""A deterministic engine: it says what the test scripted, and records what it was asked."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from server.engines.base import Completion, Engine
from server.engines.data import Captured, CaptureRequest, Condition, Generation, Likeliest, Scores, Token, Touched
from server.text.vocabulary import Vocabulary
from steering.language.errors import EngineUnavailable, SlotsExhausted, TrimtabError
from steering.language.vocabulary import SITES, Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from steering.programs.touch import count_bits

LAYERS, WIDTH = 4, 8
FACTS: dict[str, Any] = {"family": "scripted", "num_layers": LAYERS, "d_model": WIDTH, "num_heads": 2, "head_dim": 4,
                         "d_ff": 16, "context_length": 256}
# Token ids to generate for a generation, the end token not included.
Script = Callable[[Generation], Sequence[int]]


@dataclass
class ScriptedCompletion(Completion):
    engine: "ScriptedEngine"
    generation: Generation
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    given: list[int] = field(default_factory=list)

    async def __aiter__(self) -> AsyncIterator[Token]:
        await self.admit()
        script, sampling = self.engine.script(self.generation), self.generation.sampling
        ends = [] if sampling.ignore_eos else list(sampling.stop_token_ids[:1])
        tokens = [*script, *ends]
        if sampling.ignore_eos:
            tokens = [*script] * (sampling.max_tokens // max(len(script), 1) + 1)
        for n, token_id in enumerate(tokens[:sampling.max_tokens]):
            await asyncio.sleep(0)
            if self.engine.gate is not None and self.engine.held(self.generation):
                await self.engine.gate.wait()
            if self.cancelled.is_set():
                return
            if self.engine.fails_at == n:
                raise self.engine.failure
            self.given.append(token_id)
            reason = "stop" if n == len(script) and ends else "length" if n + 1 == sampling.max_tokens else None
            top = tuple((i, -0.5 - i) for i in range(sampling.logprobs or 0))
            yield Token(token_id, None if sampling.logprobs is None else -0.25 * (n + 1), top, reason)

    async def admit(self) -> None:
        if self.engine.full:
            raise SlotsExhausted("all slots are held")

    async def cancel(self) -> None:
        self.cancelled.set()

    def touched(self) -> list[Touched]:
        return self._touched(self.generation.program)

    def weak_touched(self) -> list[Touched]:
        return self._touched(None if self.generation.contrast is None else self.generation.contrast.weak)

    def _touched(self, program: Program | None) -> list[Touched]:
        if program is None:
            return []
        # The last token given is never fed back, as in a real engine.
        ids = [*self.generation.prompt_ids, *self.given[:-1]]
        touch = program.touch(self.generation.prompt_ids, len(self.given), self.generation.roles)
        bits = touch.bits_of(ids)
        prompt = len(self.generation.prompt_ids)
        counts = zip(count_bits(bits[:prompt], len(program.compiled)),
                     count_bits(bits[prompt:], len(program.compiled)), strict=True)
        return [Touched(p, g) if item.rows else Touched(0, 0)
                for (p, g), item in zip(counts, program.compiled, strict=True)]


class ScriptedEngine(Engine):
    """
    Attributes:
        script: what to say. By default " good day" unsteered, " bad day" steered.
        gate: if set, tokens come only while it is open. held: the generations that it holds.
        full: whether no slot is free.
        room: tokens of one request.
        fails_at: number of the token at which `failure` is raised instead.
        completions: one per generation asked for. scored: what it was asked to score.
        state: its condition, as `condition()` tells it.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.facts = ModelFacts(model_id="tiny", fingerprint="f" * 64, vocab_size=vocabulary.vocab_size,
                                sites={site: tuple(range(LAYERS)) for site in SITES if site != "router"},
                                **FACTS)
        say = {steered: vocabulary.encode(text, special_tokens=False)
               for steered, text in ((False, " good day"), (True, " bad day"))}
        self.script: Script = lambda generation: say[generation.program is not None]
        self.gate: asyncio.Event | None = None
        self.held: Callable[[Generation], bool] = lambda generation: True
        self.full = False
        self.room = FACTS["context_length"]
        self.fails_at: int | None = None
        self.failure: Exception = TrimtabError("the engine fell over")
        self.completions: list[ScriptedCompletion] = []
        self.scored: list[tuple[list[int], Program | None]] = []
        self.state = Condition(ready=False, reason="starting")

    async def start(self) -> None:
        self.state = Condition(ready=True)

    async def stop(self) -> None:
        self.state = Condition(ready=False, reason="stopped")

    def generate(self, generation: Generation) -> ScriptedCompletion:
        self.completions.append(ScriptedCompletion(self, generation))
        return self.completions[-1]

    async def score(self, token_ids: Sequence[int], program: Program | None = None, *,
                    prompt_length: int | None = None, roles: Sequence[str] | None = None,
                    full: bool = False, top: int | None = None) -> Scores:
        """Token t has the log-probability -t, and the `top` first tokens of the vocabulary are likelier than it."""
        count = len(token_ids)
        self.scored.append((list(token_ids), program))
        if top is None:
            return Scores(torch.zeros(count))
        ids = torch.arange(top).repeat(count, 1)
        return Scores(-torch.arange(float(count)), None, Likeliest(ids, -ids / 8 - 1 / 16, torch.full((count,), 7)))

    async def capture(self, requests: Sequence[CaptureRequest], program: Program | None = None) -> list[Captured]:
        await asyncio.sleep(0)
        return [_activations(request) for request in requests]

    async def compare(self, request: Any) -> Any:
        raise EngineUnavailable("a script has no distributions to compare")

    def capabilities(self) -> dict[str, Any]:
        return {"engine": "scripted", "sites": {s: {"layers": list(n)} for s, n in self.facts.sites.items()}}

    def stats(self) -> dict[str, float]:
        return {"running": 0, "waiting": 0, "slots_total": 4, "slots_used": 0, "slots_resident": 0,
                "kv_blocks_total": 8, "kv_blocks_used": 2}

    @property
    def max_sequence_tokens(self) -> int:
        return self.room

    def condition(self) -> Condition:
        return self.state


def _activations(request: CaptureRequest) -> Captured:
    """Numbers that depend on token and layer only, so that texts that differ have activations that do."""
    ids = torch.tensor(list(request.token_ids), dtype=torch.float32)
    picked = ids if request.positions is None else ids[list(request.positions)]
    table: dict[Site, Mapping[int, torch.Tensor]] = {}
    for site, layers in request.sites.items():
        table[site] = {n: torch.stack([torch.sin(picked * (k + 1) + n) for k in range(WIDTH)], dim=1) for n in layers}
    return table

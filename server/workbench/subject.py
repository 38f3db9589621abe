"""The served model as the subject of an extraction or a calibration, which runs in a thread of its own."""

import asyncio
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from server.effects.degeneration import degeneration
from server.engines.base import CaptureRequest, CompareRequest, Generation, Sampling
from server.requests.state import ServerState
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.calibrate.bench import Trial
from vectors.extract.subject import Programs, Prompt, Tokens, Turn, continuation_ids

T = TypeVar("T")


@dataclass(frozen=True)
class EngineSubject:
    """`vectors.extract.Subject` and `vectors.calibrate.bench.Bench`. Its methods block; call them off the event loop
    `loop`."""

    state: ServerState
    loop: asyncio.AbstractEventLoop

    @property
    def facts(self) -> ModelFacts:
        return self.state.engine.facts

    def encode(self, prompt: Prompt) -> Tokens:
        if isinstance(prompt, str):
            return tuple(self.state.vocabulary.encode(prompt, special_tokens=True))
        turns = [{"role": "system" if part.role == "developer" else part.role, "content": part.content}
                 for part in prompt if isinstance(part, Turn)]
        if turns:
            return tuple(self.state.chat_prompts.conversation(turns, ("messages",)))
        return tuple(part for part in prompt if isinstance(part, int))

    def encode_continuation(self, text: str) -> Tokens:
        return continuation_ids(lambda said: self.state.vocabulary.encode(said, special_tokens=False), text)

    def capture(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                positions: Sequence[int] | None, program: Program | None = None) -> list[Mapping[int, torch.Tensor]]:
        requests = [CaptureRequest(text, {site: layers}, positions) for text in texts]
        return [found[site] for found in self._wait(self.state.engine.capture(requests, program))]

    def next_logprobs(self, texts: Sequence[Sequence[int]], program: Programs = None) -> torch.Tensor:
        if not isinstance(program, Sequence):
            return self._wait(self.state.engine.next_logprobs(texts, program))
        found = torch.empty(len(texts), self.facts.vocab_size)
        members: dict[str | None, list[int]] = {}
        for n, own in enumerate(program):
            members.setdefault(None if own is None else own.digest, []).append(n)
        for chosen in members.values():
            found[chosen] = self._wait(self.state.engine.next_logprobs([texts[n] for n in chosen], program[chosen[0]]))
        return found

    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Program | None = None) -> list[str]:
        return self._wait(self._generate_all(texts, max_tokens, program))

    async def _generate_all(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Program | None
                            ) -> list[str]:
        async def one(number: int, text: Sequence[int]) -> str:
            sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop_token_ids=self.state.vocabulary.end_ids)
            completion = self.state.engine.generate(Generation(f"extract-{secrets.token_hex(8)}-{number}", text,
                                                               sampling, program))
            return self.state.vocabulary.decode([token.token_id async for token in completion])

        return list(await asyncio.gather(*(one(n, text) for n, text in enumerate(texts))))

    def trials(self, prompts: Sequence[Sequence[int]], program: Program | None, max_tokens: int, temperature: float,
               seed: int) -> list[Trial]:
        return self._wait(self._trials(prompts, program, max_tokens, temperature, seed))

    async def _trials(self, prompts: Sequence[Sequence[int]], program: Program | None, max_tokens: int,
                      temperature: float, seed: int) -> list[Trial]:
        async def one(number: int, prompt: Sequence[int]) -> list[int]:
            sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed + number,
                                stop_token_ids=self.state.vocabulary.end_ids)
            completion = self.state.engine.generate(Generation(f"calibrate-{secrets.token_hex(8)}-{number}", prompt,
                                                               sampling, program))
            return [token.token_id async for token in completion]

        written = await asyncio.gather(*(one(n, prompt) for n, prompt in enumerate(prompts)))
        if program is None or not program.acting:
            measured = [(0.0, await self._surprise(prompt, ids)) for prompt, ids in zip(prompts, written, strict=True)]
        else:
            found = await self.state.engine.compare_all([
                CompareRequest([*prompt, *ids], len(prompt), program)
                for prompt, ids in zip(prompts, written, strict=True)])
            measured = [(float(one.total.kl.mean()), float(one.total.surprise.mean())) for one in found]
        ends = self.state.vocabulary.end_ids
        trials = []
        for ids, (kl, surprise) in zip(written, measured, strict=True):
            text = self.state.vocabulary.decode(ids)
            signs = degeneration(ids, text, ids[-1] in ends)
            trials.append(Trial(kl=kl, surprise=surprise, repetition=signs.repetition, compression=signs.compression,
                                length=signs.length, ended=signs.ended, text=text))
        return trials

    async def _surprise(self, prompt: Sequence[int], generated: Sequence[int]) -> float:
        """Mean -log p of generated tokens under the untouched model."""
        scores = await self.state.engine.score([*prompt, *generated])
        return -float(scores.logprobs[len(prompt):].mean())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

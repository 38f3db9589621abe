"""The served model as the subject of an extraction or a calibration, which runs in a thread of its own."""

import asyncio
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from server.effects.degeneration import degeneration
from server.engines.base import CaptureRequest, CompareRequest, Generation, Sampling
from server.requests.gates import decide_program
from server.requests.state import ServerState
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.calibrate.bench import Trial
from vectors.extract.subject import Programs, Prompt, Tokens, Turn, Written, continuation_ids, one_each

T = TypeVar("T")
# Completions that run at once; each program of theirs takes one of the engine's slots.
WRITTEN_AT_ONCE = 64


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
        return [written.text for written in self.write(texts, max_tokens, program)]

    def write(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Programs = None) -> list[Written]:
        programs = one_each(program, len(texts))
        ends = self.state.vocabulary.end_ids

        async def one(number: int, own: Program | None) -> Written:
            sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop_token_ids=ends)
            completion = self.state.engine.generate(Generation(f"extract-{secrets.token_hex(8)}-{number}",
                                                               texts[number], sampling, own))
            ids = tuple([token.token_id async for token in completion])
            return Written(ids, self.state.vocabulary.decode(ids), bool(ids) and ids[-1] in ends)

        async def all_of_them() -> list[Written]:
            found: list[Written] = []
            for start in range(0, len(texts), WRITTEN_AT_ONCE):
                part = range(start, min(start + WRITTEN_AT_ONCE, len(texts)))
                found += await asyncio.gather(*(one(n, programs[n]) for n in part))
            return found

        return self._wait(all_of_them())

    def continuation_logprobs(self, texts: Sequence[Sequence[int]], starts: Sequence[int], program: Programs = None
                              ) -> list[float]:
        programs = one_each(program, len(texts))

        async def one(number: int) -> float:
            start = starts[number]
            scores = await self.state.engine.score(texts[number], programs[number], prompt_length=start)
            return float(scores.logprobs[start:].mean())

        async def all_of_them() -> list[float]:
            return [await one(n) for n in range(len(texts))]

        return self._wait(all_of_them())

    def roles(self, prompt: Prompt) -> list[str] | None:
        turns = () if isinstance(prompt, str) else [part for part in prompt if isinstance(part, Turn)]
        if not turns:
            return None
        said = [{"role": turn.role, "content": turn.content} for turn in turns]
        found = self.state.chat_prompts.prompt(said, roles=True).roles
        return None if found is None else list(found)

    def trials(self, prompts: Sequence[Sequence[int]], program: Program | None, max_tokens: int, temperature: float,
               seed: int, roles: Sequence[Sequence[str] | None] | None = None) -> list[Trial]:
        return self._wait(self._trials(prompts, program, max_tokens, temperature, seed, roles or [None] * len(prompts)))

    async def _trials(self, prompts: Sequence[Sequence[int]], program: Program | None, max_tokens: int,
                      temperature: float, seed: int, roles: Sequence[Sequence[str] | None]) -> list[Trial]:
        async def one(number: int, prompt: Sequence[int], own: Program | None) -> list[int]:
            sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=(seed + number) % 2**32,
                                stop_token_ids=self.state.vocabulary.end_ids)
            completion = self.state.engine.generate(Generation(f"calibrate-{secrets.token_hex(8)}-{number}", prompt,
                                                               sampling, own, roles[number]))
            return [token.token_id async for token in completion]

        decided = [one.program for one in await decide_program(program, prompts, self.state.engine)]
        written = await asyncio.gather(*(one(n, prompt, decided[n]) for n, prompt in enumerate(prompts)))
        measured = await self._measured(prompts, written, decided, roles)
        ends = self.state.vocabulary.end_ids
        trials = []
        for ids, (kl, surprise) in zip(written, measured, strict=True):
            text = self.state.vocabulary.decode(ids)
            signs = degeneration(ids, text, ids[-1] in ends)
            trials.append(Trial(kl=kl, surprise=surprise, repetition=signs.repetition, compression=signs.compression,
                                length=signs.length, ended=signs.ended, text=text))
        return trials

    async def _measured(self, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]],
                        programs: Sequence[Program | None], roles: Sequence[Sequence[str] | None]
                        ) -> list[tuple[float, float]]:
        """(KL, surprise) of each completion, nats per token; KL is 0 where nothing acted."""
        acting = {n: program for n, program in enumerate(programs) if program is not None and program.acting}
        compared = await self.state.engine.compare_all([
            CompareRequest([*prompts[n], *written[n]], len(prompts[n]), program, roles[n])
            for n, program in acting.items()])
        found = {n: (float(one.total.kl.mean()), float(one.total.surprise.mean()))
                 for n, one in zip(acting, compared, strict=True)}
        return [found[n] if n in found else (0.0, await self._surprise(prompts[n], written[n]))
                for n in range(len(prompts))]

    async def _surprise(self, prompt: Sequence[int], generated: Sequence[int]) -> float:
        """Mean -log p of generated tokens under the untouched model."""
        scores = await self.state.engine.score([*prompt, *generated])
        return -float(scores.logprobs[len(prompt):].mean())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

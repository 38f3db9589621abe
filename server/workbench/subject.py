"""The served model as the subject of an extraction or a calibration, which runs in a thread of its own."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from server.background.jobs import Control
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
# Completions that run at once.
AT_ONCE = 64


@dataclass
class EngineSubject:
    """`vectors.extract.Subject` and `vectors.calibrate.bench.Bench`. Its methods block; call them off the event loop
    `loop`.

    What it asks of the engine is a guest's work: passes of bounded size, each in its turn (`server.engines.guests`),
    and completions that give way.

    control: of the job that asks; None before there is one. A job that is cancelled gets no more answers.
    """

    state: ServerState
    loop: asyncio.AbstractEventLoop
    control: Control | None = None

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
        async def some(part: range) -> list[Mapping[int, torch.Tensor]]:
            requests = [CaptureRequest(texts[n], {site: layers}, positions) for n in part]
            return [one[site] for one in await self.state.engine.capture(requests, program)]

        return self._wait(self._in_steps(list(map(len, texts)), some))

    def next_logprobs(self, texts: Sequence[Sequence[int]], program: Programs = None) -> torch.Tensor:
        programs = one_each(program, len(texts))
        members: dict[str | None, list[int]] = {}
        for n, own in enumerate(programs):
            members.setdefault(None if own is None else own.digest, []).append(n)

        found = torch.empty(len(texts), self.facts.vocab_size)
        for same in members.values():
            # Near lengths share a pass: little padding, and few positions whose logits are made.
            chosen = sorted(same, key=lambda n: len(texts[n]))
            found[chosen] = self._wait(self._next([texts[n] for n in chosen], programs[chosen[0]]))
        return found

    async def _next(self, texts: Sequence[Sequence[int]], program: Program | None) -> torch.Tensor:
        async def some(part: range) -> list[torch.Tensor]:
            return list(await self.state.engine.next_logprobs([texts[n] for n in part], program))

        return torch.stack(await self._in_steps(list(map(len, texts)), some))

    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Program | None = None) -> list[str]:
        return [written.text for written in self.write(texts, max_tokens, program)]

    def write(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Programs = None) -> list[Written]:
        programs = one_each(program, len(texts))
        ends = self.state.vocabulary.end_ids
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop_token_ids=ends)
        said = self._wait(self._complete([Generation(f"extract-{secrets.token_hex(8)}-{n}", text, sampling, own,
                                                     guest=True)
                                          for n, (text, own) in enumerate(zip(texts, programs, strict=True))]))
        return [Written(ids, self.state.vocabulary.decode(ids), bool(ids) and ids[-1] in ends) for ids in said]

    def continuation_logprobs(self, texts: Sequence[Sequence[int]], starts: Sequence[int], program: Programs = None
                              ) -> list[float]:
        programs = one_each(program, len(texts))

        async def all_of_them() -> list[float]:
            return [float((await self._scores(text, own, start))[start:].mean())
                    for text, own, start in zip(texts, programs, starts, strict=True)]

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
        ends = self.state.vocabulary.end_ids

        async def some(part: range) -> list[Program | None]:
            found = await decide_program(program, [prompts[n] for n in part], self.state.engine)
            return [one.program for one in found]

        gated = program is not None and bool(program.gates)
        decided = await self._in_steps(list(map(len, prompts)), some) if gated else [program] * len(prompts)
        written = await self._complete([
            Generation(f"calibrate-{secrets.token_hex(8)}-{n}", prompt,
                       Sampling(max_tokens=max_tokens, temperature=temperature, seed=(seed + n) % 2**32,
                                stop_token_ids=ends), own, given, guest=True)
            for n, (prompt, own, given) in enumerate(zip(prompts, decided, roles, strict=True))])
        measured = await self._measured(prompts, written, decided, roles)
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
        wanted = [(n, CompareRequest([*prompts[n], *written[n]], len(prompts[n]), program, roles[n]))
                  for n, program in enumerate(programs) if program is not None and program.acting]

        async def some(part: range) -> list[tuple[float, float]]:
            compared = await self.state.engine.compare_all([wanted[n][1] for n in part])
            return [(float(one.total.kl.mean()), float(one.total.surprise.mean())) for one in compared]

        # Each is run twice, and once more for each intervention of several.
        sizes = [len(request.token_ids) * (len(request.program.compiled) + 2) for _, request in wanted]
        found = dict(zip([n for n, _ in wanted], await self._in_steps(sizes, some), strict=True))
        return [found[n] if n in found else (0.0, await self._surprise(prompts[n], written[n]))
                for n in range(len(prompts))]

    async def _surprise(self, prompt: Sequence[int], generated: Sequence[int]) -> float:
        """Mean -log p of generated tokens under the untouched model."""
        return -float((await self._scores([*prompt, *generated]))[len(prompt):].mean())

    async def _scores(self, text: Sequence[int], program: Program | None = None, start: int | None = None
                      ) -> torch.Tensor:
        """Log-probability of each token, `[len(text)]`."""
        async def one(_: range) -> list[torch.Tensor]:
            return [(await self.state.engine.score(text, program, prompt_length=start)).logprobs]

        return (await self._in_steps([len(text)], one))[0]

    async def _complete(self, wanted: Sequence[Generation]) -> list[Tokens]:
        """The tokens of completions, in order; as many at once as leave room for requests."""
        async def one(generation: Generation) -> Tokens:
            return tuple([token.token_id async for token in self.state.engine.generate(generation)])

        found: list[Tokens] = []
        for group in self._groups(wanted):
            await self._turn()
            running = [asyncio.ensure_future(one(generation)) for generation in group]
            try:
                found += await asyncio.gather(*running)
            finally:
                # If one fails, or nobody waits any more, the others are not left to run on.
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
        return found

    def _groups(self, wanted: Sequence[Generation]) -> Iterator[list[Generation]]:
        """Neighbours that run at once: at most half of the cache and half of the slots are theirs."""
        settings = self.state.settings
        group: list[Generation] = []
        tokens, programs = 0, set[str]()
        for one in wanted:
            size = len(one.prompt_ids) + one.sampling.max_tokens
            own = set() if one.program is None else {one.program.digest}
            if group and (len(group) == AT_ONCE or tokens + size > settings.kv_cache_tokens // 2
                          or len(programs | own) > max(settings.num_slots // 2, 1)):
                yield group
                group, tokens, programs = [], 0, set()
            group.append(one)
            tokens += size
            programs |= own
        if group:
            yield group

    async def _in_steps(self, sizes: Sequence[int], some: Callable[[range], Awaitable[list[T]]]) -> list[T]:
        """What `some` finds of consecutive indices, whose passes are one step together and wait for its turn. A size
        that is too large for a step is one by itself."""
        share, found = self.state.share, list[T]()
        while (start := len(found)) < len(sizes):
            stop, longest = start + 1, sizes[start]
            while stop < len(sizes) and max(longest, sizes[stop]) * (stop + 1 - start) <= share.tokens:
                longest = max(longest, sizes[stop])
                stop += 1
            await self._turn()
            async with share.step(longest * (stop - start)):
                found += await some(range(start, stop))
        return found

    async def _turn(self) -> None:
        if self.control is not None:
            await self.control.turn()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self.control is not None:
            return self.control.result(work, self.loop)
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


def sample(subject: EngineSubject) -> Tokens:
    """A text from whose pass it is told how long a job will take."""
    return subject.encode("The house by the river has been empty for a year, and nobody knows why.")

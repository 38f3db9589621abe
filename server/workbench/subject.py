"""The served model as the subject of an extraction or a calibration, which runs in a thread of its own."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from server.background.job import Control
from server.effects.degeneration import degeneration
from server.engines.data import CaptureRequest, CompareRequest, Comparison, Generation, Kept, Sampling, ScoreRequest
from server.engines.weights import Weights
from server.requests.gates import decide_program
from server.requests.state import ServerState
from server.threads import all_or_none
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.calibrate.bench import Trial
from vectors.extract.subject import Programs, Prompt, Tokens, Turn, Written, continuation_ids, one_each

T = TypeVar("T")
# Completions that run at once.
AT_ONCE = 64
COMPARED_AT_ONCE = 16


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

    def columns(self, site: Site, layer: int) -> torch.Tensor:
        [matrix] = Weights(self.state.settings.model, self.facts).readers(site, layer, []).values()
        return matrix.norm(dim=0)

    def next_logprobs(self, texts: Sequence[Sequence[int]], program: Programs = None) -> torch.Tensor:
        programs = one_each(program, len(texts))
        members: dict[str | None, list[int]] = {}
        for n, own in enumerate(programs):
            members.setdefault(None if own is None else own.digest, []).append(n)
        if self._batched and len(members) > 1:
            # Under many programs, texts of one program are too few for passes of their own.
            wanted = [ScoreRequest(text, len(text), own, guest=True)
                      for text, own in zip(texts, programs, strict=True)]
            return torch.stack(self._wait(self._scored(wanted, self.state.engine.following)))

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
        done = self._wait(self._complete([Generation(f"extract-{secrets.token_hex(8)}-{n}", text, sampling, own,
                                                     guest=True)
                                          for n, (text, own) in enumerate(zip(texts, programs, strict=True))]))
        return [Written(ids, self.state.vocabulary.decode(ids), bool(ids) and ids[-1] in ends) for ids, _ in done]

    def continuation_logprobs(self, texts: Sequence[Sequence[int]], starts: Sequence[int], program: Programs = None
                              ) -> list[float]:
        programs = one_each(program, len(texts))
        if self._batched:
            wanted = [ScoreRequest(text, start, own, guest=True)
                      for text, start, own in zip(texts, starts, programs, strict=True)]
            return [float(found.mean()) for found in self._wait(self._scored(wanted, self.state.engine.score_all))]

        async def all_of_them() -> list[float]:
            return [float((await self._scores(text, own, start))[start:].mean())
                    for text, own, start in zip(texts, programs, starts, strict=True)]

        return self._wait(all_of_them())

    def continuation_rows(self, text: Sequence[int], start: int, program: Program | None = None,
                          roles: Sequence[str] | None = None) -> torch.Tensor:
        """Log-probabilities of the vocabulary for each token from `start` on, `[len(text) - start, vocab_size]`
        float32; those tokens count as generated."""
        async def one(_: range) -> list[torch.Tensor]:
            scored = await self.state.engine.score(text, program, prompt_length=start, roles=roles, full=True)
            if scored.full is None:
                raise RuntimeError("the engine gave no log-probabilities though they were asked for")
            return [scored.full[start - 1:-1].float().cpu()]

        return self._wait(self._in_steps([len(text)], one))[0]

    def roles(self, prompt: Prompt) -> list[str] | None:
        turns = () if isinstance(prompt, str) else [part for part in prompt if isinstance(part, Turn)]
        if not turns:
            return None
        said = [{"role": turn.role, "content": turn.content} for turn in turns]
        found = self.state.chat_prompts.prompt(said, roles=True).roles
        return None if found is None else list(found)

    def trials(self, prompts: Sequence[Sequence[int]], program: Programs, max_tokens: int, temperature: float,
               seed: int | Sequence[int], roles: Sequence[Sequence[str] | None] | None = None) -> list[Trial]:
        seeds = [seed + n for n in range(len(prompts))] if isinstance(seed, int) else seed
        return self._wait(self._trials(prompts, one_each(program, len(prompts)), max_tokens, temperature, seeds,
                                       roles or [None] * len(prompts)))

    async def _trials(self, prompts: Sequence[Sequence[int]], programs: Sequence[Program | None], max_tokens: int,
                      temperature: float, seeds: Sequence[int], roles: Sequence[Sequence[str] | None]) -> list[Trial]:
        ends = self.state.vocabulary.end_ids
        decided = await self._decided(prompts, programs)
        completed = await self._complete([
            Generation(f"calibrate-{secrets.token_hex(8)}-{n}", prompt,
                       Sampling(max_tokens=max_tokens, temperature=temperature, seed=own_seed % 2**32,
                                stop_token_ids=ends), own, given, guest=True,
                       keep_from=len(prompt) - 1 if own is not None and own.acting else None)
            for n, (prompt, own, given, own_seed) in enumerate(zip(prompts, decided, roles, seeds, strict=True))])
        measured = await self._measured(prompts, completed, decided, roles)
        trials = []
        for (ids, _), (kl, surprise) in zip(completed, measured, strict=True):
            text = self.state.vocabulary.decode(ids)
            signs = degeneration(ids, text, ids[-1] in ends)
            trials.append(Trial(kl=kl, surprise=surprise, repetition=signs.repetition, compression=signs.compression,
                                length=signs.length, ended=signs.ended, text=text))
        return trials

    async def _decided(self, prompts: Sequence[Sequence[int]], programs: Sequence[Program | None]
                       ) -> list[Program | None]:
        """The program of each prompt by what its gates say of it."""
        found = list(programs)
        # Told apart as objects, because a program has no digest before its gates are decided.
        members: dict[int, list[int]] = {}
        for n, one in enumerate(programs):
            if one is not None and one.gates:
                members.setdefault(id(one), []).append(n)
        for own in members.values():

            async def some(part: range, own: list[int] = own) -> list[Program | None]:
                some_own = [own[n] for n in part]
                decided = await decide_program(programs[own[0]], [prompts[n] for n in some_own], self.state.engine)
                return [one.program for one in decided]

            for n, decided in zip(own, await self._in_steps([len(prompts[n]) for n in own], some), strict=True):
                found[n] = decided
        return found

    async def _measured(self, prompts: Sequence[Sequence[int]], completed: Sequence[tuple[Tokens, Kept | None]],
                        programs: Sequence[Program | None], roles: Sequence[Sequence[str] | None]
                        ) -> list[tuple[float, float]]:
        """(KL, surprise) of each completion, nats per token; KL is 0 where nothing acted."""
        wanted = [(n, CompareRequest([*prompts[n], *completed[n][0]], len(prompts[n]), program, roles[n],
                                     kept=completed[n][1], guest=True))
                  for n, program in enumerate(programs) if program is not None and program.acting]
        # Where the steered pass was kept the engine runs what is left of it as it runs guests. Elsewhere each is run
        # twice, and once more for each intervention of several.
        lean = [(n, one) for n, one in wanted if one.kept is not None and len(one.program.compiled) == 1]
        rest = [(n, one) for n, one in wanted if one.kept is None or len(one.program.compiled) > 1]
        found: dict[int, tuple[float, float]] = {}

        async def some(members: Sequence[tuple[int, CompareRequest]]) -> list[Comparison]:
            compared = await self.state.engine.compare_all([request for _, request in members])
            found.update({n: (float(one.total.kl.mean()), float(one.total.surprise.mean()))
                          for (n, _), one in zip(members, compared, strict=True)})
            return compared

        for start in range(0, len(lean), COMPARED_AT_ONCE):
            await self._turn()
            await some(lean[start:start + COMPARED_AT_ONCE])
        await self._in_steps([len(one.token_ids) * (len(one.program.compiled) + 2) for _, one in rest],
                             lambda part: some(rest[part.start:part.stop]))
        return [found[n] if n in found else (0.0, await self._surprise(prompts[n], completed[n][0]))
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

    @property
    def _batched(self) -> bool:
        return "batched_scores" in self.state.engine.features

    async def _scored(self, wanted: Sequence[ScoreRequest],
                      score: Callable[[Sequence[ScoreRequest]], Awaitable[Sequence[torch.Tensor] | torch.Tensor]]
                      ) -> list[torch.Tensor]:
        """What `score` finds of each; as many at once as leave room for requests."""
        found: list[torch.Tensor] = []
        for group in self._groups([(len(one.token_ids) + 1, one.program) for one in wanted]):
            members = [wanted[n] for n in group]
            # The first text of each program leaves in the cache what the others begin with.
            first = leading([one.program for one in members])
            scores: dict[int, torch.Tensor] = {}
            for part in (first, [n for n in range(len(members)) if n not in first]):
                if part:
                    await self._turn()
                    scores.update(zip(part, await score([members[n] for n in part]), strict=True))
            found += [scores[n] for n in range(len(members))]
        return found

    async def _complete(self, wanted: Sequence[Generation]) -> list[tuple[Tokens, Kept | None]]:
        """The tokens of completions, in order, and what was kept of them; as many at once as leave room for requests.
        """
        async def one(generation: Generation, begun: asyncio.Event, first: bool) -> tuple[Tokens, Kept | None]:
            if not first:
                # What all prompts under a program begin with is in the cache then.
                await begun.wait()
            completion, ids = self.state.engine.generate(generation), []
            try:
                async for token in completion:
                    begun.set()
                    ids.append(token.token_id)
            finally:
                begun.set()
            return tuple(ids), completion.kept()

        found: list[tuple[Tokens, Kept | None]] = []
        for group in self._groups([(len(one.prompt_ids) + one.sampling.max_tokens, one.program) for one in wanted]):
            await self._turn()
            programs = [wanted[n].program for n in group]
            begun = {digest(program): asyncio.Event() for program in programs}
            first = set(leading(programs))
            found += await all_or_none([one(wanted[n], begun[digest(program)], i in first)
                                        for i, (n, program) in enumerate(zip(group, programs, strict=True))])
        return found

    def _groups(self, wanted: Sequence[tuple[int, Program | None]]) -> Iterator[range]:
        """Neighbours that run at once, of which the tokens and the program are given: at most half of the cache and
        half of the slots are theirs."""
        settings = self.state.settings
        start, tokens, programs = 0, 0, set[str]()
        for n, (size, program) in enumerate(wanted):
            own = set() if program is None else {program.digest}
            if n > start and (n - start == AT_ONCE or tokens + size > settings.kv_cache_tokens // 2
                              or len(programs | own) > max(settings.num_slots // 2, 1)):
                yield range(start, n)
                start, tokens, programs = n, 0, set()
            tokens += size
            programs |= own
        if start < len(wanted):
            yield range(start, len(wanted))

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


def digest(program: Program | None) -> str | None:
    return None if program is None else program.digest


def leading(programs: Sequence[Program | None]) -> list[int]:
    """Of each program the first place in which it stands."""
    first: dict[str | None, int] = {}
    for n, program in enumerate(programs):
        first.setdefault(digest(program), n)
    return list(first.values())


def sample(subject: EngineSubject) -> Tokens:
    """A text from whose pass it is told how long a job will take."""
    return subject.encode("The house by the river has been empty for a year, and nobody knows why.")

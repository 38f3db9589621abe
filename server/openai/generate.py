"""One request's completions: all choices run at once, their events come merged in the order they happen."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import anyio

from server.engines.base import Completion, Generation, Sampling, Token
from server.gates import Decided
from server.guard import Event, GuardedCompletion, Part
from server.metrics import Metrics
from server.openai.detokenize import Detokenizer
from server.openai.prompts import Prompt
from server.openai.stops import StopMatcher
from server.openai.vocabulary import Vocabulary
from server.receipt import Outcome

# Odd and large: seeds of neighbouring requests do not share the streams of their choices.
SEED_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Piece:
    """What one token, or the end of a choice, brought: text that can be sent, and on the last piece why it ended."""

    choice: int
    text: str
    token: Token | None = None
    finish_reason: Literal["stop", "length"] | None = None


@dataclass
class Choice:
    """State of one choice; `token_ids` are those generated, the one that ended it included."""

    index: int
    prompt: Prompt
    decided: Decided
    token_ids: list[int] = field(default_factory=list)
    touched: list[tuple[int, int]] = field(default_factory=list)
    parts: Sequence[Part] = ()
    events: Sequence[Event] = ()
    checks: int | None = None

    def outcome(self) -> Outcome:
        return Outcome(self.index, self.prompt.token_ids, self.token_ids, self.prompt.roles, self.touched,
                       self.decided, self.events, self.checks)


class Run:
    """The choices of one request. Iterate `pieces()` once; leaving it early cancels them in the engine."""

    def __init__(self, vocabulary: Vocabulary, metrics: Metrics, *, request_id: str,
                 prompts: Sequence[Prompt], decided: Sequence[Decided], n: int, sampling: Sequence[Sampling],
                 stops: Sequence[str], begin: Callable[[Generation, Decided], Completion]) -> None:
        """`decided`: one per prompt. `sampling`: one per choice of a prompt. Choice p * n + i is completion i of
        prompt p. `begin`: starts a choice in the engine."""
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._stops = stops
        self.prompts = prompts
        self.choices = [Choice(p * n + i, prompt, decided[p]) for p, prompt in enumerate(prompts) for i in range(n)]
        # Made here and not when first iterated, so that what the engine refuses becomes the answer's status.
        self._completions = [
            begin(Generation(f"{request_id}-{c.index}", c.prompt.token_ids, sampling[c.index % n],
                             c.decided.program, c.prompt.roles), c.decided)
            for c in self.choices]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []
        open_choices = len(self.choices)
        try:
            # All of them first: a stream must not begin if one of its choices finds no room.
            for completion in self._completions:
                await completion.admit()
            tasks += [asyncio.create_task(self._follow(choice, queue)) for choice in self.choices]
            while open_choices:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                open_choices -= item.finish_reason is not None
                yield item
        finally:
            with anyio.CancelScope(shield=True):
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for completion in self._completions:
                    await completion.cancel()

    async def _follow(self, choice: Choice, queue: "asyncio.Queue[Piece | BaseException]") -> None:
        try:
            async for piece in self._choice(choice):
                queue.put_nowait(piece)
        except Exception as error:  # handed to the reader of the queue, which raises it
            queue.put_nowait(error)

    async def _choice(self, choice: Choice) -> AsyncIterator[Piece]:
        completion = self._completions[choice.index]
        detokenizer = Detokenizer(self._vocabulary, choice.prompt.token_ids)
        matcher = StopMatcher(self._stops)
        started = first_at = time.perf_counter()
        reason: Literal["stop", "length"] = "length"
        async for token in completion:
            if not choice.token_ids:
                first_at = time.perf_counter()
                self._metrics.first_token(first_at - started)
            choice.token_ids.append(token.token_id)
            # The token that ends a text has none of its own.
            text = "" if token.finish_reason == "stop" else matcher.push(detokenizer.push(token.token_id))
            ended = matcher.stopped or token.finish_reason is not None
            if not matcher.stopped and token.finish_reason is not None:
                reason = token.finish_reason
                # A stop string may be completed by what was held back.
                text += matcher.push(detokenizer.flush()) + matcher.flush()
            yield Piece(choice.index, text, token)
            if ended:
                break
        if matcher.stopped:
            reason = "stop"
            await completion.cancel()
        choice.touched = [(t.prompt, t.generation) for t in completion.touched()]
        if isinstance(completion, GuardedCompletion):
            choice.parts, choice.events, choice.checks = completion.parts, completion.events, completion.checks
        self._metrics.completed(len(choice.token_ids), time.perf_counter() - first_at)
        yield Piece(choice.index, "", None, reason)


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of choice `index`; choice 0 has the request's own."""
    if seed is None:
        return None
    return seed if index == 0 else (seed + index * SEED_STRIDE) % 2**63

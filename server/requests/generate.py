"""One request's completions: as many choices run at once as find a place; their events come merged as they happen."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio

from server.engines.base import Completion
from server.engines.data import FinishReason, Generation, Kept, Sampling, Token, Touched
from server.engines.parts import Part
from server.errors import ClientTooSlow
from server.observability.metrics import Metrics
from server.observability.tracing import record
from server.requests.admission.deadline import Deadline
from server.requests.admission.fairness import Client
from server.requests.admission.queue import AdmissionQueue, Cost, Ticket
from server.requests.form import Form
from server.requests.gates import Decided
from server.requests.guard import Event
from server.requests.receipt import Outcome
from server.requests.runs import Runs
from server.requests.switched import SwitchedCompletion
from server.text import message
from server.text.detokenize import Detokenizer
from server.text.message import Delta, Message
from server.text.prompts import Prompt
from server.text.stops import StopMatcher
from server.text.vocabulary import Vocabulary
from steering.language.errors import TrimtabError
from steering.language.vocabulary import Section

# Pieces of one request that wait for a client that reads more slowly than the engine writes.
MAX_UNREAD = 16_384

@dataclass(frozen=True)
class Piece:
    """What one token, or the end of a choice, brought: what can be sent of it, and on the last piece why it ended."""

    choice: int
    delta: Delta
    token: Token | None = None
    finish_reason: message.FinishReason | None = None


@dataclass
class Choice:
    """State of one choice; `token_ids` are those generated, the one that ended it included. measured: its effect will
    be measured, so the engine keeps what that needs, and gives it as `kept`. cached: tokens of its prompt that the
    engine had in its cache; None where that is not known (yet).
    stopped_at: the stop string that ended it. graded: its `message` is kept to be graded. rolled: the same, for the
    guard rails of a roll-out. shadowed: the roll-out whose candidate is tried on its prompt too. seconds: from its
    begin in the engine to its end."""

    index: int
    prompt: Prompt
    decided: Decided
    measured: bool = False
    graded: bool = False
    rolled: bool = False
    shadowed: str | None = None
    seconds: float | None = None
    kept: Kept | None = None
    cached: int | None = None
    stopped_at: str | None = None
    token_ids: list[int] = field(default_factory=list)
    touched: list[Touched] = field(default_factory=list)
    weak_touched: list[Touched] = field(default_factory=list)
    parts: Sequence[Part] = ()
    events: Sequence[Event] = ()
    checks: int | None = None
    switched_off: int | None = None
    sections: Counter[Section] = field(default_factory=Counter)
    message: Message = field(default_factory=Message)

    @property
    def runs(self) -> int:
        """How many runs of the model it takes."""
        return 1 if self.decided.weak is None else 2

    def outcome(self) -> Outcome:
        return Outcome(self.index, self.prompt.token_ids, self.token_ids, self.prompt.roles, self.touched,
                       self.decided, self.events, self.checks, self.switched_off, self.sections, self.weak_touched)


class Run:
    """The choices of one request. Iterate `pieces()` once: completions begin with it, and end with it however it is
    left."""

    def __init__(self, vocabulary: Vocabulary, metrics: Metrics, runs: Runs, *, request_id: str,
                 prompts: Sequence[Prompt], decided: Sequence[Decided], n: int, sampling: Sequence[Sampling],
                 stops: Sequence[str], form: Form, cache_salt: str | None,
                 begin: Callable[[Generation, Decided], Completion], begun: Callable[["Run"], None],
                 placed: Callable[[TrimtabError], TrimtabError], queue: AdmissionQueue, client: Client,
                 deadline: Deadline, model_names: Sequence[str] = ()) -> None:
        """`decided`: one per prompt. `sampling`: one per choice of a prompt. Choice p * n + i is completion i of
        prompt p. `form`: of all texts. `begin`: starts a choice in the engine. `begun`: called when the engine has
        taken the first ones. `placed`: an engine's error in the request's words. `queue`: gives the places, to `client`
        in its turn. `model_names`: of the presets that act."""
        self.model_names = model_names
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._runs = runs
        self._stops, self._form, self._cache_salt = stops, form, cache_salt
        self._request_id, self._n, self._sampling = request_id, n, sampling
        self._begin, self._begun, self._placed = begin, begun, placed
        self.prompts = prompts
        self.choices = [Choice(p * n + i, prompt, decided[p]) for p, prompt in enumerate(prompts) for i in range(n)]
        self._queue, self._client, self._deadline = queue, client, deadline
        self._events: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    @property
    def choices_per_prompt(self) -> int:
        return self._n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def cached_tokens(self) -> int | None:
        """Of the prompts, each counted once; None until it is known of all of them."""
        found = [choice.cached for choice in self.choices[::self._n]]
        return None if None in found else sum(count for count in found if count is not None)

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of thoughts; None where the model has none."""
        marks = self._form.sections.marks.marks
        return sum(choice.sections["reasoning"] for choice in self.choices) if any(
            mark.section == "reasoning" for mark in marks) else None

    def fail(self, error: TrimtabError) -> None:
        """End the run with `error`, after what has been generated."""
        self._events.put_nowait(error)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        open_choices = len(self.choices)
        async with AsyncExitStack() as stack:
            stack.enter_context(self._runs.opened(self))
            if (left_s := self._deadline.left_s) is not None:
                timer = asyncio.get_running_loop().call_later(left_s, lambda: self.fail(self._deadline.error))
                stack.callback(timer.cancel)
            # A weak run takes as much again.
            costs = [Cost((0 if choice.index % self._n else len(choice.prompt.token_ids)) * choice.runs,
                          self._sampling[choice.index % self._n].max_tokens * choice.runs) for choice in self.choices]
            places = stack.enter_context(self._queue.joined(self._client, costs))
            # Those that find a place at once begin together: a stream must not begin if one of them finds no room.
            together = _Together(max(1, sum(place.granted.is_set() for place in places)), lambda: self._begun(self))
            for choice, place in zip(self.choices, places, strict=True):
                await stack.enter_async_context(_running(self._follow(choice, place, together)))
            while open_choices:
                item = await self._events.get()
                if isinstance(item, Exception):
                    raise item
                open_choices -= item.finish_reason is not None
                yield item

    @asynccontextmanager
    async def _completion(self, choice: Choice) -> AsyncIterator[Completion]:
        """A choice in the engine, cancelled at the end."""
        completion = self._begin(Generation(
            f"{self._request_id}-{choice.index}", choice.prompt.token_ids, self._sampling[choice.index % self._n],
            choice.decided.program, choice.prompt.roles,
            # What is kept would be compared with pages of the cache that have no salt.
            keep_from=len(choice.prompt.token_ids) - 1 if choice.measured and self._cache_salt is None else None,
            cache_salt=self._cache_salt), choice.decided)
        try:
            yield completion
        finally:
            with anyio.CancelScope(shield=True):
                await completion.cancel()

    async def _follow(self, choice: Choice, place: Ticket, together: "_Together") -> None:
        if not self._sampling[choice.index % self._n].max_tokens:
            await self._nothing(choice, place, together)
            return
        offered = time.time_ns()
        try:
            async with place, self._completion(choice) as completion:
                await completion.admit()
                record("engine.queue", offered, attributes={"trimtab.choice": choice.index})
                await together.arrived()
                async for piece in self._choice(choice, completion):
                    if self._events.qsize() >= MAX_UNREAD:
                        raise ClientTooSlow(f"the client left {MAX_UNREAD} tokens unread",
                                            fix="Read the stream as it comes.")
                    if choice.graded or choice.rolled or choice.shadowed is not None:
                        choice.message.add(piece.delta, piece.finish_reason)
                    self._events.put_nowait(piece)
                    place.generated = len(choice.token_ids)
        except TrimtabError as error:
            self._events.put_nowait(self._placed(error))
        except Exception as error:  # handed to the reader of the queue, which raises it
            self._events.put_nowait(error)

    async def _nothing(self, choice: Choice, place: Ticket, together: "_Together") -> None:
        """A choice of no tokens, which the engine does not hear of."""
        async with place:
            await together.arrived()
        compiled = () if choice.decided.program is None else choice.decided.program.compiled
        choice.touched = choice.touched or [Touched(0, 0) for _ in compiled]
        weak = None if choice.decided.weak is None else choice.decided.weak.program
        choice.weak_touched = [Touched(0, 0) for _ in (() if weak is None else weak.compiled)]
        self._events.put_nowait(Piece(choice.index, Delta(), None, "length"))

    async def _choice(self, choice: Choice, completion: Completion) -> AsyncIterator[Piece]:
        detokenizer = Detokenizer(self._vocabulary, choice.prompt.token_ids, self._form.shown)
        matcher = StopMatcher(self._stops)
        least = self._sampling[choice.index % self._n].min_tokens
        assembler, told = self._form.assembler(), self._form.sections.reader()

        def delta(text: str) -> Delta:
            return Delta(text) if assembler is None else assembler.push(text)

        started = first_at = time.perf_counter()
        began = first = time.time_ns()
        reason: FinishReason = "length"
        async for token in completion:
            if not choice.token_ids:
                first_at, first = time.perf_counter(), time.time_ns()
                self._metrics.first_token(first_at - started)
            choice.token_ids.append(token.token_id)
            choice.sections[told(token.token_id)] += 1
            # The token that ends a text has none of its own.
            new = "" if token.finish_reason == "stop" else detokenizer.push(token.token_id)
            # Stop texts begin behind the tokens that must come.
            text = new if len(choice.token_ids) <= least else matcher.push(new)
            ended = matcher.stopped or token.finish_reason is not None
            if not matcher.stopped and token.finish_reason is not None:
                reason = token.finish_reason
                # A stop string may be completed by what was held back.
                text += matcher.push(detokenizer.flush()) + matcher.flush()
            yield Piece(choice.index, delta(text), token)
            if ended:
                break
        rest = ""
        if matcher.stopped:
            reason, choice.stopped_at = "stop", matcher.matched
            await completion.cancel()
        elif isinstance(completion, SwitchedCompletion) and completion.ended:
            # The completion ended without a last token, so the text that was held back is still to be sent.
            reason, rest = "stop", matcher.push(detokenizer.flush()) + matcher.flush()
        choice.touched, choice.kept, choice.cached = completion.touched(), completion.kept(), completion.cached()
        choice.weak_touched = completion.weak_touched()
        if isinstance(completion, SwitchedCompletion):
            choice.parts, choice.events, choice.checks = completion.parts, completion.events, completion.checks
            choice.switched_off = completion.switched_off
        choice.seconds = time.perf_counter() - started
        self._metrics.completed(len(choice.token_ids), time.perf_counter() - first_at)
        record("engine.prefill", began, first, attributes={
            "trimtab.choice": choice.index, "trimtab.tokens": len(choice.prompt.token_ids)})
        record("engine.decode", first, attributes={
            "trimtab.choice": choice.index, "trimtab.tokens": len(choice.token_ids)})
        last = delta(rest)
        finish: message.FinishReason = reason
        if assembler is not None:
            last = last.then(assembler.end())
            if reason == "stop" and assembler.calls and not assembler.within:
                finish = "tool_calls"
        yield Piece(choice.index, last, None, finish)


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` runs beside the body of the statement and has ended after it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(task, return_exceptions=True)


class _Together:
    """Lets nobody through until so many have arrived, then everybody."""

    def __init__(self, count: int, all_here: Callable[[], None]) -> None:
        self._missing, self._all_here = count, all_here
        self._open = asyncio.Event()

    async def arrived(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._all_here()
            self._open.set()
        await self._open.wait()

"""`POST /v1/completions`."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from openai.types import Completion, CompletionUsage
from openai.types.completion_choice import CompletionChoice
from pydantic import BaseModel, Field

from server.api.openai.logprobs import Teller, Told
from server.api.openai.streaming import stream, while_connected
from server.api.openai.usage import usage
from server.api.route import StrictRoute
from server.engines.data import FinishReason
from server.http.answers import JsonAnswer
from server.requests.admission.caller import Caller, caller_of
from server.requests.generate import Piece
from server.requests.receipt import Receipt
from server.requests.schema import CompletionRequest
from server.requests.scoring import PromptToken, score_prompts
from server.requests.service import Started, plan_for, start
from server.requests.state import ServerState, State
from server.requests.told import told_ahead, told_of
from server.text.prompts import Prompt, check_length
from server.text.vocabulary import Vocabulary
from steering.language.errors import InvalidRequest, InvalidSpec, Path

router = APIRouter(tags=["completions"], route_class=StrictRoute)
DEFAULT_MAX_TOKENS = 16


class PromptLogprob(BaseModel):
    logprob: float
    rank: int = Field(description="Among all tokens, from 1.")
    decoded_token: str


class ScoredChoice(CompletionChoice):
    """OpenAI's choice with what was asked for about its prompt and its tokens."""

    token_ids: list[int] | None = Field(default=None, description="Of completion or chunk, if return_token_ids asks "
                                        "for them.")
    prompt_token_ids: list[int] | None = Field(default=None, description="Likewise; of a stream in the first chunk.")
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        default=None, description="Per token of the prompt, by token id: the token itself and the likeliest ones. Null "
        "for the first one, as nothing predicts it.")


class SteeredCompletion(Completion):
    """OpenAI's response with the receipt; of the chunks of a stream the last one carries it."""

    choices: list[ScoredChoice]  # type: ignore[assignment]
    steering: Receipt | None = None


@router.post("/v1/completions", response_model=SteeredCompletion)
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response:
    """Continue text or tokens, steered as `steering` says."""
    caller = caller_of(request, state.settings, body.timeout_s)
    with state.queue.entering(caller.client):
        async with caller.deadline.held():
            started = await _start(body, request.state.request_id, state, caller)
    answer = _Answer(started, state.vocabulary, body, f"cmpl-{request.state.request_id.removeprefix('req-')}")
    if body.stream:
        return await stream(answer.chunks(), request, told_ahead(started.plan))
    pieces = started.run.pieces()
    completion, receipt = await while_connected(request, answer.whole(pieces), pieces.aclose)
    return await state.pools.complete(lambda: JsonAnswer(completion.model_dump(mode="json", exclude_unset=True),
                                                         headers=told_of(receipt)))


async def _start(body: CompletionRequest, request_id: str, state: ServerState, caller: Caller) -> Started:
    _, plan = await plan_for(body, state, caller)
    if plan.names_roles:
        raise InvalidSpec("plain completions have no chat roles, so scopes cannot name them",
                          param=("steering", "interventions"),
                          fix="Use /v1/chat/completions, or pick tokens by position.")
    if plan.contrast is not None and (body.prompt_logprobs is not None or (body.echo and body.logprobs is not None)):
        raise InvalidSpec("the prompt's log-probabilities are of one run, and a contrast has two",
                          param=("steering", "contrast"), fix="Leave out the contrast, or the prompt's "
                          "log-probabilities.")
    items = _texts(body.prompt)
    single = items == [body.prompt]
    if len(items) > state.settings.max_prompts:
        raise InvalidRequest(f"{len(items)} prompts, this server allows {state.settings.max_prompts}", param="prompt")
    prompts = await state.texts.run(
        lambda: [_prompt(item, ("prompt",) if single else ("prompt", i), state) for i, item in enumerate(items)],
        sum(map(len, items)))
    return await start(body, state, plan, prompts, request_id=request_id, max_tokens_field="max_tokens",
                       max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
                       prompt_field="prompt", logprobs=body.logprobs, caller=caller)


def _prompt(given: str | list[int], where: Path, state: ServerState) -> Prompt:
    if isinstance(given, str):
        check_length(state.vocabulary.least_tokens(given), state.engine.max_sequence_tokens, where)
        ids = state.vocabulary.encode(given, special_tokens=True)
    else:
        ids = given
    if not ids:
        raise InvalidRequest("the prompt is empty", param=where, fix="Give at least one token.")
    for j, token_id in enumerate(ids):
        if token_id >= state.vocabulary.vocab_size:
            raise InvalidRequest(f"there is no token {token_id}", param=(*where, j), value=token_id,
                                 fix=f"Use 0 to {state.vocabulary.vocab_size - 1}.")
    return Prompt(ids)


class _Answer:
    """Builds the response from the pieces of the run, whole or in chunks."""

    def __init__(self, started: Started, vocabulary: Vocabulary, body: CompletionRequest, completion_id: str) -> None:
        self._started = started
        self._vocabulary = vocabulary
        self._logprobs, self._token_ids = body.logprobs is not None, body.return_token_ids
        self._usage = body.stream_options is not None and body.stream_options.include_usage
        self._running = self._usage and body.stream_options is not None and body.stream_options.continuous_usage_stats
        self._id = completion_id
        self._created = int(time.time())
        self._prompt_top = body.prompt_logprobs
        self._echo = body.echo
        self._echoed = _texts(body.prompt)
        self._top = body.logprobs
        count = started.run.choices_per_prompt
        self._tellers = [Teller(vocabulary, () if body.echo else choice.prompt.token_ids)
                         for choice in started.run.choices]
        self._prompt_of = [index // count for index in range(len(started.run.choices))]

    async def whole(self, pieces: AsyncIterator[Piece]) -> tuple[SteeredCompletion, Receipt]:
        scored = await self._scored()
        texts = [self._echo_of(i) for i in range(len(self._started.run.choices))]
        tokens: list[list[Told]] = [[*self._echoed_tokens(i, scored)] for i in range(len(texts))]
        reasons: dict[int, FinishReason] = {}
        async for piece in pieces:
            texts[piece.choice] += piece.delta.text
            if piece.token is not None:
                tokens[piece.choice].append(piece.token)
            if piece.finish_reason is not None:
                reasons[piece.choice] = cast(FinishReason, piece.finish_reason)
        # In a thread, as with log-probabilities there may be hundreds of thousands of entries.
        choices = await self._started.state.pools.complete(lambda: [
            self._choice(i, text, reasons[i], tokens[i], scored) for i, text in enumerate(texts)])
        receipt = await self._started.receipt()
        return self._response(choices, usage(self._started), receipt=receipt), receipt

    async def chunks(self) -> AsyncIterator[SteeredCompletion]:
        pieces = self._started.run.pieces()
        try:
            open_choices = len(self._started.run.choices)
            scored = await self._scored()
            for i in range(open_choices) if self._echo else ():
                # A megabyte of log-probabilities takes a while to be written.
                yield await self._started.state.pools.complete(partial(self._echo_chunk, i, scored))
            opened: set[int] = set()
            async for piece in pieces:
                if not piece.delta and piece.finish_reason is None and not self._logprobs and not self._token_ids:
                    continue
                # OpenAI's type has no null here, its streams do: null until the choice ends.
                choice = ScoredChoice.model_construct(
                    index=piece.choice, text=piece.delta.text, finish_reason=cast(FinishReason, piece.finish_reason),
                    logprobs=None if piece.token is None or not self._logprobs
                    else self._tellers[piece.choice].told([piece.token]))
                if self._token_ids:
                    choice.token_ids = [] if piece.token is None else [piece.token.token_id]
                    if piece.choice not in opened:
                        choice.prompt_token_ids = self._started.run.choices[piece.choice].prompt.token_ids
                    opened.add(piece.choice)
                open_choices -= piece.finish_reason is not None
                last = not open_choices and not self._usage
                yield self._response([choice], receipt=await self._started.receipt() if last else None)
            if self._usage:
                yield self._response([], usage(self._started), receipt=await self._started.receipt())
        finally:
            await pieces.aclose()

    async def _scored(self) -> list[list[PromptToken]] | None:
        """Log-probabilities of the prompts, where they are asked for."""
        wanted = [n for n in (self._prompt_top, self._top if self._echo else None) if n is not None]
        return await score_prompts(self._started, max(wanted)) if wanted else None

    def _echo_of(self, choice: int) -> str:
        """What the text of a choice begins with."""
        if not self._echo:
            return ""
        given = self._echoed[self._prompt_of[choice]]
        if isinstance(given, str):
            return given
        return self._vocabulary.decode(given)

    def _echoed_tokens(self, choice: int, scored: list[list[PromptToken]] | None) -> list[Told]:
        if not self._echo or not self._logprobs or scored is None:
            return []
        return [replace(t, top_logprobs=t.top_logprobs[:self._top]) for t in scored[self._prompt_of[choice]]]

    def _echo_chunk(self, choice: int, scored: list[list[PromptToken]] | None) -> SteeredCompletion:
        tokens = self._echoed_tokens(choice, scored)
        return self._response([ScoredChoice.model_construct(
            index=choice, text=self._echo_of(choice), finish_reason=cast(FinishReason, None),
            logprobs=self._tellers[choice].told(tokens) if self._logprobs else None)])

    def _choice(self, index: int, text: str, reason: FinishReason, tokens: Sequence[Told],
                scored: list[list[PromptToken]] | None) -> ScoredChoice:
        choice = ScoredChoice(index=index, text=text, finish_reason=reason,
                              logprobs=self._tellers[index].told(tokens) if self._logprobs else None)
        if self._prompt_top is not None and scored is not None:
            choice.prompt_logprobs = [self._by_id(token) for token in scored[self._prompt_of[index]]]
        if self._token_ids:
            ours = self._started.run.choices[index]
            choice.token_ids, choice.prompt_token_ids = ours.token_ids, ours.prompt.token_ids
        return choice

    def _by_id(self, token: PromptToken) -> dict[str, PromptLogprob] | None:
        if token.logprob is None or token.rank is None:
            return None
        found = {token.token_id: (token.logprob, token.rank)}
        for rank, (other, logprob) in enumerate(token.top_logprobs[:self._prompt_top], start=1):
            found.setdefault(other, (logprob, rank))
        return {str(one): PromptLogprob(logprob=logprob, rank=rank, decoded_token=self._vocabulary.token_text(one))
                for one, (logprob, rank) in found.items()}

    def _response(self, choices: Sequence[ScoredChoice], counts: CompletionUsage | None = None,
                  receipt: Receipt | None = None) -> SteeredCompletion:
        response = SteeredCompletion.model_construct(
            id=self._id, choices=list(choices), created=self._created, model=self._started.model,
            object="text_completion", system_fingerprint=self._started.plan.system)
        if counts is None and self._running:
            counts = usage(self._started)
        if counts is not None or self._usage:
            response.usage = counts
        if receipt is not None:
            response.steering = receipt
        return response


def _texts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request, one by one."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

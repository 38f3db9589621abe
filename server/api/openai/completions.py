"""`POST /v1/completions`."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import cast

from fastapi import APIRouter, Request, Response
from openai.types import Completion, CompletionUsage
from openai.types.completion_choice import CompletionChoice, Logprobs

from server.api.openai.streaming import stream, while_connected
from server.api.openai.usage import usage
from server.api.route import StrictRoute
from server.engines.base import FinishReason, Token
from server.http.answers import JsonAnswer
from server.requests.admission.caller import Caller, caller_of
from server.requests.generate import Piece
from server.requests.receipt import Receipt
from server.requests.schema import CompletionRequest
from server.requests.service import Started, plan_for, start
from server.requests.state import ServerState, State
from server.requests.told import told_ahead, told_of
from server.text.prompts import Prompt, check_length
from server.text.vocabulary import Vocabulary
from steering.language.errors import InvalidRequest, InvalidSpec, Path

router = APIRouter(tags=["completions"], route_class=StrictRoute)
DEFAULT_MAX_TOKENS = 16


class SteeredCompletion(Completion):
    """OpenAI's response with the receipt; of the chunks of a stream the last one carries it."""

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
    _, plan = await plan_for(body, state)
    if plan.names_roles:
        raise InvalidSpec("plain completions have no chat roles, so scopes cannot name them",
                          param=("steering", "interventions"),
                          fix="Use /v1/chat/completions, or pick tokens by position.")
    given = body.prompt
    single = isinstance(given, str) or isinstance(given[0], int)
    items = cast("list[str | list[int]]", [given] if single else given)
    if len(items) > state.settings.max_prompts:
        raise InvalidRequest(f"{len(items)} prompts, this server allows {state.settings.max_prompts}", param="prompt")
    prompts = await state.texts.run(
        lambda: [_prompt(item, ("prompt",) if single else ("prompt", i), state) for i, item in enumerate(items)],
        sum(map(len, items)))
    return await start(body, state, plan, prompts, request_id=request_id,
                       max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS, max_tokens_field="max_tokens",
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
        self._logprobs = body.logprobs is not None
        self._usage = body.stream_options is not None and body.stream_options.include_usage
        self._running = self._usage and body.stream_options is not None and body.stream_options.continuous_usage_stats
        self._id = completion_id
        self._created = int(time.time())
        self._offsets = [0 for _ in started.run.choices]

    async def whole(self, pieces: AsyncIterator[Piece]) -> tuple[SteeredCompletion, Receipt]:
        texts = ["" for _ in self._started.run.choices]
        tokens: list[list[Token]] = [[] for _ in texts]
        reasons: dict[int, FinishReason] = {}
        async for piece in pieces:
            texts[piece.choice] += piece.delta.text
            if piece.token is not None:
                tokens[piece.choice].append(piece.token)
            if piece.finish_reason is not None:
                reasons[piece.choice] = cast(FinishReason, piece.finish_reason)
        # In a thread, as with log-probabilities there may be hundreds of thousands of entries.
        choices = await self._started.state.pools.complete(lambda: [
            CompletionChoice(index=i, text=text, finish_reason=reasons[i],
                             logprobs=self._entries(i, tokens[i]) if self._logprobs else None)
            for i, text in enumerate(texts)])
        receipt = await self._started.receipt()
        return self._response(choices, usage(self._started), receipt=receipt), receipt

    async def chunks(self) -> AsyncIterator[SteeredCompletion]:
        pieces = self._started.run.pieces()
        try:
            open_choices = len(self._started.run.choices)
            async for piece in pieces:
                if not piece.delta and piece.finish_reason is None and not self._logprobs:
                    continue
                # OpenAI's type has no null here, its streams do: null until the choice ends.
                choice = CompletionChoice.model_construct(
                    index=piece.choice, text=piece.delta.text, finish_reason=cast(FinishReason, piece.finish_reason),
                    logprobs=None if piece.token is None or not self._logprobs
                    else self._entries(piece.choice, [piece.token]))
                open_choices -= piece.finish_reason is not None
                last = not open_choices and not self._usage
                yield self._response([choice], receipt=await self._started.receipt() if last else None)
            if self._usage:
                yield self._response([], usage(self._started), receipt=await self._started.receipt())
        finally:
            await pieces.aclose()

    def _response(self, choices: Sequence[CompletionChoice], counts: CompletionUsage | None = None,
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

    def _entries(self, choice: int, tokens: Sequence[Token]) -> Logprobs:
        texts = [self._vocabulary.token_text(t.token_id) for t in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(text)
        return Logprobs(
            tokens=texts, token_logprobs=[t.logprob or 0.0 for t in tokens], text_offset=offsets,
            top_logprobs=[{self._vocabulary.token_text(i): p for i, p in t.top_logprobs} for t in tokens])

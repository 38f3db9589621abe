"""`POST /v1/chat/completions`."""

import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat import chat_completion as whole_types
from openai.types.chat import chat_completion_chunk as chunk_types
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from server.api.openai.streaming import stream, while_connected
from server.api.route import StrictRoute
from server.engines.base import FinishReason, Token
from server.http.answers import JsonAnswer
from server.requests.admission.caller import Caller, caller_of
from server.requests.generate import Piece
from server.requests.receipt import Receipt
from server.requests.schema import ChatRequest, size_of
from server.requests.service import Started, plan_for, start
from server.requests.state import ServerState, State
from server.requests.told import told_ahead, told_of
from server.text.vocabulary import Vocabulary

router = APIRouter(tags=["completions"], route_class=StrictRoute)


class SteeredChatCompletion(ChatCompletion):
    """OpenAI's response with the receipt."""

    steering: Receipt


class SteeredChatChunk(ChatCompletionChunk):
    """OpenAI's chunk; the last one of a stream carries the receipt."""

    steering: Receipt | None = None


@router.post("/v1/chat/completions", response_model=SteeredChatCompletion)
async def create_chat_completion(body: ChatRequest, request: Request, state: State) -> Response:
    """Chat, steered as `steering` says."""
    caller = caller_of(request, state.settings, body.timeout_s)
    with state.queue.entering(caller.client):
        async with caller.deadline.held():
            started = await _start(body, request.state.request_id, state, caller)
    answer = _Answer(started, state.vocabulary, body, f"chatcmpl-{request.state.request_id.removeprefix('req-')}")
    if body.stream:
        return await stream(answer.chunks(), request, told_ahead(started.plan))
    pieces = started.run.pieces()
    completion = await while_connected(request, answer.whole(pieces), pieces)
    return await state.pools.complete(lambda: JsonAnswer(completion.model_dump(mode="json", exclude_unset=True),
                                                         headers=told_of(completion.steering)))


async def _start(body: ChatRequest, request_id: str, state: ServerState, caller: Caller) -> Started:
    _, plan = await plan_for(body, state)
    messages = [message.as_template() for message in body.messages]
    prompt = await state.texts.run(
        lambda: state.chat_prompts.prompt(messages, roles=plan.names_roles,
                                          at_most=state.engine.max_sequence_tokens - 1),
        sum(map(size_of, messages)))
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return await start(body, state, plan, [prompt], request_id=request_id, max_tokens=body.max_completion_tokens
                       or body.max_tokens, max_tokens_field=field, prompt_field="messages",
                       logprobs=(body.top_logprobs or 0) if body.logprobs else None, caller=caller)


class _Answer:
    """Builds the response from the pieces of the run, whole or in chunks."""

    def __init__(self, started: Started, vocabulary: Vocabulary, body: ChatRequest, completion_id: str) -> None:
        self._started = started
        self._vocabulary = vocabulary
        self._logprobs = body.logprobs
        self._usage = body.stream_options is not None and body.stream_options.include_usage
        self._running = self._usage and body.stream_options is not None and body.stream_options.continuous_usage_stats
        self._id = completion_id
        self._created = int(time.time())

    async def whole(self, pieces: AsyncIterator[Piece]) -> SteeredChatCompletion:
        texts = ["" for _ in self._started.run.choices]
        tokens: list[list[Token]] = [[] for _ in texts]
        reasons: dict[int, FinishReason] = {}
        async for piece in pieces:
            texts[piece.choice] += piece.text
            if piece.token is not None:
                tokens[piece.choice].append(piece.token)
            if piece.finish_reason is not None:
                reasons[piece.choice] = piece.finish_reason
        # In a thread, as with log-probabilities there may be hundreds of thousands of entries.
        choices = await self._started.state.pools.complete(lambda: [
            whole_types.Choice(
                index=i, finish_reason=reasons[i],
                message=ChatCompletionMessage(role="assistant", content=text, refusal=None),
                logprobs=whole_types.ChoiceLogprobs(content=self._entries(tokens[i]), refusal=None)
                if self._logprobs else None)
            for i, text in enumerate(texts)])
        return SteeredChatCompletion(id=self._id, choices=choices, created=self._created, model=self._started.model,
                                     object="chat.completion", usage=self._counts(),
                                     steering=await self._started.receipt())

    async def chunks(self) -> AsyncIterator[SteeredChatChunk]:
        pieces = self._started.run.pieces()
        try:
            open_choices = len(self._started.run.choices)
            opened: set[int] = set()
            async for piece in pieces:
                delta = chunk_types.ChoiceDelta()
                if piece.choice not in opened:
                    opened.add(piece.choice)
                    delta = chunk_types.ChoiceDelta(role="assistant", content=piece.text)
                elif piece.text:
                    delta = chunk_types.ChoiceDelta(content=piece.text)
                elif piece.finish_reason is None and not self._logprobs:
                    continue
                chunk = self._chunk([self._choice(piece, delta)])
                open_choices -= piece.finish_reason is not None
                if not open_choices and not self._usage:
                    chunk.steering = await self._started.receipt()
                yield chunk
            if self._usage:
                last = self._chunk([])
                last.usage = self._counts()
                last.steering = await self._started.receipt()
                yield last
        finally:
            await pieces.aclose()

    def _choice(self, piece: Piece, delta: chunk_types.ChoiceDelta) -> chunk_types.Choice:
        entries = None if piece.token is None or not self._logprobs else self._entries([piece.token])
        return chunk_types.Choice(
            index=piece.choice, delta=delta, finish_reason=piece.finish_reason,
            logprobs=None if entries is None else chunk_types.ChoiceLogprobs(content=entries, refusal=None))

    def _chunk(self, choices: list[chunk_types.Choice]) -> SteeredChatChunk:
        chunk = SteeredChatChunk(id=self._id, choices=choices, created=self._created, model=self._started.model,
                                 object="chat.completion.chunk")
        if self._usage:
            chunk.usage = self._counts() if self._running else None
        return chunk

    def _entries(self, tokens: list[Token]) -> list[ChatCompletionTokenLogprob]:
        return [ChatCompletionTokenLogprob(
            token=self._vocabulary.token_text(t.token_id), bytes=self._vocabulary.token_bytes(t.token_id),
            logprob=t.logprob or 0.0,
            top_logprobs=[TopLogprob(token=self._vocabulary.token_text(i), bytes=self._vocabulary.token_bytes(i),
                                     logprob=p) for i, p in t.top_logprobs]) for t in tokens]

    def _counts(self) -> CompletionUsage:
        return usage(self._started)


def usage(started: Started) -> CompletionUsage:
    prompt, generated = started.run.prompt_tokens, started.run.completion_tokens
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)

"""`POST /v1/chat/completions`."""

import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
)
from openai.types.chat import chat_completion as whole_types
from openai.types.chat import chat_completion_chunk as chunk_types
from openai.types.chat.chat_completion_message_function_tool_call import Function
from pydantic import Field

from server.api.openai.logprobs import entries
from server.api.openai.streaming import stream, while_connected
from server.api.openai.usage import usage
from server.api.route import StrictRoute
from server.engines.data import Token
from server.errors import UnsupportedParameter
from server.http.answers import JsonAnswer
from server.requests.admission.caller import Caller, caller_of
from server.requests.form import chat_form, offered_tools, template_variables
from server.requests.generate import Piece
from server.requests.receipt import Receipt
from server.requests.schema import ChatRequest, size_of
from server.requests.service import Started, plan_for, start
from server.requests.state import ServerState, State
from server.requests.told import told_ahead, told_of
from server.text.message import CallDelta, Delta, FinishReason, Message
from server.text.prompts import Manner, Prompt
from server.text.vocabulary import Vocabulary

router = APIRouter(tags=["completions"], route_class=StrictRoute)


class AssistantMessage(ChatCompletionMessage):
    """OpenAI's message with what the model thought before it answered."""

    reasoning: str | None = Field(default=None, description="What the model thought, where it marks that as such.")


class AssistantDelta(chunk_types.ChoiceDelta):
    """OpenAI's delta with the next piece of what the model thinks."""

    reasoning: str | None = None


class ChatChoice(whole_types.Choice):
    message: AssistantMessage
    token_ids: list[int] | None = Field(default=None, description="If return_token_ids asks for them.")


class ChatChunkChoice(chunk_types.Choice):
    delta: AssistantDelta
    token_ids: list[int] | None = Field(default=None, description="Of this chunk, if return_token_ids asks for them.")


class SteeredChatCompletion(ChatCompletion):
    """OpenAI's response with the receipt."""

    choices: list[ChatChoice]  # type: ignore[assignment]
    steering: Receipt
    prompt_token_ids: list[int] | None = Field(default=None, description="If return_token_ids asks for them.")


class SteeredChatChunk(ChatCompletionChunk):
    """OpenAI's chunk; the last one of a stream carries the receipt."""

    choices: list[ChatChunkChoice]  # type: ignore[assignment]
    steering: Receipt | None = None
    prompt_token_ids: list[int] | None = Field(default=None, description="In the first chunk, if return_token_ids asks "
                                               "for them.")


@router.post("/v1/chat/completions", response_model=SteeredChatCompletion)
async def create_chat_completion(body: ChatRequest, request: Request, state: State) -> Response:
    """Chat, steered as `steering` says."""
    caller = caller_of(request, state.settings, body.timeout_s)
    with state.queue.entering(caller.client):
        async with caller.deadline.held():
            started = await start_chat(body, request.state.request_id, state, caller)
    answer = _Answer(started, state.vocabulary, body,
                     f"chatcmpl-{request.state.request_id.removeprefix('req-')}")
    if body.stream:
        return await stream(answer.chunks(), request, told_ahead(started.plan))
    pieces = started.run.pieces()
    completion = await while_connected(request, answer.whole(pieces), pieces.aclose)
    return await state.pools.complete(lambda: JsonAnswer(completion.model_dump(mode="json", exclude_unset=True),
                                                         headers=told_of(completion.steering)))


async def start_chat(body: ChatRequest, request_id: str, state: ServerState, caller: Caller) -> Started:
    """Begin a chat, in whatever API it was asked for."""
    _, plan = await plan_for(body, state, caller)
    prompt = await chat_prompt(body, state, roles=plan.names_roles)
    form = await state.pools.complete(lambda: chat_form(body, state, prompt.opening))
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return await start(body, state, plan, [prompt], request_id=request_id, max_tokens=body.max_completion_tokens
                       or body.max_tokens, max_tokens_field=field, prompt_field="messages",
                       logprobs=(body.top_logprobs or 0) if body.logprobs else None, form=form, caller=caller)


async def chat_prompt(body: ChatRequest, state: ServerState, *, roles: bool) -> Prompt:
    """The tokens of a chat, with `roles` where a scope names them."""
    messages = [message.as_template() for message in body.messages]
    tools = offered_tools(body)
    if tools and state.dialect.tools is None:
        raise UnsupportedParameter("the form in which this model writes tool calls is not known", param="tools",
                                   fix="Leave tools out, or name the form in the setting tool_parser.")
    manner = Manner([tool.as_template() for tool in tools], template_variables(body, state.dialect),
                    opens=body.add_generation_prompt is not False, continues=body.continue_final_message,
                    thoughtful=state.dialect.thought is not None)
    return await state.texts.run(
        lambda: state.chat_prompts.prompt(messages, roles=roles, manner=manner,
                                          at_most=state.engine.max_sequence_tokens),
        sum(map(size_of, [*messages, *manner.tools])))


class _Answer:
    """Builds the response from the pieces of the run, whole or in chunks."""

    def __init__(self, started: Started, vocabulary: Vocabulary, body: ChatRequest, completion_id: str) -> None:
        self._started = started
        self._vocabulary = vocabulary
        self._logprobs, self._token_ids = body.logprobs, body.return_token_ids
        self._usage = body.stream_options is not None and body.stream_options.include_usage
        self._running = self._usage and body.stream_options is not None and body.stream_options.continuous_usage_stats
        self._id = completion_id
        self._created = int(time.time())
        self._fingerprint = started.plan.system

    async def whole(self, pieces: AsyncIterator[Piece]) -> SteeredChatCompletion:
        messages = [Message() for _ in self._started.run.choices]
        tokens: list[list[Token]] = [[] for _ in messages]
        async for piece in pieces:
            messages[piece.choice].add(piece.delta, piece.finish_reason)
            if piece.token is not None:
                tokens[piece.choice].append(piece.token)
        # In a thread, as with log-probabilities there may be hundreds of thousands of entries.
        choices = await self._started.state.pools.complete(lambda: [
            ChatChoice(index=i, finish_reason=_finished(message), message=_told(message),
                       logprobs=whole_types.ChoiceLogprobs(content=entries(self._vocabulary, tokens[i]), refusal=None)
                       if self._logprobs else None)
            for i, message in enumerate(messages)])
        completion = SteeredChatCompletion(
            id=self._id, choices=choices, created=self._created, model=self._started.model, object="chat.completion",
            usage=usage(self._started), system_fingerprint=self._fingerprint, steering=await self._started.receipt())
        if self._token_ids:
            completion.prompt_token_ids = self._started.run.prompts[0].token_ids
            for choice, ours in zip(choices, self._started.run.choices, strict=True):
                choice.token_ids = ours.token_ids
        return completion

    async def chunks(self) -> AsyncIterator[SteeredChatChunk]:
        pieces = self._started.run.pieces()
        try:
            open_choices = len(self._started.run.choices)
            opened: set[int] = set()
            async for piece in pieces:
                first = piece.choice not in opened
                told = self._logprobs or self._token_ids
                if not first and not piece.delta and piece.finish_reason is None and not told:
                    continue
                chunk = self._chunk([self._choice(piece, _delta(piece.delta, first=first))])
                if self._token_ids and not opened:
                    chunk.prompt_token_ids = self._started.run.prompts[0].token_ids
                opened.add(piece.choice)
                open_choices -= piece.finish_reason is not None
                if not open_choices and not self._usage:
                    chunk.steering = await self._started.receipt()
                yield chunk
            if self._usage:
                last = self._chunk([])
                last.usage = usage(self._started)
                last.steering = await self._started.receipt()
                yield last
        finally:
            await pieces.aclose()

    def _choice(self, piece: Piece, delta: AssistantDelta) -> ChatChunkChoice:
        told = None if piece.token is None or not self._logprobs else entries(self._vocabulary, [piece.token])
        choice = ChatChunkChoice(
            index=piece.choice, delta=delta, finish_reason=piece.finish_reason,
            logprobs=None if told is None else chunk_types.ChoiceLogprobs(content=told, refusal=None))
        if self._token_ids and piece.token is not None:
            choice.token_ids = [piece.token.token_id]
        return choice

    def _chunk(self, choices: list[ChatChunkChoice]) -> SteeredChatChunk:
        chunk = SteeredChatChunk(id=self._id, choices=choices, created=self._created, model=self._started.model,
                                 object="chat.completion.chunk", system_fingerprint=self._fingerprint)
        if self._usage:
            chunk.usage = usage(self._started) if self._running else None
        return chunk



def _told(message: Message) -> AssistantMessage:
    """As OpenAI writes it: a field that has nothing to say is left out, and a message that only calls tools has no
    content."""
    told = AssistantMessage(role="assistant", refusal=None,
                            content=None if message.calls and not message.text else message.text)
    if message.reasoning:
        told.reasoning = message.reasoning
    if message.calls:
        told.tool_calls = [ChatCompletionMessageFunctionToolCall(
            id=call.id, type="function", function=Function(name=call.name, arguments=call.arguments))
            for call in message.calls]
    return told


def _finished(message: Message) -> FinishReason:
    if message.finish_reason is None:
        raise RuntimeError("the run ended before this choice did")
    return message.finish_reason


def _delta(given: Delta, *, first: bool) -> AssistantDelta:
    found = AssistantDelta(role="assistant", content=given.text) if first else AssistantDelta()
    if given.text:
        found.content = given.text
    if given.reasoning:
        found.reasoning = given.reasoning
    if given.calls:
        found.tool_calls = [_call(part) for part in given.calls]
    return found


def _call(part: CallDelta) -> chunk_types.ChoiceDeltaToolCall:
    function = chunk_types.ChoiceDeltaToolCallFunction(arguments=part.arguments)
    if part.name is None:
        return chunk_types.ChoiceDeltaToolCall(index=part.index, function=function)
    function.name = part.name
    return chunk_types.ChoiceDeltaToolCall(index=part.index, id=part.id, type="function", function=function)

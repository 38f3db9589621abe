"""Bodies of the completion requests."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.requests.fields import (
    CompletionFields,
    Lenient,
    Note,
    Nothing,
    OnlyFalse,
    ResponseFormat,
    Unsupported,
    only,
)
from server.requests.tools import Effort, ToolChoice, ToolName, Tools

# Templates write ids as they are: nothing in them can end a turn.
Word = ToolName


class TextPart(Lenient):
    type: Annotated[Literal["text"], only("text")]
    text: str
    cache_control: dict[str, Any] | None = Field(default=None, description="Accepted, not used: prefixes are kept "
                                                 "anyway.")


class CalledFunction(Lenient):
    name: Word
    arguments: str = Field(description="JSON as the model wrote it.")


class ToolCall(Lenient):
    """A call that the assistant made in an earlier turn."""

    id: Word | None = None
    type: Annotated[Literal["function"], only("function")] = "function"
    function: CalledFunction
    index: int | None = Field(default=None, description="Accepted, not used.")

    def as_template(self) -> dict[str, Any]:
        """Arguments as an object where they are one, which is what chat templates expect."""
        try:
            arguments = json.loads(self.function.arguments)
        except ValueError:
            arguments = self.function.arguments
        if not isinstance(arguments, dict):
            arguments = self.function.arguments
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class Message(Lenient):
    """One turn, as clients write it or replay it from an answer. A developer message is a system message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    name: Word | None = Field(default=None, description="Handed to the chat template.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] = Field(
        default=[], description="Of an earlier answer; handed to the chat template.")
    tool_call_id: Word | None = Field(default=None, description="Of a message with role tool: the call it answers.")
    reasoning: str | None = Field(default=None, description="Of an earlier answer; handed to the chat template, which "
                                  "may leave it out.")
    reasoning_content: str | None = Field(default=None, description="Another name of reasoning.")
    id: Note | None = Field(default=None, description="Accepted, not used.")
    annotations: Nothing = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _content_beside_calls(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("tool_calls") and given.get("content") is None:
            return {**given, "content": ""}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only the assistant has tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError("tool_call_id", "a message with role tool has a tool_call_id, and no "
                                      "other has one")
        return self

    def as_template(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        thought = self.reasoning if self.reasoning is not None else self.reasoning_content
        given = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": thought,
                 "tool_calls": [call.as_template() for call in self.tool_calls]}
        return {**found, **{name: value for name, value in given.items() if value}}


def size_of(message: Mapping[str, Any]) -> int:
    """Characters that a template may write of a message."""
    return sum(len(value) if isinstance(value, str) else len(json.dumps(value)) for value in message.values())


class ChatRequest(CompletionFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(default=None, ge=1, description="Former name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Default: what the context leaves.")
    logprobs: bool = Field(default=False, description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives per token; with logprobs.")

    response_format: ResponseFormat | None = Field(default=None, description="text, or JSON.")
    modalities: Annotated[list[str] | None, Field(max_length=1), only(["text"])] = None
    tools: Tools = Field(default=[], description="Functions that the model may call, where its chat template can "
                         "offer them.")
    tool_choice: ToolChoice | None = Field(default=None, description="auto: the model decides; none: the tools are not "
                                           "told to it; required: it calls one and more; or the one that must be "
                                           "called. Default: auto where there are tools.")
    service_tier: Annotated[str | None, only("auto", "default")] = None
    store: bool | None = Field(default=None, description="Accepted, not used: nothing is stored.")
    metadata: Annotated[dict[str, str] | None, Field(max_length=16)] = Field(default=None, description="Not used.")
    parallel_tool_calls: bool = Field(default=True, description="Whether tool_choice required may give several calls "
                                      "at once. Where the model decides by itself, false holds it to one.")
    prompt_cache_key: Note | None = Field(default=None, description="Accepted, not used.")
    prompt_cache_retention: Note | None = Field(default=None, description="Accepted, not used.")
    safety_identifier: Note | None = Field(default=None, description="Accepted, not used.")
    functions: Nothing = None
    function_call: Annotated[str | None, only("none", "auto")] = None
    add_generation_prompt: bool | None = Field(default=None, description="Whether the template opens a turn for the "
                                               "assistant. Default: true, except where the last message is "
                                               "continued.")
    continue_final_message: bool = Field(default=False, description="The completion goes on with the last message, "
                                         "which the assistant has begun.")
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] = Field(
        default={}, description="Variables for the chat template, enable_thinking for example. One that it does not "
        "know is refused.")
    documents: Nothing = None
    echo: OnlyFalse = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Effort | None = Field(default=None, description="Handed to a chat template that knows it. Where "
                                            "one knows enable_thinking alone, none turns it off and all else on.")
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    moderation: Unsupported = None
    prompt_cache_options: Unsupported = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("needs_logprobs", "top_logprobs needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("two_limits", "max_tokens and max_completion_tokens differ; give one of them")
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError("two_turns", "the last message is continued, or a new turn is opened; not both")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise PydanticCustomError("no_turn", "continue_final_message needs a last message of the assistant")
        return self


def _whole_numbers(value: Any) -> Any:
    # bool is a kind of int in Python, not in JSON.
    if isinstance(value, list) and bool in set(map(type, value)):
        raise PydanticCustomError("token_id", "token ids are whole numbers")
    return value


# Long lists end at their first fault: a complaint for each item of a million takes a second and a gigabyte.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True),
                     BeforeValidator(_whole_numbers)]


class CompletionRequest(CompletionFields):
    prompt: str | Annotated[list[str], Field(min_length=1, fail_fast=True)] | TokenIds | Annotated[
        list[TokenIds], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(default=16, ge=0, description="Tokens per completion; null: 16. 0: none, for "
                                   "log-probabilities of the prompt alone.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives per token.")
    echo: bool = Field(default=False, description="Give the prompt back in front of each completion, with logprobs its "
                       "log-probabilities too; the first token has none, as nothing predicts it.")
    prompt_logprobs: int | None = Field(  # type: ignore[assignment]
        default=None, ge=0, le=20, description="Alternatives per token of the prompt, told apart by token id as vLLM "
        "does. Not with stream.")

    best_of: Annotated[int | None, only(1)] = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _scores_come_whole(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError("whole", "prompt_logprobs does not go with stream; use echo and logprobs")
        return self

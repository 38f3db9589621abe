"""Bodies of the completion requests."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.requests.fields import CompletionFields, Note, OnlyFalse, ResponseFormat, Unsupported, only


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Annotated[Literal["text"], only("text")]
    text: str


class Message(BaseModel):
    """One turn. A developer message is a system message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    name: Unsupported = None
    refusal: Unsupported = None
    audio: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None

    def as_template(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(CompletionFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(default=None, ge=1, description="Former name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="Default: what the context leaves.")
    logprobs: bool = Field(default=False, description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives per token; with logprobs.")

    response_format: ResponseFormat | None = Field(default=None, description="text, or JSON where the engine can.")
    modalities: Annotated[list[str] | None, Field(max_length=1), only(["text"])] = None
    tool_choice: Annotated[str | None, only("none")] = None
    service_tier: Annotated[str | None, only("auto", "default")] = None
    store: OnlyFalse = None
    metadata: Annotated[dict[str, str] | None, Field(max_length=16)] = Field(default=None, description="Not used.")
    parallel_tool_calls: bool | None = Field(default=None, description="Accepted: there are no tools.")
    prompt_cache_key: Note | None = Field(default=None, description="Accepted, not used.")
    prompt_cache_retention: Note | None = Field(default=None, description="Accepted, not used.")
    safety_identifier: Note | None = Field(default=None, description="Accepted, not used.")
    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
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
    max_tokens: int | None = Field(default=16, ge=1, description="Tokens per completion; null: 16.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives per token.")

    echo: OnlyFalse = None
    best_of: Annotated[int | None, only(1)] = None
    suffix: Unsupported = None

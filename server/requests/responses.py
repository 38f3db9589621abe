"""Bodies of `/v1/responses`, and what they say as a chat."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from server.requests.fields import JsonSchema, Lenient, Note, OnlyFalse, Timeout, Unsupported, only
from server.requests.schema import TextPart, Word
from steering.language.spec import Steering

_PARTS = {"input_text", "output_text", "summary_text", "reasoning_text", "text"}


def _text_part(given: Any) -> Any:
    """Parts of text have several names here; what else they may carry is of answers and means nothing to a model."""
    if isinstance(given, dict) and given.get("type") in _PARTS:
        return {"type": "text", "text": given.get("text")}
    return given


Parts = Annotated[list[Annotated[TextPart, BeforeValidator(_text_part)]], Field(max_length=1024)]


class InputMessage(Lenient):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: Note | None = Field(default=None, description="Accepted, not used.")
    status: Note | None = Field(default=None, description="Accepted, not used.")
    phase: Note | None = Field(default=None, description="Accepted, not used.")


class InputCall(Lenient):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: Word
    name: Word
    arguments: str
    id: Note | None = Field(default=None, description="Accepted, not used.")
    status: Note | None = Field(default=None, description="Accepted, not used.")
    namespace: Unsupported = None


class InputCallOutput(Lenient):
    type: Literal["function_call_output"]
    call_id: Word
    output: str | Parts
    id: Note | None = Field(default=None, description="Accepted, not used.")
    status: Note | None = Field(default=None, description="Accepted, not used.")


class InputReasoning(Lenient):
    """What the model thought in an earlier answer."""

    type: Literal["reasoning"]
    content: Parts = []
    summary: Parts = []
    id: Note | None = Field(default=None, description="Accepted, not used.")
    status: Note | None = Field(default=None, description="Accepted, not used.")
    encrypted_content: Unsupported = None


Item = InputMessage | InputCall | InputCallOutput | InputReasoning


class TextFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(default=None, max_length=64)
    description: Note | None = None
    content: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def as_chat(self) -> dict[str, Any] | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "json_object"}
        schema = JsonSchema(name=self.name or "answer", content=self.content, strict=self.strict)
        return {"type": "json_schema", "json_schema": schema.model_dump(by_alias=True, exclude_none=True)}


class TextOptions(Lenient):
    format: TextFormat = TextFormat()
    verbosity: Annotated[str | None, only("medium")] = None


class ReasoningOptions(Lenient):
    effort: str | None = Field(default=None, max_length=16, description="As reasoning_effort of a chat.")
    summary: Annotated[str | None, only("auto")] = None
    generate_summary: Unsupported = None


class ResponsesRequest(Lenient):
    """OpenAI's request with `steering`."""

    model: str = Field(min_length=1, max_length=256, description="Base model, or base:preset.")
    input: str | Annotated[list[Item], Field(min_length=1, max_length=4096)]
    instructions: str | None = Field(default=None, description="A system message in front; not kept for later turns.")
    previous_response_id: Word | None = Field(default=None, description="A stored response that this one goes on from.")
    store: bool = Field(default=True, description="Keep the response, for responses_kept_s, to go on from it.")
    stream: bool = False
    stream_options: dict[str, Any] | None = Field(default=None, max_length=4, description="Accepted, not used.")
    steering: Steering = Field(default=Steering(), description="What to do to the model for this request.")
    max_output_tokens: int | None = Field(default=None, ge=1, description="Default: what the context leaves.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="The same seed, the same text.")
    timeout_s: Timeout | None = Field(default=None, description="As of a chat.")
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] = {}
    truncation: Annotated[str | None, only("disabled")] = None
    background: OnlyFalse = None
    include: Annotated[list[str] | None, Field(max_length=16), only([], ["reasoning.encrypted_content"])] = Field(
        default=None, description="Nothing is encrypted here, so nothing is included.")
    service_tier: Annotated[str | None, only("auto", "default")] = None
    user: Note | None = Field(default=None, description="As of a chat.")
    prompt_cache_key: Note | None = Field(default=None, description="Accepted, not used.")
    prompt_cache_retention: Note | None = Field(default=None, description="Accepted, not used.")
    safety_identifier: Note | None = Field(default=None, description="Accepted, not used.")
    max_tool_calls: int | None = Field(default=None, ge=1, description="Accepted: no tool is called here.")
    top_logprobs: Annotated[int | None, only(0)] = None
    conversation: Unsupported = None
    prompt: Unsupported = None

    def said(self) -> list[dict[str, Any]]:
        """The input as messages of a chat."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return list(_messages(self.input))

    def as_chat(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A chat request with these messages. What it does not take is refused there, by a field of the same name."""
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        found = {"model": self.model, "messages": [*first, *messages], "max_completion_tokens": self.max_output_tokens,
                 "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "timeout_s": self.timeout_s,
                 "response_format": self.text.format.as_chat(), "tools": [_chat_tool(tool) for tool in self.tools],
                 "tool_choice": _chat_choice(self.tool_choice), "parallel_tool_calls": self.parallel_tool_calls,
                 "reasoning_effort": None if self.reasoning is None else self.reasoning.effort}
        return {name: value for name, value in found.items() if value is not None and value != []}


def _messages(items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """Reasoning, text and calls that follow each other are one turn of the assistant, as they were when it was made."""
    turn: dict[str, Any] | None = None
    for item in items:
        if isinstance(item, InputReasoning | InputCall) or getattr(item, "role", None) == "assistant":
            if turn is not None and (isinstance(item, InputReasoning) or (
                    isinstance(item, InputMessage) and (turn["content"] or turn["tool_calls"]))):
                yield turn
                turn = None
            turn = turn or {"role": "assistant", "content": "", "reasoning": None, "tool_calls": []}
            if isinstance(item, InputReasoning):
                turn["reasoning"] = _joined(item.content or item.summary) or None
            elif isinstance(item, InputCall):
                turn["tool_calls"].append({"id": item.call_id, "type": "function", "function": {
                    "name": item.name, "arguments": item.arguments}})
            elif isinstance(item, InputMessage):
                turn["content"] = _joined(item.content)
            continue
        if turn is not None:
            yield turn
            turn = None
        if isinstance(item, InputCallOutput):
            yield {"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)}
        else:
            yield {"role": item.role, "content": _joined(item.content)}
    if turn is not None:
        yield turn


def _joined(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function has its fields beside its type here, and one level below in a chat."""
    if tool.get("type") != "function":
        return dict(tool)
    return {"type": "function", "function": {name: value for name, value in tool.items()
                                             if name != "type" and value is not None}}


def _chat_choice(choice: str | Mapping[str, Any] | None) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice

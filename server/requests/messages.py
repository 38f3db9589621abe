"""Bodies of `/v1/messages`, Anthropic's API, and what they say as a chat."""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from server.requests.fields import Lenient, Note, Nothing, Timeout, Unsupported, only
from server.requests.schema import TextPart, Word
from steering.language.spec import Steering

Cache = dict[str, Any]


class TextBlock(TextPart):
    citations: Nothing = None


class ToolUse(Lenient):
    type: Literal["tool_use"]
    id: Word
    name: Word
    input: dict[str, Any]
    cache_control: Cache | None = Field(default=None, description="Accepted, not used.")
    caller: dict[str, Any] | None = Field(default=None, description="Accepted, not used.")


class ToolResult(Lenient):
    type: Literal["tool_result"]
    tool_use_id: Word
    content: str | Annotated[list[TextBlock], Field(max_length=1024)] = ""
    is_error: bool = Field(default=False, description="Accepted: the content says so itself.")
    cache_control: Cache | None = Field(default=None, description="Accepted, not used.")


class Thinking(Lenient):
    type: Literal["thinking"]
    thinking: str
    signature: str = Field(default="", description="Accepted, not used.")


Block = TextBlock | ToolUse | ToolResult | Thinking


class Turn(Lenient):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(min_length=1, max_length=4096)]


class Tool(Lenient):
    type: Annotated[str | None, only("custom")] = None
    name: Word
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Cache | None = Field(default=None, description="Accepted, not used.")


class ToolChoice(Lenient):
    type: Literal["auto", "any", "tool", "none"]
    name: Word | None = None
    disable_parallel_tool_use: bool = False


LONGEST_USER = 4096


class ThinkingOption(Lenient):
    type: Literal["disabled", "enabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1, description="Accepted, not held to.")
    display: Note | None = Field(default=None, description="Accepted, not used.")


class CountRequest(Lenient):
    """What makes up the prompt of a message."""

    model: str = Field(min_length=1, max_length=256, description="Base model, or base:preset.")
    messages: Annotated[list[Turn], Field(min_length=1, max_length=4096)]
    system: str | Annotated[list[TextBlock], Field(max_length=1024)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOption | None = None
    cache_control: Cache | None = Field(default=None, description="Accepted, not used.")

    def as_chat(self) -> dict[str, Any]:
        """A chat request. What it does not take is refused there, by a field of the same name."""
        system = [] if not self.system else [{"role": "system", "content": _text(self.system)}]
        found: dict[str, Any] = {"model": self.model, "messages": [*system, *self._messages()]}
        if self.tools:
            found["tools"] = [{"type": "function", "function": {
                "name": tool.name, "parameters": tool.input_schema,
                **({} if tool.description is None else {"description": tool.description}),
                **({} if tool.strict is None else {"strict": tool.strict})}} for tool in self.tools]
        if self.tool_choice is not None:
            found["tool_choice"] = {"auto": "auto", "none": "none", "any": "required", "tool": {
                "type": "function", "function": {"name": self.tool_choice.name}}}[self.tool_choice.type]
            if self.tool_choice.disable_parallel_tool_use:
                found["parallel_tool_calls"] = False
        if self.thinking is not None and self.thinking.type == "disabled":
            found["reasoning_effort"] = "none"
        if self.messages[-1].role == "assistant":
            # The answer begins with what is there already.
            found |= {"continue_final_message": True, "add_generation_prompt": False}
        return found

    def _messages(self) -> Iterator[dict[str, Any]]:
        for turn in self.messages:
            blocks = [TextBlock(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
            results = [block for block in blocks if isinstance(block, ToolResult)]
            for result in results:
                yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": _text(result.content)}
            text = "".join(block.text for block in blocks if isinstance(block, TextBlock))
            calls = [{"id": block.id, "type": "function", "function": {
                "name": block.name, "arguments": json.dumps(block.input)}}
                for block in blocks if isinstance(block, ToolUse)]
            thought = "".join(block.thinking for block in blocks if isinstance(block, Thinking))
            if text or calls or not results:
                said: dict[str, Any] = {"role": turn.role, "content": text}
                yield said | ({"tool_calls": calls} if calls else {}) | ({"reasoning": thought} if thought else {})


class MessagesRequest(CountRequest):
    """Anthropic's request with `steering`."""

    max_tokens: int = Field(ge=1, description="Tokens of the answer.")
    steering: Steering = Field(default=Steering(), description="What to do to the model for this request.")
    stream: bool = False
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=16)] = []
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**24)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="The same seed, the same text.")
    timeout_s: Timeout | None = Field(default=None, description="As of a chat.")
    metadata: dict[str, Any] | None = Field(default=None, max_length=16, description="`user_id` is the user of a chat; "
                                            "the rest is accepted and not used.")
    service_tier: Annotated[str | None, only("auto", "standard_only")] = None
    container: Unsupported = None
    mcp_servers: Nothing = None
    output_config: Unsupported = None

    def as_chat(self) -> dict[str, Any]:
        found = super().as_chat() | {
            "max_tokens": self.max_tokens, "stop": self.stop_sequences, "temperature": self.temperature,
            "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed, "timeout_s": self.timeout_s,
            "user": self._user}
        return {name: value for name, value in found.items() if value is not None and value != []}

    @property
    def _user(self) -> str | None:
        user = (self.metadata or {}).get("user_id")
        return user[:LONGEST_USER] if isinstance(user, str) else None


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)

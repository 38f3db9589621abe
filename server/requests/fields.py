"""Fields of OpenAI's API that this server takes, takes without acting on, or refuses by name."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from steering.language.fields import NullsAbsent
from steering.language.spec import Steering


class Lenient(NullsAbsent):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _refuse(value: Any) -> Any:
    if value is None:
        return None
    raise PydanticCustomError("unsupported_parameter", "this server does not offer this parameter")


def only(*accepted: Any) -> BeforeValidator:
    """Values that ask for what the server does anyway; any other would have to be ignored and is refused."""

    def check(value: Any) -> Any:
        if value is None or any(value == one and type(value) is type(one) for one in accepted):
            return value
        raise PydanticCustomError("unsupported_parameter", "this server offers only {accepted} here",
                                  {"accepted": " or ".join(json.dumps(one) for one in accepted)})

    return BeforeValidator(check)


# Logits over a smaller number leave what float32 tells apart: the draw is the likeliest token anyway.
LEAST_TEMPERATURE = 1e-5

Unsupported = Annotated[None, BeforeValidator(_refuse)]
OnlyFalse = Annotated[Literal[False] | None, only(False)]
OnlyTrue = Annotated[Literal[True] | None, only(True)]
Nothing = Annotated[list[Any] | None, Field(max_length=0), only([])]
Note = Annotated[str, Field(max_length=4096)]
TokenId = Annotated[int, Field(ge=0)]
# In less than a millisecond nothing is answered, so a smaller number is a mistake and no deadline.
Timeout = Annotated[float, Field(ge=1e-3, le=86400)]


class JsonSchema(Lenient):
    """A schema and what OpenAI's clients send along with it."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(max_length=64, description="Not used.")
    description: Note | None = Field(default=None, description="Not used.")
    content: dict[str, Any] | None = Field(default=None, alias="schema", description="JSON schema of the answer.")
    strict: bool | None = Field(default=None, description="Every schema is held to strictly.")


class ResponseFormat(Lenient):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None and self.json_schema.content is not None):
            raise PydanticCustomError("needs_schema", "json_schema with a schema belongs to type json_schema, and only "
                                      "to it")
        return self


class StructuredOutputs(Lenient):
    """What text the answer is held to, in vLLM's words: exactly one of these."""

    model_config = ConfigDict(populate_by_name=True)

    json_: dict[str, Any] | str | None = Field(default=None, alias="json", description="JSON schema, or its text.")
    regex: Annotated[str, Field(min_length=1, max_length=65_536)] | None = Field(
        default=None, description="A pattern that the whole answer matches.")
    choice: Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(
        min_length=1, max_length=1024)] | None = Field(default=None, description="One of these texts.")
    grammar: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="In EBNF, as xgrammar takes it (`root ::= ...`), or in the form of Lark.")
    json_object: bool | None = Field(default=None, description="Any JSON object.")
    structural_tag: Unsupported = None
    disable_any_whitespace: bool | None = Field(default=None, description="Accepted: JSON is written without white "
                                                "space.")
    disable_additional_properties: OnlyFalse = None
    whitespace_pattern: Unsupported = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [self.json_ is not None, self.regex is not None, self.choice is not None, self.grammar is not None,
                 bool(self.json_object)]
        if sum(given) != 1:
            raise PydanticCustomError("one_form", "give exactly one of json, regex, choice, grammar and json_object")
        return self


class StreamOptions(Lenient):
    include_usage: bool = Field(default=False, description="Send one more chunk with the usage at the end.")
    continuous_usage_stats: bool = Field(default=False, description="Send the usage so far with every chunk, too.")
    include_obfuscation: bool = Field(default=False, description="Accepted; no padding is ever added.")


def _all_of(value: Any) -> Any:
    return 0 if value == -1 and type(value) is int else value


class CompletionFields(Lenient):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=256, description="Base model, or base:preset.")
    steering: Steering = Field(default=Steering(), description="What to do to the model for this request.")
    stream: bool = Field(default=False, description="Send the completion as server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")

    n: int = Field(default=1, ge=1, description="Completions per prompt. Choice i of a seeded request has its own "
                   "seed, made from seed and i; choice 0 uses seed itself.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy, and so is everything below "
                                      f"{LEAST_TEMPERATURE:g}; default 1, or what the model's generation config says, "
                                      "which goes for the next fields, too.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus; default 1.")
    top_k: Annotated[int, BeforeValidator(_all_of)] = Field(
        default=0, ge=0, le=2**24, description="Most likely tokens to sample from; 0 or -1: all.")
    min_p: float = Field(default=0.0, ge=0, le=1, description="Least share of the top probability.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="Default 0.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="Default 0.")
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10, description="1: none.")
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024,
                                                description="Token id to bias, -100 to 100.")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="The same seed, the same text.")
    stop: Annotated[str, Field(min_length=1, max_length=1024)] | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=16)] | None = Field(
        default=None, description="Texts that end a completion; they are not part of it.")
    timeout_s: Timeout | None = Field(default=None, description="Seconds the request may take in all, less than the "
                                      "server allows; then it ends with the error request_timeout.")
    ignore_eos: bool = Field(default=False, description="Do not end at the end-of-text token.")

    user: Note | None = Field(default=None, description="Requests of one user get the same arm of a roll-out.")

    min_tokens: int = Field(default=0, ge=0, description="Tokens that come before one that ends the completion, or "
                            "the begin of a stop text, may.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] = Field(
        default=[], description="Tokens that end a completion; they are not part of it.")
    bad_words: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=64)] = Field(
        default=[], description="Texts that must not be written, at the begin of a word or inside of one, as the "
        "tokenizer cuts them.")
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=2**20)] | None = Field(
        default=None, description="No other tokens are generated.")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="What the answer is held to.")
    return_token_ids: bool = Field(default=False, description="Tell the ids of prompt and completion, as "
                                   "prompt_token_ids and token_ids.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="Cached prefixes are shared only with requests of the same salt, and "
        "of the same tenant.")

    # Fields of other servers whose given value asks for what is done anyway. Any other value would change the output.
    skip_special_tokens: OnlyTrue = None
    spaces_between_special_tokens: OnlyTrue = None
    include_stop_str_in_output: OnlyFalse = None
    detokenize: OnlyTrue = None
    return_tokens_as_token_ids: OnlyFalse = None
    prompt_logprobs: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    use_beam_search: OnlyFalse = None
    length_penalty: Annotated[float | None, only(1, 1.0)] = None
    priority: Annotated[int | None, only(0)] = None
    guided_json: Unsupported = None
    guided_regex: Unsupported = None
    guided_choice: Unsupported = None
    guided_grammar: Unsupported = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("needs_stream", "stream_options needs stream to be true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

"""`/v1/tokenize` and `/v1/detokenize`, in the form that vLLM gave them. `/tokenize` and `/detokenize` are the same."""

from collections.abc import Sequence
from typing import Annotated, Any, Self

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.route import StrictRoute
from server.errors import EmbeddingsUnsupported
from server.requests.fields import Lenient, OnlyFalse
from server.requests.model_names import parse_model
from server.requests.schema import Message, TokenIds, size_of
from server.requests.state import State
from server.text.prompts import Manner
from steering.language.errors import InvalidRequest, PayloadTooLarge

router = APIRouter(tags=["tokens"], route_class=StrictRoute)
# Texts without a space take a tokenizer seconds for a megabyte.
MOST_CHARACTERS = 2**20


class TokenizeRequest(Lenient):
    """A text, or a conversation up to where the assistant speaks."""

    model: str | None = Field(default=None, min_length=1, max_length=256, description="Base model, or base:preset.")
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = Field(default=True, description="Whether the tokenizer adds its own to a prompt, as "
                                     "/v1/completions has it. A chat template writes its own.")
    add_generation_prompt: bool = Field(default=True, description="Whether the conversation is opened for the "
                                        "assistant, as /v1/chat/completions has it.")
    continue_final_message: OnlyFalse = None
    return_token_strs: bool = Field(default=False, description="Tell the text of each token as well.")
    return_token_roles: bool = Field(default=False, description="Tell in whose turn of a conversation each token is, "
                                     "as scopes count it.")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "give either prompt or messages")
        return self


class Tokenized(BaseModel):
    count: int
    max_model_len: int = Field(description="Tokens that prompt and completion may have together on this server.")
    tokens: list[int]
    token_strs: list[str] | None = None
    token_roles: list[str] | None = Field(default=None, description="Of a conversation: system, user, ..., as "
                                          "scopes name them.")


class DetokenizeRequest(Lenient):
    model: str | None = Field(default=None, min_length=1, max_length=256, description="Base model, or base:preset.")
    tokens: TokenIds


class Detokenized(BaseModel):
    prompt: str


@router.post("/tokenize", include_in_schema=False)
@router.post("/v1/tokenize", response_model_exclude_none=True)
async def tokenize(body: TokenizeRequest, state: State) -> Tokenized:
    """The tokens that a completion request with this prompt or these messages has."""
    if body.model is not None:
        parse_model(body.model, state)
    messages = [message.as_template() for message in body.messages or ()]
    length = sum(map(size_of, messages)) + len(body.prompt or "")
    if length > MOST_CHARACTERS:
        raise PayloadTooLarge(f"the text has {length} characters, {MOST_CHARACTERS} are the most", fix="Send parts.",
                              param="prompt" if body.messages is None else "messages")

    def tokens() -> Tokenized:
        roles: Sequence[str] | None = None
        if body.prompt is not None:
            ids = state.vocabulary.encode(body.prompt, special_tokens=body.add_special_tokens)
        else:
            manner = Manner(opens=body.add_generation_prompt)
            prompt = state.chat_prompts.prompt(messages, roles=body.return_token_roles, manner=manner)
            ids, roles = prompt.token_ids, prompt.roles
        spelt = [state.vocabulary.token_text(i) for i in ids] if body.return_token_strs else None
        return Tokenized(count=len(ids), max_model_len=state.engine.max_sequence_tokens, tokens=ids, token_strs=spelt,
                         token_roles=None if roles is None else list(roles))

    return await state.texts.run(tokens, length)


@router.post("/detokenize", include_in_schema=False)
@router.post("/v1/detokenize")
async def detokenize(body: DetokenizeRequest, state: State) -> Detokenized:
    """The text of some tokens, special ones by their name."""
    if body.model is not None:
        parse_model(body.model, state)
    if len(body.tokens) > MOST_CHARACTERS:
        raise PayloadTooLarge(f"these are {len(body.tokens)} tokens, {MOST_CHARACTERS} are the most", param="tokens")
    for i, token_id in enumerate(body.tokens):
        if token_id >= state.vocabulary.vocab_size:
            raise InvalidRequest(f"there is no token {token_id}", param=("tokens", i), value=token_id,
                                 fix=f"Use 0 to {state.vocabulary.vocab_size - 1}.")
    text = await state.texts.run(lambda: state.vocabulary.decode(body.tokens, special_tokens=True), len(body.tokens))
    return Detokenized(prompt=text)


@router.post("/v1/embeddings")
async def refuse_embeddings(body: dict[str, Any]) -> None:
    """Always refused. A model that writes text was not trained to embed it: what its activations say is a matter of
    layer, token and scale, and an index made of a choice by default would be poor without an error."""
    raise EmbeddingsUnsupported("this model writes text and makes no embeddings", param="model", fix="Ask a model that "
                                "was trained for them. What a layer says is read by /v1/lens and by monitors.")

"""The model that a recipe works on: it encodes, reads activations, scores next tokens and generates, steered or not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from pydantic import BeforeValidator, Field, StringConstraints

from steering.language.errors import InvalidRequest, Path
from steering.language.fields import Model
from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.extract.plain import plain
from vectors.extract.refusals import EmptyText, FitFailed, TextTooLong

BATCH_TOKENS = 4096
BATCH_TEXTS = 64
Tokens = tuple[int, ...]


def _joined(content: Any) -> Any:
    """The text of content in parts, as OpenAI's API has it."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.keys() == {"type", "text"}
                                         and part["type"] == "text" and isinstance(part["text"], str)
                                         for part in content):
        return "".join(part["text"] for part in content)
    return content


class Turn(Model):
    """One message of a conversation."""

    role: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")] = Field(description="Who speaks.")
    content: Annotated[str, BeforeValidator(_joined)] = Field(description="What is said.")


TokenIds = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1, max_length=2**20)]
Conversation = Annotated[list[Turn], Field(min_length=1, max_length=1024)]
Prompt = str | Conversation | TokenIds
# One for all texts of a call, or one for each.
Programs = Program | None | Sequence[Program | None]


@dataclass(frozen=True)
class Written:
    """A completion. ids: its tokens, the end token among them. ended: by the model itself, not by the limit."""

    ids: Tokens
    text: str
    ended: bool


class Subject(Protocol):
    """What a recipe may ask of a model. Every call takes a batch of bounded size and may be slow."""

    @property
    def facts(self) -> ModelFacts: ...

    def encode(self, prompt: Prompt) -> Tokens:
        """Token ids as the model is given them: plain text with the tokenizer's own special tokens, a conversation
        through the chat template up to where the assistant speaks."""
        ...

    def encode_continuation(self, text: str) -> Tokens:
        """Token ids of text that follows a prompt, without special tokens."""
        ...

    def capture(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                positions: Sequence[int] | None, program: Program | None = None
                ) -> Sequence[Mapping[int, torch.Tensor]]:
        """Per text: layer -> `[num_positions, width]` float32; all positions of the text if `positions` is None. With
        a program, what is read is after its interventions."""
        ...

    def next_logprobs(self, texts: Sequence[Sequence[int]], program: Programs = None) -> torch.Tensor:
        """Log-probabilities of the token after each text, `[num_texts, vocab_size]` float32."""
        ...

    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Program | None = None) -> list[str]:
        """Greedy completions."""
        ...

    def write(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Programs = None) -> list[Written]:
        """Greedy completions with their tokens, all in one batch as far as the model has room for it."""
        ...

    def continuation_logprobs(self, texts: Sequence[Sequence[int]], starts: Sequence[int], program: Programs = None
                              ) -> list[float]:
        """Mean log-probability of the tokens from `starts[i]` on, given all before; those count as generated."""
        ...


@runtime_checkable
class WithWeights(Protocol):
    """A subject whose weights can be read."""

    def columns(self, site: Site, layer: int) -> torch.Tensor:
        """Lengths of the columns that read each channel of `mlp_act` or `head_out`, `[width]` float32 on the CPU.

        Raises:
            UnsupportedModel, UnsupportedSite.
        """
        ...


def encoded(subject: Subject, prompt: Prompt, where: Path) -> Tokens:
    """Checked token ids of a prompt.

    Raises:
        EmptyText, TextTooLong, InvalidRequest: naming `where`.
    """
    if isinstance(prompt, str) and not prompt.strip():
        raise EmptyText("the text is empty", param=where, fix="Leave it out.")
    if not isinstance(prompt, str) and any(isinstance(turn, Turn) and not turn.content.strip() for turn in prompt):
        raise EmptyText("a message is empty", param=where, fix="Leave it out.")
    ids = subject.encode(prompt)
    facts = subject.facts
    if not ids:
        raise EmptyText("the text has no token", param=where, fix="Leave it out.")
    if len(ids) > facts.context_length:
        raise TextTooLong(f"the text has {len(ids)} tokens; {facts.model_id} takes {facts.context_length}",
                          param=where, fix="Shorten it, or leave it out.")
    if max(ids) >= facts.vocab_size:
        raise InvalidRequest(f"a token id is outside the vocabulary of {facts.vocab_size}", param=where)
    return ids


def continuation_ids(encode: Callable[[str], Sequence[int]], text: str) -> Tokens:
    """Token ids of text as it follows other text, `encode` being without special tokens.

    Tokenizers of the SentencePiece kind put a space before whatever begins a text, so that " Paris" alone would begin
    with an empty word; behind a line break it does not.
    """
    lead, whole = tuple(encode("\n")), tuple(encode(f"\n{text}"))
    return whole[len(lead):] if whole[:len(lead)] == lead else tuple(encode(text))


def first_token(subject: Subject, answer: str, where: Path) -> int:
    """The first token of an answer as it follows a prompt.

    Raises:
        EmptyText: naming `where`.
    """
    ids = subject.encode_continuation(answer) if answer.strip() else ()
    if not ids:
        raise EmptyText("the answer is empty", param=where)
    return ids[0]


def batches(texts: Sequence[Sequence[int]]) -> Iterator[range]:
    """Consecutive indices of texts that fit one call. Only a batch of one text may exceed BATCH_TOKENS."""
    start, num_tokens = 0, 0
    for number, text in enumerate(texts):
        if number > start and (num_tokens + len(text) > BATCH_TOKENS or number - start == BATCH_TEXTS):
            yield range(start, number)
            start, num_tokens = number, 0
        num_tokens += len(text)
    if start < len(texts):
        yield range(start, len(texts))


def stream(subject: Subject, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
           positions: Sequence[int] | None, step: Callable[[float], None], program: Program | None = None, *,
           param: Callable[[int], Path] | None = None, without_massive: bool = False
           ) -> Iterator[tuple[int, Mapping[int, torch.Tensor]]]:
    """(number of the text, layer -> `[num_positions, width]`) one text after the other; memory holds one batch.

    step: called with the share done before each batch; it raises when the work is cancelled. param: the name, in the
    request, of a text by its number, for errors. without_massive: massive dims of the model are zero in what is given.

    Raises:
        FitFailed: the model gave an activation that is not finite.
    """
    for batch in batches(texts):
        step(batch.start / len(texts))
        for number, found in zip(batch, subject.capture([texts[n] for n in batch], site, layers, positions, program),
                                 strict=True):
            if not all(bool(torch.isfinite(h).all()) for h in found.values()):
                raise FitFailed(f"the model gave an activation at {site} that is not finite",
                                param=None if param is None else param(number),
                                fix="Load the model in float32 or bfloat16.")
            yield number, plain(found, subject.facts, site) if without_massive else found


def answer_logprobs(subject: Subject, texts: Sequence[Sequence[int]], step: Callable[[float], None],
                    program: Programs = None, *, tokens: Sequence[int] | None = None) -> torch.Tensor:
    """`next_logprobs` of any number of texts, float64; only those of `tokens`, in their order, where given."""
    parts = []
    for batch in batches(texts):
        step(batch.start / len(texts))
        own = program[batch.start:batch.stop] if isinstance(program, Sequence) else program
        found = subject.next_logprobs([texts[n] for n in batch], own).double()
        parts.append(found if tokens is None else found[:, list(tokens)])
    return torch.cat(parts)


def one_each(program: Programs, count: int) -> list[Program | None]:
    """The program of each of `count` texts."""
    return list(program) if isinstance(program, Sequence) else [program] * count

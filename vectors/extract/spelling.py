"""How well a model's tokenizer knows the words of the data: what it spells in single bytes it has hardly learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steering.language.vocabulary import Site
from steering.models.facts import ModelFacts
from steering.programs.program import Program
from vectors.extract.subject import Programs, Prompt, Subject, Tokens, Turn, Written

# Words of any language take three or more bytes a token; texts that fall back to bytes take one.
FEW_BYTES = 2.0


class SpellingSubject:
    """A `Subject` that counts the bytes and tokens of what it encodes."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._num_bytes = 0
        self._num_tokens = 0

    @property
    def uncounted(self) -> Subject:
        return self._subject

    @property
    def facts(self) -> ModelFacts:
        return self._subject.facts

    def encode(self, prompt: Prompt) -> Tokens:
        if isinstance(prompt, str):
            ids = self._subject.encode(prompt)
            self._count(prompt, ids)
            return ids
        # The markers of turns are tokens that spell no word, so that each message is counted by itself.
        for part in prompt:
            if isinstance(part, Turn):
                self._count(part.content, self._subject.encode_continuation(part.content))
        return self._subject.encode(prompt)

    def encode_continuation(self, text: str) -> Tokens:
        ids = self._subject.encode_continuation(text)
        self._count(text, ids)
        return ids

    def capture(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                positions: Sequence[int] | None, program: Program | None = None
                ) -> Sequence[Mapping[int, torch.Tensor]]:
        return self._subject.capture(texts, site, layers, positions, program)

    def next_logprobs(self, texts: Sequence[Sequence[int]], program: Programs = None) -> torch.Tensor:
        return self._subject.next_logprobs(texts, program)

    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Program | None = None) -> list[str]:
        return self._subject.generate(texts, max_tokens, program)

    def write(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Programs = None) -> list[Written]:
        return self._subject.write(texts, max_tokens, program)

    def continuation_logprobs(self, texts: Sequence[Sequence[int]], starts: Sequence[int], program: Programs = None
                              ) -> list[float]:
        return self._subject.continuation_logprobs(texts, starts, program)

    def _count(self, text: str, ids: Tokens) -> None:
        if text:
            self._num_bytes += len(text.encode())
            self._num_tokens += len(ids)

    def report(self) -> dict[str, Any]:
        return spelling_report(self._num_bytes, self._num_tokens, self.facts.model_id)


def spelling_report(num_bytes: int, num_tokens: int, model_id: str) -> dict[str, Any]:
    """Bytes per token, with a warning where they are few; empty where no text was given (token ids)."""
    if not num_bytes or not num_tokens:
        return {}
    found: dict[str, Any] = {"bytes_per_token": round(num_bytes / num_tokens, 2)}
    if num_bytes < FEW_BYTES * num_tokens:
        found["warnings"] = [f"{model_id} has no tokens for most words of this data: a token stands for "
                             f"{num_bytes / num_tokens:.1f} bytes on average, so it reads single letters that it has "
                             "hardly learned from"]
    return found

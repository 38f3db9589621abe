"""A model in this process as the subject of a recipe: no engine, no server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steering.acting.record import Record
from steering.acting.steerer import Steerer
from steering.language.errors import UnsupportedSite
from steering.language.vocabulary import Site
from steering.models.blocks import blocks_of
from steering.models.facts import ModelFacts
from steering.models.families import FAMILIES
from steering.models.readers import TRANSPOSED
from steering.models.taps import attach
from steering.programs.program import Program
from steering.residency.bank import Bank
from vectors.extract.subject import Programs, Prompt, Tokens, Turn, Written, continuation_ids, one_each

MOST_PADDING = 8

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalSubject:
    """`Subject` over a loaded Hugging Face model and its tokenizer."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", facts: ModelFacts) -> None:
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        self._facts = facts

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @property
    def model(self) -> Any:
        return self._model

    def encode(self, prompt: Prompt) -> Tokens:
        if isinstance(prompt, str):
            return tuple(self._tokenizer(prompt)["input_ids"])
        turns = [part.model_dump() for part in prompt if isinstance(part, Turn)]
        if not turns:
            return tuple(part for part in prompt if isinstance(part, int))
        text = self._tokenizer.apply_chat_template(turns, tokenize=False,
                                                   add_generation_prompt=turns[-1]["role"] != "assistant")
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_continuation(self, text: str) -> Tokens:
        return continuation_ids(lambda said: self._tokenizer(said, add_special_tokens=False)["input_ids"], text)

    def columns(self, site: Site, layer: int) -> torch.Tensor:
        family = FAMILIES[self._facts.family]
        path = family.mlp_act if site == "mlp_act" else family.head_out
        if path is None:
            raise UnsupportedSite(f"{family.name} has no one map that reads {site}", param="site")
        weight = blocks_of(self._model)[layer].get_submodule(path).get_parameter("weight").detach().float().cpu()
        lengths: torch.Tensor = torch.linalg.vector_norm(weight, dim=1 if family.name in TRANSPOSED else 0)
        return lengths

    def capture(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                positions: Sequence[int] | None, program: Program | None = None) -> list[Mapping[int, torch.Tensor]]:
        found: list[Mapping[int, torch.Tensor]] = [{} for _ in texts]
        for group in near_lengths(texts):
            held: dict[int, torch.Tensor] = {}
            with self._steered([texts[n] for n in group], program) as ids, ExitStack() as stack:
                for layer in layers:
                    stack.callback(attach(self._model, site, layer, _keeper(held, layer)).remove)
                self._model(input_ids=ids, use_cache=False, logits_to_keep=1)
            for i, n in enumerate(group):
                length = len(texts[n])
                rows = list(range(length)) if positions is None else [position % length for position in positions]
                found[n] = {layer: h.view(*ids.shape, -1)[i, rows].float().cpu() for layer, h in held.items()}
        return found

    def next_logprobs(self, texts: Sequence[Sequence[int]], program: Programs = None) -> torch.Tensor:
        return self._next(texts, list(map(len, texts)), program)

    def token_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None = None) -> list[torch.Tensor]:
        """Log-probability of each token given those before it, `[len(text) - 1]` float32 a text."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for group in near_lengths(texts):
            with self._steered([texts[n] for n in group], program) as ids:
                logits = self._model(input_ids=ids, use_cache=False).logits
            for i, n in enumerate(group):
                logprobs = logits[i, :len(texts[n]) - 1].float().log_softmax(dim=-1)
                found[n] = logprobs.gather(1, ids[i, 1:len(texts[n])].unsqueeze(1)).squeeze(1).cpu()
        return found

    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Program | None = None) -> list[str]:
        return [written.text for written in self.write(texts, max_tokens, program)]

    def continuation_logprobs(self, texts: Sequence[Sequence[int]], starts: Sequence[int], program: Programs = None
                              ) -> list[float]:
        found = [0.0] * len(texts)
        programs = one_each(program, len(texts))
        for group in near_lengths(texts):
            with self._steered([texts[n] for n in group], [programs[n] for n in group],
                               [starts[n] for n in group]) as ids:
                logits = self._model(input_ids=ids, use_cache=False).logits
            for i, n in enumerate(group):
                own = ids[i, starts[n]:len(texts[n])].unsqueeze(1)
                logprobs = logits[i, starts[n] - 1:len(texts[n]) - 1].float().log_softmax(dim=-1)
                found[n] = float(logprobs.gather(1, own).mean())
        return found

    def continuation_rows(self, text: Sequence[int], start: int, program: Program | None = None,
                          roles: Sequence[str] | None = None) -> torch.Tensor:
        """Log-probabilities of the vocabulary for each token from `start` on, `[len(text) - start, vocab_size]`."""
        with self._steered([text], program, [start], roles) as ids:
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(text) - start + 1).logits
        found: torch.Tensor = logits[0, :-1].float().log_softmax(dim=-1).cpu()
        return found

    def write(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Programs = None) -> list[Written]:
        """Without a cache, so that what is steered goes by position alone."""
        ends = {self._tokenizer.eos_token_id}
        programs = one_each(program, len(texts))
        ids = [list(text) for text in texts]
        going = list(range(len(texts)))
        for _ in range(max_tokens):
            if not going:
                break
            found = self._next([ids[n] for n in going], [len(texts[n]) for n in going],
                               [programs[n] for n in going]).argmax(dim=-1)
            chosen = dict(zip(going, found.tolist(), strict=True))
            going = [n for n, token in chosen.items() if token not in ends]
            for n, token in chosen.items():
                ids[n].append(token)
        said = [tuple(own[len(text):]) for text, own in zip(texts, ids, strict=True)]
        return [Written(own, str(self._tokenizer.decode(own, skip_special_tokens=True)), own[-1] in ends)
                for own in said]

    def _next(self, texts: Sequence[Sequence[int]], prompt_lengths: Sequence[int], program: Programs
              ) -> torch.Tensor:
        found = torch.empty(len(texts), self._facts.vocab_size)
        programs = one_each(program, len(texts))
        for group in near_lengths(texts):
            ends = sorted({len(texts[n]) - 1 for n in group})
            with self._steered([texts[n] for n in group], [programs[n] for n in group],
                               [prompt_lengths[n] for n in group]) as ids:
                logits = self._model(input_ids=ids, use_cache=False,
                                     logits_to_keep=torch.tensor(ends, device=ids.device)).logits
            for i, n in enumerate(group):
                found[n] = logits[i, ends.index(len(texts[n]) - 1)].float().log_softmax(dim=-1).cpu()
        return found

    @contextmanager
    def _steered(self, texts: Sequence[Sequence[int]], program: Programs,
                 prompt_lengths: Sequence[int] | None = None, roles: Sequence[str] | None = None
                 ) -> Iterator[torch.Tensor]:
        """Token ids `[len(texts), longest]`, padded; inside, the programs act on their pass. Tokens behind a text's
        prompt length (default: none) count as generated. roles: of the tokens of the one prompt.

        Raises:
            SteeringOverflow: an intervention made values that are not finite, and was not carried out.
        """
        device = self._model.device
        ids = padded(texts).to(device)
        programs = one_each(program, len(texts))
        record: Record | None = None
        with torch.no_grad(), ExitStack() as stack:
            if any(item is not None and item.acting for item in programs):
                bank = Bank(len(texts), device)
                steerer = Steerer(self._model, bank)
                stack.callback(steerer.detach)
                slots = np.zeros(tuple(ids.shape), np.int32)
                bits = np.zeros(tuple(ids.shape), np.uint32)
                held = {i: own for i, own in enumerate(programs) if own is not None}
                for (i, own), slot in zip(held.items(), bank.hold(list(held.values())), strict=True):
                    text = texts[i]
                    prompt = len(text) if prompt_lengths is None else prompt_lengths[i]
                    touch = own.touch(text[:prompt], len(text) - prompt, roles)
                    slots[i, :len(text)] = slot
                    bits[i, :len(text)] = touch.bits_of(text)
                record = stack.enter_context(steerer.acting(steerer.plan(slots.ravel(), bits.ravel())))
            yield ids
            if record is not None:
                record.check(programs, ids.shape[1])


def near_lengths(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices in groups of nearly equal length: little padding, and few positions whose logits are wanted."""
    groups: list[list[int]] = []
    for n in sorted(range(len(texts)), key=lambda n: len(texts[n])):
        if not groups or len(texts[n]) - len(texts[groups[-1][0]]) > MOST_PADDING:
            groups.append([])
        groups[-1].append(n)
    return groups


def padded(texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids `[len(texts), longest]`, padded on the right with token 0: no token sees what comes after it."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for i, text in enumerate(texts):
        ids[i, :len(text)] = torch.tensor(text)
    return ids


def _keeper(held: dict[int, torch.Tensor], layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(h: torch.Tensor) -> torch.Tensor:
        held[layer] = h
        return h

    return keep

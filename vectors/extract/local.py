"""A model in this process as the subject of a recipe: no engine, no server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from steering.bank import Bank
from steering.facts import ModelFacts
from steering.program import Program
from steering.scope import bits_at, touch_map
from steering.sites import attach
from steering.spec import Site
from steering.steerer import Steerer
from vectors.extract.subject import Prompt, Tokens, Turn

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
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def capture(self, texts: Sequence[Sequence[int]], site: Site, layers: Sequence[int],
                positions: Sequence[int] | None, program: Program | None = None) -> list[Mapping[int, torch.Tensor]]:
        found: list[Mapping[int, torch.Tensor]] = [{} for _ in texts]
        for group in _same_length(texts):
            held: dict[int, torch.Tensor] = {}
            with self._steered([texts[n] for n in group], program) as ids, ExitStack() as stack:
                for layer in layers:
                    stack.callback(attach(self._model, site, layer, _keeper(held, layer)).remove)
                self._model(input_ids=ids, use_cache=False, logits_to_keep=1)
            length = ids.shape[1]
            rows = list(range(length)) if positions is None else [position % length for position in positions]
            for i, n in enumerate(group):
                found[n] = {layer: h.view(len(group), length, -1)[i, rows].float().cpu() for layer, h in held.items()}
        return found

    def next_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None = None) -> torch.Tensor:
        found = torch.empty(len(texts), self._facts.vocab_size)
        for group in _same_length(texts):
            with self._steered([texts[n] for n in group], program) as ids:
                logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            found[group] = logits[:, -1].float().log_softmax(dim=-1).cpu()
        return found

    def token_logprobs(self, texts: Sequence[Sequence[int]], program: Program | None = None) -> list[torch.Tensor]:
        """Log-probability of each token given those before it, `[len(text) - 1]` float32 a text."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for group in _same_length(texts):
            with self._steered([texts[n] for n in group], program) as ids:
                logprobs = self._model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
            chosen = logprobs.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2).cpu()
            for i, n in enumerate(group):
                found[n] = chosen[i]
        return found

    def generate(self, texts: Sequence[Sequence[int]], max_tokens: int, program: Program | None = None) -> list[str]:
        """Without a cache, so that what is steered goes by position alone."""
        ends = {self._tokenizer.eos_token_id}
        said = []
        for text in texts:
            ids = list(text)
            while len(ids) < len(text) + max_tokens:
                with self._steered([ids], program, prompt_length=len(text)) as batch:
                    logits = self._model(input_ids=batch, use_cache=False, logits_to_keep=1).logits
                token = int(logits[0, -1].argmax())
                if token in ends:
                    break
                ids.append(token)
            said.append(str(self._tokenizer.decode(ids[len(text):], skip_special_tokens=True)))
        return said

    @contextmanager
    def _steered(self, texts: Sequence[Sequence[int]], program: Program | None, prompt_length: int | None = None
                 ) -> Iterator[torch.Tensor]:
        """Token ids `[len(texts), length]` of texts of one length; inside, the program acts on their pass."""
        device = self._model.device
        ids = torch.tensor([list(text) for text in texts], device=device)
        with torch.no_grad(), ExitStack() as stack:
            if program is not None and program.acting:
                bank = Bank(1, device)
                steerer = Steerer(self._model, bank)
                stack.callback(steerer.detach)
                slot = bank.acquire(program)
                prompt = ids.shape[1] if prompt_length is None else prompt_length
                bits = [bits_at(touch_map(program.scopes, text[:prompt], len(text) - prompt), program.rules,
                                np.arange(len(text)), np.asarray(text, dtype=np.int64)) for text in texts]
                plan = steerer.plan(np.full(ids.numel(), slot, np.int32), np.concatenate(bits))
                stack.enter_context(steerer.acting(plan))
            yield ids


def _same_length(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices in groups of equal length: no padding, and only the last position's logits are needed."""
    groups: dict[int, list[int]] = {}
    for n, text in enumerate(texts):
        groups.setdefault(len(text), []).append(n)
    return list(groups.values())


def _keeper(held: dict[int, torch.Tensor], layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(h: torch.Tensor) -> torch.Tensor:
        held[layer] = h
        return h

    return keep

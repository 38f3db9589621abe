"""Edits of the last token's activation by plain hooks: for controls that are no op of the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from steering.language.vocabulary import Site
from steering.models.taps import attach
from vectors.extract.local import LocalSubject, near_lengths, padded
from vectors.extract.subject import Tokens

SITE: Site = "resid_post"
Edit = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def last_logprobs(model: LocalSubject, texts: Sequence[Tokens], layer: int, edit: Edit | None) -> torch.Tensor:
    """Log-probabilities of the next token, `[n, vocab_size]` float64, with `edit [n, d] -> [n, d]` at the last tokens.
    """
    found = torch.empty(len(texts), model.facts.vocab_size, dtype=torch.float64)
    for group in near_lengths(texts):
        ids = padded([texts[n] for n in group])
        ends = torch.tensor([len(texts[n]) - 1 for n in group])
        last = torch.arange(len(group)) * ids.shape[1] + ends

        def put(h: torch.Tensor, last: torch.Tensor = last) -> torch.Tensor:
            assert edit is not None
            out = h.clone()
            out[last] = edit(h[last])
            return out

        with ExitStack() as stack:
            if edit is not None:
                stack.callback(attach(model.model, SITE, layer, put).remove)
            kept = ends.unique()
            logits = model.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
        found[group] = logits[torch.arange(len(group)), torch.searchsorted(kept, ends)].double().log_softmax(dim=-1)
    return found


@torch.no_grad()
def read_out(model: LocalSubject, h: torch.Tensor) -> torch.Tensor:
    """The logit lens: final norm and unembedding of `h [n, d]`, `[n, vocab_size]` float32."""
    logits: torch.Tensor = model.model.lm_head(model.model.model.norm(h.float()))
    return logits

"""What a request rules out of the next token: by its grammar, and by lists of tokens.

A grammar is a part of what the model is asked for, so log-probabilities are told of what it leaves; the lists act on
the choice alone. vLLM has it so.
"""

from collections.abc import Sequence
from typing import Any

import torch

from server.engines.data import Sampling
from server.engines.transformers.running import Running

NEVER = float("-inf")


def held(logits: torch.Tensor, running: Sequence[Running]) -> torch.Tensor:
    """`logits [n, vocab_size]` with minus infinity for what the grammars of their requests do not allow next."""
    rows = [i for i, item in enumerate(running) if item.matcher is not None]
    if not rows:
        return logits
    import xgrammar

    mask = xgrammar.allocate_token_bitmask(len(rows), logits.shape[-1])
    for place, i in enumerate(rows):
        running[i].matcher.fill_next_token_bitmask(mask, place)
    part = logits[rows]
    xgrammar.apply_token_bitmask_inplace(part, mask.to(part.device))
    found = logits.clone()
    found[rows] = part
    return found


def listed(scores: torch.Tensor, logits: torch.Tensor, running: Sequence[Running]) -> torch.Tensor:
    """`scores` without the tokens that lists of their requests rule out. Never writes into `logits`."""
    for i, item in enumerate(running):
        sampling = item.generation.sampling
        if not _has_lists(sampling):
            continue
        if scores is logits:
            scores = logits.clone()
        row = scores[i]
        if sampling.allowed_token_ids is not None:
            rest = torch.ones_like(row, dtype=torch.bool)
            rest[list(sampling.allowed_token_ids)] = False
            row[rest] = NEVER
        out = [word[-1] for word in sampling.bad_words if _about_to_come(word, item)]
        if len(item.drawn) < sampling.min_tokens:
            out += sampling.stop_token_ids
        if out:
            row[out] = NEVER
    return scores


def is_ruled(item: Running) -> bool:
    """Whether minus infinity for all tokens is the request's doing."""
    return item.matcher is not None or _has_lists(item.generation.sampling)


def _has_lists(sampling: Sampling) -> bool:
    return bool(sampling.allowed_token_ids is not None or sampling.bad_words or sampling.min_tokens)


def _about_to_come(word: Sequence[int], item: Running) -> bool:
    """Whether all of a forbidden sequence but its last token has just been generated."""
    before = len(word) - 1
    if before > len(item.drawn):
        return False
    return item.token_ids[len(item.token_ids) - before:] == list(word[:-1])


def follow(matcher: Any, token_ids: Sequence[int]) -> bool:
    """Move a matcher over tokens. False where it does not allow one."""
    return matcher is None or all(matcher.accept_token(token) for token in token_ids)

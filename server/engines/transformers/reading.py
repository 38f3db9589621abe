"""Activations of texts that nothing steers, from no more of a pass than they need.

What all texts begin with, the turns that a chat template puts before each of them say, is run once, and its keys and
values serve all. The pass ends behind the last site that is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from steering.language.vocabulary import Site
from steering.models.taps import attach

Key = tuple[Site, int]
# Fewer tokens than these are not worth a pass of their own.
LEAST_SHARED = 8


class _Enough(Exception):
    """All that is read has been."""


@torch.no_grad()
def read_untouched(model: Any, texts: Sequence[Sequence[int]], keys: Sequence[Key]
                   ) -> dict[Key, list[Tensor]] | None:
    """Of each site and text the activations `[len(text), width]`; None where one of them is not finite."""
    cache = DynamicCache(config=model.config)
    shared = _shared(texts) if _plain(cache) else 0
    if shared < LEAST_SHARED:
        shared = 0
    before: Mapping[Key, Tensor] = {}
    if shared:
        before = _pass(model, torch.tensor([texts[0][:shared]]), keys, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(texts))
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, :len(text)] = torch.tensor(text)
        mask[i, :len(text)] = 1
    going_on = {"past_key_values": cache, "use_cache": True} if shared else {"use_cache": False}
    behind = _pass(model, ids[:, shared:], keys, attention_mask=mask.to(model.device), **going_on)
    found: dict[Key, list[Tensor]] = {}
    for key in keys:
        rows = behind[key].view(len(texts), longest - shared, -1)
        own = [row[:len(text) - shared] for row, text in zip(rows, texts, strict=True)]
        if not all(bool(row.isfinite().all()) for row in (*own, *([before[key]] if shared else []))):
            return None
        found[key] = [torch.cat([before[key], row]) for row in own] if shared else own
    return found


def _shared(texts: Sequence[Sequence[int]]) -> int:
    """Tokens that all of several texts begin with, less than any of them has."""
    if len(texts) < 2:
        return 0
    first, last = min(map(tuple, texts)), max(map(tuple, texts))
    most = min(map(len, texts)) - 1
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b or n >= most), most)


def _plain(cache: DynamicCache) -> bool:
    """Whether every layer keeps all that went through it."""
    return not any(cache.is_sliding)


def _pass(model: Any, ids: Tensor, keys: Sequence[Key], **kwargs: Any) -> dict[Key, Tensor]:
    """The activations `[num_tokens, width]` of a pass that ends when it has them all."""
    found: dict[Key, Tensor] = {}
    with _tapped(model, keys, found), suppress(_Enough):
        model(input_ids=ids.to(model.device), logits_to_keep=1, **kwargs)
    return found


@contextmanager
def _tapped(model: Any, keys: Sequence[Key], found: dict[Key, Tensor]) -> Iterator[None]:
    def keeper(key: Key) -> Callable[[Tensor], Tensor]:
        def keep(h: Tensor) -> Tensor:
            found[key] = h
            if len(found) == len(keys):
                raise _Enough
            return h

        return keep

    with ExitStack() as stack:
        for key in keys:
            stack.callback(attach(model, *key, keeper(key)).remove)
        yield

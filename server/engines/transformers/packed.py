"""Attention over a flat batch in which every request reads its own keys only.

transformers' SDPA form multiplies each query of such a batch with the keys of all requests and masks those of the
others, so that sixteen requests take sixteen times the work. Here requests that decode one token each are stacked,
those of about as many keys together, and every other request is taken by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Requests are stacked where the longest has at most this many times the keys of the shortest, or so many more.
MOST_UNEVEN, ALWAYS_EVEN = 2, 64

# (query [B, heads, Q, d], key, value [B, kv_heads, K, d], mask that broadcasts to [B, heads, Q, K]) -> as the query.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stack:
    """Requests with one query each.

    queries: their rows in the batch, `[n]`. keys: rows of their keys, `[n * longest]`, where a shorter request repeats
    its own first key, so that nothing of another one is read. mask: which of them are its keys, bool
    `[n, 1, 1, longest]`.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Layout:
    """Who is attended to together. alone: rows of the queries and of the keys of a request with several queries."""

    stacks: tuple[Stack, ...]
    alone: tuple[tuple[slice, slice], ...]


@lru_cache(maxsize=8)
def layout(queries: tuple[int, ...], keys: tuple[int, ...]) -> Layout:
    """Of a batch in which request i has the queries `queries[i]` to `queries[i + 1]`, and keys likewise."""
    num_queries, num_keys = np.diff(queries), np.diff(keys)
    single = np.flatnonzero(num_queries == 1)
    order = single[np.argsort(num_keys[single], kind="stable")]
    stacks = tuple(_stack(np.asarray(queries)[part], np.asarray(keys)[part], num_keys[part])
                   for part in _even(order, num_keys))
    alone = tuple((slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1]))
                  for i in np.flatnonzero(num_queries > 1).tolist())
    return Layout(stacks, alone)


def _even(order: np.ndarray, num_keys: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of `order`, which goes by the number of keys, that are even enough to be stacked."""
    start = 0
    for i in range(1, len(order) + 1):
        least = num_keys[order[start]]
        if i == len(order) or num_keys[order[i]] > max(MOST_UNEVEN * least, least + ALWAYS_EVEN):
            yield np.sort(order[start:i])
            start = i


def _stack(queries: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Stack:
    places = np.arange(lengths.max())
    own = places < lengths[:, None]
    rows = starts[:, None] + np.where(own, places, 0)
    return Stack(torch.from_numpy(queries), torch.from_numpy(rows.ravel()), torch.from_numpy(own)[:, None, None])


def attend_packed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, given: Layout, attend: Attend) -> Tensor:
    """Attention of a flat batch.

    Args:
        query: `[1, heads, T, d]`; key, value: `[1, kv_heads, K, d]`, of all requests one after the other.
        mask: additive, `[1, 1, T, K]`, of which the block of each request is read.

    Returns:
        `[1, T, heads, d]`.
    """
    _, heads, count, width = query.shape
    out = torch.empty(1, count, heads, width, dtype=value.dtype, device=value.device)
    rows, key_rows, value_rows = (x[0].transpose(0, 1) for x in (query, key, value))
    for stack in given.stacks:
        # The heads that share keys are queries of one head here, because they read the same ones.
        grouped = rows.index_select(0, stack.queries).unflatten(1, (key.shape[1], -1))
        own = [x.index_select(0, stack.keys).unflatten(0, (len(grouped), -1)).transpose(1, 2)
               for x in (key_rows, value_rows)]
        found = attend(grouped, own[0], own[1], stack.mask)
        out[0].index_copy_(0, stack.queries, found.flatten(1, 2))
    for some, theirs in given.alone:
        found = attend(query[:, :, some], key[:, :, theirs], value[:, :, theirs], mask[:, :, some, theirs])
        out[:, some] = found.transpose(1, 2)
    return out

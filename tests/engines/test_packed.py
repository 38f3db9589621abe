"""Requests of a flat batch are attended to apart, and get what dense attention over the whole batch gives them."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.generation.continuous_batching.utils import build_attention_mask

from server.engines.transformers.packed import attend_packed, layout

HEADS, KV_HEADS, WIDTH = 6, 2, 8
# (queries, keys) of each request: decoding, a whole prompt, a part of one, in the order of a batch.
BATCHES = {"decode, even": [(1, 30), (1, 31), (1, 40)], "decode, uneven": [(1, 200), (1, 3), (1, 90), (1, 1)],
           "prompts": [(7, 7), (2, 2)], "mixed": [(1, 12), (5, 9), (1, 300), (33, 33), (1, 11)]}


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1])


def given(batch: list[tuple[int, int]], window: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int], list[int]]:
    """Query, key, value and the stock engine's mask, with where each request begins."""
    queries, keys = [0], [0]
    for more_queries, more_keys in batch:
        queries.append(queries[-1] + more_queries)
        keys.append(keys[-1] + more_keys)
    generator = torch.Generator().manual_seed(len(batch))
    query = torch.randn(1, queries[-1], HEADS, WIDTH, generator=generator).transpose(1, 2)
    key, value = (torch.randn(1, keys[-1], KV_HEADS, WIDTH, generator=generator).transpose(1, 2) for _ in range(2))
    mask = torch.full((1, 1, queries[-1], keys[-1]), torch.finfo(torch.float32).min)
    build_attention_mask(mask, queries, keys, window)
    return query, key, value, mask, queries, keys


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("window", [1, 8])
def test_it_is_dense_attention(name: str, window: int) -> None:
    # Of a sliding layer the engine hands over no more keys than a single query sees.
    batch = [(q, min(k, q + window - 1) if window > 1 else k) for q, k in BATCHES[name]]
    query, key, value, mask, queries, keys = given(batch, window)
    found = attend_packed(query, key, value, mask, layout(tuple(queries), tuple(keys)), plain)
    every = [x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value)]
    scores = (query @ every[0].transpose(2, 3)) * WIDTH ** -0.5 + mask
    expected = (scores.softmax(-1) @ every[1]).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)


def test_no_request_reads_keys_of_another() -> None:
    """Values that are not finite in one request, padding included, show in that one alone."""
    query, key, value, mask, queries, keys = given(BATCHES["mixed"])
    clean = attend_packed(query, key, value, mask, layout(tuple(queries), tuple(keys)), plain)
    key[:, :, keys[2]:keys[3]] = torch.nan
    value[:, :, keys[0]:keys[1]] = torch.inf
    found = attend_packed(query, key, value, mask, layout(tuple(queries), tuple(keys)), plain)
    broken = sorted({*range(queries[0], queries[1]), *range(queries[2], queries[3])})
    others = [row for row in range(queries[-1]) if row not in broken]
    assert torch.equal(found[:, others], clean[:, others])
    assert not found[:, broken].isfinite().any()


def test_stacks_hold_requests_of_about_as_many_keys() -> None:
    lengths = [100, 4000, 120, 90, 3000, 5]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    found = layout(tuple(range(len(lengths) + 1)), tuple(starts))
    assert sorted(sorted(stack.queries.tolist()) for stack in found.stacks) == [[0, 2, 3], [1, 4], [5]]
    assert sum(len(stack.keys) for stack in found.stacks) <= 2 * sum(lengths)

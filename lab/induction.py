"""Heads that copy, laid into a new model before its training.

To copy, a model looks up what followed a word when the word stood before. It needs heads that tell a token which tokens
stand in front of it, and heads that find by this. Training finds the two together or not at all, and did not find them
in any time that the lab has for it. Laid down, they are a start from which training goes on: it moves every weight.

In the residual stream the first lane is the same for every token, the next ones hold a token's identity, and the last
two bands hold that of the token in front and of the one in front of that.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

IDENTITY, BAND = 64, 32  # lanes: one constant and 63 of identity, then two bands
FAST = ((0, 0.5), (1, 0.3), (2, 0.2))  # pairs of the rotation that tell neighbours apart, and their shares
SPREAD, CONSTANT, WRITE = 0.08, 0.4, 0.075
NEIGHBOUR_GAIN, LOOK_UP_GAIN = 1.75, 1.4  # of queries and of keys


@torch.no_grad()
def lay_heads(model: PreTrainedModel) -> None:
    """Two heads in the first layer that look back by one and by two tokens, and two in the second that look up."""
    inner, size = model.model, model.config.head_dim
    embedding = inner.embed_tokens.weight
    embedding[:, 0] = CONSTANT
    embedding[:, 1:IDENTITY].normal_(0, SPREAD)
    embedding[:, IDENTITY:] = 0
    # What the bands hold of an identity: 32 directions of 63.
    shown = torch.linalg.qr(torch.randn(IDENTITY - 1, BAND))[0].T
    bands = [slice(IDENTITY + BAND * n, IDENTITY + BAND * (n + 1)) for n in range(2)]
    first, second = (inner.layers[n].self_attn for n in range(2))
    for attention, gain in ((first, NEIGHBOUR_GAIN), (second, LOOK_UP_GAIN)):
        attention.q_norm.weight.fill_(gain)
        attention.k_norm.weight.fill_(gain)
    speed = model.config.rope_parameters["rope_theta"] ** (-torch.arange(size // 2) / (size // 2))
    for head, band in enumerate(bands):
        at = _clear(first, head, size)
        for pair, share in FAST:
            turn = speed[pair] * (head + 1)
            low, high = at.start + pair, at.start + pair + size // 2
            first.k_proj.weight[low, 0] = share ** 0.5
            first.q_proj.weight[low, 0] = share ** 0.5 * turn.cos()
            first.q_proj.weight[high, 0] = -share ** 0.5 * turn.sin()
        first.v_proj.weight[at.start:at.start + BAND, 1:IDENTITY] = shown
        first.o_proj.weight[band, at.start:at.start + BAND] = WRITE * torch.eye(BAND)
    # Pairs that hardly turn over the length of a document.
    slow = [*range(size // 4, size // 2), *range(3 * size // 4, size)]
    for head, (asks, offers) in enumerate(((bands[0], bands[1]), (slice(1, IDENTITY), bands[0]))):
        at = _clear(second, head, size)
        rows = [at.start + pair for pair in slow]
        second.q_proj.weight[rows, asks] = shown if asks.start == 1 else torch.eye(BAND)
        second.k_proj.weight[rows, offers] = torch.eye(BAND)
        second.v_proj.weight[at.start + 1:at.stop, 1:IDENTITY] = torch.eye(IDENTITY - 1)
        second.o_proj.weight[1:IDENTITY, at.start + 1:at.stop] = WRITE * torch.eye(IDENTITY - 1)


def _clear(attention: torch.nn.Module, head: int, size: int) -> slice:
    """Where a head's rows are, which are made zero."""
    at = slice(head * size, (head + 1) * size)
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        part.weight[at] = 0
    attention.o_proj.weight[:, at] = 0
    return at

"""Logits that tokens are chosen by where there is a contrast (Self-Contrast MoE, 2024, arXiv 2405.14507; Contrastive
Decoding, 2023, arXiv 2210.15097)."""

from collections.abc import Sequence

import torch

from server.engines.transformers.constraints import listed
from server.engines.transformers.running import Running


def combine(strong: torch.Tensor, weak: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """`(1 + beta) strong - beta weak` where the probability of a token in the strong run is at least alpha times its
    largest, and minus infinity elsewhere. Logits `[n, vocab_size]`, alpha and beta `[n, 1]`.

    A row of weak logits that are not finite gives one of NaN.
    """
    least = strong.amax(dim=-1, keepdim=True) + alpha.log()
    score = ((1 + beta) * strong - beta * weak).masked_fill(strong < least, float("-inf"))
    return score.masked_fill(~weak.isfinite().all(dim=-1, keepdim=True), float("nan"))


def contrasted(logits: torch.Tensor, weak: torch.Tensor, running: Sequence[Running]) -> torch.Tensor:
    """`logits [n, vocab_size]` with those of the requests that have a contrast replaced by the combined ones.

    Args:
        weak: logits of the companions, `[m, vocab_size]`, in the order of their requests.
    """
    chosen = [i for i, item in enumerate(running) if item.weak is not None]
    if not chosen:
        return logits
    # What lists of the request rule out is taken away first, or none of the plausible tokens might be left.
    part = logits[chosen]
    strong = listed(part, part, [running[i] for i in chosen])
    contrasts = [contrast for i in chosen if (contrast := running[i].generation.contrast) is not None]
    alpha, beta = (torch.tensor(column, device=logits.device).unsqueeze(1) for column in (
        [contrast.alpha for contrast in contrasts], [contrast.beta for contrast in contrasts]))
    found = logits.clone()
    found[chosen] = combine(strong, weak, alpha, beta)
    return found

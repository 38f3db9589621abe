"""Teacher-forced scores out of rows of log-probabilities, made a few rows at a time, since vocabularies are large."""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engines.data import Likeliest, Scores


def placed(logprobs: Tensor, targets: Tensor, top: int | None) -> list[Tensor]:
    """What is kept of some rows `[n, vocab_size]`, as float32 on the CPU: the log-probability of each row's target
    `[n, 1]`; if `top` is given its rank `[n, 1]` too, and ids and log-probabilities of the likeliest `[n, top]`. Ids
    and ranks are whole numbers below 2**24, so a float32 holds them exactly."""
    chosen = logprobs.gather(1, targets.unsqueeze(1))
    if top is None:
        return [chosen.float().cpu()]
    ranks = 1 + (logprobs > chosen).sum(dim=1, keepdim=True)
    values, ids = logprobs.topk(top, dim=1)
    return [part.float().cpu() for part in (chosen, ranks, ids, values)]


def scores_of(parts: Sequence[Sequence[Tensor]], full: Tensor | None) -> Scores:
    """`parts`: what was kept of the rows, in order; row t predicts token t + 1, and the last one nothing."""
    chosen, *more = (torch.cat(columns) for columns in zip(*parts, strict=True))
    logprobs = torch.full((len(chosen),), torch.nan)
    logprobs[1:] = chosen[:-1, 0]
    if not more:
        return Scores(logprobs, full)
    # The row before a token is the one that predicts it.
    ranks, ids, values = (part.roll(1, dims=0) for part in more)
    return Scores(logprobs, full, Likeliest(ids.long(), values, ranks[:, 0].long()))

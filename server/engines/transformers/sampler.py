"""Choosing tokens for all requests of a step at once.

A token is drawn by a race: token v arrives after a time of E_v / p_v, where E_v is exponential, and the first one
wins, which is v with probability p_v. It is the Gumbel-max draw without its logarithms. The times are a function of
seed, index of the token and token id (`noise`), and each token runs by itself. No order of the tokens is involved, so
two that swap places because a batch rounds otherwise change nothing. A request draws the same tokens alone, in a
batch, and again.
"""

from collections.abc import Sequence

import torch

from server.engines.data import LEAST_LOGPROB, Sampling
from server.engines.transformers.constraints import is_ruled, listed
from server.engines.transformers.noise import exponential, keys
from server.engines.transformers.running import Drawn, Running
from server.engines.transformers.tally import Tally

# The likeliest tokens among which the end of top_p is looked for first, and by what factor more are taken if need be.
FIRST_LOOK, MORE = 256, 16
# Numbers of one part of a draw: what is made beside the logits is bounded, and stays in the caches of a CPU.
PART_NUMBERS = 2**18

NO_TOKEN, NONE_LEFT = -1, -2


def sample(logits: torch.Tensor, running: Sequence[Running]) -> torch.Tensor:
    """Token ids `[n]` int64 for `logits [n, vocab_size]` float32, one row per request; NO_TOKEN for a row that is not
    finite, NONE_LEFT for one whose request rules every token out. A row never changes what another one gets."""
    settings = [item.generation.sampling for item in running]
    scores = listed(_penalised(logits, running, settings), logits, running)
    likeliest = scores.argmax(dim=-1)
    # Of a row that holds NaN or infinity that is the likeliest; minus infinity only rules tokens out.
    fine = scores.gather(1, likeliest.unsqueeze(1)).squeeze(1).isfinite()
    drawn = [i for i, s in enumerate(settings) if s.temperature > 0]
    tokens = likeliest
    if drawn:
        tokens[drawn] = _draw(scores[drawn], [running[i] for i in drawn], [settings[i] for i in drawn])
    ruled = torch.tensor([NONE_LEFT if is_ruled(item) else NO_TOKEN for item in running], device=scores.device)
    empty = scores.gather(1, likeliest.unsqueeze(1)).squeeze(1) == float("-inf")
    return torch.where(fine, tokens, torch.where(empty, ruled, NO_TOKEN))


def _penalised(logits: torch.Tensor, running: Sequence[Running], settings: Sequence[Sampling]) -> torch.Tensor:
    scores = logits
    for i, (item, s) in enumerate(zip(running, settings, strict=True)):
        if s.repetition_penalty == 1.0 and not s.presence_penalty and not s.frequency_penalty and not s.logit_bias:
            continue
        if scores is logits:
            scores = logits.clone()
        row = scores[i]
        if item.tally is None:
            item.tally = Tally(len(item.generation.prompt_ids), len(row), row.device)
        item.tally.update(item.token_ids)
        if s.repetition_penalty != 1.0:
            less = torch.where(row > 0, row / s.repetition_penalty, row * s.repetition_penalty)
            row.copy_(torch.where(item.tally.seen, less, row))
        if s.presence_penalty or s.frequency_penalty:
            counts = item.tally.counts
            row -= s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
        if s.logit_bias:
            row[torch.tensor(list(s.logit_bias), device=row.device)] += torch.tensor(list(s.logit_bias.values()),
                                                                                     device=row.device)
    return scores


def _draw(scores: torch.Tensor, running: Sequence[Running], settings: Sequence[Sampling]) -> torch.Tensor:
    rows = max(1, PART_NUMBERS // scores.shape[-1]) if scores.device.type == "cpu" else len(scores)
    temperatures = _column([s.temperature for s in settings], scores)
    of_rows = torch.from_numpy(keys([item.seed for item in running], [len(item.drawn) for item in running]))
    of_rows = of_rows.to(scores.device)
    drawn = []
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        # From the likeliest down: however low the temperature, nothing overflows but to a probability of 0.
        chances = (scores[part] - scores[part].amax(dim=-1, keepdim=True)).div_(temperatures[part]).exp_()
        _cut(chances, settings[part])
        drawn.append(chances.div_(exponential(of_rows[part], scores.shape[-1])).argmax(dim=-1))
    return torch.cat(drawn)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32).unsqueeze(1)


def _cut(chances: torch.Tensor, settings: Sequence[Sampling]) -> None:
    """Set the chances `[n, vocab_size]`, each over that of the likeliest token, to -1 where min_p, top_k and top_p
    leave tokens out. The last two keep so many of the likeliest, the lower ids first among equals."""
    size = chances.shape[-1]
    if any(s.min_p > 0 for s in settings):
        chances.masked_fill_(chances < _column([s.min_p for s in settings], chances), -1.0)
    if all(s.top_k <= 0 and s.top_p >= 1 for s in settings):
        return
    most = _column([min(s.top_k, size) if s.top_k > 0 else size for s in settings], chances).long()
    shares = _column([s.top_p for s in settings], chances)
    looked = max([min(s.top_k, size) for s in settings if s.top_k > 0], default=1)
    if any(s.top_p < 1 for s in settings):
        looked = min(size, max(looked, FIRST_LOOK))
        everything = chances.clamp_min(0).sum(-1, keepdim=True, dtype=torch.float64)
    while True:
        likeliest = chances.topk(looked).values
        counts = most
        if any(s.top_p < 1 for s in settings):
            mass = likeliest.clamp_min(0).double().cumsum(-1)
            total = torch.where(most < size, mass.gather(1, (most - 1).clamp_max(looked - 1)), everything)
            # The token that reaches the share belongs to those that are kept.
            reached = (mass < shares * total).sum(-1, keepdim=True) + 1
            counts = torch.where(shares < 1, torch.minimum(most, reached), most)
            if looked < size and ((counts > looked) & (shares < 1)).any():
                looked = min(size, looked * MORE)
                continue
        break
    limited = counts < size
    least = likeliest.gather(1, (counts - 1).clamp_max(looked - 1))
    out = limited & (chances < least)
    if (limited & ((size - out.sum(-1, keepdim=True)) > counts)).any():
        equal = chances == least
        room = counts - (chances > least).sum(-1, keepdim=True)
        out |= limited & equal & (equal.cumsum(-1) > room)
    chances.masked_fill_(out, -1.0)


def reports(logits: torch.Tensor, tokens: Sequence[int], running: Sequence[Running]) -> list[Drawn]:
    """What is told of the tokens that were drawn from `logits [n, vocab_size]`, one per request."""
    settings = [item.generation.sampling for item in running]
    wanted = [i for i, s in enumerate(settings) if s.logprobs is not None]
    found = [Drawn(None, ())] * len(running)
    if not wanted:
        return found
    logprobs = logits[wanted].log_softmax(dim=-1)
    picked = torch.tensor([tokens[i] for i in wanted], device=logits.device).unsqueeze(1)
    logprobs.clamp_min_(LEAST_LOGPROB)
    chosen = logprobs.gather(1, picked).squeeze(1).tolist()
    for row, i in enumerate(wanted):
        found[i] = Drawn(chosen[row], _likeliest(logprobs[row], settings[i].logprobs or 0))
    return found


def _likeliest(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens, the lower ids first among equals: `topk` alone orders those as it likes, and
    otherwise for another number of them."""
    if not count:
        return ()
    values, ids = logprobs.topk(min(count, len(logprobs)))
    # Below the last value are no candidates, and of those equal to it there may be more than were taken.
    if (values[1:] == values[:-1]).any() or int((logprobs >= values[-1]).sum()) > len(values):
        ids = (logprobs >= values[-1]).nonzero().flatten()
        values, order = logprobs[ids].sort(descending=True, stable=True)
        ids, values = ids[order][:count], values[:count]
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))

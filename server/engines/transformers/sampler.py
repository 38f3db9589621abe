"""Choosing tokens for all requests of a step at once.

Random numbers are a function of (seed, index of the token in its completion), not of a shared generator: a request
draws the same tokens alone, in any batch, and after a recompute.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from server.engines.base import Sampling
from server.engines.transformers.running import Choice, Running
from server.engines.transformers.tally import Tally

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seeds: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """One number in (0, 1) per (seed, counter), by the splitmix64 mixing function."""
    with np.errstate(over="ignore"):
        z = seeds + (counters + np.uint64(1)) * _GOLDEN
        for _ in range(2):  # twice, as neighbouring seeds must not give neighbouring numbers
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) / float(1 << 53)


NO_TOKEN = -1


def sample(logits: torch.Tensor, running: Sequence[Running]) -> torch.Tensor:
    """Token ids `[n]` int64 for `logits [n, vocab_size]` float32, one row per request; NO_TOKEN for a row that is not
    finite. A row never changes what another one gets."""
    settings = [item.generation.sampling for item in running]
    scores = _penalised(logits, running, settings)
    likeliest = scores.argmax(dim=-1)
    # Of a row that holds NaN or infinity that is the likeliest; minus infinity only rules tokens out.
    fine = scores.gather(1, likeliest.unsqueeze(1)).squeeze(1).isfinite()
    drawn = [i for i, s in enumerate(settings) if s.temperature > 0]
    tokens = likeliest
    if drawn:
        tokens[drawn] = _draw(scores[drawn], [running[i] for i in drawn], [settings[i] for i in drawn])
    return torch.where(fine, tokens, NO_TOKEN)


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
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=scores.device, dtype=torch.float32).unsqueeze(1)

    # From the likeliest down: however low the temperature, nothing overflows but to a probability of 0.
    scaled = (scores - scores.amax(dim=-1, keepdim=True)) / column([s.temperature for s in settings])
    # Sorted order makes truncation a cut, and the draw independent of how the vocabulary is numbered.
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    keep = torch.ones_like(probs, dtype=torch.bool)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    if any(s.top_k > 0 for s in settings):
        keep &= rank < column([s.top_k if s.top_k > 0 else probs.shape[-1] for s in settings])
    if any(s.min_p > 0 for s in settings):
        keep &= probs >= column([s.min_p for s in settings]) * probs[:, :1]
    probs = probs * keep
    if any(s.top_p < 1 for s in settings):
        # Among what top_k and min_p left, the smallest set whose mass reaches top_p; the best token always stays.
        mass = probs / probs.sum(-1, keepdim=True)
        before = mass.cumsum(-1) - mass
        probs = probs * ((before < column([s.top_p for s in settings])) | (rank == 0))
    seeds = np.array([item.seed for item in running], dtype=np.uint64)
    counters = np.array([len(item.choices) for item in running], dtype=np.uint64)
    draws = torch.tensor(uniform(seeds, counters), dtype=torch.float32, device=probs.device).unsqueeze(1)
    cumulative = probs.cumsum(-1)
    place = torch.searchsorted(cumulative, draws * cumulative[:, -1:]).clamp_max(probs.shape[-1] - 1)
    # Rounding at the end of the cumulative sum must not reach a token that was cut off.
    last = ((probs > 0).sum(-1, keepdim=True) - 1).clamp_min(0)
    return order.gather(1, torch.minimum(place, last)).squeeze(1)


def choices(logits: torch.Tensor, tokens: Sequence[int], running: Sequence[Running]) -> list[Choice]:
    """What is told of the tokens that were drawn from `logits [n, vocab_size]`, one per request."""
    settings = [item.generation.sampling for item in running]
    wanted = [i for i, s in enumerate(settings) if s.logprobs is not None]
    found = [Choice(None, ())] * len(running)
    if not wanted:
        return found
    logprobs = logits[wanted].log_softmax(dim=-1)
    picked = torch.tensor([tokens[i] for i in wanted], device=logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, picked).squeeze(1).tolist()
    most = max(settings[i].logprobs or 0 for i in wanted)
    values, ids = logprobs.topk(min(most, logprobs.shape[-1]), dim=-1) if most else (None, None)
    for row, i in enumerate(wanted):
        count = settings[i].logprobs or 0
        top: tuple[tuple[int, float], ...] = ()
        if values is not None and ids is not None and count:
            top = tuple(zip(ids[row, :count].tolist(), values[row, :count].tolist(), strict=True))
        found[i] = Choice(chosen[row], top)
    return found

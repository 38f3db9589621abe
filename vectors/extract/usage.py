"""Which experts a text's tokens choose, as shares of its tokens."""

from collections.abc import Sequence

import torch

from steering.language.errors import UnsupportedModel
from steering.models.facts import ModelFacts
from vectors.extract.scratch import Scratch
from vectors.extract.subject import Subject, Tokens, stream
from vectors.extract.work import Span

# Their choice goes by groups or by a correction that the logits do not show.
OPAQUE = ("deepseek_v2", "deepseek_v3")


def check_routers(facts: ModelFacts) -> None:
    """Raises UnsupportedModel: the chosen experts do not follow from the router's logits."""
    if facts.family in OPAQUE:
        raise UnsupportedModel(f"the experts that {facts.family} chooses cannot be told from its router's logits",
                               param="method")


def read_usage(subject: Subject, texts: Sequence[Tokens], store: Scratch, span: Span,
               positions: Sequence[int] | None = None) -> None:
    """Fill `store` with one row per text and layer: the share of its tokens (or of those at `positions`) that choose
    each expert, `[E]`."""
    facts = subject.facts
    for n, found in stream(subject, texts, "router", store.layers, positions, span):
        for layer, logits in found.items():
            chosen = logits.topk(facts.experts_per_token, dim=-1).indices
            counts = torch.bincount(chosen.flatten(), minlength=facts.num_experts).double()
            store.put(layer, n, counts / len(logits))


def usage(store: Scratch, texts: Sequence[int], weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean usage over texts, `[num_layers, E]` float64; weights `[len(texts)]` where texts do not count alike."""
    if weights is None:
        return torch.stack([store.rows(layer, texts).mean(dim=0) for layer in store.layers])
    return torch.stack([(store.rows(layer, texts) * weights.unsqueeze(1)).sum(dim=0) / weights.sum()
                        for layer in store.layers])

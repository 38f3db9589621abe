"""How tokens choose experts, in our own code, so that an edit can act before and after the choice.

The rule of every family is the same pipeline with different settings. Logits become scores, by softmax or sigmoid over
all experts. With DeepSeek, groups of experts are chosen first. The k best experts are taken, and their weights are
normalised or not and multiplied by a factor. `select` without edits gives exactly what the family's own gate gives.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# How far above the best logit a forced expert is put (the rule of SteerMoE).
FORCE_MARGIN = 0.01


@dataclass(frozen=True)
class Routing:
    """Which experts each of T tokens uses, and how much.

    Attributes:
        logits: raw router logits, `[T, E]`.
        weights: gate weights as the experts use them, `[T, k]`.
        experts: selected experts, `[T, k]` int64. An expert with weight 0 contributes nothing.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor


@dataclass(frozen=True, eq=False)
class RouterRule:
    """How a gate goes from logits to a choice.

    Attributes:
        num_experts, top_k: E and k.
        scoring: logits -> scores over all experts.
        normalise: divide the k weights by their sum (plus `epsilon`).
        scale: factor on the weights after that.
        num_groups, top_groups: experts stand in equal groups and only those of the best `top_groups` may be chosen.
        group_score: a group is as good as its best expert ("max"), or the sum of its best two ("top2").
        correction: added to the scores for the choice only, never for the weights, `[E]`. It is the model's own buffer:
            take the rule after the model is on its device.
        weights_like_logits: weights are handed on in the dtype of the logits (else float32).
        sorted: the k experts come best first.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    correction: Tensor | None = None
    weights_like_logits: bool = True
    sorted: bool = True


def select(logits: Tensor, rule: RouterRule, *, logit_bias: Tensor | None = None, force: Tensor | None = None
           ) -> Routing:
    """Choose experts for T tokens.

    Args:
        logits: raw router logits, `[T, E]`.
        logit_bias: added to the logits before everything, `[T, E]`. `-inf` switches an expert off: the next best takes
            its place. Where a token has fewer than k experts left, the slots over keep weight 0.
        force: `[T, E]` bool. A forced expert's logit is put `FORCE_MARGIN` above the token's best one, and it is chosen
            whatever its group, correction or bias. At most k experts of a token can be.

    Returns:
        The routing, with `logits` as they were given.
    """
    biased = logits.float() if logit_bias is None else logits.float() + logit_bias.float()
    forced = torch.zeros_like(biased, dtype=torch.bool) if force is None else force
    off = torch.isneginf(biased) & ~forced

    # The groups are chosen without the forced experts' lift, so that forcing one leaves the others' groups alone.
    open_groups = _group_mask(biased, rule)

    lifted = biased
    if force is not None:
        best = biased.max(dim=-1, keepdim=True).values
        best = torch.where(torch.isneginf(best), 0.0, best)
        lifted = torch.where(forced, best + FORCE_MARGIN, biased)
    scores = _scores(lifted, rule)

    choice = _choice(scores, rule).masked_fill(off, -torch.inf)
    if open_groups is not None:
        choice = choice.masked_fill(~open_groups, -torch.inf)
    choice = choice.masked_fill(forced, torch.inf)
    best_scores, experts = torch.topk(choice, rule.top_k, dim=-1, sorted=rule.sorted)

    weights = scores.gather(-1, experts).masked_fill(torch.isneginf(best_scores), 0.0)
    if rule.normalise:
        total = weights.sum(dim=-1, keepdim=True) + rule.epsilon
        weights = weights / total.masked_fill(total == 0, 1.0)
    weights = weights * rule.scale
    return Routing(logits, weights.to(logits.dtype) if rule.weights_like_logits else weights, experts)


def _scores(logits: Tensor, rule: RouterRule) -> Tensor:
    # The softmax of a token with every expert off is NaN. It does not leave `select`, because the weights of experts
    # that are off are masked there.
    return logits.sigmoid() if rule.scoring == "sigmoid" else logits.softmax(dim=-1)


def _choice(scores: Tensor, rule: RouterRule) -> Tensor:
    return scores if rule.correction is None else scores + rule.correction


def _group_mask(biased: Tensor, rule: RouterRule) -> Tensor | None:
    """Experts of the chosen groups, `[T, E]` bool. Experts that are off do not count for their group."""
    if rule.num_groups == 1:
        return None
    choice = _choice(_scores(biased, rule), rule).masked_fill(torch.isneginf(biased), -torch.inf)
    grouped = choice.view(len(choice), rule.num_groups, -1)
    if rule.group_score == "max":
        group_scores = grouped.max(dim=-1).values
    else:
        pair = grouped.topk(2, dim=-1).values
        alone = pair[..., 0]
        group_scores = torch.where(torch.isneginf(pair[..., 1]), alone, pair.sum(dim=-1))
    chosen = torch.topk(group_scores, rule.top_groups, dim=-1, sorted=False).indices
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, chosen, True)
    return mask.unsqueeze(-1).expand_as(grouped).flatten(-2)

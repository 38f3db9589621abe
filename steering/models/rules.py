"""How the gates of the families choose experts: from a gate module of transformers to a `RouterRule`."""

from typing import Any

from steering.language.errors import UnsupportedModel
from steering.models.routing import RouterRule


def softmax_rule(gate: Any) -> RouterRule:
    """The most common gate: softmax over all experts, the k best, normalised if the model says so."""
    return RouterRule(gate.num_experts, gate.top_k, normalise=gate.norm_topk_prob)


def mixtral_rule(gate: Any) -> RouterRule:
    return RouterRule(gate.num_experts, gate.top_k, normalise=True, weights_like_logits=False)


def deepseek_v2_rule(gate: Any) -> RouterRule:
    """Raises UnsupportedModel where the configuration names a way of choosing that is not known."""
    if gate.topk_method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModel(f"the deepseek_v2 router method {gate.topk_method!r} is not known", param="model",
                               fix="Known: greedy, group_limited_greedy.")
    grouped = gate.topk_method == "group_limited_greedy"
    return RouterRule(gate.num_experts, gate.top_k, scale=gate.routed_scaling_factor, sorted=False,
                      num_groups=gate.num_group if grouped else 1, top_groups=gate.topk_group if grouped else 1)


def deepseek_v3_rule(gate: Any) -> RouterRule:
    return RouterRule(gate.num_experts, gate.top_k, scoring="sigmoid", normalise=gate.norm_topk_prob, epsilon=1e-20,
                      scale=gate.routed_scaling_factor, num_groups=gate.num_group, top_groups=gate.topk_group,
                      group_score="top2", correction=gate.e_score_correction_bias, sorted=False)

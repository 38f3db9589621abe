"""Facts of a loaded model, read from its configuration and structure."""

from typing import TYPE_CHECKING, Any

from steering.language.errors import UnsupportedModel
from steering.models.blocks import blocks_of, family_of
from steering.models.facts import ModelFacts
from steering.models.routers import router_rule
from steering.models.taps import offered_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_facts(model: "PreTrainedModel", *, model_id: str, fingerprint: str) -> ModelFacts:
    """Everything the compiler must know of `model`. `sites` is what its structure offers; a self-test may narrow it.

    Raises:
        UnsupportedModel: unknown family, or one that looks ahead in the text.
    """
    family = family_of(model)
    config: Any = model.config
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModel(f"{model_id} attends to later tokens (use_bidirectional_attention): it does not write "
                               "texts", param="model")
    sites = offered_sites(model)
    d_model: int = config.hidden_size
    num_heads: int = config.num_attention_heads
    head_dim: int = getattr(config, family.head_width, None) or d_model // num_heads
    d_ff: int = getattr(config, family.mlp_width, None) or 4 * d_model
    rule = router_rule(model, sites["router"][0]) if "router" in sites else None
    return ModelFacts(
        model_id=model_id, fingerprint=fingerprint, family=family.name, num_layers=len(blocks_of(model)),
        d_model=d_model, num_heads=num_heads, head_dim=head_dim, d_ff=d_ff, vocab_size=config.vocab_size,
        context_length=_context_length(config), num_experts=rule.num_experts if rule else 0,
        experts_per_token=rule.top_k if rule else 0, sites=sites)


def _context_length(config: Any) -> int:
    """Tokens of a text. Where a text over a length turns other frequencies on (longrope), below that length.

    The frequencies are the batch's: a long text would change those of the texts beside it and of its own cached keys.
    Engines keep one position more than the context, which must not turn them on either.
    """
    longest: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") == "longrope":
            longest = min(longest, part["original_max_position_embeddings"] - 1)
    return longest

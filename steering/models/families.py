"""The architecture families: where the sites of a block live in each of them.

A family is a table of module paths below one block, read off the family's own modelling code. `attn_out` and `mlp_out`
are what the block adds to the residual stream, so families that norm after attention or MLP point at that norm.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from steering.language.errors import LayerOutOfRange, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Paths below one block (a path that a block lacks means that this block has no such site).

    Attributes:
        name: `config.model_type`.
        blocks: path of the list of blocks below the base model.
        attn_out, mlp_out: modules whose output is added to the residual stream.
        head_out: the attention's output projection; its input is the concatenated heads.
        mlp_act: the down projection of a dense MLP; its input is the neurons.
        router: the gate of a mixture of experts, returning (logits, weights, experts); None for dense families.
    """

    name: str
    blocks: str = "layers"
    attn_out: str = "self_attn"
    mlp_out: str = "mlp"
    head_out: str = "self_attn.o_proj"
    mlp_act: str = "mlp.down_proj"
    router: str | None = None


def _post_norm(name: str) -> Family:
    return Family(name, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")


FAMILIES: dict[str, Family] = {family.name: family for family in (
    Family("llama"),
    Family("mistral"),
    Family("qwen2"),
    Family("qwen3"),
    _post_norm("gemma2"),
    _post_norm("gemma3_text"),
    Family("gpt2", blocks="h", attn_out="attn", head_out="attn.c_proj", mlp_act="mlp.c_proj"),
    Family("gpt_neox", attn_out="attention", head_out="attention.dense", mlp_act="mlp.dense_4h_to_h"),
    Family("phi3"),
    _post_norm("olmo2"),
    Family("mixtral", router="mlp.gate"),
    Family("qwen2_moe", router="mlp.gate"),
    Family("qwen3_moe", router="mlp.gate"),
    Family("olmoe", router="mlp.gate"),
    Family("deepseek_v2", router="mlp.gate"),
    Family("deepseek_v3", router="mlp.gate"),
)}


def family_of(model: "PreTrainedModel") -> Family:
    """The family of a loaded model, by `config.model_type`.

    Raises:
        UnsupportedModel: naming the type, for one that is not in the table.
    """
    config: Any = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModel(f"the architecture {config.model_type!r} is not known", param="model",
                               fix=f"Known: {', '.join(sorted(FAMILIES))}.")
    return family


def blocks_of(model: "PreTrainedModel") -> list[nn.Module]:
    """The blocks of a loaded model, first to last."""
    family = family_of(model)
    blocks = find(model.base_model, family.blocks)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        raise UnsupportedModel(f"{type(model).__name__} has no list of blocks at {family.blocks!r}", param="model",
                               fix="Load it as a causal language model of transformers.")
    return list(blocks)


def block_of(model: "PreTrainedModel", layer: int) -> nn.Module:
    """Block `layer`, 0-based.

    Raises:
        LayerOutOfRange: for a layer that the model does not have.
    """
    blocks = blocks_of(model)
    if not 0 <= layer < len(blocks):
        raise LayerOutOfRange(f"layer {layer} does not exist ({len(blocks)} layers)", param="layers",
                              fix=f"Use 0 to {len(blocks) - 1}.")
    return blocks[layer]


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = found._modules.get(name) if found is not None else None
    return found

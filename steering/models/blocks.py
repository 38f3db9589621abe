"""Finding the blocks of a loaded model, and modules below them."""

from typing import TYPE_CHECKING, Any

from torch import nn

from steering.language.errors import LayerOutOfRange, UnsupportedModel
from steering.models.families import FAMILIES, Family, known

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def family_named(model_type: str) -> Family:
    """The entry of a `config.model_type`.

    Raises:
        UnsupportedModel: naming the type, for one that is not in the table.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModel(f"the architecture {model_type!r} is not known", param="model", fix=f"Known: {known()}.")
    return family


def family_of(model: "PreTrainedModel") -> Family:
    """The family of a loaded model. Raises UnsupportedModel as `family_named`."""
    config: Any = model.config
    return family_named(config.model_type)


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

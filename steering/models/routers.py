"""The router of a mixture layer: its rule, and hooks that edit which experts the tokens use.

The routers of all families return (logits, weights, experts), and their blocks hand the last two on to whichever
implementation of the experts is configured. Therefore one hook on the router's output serves all of them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steering.language.errors import UnsupportedSite
from steering.models.blocks import block_of, family_of, find
from steering.models.routing import RouterRule, Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RouterEdit = Callable[[Tensor, Routing], Routing | None]


def router_rule(model: "PreTrainedModel", layer: int) -> RouterRule:
    """How the gate of block `layer` chooses experts, for `steering.models.routing.select`.

    Raises:
        UnsupportedSite: the layer has no router.
        UnsupportedModel: the configuration names a way of choosing that is not known.
    """
    gate = _router(model, layer)
    return family_of(model).rule(gate)


def attach_router(model: "PreTrainedModel", layer: int, edit: RouterEdit) -> RemovableHandle:
    """Call `edit` with the hidden states `[T, d_model]` that the router of block `layer` saw and its routing.

    None leaves everything untouched, bit for bit; a new routing takes the old one's place. `select` with the rule of
    `router_rule` makes one from edited logits.

    Raises:
        UnsupportedModel, LayerOutOfRange, UnsupportedSite: as `tap`.
    """

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[Tensor, Tensor, Tensor]) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        logits, weights, experts = output
        edited = edit(hidden.reshape(-1, hidden.shape[-1]), Routing(logits, weights, experts))
        if edited is None:
            return None
        return edited.logits, edited.weights.to(weights.dtype), edited.experts

    return _router(model, layer).register_forward_hook(hook, with_kwargs=True)


def _router(model: "PreTrainedModel", layer: int) -> nn.Module:
    family = family_of(model)
    router = find(block_of(model, layer), family.router) if family.router is not None else None
    if router is None:
        raise UnsupportedSite(f"layer {layer} of this {family.name} model has no router", param="site",
                              fix="See GET /v1/capabilities.")
    return router
